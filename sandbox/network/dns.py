"""A VPC's resolver: sockets that were opened in the VPC's namespace, served from the agent's loop.

The VPC's namespace makes source addresses true (strict reverse path filter, fixed neighbours), so
who asks is the address that the packet came from, and answers go nowhere else. Sockets are given
and stay their owner's: they are not closed here, and queries that come while nobody serves them
wait in them (an agent that restarts keeps them in systemd's descriptor store).

Clients are tasks, and tasks are hostile. Each answer is one turn of the loop, callers have theirs
one after the other, and what may come of each and wait for it is bounded.

    a datagram     4096 bytes; 1024 a second and caller, silence beyond
    a connection   16 a caller, 256 a VPC; 10 s for each next message; 8 questions at once
    a question     of others: 64 waiting a caller, 256 in all (`forwarding`)

Nothing that a client does ends `serve`, and no socket that fails ends another. What goes wrong is
told in the log, each kind once a minute.
"""

from __future__ import annotations

import errno
import select
import socket
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress

import dns.rcode
import structlog
import trio

from sandbox.network.admission import Admission, Places, Turns
from sandbox.network.answers import (
    HEADER_BYTES,
    QUERY_LIMIT,
    STREAM_LIMIT,
    Message,
    answer,
    datagram_limit,
    failed,
    read,
    refusal,
    render,
)
from sandbox.network.forwarding import NO_ANSWER, Failure, Forwarder
from sandbox.network.names import Zone
from sandbox.network.relaying import question_of, relay

log: structlog.BoundLogger = structlog.get_logger()

IDLE_S = 10.0
"""For each next message whole, and for a client to take an answer."""

PIPELINE_MAX = 8
CONNECTIONS_PER_CALLER = 16
CONNECTIONS_TOTAL = 256

TAKEN_PER_TURN = 256
"""Packets, about a millisecond: then the agent's other work has its turn."""

WAITING_PER_CALLER = 256
WAITING_BYTES = 4 << 20

BUFFER_BYTES = 1 << 20
"""Of a socket: room for what a storm sends while the loop is busy for 20 ms."""

SO_RCVBUFFORCE = 33
"""asm-generic/socket.h; beyond net.core.rmem_max, for CAP_NET_ADMIN (socket(7))."""

RETRY_S = 0.1
TOLD_EVERY_S = 60.0

GONE = {errno.EBADF, errno.ENOTSOCK, errno.EINVAL}
"""Of a socket that is none any more."""


