"""A layer as it is transferred, turned into the tar stream that its diff_id names.

Decompression stays in libraries: isal reads gzip members one after another and checks each trailer,
zstandard reads frames. Output comes in bounded pieces whatever the input promises (gzip packs a
thousand to one, zstd far more). The end of the compressed stream has to be an end: zstandard reads
a cut-off frame like a whole one, so a frame of known text is appended to its input, and it comes
out whole only where a frame may begin.

Everything here blocks and is called in a thread.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import zstandard
from isal import igzip, igzip_lib

from sandbox.errors import ImageError

Read = Callable[[], bytes]
"""The next bytes of the transfer, of any number; none at its end."""
Decode = Callable[[Read], Iterator[bytes]]

PIECE_BYTES = 1 << 20
_GZIP_ERRORS: tuple[type[Exception], ...] = (
    EOFError,
    igzip.BadGzipFile,
    cast(type[Exception], igzip_lib.IsalError),  # its stub calls the class an instance
)
_MAX_WINDOW_BYTES = 1 << 27
"""What zstd's own tools accept without --long; a frame may ask for terabytes."""


def decoder(media_type: str) -> Decode:
    """How to read a layer of this type; ImageError if it is none."""
    try:
        return _DECODERS[media_type]
    except KeyError:
        raise ImageError(f"unknown type of layer: {media_type}") from None


def _plain(read: Read) -> Iterator[bytes]:
    return iter(read, b"")


def _gzip(read: Read) -> Iterator[bytes]:
    file = igzip.IGzipFile(fileobj=_Reader(read), mode="rb")  # type: ignore[no-untyped-call]
    with file:
        try:
            while piece := file.read(PIECE_BYTES):
                yield piece
        except _GZIP_ERRORS as error:
            raise ImageError(f"the layer's gzip stream is damaged: {error}") from error


def _zstd(read: Read) -> Iterator[bytes]:
    mark = os.urandom(32)
    # With a checksum, so that the frame's own bytes do not end in the mark.
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(mark)
    source = io.BufferedReader(_Reader(_followed_by(frame, read)))
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    held = b""
    try:
        with decompressor.stream_reader(source, read_across_frames=True) as reader:
            while piece := reader.read(PIECE_BYTES):
                held += piece
                yield held[: -len(mark)]
                held = held[-len(mark) :]
    except zstandard.ZstdError as error:
        raise ImageError(f"the layer's zstd stream is damaged: {error}") from error
    if held != mark:
        raise ImageError("the layer's zstd stream is truncated")


_DECODERS: dict[str, Decode] = {
    "application/vnd.oci.image.layer.v1.tar": _plain,
    "application/vnd.oci.image.layer.v1.tar+gzip": _gzip,
    "application/vnd.oci.image.layer.v1.tar+zstd": _zstd,
    "application/vnd.docker.image.rootfs.diff.tar": _plain,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": _gzip,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": _zstd,
}


def _followed_by(last: bytes, read: Read) -> Read:
    ending = iter([last])

    def next_chunk() -> bytes:
        return read() or next(ending, b"")

    return next_chunk


class _Reader(io.RawIOBase):
    """Chunks of any length as the file that the libraries want to read."""

    def __init__(self, read: Read) -> None:
        self._next = read
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(self._next())
        part = self._rest[: len(into)]
        into[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)
