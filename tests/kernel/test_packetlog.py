"""Packets that real rules log, in a throw-away network namespace."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel import packetlog
from sandbox.kernel.netfilter import Chain, Family, Iptables, RuleSet, Table
from sandbox.kernel.packetlog import LoggedPacket, LostPackets, PacketLog, log_rule
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

GROUP = 7
UDP, ICMP = socket.IPPROTO_UDP, socket.IPPROTO_ICMP


def rules(address: str = "127.0.0.2") -> RuleSet:
    family: Family = "inet6" if ":" in address else "inet"
    there = ("-d", address)
    chain = Chain(
        "OUTPUT", (log_rule(GROUP, "first one", *there), (*there, "-j", "DROP")), "ACCEPT"
    )
    return RuleSet(tables=(Table("mangle", (chain,)),), family=family)


@pytest.fixture
def log(inside: KernelThread, iptables: Iptables) -> Iterator[PacketLog]:
    if not packetlog.works(iptables):
        pytest.skip("this kernel has no NFLOG")
    inside.call(iptables.load, rules())
    with inside.call(PacketLog, GROUP) as opened:
        yield opened


def send_udp(count: int = 1, destination: str = "127.0.0.2", data: bytes = b"hello") -> None:
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind(("", 5000))
        for _ in range(count):
            with suppress(PermissionError):  # what is dropped on its way out
                sender.sendto(data, (destination, 7000))


def read(log: PacketLog) -> list[LoggedPacket | LostPackets]:
    select.select([log], [], [], 5)
    return log.read()


def read_all(log: PacketLog) -> list[LoggedPacket | LostPackets]:
    found = read(log)
    while select.select([log], [], [], 0.3)[0]:
        found += log.read()
    return found


def test_a_dropped_packet_is_logged_with_the_prefix_of_its_rule(
    inside: KernelThread, log: PacketLog
) -> None:
    inside.call(send_udp, 1, "127.0.0.3")
    inside.call(send_udp)
    [packet] = read(log)
    assert isinstance(packet, LoggedPacket)
    assert packet[:2] == ("first one", "127.0.0.1")
    assert packet[2:7] == ("127.0.0.2", UDP, 5000, 7000, 20 + 8 + 5)


def test_a_packet_of_ipv6_is_logged(inside: KernelThread, iptables: Iptables) -> None:
    inside.call(iptables.load, rules("::1"))
    with inside.call(PacketLog, GROUP) as log:
        inside.call(send_udp, 1, "::1")
        [packet] = read(log)
    assert isinstance(packet, LoggedPacket)
    assert packet[:-1] == ("first one", "::1", "::1", UDP, 5000, 7000, 40 + 8 + 5)


def test_a_long_packet_counts_whole(inside: KernelThread, log: PacketLog) -> None:
    inside.call(send_udp, 1, "127.0.0.2", bytes(1400))
    [packet] = read(log)
    assert isinstance(packet, LoggedPacket)
    assert packet.bytes == 1428


def test_a_packet_without_ports_has_none(inside: KernelThread, log: PacketLog) -> None:
    def ping() -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_RAW, ICMP) as opened,
            suppress(PermissionError),
        ):
            opened.sendto(struct.pack(">BBHHH", 8, 0, 0xF7FF, 0, 0), ("127.0.0.2", 0))

    inside.call(ping)
    [packet] = read(log)
    assert isinstance(packet, LoggedPacket)
    assert (packet.protocol, packet.source_port, packet.destination_port) == (ICMP, 0, 0)


def test_what_nobody_read_in_time_is_counted(inside: KernelThread, iptables: Iptables) -> None:
    inside.call(iptables.load, rules())
    with inside.call(lambda: PacketLog(GROUP, buffer_bytes=1 << 16)) as log:
        inside.call(send_udp, 5000)
        first = read_all(log)
        inside.call(send_udp, 1)
        found = [*first, *read_all(log)]
    lost = [each.packets for each in found if isinstance(each, LostPackets)]
    assert sum(lost) > 1000
    assert len(found) - len(lost) + sum(lost) == 5001


def test_a_group_has_one_reader(inside: KernelThread, log: PacketLog) -> None:
    with pytest.raises(KernelError) as caught:
        inside.call(PacketLog, GROUP)
    assert caught.value.errno == errno.EPERM
    log.close()
    inside.call(PacketLog, GROUP).close()


async def test_packets_are_waited_for(inside: KernelThread, log: PacketLog) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inside.run, send_udp, 1, "127.0.0.2", b"hello")
        with trio.fail_after(5):
            [packet] = await log.receive()
    assert isinstance(packet, LoggedPacket)


def test_it_is_known_whether_the_kernel_can(iptables: Iptables) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert packetlog.works(iptables)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_the_programs_it_does_not_work(tmp_path: Path) -> None:
    assert not packetlog.works(Iptables("absent", str(tmp_path / "lock")))  # type: ignore[arg-type]
