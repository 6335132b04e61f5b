/* The unpacker: turns one uncompressed tar stream into one directory, from inside a jail.
 *
 *     unpack.c        the jail: namespaces, idmapped root, capabilities, seccomp; the report
 *     unpack_tar.c    reads the archive: ustar, GNU and PAX headers become `struct entry`
 *     unpack_tree.c   makes what an entry describes, below a root it cannot leave
 *
 * Every byte of the stream is hostile. An archive is refused as a whole at the first thing that is
 * wrong with it; nothing is corrected or guessed, so that no other reader can see another tree in
 * the same bytes. Memory does not grow with the archive.
 */
#ifndef SANDBOX_UNPACK_H
#define SANDBOX_UNPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum {
    BLOCK = 512,
    PATH_BYTES = 4096,    /* of a name or link target, as PATH_MAX */
    IDS = 65536,          /* in a task's user namespace: more cannot be mapped */
    PAX_BYTES = 1 << 20,  /* of one extended header: a 64 KiB xattr and the longest names fit */
    MAX_EXTENTS = 1 << 14 /* of one sparse file */
};

struct extent {
    uint64_t offset, length;
};

/* What one member of the archive asks for. `path` and `link` are bytes, never text. */
struct entry {
    char type; /* '0' file, '1' hard link, '2' symlink, '3' '4' device, '5' directory, '6' FIFO */
    char path[PATH_BYTES + 1], link[PATH_BYTES + 1];
    uint32_t mode, uid, gid;
    struct timespec mtime;
    uint64_t size; /* of the file, holes included */
    bool sparse;
    size_t extents;
    struct extent extent[MAX_EXTENTS]; /* where its data lies; together as long as its content */
};

struct tar {
    int fd;
    uint64_t limit, total; /* bytes of the stream: allowed, read so far */
    uint64_t left;         /* of the current entry's content */
    unsigned padding;      /* after that content */
    size_t pax_length;
    size_t at, end; /* of what is unread in buffer */
    struct entry entry;
    char pax[PAX_BYTES];
    char buffer[1 << 18];
};

struct xattr {
    size_t at; /* where in tar->pax the search goes on; 0 at first */
    const char *name, *value;
    size_t name_length, value_length;
};

/* The next entry is in tar->entry; false when the stream was read to its last byte. */
bool tar_next(struct tar *tar);
/* Some content of the entry, at most `most` bytes; 0 at its end. */
size_t tar_content(struct tar *tar, const char **bytes, uint64_t most);
bool tar_next_xattr(const struct tar *tar, struct xattr *xattr);

struct tree {
    int root;
    uint64_t file_limit, entry_limit;
    uint64_t entries, bytes; /* made so far */
    int dir;                 /* the directory last worked in, -1 if none */
    char dir_path[PATH_BYTES + 1];
    struct timespec dir_mtime;
    bool dir_setgid;
};

void tree_open(struct tree *tree, int root, uint64_t file_limit, uint64_t entry_limit);
void tree_add(struct tree *tree, struct tar *tar);
void tree_close(struct tree *tree);

/* Provided by unpack.c, and by the fuzz target in its own way. */
void report(char kind, const char *text);
_Noreturn void refuse(const char *path, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
