"""Files in and out of a running container, as tar streams; and the end of a task's directory.

Every name is resolved by the kernel inside the container's root (openat2, RESOLVE_IN_ROOT) and used
as a descriptor, because the container may change its tree while we work in it: a link leads nowhere
but into the same container. Owners on the way in are the container's root, as with `docker cp`;
ids on the way out are the container's own.

What goes out is the file system of the path that was asked for: what is mounted below it (volumes,
/proc, /sys, /dev) is left out, and has to be asked for itself. The tree lives meanwhile: what
vanishes is left out, and a file keeps the length that it had when its turn came.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import BinaryIO, Final

import trio

from sandbox.errors import InvalidParameterException, KernelError
from sandbox.kernel import mounts, native
from sandbox.kernel.trees import remove_known
from sandbox.model.tar import BoundedMember, read_padding

_IDS: Final = 65536
_COMPRESSED: Final[tuple[tuple[bytes, Callable[[BinaryIO], BufferedIOBase]], ...]] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
_MAX_ENTRIES: Final = 1_000_000
_MAX_DEPTH: Final = 200
"""Of directories on the way out: each costs a descriptor and a few frames."""
_LEFT: Final = (
    *("run.0/log/1", "run.0/log/", "run.0/pid", "run.0/exit", "run.0/"),
    "",
)


async def pack(root: int, path: str, archive: int, id_base: int) -> None:
    """Write `path` to descriptor `archive`; names start with its last component."""
    await trio.to_thread.run_sync(_pack, root, path, archive, id_base, abandon_on_cancel=True)


async def unpack(root: int, path: str, archive: int, id_base: int) -> None:
    """Read descriptor `archive` into the existing directory `path`."""
    await trio.to_thread.run_sync(_unpack, root, path, archive, id_base, abandon_on_cancel=True)


async def place(
    root: int, working_directory: str, archive: int, id_base: int, covered: Collection[str]
) -> None:
    """Read descriptor `archive` into a root that no container has yet.

    `covered` are the paths where the container will have something else: nothing is placed there.
    """
    await trio.to_thread.run_sync(_place, root, working_directory, archive, id_base, covered)


async def remove_directory(directory: Path, containers: Iterable[str]) -> None:
    """The directory of a task that is undone: logs and how it ended. A missing one is fine.

    `containers` are their directories. One that was started once left what is known by name.
    """
    known = [f"{container}/{name}" for container in containers for name in _LEFT]
    if not remove_known(str(directory), known):
        await trio.to_thread.run_sync(lambda: shutil.rmtree(directory, ignore_errors=True))


# Out -------------------------------------------------------------------------------------


def _pack(root: int, path: str, archive: int, id_base: int) -> None:
    name = path.rstrip("/").rpartition("/")[2] or "."
    try:
        # A duplicate, so that an abandoned thread never writes into another's file.
        with (
            os.fdopen(os.dup(archive), "wb") as file,
            _found(root, path) as start,
            tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            _add(tar, start, name, id_base)
    except BrokenPipeError:
        raise InvalidParameterException(f"{path}: nobody reads the archive any more") from None
    except KernelError as error:
        raise InvalidParameterException(f"{path}: {os.strerror(error.errno)}") from None
    except OSError as error:
        raise InvalidParameterException(f"{path}: {error.strerror}") from None


def _add(tar: tarfile.TarFile, fd: int, name: str, id_base: int, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidParameterException(f"directories are more than {_MAX_DEPTH} deep")
    info = _describe(fd, name, id_base)
    if info.isreg():
        with os.fdopen(_reopen(fd, os.O_RDONLY), "rb") as content:
            tar.addfile(info, _Padded(content))
        return
    tar.addfile(info)
    if info.isdir():
        for child in sorted(_names(fd)):
            with _child(fd, child) as found:
                if found is not None:
                    _add(tar, found, f"{name}/{child}", id_base, depth + 1)


class _Padded:
    """A file that is as long as was announced: where it has become shorter there are zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = 0, /) -> bytes:
        return self._file.read(size).ljust(size, b"\0")


def _describe(fd: int, name: str, id_base: int) -> tarfile.TarInfo:
    """Devices and fifos are named for the reader to count. Tar has no sockets: they are fifos."""
    status = os.fstat(fd)
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    info.uid, info.gid = _inside(status.st_uid, id_base), _inside(status.st_gid, id_base)
    if stat.S_ISREG(status.st_mode):
        info.size = status.st_size
    elif stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=fd)
    elif stat.S_ISCHR(status.st_mode):
        info.type = tarfile.CHRTYPE
    elif stat.S_ISBLK(status.st_mode):
        info.type = tarfile.BLKTYPE
    else:
        info.type = tarfile.FIFOTYPE
    return info


def _inside(host_id: int, id_base: int) -> int:
    return host_id - id_base if id_base <= host_id < id_base + _IDS else 65534


