/* Reads a tar stream: ustar, GNU (long names, sparse) and PAX (extended headers, sparse 0.1
 * and 1.0).
 *
 * Where readers of tar differ, this one does what Go's archive/tar does, because that is what built
 * and what unpacks nearly every image: types without content have none whatever their size says,
 * global headers are skipped, an empty value in an extended header is no value.
 */
#define _GNU_SOURCE
#include "unpack_tar.h"

#include <errno.h>
#include <string.h>
#include <sys/param.h>
#include <unistd.h>

/* Offsets and lengths in POSIX's struct posix_header. */
enum {
    NAME = 0,
    NAME_LENGTH = 100,
    MODE = 100,
    UID = 108,
    GID = 116,
    ID_LENGTH = 8,
    SIZE = 124,
    MTIME = 136,
    NUMBER_LENGTH = 12,
    CHECKSUM = 148,
    TYPE = 156,
    LINK = 157,
    MAGIC = 257,
    PREFIX = 345,
    PREFIX_LENGTH = 155
};

static bool fill(struct tar *tar) {
    ssize_t got;
    do
        got = read(tar->fd, tar->buffer, sizeof tar->buffer);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        refuse(NULL, "cannot read the stream: %s", strerror(errno));
    tar->total += (uint64_t)got;
    if (tar->total > tar->limit)
        refuse(NULL, "the layer is larger than %llu bytes", (unsigned long long)tar->limit);
    tar->at = 0;
    tar->end = (size_t)got;
    return got > 0;
}

/* False at a clean end of the stream. */
bool tar_block(struct tar *tar, unsigned char block[BLOCK]) {
    size_t have = 0;
    while (have < BLOCK) {
        if (tar->at == tar->end && !fill(tar)) {
            if (have)
                refuse(NULL, "the archive is truncated");
            return false;
        }
        size_t part = MIN(BLOCK - have, tar->end - tar->at);
        memcpy(block + have, tar->buffer + tar->at, part);
        tar->at += part;
        have += part;
    }
    return true;
}

size_t tar_content(struct tar *tar, const char **bytes, uint64_t most) {
    most = MIN(most, tar->left);
    if (!most)
        return 0;
    if (tar->at == tar->end && !fill(tar))
        refuse(tar->entry.path, "the archive is truncated");
    size_t part = (size_t)MIN(most, tar->end - tar->at);
    *bytes = tar->buffer + tar->at;
    tar->at += part;
    tar->left -= part;
    return part;
}

static void begin_content(struct tar *tar, uint64_t size) {
    tar->left = size;
    tar->padding = (unsigned)(-size % BLOCK);
}

static void skip_content(struct tar *tar) {
    const char *bytes;
    while (tar_content(tar, &bytes, UINT64_MAX))
        ;
    tar->left = tar->padding;
    tar->padding = 0;
    while (tar_content(tar, &bytes, UINT64_MAX))
        ;
}

size_t tar_header_content(struct tar *tar, char *into, uint64_t size, size_t most,
                          const char *what) {
    if (size > most)
        refuse(NULL, "%s is longer than %zu bytes", what, most);
    begin_content(tar, size);
    const char *bytes;
    size_t have = 0, part;
    while ((part = tar_content(tar, &bytes, UINT64_MAX))) {
        memcpy(into + have, bytes, part);
        have += part;
    }
    skip_content(tar);
    return have;
}

/* A header's number: octal text, or GNU's two's complement if the first bit is set. */
static int64_t header_number(const unsigned char *field, size_t length) {
    uint64_t value = 0;
    if (field[0] & 0x80) {
        bool negative = field[0] & 0x40;
        value = negative ? UINT64_MAX : 0;
        for (size_t i = 0; i < length; i++) {
            unsigned char byte = i ? field[i] : negative ? field[0] : field[0] & 0x7f;
            if (value >> 55 != (negative ? 0x1ff : 0))
                refuse(NULL, "a number in a header is out of range");
            value = value << 8 | byte;
        }
        return (int64_t)value;
    }
    size_t i = 0;
    while (i < length && (field[i] == ' ' || field[i] == 0))
        i++;
    for (; i < length && field[i] != ' ' && field[i] != 0; i++) {
        if (field[i] < '0' || field[i] > '7')
            refuse(NULL, "a number in a header is not octal");
        value = value << 3 | (uint64_t)(field[i] - '0');
    }
    return (int64_t)value; /* 12 digits are 36 bits */
}

uint64_t tar_size(const unsigned char *field) {
    int64_t size = header_number(field, NUMBER_LENGTH);
    if (size < 0)
        refuse(NULL, "a size in a header is negative");
    return (uint64_t)size;
}

void copy_path(char into[PATH_BYTES + 1], const char *bytes, size_t length) {
    if (length > PATH_BYTES)
        refuse(NULL, "a name is longer than %d bytes", PATH_BYTES);
    if (memchr(bytes, 0, length))
        refuse(NULL, "a name holds a NUL");
    memcpy(into, bytes, length);
    into[length] = 0;
}

/* GNU's 'L' and 'K' members: the content is the name, with a NUL at its end. Like in Go it wins
 * over PAX, so it is kept until the entry itself is read. */
static void read_long_name(struct tar *tar, char into[PATH_BYTES + 1], bool *has, uint64_t size) {
    char name[PATH_BYTES + 1];
    if (*has)
        refuse(NULL, "an entry has two long names");
    *has = true;
    size_t length = tar_header_content(tar, name, size, sizeof name, "a name");
    copy_path(into, name, strnlen(name, length));
}

