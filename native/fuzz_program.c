/* libFuzzer target: any bytes as a program for the keeper.
 *
 * They are refused, or what was read from them says all that they said: written out again by its
 * shape, every record gives the same bytes. So no field is lost, invented or taken from elsewhere;
 * the sanitizers see to it that none lies outside. Seeds: tests/fuzz/program_seeds.py.
 *
 * fuzz: keeper_program.c
 */
#include "keeper.h"

#include <stdlib.h>
#include <string.h>

struct cursor {
    const uint8_t *at, *end;
};

static void expect(struct cursor *c, const void *bytes, size_t size) {
    if ((size_t)(c->end - c->at) < size || memcmp(c->at, bytes, size))
        abort();
    c->at += size;
}

static void expect_u32(struct cursor *c, uint64_t value) {
    if (value > UINT32_MAX)
        abort();
    expect(c, &(uint32_t){(uint32_t)value}, 4);
}

static void expect_list(struct cursor *c, const struct list *list) {
    expect_u32(c, list->count);
    const char *s = list->first;
    for (uint32_t i = 0; i < list->count; i++, s += strlen(s) + 1)
        expect(c, s, strlen(s) + 1);
}

static void expect_fields(struct cursor *c, const struct record *r, const char *shape) {
    unsigned numbers = 0, strings = 0, lists = 0;
    for (; *shape; shape++)
        switch (*shape) {
        case 'u':
            expect_u32(c, r->n[numbers++]);
            break;
        case 'U':
            expect(c, &r->n[numbers++], 8);
            break;
        case 's':
            expect(c, r->s[strings], strlen(r->s[strings]) + 1);
            strings++;
            break;
        case 'l':
            expect_list(c, &r->l[lists++]);
            break;
        case 'b':
            expect_u32(c, r->bytes_length);
            expect(c, r->bytes, r->bytes_length);
        }
    if (numbers != r->numbers || strings != r->strings || lists != r->lists)
        abort();
}

static const char *shape_of(enum op op) {
    switch (op) {
#define X(name, number, shape, stage)                                                              \
    case OP_##name:                                                                                \
        return shape;
        RECORDS(X)
#undef X
    }
    abort();
}

static void expect_record(struct cursor *c, const struct record *r) {
    uint32_t length;
    expect(c, &r->op, 2);
    expect(c, "\0", 2);
    memcpy(&length, c->at, 4);
    c->at += 4;
    const uint8_t *begin = c->at;
    expect_fields(c, r, shape_of((enum op)r->op));
    if ((size_t)(c->at - begin) != length)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct program program;
    struct cursor c = {data, data + size};
    if (program_read(&program, data, size))
        return 0;
    expect(&c, "sbprog\0\1", 8);
    expect_u32(&c, size);
    expect_u32(&c, program.count);
    for (uint32_t i = 0; i < program.count; i++)
        expect_record(&c, &program.record[i]);
    if (c.at != c.end || program.record[program.count - 1].op != OP_EXEC)
        abort();
    return 0;
}
