"""What a task is protected by, as one table: each row is demanded of every way into a task.

The probe (`native/probe.h`) reports from inside; `sandbox.model.judgement` holds its report to the
rows. `sandbox doctor --deep` does so on a user's host and the tests on every change, so a statement
about the inside of a task stands here and nowhere else. docs/protections.md is made of it.

A way in has traits. A row may demand something else of a trait; the first in its `unless` counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from errno import (
    EACCES,
    EAFNOSUPPORT,
    EBADF,
    EFAULT,
    EINVAL,
    ENETUNREACH,
    ENOSYS,
    ENXIO,
    EPERM,
    EROFS,
)
from typing import Any, Final

from sandbox.model.judgement import (
    Demand,
    Finding,
    Host,
    Place,
    Row,
    covering,
    empty,
    entries,
    equal,
    equal_limits,
    like,
    limit,
    lines_like,
    masked,
    members,
    mounted,
    never,
    not_outcome,
    octal,
    oom_score,
    outcome,
    own_ids,
    own_namespace,
    readable,
    unreadable,
    unwritable,
    within,
)
from sandbox.model.judgement import judge as judge_by
from sandbox.model.judgement import mask as mask_of

WAYS: Final[dict[str, tuple[str, ...]]] = {
    "first process": (),
    "exec": ("entered",),
    "health check": ("entered",),
    "read-only root": ("read-only",),
    "other user": ("other user",),
    "exec as other user": ("entered", "other user"),
    "set-uid program": ("set-uid",),
    "with SYS_PTRACE": ("SYS_PTRACE",),
    "without NET_RAW": ("no NET_RAW",),
    "init": ("init",),
    "terminal": ("terminal",),
    "exec in a terminal": ("entered", "terminal"),
    "variables": ("variables",),
}
"""By each of them a program gets into a task: name -> traits."""


def judge(report: dict[str, Any], way: str, host: Host) -> list[Finding]:
    return judge_by(report, WAYS[way], host, ROWS)


# Places ------------------------------------------------------------------------------------


def at(*keys: str) -> tuple[Place, ...]:
    """One place."""
    return (keys,)


def below(top: str, names: str | Iterable[str]) -> tuple[Place, ...]:
    names = names.split() if isinstance(names, str) else names
    return tuple((top, name) for name in names)


def native(labels: Iterable[str]) -> tuple[Place, ...]:
    return tuple(("system_calls", "native", label) for label in labels)


def i386(labels: Iterable[str]) -> tuple[Place, ...]:
    return tuple(("system_calls", "i386", label) for label in labels)


def calls(
    name: str,
    labels: Iterable[str],
    demand: Demand,
    *,
    source: str,
    old: Iterable[str] = (),
    **more: Any,
) -> Row:
    """Of both ABIs; `old` labels are of 32-bit or of x86 alone."""
    labels, old = tuple(labels), tuple(old)
    maybe = i386(labels) + i386(old) + native(old)
    return Row(name=name, source=source, demand=demand, places=native(labels), maybe=maybe, **more)


# Numbers -----------------------------------------------------------------------------------

DEFAULT_CAPABILITIES: Final = 0xA80425FB
"""Docker's fourteen, as capabilities(7) numbers them."""
_NET_RAW: Final = 1 << 13
_SYS_PTRACE: Final = 1 << 19

REFUSED: Final = outcome(EPERM)
DONE: Final = outcome(0)
NO_SUCH_CALL: Final = outcome(ENOSYS)

_POLICY: Final = "seccomp(2); native/seccomp_policy.py"
_CAPABILITIES: Final = "capabilities(7)"
_USERNS: Final = "user_namespaces(7)"
_DOCKER: Final = "what Docker's engine masks and makes read-only"
_FRESH: Final = "what the agent's parents set must not be a task's"

