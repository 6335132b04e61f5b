/* System calls that Python's library does not offer, as the agent needs them.
 *
 * build_syscalls.py includes this file, so the compiler compares each definition with what cffi
 * was told. Every function returns the call's value or -errno; none allocates, keeps state, or
 * decides anything. cffi releases the GIL around each. Every descriptor returned is close-on-exec.
 * Raw system calls throughout: the mount API came into C libraries years after the kernel's. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/nsfs.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
/* <sys/mount.h> has these too, but cannot be included beside <linux/mount.h>. */
#ifndef MNT_DETACH
#define MNT_DETACH 2
#endif
#ifndef UMOUNT_NOFOLLOW
#define UMOUNT_NOFOLLOW 8
#endif

static int answer(long value) {
    return value < 0 ? -errno : (int)value;
}

/* Namespaces */

static int sys_setns(int fd, int nstype) {
    return answer(setns(fd, nstype));
}

static int sys_unshare(int flags) {
    return answer(unshare(flags));
}

/* Mounts, new API */

static int sys_open_tree(int dirfd, const char *path, unsigned int flags) {
    return answer(syscall(SYS_open_tree, dirfd, path, flags | OPEN_TREE_CLOEXEC));
}

static int sys_move_mount(int from, const char *from_path, int to, const char *to_path,
                          unsigned int flags) {
    return answer(syscall(SYS_move_mount, from, from_path, to, to_path, flags));
}

static int sys_fsopen(const char *fstype) {
    return answer(syscall(SYS_fsopen, fstype, FSOPEN_CLOEXEC));
}

static int sys_fsconfig(int fd, unsigned int command, const char *key, const char *value, int aux) {
    return answer(syscall(SYS_fsconfig, fd, command, key, value, aux));
}

static int sys_fsmount(int fd, unsigned int attrs) {
    return answer(syscall(SYS_fsmount, fd, FSMOUNT_CLOEXEC, attrs));
}

static int sys_mount_setattr(int fd, const char *path, unsigned int at_flags, uint64_t set,
                             uint64_t clear, uint64_t propagation, int userns_fd) {
    struct mount_attr attr = {
        .attr_set = set,
        .attr_clr = clear,
        .propagation = propagation,
        .userns_fd = userns_fd < 0 ? 0 : (uint64_t)userns_fd,
    };

    return answer(syscall(SYS_mount_setattr, fd, path, at_flags, &attr, sizeof(attr)));
}

/* Mounts, old API */

static int sys_mount(const char *source, const char *target, const char *fstype,
                     unsigned long flags, const char *data) {
    return answer(syscall(SYS_mount, source, target, fstype, flags, data));
}

static int sys_umount2(const char *target, int flags) {
    return answer(syscall(SYS_umount2, target, flags));
}

/* Files and descriptors */

static int sys_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode,
                       uint64_t resolve) {
    struct open_how how = {
        .flags = flags | O_CLOEXEC,
        .mode = mode,
        .resolve = resolve,
    };

    return answer(syscall(SYS_openat2, dirfd, path, &how, sizeof(how)));
}

static int sys_close_range(unsigned int first, unsigned int last) {
    return answer(syscall(SYS_close_range, first, last, 0));
}

static int sys_pidfd_getfd(int pidfd, int fd) {
    return answer(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

static int64_t sys_fstatfs_magic(int fd) {
    struct statfs buf;

    return fstatfs(fd, &buf) < 0 ? -errno : (int64_t)(uint32_t)buf.f_type;
}

/* Device policy */

static int sys_bpf_device_program(const void *insns, unsigned int count) {
    union bpf_attr attr;

    memset(&attr, 0, sizeof(attr));
    attr.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
    attr.insns = (uintptr_t)insns;
    attr.insn_cnt = count;
    attr.license = (uintptr_t) "Apache-2.0";
    return answer(syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr)));
}

/* ALLOW_MULTI: a manager of services may have put a program on the same or a parent cgroup; with
 * it all of them must agree, and ours can only take away. */
static int sys_bpf_attach_cgroup_device(int cgroup_fd, int prog_fd) {
    union bpf_attr attr;

    memset(&attr, 0, sizeof(attr));
    attr.target_fd = cgroup_fd;
    attr.attach_bpf_fd = prog_fd;
    attr.attach_type = BPF_CGROUP_DEVICE;
    attr.attach_flags = BPF_F_ALLOW_MULTI;
    return answer(syscall(SYS_bpf, BPF_PROG_ATTACH, &attr, sizeof(attr)));
}
