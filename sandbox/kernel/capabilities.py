"""The capabilities of a task's processes, as names and as the 64-bit masks that the kernel takes.

A task starts with the set that Docker's engine, and with it Fargate, gives to every container. The
ECS API may drop any of it and, on Fargate, add SYS_PTRACE and nothing else; that rule is control's,
here a name is only a number. All of it counts inside the task's own user namespace: NET_RAW there
is a right over the task's network namespace and none over the host's (user_namespaces(7)).

The mask is the bounding set of every process and the permitted and effective set of uid 0;
inheritable and ambient sets stay empty, so another user's process gains capabilities only through
a set-uid program or a file capability (capabilities(7)).
"""

from __future__ import annotations

from collections.abc import Iterable

from sandbox.errors import ConfigError

NAMES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)
"""Index is the kernel's number (linux/capability.h); names are ECS's, without CAP_."""

DEFAULT = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SYS_CHROOT",
    "MKNOD",
    "AUDIT_WRITE",
    "SETFCAP",
)

_NUMBERS = {name: number for number, name in enumerate(NAMES)}


def number(name: str) -> int:
    """The kernel's number of a capability; ConfigError for a name that is none."""
    try:
        return _NUMBERS[name]
    except KeyError:
        raise ConfigError(f"{name!r} is not a capability") from None


def mask(names: Iterable[str]) -> int:
    """Bit n is set for capability n, as /proc/PID/status shows it."""
    bits = 0
    for name in names:
        bits |= 1 << number(name)
    return bits


def names(bits: int) -> tuple[str, ...]:
    """The names in a mask by number; ConfigError for a bit that we have no name for."""
    if bits < 0 or bits >> len(NAMES):
        raise ConfigError(f"{bits:#x} has a capability of no known name")
    return tuple(name for n, name in enumerate(NAMES) if bits >> n & 1)


def effective_set(add: Iterable[str] = (), drop: Iterable[str] = ()) -> int:
    """The mask of a container that adds and drops these; `drop` may hold ALL.

    A name in both lists is kept, as Docker keeps it: "drop ALL, add what is needed" works.
    """
    dropped = set(drop)
    kept = 0 if "ALL" in dropped else mask(DEFAULT) & ~mask(dropped)
    return kept | mask(add)