KERNEL_LIMITS: Final = {
    "cpu": (-1, -1),
    "fsize": (-1, -1),
    "data": (-1, -1),
    "stack": (8 << 20, -1),
    "core": (0, -1),
    "rss": (-1, -1),
    "memlock": (8 << 20, 8 << 20),
    "as": (-1, -1),
    "locks": (-1, -1),
    "msgqueue": (819200, 819200),
    "nice": (0, 0),
    "rtprio": (0, 0),
    "rttime": (-1, -1),
}
DEVICES: Final = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
LINKS: Final = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
MASKED: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys"),
    *("/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list"),
    *("/proc/timer_stats", "/sys/firmware", "/sys/devices/virtual/powercap"),
)
THROTTLES: Final = "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle"
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
CLONED: Final = ("cgroup", "ipc", "mount", "net", "pid", "user", "uts")
"""Namespaces by clone(2), which has no bit for time."""
FAMILIES: Final = {1: "unix", 2: "inet", 10: "inet6", 16: "netlink", 17: "packet"}
_PERSONALITIES: Final = ("tell", "linux", "linux32", "uname26", "linux32 uname26")
_BASE_ENVIRONMENT: Final = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOSTNAME=[0-9a-f]{12}",
    "AWS_EXECUTION_ENV=AWS_ECS_FARGATE",
    "AWS_REGION=[a-z0-9-]+",
    "AWS_DEFAULT_REGION=[a-z0-9-]+",
)
_OF_ROOT: Final = (*_BASE_ENVIRONMENT, "HOME=/root")
_OF_APP: Final = (*_BASE_ENVIRONMENT, "HOME=/home/app")


# The table ---------------------------------------------------------------------------------

USERS: Final = (
    Row(
        name="ids are a range of the task's own",
        source=_USERNS,
        demand=own_ids(),
        places=at("uid_map") + at("gid_map"),
    ),
    Row(
        name="groups may be set, within the range",
        source=f"{_USERNS}: a task's own su and login need it",
        demand=equal("allow"),
        places=at("setgroups"),
    ),
    Row(
        name="the user is the definition's or the image's",
        source="ECS: user; credentials(7)",
        demand=equal("0\t0\t0\t0"),
        places=at("status", "Uid"),
        unless={
            "other user": equal("1000\t1000\t1000\t1000"),
            "set-uid": equal("1000\t0\t0\t0"),
        },
    ),
    Row(
        name="the group is the user's",
        source="credentials(7)",
        demand=equal("0\t0\t0\t0"),
        places=at("status", "Gid"),
        unless=dict.fromkeys(("other user", "set-uid"), equal("1000\t1000\t1000\t1000")),
    ),
    Row(
        name="supplementary groups are those of the image's user, never the agent's",
        source="group(5) of the image",
        demand=like(" *", "none"),
        places=at("status", "Groups"),
        unless=dict.fromkeys(("other user", "set-uid"), like("2000 *", "2000")),
    ),
    Row(
        name="the root directory belongs to the task's root",
        source="as in the image",
        demand=members("0:0, 0755", type="directory", uid=0, gid=0, mode=0o755, write=0),
        places=at("paths", "/"),
        unless={
            "read-only": members("0:0, 0755, EROFS", uid=0, gid=0, mode=0o755, write=EROFS),
            "other user": members("0:0, 0755, EACCES", uid=0, gid=0, mode=0o755, write=EACCES),
        },
    ),
)

