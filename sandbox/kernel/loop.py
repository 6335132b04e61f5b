"""Loop devices: a file as a block device (loop(4)).

A device is attached with LO_FLAGS_AUTOCLEAR: it goes with its last user, so the file system that is
mounted on it holds it, and nothing is left when the process that made it is killed. With direct
I/O nothing is cached twice; where the file's own file system cannot (tmpfs) the kernel goes
through its cache.

One file on two devices is two caches that know nothing of each other: who attaches a file that may
be attached already asks `find` first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sandbox.errors import KernelError
from sandbox.kernel.native import raising

CONTROL: Final = "/dev/loop-control"
_BLOCK_BYTES: Final = 4096
_ATTEMPTS: Final = 100

# linux/loop.h
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS: Final = 4 | 16
"""LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO"""
_INFO: Final = struct.Struct("=5Q 4I 64s 64s 32s 2Q")
"""struct loop_info64; device and inode of the file come first, the flags are the ninth."""


@contextmanager
def attached(file_fd: int, name: str) -> Iterator[int]:
    """A descriptor of a new device for the file, which is open for writing; the device outlives the
    block if it is in use then. `name` is what losetup(8) shows, of which 63 bytes are kept."""
    with raising("loop", name):
        device = _attach(file_fd, name)
        try:
            yield device
        finally:
            os.close(device)


def _attach(file_fd: int, name: str) -> int:
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _LO_FLAGS, os.fsencode(name)[:63], b"", b"", 0, 0)
    config = struct.pack("=II", file_fd, _BLOCK_BYTES) + info + bytes(64)
    for _ in range(_ATTEMPTS):
        device = os.open(f"/dev/loop{_free()}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            return device
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # somebody else has taken it meanwhile
                raise
    raise KernelError("loop", name, errno.EBUSY)


def _free() -> int:
    """The number of a device that nobody uses, made if there is none."""
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


@contextmanager
def found(file: Path) -> Iterator[int | None]:
    """A descriptor of the device that is attached to the file, None if there is none."""
    with raising("loop", str(file)):
        status = os.stat(file)
        device = next(filter(None, (_serves(d, status) for d in _in_use())), None)
        try:
            yield device
        finally:
            if device is not None:
                os.close(device)


def _in_use() -> Iterator[str]:
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        yield entry.parts[3]


def _serves(device: str, file: os.stat_result) -> int | None:
    try:
        fd = os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None  # gone meanwhile
    try:
        info = _INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size)))
        if info[:2] == (_encoded(file.st_dev), file.st_ino):
            return fd
    except OSError:
        pass  # cleared meanwhile
    os.close(fd)
    return None


def _encoded(device: int) -> int:
    """As huge_encode_dev of linux/kdev_t.h: minor and major in one number."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
