/* What the task sees of files: descriptors, mounts, /dev, and what is masked or read-only. */
#define _GNU_SOURCE
#include "probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static const char *type_of(mode_t mode) {
    switch (mode & S_IFMT) {
    case S_IFREG:
        return "file";
    case S_IFDIR:
        return "directory";
    case S_IFLNK:
        return "link";
    case S_IFCHR:
        return "character";
    case S_IFBLK:
        return "block";
    case S_IFIFO:
        return "fifo";
    case S_IFSOCK:
        return "socket";
    default:
        return "other"; /* eventfd and its like */
    }
}

static void report_kind(const struct stat *st) {
    json_string("type", type_of(st->st_mode));
    json_number("mode", st->st_mode & 07777);
    json_number("uid", st->st_uid);
    json_number("gid", st->st_gid);
    if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode)) {
        json_number("major", major(st->st_rdev));
        json_number("minor", minor(st->st_rdev));
    }
}

static void report_target(int directory, const char *name) {
    char target[4096];
    ssize_t n = readlinkat(directory, name, target, sizeof target - 1);
    if (n < 0)
        return;
    target[n] = 0;
    json_string("target", target);
}

void report_descriptors(void) {
    DIR *directory = opendir("/proc/self/fd");
    json_open("descriptors", '{');
    for (struct dirent *e; directory && (e = readdir(directory));) {
        int fd = atoi(e->d_name);
        struct stat st;
        if (e->d_name[0] == '.' || fd == dirfd(directory) || fstat(fd, &st))
            continue;
        json_open(e->d_name, '{');
        report_kind(&st);
        report_target(dirfd(directory), e->d_name);
        json_number("terminal", isatty(fd));
        json_close('}');
    }
    json_close('}');
    if (directory)
        closedir(directory);
}

/* A line of mountinfo: id parent major:minor root point options [tags]... - type source super */
static void report_mount(char *line) {
    char *fields = strstr(line, " - ");
    if (!fields)
        return;
    *fields = 0;
    fields += 3;
    json_open(NULL, '{');
    static const char *const before[] = {"id", "parent", "device", "root", "point", "options"};
    for (size_t i = 0; i < sizeof before / sizeof *before; i++)
        json_string(before[i], strsep(&line, " "));
    json_string("propagation", line ? line : ""); /* "shared:N", "master:N"; empty is private */
    json_string("type", strsep(&fields, " "));
    json_string("source", strsep(&fields, " "));
    json_string("super_options", strsep(&fields, "\n"));
    json_close('}');
}

void report_mounts(void) {
    char *line = NULL;
    size_t size = 0;
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    json_open("mounts", '[');
    while (mounts && getline(&line, &size, mounts) > 0)
        report_mount(line);
    json_close(']');
    free(line);
    if (mounts)
        fclose(mounts);
}

static int open_outcome(int directory, const char *name, int flags) {
    int fd = openat(directory, name, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

static void report_nodes(const char *path) {
    DIR *directory = opendir(path);
    for (struct dirent *e; directory && (e = readdir(directory));) {
        struct stat st;
        char name[512];
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") ||
            fstatat(dirfd(directory), e->d_name, &st, AT_SYMLINK_NOFOLLOW))
            continue;
        snprintf(name, sizeof name, "%s/%s", path, e->d_name);
        json_open(name, '{');
        report_kind(&st);
        report_target(dirfd(directory), e->d_name);
        if (S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode))
            json_number("open", open_outcome(dirfd(directory), e->d_name, O_RDWR));
        json_close('}');
    }
    if (directory)
        closedir(directory);
}

