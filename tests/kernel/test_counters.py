"""Flows that real rules admitted, counted over a reload."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.kernel.netfilter import Iptables
from sandbox.network.counters import Totals, admitted_by, fold, reading, restarted
from tests.kernel.router import A, B, Place, routed

pytestmark = pytest.mark.guest

UDP_53 = ("-p", "udp", "--dport", "53")
UDP_54 = ("-p", "udp", "--dport", "54")
GROUP = admitted_by("sg-b", is_egress=False)
LAYOUT = {"gi2": ("sgr-53", "sgr-54"), "ai2": (GROUP, None)}


@pytest.fixture
def place(tmp_path: Path, iptables: Iptables) -> Iterator[Place]:
    with routed(tmp_path / "lock", iptables.backend) as made:
        made.allow(UDP_53, UDP_54)
        yield made


def udp(address: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    opened.bind((address, port))
    return opened


def exchange(place: Place, source_port: int, port: int) -> None:
    """A flow of five packets, in both directions. A packet that gets no answer would ask again."""
    with place.a.call(udp, A, source_port) as client, place.b.call(udp, B, port) as server:
        client.settimeout(5)
        server.settimeout(5)
        for _ in range(2):
            client.sendto(b"?", (B, port))
            server.sendto(b"!", server.recvfrom(1)[1])
            client.recv(1)
        client.sendto(b".", (B, port))


def test_a_rule_counts_flows_and_the_sum_survives_a_reload(place: Place) -> None:
    def read(totals: Totals) -> Totals:
        counted = place.router.call(place.iptables.counters, "mangle")
        return fold(totals, reading(counted, LAYOUT))

    for source_port in (5001, 5002, 5003):
        exchange(place, source_port, 53)
    exchange(place, 5004, 54)
    totals = read(Totals())
    assert totals.flows == {"sgr-53": 3, "sgr-54": 1, GROUP: 4}
    place.allow(UDP_53, UDP_54)
    totals = restarted(totals, LAYOUT)
    for source_port in (5005, 5006, 5007, 5008):
        exchange(place, source_port, 53)
    assert read(totals).flows == {"sgr-53": 7, "sgr-54": 1, GROUP: 8}
