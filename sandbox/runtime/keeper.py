"""Start a keeper, find one again, and learn how its container ended.

A keeper is told everything by its program and says three things on its report pipe: started,
failed, ended. The same is in its status directory, so an agent that was not there can read it. A
keeper lives on when the agent dies; it holds an flock on that directory while it lives, and `exit`
is renamed into place before it leaves. Neither `exit` nor a held lock means that it was killed:
nobody knows how the container ended, and what is left of it must be killed by its cgroup.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from sandbox.errors import InvalidParameterException, KernelError
from sandbox.kernel import native
from sandbox.kernel.native import raising
from sandbox.kernel.processes import is_zombie, open_process, start_time
from sandbox.kernel.program import Program
from sandbox.model.task import KeeperIdentity
from sandbox.runtime.logs import STREAMS

_REPORT: Final = struct.Struct("<IIiIQQ")
_STARTED, _FAILED, _ENDED = 1, 2, 3
_START_S: Final = 31.0
"""A keeper gives its start up after 30 s by itself."""
_LOOK_S: Final = 0.002
_DRAIN_S: Final = 10.0
"""How long a keeper that was told to forget its clients may take to write the rest of its log."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a container's first process ended: a wait status, and when (seconds since the epoch)."""

    status: int
    at: float

    @property
    def exit_code(self) -> int:
        """As ECS shows it: the code, or 128 + n for signal n."""
        code = os.waitstatus_to_exitcode(self.status)
        return code if code >= 0 else 128 - code


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The container never ran: the record that failed and why."""

    record: int
    errno: int
    at: float


@dataclass(frozen=True, kw_only=True)
class Lost:
    """The keeper was killed, or never got as far as its lock."""


class StartFailed(KernelError):
    """A container could not be started; `is_exec` when only the image's own program is at fault."""

    def __init__(self, error: KernelError, *, is_exec: bool) -> None:
        super().__init__(error.call, error.subject, error.errno)
        self.is_exec = is_exec


def _kernel(call: str, subject: object, error: OSError) -> KernelError:
    return KernelError(call, str(subject), error.errno or errno.EIO)


