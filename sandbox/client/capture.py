"""Pipes for a container's streams: what it writes is collected up to a bound, then counted only.

Reading goes on beyond the bound, so the program is never blocked by its own verbosity.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Self

import trio

from sandbox.model.request import Streams
from sandbox.varlink.frames import close_all

CHUNK = 64 << 10


class Capture:
    """stdout and stderr into memory, `data` to stdin. `files`: see `Streams`; it is ours now."""

    def __init__(self, data: bytes | None, limit_bytes: int, files: int | None = None) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.truncated = False
        self._data = data
        self._limit_bytes = limit_bytes
        out, theirs_out = os.pipe()
        error, theirs_error = os.pipe()
        self._readers = {"stdout": out, "stderr": error}
        theirs_in: int | None = None
        self._writer: int | None = None
        if data is not None:
            theirs_in, self._writer = os.pipe()
        self._theirs: Streams | None = Streams(
            stdin=theirs_in, stdout=theirs_out, stderr=theirs_error, files=files
        )

    def hand_over(self) -> Streams:
        """The program's ends, once: they belong to the call that they are given to."""
        assert self._theirs is not None
        streams, self._theirs = self._theirs, None
        return streams

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_all(self._readers.values())
        if self._theirs is not None:
            close_all(self._theirs.descriptors)
        if self._writer is not None:
            os.close(self._writer)
        self._readers, self._writer = {}, None

    async def pump(self) -> None:
        """Feed and collect until the program and all its children have closed their ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._feed)
            nursery.start_soon(self._collect, self._readers.pop("stdout"), self.stdout)
            nursery.start_soon(self._collect, self._readers.pop("stderr"), self.stderr)

    async def _feed(self) -> None:
        if self._writer is None or self._data is None:
            return
        descriptor, self._writer = self._writer, None
        async with trio.lowlevel.FdStream(descriptor) as stdin:
            with suppress(trio.BrokenResourceError):  # the program need not read it all
                await stdin.send_all(self._data)

    async def _collect(self, descriptor: int, into: bytearray) -> None:
        async with trio.lowlevel.FdStream(descriptor) as stream:
            while chunk := await stream.receive_some(CHUNK):
                room = self._limit_bytes - len(into)
                self.truncated |= len(chunk) > room
                into += chunk[:room]
