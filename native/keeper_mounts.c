/* B's file system: every path inside the image's root is resolved with RESOLVE_IN_ROOT and used as
 * a descriptor, so no link in an image leads out. Nothing is taken from the image to mask with. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "keeper_child.h"

#define MOUNT_PRIVATE                                                                              \
    (1u << 18)   /* MS_PRIVATE, which <linux/mount.h> has and <sys/mount.h> redefines */
#define DETACH 2 /* MNT_DETACH */
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif

static int open_tree_of(int fd) {
    return (int)syscall(SYS_open_tree, fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
}

static int attach(int mount, int target) {
    return (int)syscall(SYS_move_mount, mount, "", target, "",
                        MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* Private as well: what was copied from a shared mount of the host would be its peer. */
static int set_attributes(int fd, uint64_t set, unsigned flags) {
    struct mount_attr attr = {.attr_set = set, .propagation = MOUNT_PRIVATE};
    return (int)syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH | flags, &attr, sizeof attr);
}

static int open_resolved(int directory, const char *path, int flags, uint64_t resolve) {
    struct open_how how = {.flags = (uint64_t)flags | O_CLOEXEC,
                           .resolve = resolve | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

int open_in_root(const struct child *c, const char *path, int flags) {
    return open_resolved(c->root, path, flags, RESOLVE_IN_ROOT);
}

static int close_keeping_errno(int fd, int result) {
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return result;
}

/* "name" in the directory `parent`, made if it is not there; where a link or ".." leads is asked
 * with the whole path before it. */
static int open_next(const struct child *c, int parent, const char *name, const char *path) {
    static const uint64_t here = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
    int fd = open_resolved(parent, name, O_PATH | O_DIRECTORY, here);
    if (fd < 0 && errno == ENOENT && (mkdirat(parent, name, 0755) == 0 || errno == EEXIST))
        fd = open_resolved(parent, name, O_PATH | O_DIRECTORY, here);
    if (fd < 0 && (errno == ELOOP || errno == EXDEV))
        fd = open_in_root(c, path, O_PATH | O_DIRECTORY);
    return fd;
}

/* mkdir -p inside the root, one name after another; returns the last directory, opened. */
static int open_directories(const struct child *c, const char *path, size_t length) {
    char part[PATH_MAX];
    int parent = fcntl(c->root, F_DUPFD_CLOEXEC, 0);
    if (length >= sizeof part)
        return errno = ENAMETOOLONG, close_keeping_errno(parent, -1);
    for (size_t begin = 0, end; parent >= 0 && begin < length; begin = end + 1) {
        for (end = begin; end < length && path[end] != '/';)
            end++;
        if (begin == end)
            continue;
        memcpy(part, path, end);
        part[end] = 0;
        parent = close_keeping_errno(parent, open_next(c, parent, part + begin, part));
    }
    return parent;
}

int make_directories(const struct child *c, const char *path) {
    int fd = open_directories(c, path, strlen(path));
    return fd < 0 ? -1 : close(fd);
}

/* The directory "a/b" of "a/b/c", made and opened, and the name "c". */
static int open_parent(const struct child *c, const char *path, const char **name) {
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    return open_directories(c, path, slash ? (size_t)(slash - path) : 0);
}

int root_attach(struct child *c, int mount) {
    struct mount_attr private = {.propagation = MOUNT_PRIVATE};
    if (syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &private, sizeof private))
        return -1;
    c->null = open("/dev/null", O_PATH | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;
    if (c->null < 0 || fstat(c->null, &st))
        return -1;
    if (!S_ISCHR(st.st_mode) || st.st_rdev != makedev(1, 3))
        return errno = ENODEV, -1;
    int target = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (target < 0)
        return -1;
    c->root = mount;
    return close_keeping_errno(target, attach(mount, target));
}

int root_pivot(struct child *c, uint64_t attributes) {
    if (attributes && set_attributes(c->root, attributes, 0))
        return -1;
    if (fchdir(c->root) || syscall(SYS_pivot_root, ".", "."))
        return -1;
    if (syscall(SYS_umount2, ".", DETACH) || chdir("/"))
        return -1;
    return 0;
}

static int configure(int fs, const struct list *options) {
    const char *o = options->first;
    for (uint32_t i = 0; i < options->count; i++, o += strlen(o) + 1) {
        char key[64];
        const char *equals = strchr(o, '=');
        size_t length = equals ? (size_t)(equals - o) : strlen(o);
        if (length >= sizeof key)
            return errno = EINVAL, -1;
        memcpy(key, o, length);
        key[length] = 0;
        int command = equals ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
        if (syscall(SYS_fsconfig, fs, command, key, equals ? equals + 1 : NULL, 0))
            return -1;
    }
    return (int)syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
}

static int new_file_system(const char *type, const struct list *options, uint64_t attributes) {
    int fs = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
    if (fs < 0)
        return -1;
    if (configure(fs, options))
        return close_keeping_errno(fs, -1);
    return close_keeping_errno(
        fs, (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, (unsigned)attributes));
}

static int attach_at(struct child *c, int mount, const char *path) {
    if (mount < 0)
        return -1;
    int target = open_directories(c, path, strlen(path));
    if (target < 0)
        return close_keeping_errno(mount, -1);
    int result = attach(mount, target);
    close_keeping_errno(target, 0);
    return close_keeping_errno(mount, result);
}

int mount_new(struct child *c, const struct record *r) {
    return attach_at(c, new_file_system(r->s[0], &r->l[0], r->n[0]), r->s[1]);
}

int mount_bind(struct child *c, int mount, uint64_t attributes, const char *target) {
    if (set_attributes(mount, attributes, AT_RECURSIVE))
        return -1;
    return attach_at(c, mount, target);
}

/* A mount of one of the host's nodes. Devices open for writing on a read-only mount as well; what
 * it keeps from the task is the node itself, which is the host's: its times. */
static int open_node(int fd) {
    int mount = open_tree_of(fd);
    const uint64_t harmless = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC;
    if (mount >= 0 && set_attributes(mount, harmless, 0))
        return close_keeping_errno(mount, -1);
    return mount;
}

/* A device cannot be made in a user namespace: the host's node is bound, after a look at its
 * number. */
int mount_device(struct child *c, unsigned major, unsigned minor, const char *name) {
    char path[64];
    struct stat st;
    if (strchr(name, '/') || snprintf(path, sizeof path, "/dev/%s", name) >= (int)sizeof path)
        return errno = EINVAL, -1;
    int host = open(path, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (host < 0 || fstat(host, &st))
        return close_keeping_errno(host, -1);
    if (!S_ISCHR(st.st_mode) || st.st_rdev != makedev(major, minor))
        return errno = ENODEV, close_keeping_errno(host, -1);
    int mount = close_keeping_errno(host, open_node(host));
    int dev = open_in_root(c, "dev", O_PATH | O_DIRECTORY);
    if (mount < 0 || dev < 0)
        return -1;
    int file = openat(dev, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int result = file < 0 ? -1 : attach(mount, file);
    close_keeping_errno(file, 0);
    close_keeping_errno(dev, 0);
    return close_keeping_errno(mount, result);
}

/* One for each mask: before Linux 6.15 a detached mount could not be cloned. */
static int empty_directory(void) {
    static const struct list options = {2, "size=0\0mode=0555"};
    return new_file_system("tmpfs", &options,
                           MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
                               MOUNT_ATTR_NOEXEC);
}

int mount_mask(struct child *c, const char *path) {
    struct stat st;
    int target = open_in_root(c, path, O_PATH);
    if (target < 0)
        return errno == ENOENT ? 0 : -1;
    if (fstat(target, &st))
        return close_keeping_errno(target, -1);
    int cover = S_ISDIR(st.st_mode) ? empty_directory() : open_node(c->null);
    int result = cover < 0 ? -1 : attach(cover, target);
    close_keeping_errno(cover, 0);
    return close_keeping_errno(target, result);
}

int mount_readonly(struct child *c, const char *path) {
    int target = open_in_root(c, path, O_PATH);
    if (target < 0)
        return errno == ENOENT ? 0 : -1;
    int copy = open_tree_of(target);
    int result = copy < 0 ? -1 : set_attributes(copy, MOUNT_ATTR_RDONLY, 0);
    if (!result)
        result = attach(copy, target);
    close_keeping_errno(copy, 0);
    return close_keeping_errno(target, result);
}

int make_symlink(struct child *c, const char *target, const char *path) {
    const char *name;
    int parent = open_parent(c, path, &name);
    return parent < 0 ? -1 : close_keeping_errno(parent, symlinkat(target, parent, name));
}

/* Whatever the image has there is replaced: a link is removed, never written through. */
int make_file(struct child *c, const struct record *r) {
    const char *name;
    int parent = open_parent(c, r->s[0], &name);
    if (parent < 0)
        return -1;
    int result = -1;
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT) {
        int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd >= 0 && write(fd, r->bytes, r->bytes_length) == (ssize_t)r->bytes_length)
            result = fchmod(fd, (mode_t)r->n[0]);
        close_keeping_errno(fd, 0);
    }
    return close_keeping_errno(parent, result);
}