class Keeper:
    """A live keeper. `close` forgets it and leaves it running."""

    def __init__(
        self,
        status_dir: Path,
        identity: KeeperIdentity,
        process: int | None,
        report: int | None,
        started_at: float,
    ) -> None:
        """Owns `process`, its pidfd, and `report`, the pipe on which it tells."""
        self.status_dir = status_dir
        self.identity = identity
        self.started_at = started_at
        """By the keeper's own word, as the end is: it never comes after that."""
        self._report = report
        self._is_gone = False
        self._process = process
        self._init = open_process(identity.init_pid, identity.init_start_time)

    def signal(self, number: int) -> bool:
        """Send a signal to the container's first process; False when it has ended."""
        return self._init is not None and _send(self._init, number)

    @property
    def init_pidfd(self) -> int | None:
        """For entering the container; None when it has ended."""
        return self._init

    async def ends_within(self, seconds: float) -> bool:
        """Whether the container's first process has ended, or does now."""
        if self._init is None:
            return True
        own = os.dup(self._init)  # of one descriptor, trio lets only one task wait
        try:
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(own)
                return True
            return False
        finally:
            os.close(own)

    def resize(self, rows: int, columns: int) -> None:
        """The container's terminal; InvalidParameterException when it has none."""
        fd = self._borrow("terminal")
        if fd is None:
            raise InvalidParameterException("the container has no terminal")
        try:
            fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        except OSError as error:
            raise _kernel("TIOCSWINSZ", "the terminal", error) from None
        finally:
            os.close(fd)

    def namespaces(self) -> tuple[int, int] | None:
        """The task's user and network namespace; the caller closes them."""
        user = self._borrow("userns")
        net = self._borrow("netns")
        if user is None or net is None:
            for fd in (user, net):
                if fd is not None:
                    os.close(fd)
            return None
        return user, net

    def open_root(self) -> int:
        """The container's root directory; InvalidParameterException when it has ended."""
        if self._init is not None:
            with contextlib.suppress(OSError):
                path = f"/proc/{self.identity.init_pid}/root"
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                if start_time(self.identity.init_pid) == self.identity.init_start_time:
                    return fd
                os.close(fd)
        raise InvalidParameterException("the container is not running")

    def _borrow(self, what: str) -> int | None:
        """A copy of a descriptor that the keeper wrote down; None when it has no such one."""
        if self._process is None:
            return None
        try:
            number = _read_pid_file(self.status_dir)[what][0]
            return native.pidfd_getfd(self._process, number)
        except (ValueError, KeyError):
            return None
        except KernelError as error:
            if error.errno in (errno.ESRCH, errno.EBADF):  # it has gone, or is about to
                return None
            raise

    async def wait(self) -> Ended | Failed | Lost:
        """How the container's first process ended. May be called again after a cancellation."""
        if self._report is not None:
            return await self._hear_end(self._report)
        if self._init is not None and self._process is not None:
            await _either_ends(self._init, self._process)
        while (end := read_exit(self.status_dir)) is None and self._is_alive():
            await trio.sleep(_LOOK_S)  # between the death of the process and the keeper's rename
        return end or read_exit(self.status_dir) or Lost()

    async def _hear_end(self, report: int) -> Ended | Failed | Lost:
        while True:
            await trio.lowlevel.wait_readable(report)
            data = os.read(report, _REPORT.size)
            if not data:
                return read_exit(self.status_dir) or Lost()
            kind, _, value, _, _, at_ns = _REPORT.unpack(data)
            if kind == _ENDED:
                return Ended(status=value, at=at_ns / 1e9)

    def _is_alive(self) -> bool:
        return start_time(self.identity.pid) == self.identity.start_time and not is_zombie(
            self.identity.pid
        )

    async def wait_gone(self) -> None:
        """Until all output was passed on and logged, and the keeper has left."""
        if self._process is None or self._is_gone:
            return
        await trio.lowlevel.wait_readable(self._process)
        # Found again it is another agent's child, which whoever inherited it reaps.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._process, os.WEXITED)
        self._is_gone = True

    def detach(self) -> None:
        """Close the clients' descriptors; the log goes on."""
        if self._process is not None:
            _send(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """For a keeper that will not leave; loses what it has not yet logged."""
        if self._process is not None:
            _send(self._process, signal.SIGKILL)

    async def see_out(self) -> None:
        """`wait_gone`, within bounds: its clients are forgotten, then what is not yet logged."""
        if self._is_gone:
            return None
        self.detach()
        with trio.move_on_after(_DRAIN_S):
            return await self.wait_gone()
        self.kill()
        return await self.wait_gone()

    def close(self) -> None:
        for fd in (self._report, self._process, self._init):
            if fd is not None:
                os.close(fd)
        self._report = self._process = self._init = None


async def _either_ends(*pidfds: int) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(pidfd: int) -> None:
            await trio.lowlevel.wait_readable(pidfd)
            nursery.cancel_scope.cancel()

        for pidfd in pidfds:
            nursery.start_soon(wait, pidfd)


def _send(pidfd: int, number: int) -> bool:
    """False when it has ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    except OSError as error:
        raise _kernel("pidfd_send_signal", number, error) from None
    return True


async def start(
    program: Program,
    *,
    binary: Path,
    status_dir: Path,
    spawned: Callable[[], None] = lambda: None,
) -> Keeper:
    """Start a container; returns once its program runs. `status_dir` is made and must be new.

    Raises StartFailed naming the record; what may have begun to run then is the caller's to kill,
    by its cgroup. A cancelled caller leaves the keeper running: find it.
    """
    kind = record = value = 0
    failure: KernelError | None = None
    with trio.CancelScope(shield=True):
        child, report = _launch(program, binary, status_dir)
        spawned()
        try:
            kind, record, value, started, at_ns = await _first_report(report)
            if kind == _STARTED:
                identity = KeeperIdentity(
                    pid=child.pid,
                    start_time=start_time(child.pid) or 0,
                    init_pid=value,
                    init_start_time=started,
                )
                keeper = _held(status_dir, identity, report, at_ns / 1e9)
                child.settle()
                return keeper
        except KernelError as error:
            failure = error
            os.kill(child.pid, signal.SIGKILL)
        os.close(report)
        await _reap(child.pid)
        child.settle()
    if kind == _FAILED:
        raise StartFailed(program.error(record, value), is_exec=program.is_exec(record))
    failure = failure or KernelError("keeper", str(binary), child.errno or errno.ECHILD)
    raise StartFailed(failure, is_exec=False)


@trio.lowlevel.enable_ki_protection  # or a Ctrl-C could leave a child that nobody knows
def _launch(program: Program, binary: Path, status_dir: Path) -> tuple[native.Spawned, int]:
    opened: list[int] = []
    try:
        os.mkdir(path := str(status_dir), 0o700)
        opened.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        opened.append(program.seal())
        report, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        opened.append(write_end)
        status, sealed = opened[0], opened[1]
        try:
            descriptors = [sealed, status, write_end, *program.lent]
            return _spawn(binary, descriptors), report
        except KernelError:
            os.close(report)
            raise
    except OSError as error:
        raise _kernel("keeper", status_dir, error) from None
    finally:
        for fd in opened:
            os.close(fd)


def _spawn(binary: Path, descriptors: Sequence[int]) -> native.Spawned:
    arguments = ["sandbox-keeper", str(len(descriptors) - 3)]
    return native.Spawned(str(binary), arguments, descriptors)


async def _first_report(report: int) -> tuple[int, int, int, int, int]:
    with raising("read", "the keeper's report"):
        await trio.lowlevel.wait_readable(report)
        data = os.read(report, _REPORT.size)
    if len(data) != _REPORT.size:
        return 0, 0, 0, 0, 0
    kind, record, value, _, started, at_ns = _REPORT.unpack(data)
    return kind, record, value, started, at_ns


def _held(
    status_dir: Path, identity: KeeperIdentity, report: int | None, started_at: float
) -> Keeper:
    process = open_process(identity.pid, identity.start_time)
    try:
        return Keeper(status_dir, identity, process, report, started_at)
    except KernelError:
        if process is not None:
            os.close(process)
        raise


async def _reap(pid: int) -> None:
    """Our child, which is ending. Without a descriptor: there may be none left."""
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        await trio.sleep(_LOOK_S)


def read_exit(status_dir: Path) -> Ended | Failed | None:
    """What the keeper wrote down, None when there is nothing (yet)."""
    try:
        word, *numbers = _read_lines(status_dir / "exit")[0].split()
        record, value, at_ns = map(int, numbers)
        at = at_ns / 1e9
    except (ValueError, OverflowError, IndexError):
        return None
    if word == "ended":
        return Ended(status=value, at=at)
    return Failed(record=record, errno=value, at=at)


def read_losses(status_dir: Path) -> tuple[str, ...]:
    """Output that a client refused, a sentence each; complete once the keeper has gone.

    A client that only went away is none of them: it wanted no more.
    """
    try:
        lines = [line.split() for line in _read_lines(status_dir / "exit")[1:]]
        return tuple(
            f"{STREAMS[int(stream)]}: {os.strerror(int(error))}: output was lost"
            for _, stream, error in filter(None, lines)
        )
    except (ValueError, OverflowError, KeyError):
        return ()


def _read_lines(path: Path) -> list[str]:
    """None of a file that is not there. That it cannot be read now does not mean that."""
    with raising("read", str(path)):
        try:
            return path.read_text().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []


async def find(status_dir: Path, fences: list[int]) -> Keeper | Ended | Failed | Lost:
    """What became of a keeper that an earlier agent started; one that is starting is waited for.

    The lock of one that is gone is taken and put into `fences`. Until the caller closes it, no
    keeper can start there, not even one that was spawned and has not run yet.
    """
    try:
        with trio.move_on_after(_START_S):
            while not _take_lock(status_dir, fences):
                if (identity := _read_identity(status_dir)) is not None:
                    return _held(status_dir, identity, None, began_at(status_dir))
                await trio.sleep(_LOOK_S)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return Lost()
        raise
    _reap_ours(status_dir)
    return read_exit(status_dir) or Lost()


def _reap_ours(status_dir: Path) -> None:
    """A keeper that has gone may be our own child: agents can follow each other in one process."""
    identity = _read_identity(status_dir)
    if identity is not None and start_time(identity.pid) == identity.start_time:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, identity.pid, os.WEXITED | os.WNOHANG)


def _take_lock(status_dir: Path, fences: list[int]) -> bool:
    with raising("open", str(status_dir)):
        fd = os.open(status_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return False
        raise _kernel("flock", status_dir, error) from None
    fences.append(fd)
    return True


def has_begun(status_dir: Path) -> bool:
    """Whether a container was ever started there."""
    return _read_identity(status_dir) is not None or read_exit(status_dir) is not None


def began_at(status_dir: Path) -> float:
    """When the keeper wrote down that its container runs; now, if it did not."""
    try:
        return (status_dir / "pid").stat().st_mtime
    except OSError:
        return time.time()


def _read_pid_file(status_dir: Path) -> dict[str, list[int]]:
    lines = _read_lines(status_dir / "pid")
    return {word: [int(n) for n in numbers] for word, *numbers in map(str.split, lines)}


def _read_identity(status_dir: Path) -> KeeperIdentity | None:
    """None until its container has started."""
    try:
        facts = _read_pid_file(status_dir)
        (pid, started), (init_pid, init_started) = facts["keeper"], facts["init"]
    except (ValueError, KeyError):
        return None
    return KeeperIdentity(
        pid=pid, start_time=started, init_pid=init_pid, init_start_time=init_started
    )
