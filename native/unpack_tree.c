/* Makes what entries describe, below one root directory.
 *
 * The parent of every entry is opened from the root by openat2 without following any link; what is
 * made is named relative to that descriptor and opened with O_NOFOLLOW and O_EXCL. The descriptor
 * of the last directory is kept for the next entry. It cannot be stale: an entry replaces things
 * only in the directory that is kept at that moment, never one at or above it.
 *
 * A directory keeps the time its entry gave it: whoever leaves it puts back the time it had on
 * entering. So no list of directories has to be remembered until the end.
 */
#define _GNU_SOURCE
#include "unpack.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/param.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define DIRECTORY (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
#define MARKER ".wh."
#define MARKER_LENGTH 4

static _Noreturn void refuse_call(const char *path, const char *call) {
    refuse(path, "%s: %s", call, strerror(errno));
}

static int open_beneath(int root, const char *path) {
    struct open_how how = {.flags = DIRECTORY,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV};
    return (int)syscall(SYS_openat2, root, *path ? path : ".", &how, sizeof how);
}

static void leave(struct tree *tree) {
    if (tree->dir < 0)
        return;
    struct timespec times[2] = {tree->dir_mtime, tree->dir_mtime};
    if (futimens(tree->dir, times))
        refuse_call(tree->dir_path, "utimensat");
    close(tree->dir);
    tree->dir = -1;
}

/* The directory behind `fd` becomes the one that is worked in. */
static void adopt(struct tree *tree, const char *path, int fd) {
    struct stat now;
    leave(tree);
    if (fstat(fd, &now))
        refuse_call(path, "fstat");
    tree->dir = fd;
    tree->dir_mtime = now.st_mtim;
    tree->dir_setgid = now.st_mode & S_ISGID;
    strcpy(tree->dir_path, path);
}

static void count(struct tree *tree, const char *path) {
    if (++tree->entries > tree->entry_limit)
        refuse(path, "the layer has more than %llu entries", (unsigned long long)tree->entry_limit);
}

/* Work in directory `path`; it and those above it are made if no entry brought them. */
static void enter(struct tree *tree, char *path) {
    if (tree->dir >= 0 && !strcmp(path, tree->dir_path))
        return;
    int fd = open_beneath(tree->root, path);
    if (fd < 0 && errno == ENOENT && *path) {
        char *slash = strrchr(path, '/');
        if (slash)
            *slash = 0;
        enter(tree, slash ? path : (char[]){""});
        if (slash)
            *slash = '/';
        const char *name = slash ? slash + 1 : path;
        count(tree, path);
        if (mkdirat(tree->dir, name, 0755))
            refuse_call(path, "mkdirat");
        fd = openat(tree->dir, name, DIRECTORY);
    }
    if (fd < 0 && (errno == ENOTDIR || errno == ELOOP))
        refuse(path, "is not a directory but has entries below it");
    if (fd < 0)
        refuse_call(path, "openat2");
    adopt(tree, path, fd);
}

static bool leads_upwards(const char *path) {
    for (const char *at = path; *at; at += *at == '/') {
        size_t length = strcspn(at, "/");
        if (length == 2 && !memcmp(at, "..", 2))
            return true;
        at += length;
    }
    return false;
}

/* Drops empty and "." components in place: "/a//./b/" becomes "a/b". */
static void clean(const struct entry *entry, char *path) {
    if (leads_upwards(path))
        refuse(entry->path, "a name leads upwards");
    char *to = path;
    for (char *from = path; *from; from += *from == '/') {
        size_t length = strcspn(from, "/");
        if (length && !(length == 1 && *from == '.')) {
            if (to != path)
                *to++ = '/';
            memmove(to, from, length);
            to += length;
        }
        from += length;
    }
    *to = 0;
}

/* Cuts a clean path at its last slash, which the caller puts back. */
static char *split(char *path) {
    char *slash = strrchr(path, '/');
    if (slash)
        *slash = 0;
    return slash;
}

static bool is_marker(const char *component) {
    return !strncmp(component, MARKER, MARKER_LENGTH);
}

/* The names with which layers hide things of the layers below never appear in the tree: they are
 * reported. True if `path` was one. "a/.wh.b" hides a/b; "a/.wh..wh..opq" hides all that a had.
 * Other names beginning with .wh..wh. are aufs's own bookkeeping in very old images. */