RIGHTS: Final = (
    Row(
        name="the bounding set is the definition's",
        source=f"{_CAPABILITIES}; Docker's default, which is Fargate's",
        demand=mask_of(DEFAULT_CAPABILITIES),
        places=at("status", "CapBnd"),
        unless={
            "SYS_PTRACE": mask_of(DEFAULT_CAPABILITIES | _SYS_PTRACE),
            "no NET_RAW": mask_of(DEFAULT_CAPABILITIES & ~_NET_RAW),
        },
    ),
    Row(
        name="root holds the bounding set, another user nothing",
        source=_CAPABILITIES,
        demand=mask_of(DEFAULT_CAPABILITIES),
        places=below("status", "CapPrm CapEff"),
        unless={
            "other user": mask_of(0),
            "SYS_PTRACE": mask_of(DEFAULT_CAPABILITIES | _SYS_PTRACE),
            "no NET_RAW": mask_of(DEFAULT_CAPABILITIES & ~_NET_RAW),
        },
    ),
    Row(
        name="no capability is inheritable or ambient",
        source=_CAPABILITIES,
        demand=mask_of(0),
        places=below("status", "CapInh CapAmb"),
    ),
    Row(
        name="root is root as always: no securebits",
        source=f"{_CAPABILITIES}; set-uid programs of an image work",
        demand=equal(0),
        places=at("securebits"),
    ),
    Row(
        name="a filter of system calls is loaded",
        source="seccomp(2): mode 2",
        demand=equal("2"),
        places=at("status", "Seccomp"),
    ),
    Row(
        name="it is the only one",
        source="each filter is run for each call",
        demand=equal("1"),
        places=at("status", "Seccomp_filters"),
    ),
    Row(
        name="set-uid programs work: no_new_privs is off",
        source="prctl(2), PR_SET_NO_NEW_PRIVS; as on Fargate",
        demand=equal("0"),
        places=at("status", "NoNewPrivs"),
    ),
    Row(
        name="nobody traces it",
        source="ptrace(2)",
        demand=equal("0"),
        places=at("status", "TracerPid"),
    ),
    Row(
        name="it can be debugged within the task",
        source="prctl(2), PR_SET_DUMPABLE: only what enters is not dumpable",
        demand=equal(1),
        places=at("dumpable"),
        unless={"set-uid": equal(0, 2)},
    ),
)

