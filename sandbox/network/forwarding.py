"""Names of others: asked of the host's resolvers, from the host's own namespace.

Each question goes out in a message of our own, from a port that the kernel draws and with an id
that dnspython draws, and only what answers that question from that address is taken; what else
comes to the port is passed over. Of an answer only the chain that leads from the name is kept,
records of other names never reach a client or the cache.

    for each server, those that failed lately last:
        UDP, 2 s, twice; truncated: TCP, 4 s        an answer or NXDOMAIN ends it
    nobody: SERVFAIL, at once when the host has no server

Questions that are the same are asked once, and answers are kept: by their TTL, but a minute at
most, so that a change is seen, in bytes of a bounded number and size. Failures are kept for a
second (RFC 9520, 3.2: at least that). What all callers may keep waiting is bounded, and for each.

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
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import trio

from sandbox.network.admission import Places
from sandbox.network.answers import Message, empty
from sandbox.network.resolv_conf import Server

UDP_TIMEOUT_S = 2.0
UDP_TRIES = 2
TCP_TIMEOUT_S = 4.0
TOTAL_TIMEOUT_S = 12.0
"""Two servers that are silent and a third one that is not; clients have given up by then."""

UDP_PAYLOAD = 1232
"""Bytes that no path fragments (RFC 9715); a longer answer comes over TCP."""

FAILED_LATELY_S = 30.0

FORWARDS_PER_CALLER = 64
FORWARDS_TOTAL = 256
"""A descriptor each."""

KEPT_MAX_S = 60.0
FAILURE_KEPT_S = 1.0
ENTRIES_MAX = 2048
ENTRY_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of others. Names are equal whatever their case."""

    name: dns.name.Name
    rdtype: int
    is_dnssec_wanted: bool = False
    is_checking_disabled: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    rcode: dns.rcode.Rcode
    why: str


Reply = Message | Failure
"""An answer of which only what belongs to the question is left, or why there is none."""

OFF = Failure(dns.rcode.REFUSED, "forwarding is off")
NO_SERVER = Failure(dns.rcode.SERVFAIL, "the host has no name server")
NO_ANSWER = Failure(dns.rcode.SERVFAIL, "no name server of the host has answered")
TOO_MANY = Failure(dns.rcode.SERVFAIL, "too many questions are waiting for an answer")


def question_of(query: Message) -> Question:
    asked = query.question[0]
    return Question(
        asked.name,
        asked.rdtype,
        is_dnssec_wanted=bool(query.ednsflags & dns.flags.DO),
        is_checking_disabled=bool(query.flags & dns.flags.CD),
    )


def relayed(query: Message, reply: Message) -> Message:
    """The reply as an answer to the client's query."""
    response = empty(query)
    response.set_rcode(reply.rcode())
    response.answer, response.authority = reply.answer, reply.authority
    return response


# What is kept of an answer ------------------------------------------------------------------


def pruned(question: Question, reply: Message) -> tuple[Message, int] | None:
    """What of a reply belongs to the question, and for how many seconds it may be kept.

    None for what is no answer to it: an error, a chain that does not end, records at a name that is
    said not to exist.
    """
    if reply.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        return None
    if not isinstance(reply, dns.message.QueryMessage):
        return None
    try:
        chain = reply.resolve_chaining()
    except dns.exception.DNSException:
        return None
    kept = dns.message.QueryMessage(id=0)
    kept.flags = dns.flags.QR
    kept.set_rcode(reply.rcode())
    kept.question = list(reply.question)
    owners = {chain.canonical_name, *(alias.name for alias in chain.cnames)}
    kept.answer = [
        records
        for records in reply.answer
        if records.name in owners and _is_wanted(records, question)
    ]
    if chain.answer is None:
        kept.authority = [
            records
            for records in reply.authority
            if chain.canonical_name.is_subdomain(records.name)
            and (records.rdtype == dns.rdatatype.SOA or question.is_dnssec_wanted)
        ]
    return kept, chain.minimum_ttl


def _is_wanted(records: dns.rrset.RRset, question: Question) -> bool:
    if records.rdtype in (question.rdtype, dns.rdatatype.CNAME):
        return True
    return question.is_dnssec_wanted and records.rdtype == dns.rdatatype.RRSIG


@dataclass(frozen=True, slots=True)
class Entry:
    kept: bytes | Failure
    since: float
    until: float


