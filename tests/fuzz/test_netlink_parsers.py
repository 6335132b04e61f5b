"""What comes out of a netlink socket: any bytes give values or the error that is documented."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox.errors import KernelError
from sandbox.kernel import ipset, nfnetlink, packetlog
from sandbox.kernel.conntrack import events_in
from sandbox.kernel.flows import (
    NEW,
    Counters,
    Flow,
    FlowTuple,
    delete_message,
    read_flow,
)
from sandbox.kernel.nfnetlink import Message, Refusal, attribute, batch, nested
from tests.fuzz.hostile_bytes import hostile


def udp(source: str, destination: str) -> FlowTuple:
    return FlowTuple(
        source=source, destination=destination, protocol=17, source_port=5000, destination_port=53
    )


def listed(source: str, destination: str) -> bytes:
    """A connection as the kernel lists it."""
    there = delete_message(Flow(original=udp(source, destination), reply=udp(source, destination)))
    back = delete_message(Flow(original=udp(destination, source), reply=udp(source, destination)))
    reply = attribute(2 | nfnetlink.NLA_F_NESTED, back.body[8:])
    counted = nested(9, attribute(1, struct.pack(">Q", 3)), attribute(2, struct.pack(">Q", 90)))
    times = nested(20, attribute(1, struct.pack(">Q", 5)), attribute(2, struct.pack(">Q", 6)))
    numbers = [attribute(kind, struct.pack(">I", 7)) for kind in (3, 7, 8, 11, 12)]
    return b"".join([there.body, reply, counted, times, *numbers])


BODIES = [listed("10.0.0.1", "10.0.0.2"), listed("fd00::1", "fd00::2")]
DATAGRAMS = [
    batch([Message(NEW, body) for body in BODIES], 1),
    batch([Message(NEW + 2, BODIES[0])], 1),
    struct.pack("=IHHIIi", 20, nfnetlink.NLMSG_ERROR, 0, 1, 0, -errno.ENOENT),
]


@contextmanager
def nothing_but_malformed() -> Iterator[None]:
    try:
        yield
    except KernelError as error:
        assert error.errno == errno.EBADMSG
        assert str(error).isprintable()


def test_the_seeds_are_good() -> None:
    flow = read_flow(BODIES[1])
    assert (flow.original, flow.reply) == (udp("fd00::1", "fd00::2"), udp("fd00::2", "fd00::1"))
    assert flow.original_counters == Counters(3, 90)
    assert (flow.started_at_ns, flow.stopped_at_ns) == (5, 6)
    assert [event.kind for event in events_in(DATAGRAMS[0])] == ["new", "new"]


@given(hostile(BODIES))
@example(BODIES[0][:-1])
@example(b"")
def test_a_connection_is_read_or_malformed(body: bytes) -> None:
    with nothing_but_malformed():
        flow = read_flow(body)
        for address in (flow.original.source, flow.reply.destination):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            socket.inet_pton(family, address)
        assert 0 <= flow.mark < 1 << 32
        assert read_flow(again(flow)).original == flow.original


def again(flow: Flow) -> bytes:
    """The connection's own tuple, as we would say it to the kernel, both ways."""
    body = delete_message(flow).body
    length = struct.unpack_from("=H", body, 4)[0]
    return body + attribute(2 | nfnetlink.NLA_F_NESTED, body[8 : 4 + length])


@given(hostile(DATAGRAMS))
@example(DATAGRAMS[0][:-1])
@example(b"\0" * 16)
def test_a_datagram_of_events_is_read_or_malformed(datagram: bytes) -> None:
    with nothing_but_malformed():
        for event in events_in(datagram):
            assert event.kind in ("new", "destroy")


@given(hostile(DATAGRAMS))
def test_answers_are_read_or_malformed_and_never_more_than_there_is(datagram: bytes) -> None:
    size = 0
    with nothing_but_malformed():
        for answer in nfnetlink.answers(datagram):
            size += nfnetlink.HEADER.size + len(answer.body)
            assert size <= len(datagram)
            with nothing_but_malformed():
                nfnetlink.refusal(answer)


FILL, _ = next(ipset.fill_messages("g1", [ipset.Member(f"10.0.0.{n}") for n in range(3)]))


@given(hostile([batch([FILL], 1)]), st.integers(1, 5000))
def test_an_echo_names_a_line_or_none_of_them(echo: bytes, number: int) -> None:
    assert ipset.refused_line(Refusal(number, echo)) >= 0
    assert str(ipset.described("IPSET_CMD_ADD", "g1", number)).isprintable()


