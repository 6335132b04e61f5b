"""Resource limits as a process has them that nobody has limited.

Linux gives its first process what is in INIT_RLIMITS (include/asm-generic/resource.h); processes
and pending signals it computes from the machine's memory (fork_init). Everything else inherits: an
agent that was started with `ulimit` would hand its own limits on.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

INFINITY: Final = (1 << 64) - 1
NUMBERS: Final = {
    "as": resource.RLIMIT_AS,
    "core": resource.RLIMIT_CORE,
    "cpu": resource.RLIMIT_CPU,
    "data": resource.RLIMIT_DATA,
    "fsize": resource.RLIMIT_FSIZE,
    "locks": 10,  # RLIMIT_LOCKS, which Python does not name
    "memlock": resource.RLIMIT_MEMLOCK,
    "msgqueue": resource.RLIMIT_MSGQUEUE,
    "nice": resource.RLIMIT_NICE,
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "rss": resource.RLIMIT_RSS,
    "rtprio": resource.RLIMIT_RTPRIO,
    "rttime": resource.RLIMIT_RTTIME,
    "sigpending": resource.RLIMIT_SIGPENDING,
    "stack": resource.RLIMIT_STACK,
}

_KERNELS: Final = {
    "core": (0, INFINITY),
    "memlock": (8 << 20, 8 << 20),
    "msgqueue": (819200, 819200),
    "nice": (0, 0),
    "nofile": (1024, 4096),
    "rtprio": (0, 0),
    "stack": (8 << 20, INFINITY),
}
"""Soft and hard; what is not named is unlimited."""


@dataclass(frozen=True, kw_only=True)
class HostLimits:
    """What this host has and gives: hard limits by name."""

    hard: Mapping[str, int]
    """Our own: without CAP_SYS_RESOURCE (`may_raise`) nothing goes above them."""
    first: Mapping[str, int]
    """Those of pid 1."""
    may_raise: bool

    @classmethod
    def read(cls, *, may_raise: bool) -> HostLimits:
        return cls(
            hard={name: known(resource.getrlimit(number)[1]) for name, number in NUMBERS.items()},
            first={name: _of_first(NUMBERS[name]) for name in ("nproc", "sigpending")},
            may_raise=may_raise,
        )

    def defaults(self) -> dict[str, tuple[int, int]]:
        """The kernel's own soft and hard limits, by name; pure."""
        computed = {name: (value, value) for name, value in self.first.items()}
        return dict.fromkeys(NUMBERS, (INFINITY, INFINITY)) | _KERNELS | computed


def known(value: int) -> int:
    """As the kernel has it; Python and ECS say -1 for what is unlimited."""
    return INFINITY if value < 0 else value


def _of_first(number: int) -> int:
    try:
        return known(resource.prlimit(1, number)[1])
    except OSError:  # somebody else's: a user namespace, an LSM
        return known(resource.getrlimit(number)[1])


_one_at_a_time = threading.RLock()


@contextmanager
def files_of_any_size() -> Iterator[None]:
    """RLIMIT_FSIZE up to its hard limit meanwhile: what this process was given for its own files
    is not meant for its tasks'. It is a limit of the process, hence one thread at a time."""
    with _one_at_a_time:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