SYSTEM_CALLS: Final = (
    calls(
        "mounts, old and new, are refused",
        (
            *("mount", "umount2", "pivot_root", "fsopen", "fsconfig", "fsmount", "fspick"),
            *("open_tree", "open_tree_attr", "move_mount", "mount_setattr"),
        ),
        REFUSED,
        old=("umount",),
        source=_POLICY,
    ),
    calls(
        "no namespace is entered or made",
        (
            "setns",
            *(
                f"unshare {kind}"
                for kind in ["user", "mount", "time", "cgroup", "uts", "ipc", "pid", "net"]
            ),
            *(f"clone {kind}" for kind in CLONED),
        ),
        REFUSED,
        source=f"{_POLICY}; namespaces(7)",
    ),
    calls(
        "clone3 and calls newer than the policy do not exist",
        ("clone3", "newer than all"),
        NO_SUCH_CALL,
        source=f"{_POLICY}: the C library falls back on ENOSYS alone",
    ),
    calls(
        "bpf, perf, userfaultfd and io_uring are refused",
        (
            *("bpf", "perf_event_open", "userfaultfd"),
            *("io_uring_setup", "io_uring_enter", "io_uring_register"),
        ),
        REFUSED,
        source=f"{_POLICY}: most of the kernel's own holes of the last years",
    ),
    calls(
        "keyrings are out of reach",
        ("add_key", "request_key", "keyctl"),
        REFUSED,
        source=f"{_POLICY}; keyrings(7) know of no namespace but the user's",
    ),
    calls(
        "the kernel's code stays as it is",
        ("init_module", "finit_module", "delete_module", "kexec_load"),
        REFUSED,
        old=("kexec_file_load",),
        source=_POLICY,
    ),
    calls(
        "the machine is not a task's to switch",
        (
            *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "sethostname"),
            *("setdomainname", "syslog", "vhangup"),
        ),
        REFUSED,
        source=_POLICY,
    ),
    calls(
        "the clock cannot be set by a call",
        ("settimeofday", "clock_settime"),
        REFUSED,
        old=("clock_settime64", "stime"),
        source=_POLICY,
    ),
    Row(
        name="nor be adjusted",
        source="clock_adjtime(2) asks for SYS_TIME of the host",
        demand=REFUSED,
        places=at("set_clock"),
    ),
    calls(
        "no file is opened by its handle, no other's access watched",
        ("open_by_handle_at", "fanotify_init", "fanotify_mark"),
        REFUSED,
        source=f"{_POLICY}; open_by_handle_at(2): past every root directory",
    ),
    calls(
        "ports and real mode are refused",
        (),
        REFUSED,
        old=("iopl", "ioperm", "vm86", "vm86old"),
        source=_POLICY,
    ),
    calls(
        "the placement of memory is the host's",
        (
            *("get_mempolicy", "set_mempolicy", "set_mempolicy_home_node", "mbind"),
            *("migrate_pages", "move_pages"),
        ),
        REFUSED,
        source=_POLICY,
    ),
    calls(
        "security modules tell nothing",
        ("lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules"),
        REFUSED,
        source=_POLICY,
    ),
    calls(
        "forms that nobody uses any more are refused",
        (),
        REFUSED,
        old=("uselib", "sysfs", "ustat", "lookup_dcookie"),
        source=_POLICY,
    ),
    calls(
        "reaching into other processes takes SYS_PTRACE",
        ("kcmp", "pidfd_getfd", "process_madvise"),
        REFUSED,
        unless={"SYS_PTRACE": not_outcome(EPERM)},  # a kernel may have no kcmp
        source=_POLICY,
    ),
    calls(
        "debuggers work",
        ("ptrace", "process_vm_readv", "process_vm_writev"),
        not_outcome(EPERM, ENOSYS),
        source="ptrace(2), since Linux 4.8 asked before the filter",
    ),
    calls(
        "the five common personalities exist",
        (f"personality {name}" for name in _PERSONALITIES),
        DONE,
        source=f"{_POLICY}; personality(2)",
    ),
    calls(
        "no personality takes a protection away",
        (
            "personality no randomize",
            "personality read implies exec",
            "personality mmap page zero",
            "personality compat layout",
            "personality svr4",
        ),
        REFUSED,
        source=f"{_POLICY}; personality(2)",
    ),
    calls(
        "nothing is typed into a terminal for somebody else",
        ("ioctl TIOCSTI", "ioctl TIOCSTI high", "ioctl TIOCLINUX", "ioctl TIOCLINUX high"),
        REFUSED,
        source=f"{_POLICY}; ioctl_tty(2)",
    ),
    calls(
        "other terminal calls come through",
        ("ioctl TCGETS",),
        outcome(EBADF),
        source="a terminal has to work",
    ),
    calls(
        "sockets are unix, internet, netlink and packet",
        ("socket unix", "socket inet", "socket netlink"),
        DONE,
        source=_POLICY,
    ),
    calls(
        "their families come through",
        (f"socket family {number}" for number in FAMILIES),
        outcome(EINVAL),
        source=f"{_POLICY}; the type that is asked for does not exist",
    ),
    calls(
        "no other family does, AF_ALG, AF_VSOCK and AF_XDP among them",
        (
            *(f"socket family {number}" for number in range(46) if number not in FAMILIES),
            "socketpair alg",
        ),
        outcome(EAFNOSUPPORT),
        source=f"{_POLICY}; address_families(7)",
    ),
    calls(
        "pairs of unix sockets come through",
        ("socketpair unix",),
        outcome(EFAULT),
        source=_POLICY,
    ),
    Row(
        name="the 32-bit multiplexer of sockets does not exist",
        source=f"{_POLICY}; socketcall(2) hides the family behind a pointer",
        demand=NO_SUCH_CALL,
        maybe=i386(("socketcall",)),
    ),
    Row(
        name="the x32 ABI does not exist",
        source=f"{_POLICY}: its numbers are another door to the same calls",
        demand=NO_SUCH_CALL,
        maybe=at("system_calls", "x32", "*"),
    ),
    calls(
        "what programs need comes through",
        ("clone", "chroot", "mknodat", "openat", "seccomp", "getpid"),
        not_outcome(EPERM, ENOSYS),
        source="a filter that refuses everything protects nothing that runs",
    ),
)

