"""The files of a cgroup as typed attributes.

cgroupspy declares a file as a descriptor (`IntegerFile("pids.current")`) on a controller class; its
own classes cover version 1's cpu and memory, the rest is declared here in the same way. Only
how a file is reached is ours: `Files` opens relative to a branch, keeps what it reads from, and
raises KernelError. cgroupspy's trees, which walk the whole host, are not used.

`Cpu`, `Memory` and `Pids` are what `Cgroup` sees; versions differ behind them. `apply` writes
limits to a new cgroup (only what differs from the kernel's defaults) or to an old one (all).
"""

from __future__ import annotations

import errno
import os
from typing import Any, Protocol

from cgroupspy.controllers import Controller, CpuController, MemoryController
from cgroupspy.interfaces import BaseFileInterface, DictFile, FlagFile, IntegerFile

from sandbox.errors import KernelError
from sandbox.kernel.cgroups.hierarchies import Branch
from sandbox.kernel.cgroups.limits import Limits

DEFAULT_PERIOD_US = 100_000

# Version 1 says "no limit" with the largest multiple of a page in a long.
V1_UNLIMITED = 1 << 62


class MaxFile(BaseFileInterface):  # type: ignore[misc]
    """An integer for which version 2 (and pids everywhere) says `max` when there is no limit."""

    def __get__(self, files: Files, owner: type[Files]) -> int | None:
        value = files.get_property(self.filename)
        return None if value == "max" else int(value)

    def __set__(self, files: Files, value: int | None) -> None:
        files.set_property(self.filename, "max" if value is None else value)


class QuotaFile(BaseFileInterface):  # type: ignore[misc]
    """`cpu.max`: quota and period in microseconds."""

    def __get__(self, files: Files, owner: type[Files]) -> tuple[int | None, int]:
        quota, period = files.get_property(self.filename).split()
        return (None if quota == "max" else int(quota)), int(period)

    def __set__(self, files: Files, value: tuple[int | None, int]) -> None:
        quota, period = value
        files.set_property(self.filename, f"{'max' if quota is None else quota} {period}")


class Files(Controller):  # type: ignore[misc]
    """The files of one cgroup in one hierarchy, reached through its branch."""

    def __init__(self, branch: Branch, directory: str) -> None:
        self._branch = branch
        self._directory = directory
        self._kept: dict[bytes, int] = {}

    def get_property(self, filename: bytes) -> str:
        fd = self._kept.get(filename)
        if fd is None:
            fd = self._branch.open(self._path(filename), os.O_RDONLY)
            self._kept[filename] = fd
        try:
            return os.pread(fd, 4096, 0).decode().rstrip("\n")
        except OSError as error:
            subject = self._branch.subject(self._path(filename))
            raise KernelError("read", subject, error.errno or errno.EIO) from error

    def set_property(self, filename: bytes, value: Any) -> None:
        self._branch.write(self._path(filename), str(value))

    def close(self) -> None:
        """Let go of the files that were read; the next reading opens them again."""
        while self._kept:
            os.close(self._kept.popitem()[1])

    def _path(self, filename: bytes) -> str:
        return f"{self._directory}/{filename.decode()}"


class Core(Files):
    """What every version 2 directory has, with or without controllers."""

    events = DictFile("cgroup.events", readonly=True)
    freeze = FlagFile("cgroup.freeze")
    kill = FlagFile("cgroup.kill", writeonly=True)
    cpu_stat = DictFile("cpu.stat", readonly=True)


class Cpu(Protocol):
    def apply(self, limits: Limits, *, new: bool) -> None: ...
    def periods(self) -> tuple[int, int]:
        """How many there were, and in how many of them the quota ran out."""

    def close(self) -> None: ...


class Memory(Protocol):
    def apply(self, limits: Limits, *, new: bool) -> None: ...
    def used(self) -> int: ...
    def peak(self) -> int: ...
    def limit(self) -> int | None: ...
    def oom_kills(self) -> int: ...
    def close(self) -> None: ...


class CpuV2(Files):
    max = QuotaFile("cpu.max")
    weight = IntegerFile("cpu.weight")
    stat = DictFile("cpu.stat", readonly=True)

    def apply(self, limits: Limits, *, new: bool) -> None:
        if not new or limits.cpu_quota_us is not None:
            self.max = (limits.cpu_quota_us, limits.cpu_period_us)
        if not new or limits.cpu_weight is not None:
            self.weight = 100 if limits.cpu_weight is None else limits.cpu_weight

    def periods(self) -> tuple[int, int]:
        stat = self.stat
        return stat["nr_periods"], stat["nr_throttled"]


