"""The binding of syscalls.c and spawn.c: `sandbox._native`, one abi3 file for all Pythons.

cffi's API mode lets the compiler fill in every constant and compare every prototype with the
kernel's headers; nothing here is a number that somebody typed in. setup.py takes `ffi` from this
file (`scripts/native binding` builds in place).
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

CONSTANTS = """
CLONE_FS CLONE_NEWCGROUP CLONE_NEWIPC CLONE_NEWNET CLONE_NEWNS CLONE_NEWPID CLONE_NEWTIME
CLONE_NEWUSER CLONE_NEWUTS
NS_GET_OWNER_UID NS_GET_USERNS
AT_EMPTY_PATH AT_FDCWD AT_RECURSIVE AT_SYMLINK_NOFOLLOW
OPEN_TREE_CLONE
MOVE_MOUNT_F_EMPTY_PATH MOVE_MOUNT_T_EMPTY_PATH
FSCONFIG_SET_FLAG FSCONFIG_SET_STRING FSCONFIG_SET_FD FSCONFIG_CMD_CREATE
MOUNT_ATTR_IDMAP MOUNT_ATTR_NOATIME MOUNT_ATTR_NODEV MOUNT_ATTR_NOEXEC MOUNT_ATTR_NOSUID
MOUNT_ATTR_NOSYMFOLLOW MOUNT_ATTR_RDONLY
MS_BIND MS_NODEV MS_NOEXEC MS_NOSUID MS_PRIVATE MS_RDONLY MS_REC MS_REMOUNT MS_SLAVE
MNT_DETACH UMOUNT_NOFOLLOW
RESOLVE_BENEATH RESOLVE_IN_ROOT RESOLVE_NO_MAGICLINKS RESOLVE_NO_SYMLINKS RESOLVE_NO_XDEV
CGROUP2_SUPER_MAGIC CGROUP_SUPER_MAGIC EXT4_SUPER_MAGIC OVERLAYFS_SUPER_MAGIC PROC_SUPER_MAGIC
SYSFS_MAGIC TMPFS_MAGIC XFS_SUPER_MAGIC
"""

FUNCTIONS = """
int sys_setns(int fd, int nstype);
int sys_unshare(int flags);
int sys_open_tree(int dirfd, const char *path, unsigned int flags);
int sys_move_mount(int from, const char *from_path, int to, const char *to_path,
                   unsigned int flags);
int sys_fsopen(const char *fstype);
int sys_fsconfig(int fd, unsigned int command, const char *key, const char *value, int aux);
int sys_fsmount(int fd, unsigned int attrs);
int sys_mount_setattr(int fd, const char *path, unsigned int at_flags, uint64_t set,
                      uint64_t clear, uint64_t propagation, int userns_fd);
int sys_mount(const char *source, const char *target, const char *fstype, unsigned long flags,
              const char *data);
int sys_umount2(const char *target, int flags);
int sys_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);
struct spawn { const char *path; char *const *argv; int *fds; int count; int error; };
int sys_spawn(struct spawn *s, char *stack, unsigned int size);
int sys_close_range(unsigned int first, unsigned int last);
int sys_pidfd_getfd(int pidfd, int fd);
int64_t sys_fstatfs_magic(int fd);
int sys_bpf_device_program(const void *insns, unsigned int count);
int sys_bpf_attach_cgroup_device(int cgroup_fd, int prog_fd);
"""

ffi = FFI()
ffi.cdef(FUNCTIONS + "".join(f"#define {name} ...\n" for name in CONSTANTS.split()))
ffi.set_source(
    "sandbox._native",
    '#include "syscalls.c"\n#include "spawn.c"',
    depends=[str(HERE / "syscalls.c"), str(HERE / "spawn.c")],
    # -iquote, not -I: no header of ours can stand in for one of the system's (<limits.h>).
    extra_compile_args=["-iquote", str(HERE), "-Wall", "-Wextra", "-Wno-unused-parameter"],
)