def _reopen(fd: int, flags: int) -> int:
    """An O_PATH descriptor of a regular file or directory, opened for real. Never a device."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def _names(fd: int) -> list[str]:
    directory = _reopen(fd, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.listdir(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _child(parent: int, name: str) -> Iterator[int | None]:
    """None for what went away meanwhile, and for what is mounted there."""
    try:
        flags = os.O_PATH | os.O_NOFOLLOW
        fd = native.openat2(parent, name, flags, resolve=native.RESOLVE_NO_XDEV)
    except KernelError as error:
        if error.errno not in (errno.ENOENT, errno.EXDEV):
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _found(root: int, path: str) -> Iterator[int]:
    try:
        fd = mounts.resolve(root, path)
    except KernelError as error:
        raise InvalidParameterException(f"{path}: {os.strerror(error.errno)}") from None
    try:
        yield fd
    finally:
        os.close(fd)


# In --------------------------------------------------------------------------------------


def _unpack(root: int, path: str, archive: int, id_base: int) -> None:
    try:
        with _found(root, path) as target, _reading(archive) as tar:
            for info in _bounded(tar):
                _extract(tar, info, target, id_base)
    except OSError as error:
        raise InvalidParameterException(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def _reading(archive: int) -> Iterator[tarfile.TarFile]:
    """The tar stream at that descriptor, which stays the caller's."""
    try:
        with os.fdopen(os.dup(archive), "rb") as file:
            with tarfile.open(fileobj=_plain(file), mode="r|", tarinfo=BoundedMember) as tar:
                yield tar
            read_padding(file)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InvalidParameterException(f"not a tar archive: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise InvalidParameterException(f"not a tar archive: {error}") from None


def _plain(file: BufferedReader) -> BufferedIOBase:
    """Without its compression, if it has one.

    Not by tarfile, whose reader of compressed streams fails on damaged ones in ways of its own:
    TypeError, AttributeError (CPython 3.11, tarfile._Stream).
    """
    for magic, opened in _COMPRESSED:
        if file.peek(len(magic)).startswith(magic):
            return opened(file)
    return file


def _bounded(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for count, info in enumerate(tar):
        if count >= _MAX_ENTRIES:
            raise InvalidParameterException("the archive has too many entries")
        yield info


def _place(
    root: int, working_directory: str, archive: int, id_base: int, covered: Collection[str]
) -> None:
    """As `_unpack`, but links on the way to a name are followed, inside the root: the image's."""
    name = working_directory
    try:
        with _reading(archive) as tar:
            for info in _bounded(tar):
                name = os.path.normpath(os.path.join("/", working_directory, info.name))
                name = name.replace("//", "/", 1)  # POSIX lets two slashes begin a name
                _check_seen(name, covered)
                above, last = os.path.split(name)
                if last:
                    mounts.make_dirs(root, above, 0o755, id_base, id_base)
                    with _found(root, above) as parent:
                        _make(tar, info, parent, last, id_base)
    except KernelError as error:
        raise InvalidParameterException(f"{name}: {os.strerror(error.errno)}") from None
    except OSError as error:
        raise InvalidParameterException(f"{name}: {error.strerror}") from None


def _check_seen(name: str, covered: Iterable[str]) -> None:
    for path in covered:
        if f"{name}/".startswith(f"{path}/"):
            raise InvalidParameterException(f"{name}: the container has something else at {path}")


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo, target: int, id_base: int) -> None:
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidParameterException(f"{info.name} leads out of the archive")
    if not parts:
        return
    with _parent(target, parts[:-1], id_base) as parent:
        _make(tar, info, parent, parts[-1], id_base)


@contextlib.contextmanager
def _parent(target: int, parts: list[str], id_base: int) -> Iterator[int]:
    """The directory below `target`, made where missing; no link is followed on the way."""
    fd = os.dup(target)
    try:
        for part in parts:
            is_new = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
                os.chown(part, id_base, id_base, dir_fd=fd, follow_symlinks=False)
                is_new = True
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
            deeper = native.openat2(fd, part, flags)
            if is_new:
                os.chmod(f"/proc/self/fd/{deeper}", 0o755)  # whatever our umask
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def _make(
    tar: tarfile.TarFile, info: tarfile.TarInfo, parent: int, name: str, id_base: int
) -> None:
    if info.isdir():
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=parent)
    elif info.issym():
        _replace(parent, name)
        os.symlink(info.linkname, name, dir_fd=parent)
    elif info.isreg():
        _replace(parent, name)
        _write(tar, info, parent, name)
    else:
        raise InvalidParameterException(f"{info.name}: only files, directories and links are taken")
    os.chown(name, id_base, id_base, dir_fd=parent, follow_symlinks=False)


def _replace(parent: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, parent: int, name: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    content = tar.extractfile(info)
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file, 1 << 18)
        # Set-id bits of an archive from outside have no business in a container.
        os.fchmod(file.fileno(), info.mode & 0o777)