static bool take_marker(struct tree *tree, char *path) {
    char *name = path;
    for (char *next; (next = strchr(name, '/')); name = next + 1)
        if (is_marker(name)) {
            if (is_marker(name + MARKER_LENGTH))
                return true;
            refuse(path, "an entry lies below a whiteout");
        }
    if (!is_marker(name))
        return false;
    const char *hidden = name + MARKER_LENGTH;
    bool opaque = !strcmp(hidden, MARKER ".opq");
    if (!opaque && is_marker(hidden))
        return true;
    if (!opaque && (!*hidden || !strcmp(hidden, ".") || !strcmp(hidden, "..")))
        refuse(path, "a whiteout of no name");
    if (strlen(hidden) > NAME_MAX)
        refuse(path, "a whiteout of a name that is too long");
    count(tree, path);
    char text[PATH_BYTES + 1];
    size_t above = (size_t)(name - path);
    memcpy(text, path, above);
    strcpy(text + above, opaque ? "" : hidden);
    if (above)
        path[above - 1] = 0;
    enter(tree, above ? path : (char[]){""});
    if (opaque && above)
        text[above - 1] = 0;
    report(opaque ? 'O' : 'W', text);
    return true;
}

static int remove_tree(int dir, const char *name) {
    if (!unlinkat(dir, name, 0))
        return 0;
    if (errno != EISDIR)
        return -1;
    if (!unlinkat(dir, name, AT_REMOVEDIR))
        return 0;
    if (errno != ENOTEMPTY)
        return -1;
    int inner = openat(dir, name, DIRECTORY); /* one a level: at most PATH_BYTES / 2 */
    if (inner < 0)
        return -1;
    char buffer[1024];
    long got;
    while ((got = syscall(SYS_getdents64, inner, buffer, sizeof buffer)) > 0)
        for (long at = 0; at < got;) {
            const struct dirent64 *entry = (const void *)(buffer + at);
            at += entry->d_reclen;
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
                remove_tree(inner, entry->d_name)) {
                close(inner);
                return -1;
            }
        }
    close(inner);
    return got < 0 ? -1 : unlinkat(dir, name, AT_REMOVEDIR);
}

/* Only what this layer brought can be linked to, and only files. */
static int link_to(struct tree *tree, struct entry *entry, const char *name) {
    struct stat target;
    char *slash = split(entry->link);
    const char *target_name = slash ? slash + 1 : entry->link;
    int dir = open_beneath(tree->root, slash ? entry->link : "");
    if (dir < 0 || fstatat(dir, target_name, &target, AT_SYMLINK_NOFOLLOW) ||
        !S_ISREG(target.st_mode))
        refuse(entry->path, "a hard link to what is no file of this layer");
    int answer = linkat(dir, target_name, tree->dir, name, 0);
    int error = errno;
    close(dir);
    if (slash)
        *slash = '/';
    errno = error;
    return answer;
}

/* One attempt. What it returns is a descriptor for a file, else 0. */
static int make(struct tree *tree, struct entry *entry, const char *name) {
    switch (entry->type) {
    case '0':
        return openat(tree->dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                      entry->mode & 0777);
    case '1':
        return link_to(tree, entry, name);
    case '2':
        return symlinkat(entry->link, tree->dir, name);
    case '5':
        return mkdirat(tree->dir, name, entry->mode & 0777);
    default:
        return mknodat(tree->dir, name, S_IFIFO | (entry->mode & 0777), 0);
    }
}

/* A later entry replaces an earlier one of its name; a directory joins a directory. */
static int make_or_replace(struct tree *tree, struct entry *entry, const char *name) {
    int made = make(tree, entry, name);
    if (made >= 0 || errno != EEXIST)
        return made;
    struct stat old;
    if (fstatat(tree->dir, name, &old, AT_SYMLINK_NOFOLLOW))
        return -1;
    if (entry->type == '5' && S_ISDIR(old.st_mode))
        return 0;
    if (entry->type == '1' && !strcmp(entry->link, entry->path))
        return 0;
    if (remove_tree(tree->dir, name))
        return -1;
    return make(tree, entry, name);
}

static void write_extent(struct tree *tree, struct tar *tar, int fd, struct extent extent) {
    const char *bytes;
    for (size_t part; (part = tar_content(tar, &bytes, extent.length)); extent.length -= part)
        for (size_t done = 0; done < part;) {
            ssize_t wrote = pwrite(fd, bytes + done, part - done, (off_t)extent.offset);
            if (wrote < 0 && errno == EINTR)
                continue;
            if (wrote < 0)
                refuse_call(tar->entry.path, "write");
            done += (size_t)wrote;
            extent.offset += (uint64_t)wrote;
            tree->bytes += (uint64_t)wrote;
        }
}

static void write_content(struct tree *tree, struct tar *tar, int fd) {
    const struct entry *entry = &tar->entry;
    for (size_t i = 0; i < entry->extents; i++)
        write_extent(tree, tar, fd, entry->extent[i]);
    if (entry->sparse && ftruncate(fd, (off_t)entry->size))
        refuse_call(entry->path, "ftruncate");
}

/* user.* but not overlay's own, and file capabilities. trusted.*, ACLs and labels are dropped. */
static bool is_kept(const char *name, bool is_file) {
    if (!strncmp(name, "user.", 5))
        return strncmp(name, "user.overlay.", 13) != 0;
    return is_file && !strcmp(name, "security.capability");
}