@given(st.text(max_size=40), st.text(max_size=40), st.integers() | st.none(), st.integers())
@example("g1", "10.0.0.1/٣", None, 0)
@example("g1", "10.0.0.0/-1", None, 0)
@example("g1", "fe80::1%lo", None, 0)
def test_a_change_is_a_message_or_a_value_error(
    name: str, address: str, mark: int | None, mask: int
) -> None:
    change = ipset.Change("add", name, ipset.Member(address, mark, mask))
    try:
        [message] = ipset.messages([change])
    except ValueError:
        return
    assert len(message.body) % 4 == 0
    assert name.encode() in message.body


# Logged packets --------------------------------------------------------------------------------


def logged(protocol: int, payload: bytes) -> bytes:
    """A packet as the kernel hands it over."""
    parts = [
        attribute(1, struct.pack(">HBB", protocol, 2, 0)),
        attribute(3, struct.pack(">QQ", 1, 2)),
        attribute(10, b"prefix\0"),
        attribute(12, struct.pack(">I", 5)),
        attribute(9, payload),
    ]
    return batch([Message(packetlog.PACKET, struct.pack(">BBH", 2, 0, 7) + b"".join(parts))], 1)


PORTS = struct.pack(">HH", 5000, 53)
IPV4 = bytes.fromhex("4500001c0000400040110000") + bytes([10, 0, 0, 1, 10, 0, 0, 2])
IPV4_FRAGMENT = IPV4[:6] + b"\x00\x05" + IPV4[8:]
IPV4_OPTIONS = b"\x46" + IPV4[1:] + b"\x94\x04\0\0"
IPV6_HOPS = bytes.fromhex("60000000001000ff") + bytes(15) + b"\1" + bytes(15) + b"\2"
LOGGED = [
    logged(0x0800, IPV4 + PORTS),
    logged(0x0800, IPV4_FRAGMENT + PORTS),
    logged(0x0800, IPV4_OPTIONS + PORTS),
    logged(0x86DD, IPV6_HOPS[:6] + b"\x11\x40" + IPV6_HOPS[8:] + PORTS),
    logged(0x86DD, IPV6_HOPS[:6] + b"\0\x40" + IPV6_HOPS[8:] + b"\x11" + bytes(7) + PORTS),
    logged(
        0x86DD, IPV6_HOPS[:6] + b"\x2c\x40" + IPV6_HOPS[8:] + b"\x11\0\0\x09" + bytes(4) + PORTS
    ),
]


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        (LOGGED[0], ("10.0.0.1", "10.0.0.2", 17, 5000, 53, 28)),
        (LOGGED[1], ("10.0.0.1", "10.0.0.2", 17, 0, 0, 28)),
        (LOGGED[2], ("10.0.0.1", "10.0.0.2", 17, 5000, 53, 28)),
        (LOGGED[3], ("::1", "::2", 17, 5000, 53, 56)),
        (LOGGED[4], ("::1", "::2", 17, 5000, 53, 56)),
        (LOGGED[5], ("::1", "::2", 17, 0, 0, 56)),
    ],
)
def test_the_headers_of_a_logged_packet_are_read(
    datagram: bytes, expected: tuple[str, str, int, int, int, int]
) -> None:
    [(sequence, packet)] = packetlog.packets_in(datagram)
    assert sequence == 5
    assert packet == packetlog.LoggedPacket("prefix", *expected, 1_000_002_000)


@given(hostile(LOGGED))
@example(logged(0x0800, IPV4[:19]))
@example(logged(0x86DD, IPV6_HOPS[:39]))
@example(logged(0x0806, bytes(28)))
@example(logged(0x0800, b"\x4f" + IPV4[1:]))
def test_a_logged_packet_is_read_or_lost_or_malformed(datagram: bytes) -> None:
    with nothing_but_malformed():
        for sequence, packet in packetlog.packets_in(datagram):
            assert sequence is None or 0 <= sequence < 1 << 32
            if isinstance(packet, packetlog.LoggedPacket):
                assert 0 <= packet.source_port <= 65535
                assert 0 <= packet.bytes <= 40 + 65535
                socket.inet_pton(
                    socket.AF_INET6 if ":" in packet.source else socket.AF_INET, packet.source
                )
            else:
                assert packet == packetlog.LostPackets(1)
