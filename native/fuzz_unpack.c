/* libFuzzer target: an input is an archive, unpacked for real into a directory of memory.
 *
 * The reader and the tree are those of the program; the jail around them is not there, so that the
 * second line of defence does not hide a hole in the first. What must hold for any bytes: memory is
 * used as C allows (the sanitizers see to it), nothing changes outside of the directory, and in it
 * are no markers, no devices and no attributes of overlayfs.
 *
 * It is root of its namespaces and mounts a tmpfs. Seeds: tests/fuzz/unpack_seeds.py.
 *
 * fuzz: unpack_pax.c unpack_sparse.c unpack_tar.c unpack_tree.c
 * namespaces: mount net ipc pid
 */
#define _GNU_SOURCE
#include "unpack.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define PLACE "/mnt"
#define LAYER PLACE "/layer"

static jmp_buf refused;
static size_t seen;

void report(char kind, const char *text) {
    if (kind != 'W' && kind != 'O' && kind != 'D')
        abort();
    if (strstr(text, "..") == text && (!text[2] || text[2] == '/'))
        abort();
}

_Noreturn void refuse(const char *path, const char *format, ...) {
    char text[PATH_BYTES + 256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    longjmp(refused, path || 1);
}

static int check(const char *path, const struct stat *about, int kind, struct FTW *walk) {
    char names[4096];
    (void)kind;
    seen++;
    ssize_t length = llistxattr(path, names, sizeof names);
    for (ssize_t at = 0; at < length; at += (ssize_t)strlen(names + at) + 1)
        if (!strncmp(names + at, "user.overlay.", 13) || !strncmp(names + at, "trusted.", 8))
            abort();
    if (S_ISCHR(about->st_mode) || S_ISBLK(about->st_mode) || S_ISSOCK(about->st_mode) ||
        (walk->level > 0 && !strncmp(path + walk->base, ".wh.", 4)))
        abort();
    return 0;
}

static int drop(const char *path, const struct stat *about, int kind, struct FTW *walk) {
    (void)about, (void)kind;
    return walk->level > 0 ? remove(path) : 0;
}

/* The seeds' links lead here. */
static void check_outside(void) {
    DIR *place = opendir(PLACE);
    for (struct dirent *entry; (entry = readdir(place));)
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, "layer"))
            abort();
    closedir(place);
}

/* Without right checksums nearly every mutation would end at the first header. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    (void)seed;
    size = LLVMFuzzerMutate(data, size, most);
    for (uint8_t *block = data; block + BLOCK <= data + size; block += BLOCK) {
        if (memcmp(block + 257, "ustar", 5))
            continue;
        char text[8];
        unsigned sum = 0;
        memset(block + 148, ' ', 8);
        for (int i = 0; i < BLOCK; i++)
            sum += block[i];
        snprintf(text, sizeof text, "%06o", sum);
        memcpy(block + 148, text, 7);
    }
    return size;
}

/* A refusal ends the program, so nothing is freed behind it. */
const char *__asan_default_options(void) {
    return "detect_leaks=0";
}

int LLVMFuzzerInitialize(int *count, char ***texts) {
    (void)count, (void)texts;
    umask(0);
    if (mount("none", PLACE, "tmpfs", 0, "size=256m") || mkdir(LAYER, 0755)) {
        perror("a tmpfs on " PLACE);
        exit(1);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct tar tar;
    static struct tree tree;
    int fd = memfd_create("archive", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size || lseek(fd, 0, SEEK_SET))
        abort();
    memset(&tar, 0, offsetof(struct tar, entry));
    tar.fd = fd;
    tar.limit = 1 << 20;
    tree.dir = -1;
    int root = open(LAYER, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (!setjmp(refused)) {
        tree_open(&tree, root, 1 << 16, 64);
        while (tar_next(&tar))
            tree_add(&tree, &tar);
        tree_close(&tree);
    }
    /* A refusal ends the program, so nothing closes what was open then. */
    closefrom(root);
    close(fd);
    seen = 0;
    if (nftw(LAYER, check, 16, FTW_PHYS) || seen > 65 ||
        nftw(LAYER, drop, 16, FTW_PHYS | FTW_DEPTH))
        abort();
    check_outside();
    return 0;
}
