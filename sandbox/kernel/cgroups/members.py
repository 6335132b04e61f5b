"""The processes of a cgroup: all that needs no controller, and so is the same on every host.

Version 2 alone can do it, and does it in a directory without controllers too.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

import trio

from sandbox.errors import KernelError
from sandbox.kernel.cgroups.files import Core
from sandbox.kernel.cgroups.hierarchies import GONE, Branch

FREEZE_AND_KILL_PATIENCE_S = 5.0


class Members:
    """A handle to a version 2 directory, which `close` lets go of; it stays usable."""

    def __init__(self, unified: Branch, name: str, directory: str, *, has_kill: bool) -> None:
        self.name = name
        self._unified = unified
        self._directory = directory
        self._directory_fd: int | None = None
        self._has_kill = has_kill
        self._core = Core(unified, directory)

    @property
    def directory_fd(self) -> int:
        """The version 2 directory, for CLONE_INTO_CGROUP. Valid until `close`."""
        if self._directory_fd is None:
            flags = os.O_RDONLY | os.O_DIRECTORY
            self._directory_fd = self._unified.open(self._directory, flags)
        return self._directory_fd

    def pids(self) -> list[int]:
        """The processes in it and below, as this process sees them. A snapshot."""
        return self._pids_of(self._directory)

    def populated(self) -> bool:
        """Is any process in it or below? A cgroup that is gone is not populated."""
        try:
            return bool(self._core.events["populated"])
        except KernelError as error:
            if error.errno in GONE:
                return False
            raise

    def freeze(self) -> None:
        """Stop every process in it and below, and whatever joins; done when `is_frozen`."""
        self._core.freeze = True

    def thaw(self) -> None:
        self._core.freeze = False

    def is_frozen(self) -> bool:
        return bool(self._core.events["frozen"])

    def kill(self) -> None:
        """SIGKILL to all in it and below, forks in flight too; `wait_empty` sees it through."""
        try:
            if self._has_kill:
                self._core.kill = True
            else:
                self._freeze_and_kill()
        except KernelError as error:
            if error.errno not in GONE:
                raise

    async def wait_empty(self, timeout_s: float) -> bool:
        """True once no process is left, false when `timeout_s` has passed before that."""
        with trio.move_on_after(timeout_s):
            await self._wait_empty()
            return True
        return not self.populated()

    def _pids_of(self, directory: str) -> list[int]:
        try:
            text = self._unified.read(f"{directory}/cgroup.procs")
        except KernelError as error:
            if error.errno in GONE:
                return []
            raise
        # 0 stands for a process of a PID namespace that is not ours or below ours.
        here = [int(pid) for pid in text.split() if pid != "0"]
        below = (f"{directory}/{child}" for child in self._unified.children(directory))
        return here + [pid for each in below for pid in self._pids_of(each)]

    def _freeze_and_kill(self) -> None:
        """What `cgroup.kill` does, for kernels before 5.14: nothing frozen can fork away."""
        self.freeze()
        deadline = time.monotonic() + FREEZE_AND_KILL_PATIENCE_S
        while self.populated():
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it died between the listing and now
                except OSError as error:
                    raise KernelError("kill", str(pid), error.errno or errno.EIO) from error
            if time.monotonic() > deadline:
                raise KernelError("kill", self.name, errno.ETIMEDOUT)
            time.sleep(0.001)

    async def _wait_empty(self) -> None:
        """`cgroup.events` is readable at any time and *exceptional* after a change.

        trio waits for readable descriptors only; an epoll that watches for the exception is one.
        The kernel holds a second notification back for up to 10 ms after the first, so a short
        life would be noticed late: hence the short looks at the beginning.
        """
        try:
            fd = self._unified.open(f"{self._directory}/cgroup.events", os.O_RDONLY)
        except KernelError as error:
            if error.errno in GONE:
                return
            raise
        try:
            if not self._is_populated(fd):
                return
            with select.epoll() as changes:
                changes.register(fd, select.EPOLLPRI)
                pause_s = 0.0005
                while self._is_populated(fd):
                    with trio.move_on_after(pause_s):
                        await trio.lowlevel.wait_readable(changes.fileno())
                    pause_s = min(2 * pause_s, 1.0)
        finally:
            os.close(fd)

    def _is_populated(self, events_fd: int) -> bool:
        try:
            return b"populated 1" in os.pread(events_fd, 4096, 0)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise KernelError("read", f"{self.name}/cgroup.events", error.errno or 0) from error

    def nest(self, name: str) -> Members:
        """A directory below it, so that what is in there can be ended apart from the rest.

        It exists in version 2 alone and has no limits of its own. `find_nest` finds it again; it
        goes with this one, or by its own `remove`.
        """
        self._unified.mkdir(f"{self._directory}/{name}")
        return self.find_nest(name)

    def find_nest(self, name: str) -> Members:
        """A handle, whether it exists or not."""
        own, directory = f"{self.name}/{name}", f"{self._directory}/{name}"
        return Members(self._unified, own, directory, has_kill=self._has_kill)

    def remove(self) -> None:
        """Remove it. EBUSY, and nothing is touched, when a process stays in it."""
        self.close()
        self._unified.wait_unpopulated(self._directory)
        self._unified.rmdir(self._directory)

    def close(self) -> None:
        """Let go of every descriptor."""
        self._core.close()
        if self._directory_fd is not None:
            os.close(self._directory_fd)
        self._directory_fd = None
