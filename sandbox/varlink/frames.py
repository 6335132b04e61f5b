"""varlink framing: JSON objects ended by NUL on a stream socket, with descriptors beside them.

Pure but for the two helpers at the end that know the form of SCM_RIGHTS. What the kernel promises
about descriptors on a stream socket (unix(7), unix_stream_read_generic): they stick to the bytes of
the sendmsg that carried them, and one recvmsg never reads past bytes that carried some. It may have
read bytes without descriptors before them. A sender gives each message a sendmsg of its own, so
descriptors belong to the *last* message begun in the chunk that brought them.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

MESSAGE_LIMIT = 16 << 20
"""Bytes of one message. What has no natural bound (lists, logs) is sent as many messages."""

DESCRIPTOR_LIMIT = 32
"""Descriptors of one message: three for each of the ten containers that a task may have."""

CHUNK = 64 << 10
ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTOR_LIMIT * array.array("i").itemsize)


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no JSON of the type, of UTF-8, or of a sane depth."""


class Broken(Exception):
    """The peer does not speak the protocol; the connection is of no more use."""


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client sends. `more`: several replies are welcome; `oneway`: none is."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    more: bool = False
    oneway: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the agent answers. `continues`: another reply to the same call follows."""

    parameters: msgspec.Raw = msgspec.Raw(b"{}")
    continues: bool = False
    error: str | None = None


class Frame(NamedTuple):
    """One message. Who takes a frame owns its descriptors."""

    body: bytes
    descriptors: tuple[int, ...] = ()


class Frames:
    """Bytes and descriptors in, messages out; bounded in both."""

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._descriptors: list[int] = []

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> list[Frame]:
        """The messages that `data` completes. Raises Broken when one exceeds a bound."""
        bodies = self._cut(data)
        owned: list[list[int]] = [[] for _ in range(len(bodies) + 1)]  # the last: not yet complete
        owned[0] += self._descriptors
        owned[-1 if self._buffer or not bodies else -2] += descriptors
        self._descriptors = owned.pop()
        frames = [Frame(body, tuple(taken)) for body, taken in zip(bodies, owned, strict=True)]
        longest = max(len(self._buffer), *map(len, bodies), 0)
        most = max(len(self._descriptors), *map(len, owned), 0)
        if longest > self._limit or most > DESCRIPTOR_LIMIT:
            for taken in owned:
                close_all(taken)
            self.close()
            raise Broken(f"a message exceeds {self._limit} bytes or {DESCRIPTOR_LIMIT} descriptors")
        return frames

    def _cut(self, data: bytes) -> list[bytes]:
        """Complete bodies; the rest stays. Only new bytes are searched for the end."""
        *ends, rest = data.split(b"\0")
        bodies = []
        for end in ends:
            bodies.append(bytes(self._buffer) + end)
            self._buffer.clear()
        self._buffer += rest
        return bodies

    def close(self) -> None:
        """Close descriptors that no message took."""
        close_all(self._descriptors)
        self._descriptors = []
        self._buffer.clear()


def encode(message: Request | Reply) -> bytes:
    """A message as it goes over the wire; Broken when it exceeds the bound."""
    body = msgspec.json.encode(message) + b"\0"
    if len(body) > MESSAGE_LIMIT:
        raise Broken(f"a message of {len(body)} bytes exceeds {MESSAGE_LIMIT}")
    return body


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


# SCM_RIGHTS ----------------------------------------------------------------------------------

Ancillary = tuple[int, int, bytes]


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    """The ancillary data for sendmsg that passes `descriptors`."""
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def received(ancillary: Sequence[Ancillary], flags: int) -> list[int]:
    """The descriptors that recvmsg brought; Broken (and all closed) when some did not fit."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(found)
        raise Broken(f"more than {DESCRIPTOR_LIMIT} descriptors in one message")
    return list(found)
