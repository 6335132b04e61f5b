/* Between the parts of the archive reader: unpack_tar.c, unpack_pax.c and unpack_sparse.c. */
#ifndef SANDBOX_UNPACK_TAR_H
#define SANDBOX_UNPACK_TAR_H

#include "unpack.h"

/* What extended headers said about the entry that follows them. */
struct overrides {
    bool has_pax, has_path, has_link, has_size, has_uid, has_gid, has_mtime, has_real_size;
    bool has_long_path, has_long_link, has_sparse_name, sparse_map, sparse_in_content;
    uint64_t size, real_size, uid, gid;
    struct timespec mtime;
};

bool tar_block(struct tar *tar, unsigned char block[BLOCK]);
size_t tar_header_content(struct tar *tar, char *into, uint64_t size, size_t most,
                          const char *what);
uint64_t tar_size(const unsigned char *field);
void copy_path(char into[PATH_BYTES + 1], const char *bytes, size_t length);

uint64_t decimal(const char **at, const char *end);
void pax_read(struct tar *tar, struct overrides *over, uint64_t size);

void sparse_add(struct entry *entry, uint64_t offset, uint64_t length);
void sparse_map_in_header(struct entry *entry, const char *at, const char *end);
void sparse_map_in_content(struct tar *tar);
void sparse_map_of_gnu(struct tar *tar, const unsigned char *header);
void sparse_check(const struct tar *tar);

#endif
