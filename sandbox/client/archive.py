"""Tar streams between a task and this host: made from host files, unpacked as hostile data.

What comes out of a task was written by the task. Unpacking opens every directory on the way through
its parent's descriptor and never follows a link, so no name and no link of the archive leads out of
the destination; an existing link at the destination's own end is followed, because the caller named
it. Regular files, directories, symbolic and hard links are made, as the caller's own, without
set-id bits; devices, sockets and fifos are skipped and counted.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from typing import IO, TypeAlias

from sandbox.errors import ConfigError, InvalidParameterException
from sandbox.model.tar import BoundedMember, read_padding

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


Files: TypeAlias = Mapping[str, bytes | str | os.PathLike[str]]
"""What a program wants to find, by name: contents, or the path of a file or tree of this host."""


class NoArchive(InvalidParameterException):
    """What came is none, or only its beginning: whoever sent it may know why."""


def pack(source: str, name: str, out: IO[bytes]) -> None:
    """Write `source` (a file or a tree) to `out` as a tar stream in which it is called `name`."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.add(source, arcname=name)


def bundle(files: Files) -> int:
    """A tar archive in memory, of contents and of files or trees of this host, by their names in
    the task; a descriptor at its start, which the caller closes."""
    fd = os.memfd_create("sandbox-files", os.MFD_CLOEXEC)
    try:
        with (
            os.fdopen(os.dup(fd), "wb") as out,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, content in files.items():
                if isinstance(content, bytes):
                    info = tarfile.TarInfo(name)
                    info.size, info.mode, info.mtime = len(content), 0o644, int(time.time())
                    archive.addfile(info, BytesIO(content))
                else:
                    archive.add(content, arcname=name, filter=partial(_named, name))
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _named(name: str, info: tarfile.TarInfo) -> tarfile.TarInfo:
    """With the slash at its beginning that tarfile takes away."""
    if name.startswith("/"):
        info.name = f"/{info.name}"
    return info


def unpack(stream: IO[bytes], destination: str) -> int:
    """Make what the stream holds at `destination`; returns how many members were skipped.

    The stream's first component is what was asked for and takes the destination's name. If
    `destination` is a directory, or ends with a slash, it is made inside under its own name.
    """
    inside = destination.endswith("/") or os.path.isdir(destination)
    parent = destination if inside else os.path.dirname(os.path.abspath(destination))
    name = None if inside else os.path.basename(os.path.abspath(destination))
    skipped = 0
    try:
        root = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{parent}: {error.strerror}") from None
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=BoundedMember) as archive:
            for member in archive:
                path = _components(member.name, name)
                if path and not _make(root, path, member, archive, name):
                    skipped += 1
        read_padding(stream)
    except tarfile.TarError as error:
        raise NoArchive(f"the task sent no proper archive: {error}") from None
    except OSError as error:
        raise ConfigError(f"{error.filename or destination}: {error.strerror}") from None
    finally:
        os.close(root)
    return skipped


def _components(member: str, name: str | None) -> list[str]:
    """The member's path; refused when it climbs. Its first component becomes `name`."""
    parts = [part for part in member.split("/") if part]
    if ".." in parts:
        raise InvalidParameterException(f"the task's archive names {member!r}, which climbs out")
    if name is not None and parts:
        parts[0] = name  # also "." of a whole root
    return [part for part in parts if part != "."]


def _make(
    root: int, path: list[str], member: tarfile.TarInfo, archive: tarfile.TarFile, name: str | None
) -> bool:
    *parents, last = path
    with _directory(root, parents) as where:
        if member.isdir():
            _make_directory(where, last)
            return True
        if not (member.isreg() or member.issym() or member.islnk()):
            return False
        _clear(where, last)
        if member.issym():
            os.symlink(member.linkname, last, dir_fd=where)
        elif member.islnk():
            # A link to no name is for the kernel to refuse: ENOENT.
            *link_parents, target = _components(member.linkname, name) or [""]
            with _directory(root, link_parents) as linked:
                os.link(target, last, src_dir_fd=linked, dst_dir_fd=where, follow_symlinks=False)
        else:
            _write(where, last, member, archive)
    return True


def _write(where: int, name: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    content = archive.extractfile(member)
    assert content is not None  # a regular file has content
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=where), "wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
        os.fchmod(out.fileno(), member.mode & 0o777)


def _make_directory(where: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=where)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=where, follow_symlinks=False).st_mode):
            raise


def _clear(where: int, name: str) -> None:
    """Make way: a file or link is replaced, a directory is not."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=where)


@contextmanager
def _directory(root: int, parents: list[str]) -> Iterator[int]:
    """The directory below `root`, made where it is missing, reached without following links."""
    current = os.dup(root)
    try:
        for parent in parents:
            _make_directory(current, parent)
            below = os.open(parent, DIRECTORY, dir_fd=current)
            os.close(current)
            current = below
        yield current
    finally:
        os.close(current)
