"""Flow log records on disk: lines in numbered segments, of which the oldest go.

    <directory>/<n>     lines of version 2 records, each ended by a newline

One writes, any number read. Nothing is synced: what was recorded in the last seconds before a power
cut may be missing. A line without its newline was cut off by a crash and is not there; each writer
begins a new segment, so nothing comes after such a line.

A reader that falls behind goes on with the oldest segment that is left.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import trio

from sandbox.kernel.native import raising
from sandbox.network.flowlog import FlowRecord

SEGMENT_BYTES = 1 << 20
SEGMENTS_MAX = 64
LINES = 4096
"""Written at once."""
READ_BYTES = 1 << 18
LINE_MAX_BYTES = 1024
POLL_S = 0.5


class FlowLogWriter:
    """KernelError where the file system refuses; the next writing begins a new segment then."""

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        segments_max: int = SEGMENTS_MAX,
    ) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments_max = segments_max
        self._fd: int | None = None
        self._size = 0
        with raising("mkdir", str(directory)):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, records: Iterable[FlowRecord]) -> int:
        """How many. Those of a failed call may be there in part."""
        remaining, count = iter(records), 0
        while several := list(islice(remaining, LINES)):
            text = "".join(record.line() + "\n" for record in several)
            self._append(text.encode())
            count += len(several)
        return count

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, data: bytes) -> None:
        if self._fd is None or self._size >= self._segment_bytes:
            self._begin()
        assert self._fd is not None
        self._size += len(data)
        try:
            with raising("write", str(self._directory)):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
        except BaseException:
            self.close()  # the last line may have been cut off
            raise

    def _begin(self) -> None:
        self.close()
        there = segments(self._directory)
        number = there[-1] + 1 if there else 1
        path = self._directory / str(number)
        with raising("open", str(path)):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = 0
        for old in there[: max(0, len(there) + 1 - self._segments_max)]:
            with raising("unlink", f"{self._directory}/{old}"), suppress(FileNotFoundError):
                os.unlink(self._directory / str(old))


def segments(directory: Path) -> list[int]:
    """Their numbers, in order; none where there is no directory."""
    with raising("readdir", str(directory)):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


class FlowLogReader:
    """From the oldest record on; `read` gives what is new since the last call."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segment = 0
        self._offset = 0

    def read(self) -> Iterator[FlowRecord]:
        """In bounded memory. Lines that are no records are passed over."""
        while True:
            there = segments(self._directory)
            later = [number for number in there if number > self._segment]
            if self._segment not in there:
                if not later:
                    return
                self._segment, self._offset = later[0], 0
                continue
            # Listed before it is read: if there is a later one, this one is complete.
            yield from self._records()
            if not later:
                return
            self._segment, self._offset = later[0], 0

    def _records(self) -> Iterator[FlowRecord]:
        path = self._directory / str(self._segment)
        with raising("read", str(path)):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        with os.fdopen(fd, "rb", buffering=0):
            while data := self._piece(fd):
                self._offset += len(data)
                yield from _parsed(data)

    def _piece(self, fd: int) -> bytes:
        """Whole lines; nothing where there is no newline yet."""
        with raising("read", str(self._directory)):
            data = os.pread(fd, READ_BYTES, self._offset)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) > LINE_MAX_BYTES:
            return data  # not a line of ours
        return data[:end]


def _parsed(data: bytes) -> Iterator[FlowRecord]:
    for line in data.decode(errors="replace").split("\n"):
        with suppress(ValueError):
            yield FlowRecord.parse(line)


async def records(directory: Path, *, follow: bool = False) -> AsyncIterator[FlowRecord]:
    """What `sandbox flows` prints, `-f` with `follow`; JSON is `msgspec.json.encode` of each."""
    reader = FlowLogReader(directory)
    while True:
        for record in reader.read():
            yield record
            await trio.lowlevel.checkpoint()
        if not follow:
            return
        await trio.sleep(POLL_S)