FILES: Final = (
    Row(
        name="the root is an overlay without devices",
        source="overlayfs; mount(2), MS_NODEV",
        demand=mounted("overlay", "rw,nodev"),
        places=at("mounts", "/"),
        unless={"read-only": mounted("overlay", "ro,nodev")},
    ),
    Row(
        name="/proc is of the task's own pid namespace",
        source="proc(5); pid_namespaces(7)",
        demand=mounted("proc", "rw,nosuid,nodev,noexec"),
        places=at("mounts", "/proc"),
    ),
    Row(
        name="/sys is read-only",
        source="sysfs(5)",
        demand=mounted("sysfs", "ro,nosuid,nodev,noexec"),
        places=at("mounts", "/sys"),
    ),
    Row(
        name="/sys/fs/cgroup is read-only and of cgroup v2",
        source="cgroup_namespaces(7)",
        demand=mounted("cgroup2", "ro,nosuid,nodev,noexec"),
        places=at("mounts", "/sys/fs/cgroup"),
    ),
    Row(
        name="/dev is a fresh tmpfs of bounded size",
        source="tmpfs(5)",
        demand=mounted("tmpfs", "rw,nosuid,noexec", "size=65536k"),
        places=at("mounts", "/dev"),
    ),
    Row(
        name="/dev/pts is an instance of its own",
        source="pts(4); devpts",
        demand=mounted("devpts", "rw,nosuid,noexec", "gid=[0-9]+,mode=620,ptmxmode=666"),
        places=at("mounts", "/dev/pts"),
    ),
    Row(
        name="/dev/shm has 64 MiB",
        source="shm_overview(7); ECS: sharedMemorySize",
        demand=mounted("tmpfs", "rw,nosuid,nodev,noexec", "size=65536k"),
        places=at("mounts", "/dev/shm"),
    ),
    Row(
        name="/dev/mqueue is of its own ipc namespace",
        source="mq_overview(7); ipc_namespaces(7)",
        demand=mounted("mqueue", "rw,nosuid,nodev,noexec"),
        places=at("mounts", "/dev/mqueue"),
    ),
    Row(
        name="what covers a path can be neither written nor executed",
        source="mount(2)",
        demand=covering(),
        places=below("mounts", ["/proc/sys"]),
        maybe=below("mounts", [*MASKED, *(p for p in READ_ONLY if p != "/proc/sys"), THROTTLES]),
    ),
    Row(
        name="device nodes are bound read-only",
        source="a device opens for writing all the same; its node cannot be changed",
        demand=covering(),
        places=below("mounts", [f"/dev/{name}" for name in (*DEVICES, "tty")]),
    ),
    Row(
        name="what tells of the machine is masked",
        source=_DOCKER,
        demand=masked(),
        places=below("paths", MASKED),
        maybe=below("paths", [THROTTLES]),
    ),
    Row(
        name="settings of the kernel cannot be written",
        source=f"{_DOCKER}; proc(5), sysfs(5)",
        demand=unwritable(),
        places=below(
            "paths",
            [
                *READ_ONLY,
                "/proc/mtrr",
                "/proc/sys/fs/binfmt_misc",
                "/proc/sys/kernel/core_pattern",
                "/proc/sys/kernel/hostname",
                "/proc/sys/kernel/modprobe",
                "/proc/sys/net/ipv4/ip_forward",
                "/sys",
                "/sys/kernel/uevent_helper",
                "/sys/power/state",
            ],
        ),
    ),
    Row(
        name="nor can the task's own limits and cgroups",
        source="cgroup-v2.rst; where controllers are of cgroup v1 there is nothing to be seen",
        demand=unwritable(),
        places=below(
            "paths",
            [
                "/sys/fs/cgroup",
                "/sys/fs/cgroup/cgroup.procs",
                "/sys/fs/cgroup/cpu.max",
                "/sys/fs/cgroup/memory.max",
                "/sys/fs/cgroup/memory.swap.max",
                "/sys/fs/cgroup/pids.max",
            ],
        ),
    ),
    Row(
        name="no release agent is reachable",
        source="cgroups(7): a program that root of the host would run",
        demand=members("absent", type="absent"),
        places=at("paths", "/sys/fs/cgroup/release_agent"),
    ),
    Row(
        name="no file system for debugging is mounted",
        source="debugfs, tracefs, securityfs, bpffs, pstore, configfs, selinuxfs",
        demand=empty(),
        places=below(
            "paths",
            [
                "/sys/fs/bpf",
                "/sys/fs/pstore",
                "/sys/fs/selinux",
                "/sys/kernel/config",
                "/sys/kernel/debug",
                "/sys/kernel/security",
                "/sys/kernel/tracing",
            ],
        ),
    ),
    Row(
        name="the kernel's log and tables of memory are the host's root's",
        source="proc(5)",
        demand=unreadable(),
        places=below(
            "paths",
            [
                "/proc/kmsg",
                "/proc/kpagecount",
                "/proc/kpageflags",
                "/proc/slabinfo",
                "/proc/vmallocinfo",
            ],
        ),
    ),
    Row(
        name="what programs need of /proc is there",
        source="subset=pid of proc(5) would take it away",
        demand=readable(),
        places=below("paths", ["/proc/cpuinfo", "/proc/meminfo"]),
    ),
    Row(
        name="no running program can be written to",
        source="CVE-2019-5736: the one that enters a container least of all",
        demand=unwritable(),
        places=below("paths", ["/proc/1/exe", "/proc/self/exe"]),
    ),
    Row(
        name="storage has a limit",
        source="Fargate gives a task 20 GiB; a file system keeps some MiB for itself",
        demand=within(1, (20 << 30) + (64 << 20)),
        places=at("storage", "bytes"),
        mend="load the modules loop and ext4 and install e2fsprogs: limited storage needs them",
    ),
)