class Resolver:
    """The resolver of one VPC. `zone` may be replaced at any time by a newer one."""

    def __init__(self, zone: Zone, forwarder: Forwarder, admission: Admission) -> None:
        """One forwarder and one admission serve all VPCs of an agent."""
        self.zone = zone
        self._forwarder = forwarder
        self._admission = admission
        self._connections = Places(per_caller=CONNECTIONS_PER_CALLER, total=CONNECTIONS_TOTAL)
        self._seldom = Seldom()

    async def serve(
        self, datagrams: Sequence[socket.socket], listeners: Sequence[socket.socket]
    ) -> None:
        """Answer on these sockets until cancelled. May run more than once, on different ones.

        UDP sockets, and TCP sockets that listen. They become non-blocking.
        """
        async with trio.open_nursery() as nursery:
            for given in (*datagrams, *listeners):
                with suppress(OSError):  # closed: whoever serves it finds out
                    given.setblocking(False)
            for given in datagrams:
                nursery.start_soon(self._serve_datagrams, given, nursery)
            for given in listeners:
                nursery.start_soon(self._serve_listener, given, nursery)
            await trio.sleep_forever()

    # Questions --------------------------------------------------------------------------

    def _begin(self, wire: bytes, caller: str, limit: int | None) -> bytes | Message | None:
        """The answer, or silence, or the query if others have to be asked.

        `limit` is of the answer's bytes; None: what the client says that it can take. Like
        `_ask_others` it never raises: a fault of ours that one client finds is that client's.
        """
        try:
            query = read(wire)
            if query is None or isinstance(query, bytes):
                return query
            response = answer(query, self.zone, caller)
            if response is None:
                return query
            return render(response, limit or datagram_limit(query))
        except Exception as error:
            self._seldom.tell("a query could not be answered", caller=caller, error=repr(error))
            return refusal(wire, dns.rcode.SERVFAIL)

    async def _ask_others(self, query: Message, caller: str, limit: int | None) -> bytes:
        limit = limit or datagram_limit(query)
        try:
            reply = await self._forwarder.ask(question_of(query), self._key(caller))
            if not isinstance(reply, Failure):
                return relay(query, reply, trio.current_time(), limit)
        except Exception as error:
            self._seldom.tell("a question could not be asked", caller=caller, error=repr(error))
            reply = NO_ANSWER
        self._seldom.tell("a name could not be looked up", why=reply.why)
        return render(failed(query, reply.rcode, reply.why), limit)

    def _admits(self, caller: str) -> bool:
        """Addresses that are nobody's share what one caller has."""
        known = caller if caller in self.zone.callers else None
        return self._admission.admits((self.zone.vpc_id, known), trio.current_time())

    def _key(self, caller: str) -> Hashable:
        """VPCs may overlap."""
        return self.zone.vpc_id, caller

    # Datagrams --------------------------------------------------------------------------

    async def _serve_datagrams(self, given: socket.socket, nursery: trio.Nursery) -> None:
        """Takes out of the socket all that is there, and answers one packet a turn of the loop."""
        waiting = Turns(per_caller=WAITING_PER_CALLER, total_bytes=WAITING_BYTES)
        _make_roomy(given)
        while True:
            if waiting:
                await trio.lowlevel.checkpoint()
            elif not await _is_readable(given):
                break
            try:
                self._take_all(given, waiting)
            except OSError as error:
                if error.errno in GONE:
                    break
                await trio.sleep(RETRY_S)
            if waiting:
                wire, peer = waiting.take()
                begun = self._begin(wire, peer[0], None)
                if isinstance(begun, bytes):
                    self._send(given, begun, peer)
                elif begun is not None:
                    nursery.start_soon(self._forward_datagram, given, begun, peer)
        self._seldom.tell("a socket for queries is gone", vpc=self.zone.vpc_id)

    def _take_all(self, given: socket.socket, waiting: Turns) -> None:
        """What is beyond a caller's rate is dropped here, at a hundredth of an answer's cost."""
        for _ in range(TAKEN_PER_TURN):
            try:
                wire, peer = given.recvfrom(QUERY_LIMIT + 1)
            except (BlockingIOError, InterruptedError):
                if not waiting and _is_shut_down(given):
                    raise OSError(errno.EBADF, "shut down") from None
                return
            if self._admits(peer[0]):
                waiting.put(peer[0], wire, peer)

    async def _forward_datagram(
        self, given: socket.socket, query: Message, peer: tuple[str, int]
    ) -> None:
        self._send(given, await self._ask_others(query, peer[0], None), peer)

    def _send(self, given: socket.socket, wire: bytes, peer: tuple[str, int]) -> None:
        """At once or not at all: the client asks again, and nobody waits for it here."""
        try:
            given.sendto(wire, socket.MSG_DONTWAIT, peer)
        except OSError as error:
            self._seldom.tell("an answer could not be sent", to=peer[0], error=str(error))

    # Connections ------------------------------------------------------------------------

    async def _serve_listener(self, given: socket.socket, nursery: trio.Nursery) -> None:
        while await _is_readable(given):
            try:
                connection, peer = given.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno in GONE:
                    break
                # No descriptor or no memory is left: that passes, and the client waits.
                self._seldom.tell("a connection could not be accepted", error=str(error))
                await trio.sleep(RETRY_S)
                continue
            if self._connections.take(self._key(peer[0])):
                nursery.start_soon(self._serve_connection, connection, peer[0])
            else:
                connection.close()
        self._seldom.tell("a socket for connections is gone", vpc=self.zone.vpc_id)

    async def _serve_connection(self, connection: socket.socket, caller: str) -> None:
        key = self._key(caller)
        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
            async with stream, trio.open_nursery() as nursery:
                client = _Client(stream, nursery.cancel_scope)
                while (wire := await client.next_message()) is not None:
                    while not self._admits(caller):
                        await trio.sleep(RETRY_S)
                    await client.room.acquire()
                    nursery.start_soon(self._answer_client, client, wire, caller)
        except OSError:
            pass  # the client is gone before it was served
        finally:
            self._connections.leave(key)

    async def _answer_client(self, client: _Client, wire: bytes, caller: str) -> None:
        try:
            begun = self._begin(wire, caller, STREAM_LIMIT)
            if isinstance(begun, Message):
                begun = await self._ask_others(begun, caller, STREAM_LIMIT)
            if begun is not None:
                await client.send(begun)
        finally:
            client.room.release()


class _Client:
    """The messages of one connection (RFC 7766)."""

    def __init__(self, stream: trio.SocketStream, connection: trio.CancelScope) -> None:
        self.room = trio.Semaphore(PIPELINE_MAX)
        self._stream = stream
        self._connection = connection
        self._writing = trio.Lock()
        self._buffer = bytearray()

    async def next_message(self) -> bytes | None:
        """None at the end: closed, broken, idle, or a length that no query has."""
        with trio.move_on_after(IDLE_S):
            prefix = await self._exactly(2)
            length = int.from_bytes(prefix or b"", "big")
            if HEADER_BYTES <= length <= QUERY_LIMIT:
                return await self._exactly(length)
        return None

    async def send(self, wire: bytes) -> None:
        """Ends the connection of a client that does not take its answer: half of it is written."""
        with trio.move_on_after(IDLE_S):
            async with self._writing:
                try:
                    await self._stream.send_all(len(wire).to_bytes(2, "big") + wire)
                    return
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
        self._connection.cancel()

    async def _exactly(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            try:
                data = await self._stream.receive_some(QUERY_LIMIT)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found


class Seldom:
    """A log in which an event appears once in a while, with how often it was meant meanwhile."""

    def __init__(self, every_s: float = TOLD_EVERY_S) -> None:
        self._every_s = every_s
        self._told_at: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def tell(self, event: str, **facts: object) -> None:
        now = trio.current_time()
        if now - self._told_at.get(event, float("-inf")) < self._every_s:
            self._untold[event] += 1
            return
        self._told_at[event] = now
        log.warning(event, **facts, untold=self._untold.pop(event, 0))


def _make_roomy(given: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, SO_RCVBUFFORCE):
        with suppress(OSError):  # not allowed, or closed: whoever reads it finds out
            given.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _is_shut_down(given: socket.socket) -> bool:
    """Then it is always readable, and nothing comes."""
    poll = select.poll()
    poll.register(given, select.POLLRDHUP)
    return bool(poll.poll(0))


async def _is_readable(given: socket.socket) -> bool:
    """Waits; False if the socket is closed."""
    try:
        await trio.lowlevel.wait_readable(given)
    except (OSError, ValueError, trio.ClosedResourceError):
        return False
    return True
