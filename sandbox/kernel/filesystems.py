"""File systems of a limited size: ext4 in a sparse file, on a loop device, mounted by descriptor.

What is written to one is bounded by its size and nothing else: the kernel answers ENOSPC inside,
and nobody else notices. statfs(2) tells both sides the same. The mount is detached: no path leads
to it, and when its last descriptor and its last user are gone the device goes too, also when we are
killed.

`make` writes the few blocks that are not zero in an empty file system (some 250 KiB for 20 GiB; the
template is made by mkfs.ext4 once for each size) into a sparse file. With attaching and mounting
that takes 3 to 10 ms, so `FilesystemPool` keeps some ready and takes back those that came back as
good as new: a file system that is only ever reached through its files cannot be told from a fresh
one once they are deleted, and its blocks are never read before they are written.

Choices:
- No journal: what is in it ends with its task, and never outlives the boot.
- Inode tables are not zeroed in advance (noinit_itable): they lie in a sparse file. Nothing is
  reserved for root, whose task has its own. Nothing waits for the disk's cache (nobarrier).
- discard: what is deleted is given back to the host at once, as holes of the file.
- A sparse file on a full disk takes writes into the cache that are lost later. Whoever uses this
  watches the host's free space (`control.floor`).
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

import trio

from sandbox.errors import KernelError
from sandbox.kernel import loop, native
from sandbox.kernel.native import raising
from sandbox.kernel.rlimits import files_of_any_size

_MKFS: Final = ("-q", "-F", "-b", "4096", "-m", "0", "-i", "16384", "-I", "256")
_FEATURES: Final = ("-O", "^has_journal,^resize_inode")
_LAZY: Final = ("-E", "lazy_itable_init=1,nodiscard,root_owner=0:0")
_OPTIONS: Final = ("noinit_itable", "nobarrier", "discard")
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
"""mkfs.ext4 is where not everybody looks."""
_MIB: Final = 1 << 20
_SHUTDOWN: Final = 0x8004587D
"""EXT4_IOC_SHUTDOWN, with EXT4_GOING_FLAGS_NOLOGFLUSH: what is not written yet is dropped."""
_SMALL_BYTES: Final = 16 * _MIB
_SMALL_INODES: Final = 256
_KEPT: Final = 16
_RETRY_S: Final = (1, 30)

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


@dataclass(frozen=True, slots=True)
class Usage:
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class Filesystem:
    """Mounted; who has it closes it. Its users beside us (mounts, open files) keep it alive."""

    mount_fd: int
    file_fd: int
    device: str

    @property
    def path(self) -> Path:
        """Its root, for this process and as long as it is open."""
        return Path(f"/proc/self/fd/{self.mount_fd}")

    def again(self) -> int:
        """Another detached mount of it."""
        return _mount(self.device)

    def usage(self) -> Usage:
        """As statfs(2) tells it, inside and outside."""
        with raising("fstatvfs", self.device):
            found = os.fstatvfs(self.mount_fd)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        return Usage(found.f_blocks * found.f_frsize, used)

    def allocated_bytes(self) -> int:
        """What it takes of the host's disk so far."""
        with raising("fstat", self.device):
            return os.fstat(self.file_fd).st_blocks * 512

    def reserve(self, name: str, size_bytes: int) -> None:
        """Let so many bytes count as used, by a file that takes nothing of the host's disk."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with raising("fallocate", f"{self.device} {name}"), files_of_any_size():
            fd = os.open(self.path / name, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            finally:
                os.close(fd)

    def reserved_bytes(self, name: str) -> int:
        try:
            return os.stat(self.path / name).st_blocks * 512
        except FileNotFoundError:
            return 0

    def is_small(self) -> bool:
        """Little enough is in it to be deleted file by file."""
        with raising("fstatvfs", self.device):
            found = os.fstatvfs(self.mount_fd)
        inodes = found.f_files - found.f_ffree
        return inodes <= _SMALL_INODES and self.allocated_bytes() <= _SMALL_BYTES

    def close(self) -> None:
        os.close(self.mount_fd)
        os.close(self.file_fd)

    def drop(self) -> None:
        """Close it and lose what was not written yet, which else would be written first. Nobody
        else may use it."""
        with suppress(OSError):
            root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(root, _SHUTDOWN, struct.pack("=I", 2))
            finally:
                os.close(root)
        self.close()


def lacking() -> str | None:
    """What this host has not that it takes to make one; None when there is nothing to complain of.

    The modules of loop devices and of ext4 are loaded by their first use.
    """
    if not os.path.exists(loop.CONTROL):
        return f"no {loop.CONTROL}: load the module loop"
    if shutil.which("mkfs.ext4", path=_PATH) is None:
        return "no mkfs.ext4: install e2fsprogs"
    return None


def file_bytes(size_bytes: int) -> int:
    """The size of a file for a file system of that size: a 64th is inode tables, and a little goes
    into bitmaps."""
    blocks = size_bytes // 4096
    return (blocks * 64 // 63 + blocks // 2000 + 64) * 4096


def template(file: Path, size_bytes: int) -> None:
    """Make the empty file system that `make` copies, unless it is there."""
    if file.exists():
        return
    fresh = file.with_suffix(f".{os.urandom(4).hex()}")
    try:
        with raising("open", str(fresh)), files_of_any_size(), fresh.open("wb") as opened:
            opened.truncate(file_bytes(size_bytes))
            _mkfs(fresh)
            os.fsync(opened.fileno())
        with raising("rename", str(file)):
            fresh.rename(file)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def _mkfs(file: Path) -> None:
    program = shutil.which("mkfs.ext4", path=_PATH) or "mkfs.ext4"
    command = [program, *_MKFS, *_FEATURES, *_LAZY, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    except OSError as error:
        raise KernelError("execve", "mkfs.ext4", error.errno or errno.ENOENT) from None
    if done.returncode:
        said = " ".join(done.stderr.split())[:300] or f"exit status {done.returncode}"
        raise KernelError("mkfs.ext4", f"{file}: {said}", errno.EIO)


def make(file: Path, empty: Path) -> Filesystem:
    """A copy of `empty` in the new file `file`, mounted; on failure there is no such file."""
    with ExitStack() as failed:
        with raising("open", str(file)):
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            failed.callback(os.close, fd)
            failed.callback(os.unlink, file)
            with files_of_any_size():
                _copy_data(empty, fd)
        with loop.attached(fd, str(file)) as device:
            made = _opened(fd, device)
        failed.pop_all()
        return made


def reopen(file: Path) -> Filesystem:
    """The file system of a file that an agent before us made, whether its tasks use it or not."""
    with ExitStack() as failed:
        with raising("open", str(file)):
            fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        failed.callback(os.close, fd)
        with loop.found(file) as device:
            if device is not None:
                made = _opened(fd, device)
        if device is None:
            with loop.attached(fd, str(file)) as device:
                made = _opened(fd, device)
        failed.pop_all()
        return made


def _opened(file_fd: int, device: int) -> Filesystem:
    name = os.readlink(f"/proc/self/fd/{device}")
    return Filesystem(_mount(name), file_fd, name)


def _mount(device: str) -> int:
    context = native.fsopen("ext4")
    try:
        native.fsconfig_string(context, "source", device)
        for option in _OPTIONS:
            native.fsconfig_flag(context, option)
        native.fsconfig_create(context)
        return native.fsmount(context, native.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)


def _copy_data(source: Path, target: int) -> None:
    with source.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        os.ftruncate(target, size)
        for start, end in extents(file.fileno(), size):
            while start < end:
                piece = os.pread(file.fileno(), min(end - start, _MIB), start)
                start += os.pwrite(target, piece, start)


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file of that size has data, by first byte and end; the rest is holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole to the end
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end


class FilesystemPool:
    """Keeps `reserve` file systems of `size_bytes` ready in `directory`, and of those that come
    back as many as were in use at a time, up to a bound. Others are made when they are asked for.
    """

    def __init__(self, directory: Path, size_bytes: int, reserve: int) -> None:
        self._directory = directory
        self._size_bytes = size_bytes
        self._reserve = reserve
        self._ready: list[tuple[Path, Filesystem]] = []
        self._doomed: list[Filesystem] = []
        self._count = 0
        self._is_closed = False
        self._wanted = trio.Event()
        self._threads = trio.CapacityLimiter(2)

    @property
    def ready(self) -> int:
        return len(self._ready)

    def sweep(self) -> None:
        """Delete what an agent before us kept ready; nobody can use it any more."""
        with raising("scandir", str(self._directory)):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in self._directory.iterdir():
                if not file.name.endswith(".empty"):
                    file.unlink()

    async def take(self, file: Path, size_bytes: int) -> Filesystem:
        """One of that size, whose file is named `file` from now on."""
        await trio.lowlevel.checkpoint()
        if size_bytes != self._size_bytes or not self._ready:
            return await self._run(self._make, file, size_bytes)
        ready, filesystem = self._ready.pop()
        try:
            with raising("rename", str(file)):
                ready.rename(file)
        except KernelError:
            self._ready.append((ready, filesystem))
            raise
        self._wanted.set()
        return filesystem

    def give_back(self, file: Path, filesystem: Filesystem, *, is_empty: bool) -> None:
        """The file loses its name at once. An empty one of the usual size is used again, others
        go in the background; nobody else may use it. It is taken, whatever is raised."""
        if is_empty and self._is_welcome(filesystem):
            ready = self._next()
            with suppress(OSError):  # somebody took the file away
                file.rename(ready)
                self._ready.append((ready, filesystem))
                return
        if self._is_closed:
            filesystem.drop()
        else:
            self._doomed.append(filesystem)
            self._wanted.set()
        with raising("unlink", str(file)):
            file.unlink(missing_ok=True)

    def _is_welcome(self, filesystem: Filesystem) -> bool:
        is_usual = os.fstat(filesystem.file_fd).st_size == file_bytes(self._size_bytes)
        has_room = not self._is_closed and len(self._ready) < max(_KEPT, self._reserve)
        return is_usual and has_room and filesystem.is_small()

    async def serve(self) -> None:
        """Refill, and let go what was given back, until cancelled; then of everything.

        A refill that fails is only tried again later: whoever finds the reserve empty makes its
        own, and gets the error itself.
        """
        delay: float = _RETRY_S[0]
        try:
            while True:
                self._wanted = trio.Event()
                timeout = math.inf
                try:
                    await self._drop_doomed()
                    await self._refill()
                    delay = _RETRY_S[0]
                except KernelError:
                    timeout, delay = delay, min(delay * 2, _RETRY_S[1])
                with trio.move_on_after(timeout):
                    await self._wanted.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self.aclose()

    async def aclose(self) -> None:
        """What is given back later goes at once."""
        self._is_closed = True
        while self._ready:
            file, filesystem = self._ready.pop()
            self._doomed.append(filesystem)
            with suppress(OSError):
                file.unlink()
        await self._drop_doomed()

    async def _drop_doomed(self) -> None:
        with trio.CancelScope(shield=True):  # what was taken from the list is nowhere else
            while self._doomed:
                await self._run(self._doomed.pop().drop)

    async def _refill(self) -> None:
        while len(self._ready) < self._reserve:
            file = self._next()
            self._ready.append((file, await self._run(self._make, file, self._size_bytes)))

    def _make(self, file: Path, size_bytes: int) -> Filesystem:
        empty = self._directory / f"{size_bytes}.empty"
        template(empty, size_bytes)
        return make(file, empty)

    def _next(self) -> Path:
        self._count += 1
        return self._directory / f"{self._count}.ext4"

    async def _run(self, work: Callable[[*Args], Result], *args: *Args) -> Result:
        return await trio.to_thread.run_sync(work, *args, limiter=self._threads)