static void check_sum(const unsigned char *header) {
    int64_t wanted = header_number(header + CHECKSUM, ID_LENGTH), unsigned_sum = 0, signed_sum = 0;
    for (size_t i = 0; i < BLOCK; i++) {
        unsigned char byte = i >= CHECKSUM && i < CHECKSUM + ID_LENGTH ? ' ' : header[i];
        unsigned_sum += byte;
        signed_sum += (signed char)byte; /* some old writers summed so */
    }
    if (wanted != unsigned_sum && wanted != signed_sum)
        refuse(NULL, "a header's checksum is wrong");
}

/* The name in the header itself. Only POSIX's magic has a prefix: GNU keeps times there. */
static void header_name(struct entry *entry, const unsigned char *header) {
    const char *text = (const char *)header;
    size_t prefix = 0;
    if (!memcmp(header + MAGIC, "ustar", 6) && header[PREFIX]) {
        prefix = strnlen(text + PREFIX, PREFIX_LENGTH);
        memcpy(entry->path, text + PREFIX, prefix);
        entry->path[prefix++] = '/';
    }
    copy_path(entry->path + prefix, text + NAME, strnlen(text + NAME, NAME_LENGTH));
}

static uint32_t checked_id(const struct entry *entry, const char *what, int64_t id) {
    if (id < 0 || id >= IDS)
        refuse(entry->path, "%s %lld is not below %d", what, (long long)id, IDS);
    return (uint32_t)id;
}

static void finish_entry(struct tar *tar, const struct overrides *over,
                         const unsigned char *header) {
    struct entry *entry = &tar->entry;
    const char *text = (const char *)header;
    if (!over->has_path && !over->has_long_path)
        header_name(entry, header);
    if (!over->has_link && !over->has_long_link)
        copy_path(entry->link, text + LINK, strnlen(text + LINK, NAME_LENGTH));
    int64_t uid = over->has_uid ? (int64_t)over->uid : header_number(header + UID, ID_LENGTH);
    int64_t gid = over->has_gid ? (int64_t)over->gid : header_number(header + GID, ID_LENGTH);
    entry->uid = checked_id(entry, "uid", uid);
    entry->gid = checked_id(entry, "gid", gid);
    entry->mode = header_number(header + MODE, ID_LENGTH) & 07777;
    entry->mtime = over->has_mtime
                       ? over->mtime
                       : (struct timespec){.tv_sec = header_number(header + MTIME, NUMBER_LENGTH)};

    bool gnu_sparse = header[TYPE] == 'S';
    entry->type = gnu_sparse || !header[TYPE] ? '0' : (char)header[TYPE];
    size_t length = strlen(entry->path);
    if (!header[TYPE] && length && entry->path[length - 1] == '/')
        entry->type = '5'; /* before POSIX a directory was a file whose name ends so */
    if (!strchr("0123456", entry->type))
        refuse(entry->path, "unknown type of entry 0x%02x", header[TYPE]);
    begin_content(tar, entry->type != '0' ? 0
                       : over->has_size   ? over->size
                                          : tar_size(header + SIZE));
    entry->size = tar->left;
    entry->sparse = gnu_sparse || over->sparse_map || over->sparse_in_content;
    if (!entry->sparse) {
        sparse_add(entry, 0, entry->size);
        return;
    }
    if (gnu_sparse + over->sparse_map + over->sparse_in_content > 1 || entry->type != '0' ||
        (!gnu_sparse && !over->has_real_size))
        refuse(entry->path, "a sparse file is described in two ways or not at all");
    if (gnu_sparse)
        sparse_map_of_gnu(tar, header);
    else
        entry->size = over->real_size;
    if (over->sparse_in_content)
        sparse_map_in_content(tar);
    sparse_check(tar);
}

static bool is_zero(const unsigned char *block) {
    return !block[0] && !memcmp(block, block + 1, BLOCK - 1);
}

/* After the first block of zeros comes a second one or nothing; then padding of any kind. */
static void read_to_the_end(struct tar *tar) {
    unsigned char block[BLOCK];
    if (tar_block(tar, block) && !is_zero(block))
        refuse(NULL, "an entry follows the end mark");
    while (fill(tar))
        ;
}

bool tar_next(struct tar *tar) {
    /* Long names wait here until it is known that no extended header overrules them. */
    static char long_path[PATH_BYTES + 1], long_link[PATH_BYTES + 1];
    struct overrides over = {0};
    unsigned char header[BLOCK];
    struct entry *entry = &tar->entry;
    skip_content(tar);
    entry->path[0] = entry->link[0] = 0;
    entry->extents = 0;
    tar->pax_length = 0;
    for (bool alone = true;; alone = false) {
        if (!tar_block(tar, header))
            refuse(NULL, "the archive is truncated: it has no end mark");
        if (is_zero(header)) {
            if (!alone)
                refuse(NULL, "an extended header has no entry");
            read_to_the_end(tar);
            return false;
        }
        check_sum(header);
        char type = (char)header[TYPE];
        if (!strchr("xgLK", type) || !type)
            break;
        uint64_t size = tar_size(header + SIZE);
        if (type == 'x')
            pax_read(tar, &over, size);
        else if (type == 'L')
            read_long_name(tar, long_path, &over.has_long_path, size);
        else if (type == 'K')
            read_long_name(tar, long_link, &over.has_long_link, size);
        else {
            begin_content(tar, size);
            skip_content(tar);
        }
    }
    if (over.has_long_path)
        strcpy(entry->path, long_path);
    if (over.has_long_link)
        strcpy(entry->link, long_link);
    finish_entry(tar, &over, header);
    return true;
}
