"""A blocking connection to the control socket: all that the command line needs of a client.

The standard library's socket and msgspec only, no trio: `sandbox ps` must start in milliseconds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from sandbox.client import varlink
from sandbox.client.place import shown_bytes
from sandbox.errors import InvalidParameterException
from sandbox.varlink import frames
from sandbox.varlink.calls import AgentReply, Call, GetAgent, R, Stream


class Link:
    """One connection; calls are made one after another. `with` closes it."""

    def __init__(self, path: str) -> None:
        """Connect; AgentUnavailable when nobody listens there."""
        self.path = path
        self._frames = frames.Frames()
        self._waiting: list[frames.Frame] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connect(self._socket, path)
        except OSError as error:
            self._socket.close()
            raise varlink.absent(path, os.strerror(error.errno or 0)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._frames.close()
        self._socket.close()

    def fileno(self) -> int:
        """Readable when an answer, or the loss of the agent, can be read."""
        return self._socket.fileno()

    def call(self, call: Call[R], descriptors: Sequence[int] = ()) -> R:
        """Make a call and wait for its only answer."""
        self.send(call, descriptors)
        return self.receive(call)[0]

    def stream(self, call: Stream[R], descriptors: Sequence[int] = ()) -> Iterator[R]:
        """Make a call and give its answers as they come. Close the link to end it early."""
        self.send(call, descriptors)
        continues = True
        while continues:
            reply, continues = self.receive(call)
            yield reply

    def send(self, call: Call[R], descriptors: Sequence[int] = ()) -> None:
        """Make a call; its answers are for `receive`. The descriptors stay the caller's own."""
        try:
            message = varlink.question(call)
        except UnicodeEncodeError as error:  # a file's name, or what lies in the environment
            raise InvalidParameterException(f"{shown_bytes(error.object)} is not UTF-8") from None
        try:
            sent = self._socket.sendmsg([message], frames.rights(descriptors))
            self._socket.sendall(message[sent:])
        except OSError:
            raise varlink.lost(self.path) from None

    def receive(self, call: Call[R]) -> tuple[R, bool]:
        """The next answer, and whether another follows."""
        while not self._waiting:
            self._waiting = self._read()
        return varlink.answer(call, self._waiting.pop(0))

    @property
    def buffered(self) -> bool:
        """True when an answer was read already: `receive` will not block, `fileno` may not tell."""
        return bool(self._waiting)

    def _read(self) -> list[frames.Frame]:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                frames.CHUNK, frames.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if data:
                return self._frames.feed(data, frames.received(ancillary, flags))
        except (OSError, frames.Broken):
            pass  # said below, in the words for every way of losing an agent
        raise varlink.lost(self.path)


def connect(endpoint: socket.socket, path: str) -> None:
    """Connect to a socket at a path of any length: the kernel's own limit is 107 bytes."""
    if len(os.fsencode(path)) < 108:
        endpoint.connect(path)
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        endpoint.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)


def reach(path: str) -> tuple[Link, AgentReply]:
    """A link to a live agent. An agent that is just leaving counts as absent."""
    link = Link(path)
    try:
        return link, link.call(GetAgent())
    except BaseException:
        link.close()
        raise
