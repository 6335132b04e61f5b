/* A chunk is read, logged, then passed on to the client whole before the next is read: so a slow
 * client slows the program as a pipe would, and the log has every byte that a client has seen.
 * A client's descriptor is shared with the client, so it is never set non-blocking: poll says that
 * PIPE_BUF bytes fit, and no more than that is written at once. */
#define _GNU_SOURCE
#include "keeper_streams.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif
#define RETRY_MS 50 /* how soon a log without room is tried again */

static void forget(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void set_nonblocking(int fd) {
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static int client_fd(uint64_t number) {
    return number == NO_FD ? -1 : (int)number;
}

/* Owned by the container's user: programs open /dev/stdout and /proc/self/fd/1 by name. */
static int make_pipe(int ends[2], const struct record *stdio) {
    if (pipe2(ends, O_CLOEXEC))
        return -1;
    return fchown(ends[0], (uid_t)stdio->n[4], (gid_t)stdio->n[5]);
}

static int make_output(struct streams *s, int index, const struct record *stdio) {
    int ends[2];
    if (make_pipe(ends, stdio))
        return -1;
    set_nonblocking(ends[0]);
    s->out[index].from = ends[0];
    s->out[index].to = client_fd(stdio->n[2 + index]);
    s->out[index].number = index ? STREAM_STDERR : STREAM_STDOUT;
    s->child[1 + index] = ends[1];
    return 0;
}

static int make_input(struct streams *s, const struct record *stdio) {
    s->in.from = client_fd(stdio->n[1]);
    if (s->in.from < 0 && !(stdio->n[0] & STDIO_KEEP_STDIN)) {
        s->child[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        return s->child[0] < 0 ? -1 : 0;
    }
    int ends[2];
    if (make_pipe(ends, stdio))
        return -1;
    set_nonblocking(ends[1]);
    s->child[0] = ends[0];
    s->in.to = ends[1];
    return 0;
}

int streams_make(struct streams *s, const struct program *program) {
    const struct record *log = program_find(program, OP_LOG);
    const struct record *stdio = program_find(program, OP_STDIO);
    static const struct stream nothing = {.from = -1, .to = -1};
    if (!log || !stdio)
        return errno = EINVAL, -1;
    *s = (struct streams){.out = {nothing, nothing},
                          .in = nothing,
                          .child = {-1, -1, -1},
                          .terminal = -1,
                          .peer = -1};
    log_begin(&s->log, STATUS_FD, (uint32_t)log->n[0], (uint32_t)log->n[1]);
    for (int i = 0; i < 2; i++)
        if (!(s->out[i].buffer = malloc(CHUNK)))
            return -1;
    if (!(s->in.buffer = malloc(CHUNK)))
        return -1;
    if (stdio->n[0] & STDIO_TERMINAL) {
        s->in.from = client_fd(stdio->n[1]);
        s->out[0].to = client_fd(stdio->n[2]);
        for (int i = 0; i < 3; i++) /* until B has its terminal */
            if ((s->child[i] = open("/dev/null", O_RDWR | O_CLOEXEC)) < 0)
                return -1;
        return 0;
    }
    return make_input(s, stdio) || make_output(s, 0, stdio) || make_output(s, 1, stdio) ? -1 : 0;
}

void streams_started(struct streams *s) {
    for (int i = 0; i < 3; i++)
        forget(&s->child[i]);
}

void streams_terminal(struct streams *s, int master) {
    if (master < 0)
        return;
    set_nonblocking(master);
    s->terminal = s->out[0].from = s->in.to = master;
    s->out[0].number = STREAM_TERMINAL;
    s->peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static void take(struct stream *t, int ended) {
    ssize_t size = read(t->from, t->buffer, CHUNK);
    if (size > 0) {
        t->begin = 0;
        t->end = (uint32_t)size;
        t->logged = 0;
    } else if (size == 0 || (errno != EAGAIN && errno != EINTR) || (ended && errno == EAGAIN)) {
        t->from = -1; /* closed by its owner: the terminal's master is also the input's */
    }
}

/* Nothing more can be passed on: no reader is left, or a disk is full, which is kept to be told. As
 * in a shell's pipeline the program learns it from its own pipe, which has no reader from now on:
 * SIGPIPE, or EPIPE for who ignores that, as every pid 1 does. A terminal has both directions and
 * outlives its client. */
static void break_off(struct stream *t, int terminal) {
    t->lost = errno == EPIPE || errno == ECONNRESET ? 0 : errno;
    t->begin = t->end;
    t->to == terminal ? (void)(t->to = -1) : forget(&t->to);
    if (t->from != terminal)
        forget(&t->from);
}

static void pass_on(struct stream *t, int terminal) {
    size_t size = t->end - t->begin;
    if (t->to < 0)
        size = 0, t->begin = t->end;
    if (!size)
        return;
    ssize_t written = write(t->to, t->buffer + t->begin, size < PIPE_BUF ? size : PIPE_BUF);
    if (written > 0)
        t->begin += (uint32_t)written;
    else if (written < 0 && errno != EAGAIN && errno != EINTR)
        break_off(t, terminal);
}

static void advance_output(struct streams *s, struct stream *t, int ended) {
    int descriptor = t->from;
    if (t->begin == t->end && t->from >= 0)
        take(t, ended);
    if (t->from < 0 && descriptor >= 0 && descriptor != s->terminal)
        close(descriptor);
    if (t->begin == t->end)
        return;
    if (!t->logged)
        t->logged = log_append(&s->log, t->number, t->buffer, t->end);
    if (t->logged && t->to < 0)
        t->begin = t->end;
}

static void advance_input(struct streams *s, int ended) {
    struct stream *t = &s->in;
    int descriptor = t->from;
    if (t->begin == t->end && t->from >= 0)
        take(t, ended);
    if (t->from >= 0 || t->begin != t->end)
        return;
    if (descriptor >= 0)
        close(descriptor);
    if (t->to != s->terminal)
        forget(&t->to); /* the program reads end of file */
}

static int wants_read(const struct stream *t) {
    return t->from >= 0 && t->begin == t->end;
}
static int wants_write(const struct stream *t) {
    return t->to >= 0 && t->begin != t->end && t->logged;
}

/* How long nothing can happen: for ever, unless the log waits for room or the output has ended. */
static int patience(const struct streams *s, int ended) {
    int passing_on = 0;
    for (int i = 0; i < 2; i++) {
        const struct stream *t = &s->out[i];
        if (t->begin != t->end && !t->logged)
            return RETRY_MS;
        passing_on |= wants_write(t);
    }
    return ended && !passing_on ? 0 : -1;
}

int streams_turn(struct streams *s, int signals, int ended) {
    struct pollfd polled[7] = {{signals, POLLIN, 0}};
    struct stream *all[3] = {&s->out[0], &s->out[1], &s->in};
    for (int i = 0; ended && i < 2; i++)
        advance_output(s, &s->out[i], ended);
    s->in.logged = 1; /* input is passed on only */
    for (int i = 0; i < 3; i++) {
        struct stream *t = all[i];
        polled[1 + 2 * i] = (struct pollfd){wants_read(t) ? t->from : -1, POLLIN, 0};
        polled[2 + 2 * i] = (struct pollfd){wants_write(t) ? t->to : -1, POLLOUT, 0};
    }
    if (poll(polled, 7, patience(s, ended)) < 0)
        return 1;
    for (int i = 0; i < 3; i++)
        if (polled[2 + 2 * i].revents)
            pass_on(all[i], s->terminal);
    for (int i = 0; i < 2; i++)
        if (polled[1 + 2 * i].revents || !s->out[i].logged)
            advance_output(s, &s->out[i], ended);
    if (polled[5].revents && !ended)
        advance_input(s, ended);
    if (s->in.to < 0 && s->in.from >= 0)
        forget(&s->in.from); /* the program closed its stdin */
    return polled[0].revents != 0;
}

void streams_detach(struct streams *s) {
    for (int i = 0; i < 2; i++) {
        forget(&s->out[i].to);
        if (s->out[i].logged)
            s->out[i].begin = s->out[i].end;
    }
    if (s->in.from >= 0)
        forget(&s->in.from);
    s->in.begin = s->in.end;
    if (s->log.on_full == ON_FULL_WAIT)
        s->log.on_full = ON_FULL_DROP_NEW;
}

int streams_open(const struct streams *s) {
    for (int i = 0; i < 2; i++)
        if (s->out[i].from >= 0 || s->out[i].begin != s->out[i].end)
            return 1;
    return 0;
}
