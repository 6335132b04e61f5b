"""One cgroup: the same verbs whichever hierarchies stand behind it.

A `Cgroup` is a handle to a name, not the thing: descriptors are opened when first needed and
`close` only lets go of them, so a handle may be used again, made again, or forgotten. Whatever
ends a cgroup (`kill`, `wait_empty`, `remove`) is content when it is already gone, so an undo may be
repeated. One thread at a time uses a handle.

    handle at rest 0 descriptors | `directory_fd` 1 | `tasks_fds` one a version 1 hierarchy
    after `stats` one a file that it reads (5 to 8)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from sandbox.kernel.cgroups.files import Cpu, CpuV1, CpuV2, Memory, MemoryV1, MemoryV2, Pids
from sandbox.kernel.cgroups.hierarchies import CONTROLLERS, Branch
from sandbox.kernel.cgroups.limits import CgroupStats, Limits
from sandbox.kernel.cgroups.members import Members

# One dot at the end is allowed: it makes a name that no container has.
NAME = re.compile(r"task-[0-9A-Za-z_-]{1,250}(/(?=.{1,255}\Z)[0-9A-Za-z_-]+\.?)?")

# Files of a version 1 directory which a container may be called like.
V1_FILES = frozenset({"tasks", "notify_on_release", "release_agent"})


def directory_of(name: str) -> str:
    """Where the cgroup of that name is, below our directory in each hierarchy."""
    container = name.partition("/")[2]
    return f"{name}." if container in V1_FILES else name


@dataclass(frozen=True, slots=True)
class Branches:
    """This instance's directory in every hierarchy; a controller's may be `unified` itself."""

    unified: Branch
    cpu: Branch
    memory: Branch
    pids: Branch
    swap_accounted: bool
    has_kill: bool

    @property
    def legacy(self) -> tuple[Branch, ...]:
        """The version 1 branches, each once: two controllers may be bound to one hierarchy."""
        found = (self.cpu, self.memory, self.pids)
        return tuple(dict.fromkeys(branch for branch in found if branch.version == 1))

    @property
    def unified_controllers(self) -> tuple[str, ...]:
        return tuple(name for name in CONTROLLERS if getattr(self, name).version == 2)

    def remove(self, directory: str, below: Iterable[str] = ()) -> None:
        """From every hierarchy; nothing may be in it any more.

        `below` are directories in it that are probably there: whatever else is, is looked for.
        """
        for branch in (*self.legacy, self.unified):
            for name in below:
                branch.rmdir(name)
            branch.rmdir(directory)

    def close(self) -> None:
        for branch in (*self.legacy, self.unified):
            branch.close()


class Cgroup(Members):
    """See the module. Made by `CgroupTree.create` or `CgroupTree.find`."""

    def __init__(self, branches: Branches, name: str, directory: str) -> None:
        super().__init__(branches.unified, name, directory, has_kill=branches.has_kill)
        self._branches = branches
        self._tasks_fds: tuple[int, ...] | None = None
        self._cpu: Cpu = _cpu(branches, directory)
        self._memory: Memory = _memory(branches, directory)
        self._pids = Pids(branches.pids, directory)

    @property
    def tasks_fds(self) -> tuple[int, ...]:
        """Each version 1 `tasks`, for writing; the starting child writes "0" to each.

        Empty on pure version 2. Valid until `close`.
        """
        if self._tasks_fds is None:
            path = f"{self._directory}/tasks"
            with ExitStack() as undo:
                fds = []
                for branch in self._branches.legacy:
                    fds.append(branch.open(path, os.O_WRONLY))
                    undo.callback(os.close, fds[-1])
                undo.pop_all()
            self._tasks_fds = tuple(fds)
        return self._tasks_fds

    def set(self, limits: Limits) -> None:
        """Make these the limits, whatever they were."""
        self._apply(limits, new=False)

    def stats(self) -> CgroupStats:
        periods, throttled_periods = self._cpu.periods()
        return CgroupStats(
            cpu_usage_ns=self._core.cpu_stat["usage_usec"] * 1000,
            cpu_periods=periods,
            cpu_throttled_periods=throttled_periods,
            memory_bytes=self._memory.used(),
            memory_peak_bytes=self._memory.peak(),
            memory_max_bytes=self._memory.limit(),
            oom_kills=self._memory.oom_kills(),
            pids=self._pids.current,
        )

    def oom_kills(self) -> int:
        """Processes that the kernel killed here for want of memory, containers included.

        On version 1 the count of a container goes with the container's cgroup.
        """
        return self._memory.oom_kills()

    def remove(self, containers: Iterable[str] = ()) -> None:
        """Remove it with all below it, in every hierarchy; quicker when told what that is.

        EBUSY, and nothing is touched, when a process stays in it for a quarter second. The version
        2 directory goes last, so that a cgroup that is half removed is still found.
        """
        self.close()
        self._branches.unified.wait_unpopulated(self._directory)
        self.remove_empty(containers)

    def remove_empty(self, containers: Iterable[str] = ()) -> None:
        """The same for one that is known to hold no process: version 1 has no claim of its own to
        whether it is in use."""
        self.close()
        below = [directory_of(f"{self.name}/{container}") for container in containers]
        self._branches.remove(self._directory, below)

    def close(self) -> None:
        """Let go of every descriptor. The handle stays usable."""
        super().close()
        for files in (self._cpu, self._memory, self._pids):
            files.close()
        for fd in self._tasks_fds or ():
            os.close(fd)
        self._tasks_fds = None

    def make(self, limits: Limits) -> None:
        """Directories in every hierarchy, then limits. For `CgroupTree.create`."""
        # Version 2 first, as it is removed last: where it is missing, nothing else exists either,
        # and where it was made now all limits are still the kernel's defaults.
        new = self._branches.unified.mkdir(self._directory)
        for branch in self._branches.legacy:
            branch.mkdir(self._directory)
        if "/" not in self._directory:
            enable(self._branches.unified, self._directory, self._branches.unified_controllers)
        self._apply(limits, new=new)

    def _apply(self, limits: Limits, *, new: bool) -> None:
        self._cpu.apply(limits, new=new)
        self._memory.apply(limits, new=new)
        self._pids.apply(limits, new=new)


def enable(branch: Branch, directory: str, controllers: tuple[str, ...]) -> None:
    """Let the children of `directory` ("" for the branch itself) have these controllers."""
    if controllers:
        text = " ".join(f"+{controller}" for controller in controllers)
        branch.write(f"{directory or '.'}/cgroup.subtree_control", text)


def _cpu(branches: Branches, directory: str) -> Cpu:
    version = CpuV2 if branches.cpu.version == 2 else CpuV1
    return version(branches.cpu, directory)


def _memory(branches: Branches, directory: str) -> Memory:
    version = MemoryV2 if branches.memory.version == 2 else MemoryV1
    return version(branches.memory, directory, swap_accounted=branches.swap_accounted)
