"""Compiles a container into the record program that a keeper executes.

Python compiles, C executes: a program is a sealed memfd of records {u16 operation, u16 zero, u32
length, fields}, little endian. `native/keeper.h` has the same table; a test compares the two. The
keeper checks every bound again and runs the records in three places: its own settings (K), on the
way into the namespaces (A), and inside the container, in their order (B). EXEC is the last.

This module is pure apart from `Program.seal`. It knows the kernel's words only; what a container of
a task looks like is `runtime.container`'s business.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from sandbox.errors import KernelError

MAGIC: Final = b"sbprog\0\1"
NO_FD: Final = 0xFFFFFFFF
FIRST_FD: Final = 6
"""The keeper has the program at 3, its status directory at 4, its report pipe at 5, then ours."""

RECORDS: Final[dict[str, tuple[int, str]]] = {
    "LOG": (1, "uu"),
    "STDIO": (2, "uuuuuu"),
    "INIT": (3, ""),
    "SYNC": (4, ""),
    "RELEASE": (5, "u"),
    "CGROUP": (10, "u"),
    "TASKS": (11, "u"),
    "OOM_SCORE": (12, "u"),
    "RLIMIT": (13, "uUU"),
    "USERNS": (14, "u"),
    "NETNS": (15, "u"),
    "PIDNS": (16, "u"),
    "JOIN": (17, "u"),
    "ROOT": (30, "u"),
    "MOUNT": (31, "ussl"),
    "BIND": (32, "uus"),
    "DEVICE": (33, "uus"),
    "MASK": (34, "s"),
    "READONLY": (35, "s"),
    "SYMLINK": (36, "ss"),
    "FILE": (37, "usb"),
    "SYSCTL": (38, "ss"),
    "PIVOT": (39, "u"),
    "HOSTNAME": (40, "s"),
    "TERMINAL": (41, "uu"),
    "WORKDIR": (42, "s"),
    "NO_NEW_PRIVS": (43, ""),
    "SECCOMP": (44, "b"),
    "CAPABILITIES": (45, "U"),
    "USER": (46, "uub"),
    "EXEC": (47, "sll"),
}
"""Name -> number and shape: u = u32, U = u64, s = string, b = bytes, l = list of strings."""

STDIO_KEEP_STDIN: Final = 1
STDIO_TERMINAL: Final = 2
ON_FULL_WAIT: Final = 0
ON_FULL_DROP_NEW: Final = 1
ON_FULL_DROP_OLDEST: Final = 2

MAX_PROGRAM: Final = 4 << 20
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Text = str | bytes
Field = int | Text | Sequence[Text]


def _string(value: Text) -> bytes:
    data = os.fsencode(value)
    if b"\0" in data:
        raise ValueError("a string of a program holds a NUL")
    return data + b"\0"


def _field(shape: str, value: Field) -> bytes:
    match shape, value:
        case "u", int():
            return struct.pack("<I", value)
        case "U", int():
            return struct.pack("<Q", value)
        case "s", str() | bytes():
            return _string(value)
        case "b", bytes():
            return struct.pack("<I", len(value)) + value
        case "l", list() | tuple():
            return struct.pack("<I", len(value)) + b"".join(map(_string, value))
    raise TypeError(f"{value!r} does not fit the shape {shape!r}")


class Program:
    """Records in the order of their execution, and the descriptors that they speak of.

    `add` appends one; `fd` lends the program a descriptor and gives the number at which the keeper
    will have it. The lender keeps its own descriptor and closes it once the keeper was started.
    """

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._labels: list[tuple[str, str]] = []
        self.lent: list[int] = []

    def fd(self, descriptor: int) -> int:
        self.lent.append(descriptor)
        return FIRST_FD + len(self.lent) - 1

    def add(self, name: str, *fields: Field, about: str | None = None) -> None:
        """Append a record; `about` is what an error of it will name, by default its texts."""
        number, shape = RECORDS[name]
        if len(fields) != len(shape):
            raise TypeError(f"{name} takes {len(shape)} fields")
        payload = b"".join(map(_field, shape, fields))
        self._records.append(struct.pack("<HHI", number, 0, len(payload)) + payload)
        texts = [f for f in fields if isinstance(f, str)]
        self._labels.append((name.lower(), about if about is not None else " ".join(texts)))

    def extend(self, records: Program) -> None:
        """Append those of another one, which lends no descriptor: it may be kept for many."""
        assert not records.lent
        self._records += records._records
        self._labels += records._labels

    def encode(self) -> bytes:
        body = b"".join(self._records)
        size = len(MAGIC) + 8 + len(body)
        if size > MAX_PROGRAM:
            raise KernelError("execve", "arguments and environment", 7)  # E2BIG
        return MAGIC + struct.pack("<II", size, len(self._records)) + body

    def seal(self) -> int:
        """A memfd with the program that nobody can change any more; the caller closes it."""
        fd = os.memfd_create("sandbox-program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, self.encode())
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def error(self, record: int, errno: int) -> KernelError:
        """What went wrong, for the (record, errno) that a keeper reported."""
        if record >= len(self._labels):
            return KernelError("keeper", "start", errno)
        call, subject = self._labels[record]
        return KernelError(call, subject, errno)

    def is_exec(self, record: int) -> bool:
        """Whether that record is the start of the image's own program."""
        return record < len(self._labels) and self._labels[record][0] == "exec"


def groups(ids: Iterable[int]) -> bytes:
    """Supplementary groups as USER wants them."""
    return b"".join(struct.pack("<I", i) for i in ids)
