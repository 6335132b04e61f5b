/* The maps of sparse files. Data is written where it belongs and the holes stay holes; what a file
 * pretends to be long costs nothing.
 */
#include "unpack_tar.h"

/* Offsets in GNU's struct oldgnu_header and in the blocks that continue it. */
enum {
    GNU_MAP = 386,
    GNU_MAP_COUNT = 4,
    GNU_MORE = 482,
    GNU_REAL_SIZE = 483,
    GNU_FIELD = 12,
    GNU_NEXT_COUNT = 21,
    GNU_NEXT_MORE = 504
};

void sparse_add(struct entry *entry, uint64_t offset, uint64_t length) {
    const struct extent *last = entry->extents ? &entry->extent[entry->extents - 1] : NULL;
    if (last && offset < last->offset + last->length)
        refuse(entry->path, "the map of a sparse file overlaps");
    if (offset > INT64_MAX || length > INT64_MAX - offset)
        refuse(entry->path, "the map of a sparse file is out of range");
    if (!length) /* GNU tar marks the end of the file so */
        return;
    if (entry->extents == MAX_EXTENTS)
        refuse(entry->path, "a sparse file has more than %d extents", MAX_EXTENTS);
    entry->extent[entry->extents++] = (struct extent){offset, length};
}

void sparse_map_in_header(struct entry *entry, const char *at, const char *end) {
    while (at < end) {
        uint64_t offset = decimal(&at, end);
        if (at == end || *at++ != ',')
            refuse(entry->path, "the map of a sparse file is malformed");
        uint64_t length = decimal(&at, end);
        if (at < end && *at++ != ',')
            refuse(entry->path, "the map of a sparse file is malformed");
        sparse_add(entry, offset, length);
    }
}

/* PAX sparse 1.0: the content begins with "COUNT\n" and COUNT times "OFFSET\nLENGTH\n", padded to a
 * block. */
struct map_reader {
    unsigned char block[BLOCK];
    size_t at;
    uint64_t blocks;
};

static uint64_t map_number(struct tar *tar, struct map_reader *map) {
    uint64_t value = 0;
    for (unsigned digits = 0;; digits++) {
        if (map->at == BLOCK) {
            if (tar->left < BLOCK || !tar_block(tar, map->block))
                refuse(tar->entry.path, "the map of a sparse file is truncated");
            tar->left -= BLOCK;
            map->at = 0;
        }
        unsigned char byte = map->block[map->at++];
        if (byte == '\n' && digits)
            return value;
        if (byte < '0' || byte > '9' || digits == 18)
            refuse(tar->entry.path, "the map of a sparse file is malformed");
        value = value * 10 + (uint64_t)(byte - '0');
    }
}

void sparse_map_in_content(struct tar *tar) {
    struct map_reader map = {.at = BLOCK};
    for (uint64_t count = map_number(tar, &map); count; count--) {
        uint64_t offset = map_number(tar, &map);
        sparse_add(&tar->entry, offset, map_number(tar, &map));
    }
}

static bool gnu_extents(struct entry *entry, const unsigned char *field, int count,
                        unsigned char more) {
    for (int i = 0; i < count && field[0]; i++, field += 2 * GNU_FIELD)
        sparse_add(entry, tar_size(field), tar_size(field + GNU_FIELD));
    return more;
}

void sparse_map_of_gnu(struct tar *tar, const unsigned char *header) {
    unsigned char block[BLOCK];
    tar->entry.size = tar_size(header + GNU_REAL_SIZE);
    bool more = gnu_extents(&tar->entry, header + GNU_MAP, GNU_MAP_COUNT, header[GNU_MORE]);
    while (more) {
        if (!tar_block(tar, block))
            refuse(tar->entry.path, "the archive is truncated");
        more = gnu_extents(&tar->entry, block, GNU_NEXT_COUNT, block[GNU_NEXT_MORE]);
    }
}

void sparse_check(const struct tar *tar) {
    const struct entry *entry = &tar->entry;
    uint64_t data = 0, end = 0;
    for (size_t i = 0; i < entry->extents; i++) {
        data += entry->extent[i].length; /* they do not overlap: no more than INT64_MAX */
        end = entry->extent[i].offset + entry->extent[i].length;
    }
    if (data != tar->left || end > entry->size)
        refuse(entry->path, "the map of a sparse file does not fit its size");
}
