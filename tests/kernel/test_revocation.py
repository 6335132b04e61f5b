"""Real connections through a router, and what is left of them when a rule goes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.kernel.conntrack import Conntrack
from sandbox.kernel.netfilter import Iptables
from sandbox.model.vpc import Network, Revocation, SecurityGroupRule
from sandbox.network.revocation import Revoked, forget, release, revoke
from tests.kernel.router import ENI_B, A, B, Place, routed, vpc
from tests.networks import egress, group, ingress, interface

pytestmark = pytest.mark.guest

TCP_80 = ("-p", "tcp", "--dport", "80")
TCP_81 = ("-p", "tcp", "--dport", "81")
UDP_53 = ("-p", "udp", "--dport", "53")
PING = ("-p", "icmp")
ALL = (ingress("tcp", (80, 81)), ingress("udp", 53), ingress("icmp", 8))
BUT_80 = (ingress("tcp", 81), ingress("udp", 53), ingress("icmp", 8))


@pytest.fixture
def place(tmp_path: Path, iptables: Iptables) -> Iterator[Place]:
    with routed(tmp_path / "lock", iptables.backend) as made:
        made.allow(TCP_80, TCP_81, UDP_53, PING)
        yield made


@pytest.fixture
def conntrack(place: Place) -> Iterator[Conntrack]:
    with place.router.call(Conntrack) as opened:
        yield opened


def hears(receiver: socket.socket, sender: socket.socket) -> bool:
    receiver.settimeout(1.0)
    sender.send(b"x")
    try:
        return receiver.recv(1) == b"x"
    except TimeoutError:
        return False


def send_all(opened: socket.socket, data: bytes) -> None:
    opened.sendall(data)
    opened.shutdown(socket.SHUT_WR)


def test_a_cut_connection_is_dead_in_both_directions_and_another_loses_no_byte(
    place: Place, conntrack: Conntrack
) -> None:
    cut, kept = place.connected(80), place.connected(81)
    with cut[0], cut[1], kept[0], kept[1]:
        assert hears(cut[1], cut[0])
        assert hears(cut[0], cut[1])
        sent = bytes(range(256)) * 40_000
        sender = threading.Thread(target=send_all, args=(kept[0], sent))
        sender.start()
        received = bytearray(kept[1].recv(1 << 16))
        place.allow(TCP_81, UDP_53, PING)
        assert hears(cut[1], cut[0])  # what is tracked goes on, whatever the rules say
        revoked = revoke(conntrack, vpc(*ALL), vpc(*BUT_80))
        assert (revoked.cut, revoked.remarked) == (1, 0)
        while data := kept[1].recv(1 << 16):
            received += data
        sender.join()
        assert received == sent
        assert not hears(cut[1], cut[0])
        assert not hears(cut[0], cut[1])
        assert revoke(conntrack, vpc(*ALL), vpc(*BUT_80)).cut == 0


def test_in_aws_a_tracked_connection_goes_on_and_an_untracked_one_ends(
    place: Place, conntrack: Conntrack
) -> None:
    before = vpc(ingress("tcp", 80), ingress("tcp", 81, "10.0.0.0/24"), egress("-1"))
    untracked, tracked = place.connected(80), place.connected(81)
    with untracked[0], untracked[1], tracked[0], tracked[1]:
        place.allow()
        assert revoke(conntrack, before, vpc(revocation="aws")).cut == 1
        assert hears(tracked[1], tracked[0])
        assert hears(tracked[0], tracked[1])
        assert not hears(untracked[1], untracked[0])


def test_an_acl_cuts_without_our_help_and_lets_go_again(place: Place, conntrack: Conntrack) -> None:
    client, server = place.connected(80)
    with client, server:
        place.allow(TCP_80, acl=[("-s", B, "-j", "DROP")])
        assert not hears(client, server)
        place.allow(TCP_80)
        assert hears(client, server)


def echo_socket(address: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 1)
    opened.bind((address, 0))
    return opened


def ping(opened: socket.socket) -> bool:
    """Is there an answer?"""
    opened.settimeout(1.0)
    opened.sendto(struct.pack(">BBHHH", 8, 0, 0xF7FF - 0x1234, 0x1234, 0), (B, 0))
    try:
        return opened.recv(64)[20] == 0
    except TimeoutError:
        return False


def udp(address: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    opened.bind((address, port))
    return opened


def test_datagrams_and_echoes_end_with_their_rules(place: Place, conntrack: Conntrack) -> None:
    with (
        place.a.call(udp, A, 5000) as client,
        place.b.call(udp, B, 53) as server,
        place.a.call(echo_socket, A) as pinging,
    ):
        client.connect((B, 53))
        server.connect((A, 5000))
        assert hears(server, client)
        assert hears(client, server)
        assert ping(pinging)
        place.allow(TCP_80)
        assert ping(pinging)
        assert hears(server, client)
        assert revoke(conntrack, vpc(*ALL), vpc(ingress("tcp", 80))) == Revoked(2, 2, 0)
        assert not ping(pinging)
        assert not hears(server, client)


def with_third(*rules: SecurityGroupRule, third: SecurityGroupRule | None) -> Network:
    """B is in a third group, too."""
    made = vpc(*rules)
    groups = {**made.groups, "sg-c": group("sg-c", *([third] if third else []), index=3)}
    both = interface(ENI_B, "subnet-b", B, "sg-b", "sg-c")
    return replace(made, groups=groups, interfaces={**made.interfaces, ENI_B: both})


def test_what_another_group_admits_now_is_found_when_that_one_changes(
    place: Place, conntrack: Conntrack
) -> None:
    """Its mark follows, or the second change would not find it."""
    both = with_third(ingress("tcp", 80), third=ingress("tcp", 80))
    one = with_third(third=ingress("tcp", 80))
    none = with_third(third=None)
    client, server = place.connected(80)
    with client, server:
        assert revoke(conntrack, both, one) == Revoked(1, 0, 1)
        assert [flow.mark for flow in conntrack.flows()] == [0x10003]
        assert hears(server, client)
        assert revoke(conntrack, one, none) == Revoked(1, 1, 0)
        assert not hears(server, client)


def test_an_interface_that_goes_takes_its_flows_with_it(place: Place, conntrack: Conntrack) -> None:
    client, server = place.connected(80)
    with client, server:
        forget(conntrack, vpc().interfaces[ENI_B])
        assert not hears(server, client)
        assert list(conntrack.flows()) == []
        forget(conntrack, vpc().interfaces[ENI_B])


@pytest.mark.parametrize("revocation", ["aws", "immediate"])
def test_an_index_is_free_when_no_flow_has_it(
    place: Place, conntrack: Conntrack, revocation: Revocation
) -> None:
    client, server = place.connected(80)
    with client, server:
        release(conntrack, 2, revocation)
        assert list(conntrack.flows(2, 0xFFFF)) == []
        assert hears(server, client) is (revocation == "aws")
        release(conntrack, 2, revocation)
