"""One client of the control socket: calls in, replies out, and how its loss is noticed.

    reader -> calls -> worker (one handler at a time) -> replies -> writer        all bounded

Reading goes on while a call is handled, so the end of the client cancels its handler at once and
nothing else. A client that reads slowly slows its handler; one that sends calls without end, or
something that is not varlink, is disconnected.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import structlog
import trio

from sandbox.errors import InvalidParameterException, SandboxError
from sandbox.model.request import Streams
from sandbox.model.task import Record
from sandbox.varlink import calls, faults, frames

CALLS_IN_FLIGHT = 64
"""Calls that a client may send ahead of their answers."""

REPLIES_IN_FLIGHT = 16

BATCH_ITEMS = 256
BATCH_BYTES = 1 << 20
"""Of one reply that gathers many items: large enough to be cheap, small against MESSAGE_LIMIT."""

SERVICE = "org.varlink.service"

log = structlog.get_logger()
T = TypeVar("T")


class Connection:
    """A connected client. `owner` names it in the tasks that shall not outlive it."""

    def __init__(self, stream: trio.SocketStream, owner: str) -> None:
        self.owner = owner
        self.is_lost = False
        """The client is gone: set before its handler is cancelled for that, and only then."""
        self._stream = stream
        self._incoming, self._calls = trio.open_memory_channel[frames.Frame](CALLS_IN_FLIGHT)
        self._replies, self._outgoing = trio.open_memory_channel[bytes](REPLIES_IN_FLIGHT)
        self._descriptors: dict[int, int] = {}

    async def run(self, methods: Methods) -> None:
        """Answer the client's calls until it is gone."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, nursery.cancel_scope)
                nursery.start_soon(self._write, nursery.cancel_scope)
                async for frame in self._calls:
                    await self._answer(frame, methods)
        finally:
            with contextlib.suppress(trio.WouldBlock):
                while True:
                    frames.close_all(self._calls.receive_nowait().descriptors)

    def _lose(self, connection: trio.CancelScope) -> None:
        self.is_lost = True
        connection.cancel()

    async def _read(self, connection: trio.CancelScope) -> None:
        incoming = frames.Frames()
        try:
            while True:
                data, ancillary, flags, _ = await self._stream.socket.recvmsg(
                    frames.CHUNK, frames.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                if not data:
                    break
                self._accept(incoming.feed(data, frames.received(ancillary, flags)))
        except (OSError, frames.Broken) as error:
            log.info("client broke off", owner=self.owner, reason=str(error))
        finally:
            incoming.close()
        self._lose(connection)

    def _accept(self, fed: list[frames.Frame]) -> None:
        for position, frame in enumerate(fed):
            try:
                self._incoming.send_nowait(frame)
            except trio.WouldBlock:
                for rest in fed[position:]:
                    frames.close_all(rest.descriptors)
                raise frames.Broken(f"more than {CALLS_IN_FLIGHT} calls in flight") from None

    async def _write(self, connection: trio.CancelScope) -> None:
        try:
            async for message in self._outgoing:
                await self._stream.send_all(message)
        except trio.BrokenResourceError:
            self._lose(connection)

    # One call ------------------------------------------------------------------------------

    async def _answer(self, frame: frames.Frame, methods: Methods) -> None:
        self._descriptors = dict(enumerate(frame.descriptors))
        try:
            request = msgspec.json.decode(frame.body, type=frames.Request)
        except frames.UNREADABLE as error:
            frames.close_all(self._descriptors.values())
            await self._replies.send(refusal("InvalidParameter", parameter=str(error)))
            return
        try:
            reply = await self._reply(request, methods)
        finally:
            frames.close_all(self._descriptors.values())
            self._descriptors = {}
        if not request.oneway:
            await self._replies.send(reply)

    async def _reply(self, request: frames.Request, methods: Methods) -> bytes:
        if request.method not in methods:
            return refusal("MethodNotFound", method=request.method)
        kind, handler = methods[request.method]
        if issubclass(kind, calls.Stream) and not request.more:
            return refusal("ExpectedMore")
        try:
            call = msgspec.json.decode(request.parameters, type=kind)
        except frames.UNREADABLE as error:
            return refusal("InvalidParameter", parameter=str(error))
        try:
            return message(await handler(self, call))
        except SandboxError as error:
            name, fault = faults.encode(error)
            return message(fault, error=name)
        except Exception as error:
            log.exception("a call failed", method=request.method)
            text = f"internal error ({type(error).__name__}): see the agent's log"
            return message(faults.Fault(text), error=f"{faults.INTERFACE}.ApiError")

    # For handlers --------------------------------------------------------------------------

    async def send(self, reply: Record) -> None:
        """Give one of several replies; waits while the client is slow."""
        await self._replies.send(message(reply, continues=True))

    def offer(self, reply: Record) -> None:
        """Give one of several replies, or drop it when the client is slow: progress, hints."""
        with contextlib.suppress(trio.WouldBlock):
            self._replies.send_nowait(message(reply, continues=True))

    async def relay(
        self, source: AsyncIterator[T], reply: Callable[[tuple[T, ...]], Record]
    ) -> None:
        """Send all of `source`, many items a reply when they come faster than the client reads."""
        send, receive = trio.open_memory_channel[T](BATCH_ITEMS)
        refused: list[SandboxError] = []

        async def pump() -> None:
            async with send:
                try:
                    async with closing(source) as items:
                        async for item in items:
                            try:
                                send.send_nowait(item)  # no turn of the loop: so batches grow
                            except trio.WouldBlock:
                                await send.send(item)
                except SandboxError as error:  # raised below, out of the nursery's group
                    refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            async for first in receive:
                await self.send(reply(_batch(first, receive)))
        for error in refused:
            raise error

    def claim(self, wanted: Mapping[str, Streams]) -> dict[str, Streams]:
        """The call's descriptors in place of their indexes; from here on the caller owns them."""
        indexes = [index for streams in wanted.values() for index in streams.descriptors]
        if len(set(indexes)) != len(indexes) or not set(indexes) <= self._descriptors.keys():
            raise InvalidParameterException(
                f"streams name descriptors {indexes}, the call carries {len(self._descriptors)}"
            )
        return {name: each.moved(self._descriptors.pop) for name, each in wanted.items()}

    def borrow(self, index: int) -> int:
        """A descriptor of this call, valid until its handler returns."""
        try:
            return self._descriptors[index]
        except KeyError:
            raise InvalidParameterException(f"the call carries no descriptor {index}") from None


Handler = Callable[[Connection, Any], Awaitable[Record]]

Methods = Mapping[str, tuple[type[calls.Call[Any]], Handler]]
"""What a client may call, by full name: how its parameters are read, and who answers."""


def _batch(first: T, receive: trio.MemoryReceiveChannel[T]) -> tuple[T, ...]:
    """`first` and what else is there already, within the bounds of a batch."""
    batch = [first]
    size = _weight(first)
    with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
        while len(batch) < BATCH_ITEMS and size < BATCH_BYTES:
            batch.append(receive.receive_nowait())
            size += _weight(batch[-1])
    return tuple(batch)


def _weight(item: object) -> int:
    return len(getattr(item, "data", b""))


@contextlib.asynccontextmanager
async def closing(source: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T]]:
    """`source`, closed when its reader leaves and not when the collector finds it."""
    try:
        yield source
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def message(parameters: object, *, continues: bool = False, error: str | None = None) -> bytes:
    raw = msgspec.Raw(msgspec.json.encode(parameters))
    return frames.encode(frames.Reply(parameters=raw, continues=continues, error=error))


def refusal(name: str, **parameters: str) -> bytes:
    """An error of varlink itself."""
    return message(parameters, error=f"{SERVICE}.{name}")
