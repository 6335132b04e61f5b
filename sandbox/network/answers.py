"""From the bytes of a query to the bytes of its answer, but for what others have to be asked.

Pure, on dnspython's messages. A stranger's bytes give a query, an error to send back, or silence;
what costs time in proportion to what they claim (records in sections where a query has none) is
refused by its header, before anything is parsed.

    header too short, or not a query    silence: two servers must never answer each other
    not readable, not one question      FORMERR
    another opcode                      NOTIMP
    another EDNS version                BADVERS
    not of the VPC, another class,
      a zone transfer, DNS is off       REFUSED
    ANY                                 one HINFO (RFC 8482)
    ours, not there                     NXDOMAIN with the zone's SOA
    ours, not of that type              nothing, with the zone's SOA

An answer longer than the client can take has only TC in it, and is asked for again over TCP.
"""

from __future__ import annotations

from functools import lru_cache

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from sandbox.network.names import TTL_S, Found, Labels, RecordSet, Zone, find, text

Message = dns.message.Message

QUERY_LIMIT = 4096
"""Bytes of a query. One question is at most 271; the rest is room for EDNS options."""

STREAM_LIMIT = 65535
DATAGRAM_MIN = 512
DATAGRAM_MAX = 4096
"""Bytes of an answer in a datagram, whatever the client could take: EC2's resolver has the same."""

HEADER_BYTES = 12
ADDITIONAL_MAX = 2
"""OPT, and a signature that nobody here can check."""

ANSWERS_MAX = 8
"""Addresses of a service in one answer, as in Cloud Map (Developer Guide, "Routing policy")."""

META = range(128, 256)
"""Types of a question that are no type of a record (RFC 6895, 3.1); ANY is one of them."""


# Bytes --------------------------------------------------------------------------------------


def read(wire: bytes) -> Message | bytes | None:
    """A query, or the error that is its answer, or None: nothing is answered."""
    if len(wire) < HEADER_BYTES or wire[2] & 0x80:
        return None
    if (wire[2] >> 3) & 0xF != dns.opcode.QUERY:
        return refusal(wire, dns.rcode.NOTIMP)
    questions, answers, authorities, additional = (
        int.from_bytes(wire[at : at + 2], "big") for at in (4, 6, 8, 10)
    )
    is_plain = (questions, answers, authorities) == (1, 0, 0) and additional <= ADDITIONAL_MAX
    if not is_plain or len(wire) > QUERY_LIMIT:
        return refusal(wire, dns.rcode.FORMERR)
    try:
        query = dns.message.from_wire(wire)
    except dns.exception.DNSException:
        return refusal(wire, dns.rcode.FORMERR)
    return query


def refusal(wire: bytes, rcode: int) -> bytes:
    """An error without a question, for a query of which only the header is known to be one."""
    flags = ((wire[2] & 0x79) | 0x80) << 8 | 0x80 | rcode  # opcode and RD are the query's; QR, RA
    return wire[:2] + flags.to_bytes(2, "big") + bytes(8)


def render(response: Message, limit: int) -> bytes:
    """Its bytes, or those of the same without records and with TC when they exceed the limit."""
    try:
        return response.to_wire(max_size=limit)
    except dns.exception.TooBig:
        response.answer, response.authority, response.additional = [], [], []
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=max(limit, DATAGRAM_MIN))


def datagram_limit(query: Message) -> int:
    """What the client takes in a datagram (RFC 6891, 6.2.3: less than 512 is taken for 512)."""
    if query.edns < 0:
        return DATAGRAM_MIN
    return min(max(query.payload, DATAGRAM_MIN), DATAGRAM_MAX)


# Answers ------------------------------------------------------------------------------------


def answer(query: Message, zone: Zone, caller: str) -> Message | None:
    """The answer to a query that was read; None if somebody else is to be asked."""
    question = query.question[0]
    if query.edns > 0:
        return failed(query, dns.rcode.BADVERS)
    if not zone.is_on or caller not in zone.callers:
        return failed(query, dns.rcode.REFUSED, "not a resolver of this address")
    if question.rdclass != dns.rdataclass.IN or not _is_answered(question.rdtype):
        return failed(query, dns.rcode.REFUSED, "neither this class nor this type")
    found = find(labels_of(question.name), zone)
    if found is not None:
        return _known(query, found)
    if question.rdtype == dns.rdatatype.ANY:
        return _minimal(query)
    if not query.flags & dns.flags.RD:
        return failed(query, dns.rcode.REFUSED, "others are asked only if recursion is desired")
    return None


def empty(query: Message) -> Message:
    """What every answer begins with."""
    return dns.message.make_response(query, recursion_available=True, our_payload=DATAGRAM_MAX)


def failed(query: Message, rcode: dns.rcode.Rcode, why: str | None = None) -> Message:
    """An error, and for who knows EDNS why (RFC 8914)."""
    response = empty(query)
    response.set_rcode(rcode)
    if why is not None and query.edns == 0:
        reason = dns.edns.EDEOption(dns.edns.EDECode.OTHER, why)
        response.use_edns(0, 0, DATAGRAM_MAX, options=[reason])
    return response


def labels_of(name: dns.name.Name) -> Labels:
    return tuple(label.lower() for label in name.labels[:-1])


def _is_answered(rdtype: int) -> bool:
    is_meta = rdtype in META or rdtype == dns.rdatatype.OPT or rdtype == dns.rdatatype.NONE
    return not is_meta or rdtype == dns.rdatatype.ANY


def _known(query: Message, found: Found) -> Message:
    question = query.question[0]
    if found.records is not None and question.rdtype == dns.rdatatype.ANY:
        return _minimal(query)
    response = empty(query)
    soa = _soa(found.origin)
    if found.records is None:
        response.set_rcode(dns.rcode.NXDOMAIN)
    elif question.rdtype == dns.rdatatype.SOA and labels_of(question.name) == found.origin:
        response.answer.append(soa)
        return response
    for records in found.records or ():
        if records.values and question.rdtype == dns.rdatatype.from_text(records.kind):
            response.answer.append(_records(question.name, records, query.id))
            return response
    response.authority.append(soa)
    return response


def _records(owner: dns.name.Name, records: RecordSet, query_id: int) -> dns.rrset.RRset:
    """At most eight, and others first in the next answer: the id is a number that clients draw."""
    values = records.values
    first = query_id % len(values)
    chosen = (values[first:] + values[:first])[:ANSWERS_MAX]
    return dns.rrset.from_rdata_list(
        owner, records.ttl_s, [_parsed(records.kind, value) for value in chosen]
    )


# Text costs dnspython 50 to 100 us; both are asked for again and again, and never changed.


@lru_cache(maxsize=4096)
def _parsed(kind: str, value: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text("IN", kind, value)


@lru_cache(maxsize=256)
def _soa(origin: Labels) -> dns.rrset.RRset:
    """What says how long a no holds. Names of a server and a person that need not exist."""
    zone = text(origin) if origin else "."
    parent = zone if origin else "invalid."
    value = f"ns.{parent} hostmaster.{parent} 1 3600 900 86400 {TTL_S}"
    return dns.rrset.from_text(zone, TTL_S, "IN", "SOA", value)


def _minimal(query: Message) -> Message:
    """RFC 8482, 4.2: ANY tells nobody more than that the name is there."""
    response = empty(query)
    name = query.question[0].name
    response.answer.append(dns.rrset.from_text(name, TTL_S, "IN", "HINFO", '"RFC8482" ""'))
    return response
