"""An answer of others, as bytes that are ready for any client that asks the same.

dnspython takes a third of a second for an answer of 64 KiB, which a stranger can make as often as a
task asks for it. So an answer is taken apart once, rendered once, and from then on only patched:
the id, the flags and the question of each client, whose name is as long as the one that was asked
for, so that every compression pointer still points where it did; and the TTLs, whose places are
noted. That costs 10 us, and a quarter of one a record.

    header 12 | question | answer | authority | OPT, for who sent one
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from sandbox.network.answers import DATAGRAM_MAX, HEADER_BYTES, Message

HEADER = struct.Struct(">HHHHHH")
TTL = struct.Struct(">I")
RECORD = struct.Struct(">HHIH")
"""Type, class, TTL and length: what is between a record's name and its data."""

PASSED_ON = dns.flags.RD | dns.flags.CD
"""Flags of a query that its answer repeats."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of others. Names are equal whatever their case."""

    name: dns.name.Name
    rdtype: int
    is_dnssec_wanted: bool = False
    is_checking_disabled: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """What of an answer belongs to its question."""

    wire: bytes
    """Without OPT, and with an id and flags that mean nothing."""
    rcode: dns.rcode.Rcode
    question_end: int
    ttls_at: tuple[int, ...]
    fresh_s: int
    """How long its own TTLs allow to keep it."""
    since: float
    """When it came, on trio's clock."""


def question_of(query: Message) -> Question:
    asked = query.question[0]
    return Question(
        asked.name,
        asked.rdtype,
        is_dnssec_wanted=bool(query.ednsflags & dns.flags.DO),
        is_checking_disabled=bool(query.flags & dns.flags.CD),
    )


def keep(question: Question, reply: Message, now: float) -> Kept | None:
    """What belongs to the question: the chain that leads from its name, or the SOA of a no.

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
    wire = kept.to_wire()
    question_end = _after_name(wire, HEADER_BYTES) + 4
    return Kept(
        wire=wire,
        rcode=reply.rcode(),
        question_end=question_end,
        ttls_at=_ttls(wire, question_end),
        fresh_s=chain.minimum_ttl,
        since=now,
    )


def relay(query: Message, kept: Kept, now: float, limit: int) -> bytes:
    """The answer for one client that asked the same; TC and no records if it exceeds the limit."""
    flags = dns.flags.QR | dns.flags.RA | (query.flags & PASSED_ON) | kept.rcode
    opt = _opt(query)
    _, _, questions, answers, authorities, _ = HEADER.unpack_from(kept.wire)
    asked = query.question[0].name.to_wire()
    assert asked is not None
    body = bytearray(kept.wire)
    if len(body) + len(opt) > limit:
        flags |= dns.flags.TC
        answers = authorities = 0
        del body[kept.question_end :]
    else:
        age = int(now - kept.since)
        for at in kept.ttls_at:
            TTL.pack_into(body, at, max(0, TTL.unpack_from(body, at)[0] - age))
    HEADER.pack_into(body, 0, query.id, flags, questions, answers, authorities, bool(opt))
    body[HEADER_BYTES : HEADER_BYTES + len(asked)] = asked
    return bytes(body) + opt


def _is_wanted(records: dns.rrset.RRset, question: Question) -> bool:
    if records.rdtype in (question.rdtype, dns.rdatatype.CNAME):
        return True
    return question.is_dnssec_wanted and records.rdtype == dns.rdatatype.RRSIG


def _opt(query: Message) -> bytes:
    """For who knows EDNS: our size, and DO as it came (RFC 6891, 6.1.2; RFC 3225, 3)."""
    if query.edns < 0:
        return b""
    return b"\0" + RECORD.pack(dns.rdatatype.OPT, DATAGRAM_MAX, query.ednsflags & dns.flags.DO, 0)


# Of messages that were rendered here: nothing is checked.


def _ttls(wire: bytes, at: int) -> tuple[int, ...]:
    found = []
    while at < len(wire):
        fields = _after_name(wire, at)
        _, _, _, length = RECORD.unpack_from(wire, fields)
        found.append(fields + 4)
        at = fields + RECORD.size + length
    return tuple(found)


def _after_name(wire: bytes, at: int) -> int:
    while 0 < wire[at] < 0xC0:
        at += 1 + wire[at]
    return at + (2 if wire[at] else 1)
