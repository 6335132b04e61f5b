"""The system calls that Python's library lacks, one function each, and a child that is started
without waiting for it; the only door to `_native`.

A function returns what the call returns or raises KernelError(call, subject, errno); the subject
is the path, or what the descriptor was opened on, so that a message names the object. Every
descriptor returned is close-on-exec and belongs to the caller. Calls release the GIL. Nothing here
decides anything: `kernel.mounts`, `kernel.slots` and others say what for.

A mount context explains its refusals in words ("overlay: workdir is in use..."); the fs* functions
put them into the subject, because EINVAL alone names none of forty reasons.

Constants come from the kernel's headers through the compiler. `raising` turns the OSError of
Python's own wrappers into the same KernelError, for the other modules of this layer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Final

from sandbox._native import ffi, lib
from sandbox.errors import KernelError

Path = str | bytes

_STACK: Final = 16384
"""Bytes for a child that only moves descriptors."""

AT_EMPTY_PATH: Final[int] = lib.AT_EMPTY_PATH
AT_FDCWD: Final[int] = lib.AT_FDCWD
AT_RECURSIVE: Final[int] = lib.AT_RECURSIVE
AT_SYMLINK_NOFOLLOW: Final[int] = lib.AT_SYMLINK_NOFOLLOW

CLONE_FS: Final[int] = lib.CLONE_FS
CLONE_NEWCGROUP: Final[int] = lib.CLONE_NEWCGROUP
CLONE_NEWIPC: Final[int] = lib.CLONE_NEWIPC
CLONE_NEWNET: Final[int] = lib.CLONE_NEWNET
CLONE_NEWNS: Final[int] = lib.CLONE_NEWNS
CLONE_NEWPID: Final[int] = lib.CLONE_NEWPID
CLONE_NEWTIME: Final[int] = lib.CLONE_NEWTIME
CLONE_NEWUSER: Final[int] = lib.CLONE_NEWUSER
CLONE_NEWUTS: Final[int] = lib.CLONE_NEWUTS
NS_GET_OWNER_UID: Final[int] = lib.NS_GET_OWNER_UID
NS_GET_USERNS: Final[int] = lib.NS_GET_USERNS

OPEN_TREE_CLONE: Final[int] = lib.OPEN_TREE_CLONE
MOVE_MOUNT_F_EMPTY_PATH: Final[int] = lib.MOVE_MOUNT_F_EMPTY_PATH
MOVE_MOUNT_T_EMPTY_PATH: Final[int] = lib.MOVE_MOUNT_T_EMPTY_PATH

MOUNT_ATTR_IDMAP: Final[int] = lib.MOUNT_ATTR_IDMAP
MOUNT_ATTR_NOATIME: Final[int] = lib.MOUNT_ATTR_NOATIME
MOUNT_ATTR_NODEV: Final[int] = lib.MOUNT_ATTR_NODEV
MOUNT_ATTR_NOEXEC: Final[int] = lib.MOUNT_ATTR_NOEXEC
MOUNT_ATTR_NOSUID: Final[int] = lib.MOUNT_ATTR_NOSUID
MOUNT_ATTR_NOSYMFOLLOW: Final[int] = lib.MOUNT_ATTR_NOSYMFOLLOW
MOUNT_ATTR_RDONLY: Final[int] = lib.MOUNT_ATTR_RDONLY

MS_BIND: Final[int] = lib.MS_BIND
MS_NODEV: Final[int] = lib.MS_NODEV
MS_NOEXEC: Final[int] = lib.MS_NOEXEC
MS_NOSUID: Final[int] = lib.MS_NOSUID
MS_PRIVATE: Final[int] = lib.MS_PRIVATE
MS_RDONLY: Final[int] = lib.MS_RDONLY
MS_REC: Final[int] = lib.MS_REC
MS_REMOUNT: Final[int] = lib.MS_REMOUNT
MS_SLAVE: Final[int] = lib.MS_SLAVE
MNT_DETACH: Final[int] = lib.MNT_DETACH
UMOUNT_NOFOLLOW: Final[int] = lib.UMOUNT_NOFOLLOW

RESOLVE_BENEATH: Final[int] = lib.RESOLVE_BENEATH
RESOLVE_IN_ROOT: Final[int] = lib.RESOLVE_IN_ROOT
RESOLVE_NO_MAGICLINKS: Final[int] = lib.RESOLVE_NO_MAGICLINKS
RESOLVE_NO_SYMLINKS: Final[int] = lib.RESOLVE_NO_SYMLINKS
RESOLVE_NO_XDEV: Final[int] = lib.RESOLVE_NO_XDEV

CGROUP2_SUPER_MAGIC: Final[int] = lib.CGROUP2_SUPER_MAGIC
CGROUP_SUPER_MAGIC: Final[int] = lib.CGROUP_SUPER_MAGIC
EXT4_SUPER_MAGIC: Final[int] = lib.EXT4_SUPER_MAGIC
OVERLAYFS_SUPER_MAGIC: Final[int] = lib.OVERLAYFS_SUPER_MAGIC
PROC_SUPER_MAGIC: Final[int] = lib.PROC_SUPER_MAGIC
SYSFS_MAGIC: Final[int] = lib.SYSFS_MAGIC
TMPFS_MAGIC: Final[int] = lib.TMPFS_MAGIC
XFS_SUPER_MAGIC: Final[int] = lib.XFS_SUPER_MAGIC


@contextmanager
def raising(call: str, subject: Path) -> Iterator[None]:
    """Turn an OSError of the block into KernelError(call, subject, errno)."""
    try:
        yield
    except OSError as error:
        raise KernelError(call, os.fsdecode(subject), error.errno or errno.EIO) from error


# Namespaces --------------------------------------------------------------------------------


def setns(fd: int, nstype: int = 0) -> None:
    """Move the calling thread; only ever on a thread that nobody else uses."""
    _checked("setns", _opened(fd), lib.sys_setns(fd, nstype))


def unshare(flags: int) -> None:
    """Split the calling thread off; only ever on a thread that nobody else uses."""
    _checked("unshare", f"{flags:#x}", lib.sys_unshare(flags))


# Mounts ------------------------------------------------------------------------------------


def open_tree(dirfd: int, path: Path, flags: int) -> int:
    """With OPEN_TREE_CLONE a detached copy of the mount, else an O_PATH descriptor."""
    answer = lib.sys_open_tree(dirfd, _c("open_tree", path), flags)
    return _checked("open_tree", _at(dirfd, path), answer)


def move_mount(from_fd: int, from_path: Path, to_fd: int, to_path: Path, flags: int) -> None:
    source, target = _c("move_mount", from_path), _c("move_mount", to_path)
    answer = lib.sys_move_mount(from_fd, source, to_fd, target, flags)
    _checked("move_mount", _at(to_fd, to_path), answer)


def fsopen(fstype: str) -> int:
    return _checked("fsopen", fstype, lib.sys_fsopen(_c("fsopen", fstype)))


def fsconfig_string(fd: int, key: str, value: Path) -> None:
    _fsconfig(fd, lib.FSCONFIG_SET_STRING, key, _c("fsconfig", value), 0)


def fsconfig_flag(fd: int, key: str) -> None:
    _fsconfig(fd, lib.FSCONFIG_SET_FLAG, key, ffi.NULL, 0)


def fsconfig_fd(fd: int, key: str, value_fd: int) -> None:
    _fsconfig(fd, lib.FSCONFIG_SET_FD, key, ffi.NULL, value_fd)


def fsconfig_create(fd: int) -> None:
    answer = lib.sys_fsconfig(fd, lib.FSCONFIG_CMD_CREATE, ffi.NULL, ffi.NULL, 0)
    _explained("fsconfig", "create", fd, answer)


def fsmount(fd: int, attrs: int) -> int:
    """A detached mount of a created context, with MOUNT_ATTR_* `attrs`."""
    return _explained("fsmount", "", fd, lib.sys_fsmount(fd, attrs))


def mount_setattr(
    fd: int,
    path: Path,
    at_flags: int,
    set: int,
    clear: int,
    propagation: int = 0,
    userns_fd: int = -1,
) -> None:
    """Change MOUNT_ATTR_* of a mount; `userns_fd` goes with MOUNT_ATTR_IDMAP."""
    name = _c("mount_setattr", path)
    answer = lib.sys_mount_setattr(fd, name, at_flags, set, clear, propagation, userns_fd)
    _checked("mount_setattr", _at(fd, path), answer)


def mount(
    source: Path | None, target: Path, fstype: str | None, flags: int, data: str | None = None
) -> None:
    """The old call, for changes of propagation and for kernels whose new API falls short."""
    answer = lib.sys_mount(
        _optional("mount", source),
        _c("mount", target),
        _optional("mount", fstype),
        flags,
        _optional("mount", data),
    )
    _checked("mount", os.fsdecode(target), answer)


def umount2(target: Path, flags: int) -> None:
    """`target` is a path; a descriptor is given as /proc/self/fd/N, without UMOUNT_NOFOLLOW."""
    answer = lib.sys_umount2(_c("umount2", target), flags)
    _checked("umount2", os.fsdecode(target), answer)


# Files and descriptors -----------------------------------------------------------------------


def openat2(dirfd: int, path: Path, flags: int, mode: int = 0, resolve: int = 0) -> int:
    answer = lib.sys_openat2(dirfd, _c("openat2", path), flags, mode, resolve)
    subject = _opened(dirfd) + ":" + os.fsdecode(path) if resolve else _at(dirfd, path)
    return _checked("openat2", subject, answer)


def close_range(first: int, last: int) -> None:
    """Close descriptors `first` to `last`, both included."""
    _checked("close_range", f"{first}-{last}", lib.sys_close_range(first, last))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor number `fd` of the process behind `pidfd`."""
    return _checked("pidfd_getfd", f"{fd}", lib.sys_pidfd_getfd(pidfd, fd))


