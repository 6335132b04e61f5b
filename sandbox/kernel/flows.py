"""A tracked connection as a value, and the messages about connections as bytes. Pure.

The messages are those of linux/netfilter/nfnetlink_conntrack.h; numbers are in network order. They
are made and read by hand because a table has tens of thousands of entries: `scripts/bench sets`.
What a connection is says its original tuple, the first packet's.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

import msgspec

from sandbox.kernel.nfnetlink import (
    NFGEN,
    NFNL_SUBSYS_CTNETLINK,
    Message,
    attribute,
    attributes,
    malformed,
    message_type,
    nested,
    number,
)

# linux/netfilter/nfnetlink_conntrack.h
NEW = message_type(NFNL_SUBSYS_CTNETLINK, 0)
GET = message_type(NFNL_SUBSYS_CTNETLINK, 1)
DELETE = message_type(NFNL_SUBSYS_CTNETLINK, 2)
CTA_TUPLE_ORIG = 1
CTA_TUPLE_REPLY = 2
CTA_STATUS = 3
CTA_TIMEOUT = 7
CTA_MARK = 8
CTA_COUNTERS_ORIG = 9
CTA_COUNTERS_REPLY = 10
CTA_ID = 12
CTA_TIMESTAMP = 20
CTA_MARK_MASK = 21
CTA_FILTER = 25
CTA_TUPLE_IP = 1
CTA_TUPLE_PROTO = 2
CTA_IP_V4_SRC = 1
CTA_IP_V4_DST = 2
CTA_IP_V6_SRC = 3
CTA_IP_V6_DST = 4
CTA_PROTO_NUM = 1
CTA_PROTO_SRC_PORT = 2
CTA_PROTO_DST_PORT = 3
CTA_PROTO_ICMP_ID = 4
CTA_PROTO_ICMP_TYPE = 5
CTA_PROTO_ICMP_CODE = 6
ICMPV6 = 3
"""What CTA_PROTO_ICMPV6_ID and its like are more than those of ICMP."""
CTA_COUNTERS_PACKETS = 1
CTA_COUNTERS_BYTES = 2
CTA_TIMESTAMP_START = 1
CTA_TIMESTAMP_STOP = 2
CTA_FILTER_ORIG_FLAGS = 1
CTA_FILTER_REPLY_FLAGS = 2
FILTER_SOURCE = struct.pack("=I", 1 << 0)
"""Of a tuple, only the source address is compared. In the host's order."""

# linux/netfilter/nf_conntrack_common.h
IPS_SEEN_REPLY = 1 << 1
IPS_ASSURED = 1 << 2
IPS_SRC_NAT = 1 << 4
IPS_DST_NAT = 1 << 5


