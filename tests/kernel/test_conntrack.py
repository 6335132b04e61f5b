"""Tracked connections of real sockets between two throw-away network namespaces."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio
from pyroute2 import NFCTSocket

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.conntrack import Conntrack, FlowEvent, FlowEvents, Lost
from sandbox.kernel.flows import Flow, FlowTuple, flush_source_messages
from sandbox.kernel.netfilter import Chain, Iptables, Rule, RuleSet, Table
from sandbox.kernel.netlink import Netlink, VethEnd
from sandbox.kernel.nfnetlink import BATCH_MAX, Nfnetlink
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

NEAR = VethEnd(name="sbtest0", mac="02:00:00:00:00:01")
FAR = VethEnd(name="eth0", mac="02:00:00:00:00:02")
NEAR_ADDRESSES = ("10.0.0.1/24", "10.0.0.2/24", "fd00::1/64", "fd00::2/64")
FAR_ADDRESSES = ("10.0.0.10/24", "10.0.0.11/24", "fd00::10/64", "fd00::11/64")

UDP, TCP = socket.IPPROTO_UDP, socket.IPPROTO_TCP
ICMP, ICMPV6 = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6
GROUP_BITS = 0xFFFF0000

SYSCTLS = Path("/proc/sys/net/netfilter")
TIMES = SYSCTLS / "nf_conntrack_timestamp"
HAS_TIMES = TIMES.exists()  # CONFIG_NF_CONNTRACK_TIMESTAMP


@pytest.fixture
def peer(inside: KernelThread) -> Iterator[KernelThread]:
    """Another namespace, one link away from `inside`, where nothing is tracked."""
    with KernelThread("peer") as thread:
        thread.call(native.unshare, native.CLONE_NEWNET)
        fd = thread.call(os.open, "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb"):
            inside.call(make_near_end, fd)
        thread.call(make_far_end)
        yield thread


def make_near_end(far_netns_fd: int) -> None:
    with Netlink() as netlink:
        link = netlink.create_veth(NEAR, FAR, far_netns_fd=far_netns_fd, mtu=1500)
        add_addresses(netlink, link.index, NEAR_ADDRESSES)


def make_far_end() -> None:
    with Netlink() as netlink:
        link = netlink.find(FAR.name)
        assert link is not None
        netlink.set_up(link.index)
        add_addresses(netlink, link.index, FAR_ADDRESSES)


def add_addresses(netlink: Netlink, index: int, addresses: Iterable[str]) -> None:
    for address in addresses:
        netlink.add_address(index, ip_interface(address))
    for network in ("10.0.0.0/24", "fd00::/64"):
        netlink.add_link_route(ip_network(network), index)


MARKED = (
    ("-p", "udp", "--dport", "7001", "-j", "CONNMARK", "--set-mark", "0x10005"),
    ("-p", "udp", "--dport", "7002", "-j", "CONNMARK", "--set-mark", "0x20005"),
)


def rules(*chains: Chain, family: Any = "inet") -> RuleSet:
    return RuleSet(tables=(Table("mangle", chains),), family=family)


@pytest.fixture
def backend(tmp_path: Path) -> Iptables:
    return Iptables.detect(str(tmp_path / "lock"))


@pytest.fixture
def tracked(inside: KernelThread, backend: Iptables) -> KernelThread:
    """`inside`, with marks, counters and times; nothing is tracked where no rule asks for it."""
    for family in ("inet", "inet6"):
        inside.call(backend.load, marking(family))
    inside.call(SYSCTLS.joinpath("nf_conntrack_acct").write_text, "1")
    if HAS_TIMES:
        inside.call(TIMES.write_text, "1")
    return inside


def marking(family: Any = "inet") -> RuleSet:
    return rules(Chain("OUTPUT", MARKED, "ACCEPT"), Chain("INPUT", MARKED, "ACCEPT"), family=family)


@pytest.fixture
def conntrack(tracked: KernelThread) -> Iterator[Conntrack]:
    """Opened inside; the tests use it from their own thread, which stays outside."""
    with tracked.call(Conntrack) as opened:
        yield opened


def udp(address: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    opened.bind((address, port))
    opened.settimeout(0.3)
    return opened


def send(thread: KernelThread, source: str, destination: str, port: int = 7000) -> None:
    with thread.call(udp, source, 5000) as sender:
        sender.sendto(b"hello", (destination, port))


def send_to_many(count: int, port: int = 7001) -> None:
    """As many connections on the loopback."""
    with udp("127.0.0.1", 5000) as sender:
        for number in range(count):
            sender.sendto(b"", (f"127.1.{number >> 8}.{number & 255}", port))


def ends(flows: Iterable[Flow]) -> set[tuple[str, str]]:
    return {(flow.original.source, flow.original.destination) for flow in flows}


# What is listed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("near", "far", "ip_bytes"), [("10.0.0.1", "10.0.0.10", 20), ("fd00::1", "fd00::10", 40)]
)
def test_a_connection_is_listed_with_all_that_is_known_of_it(
    tracked: KernelThread,
    peer: KernelThread,
    conntrack: Conntrack,
    near: str,
    far: str,
    ip_bytes: int,
) -> None:
    before = time.time_ns()
    with peer.call(udp, far, 7001) as server, tracked.call(udp, near, 5000) as client:
        client.sendto(b"hello", (far, 7001))
        server.sendto(b"hi", server.recvfrom(64)[1])
        client.recv(64)
    [flow] = [each for each in conntrack.flows() if each.original.protocol == UDP]
    assert flow.original == FlowTuple(
        source=near, destination=far, protocol=UDP, source_port=5000, destination_port=7001
    )
    assert flow.reply == FlowTuple(
        source=far, destination=near, protocol=UDP, source_port=7001, destination_port=5000
    )
    assert flow.mark == 0x10005
    assert flow.has_seen_reply
    assert not flow.is_assured
    assert flow.timeout_s is not None
    assert 0 < flow.timeout_s <= 180
    assert flow.original_counters is not None
    assert flow.reply_counters is not None
    assert (flow.original_counters.packets, flow.original_counters.bytes) == (1, ip_bytes + 8 + 5)
    assert (flow.reply_counters.packets, flow.reply_counters.bytes) == (1, ip_bytes + 8 + 2)
    assert flow.stopped_at_ns is None
    if HAS_TIMES:
        assert flow.started_at_ns is not None
        assert before - 10**9 < flow.started_at_ns < time.time_ns() + 10**9
    else:
        assert flow.started_at_ns is None


def test_a_tcp_connection_is_assured(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack
) -> None:
    with peer.call(socket.create_server, ("10.0.0.10", 80)) as server:
        connect = socket.create_connection
        with tracked.call(connect, ("10.0.0.10", 80)) as client, server.accept()[0] as accepted:
            accepted.sendall(b"x")
            client.recv(1)
            [flow] = conntrack.flows()
    assert (flow.original.protocol, flow.original.destination_port) == (TCP, 80)
    assert flow.is_assured
    assert flow.timeout_s is not None
    assert flow.timeout_s > 400_000


def ping(address: str) -> None:
    """An echo request with id 0x1234."""
    family, protocol, kind = socket.AF_INET, ICMP, 8
    if ":" in address:
        family, protocol, kind = socket.AF_INET6, ICMPV6, 128
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as opened:
        message = struct.pack(">BBHHH", kind, 0, 0, 0x1234, 1)
        checksum = 0xFFFF - sum(struct.unpack(">4H", message))  # the kernel makes ICMPv6's
        opened.sendto(struct.pack(">BBHHH", kind, 0, checksum & 0xFFFF, 0x1234, 1), (address, 0))


@pytest.mark.parametrize(
    ("address", "protocol", "kinds"),
    [("10.0.0.10", ICMP, (8, 0)), ("fd00::10", ICMPV6, (128, 129))],
)
def test_an_echo_has_type_code_and_id_and_is_deleted_by_them(
    tracked: KernelThread,
    peer: KernelThread,
    conntrack: Conntrack,
    address: str,
    protocol: int,
    kinds: tuple[int, int],
) -> None:
    tracked.call(ping, address)
    [flow] = [flow for flow in conntrack.flows() if flow.original.destination == address]
    for direction, kind in zip((flow.original, flow.reply), kinds, strict=True):
        known = (direction.icmp_type, direction.icmp_code, direction.icmp_id)
        assert (direction.protocol, known) == (protocol, (kind, 0, 0x1234))
        assert direction.source_port is None
    assert conntrack.delete([flow]) == 1
    assert flow.id not in {each.id for each in conntrack.flows()}


def test_another_protocol_has_addresses_alone_and_is_deleted_by_them(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack
) -> None:
    def speak() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 253) as opened:
            opened.sendto(b"experiment", ("10.0.0.10", 0))

    tracked.call(speak)
    [flow] = [each for each in conntrack.flows() if each.original.protocol == 253]
    assert flow.original.source_port is None
    assert conntrack.delete([flow]) == 1
    assert all(each.original.protocol != 253 for each in conntrack.flows())


def test_the_reply_of_a_translated_connection_is_not_the_mirror_image(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack, backend: Iptables
) -> None:
    to_near = ("-p", "udp", "-d", "10.0.0.10", "-j", "DNAT", "--to-destination", "10.0.0.11:53")
    nat = RuleSet(tables=(Table("nat", (Chain("OUTPUT", (to_near,), "ACCEPT"),)),))
    tracked.call(backend.load, nat)
    send(tracked, "10.0.0.1", "10.0.0.10")
    [flow] = [each for each in conntrack.flows() if each.original.protocol == UDP]
    assert (flow.original.destination, flow.original.destination_port) == ("10.0.0.10", 7000)
    assert (flow.reply.source, flow.reply.source_port) == ("10.0.0.11", 53)
    conntrack.flush_address("10.0.0.11")  # where it really is
    assert list(conntrack.flows()) == []


def as_pyroute2_sees_it(family: socket.AddressFamily) -> set[tuple[Any, ...]]:
    with NFCTSocket(nfgen_family=family) as opened:
        return {seen(entry, "V6" if family == socket.AF_INET6 else "V4") for entry in opened.dump()}


def seen(entry: Any, version: str) -> tuple[Any, ...]:
    known: list[Any] = []
    for direction in ("CTA_TUPLE_ORIG", "CTA_TUPLE_REPLY"):
        addresses = entry.get_attr(direction).get_attr("CTA_TUPLE_IP")
        protocol = entry.get_attr(direction).get_attr("CTA_TUPLE_PROTO")
        known += [addresses.get_attr(f"CTA_IP_{version}_{end}") for end in ("SRC", "DST")]
        known += [protocol.get_attr(f"CTA_PROTO_{end}_PORT") for end in ("SRC", "DST")]
        known += [protocol.get_attr("CTA_PROTO_NUM")]
    for counters in ("CTA_COUNTERS_ORIG", "CTA_COUNTERS_REPLY"):
        both = entry.get_attr(counters)
        known += [both.get_attr(f"CTA_COUNTERS_{what}") for what in ("PACKETS", "BYTES")]
    return (*known, *(entry.get_attr(f"CTA_{what}") for what in ("MARK", "STATUS", "ID")))


def as_we_see_it(flow: Flow) -> tuple[Any, ...]:
    known: list[Any] = []
    for each in (flow.original, flow.reply):
        known += [each.source, each.destination]
        known += [each.source_port, each.destination_port, each.protocol]
    for counters in (flow.original_counters, flow.reply_counters):
        assert counters is not None
        known += [counters.packets, counters.bytes]
    return (*known, flow.mark, flow.status, flow.id)


def test_pyroute2_sees_the_same_connections(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack
) -> None:
    for port in (7000, 7001, 7002):
        for near, far in (("10.0.0.1", "10.0.0.11"), ("fd00::1", "fd00::11")):
            send(tracked, near, far, port)
            send(peer, far, near, port)
    tracked.call(ping, "10.0.0.10")
    expected = tracked.call(as_pyroute2_sees_it, socket.AF_INET)
    expected |= tracked.call(as_pyroute2_sees_it, socket.AF_INET6)
    assert len(expected) >= 13
    assert {as_we_see_it(flow) for flow in conntrack.flows()} == expected


# Marks -----------------------------------------------------------------------------------------


def marks(flows: Iterable[Flow]) -> list[int]:
    return sorted(flow.mark for flow in flows)


def test_the_marks_of_either_backend_are_found(
    inside: KernelThread, peer: KernelThread, iptables: Iptables
) -> None:
    inside.call(iptables.load, marking())
    with inside.call(Conntrack) as conntrack:
        for port in (7000, 7001, 7002):
            send(peer, "10.0.0.10", "10.0.0.1", port)
        assert marks(conntrack.flows(0x10000, GROUP_BITS)) == [0x10005]
        conntrack.flush_mark(0x20000, GROUP_BITS)
        assert marks(conntrack.flows(5, 0xFFFF)) == [0x10005]


@pytest.fixture
def three_marks(tracked: KernelThread, peer: KernelThread) -> None:
    for port in (7000, 7001, 7002):
        send(tracked, "10.0.0.1", "10.0.0.10", port)


@pytest.mark.usefixtures("three_marks")
@pytest.mark.parametrize(
    ("mark", "mask", "found"),
    [
        (0x10000, GROUP_BITS, [0x10005]),
        (0x20000, GROUP_BITS, [0x20005]),
        (0x5, 0xFFFF, [0x10005, 0x20005]),
        (0, GROUP_BITS, [0]),
        (0x30000, GROUP_BITS, []),
        (0, 0, [0, 0x10005, 0x20005]),
    ],
)
def test_the_kernel_looks_for_marked_connections(
    conntrack: Conntrack, mark: int, mask: int, found: list[int]
) -> None:
    ours = [flow for flow in conntrack.flows(mark, mask) if flow.original.protocol == UDP]
    assert marks(ours) == found


@pytest.mark.usefixtures("three_marks")
def test_the_connections_of_one_mark_are_flushed_and_no_others(conntrack: Conntrack) -> None:
    conntrack.flush_mark(0x10000, GROUP_BITS)
    assert marks(conntrack.flows(5, 0xFFFF)) == [0x20005]
    conntrack.flush_mark(0x10000, GROUP_BITS)
    conntrack.flush_mark(0x5, 0xFFFF)
    assert marks(conntrack.flows()) == [0]


def test_a_mask_of_nothing_flushes_nothing(conntrack: Conntrack) -> None:
    with pytest.raises(ValueError, match="every connection"):
        conntrack.flush_mark(0, 0)


@pytest.mark.usefixtures("three_marks")
def test_a_connection_gets_another_mark_and_is_otherwise_what_it_was(conntrack: Conntrack) -> None:
    [before] = conntrack.flows(0x10000, GROUP_BITS)
    assert conntrack.set_marks([(before, 0xFFFF0007)]) == 1
    [after] = conntrack.flows(0xFFFF0000, GROUP_BITS)
    assert (after.id, after.original, after.mark) == (before.id, before.original, 0xFFFF0007)
    assert marks(conntrack.flows()) == [0, 0x20005, 0xFFFF0007]


@pytest.mark.usefixtures("three_marks")
def test_a_connection_that_is_gone_is_not_made_by_marking_it(conntrack: Conntrack) -> None:
    gone = list(conntrack.flows(0x10000, GROUP_BITS))
    conntrack.delete(gone)
    assert conntrack.set_marks([(gone[0], 1), *((flow, 2) for flow in conntrack.flows())]) == 2
    assert marks(conntrack.flows()) == [2, 2]


# Deleting by tuple -----------------------------------------------------------------------------


def test_connections_are_deleted_by_their_tuples_and_counted(
    tracked: KernelThread, conntrack: Conntrack
) -> None:
    count = 2 * BATCH_MAX + 3
    tracked.call(send_to_many, count)
    flows = list(conntrack.flows(0x10000, GROUP_BITS))
    assert len(flows) == count
    assert conntrack.delete(flows[1:]) == count - 1
    assert [flow.id for flow in conntrack.flows()] == [flows[0].id]
    assert conntrack.delete(flows) == 1
    assert conntrack.delete(flows) == 0  # every one of a batch was refused
    assert list(conntrack.flows()) == []


def test_a_later_connection_of_the_same_tuple_is_spared(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack
) -> None:
    send(tracked, "10.0.0.1", "10.0.0.10")
    [flow] = conntrack.flows()
    assert flow.id is not None
    other = Flow(original=flow.original, reply=flow.reply, id=flow.id ^ 1)
    assert conntrack.delete([other]) == 0
    assert conntrack.delete([Flow(original=flow.original, reply=flow.reply)]) == 1


def test_a_refusal_names_the_connection(conntrack: Conntrack) -> None:
    tuple_ = FlowTuple(source="10.0.0.1", destination="10.0.0.2", protocol=ICMP)  # without type
    with pytest.raises(KernelError, match=r"10\.0\.0\.1 to 10\.0\.0\.2") as caught:
        conntrack.delete([Flow(original=tuple_, reply=tuple_)])
    assert caught.value.errno == errno.EINVAL


# Addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_filter", [True, False])
@pytest.mark.parametrize(
    ("gone", "stays", "others"),
    [
        ("10.0.0.1", "10.0.0.2", ("10.0.0.10", "10.0.0.11")),
        ("fd00::1", "fd00::2", ("fd00::10", "fd00::11")),
    ],
)
def test_connections_from_and_to_an_address_are_flushed_and_no_others(
    tracked: KernelThread,
    peer: KernelThread,
    gone: str,
    stays: str,
    others: tuple[str, str],
    can_filter: bool,
) -> None:
    for address in (gone, stays):
        send(tracked, address, others[0])
        send(peer, others[1], address)
    with tracked.call(lambda: Conntrack(can_filter=can_filter)) as conntrack:
        conntrack.flush_address(gone)
        left = [flow for flow in conntrack.flows() if flow.original.protocol == UDP]
    assert ends(left) == {(stays, others[0]), (others[1], stays)}


def test_the_filter_by_address_is_refused_or_does_what_it_says(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack
) -> None:
    """A kernel that took the half tuple for none at all would flush everything."""
    send(tracked, "10.0.0.1", "10.0.0.10")
    with tracked.call(Nfnetlink) as netfilter:
        refused = netfilter.send(flush_source_messages("10.0.0.99"))
    assert {refusal.errno for refusal in refused.values()} <= {errno.EINVAL, errno.EOPNOTSUPP}
    assert ends(conntrack.flows()) == {("10.0.0.1", "10.0.0.10")}


ESTABLISHED: Rule = ("-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
NEW_TO_7000: Rule = ("-p", "udp", "--dport", "7000", "-j", "ACCEPT")


@pytest.mark.parametrize("is_flushed", [False, True])
def test_who_gets_an_address_next_gets_nothing_of_old_connections_once_they_are_flushed(
    inside: KernelThread, peer: KernelThread, iptables: Iptables, is_flushed: bool
) -> None:
    def arrives(from_far: socket.socket) -> bool:
        with inside.call(udp, "10.0.0.1", 7000) as server:
            from_far.sendto(b"?", ("10.0.0.1", 7000))
            try:
                return server.recv(1) == b"?"
            except TimeoutError:
                return False

    inside.call(iptables.load, rules(Chain("INPUT", (ESTABLISHED, NEW_TO_7000), "DROP")))
    with peer.call(udp, "10.0.0.10", 5000) as client, inside.call(Conntrack) as conntrack:
        with inside.call(udp, "10.0.0.1", 7000) as server:
            client.sendto(b"?", ("10.0.0.1", 7000))
            server.sendto(b"!", server.recvfrom(1)[1])
        inside.call(iptables.load, rules(Chain("INPUT", (ESTABLISHED,), "DROP")))
        if is_flushed:
            conntrack.flush_address("10.0.0.1")
        assert arrives(client) is not is_flushed


# Events ----------------------------------------------------------------------------------------


@pytest.fixture
def events(tracked: KernelThread) -> Iterator[FlowEvents]:
    with tracked.call(FlowEvents) as opened:
        yield opened


def of_udp(found: list[FlowEvent | Lost]) -> list[FlowEvent]:
    events = [each for each in found if isinstance(each, FlowEvent)]
    return [each for each in events if each.flow.original.protocol == UDP]


def test_the_beginning_and_the_end_of_a_connection_are_events(
    tracked: KernelThread, peer: KernelThread, conntrack: Conntrack, events: FlowEvents
) -> None:
    send(tracked, "10.0.0.1", "10.0.0.10", 7001)
    [listed] = [flow for flow in conntrack.flows() if flow.original.protocol == UDP]
    conntrack.delete([listed])
    new, destroy = of_udp(events.read())
    assert (new.kind, destroy.kind) == ("new", "destroy")
    for event in (new, destroy):
        assert event.flow.id == listed.id
        assert event.flow.original == listed.original
        assert event.flow.mark == 0x10005
    assert destroy.flow.original_counters == listed.original_counters
    assert destroy.flow.started_at_ns == listed.started_at_ns
    if HAS_TIMES:
        assert destroy.flow.stopped_at_ns is not None
        assert destroy.flow.stopped_at_ns >= (destroy.flow.started_at_ns or 0)
    assert events.read() == []


def test_only_the_events_that_were_asked_for_come(
    tracked: KernelThread, conntrack: Conntrack
) -> None:
    with tracked.call(lambda: FlowEvents(["destroy"])) as events:
        tracked.call(send_to_many, 3)
        conntrack.flush_mark(0x10000, GROUP_BITS)
        assert [event.kind for event in of_udp(events.read())] == ["destroy"] * 3


async def test_events_are_waited_for(tracked: KernelThread, events: FlowEvents) -> None:
    async def begin() -> None:
        await tracked.run(send_to_many, 1, 7001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin)
        with trio.fail_after(5):
            [event] = of_udp(await events.receive())
    assert event.flow.original.destination == "127.1.0.0"


async def test_waiting_for_events_can_be_cancelled(events: FlowEvents) -> None:
    with trio.move_on_after(0.01) as scope:
        await events.receive()
    assert scope.cancelled_caught


def read_all(events: FlowEvents) -> list[FlowEvent | Lost]:
    found: list[FlowEvent | Lost] = []
    while several := events.read():
        found += several
    return found


def test_what_nobody_read_in_time_is_counted(tracked: KernelThread) -> None:
    with tracked.call(lambda: FlowEvents(["new"], buffer_bytes=1 << 18)) as events:
        tracked.call(send_to_many, 3000)
        found = read_all(events)
        assert isinstance(found[-1], Lost)
        assert len(found) < 1000
        assert len(found) - 1 + found[-1].events == 3000
        tracked.call(send_to_many, 10, 7002)
        assert [type(event) for event in read_all(events)] == [FlowEvent] * 10
        tracked.call(send_to_many, 3000, 7003)
        again = read_all(events)
        assert isinstance(again[-1], Lost)
        assert len(again) - 1 + again[-1].events == 3000


def test_descriptors_are_closed(tracked: KernelThread) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opens: list[Callable[[], Any]] = [Conntrack, FlowEvents]
    for make in opens:
        with tracked.call(make):
            assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
