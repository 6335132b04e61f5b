"""Reads what keepers wrote: segments of frames, oldest first, and on while they grow.

A frame is {u64 ns, u8 stream, u32 length} and its bytes, little endian and packed
(`native/keeper_log.c`). The last frame of a segment may be cut off by a crash: it is not there yet,
or never will be. Oldest segments disappear while we read: a log is bounded, so a reader that fell
behind goes on with the oldest that is left.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sandbox.kernel.native import raising
from sandbox.model.observed import LogRecord

_HEAD: Final = struct.Struct("<QBI")
_MAX_FRAME: Final = 1 << 20
STREAMS: Final = {1: "stdout", 2: "stderr", 3: "terminal", 255: "keeper"}
_READ: Final = 1 << 18


class Tail:
    """One keeper's log from its beginning; `read` gives what is new since the last call."""

    def __init__(self, status_dir: Path, container: str) -> None:
        self._directory = status_dir / "log"
        self._container = container
        self._segment = 0
        self._offset = 0

    def read(self) -> Iterator[LogRecord]:
        """Complete frames not read yet, in bounded memory: a piece of a segment at a time."""
        while True:
            self._segment = self._segment or next(iter(self._segments()), 0)
            yield from self._frames()
            later = [n for n in self._segments() if n > self._segment]
            if not later:
                return
            # The keeper left this segment before it began the next one, so it is complete; but
            # frames may have come between our last look into it and the listing.
            yield from self._frames()
            self._segment, self._offset = later[0], 0

    def _segments(self) -> list[int]:
        with raising("readdir", str(self._directory)):
            try:
                names = os.listdir(self._directory)
            except FileNotFoundError:
                return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _frames(self) -> Iterator[LogRecord]:
        path = self._directory / str(self._segment)
        with raising("read", str(path)):
            try:
                with open(path, "rb", buffering=0) as file:
                    yield from self._parse(file.fileno())
            except FileNotFoundError:
                return

    def _parse(self, fd: int) -> Iterator[LogRecord]:
        rest = b""
        while data := os.pread(fd, _READ, self._offset + len(rest)):
            rest += data
            start = 0
            while start + _HEAD.size <= len(rest):
                at_ns, stream, length = _HEAD.unpack_from(rest, start)
                if length > _MAX_FRAME:
                    return  # not a frame: nothing after it in this segment can be trusted
                end = start + _HEAD.size + length
                if end > len(rest):
                    break
                self._offset += end - start
                yield LogRecord(
                    at_ns=at_ns,
                    container=self._container,
                    stream=STREAMS.get(stream, "keeper"),
                    data=rest[start + _HEAD.size : end],
                )
                start = end
            rest = rest[start:]
