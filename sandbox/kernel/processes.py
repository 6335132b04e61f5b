"""Processes by number: a pid alone may be another's tomorrow, with its start time it is one's own.

The start time is that of /proc/PID/stat, in clock ticks since the boot.
"""

from __future__ import annotations

import os
import time

from sandbox.errors import KernelError
from sandbox.kernel.native import raising


def start_time(pid: int) -> int | None:
    """None when there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def age(started: int) -> float:
    """Seconds since a start time, by a clock that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def is_zombie(pid: int) -> bool:
    """Ended and not reaped; True also when it is gone altogether."""
    fields = _stat(pid)
    return fields is None or fields[0] == b"Z"


def open_process(pid: int, started: int) -> int | None:
    """A pidfd, if that process is still the one that was meant."""
    with raising("pidfd_open", f"{pid}"):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
    try:
        is_meant = start_time(pid) == started
    except KernelError:
        os.close(fd)
        raise
    if is_meant:
        return fd
    os.close(fd)
    return None


def _stat(pid: int) -> list[bytes] | None:
    """From the third field on: what is behind the name, which may hold blanks and ")".

    Raises KernelError where it cannot be read: that is no answer to whether there is a process.
    """
    path = f"/proc/{pid}/stat"
    with raising("read", path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            return None  # the latter when it ends just now
        try:
            text = os.read(fd, 4096)
        except ProcessLookupError:
            return None  # it ended meanwhile
        finally:
            os.close(fd)
    return text[text.rindex(b")") + 2 :].split()
