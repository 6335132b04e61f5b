"""The flow log of real transfers and refusals through a router."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandbox.kernel import packetlog
from sandbox.kernel.netfilter import Iptables, Rule
from sandbox.network.drops import DROP_EGRESS, DROP_INGRESS, REJECTS_BURST, drop_chains
from sandbox.network.flowlog import FlowRecord
from sandbox.network.flowlog_files import FlowLogReader, FlowLogWriter
from sandbox.network.flowlog_receiver import FlowLog
from tests.kernel.router import ENI_A, ENI_B, A, B, Place, routed, vpc

pytestmark = pytest.mark.guest

GROUP = 9
TCP_80: Rule = ("-p", "tcp", "--dport", "80")
UDP_53: Rule = ("-p", "udp", "--dport", "53")


@pytest.fixture
def place(tmp_path: Path, iptables: Iptables) -> Iterator[Place]:
    if not packetlog.works(iptables):
        pytest.skip("this kernel has no NFLOG")
    with routed(tmp_path / "lock", iptables.backend) as made:
        made.allow(
            TCP_80,
            UDP_53,
            egress=[("-p", "tcp"), ("-p", "udp", "!", "--dport", "54")],
            drops=drop_chains(GROUP),
            drop_in=("-o", "fgb", "-g", DROP_INGRESS),
            drop_out=("-g", DROP_EGRESS),
        )
        yield made


@pytest.fixture
def log(place: Place, tmp_path: Path) -> Iterator[FlowLog]:
    writer = FlowLogWriter(tmp_path / "flows")
    with FlowLog.opened(place.router, "123456789012", vpc(), writer, log_group=GROUP) as opened:
        yield opened


@pytest.fixture
def reader(tmp_path: Path) -> FlowLogReader:
    return FlowLogReader(tmp_path / "flows")


def udp(address: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    opened.bind((address, port))
    return opened


def counted(records: Iterator[FlowRecord]) -> set[tuple[object, ...]]:
    return {
        (
            one.interface_id,
            one.srcaddr,
            one.dstport,
            one.protocol,
            one.packets,
            one.bytes,
            one.action,
        )
        for one in records
        if one.log_status == "OK"
    }


async def test_packets_and_bytes_of_a_transfer_are_true_over_two_intervals(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    with place.a.call(udp, A, 5000) as client, place.b.call(udp, B, 53) as server:
        for _ in range(7):
            client.sendto(bytes(1000), (B, 53))
        server.sendto(bytes(10), (A, 5000))
        await log.close_interval()
        first = counted(reader.read())
        for _ in range(3):
            client.sendto(bytes(100), (B, 53))
        await log.close_interval()
        second = counted(reader.read())
    enis = (ENI_A, ENI_B)
    assert first == {(eni, A, 53, 17, 7, 7 * 1028, "ACCEPT") for eni in enis} | {
        (eni, B, 5000, 17, 1, 38, "ACCEPT") for eni in enis
    }
    assert second == {(eni, A, 53, 17, 3, 3 * 128, "ACCEPT") for eni in enis}


def link_counter(name: str) -> int:
    return int(Path("/proc/thread-self/net/dev").read_text().split(f"{name}:")[1].split()[0])


async def test_bytes_of_a_tcp_transfer_are_those_of_the_link(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    before = place.router.call(link_counter, "fga")
    client, server = place.connected(80)
    size = 4 << 20
    server.settimeout(None)
    with client, server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: client.sendall(bytes(size)))
            await trio.to_thread.run_sync(server.recv, size, socket.MSG_WAITALL)
    await log.close_interval()
    on_the_link = place.router.call(link_counter, "fga") - before
    [sent] = [one for one in reader.read() if (one.interface_id, one.srcaddr) == (ENI_B, A)]
    assert sent.packets is not None
    assert sent.bytes is not None
    assert sent.bytes > size
    others = on_the_link - (sent.bytes + 14 * sent.packets)  # with their Ethernet headers
    assert 0 <= others < 512, "the kernel's own, to find neighbours"
    assert (sent.dstport, sent.protocol, sent.action) == (80, 6, "ACCEPT")


async def test_what_is_refused_is_recorded_where_it_was(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    with place.a.call(udp, A, 5000) as client:
        for port in (54, 54, 55):
            client.sendto(bytes(10), (B, port))
        await trio.sleep(0.3)
    await log.close_interval()
    assert counted(reader.read()) == {
        (ENI_A, A, 54, 17, 2, 76, "REJECT"),
        (ENI_A, A, 55, 17, 1, 38, "ACCEPT"),
        (ENI_B, A, 55, 17, 1, 38, "REJECT"),
    }


async def test_an_answer_that_an_acl_refuses_is_no_accepted_one(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    with place.a.call(udp, A, 5000) as client, place.b.call(udp, B, 53) as server:
        client.sendto(bytes(10), (B, 53))
        server.settimeout(5)
        server.recv(10)
        acl = [("-s", B, "-g", DROP_EGRESS)]
        place.allow(UDP_53, acl=acl, drops=drop_chains(GROUP))
        for _ in range(3):
            server.sendto(bytes(20), (A, 5000))
        await trio.sleep(0.3)
    await log.close_interval()
    assert counted(reader.read()) == {
        (ENI_A, A, 53, 17, 1, 38, "ACCEPT"),
        (ENI_B, A, 53, 17, 1, 38, "ACCEPT"),
        (ENI_B, B, 5000, 17, 3, 3 * 48, "REJECT"),
    }


async def test_a_flood_of_refusals_is_recorded_up_to_the_rate_and_then_told(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    with place.a.call(udp, A, 5000) as client:
        for _ in range(10 * REJECTS_BURST):
            client.sendto(b"", (B, 54))
        await trio.sleep(0.3)
    await log.close_interval()
    found = list(reader.read())
    [refused] = [one for one in found if one.action == "REJECT"]
    assert refused.packets is not None
    assert REJECTS_BURST <= refused.packets < 5 * REJECTS_BURST
    assert [one.interface_id for one in found if one.log_status == "SKIPDATA"] == [ENI_A]


async def test_it_runs_by_itself_and_ends_when_it_is_cancelled(
    place: Place, log: FlowLog, reader: FlowLogReader
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run, 0.5)
        client, server = place.connected(80)
        client.close()
        server.close()
        with trio.fail_after(10):
            while not (found := counted(reader.read())):
                await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert {each[0] for each in found} == {ENI_A, ENI_B}
