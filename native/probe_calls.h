/* System calls to attempt: label, name, five arguments. Included once for each ABI, after the
 * header with its numbers. Arguments are such that the kernel would refuse them (bad pointer, bad
 * descriptor, bad command) with something else than EPERM or ENOSYS, or that nothing happens. */
#include "probe.h"

/* Newer than the headers of the oldest system that we build on. */
#ifndef __NR_lsm_get_self_attr
#define __NR_lsm_get_self_attr 459
#endif
#ifndef __NR_lsm_set_self_attr
#define __NR_lsm_set_self_attr 460
#endif
#ifndef __NR_lsm_list_modules
#define __NR_lsm_list_modules 461
#endif
#ifndef __NR_open_tree_attr
#define __NR_open_tree_attr 467
#endif
#define __NR_newer_than_all 999

#define BAD (-1L)

/* CLONE_THREAD without CLONE_SIGHAND is EINVAL, so no attempt makes a process. */
#define NO_CHILD 0x00010000L
#define TIOCSTI_ 0x5412
#define TIOCLINUX_ 0x541C
#define TCGETS_ 0x5401
#define STREAM 1

#define CALLS(X)                                                                                   \
    X("mount", mount, BAD, BAD, BAD, 0, BAD)                                                       \
    X("umount2", umount2, BAD, 0, 0, 0, 0)                                                         \
    X("umount", umount, BAD, 0, 0, 0, 0)                                                           \
    X("pivot_root", pivot_root, BAD, BAD, 0, 0, 0)                                                 \
    X("fsopen", fsopen, BAD, 0, 0, 0, 0)                                                           \
    X("fsconfig", fsconfig, BAD, 0, 0, 0, 0)                                                       \
    X("fsmount", fsmount, BAD, 0, 0, 0, 0)                                                         \
    X("fspick", fspick, BAD, BAD, 0, 0, 0)                                                         \
    X("open_tree", open_tree, BAD, BAD, 0, 0, 0)                                                   \
    X("open_tree_attr", open_tree_attr, BAD, BAD, 0, BAD, 0)                                       \
    X("move_mount", move_mount, BAD, BAD, BAD, BAD, 0)                                             \
    X("mount_setattr", mount_setattr, BAD, BAD, 0, BAD, 32)                                        \
    X("setns", setns, BAD, 0, 0, 0, 0)                                                             \
    X("unshare user", unshare, 0x10000000, 0, 0, 0, 0)                                             \
    X("unshare mount", unshare, 0x00020000, 0, 0, 0, 0)                                            \
    X("unshare time", unshare, 0x00000080, 0, 0, 0, 0)                                             \
    X("unshare cgroup", unshare, 0x02000000, 0, 0, 0, 0)                                           \
    X("unshare uts", unshare, 0x04000000, 0, 0, 0, 0)                                              \
    X("unshare ipc", unshare, 0x08000000, 0, 0, 0, 0)                                              \
    X("unshare pid", unshare, 0x20000000, 0, 0, 0, 0)                                              \
    X("unshare net", unshare, 0x40000000, 0, 0, 0, 0)                                              \
    X("clone", clone, NO_CHILD, 0, 0, 0, 0)                                                        \
    X("clone mount", clone, NO_CHILD | 0x00020000, 0, 0, 0, 0)                                     \
    X("clone cgroup", clone, NO_CHILD | 0x02000000, 0, 0, 0, 0)                                    \
    X("clone uts", clone, NO_CHILD | 0x04000000, 0, 0, 0, 0)                                       \
    X("clone ipc", clone, NO_CHILD | 0x08000000, 0, 0, 0, 0)                                       \
    X("clone user", clone, NO_CHILD | 0x10000000, 0, 0, 0, 0)                                      \
    X("clone pid", clone, NO_CHILD | 0x20000000, 0, 0, 0, 0)                                       \
    X("clone net", clone, NO_CHILD | 0x40000000, 0, 0, 0, 0)                                       \
    X("clone3", clone3, 0, 0, 0, 0, 0)                                                             \
    X("bpf", bpf, 999, BAD, 0, 0, 0)                                                               \
    X("perf_event_open", perf_event_open, BAD, 0, 0, 0, 0)                                         \
    X("userfaultfd", userfaultfd, BAD, 0, 0, 0, 0)                                                 \
    X("io_uring_setup", io_uring_setup, 1, BAD, 0, 0, 0)                                           \
    X("io_uring_enter", io_uring_enter, BAD, 0, 0, 0, 0)                                           \
    X("io_uring_register", io_uring_register, BAD, 99, 0, 0, 0)                                    \
    X("add_key", add_key, BAD, BAD, BAD, 0, 0)                                                     \
    X("request_key", request_key, BAD, BAD, BAD, 0, 0)                                             \
    X("keyctl", keyctl, 999, 0, 0, 0, 0)                                                           \
    X("init_module", init_module, BAD, 64, BAD, 0, 0)                                              \
    X("finit_module", finit_module, BAD, BAD, 0, 0, 0)                                             \
    X("delete_module", delete_module, BAD, 0, 0, 0, 0)                                             \
    X("kexec_load", kexec_load, 0, 999, BAD, 0, 0)                                                 \
    X("kexec_file_load", kexec_file_load, BAD, BAD, 0, BAD, BAD)                                   \
    X("reboot", reboot, 0, 0, 0, 0, 0)                                                             \
    X("swapon", swapon, BAD, 0, 0, 0, 0)                                                           \
    X("swapoff", swapoff, BAD, 0, 0, 0, 0)                                                         \
    X("acct", acct, BAD, 0, 0, 0, 0)                                                               \
    X("quotactl", quotactl, BAD, BAD, 0, BAD, 0)                                                   \
    X("quotactl_fd", quotactl_fd, BAD, BAD, 0, BAD, 0)                                             \
    X("sethostname", sethostname, BAD, BAD, 0, 0, 0)                                               \
    X("setdomainname", setdomainname, BAD, BAD, 0, 0, 0)                                           \
    X("syslog", syslog, 99, 0, 0, 0, 0)                                                            \
    X("vhangup", vhangup, 0, 0, 0, 0, 0)                                                           \
    X("settimeofday", settimeofday, BAD, 0, 0, 0, 0)                                               \
    X("clock_settime", clock_settime, BAD, BAD, 0, 0, 0)                                           \
    X("clock_settime64", clock_settime64, BAD, BAD, 0, 0, 0)                                       \
    X("stime", stime, BAD, 0, 0, 0, 0)                                                             \
    X("iopl", iopl, 99, 0, 0, 0, 0)                                                                \
    X("ioperm", ioperm, BAD, 2, 1, 0, 0)                                                           \
    X("vm86", vm86, 99, BAD, 0, 0, 0)                                                              \
    X("vm86old", vm86old, BAD, 0, 0, 0, 0)                                                         \
    X("fanotify_init", fanotify_init, BAD, BAD, 0, 0, 0)                                           \
    X("fanotify_mark", fanotify_mark, BAD, 0, 0, BAD, BAD)                                         \
    X("open_by_handle_at", open_by_handle_at, BAD, BAD, 0, 0, 0)                                   \
    X("get_mempolicy", get_mempolicy, 0, 0, 0, 0, 99)                                              \
    X("set_mempolicy", set_mempolicy, 99, 0, 0, 0, 0)                                              \
    X("set_mempolicy_home_node", set_mempolicy_home_node, 0, 4096, 99, 99, 0)                      \
    X("mbind", mbind, 0, 4096, 99, 0, 0)                                                           \
    X("migrate_pages", migrate_pages, BAD, 8, BAD, BAD, 0)                                         \
    X("move_pages", move_pages, 0, 1, BAD, BAD, BAD)                                               \
    X("lsm_get_self_attr", lsm_get_self_attr, 99, BAD, BAD, 99, 0)                                 \
    X("lsm_set_self_attr", lsm_set_self_attr, 0, BAD, 8, 99, 0)                                    \
    X("lsm_list_modules", lsm_list_modules, BAD, BAD, 99, 0, 0)                                    \
    X("uselib", uselib, BAD, 0, 0, 0, 0)                                                           \
    X("sysfs", sysfs, 99, 0, 0, 0, 0)                                                              \
    X("ustat", ustat, BAD, BAD, 0, 0, 0)                                                           \
    X("lookup_dcookie", lookup_dcookie, BAD, BAD, 0, 0, 0)                                         \
    X("kcmp", kcmp, BAD, BAD, 0, 0, 0)                                                             \
    X("pidfd_getfd", pidfd_getfd, BAD, 0, 0, 0, 0)                                                 \
    X("process_madvise", process_madvise, BAD, BAD, 0, 0, 0)                                       \
    X("ptrace", ptrace, 99, BAD, 0, 0, 0)                                                          \
    X("process_vm_readv", process_vm_readv, BAD, 0, 0, 0, 0)                                       \
    X("process_vm_writev", process_vm_writev, BAD, 0, 0, 0, 0)                                     \
    X("personality tell", personality, 0xFFFFFFFF, 0, 0, 0, 0)                                     \
    X("personality linux", personality, 0, 0, 0, 0, 0)                                             \
    X("personality linux32", personality, 8, 0, 0, 0, 0)                                           \
    X("personality uname26", personality, 0x00020000, 0, 0, 0, 0)                                  \
    X("personality linux32 uname26", personality, 0x00020008, 0, 0, 0, 0)                          \
    X("personality no randomize", personality, 0x00040000, 0, 0, 0, 0)                             \
    X("personality read implies exec", personality, 0x00400000, 0, 0, 0, 0)                        \
    X("personality mmap page zero", personality, 0x00100000, 0, 0, 0, 0)                           \
    X("personality compat layout", personality, 0x00200000, 0, 0, 0, 0)                            \
    X("personality svr4", personality, 0x00100001, 0, 0, 0, 0)                                     \
    X("socket unix", socket, 1, STREAM, 0, 0, 0)                                                   \
    X("socket inet", socket, 2, STREAM, 0, 0, 0)                                                   \
    X("socket netlink", socket, 16, 3, 0, 0, 0)                                                    \
    X("socketpair unix", socketpair, 1, STREAM, 0, BAD, 0)                                         \
    X("socketpair alg", socketpair, 38, STREAM, 0, BAD, 0)                                         \
    X("socketcall", socketcall, 99, BAD, 0, 0, 0)                                                  \
    X("ioctl TCGETS", ioctl, BAD, TCGETS_, BAD, 0, 0)                                              \
    X("ioctl TIOCSTI", ioctl, BAD, TIOCSTI_, BAD, 0, 0)                                            \
    X("ioctl TIOCSTI high", ioctl, BAD, (long)(1ULL << 32 | TIOCSTI_), BAD, 0, 0)                  \
    X("ioctl TIOCLINUX", ioctl, BAD, TIOCLINUX_, BAD, 0, 0)                                        \
    X("ioctl TIOCLINUX high", ioctl, BAD, (long)(1ULL << 32 | TIOCLINUX_), BAD, 0, 0)              \
    X("chroot", chroot, BAD, 0, 0, 0, 0)                                                           \
    X("mknodat", mknodat, BAD, BAD, 0, 0, 0)                                                       \
    X("openat", openat, BAD, BAD, 0, 0, 0)                                                         \
    X("seccomp", seccomp, 99, 0, 0, 0, 0)                                                          \
    X("getpid", getpid, 0, 0, 0, 0, 0)                                                             \
    X("newer than all", newer_than_all, 0, 0, 0, 0, 0)

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define ENTRY(label, name, a, b, c, d, e) {label, TEXT(__NR_##name), {a, b, c, d, e}},
