"""What a task may ask of the kernel: the system call policy as data. build_seccomp.py compiles it.

The reach is that of the mainstream engines' default profile for a container without added
capabilities, less io_uring, most socket families and the injection of terminal input; nothing that
they refuse is allowed. Two answers tell a refusal:

- EPERM for what we know and refuse, as the kernel answers a caller without the capability.
- ENOSYS for what a program should believe not to exist: everything newer than this policy (the C
  library then falls back; EPERM would be an error to it), and the few calls under ABSENT.

The same policy holds for the 32-bit ABI of the machine, which every 64-bit process can enter (int
0x80): a filter for one ABI is no filter. x32 is refused whole, because its numbers (from 0x40000000
on) are beyond the newest that we know; a kernel without x32 answers ENOSYS as well.

Arguments are compared in their low 32 bits only. That is exact, not a shortcut: the kernel itself
takes each of these as an int or cuts it to 32 bits, and a comparison of 64 would let
`ioctl(fd, 1 << 32 | TIOCSTI)` pass. Nothing behind a pointer can be seen by a filter at all, which
is why clone3 and socketcall are ABSENT.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EAFNOSUPPORT, ENOSYS, EPERM

ALLOW = 0
"""Any other action is the errno that the call answers."""

UNKNOWN = ENOSYS


@dataclass(frozen=True)
class Condition:
    """`inside` if (low half of argument & mask) is one of `values`, else `outside`."""

    argument: int
    values: tuple[int, ...]
    inside: int
    outside: int
    mask: int = 0xFFFFFFFF


ALLOWED = {
    "reading and writing": """
        close close_range copy_file_range dup dup2 dup3 fadvise64 fadvise64_64 arm_fadvise64_64
        fallocate fcntl fcntl64 fdatasync flock fsync ftruncate ftruncate64 lseek _llseek
        pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile sendfile64
        splice sync sync_file_range arm_sync_file_range syncfs tee truncate truncate64 vmsplice
        write writev cachestat""",
    "files and directories": """
        access chdir chmod chown chown32 creat faccessat faccessat2 fchdir fchmod fchmodat
        fchmodat2 fchown fchown32 fchownat fstat fstat64 fstatat64 fstatfs fstatfs64 futimesat
        getcwd getdents getdents64 lchown lchown32 link linkat lstat lstat64 mkdir mkdirat mknod
        mknodat name_to_handle_at newfstatat open openat openat2 readlink readlinkat rename
        renameat renameat2 rmdir stat stat64 statfs statfs64 statx symlink symlinkat umask unlink
        unlinkat utime utimensat utimensat_time64 utimes""",
    "extended attributes": """
        fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr
        listxattrat llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr
        setxattrat""",
    # chroot needs SYS_CHROOT, which a task has; out of it one gets to the task's own root at most.
    "its root, its mounts as they are, and landlock's own limits": """
        chroot landlock_add_rule landlock_create_ruleset landlock_restrict_self listmount
        statmount""",
    "waiting and notification": """
        epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
        inotify_add_watch inotify_init inotify_init1 inotify_rm_watch pipe pipe2 poll ppoll
        ppoll_time64 pselect6 pselect6_time64 select _newselect signalfd signalfd4""",
    # Linux AIO is narrow and old databases need it; its successor io_uring is refused below.
    "asynchronous input and output of the old kind": """
        io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit""",
    "memory": """
        brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2
        mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc
        pkey_free pkey_mprotect remap_file_pages""",
    "processes and threads": """
        execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait
        futex_waitv futex_wake get_robust_list get_thread_area getcpu getpgid getpgrp getpid
        getppid getpriority getrlimit getrusage getsid gettid ioprio_get ioprio_set pause
        pidfd_open prctl prlimit64 process_mrelease restart_syscall rseq sched_get_priority_max
        sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
        sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr
        sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area
        set_tid_address setpgid setpriority setrlimit setsid times ugetrlimit vfork wait4 waitid
        waitpid""",
    # uretprobe acts only from the kernel's own trampoline; refusing it kills a probed program
    # (Linux 6.11 to 6.13; later kernels do not ask the filter).
    "what a processor needs": """
        arch_prctl breakpoint cacheflush get_tls modify_ldt set_tls uretprobe usr26 usr32""",
    "signals": """
        kill pidfd_send_signal rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
        rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
        sigaltstack sigprocmask sigreturn tgkill tkill""",
    # Setting the clock through adjtimex is refused by the kernel: SYS_TIME is not in the task.
    "clocks, timers and randomness": """
        adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
        clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer getrandom gettimeofday
        nanosleep setitimer time timer_create timer_delete timer_getoverrun timer_gettime
        timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
        timerfd_gettime64 timerfd_settime timerfd_settime64""",
    "users, groups and capabilities, within the user namespace": """
        capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32
        getresgid getresgid32 getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid
        setfsuid32 setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32
        setresuid setresuid32 setreuid setreuid32 setuid setuid32""",
    # ipc multiplexes the calls of this group on i386 and none but these: nothing to filter in it.
    "System V and POSIX queues, semaphores and shared memory": """
        ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
        mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
        semtimedop_time64 shmat shmctl shmdt shmget""",
    "sockets that were made": """
        accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom
        recvmmsg recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown""",
    "what the machine says of itself": "sysinfo uname",
    # Mainstream profiles allow these since Linux 4.8, from when on the filter runs after a tracer
    # has had its say and can no longer be bypassed by one. The kernel's own rule stays: the same
    # user, no more capabilities, in the task's user and pid namespace. Debuggers, sanitizers and
    # crash handlers need them without asking for SYS_PTRACE.
    "tracing one's own": "process_vm_readv process_vm_writev ptrace",
}

PTRACE_ONLY = "kcmp pidfd_getfd process_madvise"
"""Allowed with SYS_PTRACE, EPERM without it."""

DENIED = {
    "mounts and namespaces": """
        fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree open_tree_attr
        pivot_root setns umount umount2 unshare""",
    # Large, young and shared with the host: where most of the last years' escapes began.
    "attack surface": """
        bpf io_uring_enter io_uring_register io_uring_setup lookup_dcookie perf_event_open
        userfaultfd""",
    # Keyrings are no namespace: a key is found by its number from every container of a user.
    "kernel keyrings": "add_key keyctl request_key",
    "the kernel's own code": """
        delete_module finit_module init_module kexec_file_load kexec_load""",
    "the whole machine": """
        acct quotactl quotactl_fd reboot setdomainname sethostname swapoff swapon syslog vhangup""",
    "the machine's clock": "clock_settime clock_settime64 settimeofday stime",
    # By a handle every file of a file system can be opened, whatever the root directory is.
    "files past the root directory": "fanotify_init fanotify_mark open_by_handle_at",
    "ports, buses and real mode": """
        ioperm iopl pciconfig_iobase pciconfig_read pciconfig_write vm86 vm86old""",
    "placement of memory": """
        get_mempolicy mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node""",
    "security modules": "lsm_get_self_attr lsm_list_modules lsm_set_self_attr",
    "forms that no C library of the last twenty years uses": """
        nice oldfstat oldlstat oldolduname oldstat olduname readdir sgetmask sigaction signal
        sigpending sigsuspend ssetmask sysfs uselib ustat""",
}

ABSENT = {
    # Its flags are behind a pointer. On ENOSYS every C library takes clone, whose flags are not.
    "clone3": "clone3",
    # It hides the family behind a pointer, so it would open every family that the filter closes,
    # to 64-bit programs as well (int 0x80). Since Linux 4.3 i386 has direct calls, and musl takes
    # them. glibc for i386 knows only socketcall when it was built for older kernels, as Debian's
    # is (for 3.2): such a 32-bit program has no sockets in a task. That is the price.
    "socketcall": "socketcall",
    "what the kernel itself has no longer": """
        _sysctl afs_syscall bdflush break create_module epoll_ctl_old epoll_wait_old ftime
        get_kernel_syms getpmsg gtty idle lock mpx nfsservctl prof profil putpmsg query_module
        security stty tuxcall ulimit vserver""",
}

# clone(2), unshare(2): every CLONE_NEW* but CLONE_NEWTIME, whose bit is part of clone's exit signal
# and means a namespace only to unshare and clone3.
_NAMESPACES = (
    0x00020000  # CLONE_NEWNS
    | 0x02000000  # CLONE_NEWCGROUP
    | 0x04000000  # CLONE_NEWUTS
    | 0x08000000  # CLONE_NEWIPC
    | 0x10000000  # CLONE_NEWUSER
    | 0x20000000  # CLONE_NEWPID
    | 0x40000000  # CLONE_NEWNET
)

# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (the interfaces of one's own namespace; getifaddrs(3)) and
# AF_PACKET (for NET_RAW). Not AF_ALG (the kernel's ciphers on hostile input), not AF_VSOCK (reaches
# the hypervisor past every network namespace), none of the families whose module nobody missed. The
# errno is what a kernel without the family answers: programs have a way to go on for that one.
_FAMILIES = Condition(0, values=(1, 2, 10, 16, 17), inside=ALLOW, outside=EAFNOSUPPORT)

FILTERED = {
    "clone": Condition(0, mask=_NAMESPACES, values=(0,), inside=ALLOW, outside=EPERM),
    "socket": _FAMILIES,
    "socketpair": _FAMILIES,
    # PER_LINUX, PER_LINUX32, UNAME26 with either, and "tell": the rest switches protections off
    # (READ_IMPLIES_EXEC, ADDR_NO_RANDOMIZE, MMAP_PAGE_ZERO) or emulates dead systems.
    "personality": Condition(
        0, values=(0, 8, 0x20000, 0x20008, 0xFFFFFFFF), inside=ALLOW, outside=EPERM
    ),
    # TIOCSTI and TIOCLINUX type into a terminal: with a client's own terminal as stdin that is a
    # command in the client's shell.
    "ioctl": Condition(1, values=(0x5412, 0x541C), inside=EPERM, outside=ALLOW),
}


def decisions(*, ptrace: bool) -> dict[str, int | Condition]:
    """One decision for each call that the policy knows; ValueError if a call has two."""
    decided: dict[str, int | Condition] = {}

    def decide(names: str, decision: int | Condition) -> None:
        for name in names.split():
            if name in decided:
                raise ValueError(f"the policy decides twice on {name}")
            decided[name] = decision

    for names in ALLOWED.values():
        decide(names, ALLOW)
    for names in DENIED.values():
        decide(names, EPERM)
    for names in ABSENT.values():
        decide(names, ENOSYS)
    for name, condition in FILTERED.items():
        decide(name, condition)
    decide(PTRACE_ONLY, ALLOW if ptrace else EPERM)
    return decided