IN_DEV: Final = (
    *(
        Row(
            name=f"/dev/{name} is 1:{minor}",
            source="null(4), full(4), random(4); the kernel's devices.txt",
            demand=members(
                f"character 1:{minor}, 0666, opens",
                type="character",
                major=1,
                minor=minor,
                mode=0o666,
                open=0,
            ),
            places=at("devices", f"/dev/{name}"),
        )
        for name, minor in DEVICES.items()
    ),
    Row(
        name="/dev/tty opens only where a terminal was asked for",
        source="tty(4)",
        demand=members("character 5:0, ENXIO", type="character", major=5, minor=0, open=ENXIO),
        places=at("devices", "/dev/tty"),
        unless={"terminal": members("character 5:0", type="character", major=5, minor=0, open=0)},
    ),
    *(
        Row(
            name=f"/dev/{name} leads to {target}",
            source="as every udev makes it" if name != "ptmx" else "pts(4): its own instance's",
            demand=members(f"a link to {target}", type="link", target=target),
            places=at("devices", f"/dev/{name}"),
        )
        for name, target in LINKS.items()
    ),
    Row(
        name="/dev/pts has its multiplexer",
        source="pts(4)",
        demand=members("character 5:2, 0666", type="character", major=5, minor=2, mode=0o666),
        places=at("devices", "/dev/pts/ptmx"),
    ),
    Row(
        name="and a terminal only if one was asked for",
        source="pts(4)",
        demand=never("none"),
        maybe=at("devices", "/dev/pts/[0-9]*"),
        unless={
            "terminal": members(
                "character 136, 0620, group 5", type="character", major=136, mode=0o620, gid=5
            )
        },
    ),
    Row(
        name="shared memory and queues are everybody's and sticky",
        source="shm_overview(7), mq_overview(7)",
        demand=members("a directory, 1777", type="directory", mode=0o1777),
        places=below("devices", ["/dev/shm", "/dev/mqueue"]),
    ),
    Row(
        name="/dev/pts is a directory",
        source="pts(4)",
        demand=members("a directory, 0755", type="directory", mode=0o755),
        places=at("devices", "/dev/pts"),
    ),
    Row(
        name="no device node can be made",
        source="mknod(2) asks for MKNOD of the host",
        demand=REFUSED,
        places=below("make_device", "null mem kmsg console fuse kvm loop0 sda"),
    ),
)

_PIPE: Final = members("a pipe of its user's, 0600", type="fifo", mode=0o600, uid=0, terminal=0)
_PIPE_OF_APP: Final = members(
    "a pipe of its user's, 0600", type="fifo", mode=0o600, uid=1000, terminal=0
)
_TERMINAL: Final = members("/dev/pts/0", type="character", target="/dev/pts/0", terminal=1)

