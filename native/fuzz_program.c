/* libFuzzer target: any bytes as a program for the keeper. They are refused, or every field of
 * every record lies within them; reading all of them shows the sanitizers one that does not.
 *
 * fuzz: keeper_program.c
 */
#include "keeper.h"

#include <stdlib.h>
#include <string.h>

static size_t read_list(const struct list *list) {
    const char *s = list->first;
    size_t total = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        size_t length = strlen(s);
        total += length;
        s += length + 1;
    }
    return total;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct program program;
    size_t total = 0;
    if (program_read(&program, data, size))
        return 0;
    for (uint32_t i = 0; i < program.count; i++) {
        const struct record *r = &program.record[i];
        for (unsigned n = 0; n < r->strings; n++)
            total += strlen(r->s[n]);
        for (unsigned n = 0; n < r->lists; n++)
            total += read_list(&r->l[n]);
        for (uint32_t n = 0; n < r->bytes_length; n++)
            total += r->bytes[n];
    }
    if (total > size * 256)
        abort();
    return 0;
}
