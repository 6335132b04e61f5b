"""Names of others: asked of the host's resolvers, from the host's own namespace.

Each question goes out in a message of our own, from a port that the kernel draws and with an id
that dnspython draws, and only what answers that question from that address is taken; what else
comes to the port is passed over. Of an answer only what belongs to the question is kept
(`relaying`).

    for each server, those that failed lately last:
        UDP, 2 s, twice; truncated: TCP, 4 s        an answer or NXDOMAIN ends it
    nobody: SERVFAIL, at once when the host has no server

Questions that are the same are asked once, and answers are kept: by their TTL, but a minute at
most, so that a change is seen, in bytes of a bounded number and size. Failures are kept for a
second (RFC 9520, 3.2: at least that). What all callers may keep waiting is bounded, and for each;
and who asks pays for the size of the answer, since reading it costs the agent more than all else
(`admission`).

Nothing runs in the background: whoever asks first does the asking, and when that one is cancelled
another who waits for the same takes over.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import dns.asyncbackend
import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import trio

from sandbox.network.admission import Admission, Places
from sandbox.network.answers import Message
from sandbox.network.relaying import Kept, Question, keep
from sandbox.network.resolv_conf import Server

UDP_TIMEOUT_S = 2.0
UDP_TRIES = 2
TCP_TIMEOUT_S = 4.0
TOTAL_TIMEOUT_S = 12.0
"""Two servers that are silent and a third one that is not; clients have given up by then."""

UDP_PAYLOAD = 1232
"""Bytes that no path fragments (RFC 9715); a longer answer comes over TCP."""

REPLY_LIMIT = 16 << 10
"""Bytes of an answer. What is longer (no name that is meant well has it) counts as none."""

BYTES_PER_PACKET = 64
"""Of an answer: they cost the agent what a caller's packet does, half a millisecond."""

FAILED_LATELY_S = 30.0

FORWARDS_PER_CALLER = 64
FORWARDS_TOTAL = 256
"""A descriptor each."""

KEPT_MAX_S = 60.0
FAILURE_KEPT_S = 1.0
ENTRIES_MAX = 2048
ENTRY_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Failure:
    rcode: dns.rcode.Rcode
    why: str


Reply = Kept | Failure

OFF = Failure(dns.rcode.REFUSED, "forwarding is off")
NO_SERVER = Failure(dns.rcode.SERVFAIL, "the host has no name server")
NO_ANSWER = Failure(dns.rcode.SERVFAIL, "no name server of the host has answered")
TOO_MANY = Failure(dns.rcode.SERVFAIL, "too many questions are waiting for an answer")


class Cache:
    """Replies by question; the one that was not used for longest goes first."""

    def __init__(self, entries_max: int = ENTRIES_MAX) -> None:
        self._entries: OrderedDict[Question, tuple[Reply, float]] = OrderedDict()
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, question: Question, now: float) -> Reply | None:
        reply, until = self._entries.get(question, (None, now))
        if until <= now:
            self._entries.pop(question, None)
            return None
        self._entries.move_to_end(question)
        return reply

    def put(self, question: Question, reply: Reply, now: float) -> None:
        if isinstance(reply, Failure):
            seconds = FAILURE_KEPT_S
        elif len(reply.wire) <= ENTRY_BYTES_MAX:
            seconds = min(reply.fresh_s, KEPT_MAX_S)
        else:
            seconds = 0
        if seconds <= 0:
            return
        self._entries[question] = reply, now + seconds
        self._entries.move_to_end(question)
        if len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)


class _Flight:
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.reply: Reply | None = None
        """None after its end: whoever asked was cancelled."""