class Cache:
    """Answers by question, as bytes: their size is known, that of objects is what a stranger made
    it. The one that was not used for longest goes first."""

    def __init__(self, entries_max: int = ENTRIES_MAX) -> None:
        self._entries: OrderedDict[Question, Entry] = OrderedDict()
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, question: Question, now: float) -> Reply | None:
        """With what is left of its records' TTLs."""
        entry = self._entries.get(question)
        if entry is None:
            return None
        if entry.until <= now:
            del self._entries[question]
            return None
        self._entries.move_to_end(question)
        if isinstance(entry.kept, Failure):
            return entry.kept
        reply = dns.message.from_wire(entry.kept)
        age = int(now - entry.since)
        for records in (*reply.answer, *reply.authority):
            records.ttl = max(0, records.ttl - age)
        return reply

    def put(self, question: Question, kept: bytes | Failure, seconds: float, now: float) -> None:
        if seconds <= 0 or (isinstance(kept, bytes) and len(kept) > ENTRY_BYTES_MAX):
            return
        self._entries[question] = Entry(kept, now, now + min(seconds, KEPT_MAX_S))
        self._entries.move_to_end(question)
        if len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)


# Asking -------------------------------------------------------------------------------------


class _Flight:
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.reply: Reply | None = None
        """None after its end: whoever asked was cancelled."""


class Forwarder:
    """One for all resolvers of an agent. `servers` is called for each question; None: it is off."""

    def __init__(self, servers: Callable[[], Sequence[Server]] | None) -> None:
        self._servers = servers
        self._cache = Cache()
        self._places = Places(per_caller=FORWARDS_PER_CALLER, total=FORWARDS_TOTAL)
        self._flights: dict[Question, _Flight] = {}
        self._failed_at: dict[Server, float] = {}
        self._backend: Any = dns.asyncbackend.get_backend("trio")

    async def ask(self, question: Question, caller: Hashable) -> Reply:
        """Never raises; takes TOTAL_TIMEOUT_S at most, or twice that after a cancelled other."""
        if self._servers is None:
            return OFF
        if (known := self._cache.get(question, trio.current_time())) is not None:
            return known
        if not self._places.take(caller):
            return TOO_MANY
        try:
            return await self._ask_once(question)
        finally:
            self._places.leave(caller)

    async def _ask_once(self, question: Question) -> Reply:
        while (flight := self._flights.get(question)) is not None:
            await flight.ended.wait()
            if flight.reply is not None:
                return flight.reply
        flight = self._flights[question] = _Flight()
        try:
            flight.reply = await self._ask_and_keep(question)
            return flight.reply
        finally:
            del self._flights[question]
            flight.ended.set()

    async def _ask_and_keep(self, question: Question) -> Reply:
        reply, seconds = await self._ask_servers(question)
        kept = reply if isinstance(reply, Failure) else reply.to_wire()
        self._cache.put(question, kept, seconds, trio.current_time())
        return reply

    async def _ask_servers(self, question: Question) -> tuple[Reply, float]:
        """An answer and how long it may be kept."""
        servers = self._in_order(trio.current_time())
        if not servers:
            return NO_SERVER, 0
        with trio.move_on_after(TOTAL_TIMEOUT_S):
            for server in servers:
                for _ in range(UDP_TRIES):
                    reply = await self._exchange(server, question)
                    if reply is not None:
                        break
                answered = reply and pruned(question, reply)
                if answered:
                    self._failed_at.pop(server, None)
                    return answered
                self._failed_at[server] = trio.current_time()
        return NO_ANSWER, FAILURE_KEPT_S

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

    async def _exchange(self, server: Server, question: Question) -> Message | None:
        """What the server says to the question, whatever it is; None for silence."""
        query = dns.message.make_query(
            question.name,
            dns.rdatatype.RdataType.make(question.rdtype),
            use_edns=0,
            payload=UDP_PAYLOAD,
            want_dnssec=question.is_dnssec_wanted,
        )
        if question.is_checking_disabled:
            query.flags |= dns.flags.CD
        try:
            # Connected: the kernel lets nobody else's packets in, and says when nobody listens.
            async with await self._backend.make_socket(
                socket.AF_INET6 if ":" in server.address else socket.AF_INET,
                socket.SOCK_DGRAM,
                destination=(server.address, server.port),
            ) as given:
                reply = await dns.asyncquery.udp(
                    query,
                    server.address,
                    port=server.port,
                    timeout=UDP_TIMEOUT_S,
                    sock=given,
                    ignore_unexpected=True,
                    ignore_errors=True,
                )
            if reply.flags & dns.flags.TC:
                reply = await dns.asyncquery.tcp(
                    query,
                    server.address,
                    port=server.port,
                    timeout=TCP_TIMEOUT_S,
                    backend=self._backend,
                )
        # What a server can do wrong has no list: dnspython's own errors, those of sockets, trio's
        # of streams, and what a message leads a parser to. All of it is no answer.
        except Exception:
            return None
        return reply