def fstatfs_magic(fd: int) -> int:
    """The file system's type, e.g. CGROUP2_SUPER_MAGIC."""
    return _checked("fstatfs", _opened(fd), lib.sys_fstatfs_magic(fd))


# Device policy -------------------------------------------------------------------------------


def bpf_device_program(insns: bytes) -> int:
    """Load a cgroup device program of struct bpf_insn's, 8 bytes each."""
    if len(insns) % 8:
        raise KernelError("bpf_prog_load", "cgroup device program", errno.EINVAL)
    answer = lib.sys_bpf_device_program(ffi.from_buffer(insns), len(insns) // 8)
    return _checked("bpf_prog_load", "cgroup device program", answer)


def bpf_attach_cgroup_device(cgroup_fd: int, prog_fd: int) -> None:
    """Every program on a cgroup and above it must allow an access; it stays with the cgroup."""
    answer = lib.sys_bpf_attach_cgroup_device(cgroup_fd, prog_fd)
    _checked("bpf_prog_attach", _opened(cgroup_fd), answer)


# Processes -----------------------------------------------------------------------------------


class Spawned:
    """A child that may not have begun its program yet, and the memory that it needs until then.

    `settle` lets go of that memory: once the program has given a sign of life, or the child has
    been waited for. Without it the memory stays, whatever exceptions fly.
    """

    _unsettled: ClassVar[set[Spawned]] = set()

    def __init__(self, path: Path, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        """`descriptors` become 3, 4, ... of the program; see native/spawn.c for all else."""
        words = [ffi.new("char[]", _c("spawn", word)) for word in arguments]
        self._parts = (
            ffi.new("char[]", _c("spawn", path)),
            words,
            ffi.new("char *[]", [*words, ffi.NULL]),
            ffi.new("int[]", list(descriptors)),
        )
        self._stack = ffi.new("char[]", _STACK)
        self._spawn = ffi.new("struct spawn *")
        self._spawn.path, _, self._spawn.argv, self._spawn.fds = self._parts
        self._spawn.count = len(descriptors)
        self._unsettled.add(self)
        answer = lib.sys_spawn(self._spawn, self._stack, _STACK)
        if answer < 0:
            self.settle()
        self.pid = _checked("clone", os.fsdecode(path), answer)

    def settle(self) -> None:
        self._unsettled.discard(self)

    @property
    def errno(self) -> int:
        """Why the program did not begin; 0 when it did, or when nobody knows yet."""
        error: int = self._spawn.error
        return error


# Answers -------------------------------------------------------------------------------------


def _checked(call: str, subject: str, answer: int) -> int:
    if answer < 0:
        raise KernelError(call, subject, -answer)
    return answer


def _fsconfig(fd: int, command: int, key: str, value: Any, aux: int) -> None:
    answer = lib.sys_fsconfig(fd, command, _c("fsconfig", key), value, aux)
    _explained("fsconfig", key, fd, answer)


def _explained(call: str, subject: str, fd: int, answer: int) -> int:
    if answer >= 0:
        return answer
    raise KernelError(call, " ".join([subject, *_messages(fd)]).strip(), -answer)


def _messages(fd: int) -> Iterator[str]:
    """What the mount context logged: one message a read, each with a level ("e ") before it."""
    with suppress(OSError):  # ENODATA ends it; a context too old to talk has nothing to say
        while message := os.read(fd, 4096):
            yield f"({message[2:].decode(errors='replace').strip()})"


def _c(call: str, text: Path) -> bytes:
    """C strings end at the first NUL: a name with one would silently mean another object."""
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise KernelError(call, os.fsdecode(encoded).replace("\0", "\\0"), errno.EINVAL)
    return encoded


def _optional(call: str, text: Path | None) -> Any:
    return ffi.NULL if text is None else _c(call, text)


def _opened(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _at(fd: int, path: Path) -> str:
    name = os.fsdecode(path)
    if fd == AT_FDCWD or name.startswith("/"):
        return name
    return f"{_opened(fd)}/{name}" if name else _opened(fd)