class Forwarder:
    """One for all resolvers of an agent. `servers` is called for each question; None: it is off."""

    def __init__(
        self, servers: Callable[[], Sequence[Server]] | None, admission: Admission
    ) -> None:
        self._servers = servers
        self._admission = admission
        self._cache = Cache()
        self._places = Places(per_caller=FORWARDS_PER_CALLER, total=FORWARDS_TOTAL)
        self._flights: dict[Question, _Flight] = {}
        self._failed_at: dict[Server, float] = {}
        self._backend: Any = dns.asyncbackend.get_backend("trio")
        self._readers = trio.CapacityLimiter(1)

    async def ask(self, question: Question, caller: Hashable) -> Reply:
        """Takes TOTAL_TIMEOUT_S at most, or that again for each who asked and was cancelled.

        `caller` is the key that the admission knows it by.
        """
        if self._servers is None:
            return OFF
        if (known := self._cache.get(question, trio.current_time())) is not None:
            return known
        if not self._places.take(caller):
            return TOO_MANY
        try:
            return await self._ask_once(question, caller)
        finally:
            self._places.leave(caller)

    async def _ask_once(self, question: Question, caller: Hashable) -> Reply:
        while (flight := self._flights.get(question)) is not None:
            await flight.ended.wait()
            if flight.reply is not None:
                return flight.reply
        flight = self._flights[question] = _Flight()
        try:
            flight.reply = await self._ask_servers(question, caller)
            if flight.reply is not NO_SERVER:  # found out at no cost, and may change any time
                self._cache.put(question, flight.reply, trio.current_time())
            return flight.reply
        finally:
            del self._flights[question]
            flight.ended.set()

    async def _ask_servers(self, question: Question, caller: Hashable) -> Reply:
        servers = self._in_order(trio.current_time())
        if not servers:
            return NO_SERVER
        with trio.move_on_after(TOTAL_TIMEOUT_S):
            for server in servers:
                reply = await self._ask_server(server, question, caller)
                if reply is not None:
                    self._failed_at.pop(server, None)
                    return reply
                self._failed_at[server] = trio.current_time()
        return NO_ANSWER

    def _in_order(self, now: float) -> list[Server]:
        """As the host has them, but who failed lately comes last."""
        assert self._servers is not None
        servers = list(self._servers())
        self._failed_at = {
            server: at
            for server, at in self._failed_at.items()
            if server in servers and at > now - FAILED_LATELY_S
        }
        return sorted(servers, key=lambda server: self._failed_at.get(server, float("-inf")))

    async def _ask_server(
        self, server: Server, question: Question, caller: Hashable
    ) -> Kept | None:
        """An answer to the question; None when this server has none."""
        query = _query(question)
        for _ in range(UDP_TRIES):
            # What a server can do wrong has no list: dnspython's own errors, those of sockets,
            # trio's of streams, and what a message leads a parser to. All of it is no answer.
            try:
                reply = await self._by_datagram(query, server)
                if not reply.flags & dns.flags.TC:
                    self._charge(caller, len(reply.wire or b""))
                    return keep(question, reply, trio.current_time())
                wire = await _by_stream(query, server)
                self._charge(caller, len(wire))
                return await self._read(query, question, wire)
            except Exception:
                continue
        return None

    def _charge(self, caller: Hashable, size: int) -> None:
        self._admission.charge(caller, size / BYTES_PER_PACKET, trio.current_time())

    async def _by_datagram(self, query: Message, server: Server) -> Message:
        # Connected: the kernel lets nobody else's packets in, and says when nobody listens.
        async with await self._backend.make_socket(
            _family(server), socket.SOCK_DGRAM, destination=(server.address, server.port)
        ) as given:
            return await dns.asyncquery.udp(
                query,
                server.address,
                port=server.port,
                timeout=UDP_TIMEOUT_S,
                sock=given,
                ignore_unexpected=True,
                ignore_errors=True,
            )

    async def _read(self, query: Message, question: Question, wire: bytes) -> Kept | None:
        """A large answer costs up to a tenth of a second: the loop goes on meanwhile."""
        now = trio.current_time()

        def read() -> Kept | None:
            reply = dns.message.from_wire(wire)
            return keep(question, reply, now) if query.is_response(reply) else None

        return await trio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._readers)


def _query(question: Question) -> Message:
    query = dns.message.make_query(
        question.name,
        dns.rdatatype.RdataType.make(question.rdtype),
        use_edns=0,
        payload=UDP_PAYLOAD,
        want_dnssec=question.is_dnssec_wanted,
    )
    if question.is_checking_disabled:
        query.flags |= dns.flags.CD
    return query


async def _by_stream(query: Message, server: Server) -> bytes:
    """EOFError for what ends too early or is too long, trio.TooSlowError for what is too slow."""
    with trio.fail_after(TCP_TIMEOUT_S):
        async with await trio.open_tcp_stream(server.address, server.port) as stream:
            wire = query.to_wire()
            await stream.send_all(len(wire).to_bytes(2, "big") + wire)
            found = bytearray()
            while len(found) < 2 or len(found) < 2 + int.from_bytes(found[:2], "big"):
                data = await stream.receive_some(REPLY_LIMIT)
                if not data or int.from_bytes(found[:2], "big") > REPLY_LIMIT:
                    raise EOFError(server.address)
                found += data
            return bytes(found[2 : 2 + int.from_bytes(found[:2], "big")])


def _family(server: Server) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in server.address else socket.AF_INET