class CpuV1(Files, CpuController):  # type: ignore[misc]
    def apply(self, limits: Limits, *, new: bool) -> None:
        if not new or limits.cpu_period_us != DEFAULT_PERIOD_US:
            self.cfs_period_us = limits.cpu_period_us
        if not new or limits.cpu_quota_us is not None:
            self.cfs_quota_us = limits.cpu_quota_us
        if not new or limits.cpu_weight is not None:
            self.shares = shares(100 if limits.cpu_weight is None else limits.cpu_weight)

    def periods(self) -> tuple[int, int]:
        stat = self.stat
        return stat["nr_periods"], stat["nr_throttled"]


def shares(weight: int) -> int:
    """Version 1's cpu.shares for a weight: the kernel's own scale, on which 100 is 1024."""
    return max(2, round(weight * 1024 / 100))


class MemoryV2(Files):
    max = MaxFile("memory.max")
    low = MaxFile("memory.low")
    swap_max = MaxFile("memory.swap.max")
    current = IntegerFile("memory.current", readonly=True)
    peak_bytes = IntegerFile("memory.peak", readonly=True)
    events = DictFile("memory.events", readonly=True)

    def __init__(self, branch: Branch, directory: str, *, swap_accounted: bool) -> None:
        super().__init__(branch, directory)
        self._swap_accounted = swap_accounted

    def apply(self, limits: Limits, *, new: bool) -> None:
        if not new or limits.memory_max is not None:
            self.max = limits.memory_max
        if not new or limits.memory_low is not None:
            self.low = limits.memory_low or 0
        if self._swap_accounted and (not new or not limits.swap):
            self.swap_max = None if limits.swap else 0

    def used(self) -> int:
        return int(self.current)

    def peak(self) -> int:
        return int(self.peak_bytes)

    def limit(self) -> int | None:
        return self.max

    def oom_kills(self) -> int:
        return int(self.events["oom_kill"])


class MemoryV1(Files, MemoryController):  # type: ignore[misc]
    def __init__(self, branch: Branch, directory: str, *, swap_accounted: bool) -> None:
        super().__init__(branch, directory)
        self._swap_accounted = swap_accounted

    def apply(self, limits: Limits, *, new: bool) -> None:
        if not new or limits.memory_max is not None:
            self._set_max(limits, new=new)
        if not new or limits.memory_low is not None:
            self.soft_limit_in_bytes = limits.memory_low
        if not self._swap_accounted and not limits.swap:
            self.swappiness = 0

    def _set_max(self, limits: Limits, *, new: bool) -> None:
        # Memory and swap together may never be limited below memory alone: raise the one out of
        # the way before the other moves.
        if self._swap_accounted and not new:
            self.memsw_limit_in_bytes = None
        self.limit_in_bytes = limits.memory_max
        if self._swap_accounted and not limits.swap:
            self.memsw_limit_in_bytes = limits.memory_max

    def used(self) -> int:
        return int(self.usage_in_bytes)

    def peak(self) -> int:
        return int(self.max_usage_in_bytes)

    def limit(self) -> int | None:
        limit = self.limit_in_bytes
        return None if limit is None or limit >= V1_UNLIMITED else limit

    def oom_kills(self) -> int:
        # The kernel counts a kill in the victim's own cgroup only; version 2 counts upwards.
        own = int(self.oom_control["oom_kill"])
        return own + sum(self._oom_kills_of(child) for child in self._children())

    def _children(self) -> list[str]:
        is_leaf = "/" in self._directory
        return [] if is_leaf else self._branch.children(self._directory)

    def _oom_kills_of(self, child: str) -> int:
        files = MemoryV1(self._branch, f"{self._directory}/{child}", swap_accounted=False)
        try:
            return int(files.oom_control["oom_kill"])
        finally:
            files.close()


class Pids(Files):
    """The same files in both versions."""

    max = MaxFile("pids.max")
    current = IntegerFile("pids.current", readonly=True)

    def apply(self, limits: Limits, *, new: bool) -> None:
        if not new or limits.pids_max is not None:
            self.max = limits.pids_max
