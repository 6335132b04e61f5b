/* The log: numbered segments of at most 1 MiB, made of frames
 *
 *     { u64 nanoseconds since the epoch, u8 stream, u32 length } bytes
 *
 * little endian, packed. A frame is a chunk as the program wrote it; lines are the reader's
 * business. A frame that a crash cut off is the last one of its segment and is ignored by readers.
 * The agent deletes segments that it no longer needs; nobody else writes here. */
#define _GNU_SOURCE
#include "keeper.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define SEGMENT_SIZE (1u << 20)
#define HEAD 13
#define MARKER (HEAD + 64) /* kept free in every segment, so that a loss can always be told */

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void segment_name(char name[16], uint32_t number) {
    snprintf(name, 16, "%u", number);
}

static int open_directory(struct log *log) {
    mkdirat(log->status, "log", 0700); /* it may be there from a try that found no room for more */
    log->directory = openat(log->status, "log", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return log->directory >= 0;
}

static int next_segment(struct log *log) {
    char name[16];
    if (log->directory < 0 && !open_directory(log))
        return 0;
    segment_name(name, log->newest + 1);
    int fd = openat(log->directory, name, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0)
        return 0;
    if (log->segment >= 0)
        close(log->segment);
    log->segment = fd;
    log->newest++;
    log->used = 0;
    return 1;
}

void log_begin(struct log *log, int status_fd, uint32_t max_segments, uint32_t on_full) {
    *log = (struct log){.status = status_fd,
                        .directory = -1,
                        .segment = -1,
                        .oldest = 1,
                        .max_segments = max_segments,
                        .on_full = on_full};
}

/* Whether another segment may exist, after the oldest was dropped or the agent took it away. */
static int may_grow(struct log *log) {
    char name[16];
    while (log->newest - log->oldest + 1 >= log->max_segments) {
        segment_name(name, log->oldest);
        if (log->on_full == ON_FULL_DROP_OLDEST)
            unlinkat(log->directory, name, 0);
        else if (faccessat(log->directory, name, F_OK, 0) == 0)
            return 0;
        log->oldest++;
    }
    return 1;
}

static int has_room(struct log *log, uint32_t length) {
    uint32_t needed = HEAD + length + (log->dropped ? 2 * MARKER : MARKER);
    if (log->segment >= 0 && log->used + needed <= SEGMENT_SIZE)
        return 1;
    return may_grow(log) && next_segment(log);
}

static int write_frame(struct log *log, uint8_t stream, const char *data, uint32_t length) {
    char head[HEAD];
    uint64_t at = now_ns();
    memcpy(head, &at, 8);
    head[8] = (char)stream;
    memcpy(head + 9, &length, 4);
    struct iovec parts[2] = {{head, HEAD}, {(char *)data, length}};
    ssize_t written = writev(log->segment, parts, 2);
    if (written == (ssize_t)(HEAD + length)) {
        log->used += HEAD + length;
        return 1;
    }
    /* A full disk: take a part of a frame back, so that the next one starts where readers expect.
     */
    if (written > 0 && ftruncate(log->segment, (off_t)log->used))
        log->used = SEGMENT_SIZE;
    return 0;
}

static void tell_dropped(struct log *log) {
    char text[64];
    int length =
        snprintf(text, sizeof text, "dropped %llu bytes", (unsigned long long)log->dropped);
    if (write_frame(log, STREAM_KEEPER, text, (uint32_t)length))
        log->dropped = 0;
}

/* One marker for all that was lost in a row: before what is kept next, or at the end. */
int log_append(struct log *log, uint8_t stream, const char *data, uint32_t length) {
    if (has_room(log, length)) {
        if (log->dropped)
            tell_dropped(log);
        if (!log->dropped && write_frame(log, stream, data, length))
            return 1;
    }
    if (log->on_full == ON_FULL_WAIT)
        return 0;
    log->dropped += length;
    return 1;
}

void log_end(struct log *log) {
    if (log->dropped && has_room(log, 0))
        tell_dropped(log);
}

void log_sync(struct log *log) {
    if (log->segment >= 0) {
        fdatasync(log->segment);
        fsync(log->directory);
    }
}
