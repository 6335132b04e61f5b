/* PAX extended headers: records "LENGTH KEY=VALUE\n" that overrule the header they precede.
 *
 * Extended attributes are not copied anywhere: whoever wants them walks the records once more.
 */
#include "unpack_tar.h"

#include <string.h>

/* Decimal digits from *at; what follows them is the caller's to check. */
uint64_t decimal(const char **at, const char *end) {
    const char *start = *at;
    uint64_t value = 0;
    for (; *at < end && **at >= '0' && **at <= '9'; ++*at) {
        if (value > (INT64_MAX - 9) / 10)
            refuse(NULL, "a number in an extended header is out of range");
        value = value * 10 + (uint64_t)(**at - '0');
    }
    if (*at == start)
        refuse(NULL, "a number in an extended header is not decimal");
    return value;
}

static uint64_t whole_decimal(const char *at, const char *end) {
    uint64_t value = decimal(&at, end);
    if (at != end)
        refuse(NULL, "a number in an extended header is not decimal");
    return value;
}

/* Seconds with an optional fraction; -1.25 is the second -2 and 750 ms. */
static struct timespec decimal_time(const char *at, const char *end) {
    bool negative = at < end && *at == '-';
    at += negative;
    struct timespec time = {.tv_sec = (time_t)decimal(&at, end)};
    if (at < end && *at == '.') {
        long scale = 100000000;
        for (at++; at < end && *at >= '0' && *at <= '9'; at++, scale /= 10)
            time.tv_nsec += scale * (*at - '0');
    }
    if (at != end)
        refuse(NULL, "a time in an extended header is not decimal");
    if (negative) {
        time.tv_sec = -time.tv_sec - (time.tv_nsec > 0);
        time.tv_nsec = time.tv_nsec ? 1000000000 - time.tv_nsec : 0;
    }
    return time;
}

/* One record "LENGTH KEY=VALUE\n" at *at. */
struct record {
    const char *key, *value, *end;
};

static bool next_record(const struct tar *tar, size_t *at, struct record *record) {
    const char *start = tar->pax + *at, *end = tar->pax + tar->pax_length, *cursor = start;
    if (start == end)
        return false;
    uint64_t length = decimal(&cursor, end);
    if (length > (uint64_t)(end - start) || start + length <= cursor + 1 || *cursor != ' ' ||
        start[length - 1] != '\n')
        refuse(NULL, "an extended header is malformed");
    record->key = cursor + 1;
    record->end = start + length - 1;
    record->value = memchr(record->key, '=', (size_t)(record->end - record->key));
    if (!record->value || memchr(record->key, 0, (size_t)(record->value - record->key)))
        refuse(NULL, "an extended header is malformed");
    record->value++;
    *at += length;
    return true;
}

static bool key_is(const struct record *record, const char *key) {
    size_t length = (size_t)(record->value - 1 - record->key);
    return strlen(key) == length && !memcmp(record->key, key, length);
}

bool tar_next_xattr(const struct tar *tar, struct xattr *xattr) {
    static const char prefix[] = "SCHILY.xattr.";
    struct record record;
    while (next_record(tar, &xattr->at, &record)) {
        size_t length = (size_t)(record.value - 1 - record.key), skip = sizeof prefix - 1;
        if (length <= skip || memcmp(record.key, prefix, skip))
            continue;
        xattr->name = record.key + skip;
        xattr->name_length = length - skip;
        xattr->value = record.value;
        xattr->value_length = (size_t)(record.end - record.value);
        return true;
    }
    return false;
}

static void apply_record(struct entry *entry, struct overrides *over, const struct record *record) {
    const char *value = record->value, *end = record->end;
    size_t length = (size_t)(end - value);
    if (!length)
        return;
    if (key_is(record, "path") && !over->has_sparse_name) {
        copy_path(entry->path, value, length);
        over->has_path = true;
    } else if (key_is(record, "linkpath")) {
        copy_path(entry->link, value, length);
        over->has_link = true;
    } else if (key_is(record, "size")) {
        over->size = whole_decimal(value, end);
        over->has_size = true;
    } else if (key_is(record, "uid")) {
        over->uid = whole_decimal(value, end);
        over->has_uid = true;
    } else if (key_is(record, "gid")) {
        over->gid = whole_decimal(value, end);
        over->has_gid = true;
    } else if (key_is(record, "mtime")) {
        over->mtime = decimal_time(value, end);
        over->has_mtime = true;
    } else if (key_is(record, "GNU.sparse.name")) {
        copy_path(entry->path, value, length);
        over->has_path = over->has_sparse_name = true;
    } else if (key_is(record, "GNU.sparse.realsize") || key_is(record, "GNU.sparse.size")) {
        over->real_size = whole_decimal(value, end);
        over->has_real_size = true;
    } else if (key_is(record, "GNU.sparse.major")) {
        over->sparse_in_content = length == 1 && *value == '1';
    } else if (key_is(record, "GNU.sparse.map")) {
        over->sparse_map = true;
        sparse_map_in_header(entry, value, end);
    } else if (key_is(record, "GNU.sparse.offset")) {
        refuse(NULL, "sparse files of PAX format 0.0 are not supported");
    }
}

void pax_read(struct tar *tar, struct overrides *over, uint64_t size) {
    if (over->has_pax)
        refuse(NULL, "an entry has two extended headers");
    over->has_pax = true;
    tar->pax_length =
        tar_header_content(tar, tar->pax, size, sizeof tar->pax, "an extended header");
    struct record record;
    for (size_t at = 0; next_record(tar, &at, &record);)
        apply_record(&tar->entry, over, &record);
}
