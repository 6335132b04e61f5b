"""Images in files of this machine: OCI layout directories and `docker save` archives.

A layout is a directory with `index.json` and `blobs/sha256/<hex>`; a tag is an annotation of an
entry of the index. An archive is a tar whose `manifest.json` lists configuration and layers by file
name; it has no manifest, so one is written here, the same bytes each time, and the image is then
like any other. Layers are read straight from the archive by offset: nothing is copied first.

The files may come from strangers: only regular files are opened, no link is followed out of the
place, every list and document is bounded, and content is checked against its digest by the caller.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import stat
import tarfile
from collections.abc import Hashable, Iterator
from pathlib import Path

import msgspec
import trio

from sandbox.errors import ImageError, ImageNotFound
from sandbox.images import documents
from sandbox.images.blobs import CHUNK_BYTES, Send, digest_of, reported
from sandbox.images.documents import Descriptor
from sandbox.images.reference import ArchiveReference, LayoutReference
from sandbox.images.sources import Document
from sandbox.model.tar import BoundedMember

_REF_NAME = "org.opencontainers.image.ref.name"
_MAX_MEMBERS = 20_000
_MAX_LINKS = 8
_MAX_MARKER_BYTES = 4096
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class LayoutSource:
    """An image of an OCI layout."""

    def __init__(self, reference: LayoutReference) -> None:
        self._reference = reference
        self._directory = reference.directory

    @property
    def origin(self) -> Hashable:
        return self._reference

    async def root(self) -> Document:
        self._read("oci-layout", _MAX_MARKER_BYTES)  # what makes a directory a layout
        body = self._read("index.json", documents.MAX_MANIFEST_BYTES)
        index = documents.parse_document(body)
        if not isinstance(index, documents.Index):
            raise ImageError(f"{self._reference}: index.json is not an index")
        names = sorted({_ref_name(entry) for entry in index.manifests} - {""})
        if self._reference.tag is None and len(names) > 1:
            which = ", ".join(map(repr, names))[:200]  # a stranger wrote them
            raise ImageError(f"{self._reference}: say which with oci:DIR:TAG, of {which}")
        if self._reference.tag is None:
            return Document(body=body)
        entries = [entry for entry in index.manifests if self._is_tagged(entry)]
        if not entries:
            raise ImageNotFound(f"{self._reference}: no image of that tag in the layout")
        return Document(body=_index_of(entries))

    async def document(self, descriptor: Descriptor) -> Document:
        return Document(body=self._read(_blob(descriptor), descriptor.size))

    async def copy(self, descriptor: Descriptor, send: Send) -> None:
        with opened(self._directory, _blob(descriptor)) as fd:
            await copy_range(fd, 0, os.fstat(fd).st_size, send)

    def _is_tagged(self, entry: Descriptor) -> bool:
        name = _ref_name(entry)
        return self._reference.tag in (name, name.rpartition(":")[2])

    def _read(self, name: str, limit: int) -> bytes:
        with opened(self._directory, name) as fd, reported("read", self._directory / name):
            if os.fstat(fd).st_size > limit:
                raise ImageError(f"{self._directory / name} is larger than {limit} bytes")
            return os.pread(fd, limit, 0)


class ArchiveSource:
    """The image of a `docker save` archive; the first one when there are several."""

    def __init__(self, reference: ArchiveReference) -> None:
        self._reference = reference
        self._contents: _Contents | None = None

    @property
    def origin(self) -> Hashable:
        return self._reference

    async def root(self) -> Document:
        self._contents = await trio.to_thread.run_sync(_scan, self._reference.file)
        return Document(body=self._contents.manifest)

    async def document(self, descriptor: Descriptor) -> Document:
        raise ImageError(f"{self._reference}: holds no index")

    async def copy(self, descriptor: Descriptor, send: Send) -> None:
        if self._contents is None or descriptor.digest not in self._contents.places:
            raise ImageError(f"{self._reference}: holds no {descriptor.digest}")
        offset, size = self._contents.places[descriptor.digest]
        with opened(self._reference.file) as fd:
            await copy_range(fd, offset, size, send)


class _Contents(msgspec.Struct, frozen=True):
    """Where in the archive what lies: digest -> offset and size."""

    manifest: bytes
    places: dict[str, tuple[int, int]]


class _Entry(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]


class _DiffIds(msgspec.Struct):
    diff_ids: list[documents.Digest]


class _Config(msgspec.Struct):
    rootfs: _DiffIds


def _scan(file: Path) -> _Contents:
    """Read the archive's table of contents and write the manifest that it lacks."""
    with reported("read", file), opened(file) as fd, os.fdopen(os.dup(fd), "rb") as stream:
        if os.pread(fd, 4, 0).startswith((_GZIP_MAGIC, _ZSTD_MAGIC)):
            raise ImageError(f"{file}: is compressed; decompress it first")
        members = _members(file, stream)
        listing = _member_bytes(fd, file, members, "manifest.json", documents.MAX_MANIFEST_BYTES)
        entry = _first(file, listing)
        config = _member_bytes(fd, file, members, entry.config, documents.MAX_CONFIG_BYTES)
        place = _place(file, members, entry.config)
        places = {digest_of(config): place}
        layers = []
        for name, diff_id in zip(entry.layers, _diff_ids(file, config, entry), strict=True):
            offset, size = _place(file, members, name)
            media_type = _media_type(os.pread(fd, 4, offset))
            plain = media_type == documents.TAR_LAYER
            digest = diff_id if plain else _hash(fd, offset, size)
            places[digest] = (offset, size)
            layers.append(Descriptor(media_type=media_type, digest=digest, size=size))
    descriptor = Descriptor(
        media_type=documents.CONFIG_TYPES[0], digest=digest_of(config), size=len(config)
    )
    return _Contents(write_manifest(descriptor, layers), places)