PROCESS: Final = (
    Row(
        name="stdin is the null device",
        source="unless it was asked for",
        demand=members("character 1:3", type="character", major=1, minor=3, target="/dev/null"),
        places=at("descriptors", "0"),
        unless={"terminal": _TERMINAL},
    ),
    Row(
        name="stdout and stderr are pipes of its own, and nothing else is open",
        source="CVE-2024-21626: a directory left open leads out of the root",
        demand=_PIPE,
        places=below("descriptors", "1 2"),
        unless={
            "other user": _PIPE_OF_APP,
            "set-uid": _PIPE_OF_APP,
            "terminal": _TERMINAL,
        },
    ),
    Row(
        name="its environment is the image's, the definition's and what a task may know",
        source="ECS: environment; nothing of the agent's",
        demand=entries(*_OF_ROOT),
        places=at("environment"),
        unless={
            "other user": entries(*_OF_APP),
            "set-uid": entries(*_OF_APP),
            "entered": entries(*_OF_ROOT),
            "terminal": entries(*_OF_ROOT, "TERM=xterm"),
            "variables": entries(*_OF_ROOT, "ASKED_FOR=yes"),
        },
    ),
    Row(
        name="no signal is blocked, ignored, handled or waiting",
        source=f"signal(7), proc(5): execve keeps them; {_FRESH}",
        demand=mask_of(0),
        places=below("status", "SigBlk SigIgn SigCgt SigPnd ShdPnd"),
    ),
    Row(name="the umask is 0022", source=_FRESH, demand=octal(0o022), places=at("umask")),
    Row(name="the priority is the usual one", source=_FRESH, demand=equal(0), places=at("nice")),
    Row(
        name="so is the scheduler",
        source=f"sched(7); {_FRESH}",
        demand=equal(os.SCHED_OTHER),
        places=at("scheduler"),
    ),
    Row(
        name="the OOM killer treats it as any process",
        source="proc(5), oom_score_adj",
        demand=oom_score(),
        places=at("oom_score_adj"),
    ),
    Row(
        name="and that cannot be lowered",
        source="proc(5), oom_score_adj: SYS_RESOURCE of the host",
        demand=outcome(EACCES, EPERM),
        places=at("lower_oom_score_adj"),
    ),
    Row(
        name="the limit of open files is Fargate's",
        source="ECS: nofile 65535",
        demand=limit(65535, 65535),
        places=at("limits", "nofile"),
    ),
    *(
        Row(
            name=f"limit {name} is the kernel's own",
            source=f"getrlimit(2); {_FRESH}",
            demand=limit(soft, hard),
            places=at("limits", name),
        )
        for name, (soft, hard) in KERNEL_LIMITS.items()
    ),
    Row(
        name="limits nproc and sigpending are what the kernel computes",
        source="getrlimit(2)",
        demand=equal_limits(),
        places=below("limits", "nproc sigpending"),
    ),
    Row(
        name="priority, limits and scheduler cannot be raised",
        source="setpriority(2), setrlimit(2), sched(7): SYS_NICE and SYS_RESOURCE of the host",
        demand=outcome(EACCES, EPERM),
        places=below("raise", "priority nofile realtime"),
    ),
    Row(
        name="it leads a session and a group of its own",
        source="setsid(2)",
        demand=equal(1),
        places=at("leads_session") + at("leads_process_group"),
    ),
    Row(
        name="it is pid 1, or has the container's init or nobody above it",
        source="pid_namespaces(7)",
        demand=equal(0),
        places=at("ppid"),
        unless={"init": equal(1)},
    ),
    Row(
        name="its number is one of its own pid namespace",
        source="pid_namespaces(7)",
        demand=equal(1),
        places=at("pid"),
        unless=dict.fromkeys(("entered", "init"), within(2, 1 << 22)),
    ),
    Row(
        name="no terminal controls it but one that was asked for",
        source="tty(4)",
        demand=outcome(ENXIO),
        places=at("controlling_terminal"),
        unless={"terminal": DONE},
    ),
    Row(
        name="its life is tied to no process of the agent",
        source="prctl(2), PR_SET_PDEATHSIG",
        demand=equal(0),
        places=at("parent_death_signal"),
    ),
    Row(
        name="the host name is its own",
        source="uts_namespaces(7)",
        demand=like("[0-9a-f]{12}", "the beginning of the task's id"),
        places=at("hostname"),
    ),
    Row(
        name="no domain name is inherited",
        source="uts_namespaces(7)",
        demand=equal("(none)"),
        places=at("domainname"),
    ),
    Row(
        name="its directory is inside the root",
        source="getcwd(2): what is outside has no absolute path",
        demand=equal("/"),
        places=at("working_directory"),
    ),
)

