"""A new volume begins with what the image has at the place where it is mounted.

Copied once, while the volume is empty: files, directories, links, FIFOs, with ids, modes, times and
xattrs. The source is the container's root seen from the host, so ids are already those of the
task's range, and so is what a file capability says about its namespace. Nothing is followed: every
entry is opened below the descriptor of its directory. Devices and sockets are left out; holes stay
holes; files of several names keep them as long as not too many are open at once.

A marker beside the volumes (`.populating/<volume>`) says that a copy was begun: after a crash the
next one starts afresh instead of taking half a copy for the task's own data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sandbox.errors import ImageError, KernelError
from sandbox.images.blobs import reported
from sandbox.kernel import mounts
from sandbox.kernel.filesystems import extents
from sandbox.kernel.trees import empty_directory

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 200
_MAX_ENTRIES = 1_000_000
_MAX_BYTES = 200 << 30
"""Fargate's largest ephemeral storage, which the volume is a part of."""
_MAX_LINKED = 256
_PIECE_BYTES = 1 << 26
_KEPT_XATTRS = ("user.", "security.capability")


def populate_volume(root_fd: int, path: str, volume: Path, id_base: int) -> None:
    """Fill `volume`, if it is empty, from `path` in the root at `root_fd`.

    Without such a directory in the image the volume belongs to the task's root, mode 0755.
    ImageError when the image has something else there, or too much.
    """
    marker = volume.with_name(".populating") / volume.name
    with reported("copy", volume):
        destination = os.open(volume, _DIRECTORY)
        try:
            if marker.exists():
                empty_directory(destination)
            elif _has_entries(destination):
                return
            source = _directory(root_fd, path)
            if source is None:
                os.fchown(destination, id_base, id_base)
                os.fchmod(destination, 0o755)
                return
            marker.parent.mkdir(mode=0o700, exist_ok=True)
            marker.touch(mode=0o600)
            try:
                with contextlib.closing(_Copy(volume)) as copy:
                    copy.directory(source, destination, 0)
            finally:
                os.close(source)
            marker.unlink()
        finally:
            os.close(destination)


def _has_entries(fd: int) -> bool:
    with os.scandir(fd) as entries:
        return any(True for _ in entries)


def _directory(root_fd: int, path: str) -> int | None:
    try:
        found = mounts.resolve(root_fd, path, directory=True)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise ImageError(f"volume at {path}: the image has no directory there: {error}") from error
    try:
        return os.open(".", _DIRECTORY, dir_fd=found)
    finally:
        os.close(found)


class _Copy:
    """One copy; counts what it copied and holds the files of several names it has met."""

    def __init__(self, volume: Path) -> None:
        self._volume = volume
        self._entries = 0
        self._bytes = 0
        self._linked: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        for fd in self._linked.values():
            os.close(fd)

    def directory(self, source: int, destination: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ImageError(f"volume {self._volume.name}: the image nests directories too deep")
        with os.scandir(source) as entries:
            for entry in entries:
                self._count(0)
                self._entry(entry.name, source, destination, depth)
        # Last: what is put into a directory changes its time, and chown a mode's set-id bits.
        _copy_attributes(source, destination)

    def _entry(self, name: str, source: int, destination: int, depth: int) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=destination)
            with (
                _opened(name, _DIRECTORY, source) as inner,
                _opened(name, _DIRECTORY, destination) as copy,
            ):
                self.directory(inner, copy, depth + 1)
        elif kind == stat.S_IFREG:
            self._file(name, source, destination, status)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=destination)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=destination, follow_symlinks=False)
            _set_times(name, destination, status)
        elif kind == stat.S_IFIFO:
            os.mkfifo(name, 0o600, dir_fd=destination)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=destination, follow_symlinks=False)
            with _opened(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, destination) as fifo:
                os.chmod(f"/proc/self/fd/{fifo}", stat.S_IMODE(status.st_mode))
            _set_times(name, destination, status)

    def _file(self, name: str, source: int, destination: int, status: os.stat_result) -> None:
        key = (status.st_dev, status.st_ino)
        known = self._linked.get(key) if status.st_nlink > 1 else None
        if known is not None:
            os.link(f"/proc/self/fd/{known}", name, dst_dir_fd=destination, follow_symlinks=True)
            return
        self._count(status.st_size)
        with _opened(name, _READ, source) as inner, _opened(name, _CREATE, destination) as copy:
            self._content(inner, copy, status.st_size)
            _copy_attributes(inner, copy)
            if status.st_nlink > 1 and len(self._linked) < _MAX_LINKED:
                self._linked[key] = os.open(f"/proc/self/fd/{copy}", os.O_PATH | os.O_CLOEXEC)

    def _content(self, source: int, copy: int, size: int) -> None:
        """Copy what is data; what is not stays a hole."""
        for position, end in extents(source, size):
            os.lseek(copy, position, os.SEEK_SET)
            while position < end:
                sent = os.sendfile(copy, source, position, min(_PIECE_BYTES, end - position))
                if not sent:
                    raise OSError(errno.EIO, "file became shorter")
                position += sent
        os.ftruncate(copy, size)

    def _count(self, size: int) -> None:
        self._entries += size == 0
        self._bytes += size
        if self._entries > _MAX_ENTRIES or self._bytes > _MAX_BYTES:
            raise ImageError(f"volume {self._volume.name}: the image has too much to copy there")


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy_attributes(source: int, copy: int) -> None:
    """Owner before mode and capability, which a change of owner would clear; times last."""
    status = os.fstat(source)
    os.fchown(copy, status.st_uid, status.st_gid)
    os.fchmod(copy, stat.S_IMODE(status.st_mode))
    copy_xattrs(source, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def copy_xattrs(source: int, copy: int) -> None:
    """Those that an image may bring; never overlay's own."""
    for name in os.listxattr(source):
        if name.startswith(_KEPT_XATTRS):
            os.setxattr(copy, name, os.getxattr(source, name))


def _set_times(name: str, directory: int, status: os.stat_result) -> None:
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