def write_manifest(config: Descriptor, layers: list[Descriptor]) -> bytes:
    """An OCI manifest; equal content gives equal bytes."""
    manifest = {
        "schemaVersion": 2,
        "mediaType": documents.MANIFEST_TYPES[0],
        "config": _plain(config),
        "layers": [_plain(layer) for layer in layers],
    }
    return msgspec.json.encode(manifest)


def _plain(descriptor: Descriptor) -> dict[str, str | int]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }


def _members(file: Path, stream: object) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=BoundedMember) as archive:  # type: ignore[call-overload]
            for member in archive:
                members[posixpath.normpath(member.name)] = member
                archive.members = []  # tarfile would keep every header it has read
                if len(members) > _MAX_MEMBERS:
                    raise ImageError(f"{file}: more than {_MAX_MEMBERS} members")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise ImageError(f"{file}: not a tar archive: {error}") from error
    return members


def _place(file: Path, members: dict[str, tarfile.TarInfo], name: str) -> tuple[int, int]:
    """Offset and size of a regular member, through the links by which equal layers are stored."""
    path = posixpath.normpath(name)
    for _ in range(_MAX_LINKS):
        member = members.get(path)
        if member is None:
            raise ImageError(f"{file}: lacks {name[:100]!r}")
        if member.issym():
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        elif member.islnk():
            path = posixpath.normpath(member.linkname)
        elif member.isreg() and not member.issparse():
            return member.offset_data, member.size
        else:
            raise ImageError(f"{file}: {name[:100]!r} is not a regular file")
    raise ImageError(f"{file}: {name[:100]!r} is a link to a link to a link")


def _member_bytes(
    fd: int, file: Path, members: dict[str, tarfile.TarInfo], name: str, limit: int
) -> bytes:
    offset, size = _place(file, members, name)
    if size > limit:
        raise ImageError(f"{file}: {name[:100]!r} is larger than {limit} bytes")
    body = os.pread(fd, size, offset)
    if len(body) != size:
        raise ImageError(f"{file}: {name[:100]!r} is cut off")
    return body


def _first(file: Path, listing: bytes) -> _Entry:
    try:
        entries = msgspec.json.decode(listing, type=list[_Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{file}: manifest.json: {error}") from error
    if not entries:
        raise ImageNotFound(f"docker-archive:{file}: holds no image")
    return entries[0]


def _diff_ids(file: Path, config: bytes, entry: _Entry) -> list[str]:
    try:
        diff_ids = msgspec.json.decode(config, type=_Config).rootfs.diff_ids
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{file}: image configuration: {error}") from error
    if len(diff_ids) != len(entry.layers):
        raise ImageError(f"{file}: {len(entry.layers)} layers, but {len(diff_ids)} diff_ids")
    return diff_ids


def _media_type(magic: bytes) -> str:
    if magic.startswith(_GZIP_MAGIC):
        return documents.GZIP_LAYER
    return documents.ZSTD_LAYER if magic.startswith(_ZSTD_MAGIC) else documents.TAR_LAYER


def layer_type(file: Path) -> str:
    """How the tar archive `file` is compressed, as a layer's media type."""
    with opened(file) as fd:
        return _media_type(os.pread(fd, 4, 0))


def _hash(fd: int, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    end = offset + size
    while offset < end and (chunk := os.pread(fd, min(CHUNK_BYTES, end - offset), offset)):
        digest.update(chunk)
        offset += len(chunk)
    return f"sha256:{digest.hexdigest()}"


def _index_of(entries: list[Descriptor]) -> bytes:
    return msgspec.json.encode(
        {"schemaVersion": 2, "manifests": [_with_platform(entry) for entry in entries]}
    )


def _with_platform(entry: Descriptor) -> dict[str, object]:
    return {**_plain(entry), "platform": entry.platform} if entry.platform else {**_plain(entry)}


def _ref_name(entry: Descriptor) -> str:
    return (entry.annotations or {}).get(_REF_NAME, "")


def _blob(descriptor: Descriptor) -> str:
    return f"blobs/sha256/{descriptor.digest.removeprefix('sha256:')}"


async def copy_range(fd: int, offset: int, size: int, send: Send) -> None:
    """Send part of a file piece by piece; ImageError when the file ends before."""
    end = offset + size
    while offset < end:
        chunk = await trio.to_thread.run_sync(os.pread, fd, min(CHUNK_BYTES, end - offset), offset)
        if not chunk:
            raise ImageError("archive is cut off")
        await send(chunk)
        offset += len(chunk)


@contextlib.contextmanager
def opened(place: Path, name: str = "") -> Iterator[int]:
    """A descriptor of a regular file; no FIFO can hold us up, no last component is a link."""
    path = place / name if name else place
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if name else 0)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise ImageNotFound(f"{path}: no such file") from error
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path}: not a regular file")
        yield fd
    finally:
        os.close(fd)