class FlowTuple(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One direction of a connection, as its packets say it."""

    source: str
    destination: str
    protocol: int
    """Its number, as in /etc/protocols."""
    source_port: int | None = None
    destination_port: int | None = None
    """None: the protocol has none."""
    icmp_type: int | None = None
    icmp_code: int | None = None
    icmp_id: int | None = None
    """All three, or none of them. Of an echo; also ICMPv6's."""


class Counters(msgspec.Struct, frozen=True, gc=False):
    packets: int
    bytes: int


class Flow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A tracked connection. A struct of msgspec: there are tens of thousands, and making a
    dataclass that is frozen takes four times as long."""

    original: FlowTuple
    """Of the first packet, before any translation."""
    reply: FlowTuple
    """Of the packets that are taken for answers: where addresses are translated, not the mirror
    image."""
    status: int = 0
    """IPS_ bits."""
    mark: int = 0
    timeout_s: int | None = None
    """It is forgotten after so long without a packet; None in events."""
    original_counters: Counters | None = None
    reply_counters: Counters | None = None
    started_at_ns: int | None = None
    stopped_at_ns: int | None = None
    """Since 1970; the second one only in a destroy event."""
    id: int | None = None
    """Other than its tuple, not that of another connection later."""

    @property
    def has_seen_reply(self) -> bool:
        return bool(self.status & IPS_SEEN_REPLY)

    @property
    def is_assured(self) -> bool:
        """It is not given up for a new one when the table is full."""
        return bool(self.status & IPS_ASSURED)


def is_of(flow: Flow, address: bytes) -> bool:
    """Is it from or to the address? An address that is translated counts as what it is here."""
    return address in (packed(flow.original.source), packed(flow.reply.source))


# Reading ---------------------------------------------------------------------------------------


def read_flow(body: bytes) -> Flow:
    """From the netfilter header on. KernelError (EBADMSG) for what is not a connection."""
    found = attributes(body[NFGEN.size :])
    times = attributes(found.get(CTA_TIMESTAMP, b""))
    return Flow(
        original=_tuple(found, CTA_TUPLE_ORIG),
        reply=_tuple(found, CTA_TUPLE_REPLY),
        status=number(found, CTA_STATUS, 4) or 0,
        mark=number(found, CTA_MARK, 4) or 0,
        timeout_s=number(found, CTA_TIMEOUT, 4),
        original_counters=_counters(found, CTA_COUNTERS_ORIG),
        reply_counters=_counters(found, CTA_COUNTERS_REPLY),
        started_at_ns=number(times, CTA_TIMESTAMP_START, 8),
        stopped_at_ns=number(times, CTA_TIMESTAMP_STOP, 8),
        id=number(found, CTA_ID, 4),
    )


def _tuple(found: Mapping[int, bytes], kind: int) -> FlowTuple:
    both = attributes(found.get(kind, b""))
    addresses = attributes(both.get(CTA_TUPLE_IP, b""))
    protocol = attributes(both.get(CTA_TUPLE_PROTO, b""))
    source, destination = _addresses(addresses)
    protocol_number = number(protocol, CTA_PROTO_NUM, 1)
    if protocol_number is None:
        raise malformed("tuple without a protocol")
    icmp = ICMPV6 if protocol_number == socket.IPPROTO_ICMPV6 else 0
    return FlowTuple(
        source=source,
        destination=destination,
        protocol=protocol_number,
        source_port=number(protocol, CTA_PROTO_SRC_PORT, 2),
        destination_port=number(protocol, CTA_PROTO_DST_PORT, 2),
        icmp_type=number(protocol, CTA_PROTO_ICMP_TYPE + icmp, 1),
        icmp_code=number(protocol, CTA_PROTO_ICMP_CODE + icmp, 1),
        icmp_id=number(protocol, CTA_PROTO_ICMP_ID + icmp, 2),
    )


def _addresses(found: Mapping[int, bytes]) -> tuple[str, str]:
    family, kinds = socket.AF_INET, (CTA_IP_V4_SRC, CTA_IP_V4_DST)
    if CTA_IP_V6_SRC in found:
        family, kinds = socket.AF_INET6, (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    try:
        return (
            socket.inet_ntop(family, found[kinds[0]]),
            socket.inet_ntop(family, found[kinds[1]]),
        )
    except (KeyError, ValueError) as error:
        raise malformed("tuple without two addresses of one family") from error


def _counters(found: Mapping[int, bytes], kind: int) -> Counters | None:
    if kind not in found:
        return None
    counted = attributes(found[kind])
    return Counters(
        number(counted, CTA_COUNTERS_PACKETS, 8) or 0, number(counted, CTA_COUNTERS_BYTES, 8) or 0
    )


# Asking ----------------------------------------------------------------------------------------


def get_message(mark: int, mask: int) -> Message:
    """Connections of both address families; of all marks if `mask` is 0."""
    return Message(GET, NFGEN.pack(socket.AF_UNSPEC, 0, 0) + (_marked(mark, mask) if mask else b""))


def delete_message(flow: Flow) -> Message:
    """By its original tuple, and by its id if it has one."""
    original = flow.original
    body = NFGEN.pack(family_of(original.source), 0, 0) + nested(
        CTA_TUPLE_ORIG, _ip_attribute(original), _protocol_attribute(original)
    )
    if flow.id is not None:
        body += attribute(CTA_ID, flow.id.to_bytes(4, "big"))
    return Message(DELETE, body)


def set_mark_message(flow: Flow, mark: int) -> Message:
    """Of the connection with this original tuple, whatever its id: the kernel does not compare."""
    body = NFGEN.pack(family_of(flow.original.source), 0, 0) + nested(
        CTA_TUPLE_ORIG, _ip_attribute(flow.original), _protocol_attribute(flow.original)
    )
    return Message(NEW, body + attribute(CTA_MARK, mark.to_bytes(4, "big")))


def flush_mark_message(mark: int, mask: int) -> Message:
    if mask == 0:
        raise ValueError("a mask of 0 is every connection's")
    return Message(DELETE, NFGEN.pack(socket.AF_UNSPEC, 0, 0) + _marked(mark, mask))


def flush_source_messages(address: str) -> list[Message]:
    """Of connections from an IPv4 address, and of those to it: there it is the reply's source, also
    behind a translation."""
    source = nested(CTA_TUPLE_IP, attribute(CTA_IP_V4_SRC, packed(address)))
    # Without a version the family is not looked at, and then neither are addresses: all would go.
    header = NFGEN.pack(socket.AF_INET, 1, 0)
    return [
        Message(
            DELETE,
            header + nested(kind, source) + nested(CTA_FILTER, attribute(flags, FILTER_SOURCE)),
        )
        for kind, flags in (
            (CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS),
            (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS),
        )
    ]


def _marked(mark: int, mask: int) -> bytes:
    if mark & ~mask:
        raise ValueError(f"no connection has the mark {mark:#x} in {mask:#x}")
    return attribute(CTA_MARK, mark.to_bytes(4, "big")) + attribute(
        CTA_MARK_MASK, mask.to_bytes(4, "big")
    )


def _ip_attribute(wanted: FlowTuple) -> bytes:
    six = CTA_IP_V6_SRC - CTA_IP_V4_SRC if ":" in wanted.source else 0
    return nested(
        CTA_TUPLE_IP,
        attribute(CTA_IP_V4_SRC + six, packed(wanted.source)),
        attribute(CTA_IP_V4_DST + six, packed(wanted.destination)),
    )


def _protocol_attribute(wanted: FlowTuple) -> bytes:
    icmp = ICMPV6 if wanted.protocol == socket.IPPROTO_ICMPV6 else 0
    values = (
        (CTA_PROTO_NUM, wanted.protocol, 1),
        (CTA_PROTO_SRC_PORT, wanted.source_port, 2),
        (CTA_PROTO_DST_PORT, wanted.destination_port, 2),
        (CTA_PROTO_ICMP_ID + icmp, wanted.icmp_id, 2),
        (CTA_PROTO_ICMP_TYPE + icmp, wanted.icmp_type, 1),
        (CTA_PROTO_ICMP_CODE + icmp, wanted.icmp_code, 1),
    )
    return nested(
        CTA_TUPLE_PROTO,
        *(
            attribute(kind, value.to_bytes(size, "big"))
            for kind, value, size in values
            if value is not None
        ),
    )


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def packed(address: str) -> bytes:
    try:
        return socket.inet_pton(family_of(address), address)
    except OSError as error:
        raise ValueError(f"not an address: {address!r}") from error
