"""Deleting trees that strangers have filled.

A task may leave directories nested deeper than any path, more entries than memory, links to
anywhere. So nothing is followed, nothing is listed whole, and nothing recurses: a directory inside
another is first moved up into the top one, where it is emptied in its turn. Two descriptors are
open at a time, whatever the shape.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from sandbox.kernel.native import raising

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CAN_BE_LOCKED = (stat.S_IFREG, stat.S_IFDIR)
# linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL | FS_APPEND_FL
_GETFLAGS, _SETFLAGS, _LOCKED = 0x80086601, 0x40086602, 0x10 | 0x20


def remove_tree(top: Path) -> None:
    """Delete `top` and all below; nothing if it is not there. May be begun again after a crash.

    Nobody else may write to the tree meanwhile. Raises KernelError.
    """
    with raising("rmdir", str(top)):
        try:
            fd = os.open(top, _DIRECTORY)
        except FileNotFoundError:
            return
        try:
            empty_directory(fd)
        finally:
            os.close(fd)
        os.rmdir(top)


def remove_known(top: str, names: Iterable[str]) -> bool:
    """Delete `names` below `top`, in this order, those that are there, then `top`; a name ends in
    "/" when it is a directory, which must be empty by then.

    A dozen system calls for what is known to be there, where finding out costs many more. False
    at the first one that is not empty or cannot go: some are gone then, and `remove_tree` can do
    the rest.
    """
    try:
        for name in names:
            with suppress(FileNotFoundError):
                (os.rmdir if name.endswith("/") else os.unlink)(f"{top}/{name}")
        os.rmdir(top)
    except OSError:
        return False
    return True


def empty_directory(fd: int) -> None:
    """Delete all that is below the directory `fd`."""
    removal = _Removal(fd)
    # A directory that changes while it is read may show an entry or not: until none is left.
    while removal.empty(fd):
        pass


class _Removal:
    """One tree; `_top` is a descriptor of it."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._token = os.urandom(8).hex()
        self._moved = 0

    def empty(self, fd: int) -> bool:
        """Remove the entries of `fd`, directories' content moved to the top; were there any?"""
        found = False
        with os.scandir(fd) as entries:
            for entry in entries:
                found = True
                if not entry.is_dir(follow_symlinks=False):
                    _insist(os.unlink, entry.name, fd)
                elif not self._is_gone(entry.name, fd):
                    self._dissolve(entry.name, fd)
        return found

    def _is_gone(self, name: str, fd: int) -> bool:
        try:
            _insist(os.rmdir, name, fd)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False
        return True

    def _dissolve(self, name: str, fd: int) -> None:
        if fd != self._top:
            self._moved += 1
            moved = f"{self._token}.{self._moved}"
            os.rename(name, moved, src_dir_fd=fd, dst_dir_fd=self._top)
            return
        inner = os.open(name, _DIRECTORY, dir_fd=fd)
        try:
            self.empty(inner)
        finally:
            os.close(inner)
        self._is_gone(name, fd)


def _insist(remove: Callable[..., None], name: str, fd: int) -> None:
    """Call unlink or rmdir; once more without the flags that forbid it, if there were any."""
    try:
        remove(name, dir_fd=fd)
    except PermissionError:
        if not (_unlock(fd) | _unlock_entry(name, fd)):
            raise
        remove(name, dir_fd=fd)


def _unlock_entry(name: str, fd: int) -> bool:
    if stat.S_IFMT(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode) not in _CAN_BE_LOCKED:
        return False
    entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        return _unlock(entry)
    finally:
        os.close(entry)


def _unlock(fd: int) -> bool:
    """Clear "immutable" and "append only"; was one of them set? (A task cannot, its host can.)"""
    try:
        flags = struct.unpack("l", fcntl.ioctl(fd, _GETFLAGS, bytes(8)))[0]
        if not flags & _LOCKED:
            return False
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("l", flags & ~_LOCKED))
    except OSError:
        return False  # a file system without such flags, or no right to clear them
    return True