static void set_xattrs(const struct tar *tar, int fd) {
    const struct entry *entry = &tar->entry;
    struct xattr xattr = {0};
    char name[256];
    while (tar_next_xattr(tar, &xattr)) {
        if (xattr.name_length >= sizeof name)
            refuse(entry->path, "the name of an extended attribute is too long");
        memcpy(name, xattr.name, xattr.name_length);
        name[xattr.name_length] = 0;
        if (is_kept(name, entry->type == '0') &&
            fsetxattr(fd, name, xattr.value, xattr.value_length, 0))
            refuse_call(entry->path, "fsetxattr");
    }
}

/* What a new file gets by itself is owner 0:0, unless its directory has the set-group-id bit. */
static bool needs_owner(const struct tree *tree, const struct entry *entry) {
    return entry->uid || entry->gid || tree->dir_setgid;
}

/* In this order: writing and chown take set-id bits and capabilities away. */
static void set_attributes(const struct tar *tar, int fd, bool owner, bool mode) {
    const struct entry *entry = &tar->entry;
    struct timespec times[2] = {entry->mtime, entry->mtime};
    if (owner && fchown(fd, entry->uid, entry->gid))
        refuse_call(entry->path, "fchown");
    if (mode && fchmod(fd, entry->mode))
        refuse_call(entry->path, "fchmod");
    if (tar->pax_length)
        set_xattrs(tar, fd);
    if (futimens(fd, times))
        refuse_call(entry->path, "utimensat");
}

static void set_attributes_by_name(const struct tree *tree, const struct entry *entry,
                                   const char *name) {
    struct timespec times[2] = {entry->mtime, entry->mtime};
    if (needs_owner(tree, entry) &&
        fchownat(tree->dir, name, entry->uid, entry->gid, AT_SYMLINK_NOFOLLOW))
        refuse_call(entry->path, "fchownat");
    if (entry->type == '6' && entry->mode & 07000 && fchmodat(tree->dir, name, entry->mode, 0))
        refuse_call(entry->path, "fchmodat");
    if (utimensat(tree->dir, name, times, AT_SYMLINK_NOFOLLOW))
        refuse_call(entry->path, "utimensat");
}

/* Its attributes are set before it is adopted: the time to be put back is the entry's. */
static void add_directory(struct tree *tree, struct tar *tar, const char *name) {
    int fd = openat(tree->dir, name, DIRECTORY);
    if (fd < 0)
        refuse_call(tar->entry.path, "openat");
    set_attributes(tar, fd, true, true);
    adopt(tree, tar->entry.path, fd);
}

static void add_root(struct tree *tree, struct tar *tar) {
    struct entry *entry = &tar->entry;
    if (entry->type != '5')
        refuse("/", "the root is not a directory");
    enter(tree, entry->path);
    set_attributes(tar, tree->dir, true, true);
    tree->dir_mtime = entry->mtime;
    tree->dir_setgid = entry->mode & S_ISGID;
}

void tree_add(struct tree *tree, struct tar *tar) {
    struct entry *entry = &tar->entry;
    clean(entry, entry->path);
    if (take_marker(tree, entry->path))
        return;
    count(tree, entry->path);
    if (!*entry->path) {
        add_root(tree, tar);
        return;
    }
    if (entry->type == '3' || entry->type == '4') {
        report('D', entry->path);
        return;
    }
    if (entry->type == '1')
        clean(entry, entry->link);
    if (entry->size > tree->file_limit && entry->type == '0')
        refuse(entry->path, "is larger than %llu bytes", (unsigned long long)tree->file_limit);

    char *slash = split(entry->path);
    enter(tree, slash ? entry->path : (char[]){""});
    if (slash)
        *slash = '/';
    const char *name = slash ? slash + 1 : entry->path;
    int fd = make_or_replace(tree, entry, name);
    if (fd < 0)
        refuse_call(entry->path, "cannot be made");
    if (entry->type == '0') {
        write_content(tree, tar, fd);
        set_attributes(tar, fd, needs_owner(tree, entry), entry->mode & 07000);
        close(fd);
    } else if (entry->type == '5')
        add_directory(tree, tar, name);
    else if (entry->type != '1')
        set_attributes_by_name(tree, entry, name);
}

/* A layer that does not describe its root has one as any engine makes it: 0755, 0:0. */
void tree_open(struct tree *tree, int root, uint64_t file_limit, uint64_t entry_limit) {
    *tree = (struct tree){
        .root = root, .file_limit = file_limit, .entry_limit = entry_limit, .dir = -1};
    if (fchown(root, 0, 0) || fchmod(root, 0755))
        refuse_call("/", "fchmod");
}

void tree_close(struct tree *tree) {
    leave(tree);
}
