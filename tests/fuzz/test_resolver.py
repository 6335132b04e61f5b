"""What tasks and other resolvers send: any bytes give an answer, an error or silence."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.name
import dns.rdatatype
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox.network.answers import (
    DATAGRAM_MAX,
    STREAM_LIMIT,
    answer,
    datagram_limit,
    empty,
    read,
    render,
)
from sandbox.network.forwarding import NO_ANSWER
from sandbox.network.names import RecordSet, find, labels, private_zone
from sandbox.network.relaying import Question, keep, question_of, relay
from sandbox.network.resolv_conf import SERVERS_MAX, servers_in
from tests.fuzz.hostile_bytes import hostile
from tests.unit.network import vpcs
from tests.unit.network.upstream import reply
from tests.unit.network.vpcs import CALLER

ZONE = vpcs.zone(
    {CALLER: "198.18.0.5"},
    enable_dns_hostnames=True,
    private_zones=[
        private_zone(
            "prod.local",
            {"web.prod.local": [RecordSet("A", tuple(f"10.0.0.{n}" for n in range(200)))]},
        )
    ],
)

NAMES = (
    "ip-10-0-0-5.ec2.internal",
    "5.0.0.10.in-addr.arpa",
    "ec2-198-18-0-5.compute-1.amazonaws.com",
    "web.prod.local",
    "www.example.com",
    ".",
)
QUERIES = [
    dns.message.make_query(name, kind, use_edns=edns, want_dnssec=edns == 0).to_wire()
    for name in NAMES
    for kind, edns in (("A", False), ("PTR", 0), ("ANY", 0), ("SOA", 1))
]


def told(wire: bytes) -> bytes | None:
    """What a client hears for a packet; a forwarded question is taken to fail."""
    query = read(wire)
    if query is None or isinstance(query, bytes):
        return query
    response = answer(query, ZONE, CALLER)
    if response is None:
        assert question_of(query) == question_of(query)
        response = empty(query)
        response.set_rcode(NO_ANSWER.rcode)
    assert len(render(response, STREAM_LIMIT)) <= STREAM_LIMIT
    small = render(response, datagram_limit(query))
    assert len(small) <= min(datagram_limit(query), DATAGRAM_MAX)
    return small


@given(hostile(QUERIES))
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\xc0\x0c\0\1\0\1")
@example(b"\0\1\1\0\0\1\0\0\0\0\0\0" + b"\x3f" * 300)
@example(b"\0\1\1\0\0\1\0\0\0\0\0\1\0\0\1\0\1\0\0\x29\x10\0\0\0\0\0\xff\xff")
@example(b"\0\1\1\0\0\1\0\0\0\0\0\1\0\0\1\0\1\0\0\xfa\0\xff\0\0\0\0\0\0")
def test_any_packet_is_answered_in_kind_or_not_at_all(wire: bytes) -> None:
    heard = told(wire)
    if heard is not None:
        assert heard[:2] == wire[:2]
        assert heard[2] & 0x80
        message = dns.message.from_wire(heard)
        assert message.flags & dns.flags.QR


OF_WWW = Question(dns.name.from_text("www.example.com."), dns.rdatatype.A)
ASKED = dns.message.make_query("www.example.com", "A", use_edns=0, id=1)
REPLIES = [
    reply(ASKED, "www.example.com. 60 IN A 192.0.2.1").to_wire(),
    reply(
        ASKED, "www.example.com. 60 IN CNAME a.example.", "a.example. 60 IN A 192.0.2.1"
    ).to_wire(),
    reply(ASKED, rcode="NXDOMAIN", soa=60).to_wire(),
]


@given(hostile(REPLIES))
def test_any_reply_of_another_resolver_is_taken_apart_or_is_none(wire: bytes) -> None:
    # As in forwarding: what dnspython cannot read, or is no answer to the question, is passed over.
    try:
        found = dns.message.from_wire(wire)
    except Exception:
        return
    if not ASKED.is_response(found) or (kept := keep(OF_WWW, found, now=0.0)) is None:
        return
    whole = dns.message.from_wire(relay(ASKED, kept, 10.0, STREAM_LIMIT))
    assert ASKED.is_response(whole)
    assert whole.answer == dns.message.from_wire(kept.wire).answer
    assert len(relay(ASKED, kept, 10.0, 512)) <= 512


@given(st.lists(st.binary(max_size=63)))
def test_any_name_is_known_or_not(labels_of: list[bytes]) -> None:
    for suffix in ((), *(labels(name) for name in NAMES)):
        find((*labels_of, *suffix), ZONE)


@given(hostile([b"nameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a b\n"]))
def test_any_text_has_a_few_name_servers_or_none(content: bytes) -> None:
    assert len(servers_in(content.decode(errors="replace"))) <= SERVERS_MAX
