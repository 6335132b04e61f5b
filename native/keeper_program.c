/* The record reader: everything that reaches the keeper from outside passes here first.
 * fuzz_program.c feeds this file alone, under sanitizers. */
#include "keeper.h"

#include <string.h>

static const char MAGIC[8] = {'s', 'b', 'p', 'r', 'o', 'g', 0, 1};

struct shape {
    uint16_t op;
    const char *name, *fields;
};

static const struct shape SHAPES[] = {
#define X(name, number, shape, stage) {number, #name, shape},
    RECORDS(X)
#undef X
};

static const struct shape *shape_of(unsigned op) {
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        if (SHAPES[i].op == op)
            return &SHAPES[i];
    return NULL;
}

const char *op_name(unsigned op) {
    const struct shape *shape = shape_of(op);
    return shape ? shape->name : "?";
}

struct cursor {
    const uint8_t *at, *end;
};

static int take(struct cursor *c, void *into, size_t size) {
    if ((size_t)(c->end - c->at) < size)
        return 0;
    memcpy(into, c->at, size);
    c->at += size;
    return 1;
}

static int take_string(struct cursor *c, const char **into) {
    const uint8_t *nul = memchr(c->at, 0, (size_t)(c->end - c->at));
    if (!nul)
        return 0;
    *into = (const char *)c->at;
    c->at = nul + 1;
    return 1;
}

static int take_list(struct cursor *c, struct list *into) {
    const char *ignored;
    if (!take(c, &into->count, 4) || into->count > MAX_LIST)
        return 0;
    into->first = (const char *)c->at;
    for (uint32_t i = 0; i < into->count; i++)
        if (!take_string(c, &ignored))
            return 0;
    return 1;
}

static int take_bytes(struct cursor *c, struct record *r) {
    if (!take(c, &r->bytes_length, 4))
        return 0;
    if ((size_t)(c->end - c->at) < r->bytes_length)
        return 0;
    r->bytes = c->at;
    c->at += r->bytes_length;
    return 1;
}

static int take_number(struct cursor *c, struct record *r, size_t size) {
    uint64_t value = 0; /* little endian, as every architecture that we run on */
    if (!take(c, &value, size))
        return 0;
    r->n[r->numbers++] = value;
    return 1;
}

static const char *read_fields(struct record *r, const char *fields, struct cursor c) {
    for (const char *f = fields; *f; f++) {
        int ok = 0;
        switch (*f) {
        case 'u':
            ok = take_number(&c, r, 4);
            break;
        case 'U':
            ok = take_number(&c, r, 8);
            break;
        case 's':
            ok = take_string(&c, &r->s[r->strings++]);
            break;
        case 'l':
            ok = take_list(&c, &r->l[r->lists++]);
            break;
        case 'b':
            ok = take_bytes(&c, r);
            break;
        }
        if (!ok)
            return "a record's field runs over its end";
    }
    return c.at == c.end ? NULL : "a record is longer than its fields";
}

const char *program_read(struct program *program, const uint8_t *data, size_t size) {
    struct cursor c = {data, data + size};
    char magic[8];
    uint32_t total;
    if (size > MAX_PROGRAM)
        return "the program is too large";
    if (!take(&c, magic, 8) || memcmp(magic, MAGIC, 8))
        return "not a program of this version";
    if (!take(&c, &total, 4) || total != size)
        return "the program's size is not what it says";
    if (!take(&c, &program->count, 4) || program->count > MAX_RECORDS)
        return "too many records";
    if (!program->count)
        return "no record";
    for (uint32_t i = 0; i < program->count; i++) {
        struct record *r = &program->record[i];
        uint16_t reserved;
        uint32_t length;
        memset(r, 0, sizeof *r);
        if (!take(&c, &r->op, 2) || !take(&c, &reserved, 2) || !take(&c, &length, 4))
            return "a record's head is cut off";
        if (length > (size_t)(c.end - c.at))
            return "a record runs over the end";
        const struct shape *shape = shape_of(r->op);
        if (!shape || reserved)
            return "an unknown record";
        const char *wrong = read_fields(r, shape->fields, (struct cursor){c.at, c.at + length});
        if (wrong)
            return wrong;
        if ((r->op == OP_EXEC) != (i + 1 == program->count))
            return "EXEC is not the last record";
        c.at += length;
    }
    return c.at == c.end ? NULL : "bytes after the last record";
}

const struct record *program_find(const struct program *program, enum op op) {
    for (uint32_t i = 0; i < program->count; i++)
        if (program->record[i].op == op)
            return &program->record[i];
    return NULL;
}