SURROUNDINGS: Final = (
    Row(
        name="namespaces are the task's own",
        source="namespaces(7)",
        demand=own_namespace(),
        places=below("namespaces", "cgroup ipc mnt net pid user uts"),
    ),
    Row(
        name="the clock is the host's",
        source="time_namespaces(7): as on Fargate",
        demand=like(r"time:\[[0-9]+\]", "any"),
        maybe=at("namespaces", "time"),
    ),
    Row(
        name="its cgroup is the root of what is seen",
        source="cgroup_namespaces(7)",
        demand=lines_like("[0-9]+:[^:]*:/", "/"),
        places=at("cgroup"),
        unless={"entered": lines_like("[0-9]+:[^:]*:/(exec[.][0-9a-f]{16})?", "/ or /exec.ID")},
    ),
    Row(
        name="raw sockets take NET_RAW",
        source="raw(7), packet(7)",
        demand=DONE,
        places=below("network", "raw_socket raw_socket_6 packet_socket"),
        unless=dict.fromkeys(("other user", "no NET_RAW"), REFUSED),
    ),
    Row(
        name="ping and port 80 take nothing",
        source="icmp(7), ping_group_range; ip(7), ip_unprivileged_port_start",
        demand=DONE,
        places=below("network", "ping_socket bind_80"),
    ),
    Row(
        name="the only interface is lo",
        source="network_namespaces(7)",
        demand=entries("lo"),
        places=at("network", "interfaces"),
    ),
    Row(
        name="interfaces cannot be changed",
        source="rtnetlink(7) asks for NET_ADMIN",
        demand=REFUSED,
        places=at("network", "change_link"),
    ),
    Row(
        name="no name of another's socket is seen",
        source="unix(7): abstract names belong to the network namespace",
        demand=entries(),
        places=at("network", "unix_sockets"),
    ),
    Row(
        name="the host's and others' metadata is out of reach",
        source="RFC 3927: link-local addresses are the real cloud's credentials",
        demand=outcome(ENETUNREACH),
        places=below("network", "route_to_instance_metadata route_to_task_metadata"),
    ),
    *(
        Row(
            name=f"sysctl net/{name} is {' '.join(value.split())}",
            source="the kernel's ip-sysctl.rst",
            demand=equal(value, None) if name.startswith("ipv6") else equal(value),
            places=at("network", "sysctls", name),
        )
        for name, value in {
            "ipv4/conf/all/accept_redirects": "0",
            "ipv4/conf/default/accept_redirects": "0",
            "ipv4/ip_forward": "0",
            "ipv4/ip_unprivileged_port_start": "0",
            "ipv4/ping_group_range": "0\t65535",
            "ipv6/conf/all/accept_ra": "0",
            "ipv6/conf/all/accept_redirects": "0",
            "ipv6/conf/all/forwarding": "0",
            "ipv6/conf/default/accept_ra": "0",
            "ipv6/conf/default/accept_redirects": "0",
        }.items()
    ),
)

TABLE: Final[dict[str, tuple[Row, ...]]] = {
    "Users": USERS,
    "Capabilities and filter": RIGHTS,
    "System calls": SYSTEM_CALLS,
    "File systems": FILES,
    "Devices": IN_DEV,
    "The process": PROCESS,
    "Namespaces and the network": SURROUNDINGS,
}
ROWS: Final = tuple(row for rows in TABLE.values() for row in rows)