/* mknod(2) where anybody may write; what was made is removed. */
static void report_made_nodes(void) {
    static const struct {
        const char *label;
        mode_t type;
        unsigned major, minor;
    } nodes[] = {
        {"null", S_IFCHR, 1, 3},    {"mem", S_IFCHR, 1, 1},     {"kmsg", S_IFCHR, 1, 11},
        {"console", S_IFCHR, 5, 1}, {"fuse", S_IFCHR, 10, 229}, {"kvm", S_IFCHR, 10, 232},
        {"loop0", S_IFBLK, 7, 0},   {"sda", S_IFBLK, 8, 0},
    };
    json_open("make_device", '{');
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        dev_t device = makedev(nodes[i].major, nodes[i].minor);
        int result = mknod("/dev/shm/.probe", nodes[i].type | 0600, device) ? errno : 0;
        if (!result)
            unlink("/dev/shm/.probe");
        json_number(nodes[i].label, result);
    }
    json_close('}');
}

void report_devices(void) {
    json_open("devices", '{');
    report_nodes("/dev");
    report_nodes("/dev/pts");
    report_nodes("/dev/shm");
    json_close('}');
    report_made_nodes();
}

/* What the root's file system says of its own size, as df does. */
void report_storage(void) {
    struct statvfs root;
    json_open("storage", '{');
    if (!statvfs("/", &root))
        json_number("bytes", (long long)root.f_blocks * (long long)root.f_frsize);
    json_close('}');
}

static int entries(const char *path) {
    int count = 0;
    DIR *directory = opendir(path);
    if (!directory)
        return -1;
    for (struct dirent *e; (e = readdir(directory));)
        count += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    closedir(directory);
    return count;
}

/* Whether a file can be made in a directory; what was made is removed. */
static int create_outcome(const char *path) {
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        return errno;
    int result = open_outcome(directory, ".probe", O_WRONLY | O_CREAT | O_EXCL);
    if (!result)
        unlinkat(directory, ".probe", 0);
    close(directory);
    return result;
}

static void report_content(const char *path) {
    char data[4096];
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) {
        json_number("read", errno);
        return;
    }
    ssize_t n = read(fd, data, sizeof data);
    json_number("read", n < 0 ? errno : 0);
    json_number("bytes", n < 0 ? 0 : n);
    close(fd);
}

/* Absent, or: what it is, whether anything is to be read there, whether it could be written. */
static void report_path(const char *path) {
    struct stat st;
    json_open(path, '{');
    if (lstat(path, &st)) {
        json_string("type", errno == ENOENT || errno == ENOTDIR ? "absent" : "unreachable");
        json_close('}');
        return;
    }
    report_kind(&st);
    if (S_ISDIR(st.st_mode)) {
        json_number("entries", entries(path));
        json_number("write", create_outcome(path));
    } else {
        report_content(path);
        json_number("write", open_outcome(AT_FDCWD, path, O_WRONLY));
    }
    json_close('}');
}

static void report_found(const char *pattern) {
    glob_t found;
    if (glob(pattern, 0, NULL, &found))
        return;
    for (size_t i = 0; i < found.gl_pathc; i++)
        report_path(found.gl_pathv[i]);
    globfree(&found);
}

void report_paths(void) {
    static const char *const paths[] = {
        "/",
        "/proc/1/exe",
        "/proc/acpi",
        "/proc/asound",
        "/proc/bus",
        "/proc/cpuinfo",
        "/proc/fs",
        "/proc/interrupts",
        "/proc/irq",
        "/proc/kcore",
        "/proc/keys",
        "/proc/kmsg",
        "/proc/kpagecount",
        "/proc/kpageflags",
        "/proc/latency_stats",
        "/proc/meminfo",
        "/proc/mtrr",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/self/exe",
        "/proc/slabinfo",
        "/proc/sys",
        "/proc/sys/fs/binfmt_misc",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/hostname",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sysrq-trigger",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/vmallocinfo",
        "/sys",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
        "/sys/fs/bpf",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/cpu.max",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.swap.max",
        "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/release_agent",
        "/sys/fs/pstore",
        "/sys/fs/selinux",
        "/sys/kernel/config",
        "/sys/kernel/debug",
        "/sys/kernel/security",
        "/sys/kernel/tracing",
        "/sys/kernel/uevent_helper",
        "/sys/power/state",
    };
    json_open("paths", '{');
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        report_path(paths[i]);
    report_found("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle");
    json_close('}');
}
