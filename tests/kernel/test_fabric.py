"""VPCs as namespaces: their routers, uplinks and blocks, beside a namespace that plays the host."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from sandbox.errors import KernelError, NetworkError
from sandbox.kernel import netns
from sandbox.kernel.netfilter import Chain, Iptables, RuleSet, Table
from sandbox.model.vpc import Vpc
from sandbox.network.fabric import Fabric
from tests.kernel.namespaces import Host, Space, connects, listening, pings, playing_host

INSTANCE = "7e57"
POOL = IPv4Network("198.18.0.0/15")
BLOCK = IPv4Network("198.18.16.0/20")
DROP = RuleSet(tables=(Table("mangle", (Chain("FORWARD", (), "DROP"),)),))


def vpc(number: int = 1, cidr_block: str = "10.0.0.0/16", ipv6: str | None = None) -> Vpc:
    return Vpc(
        vpc_id=f"vpc-{number:017x}",
        cidr_block=cidr_block,
        ipv6_cidr_block=ipv6,
        number=number,
        created_at=0,
    )


@pytest.fixture
def host() -> Iterator[Host]:
    with playing_host() as host:
        yield host


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
async def fabric(host: Host, run_dir: Path) -> AsyncIterator[Fabric]:
    fabric = Fabric(run_dir, INSTANCE, POOL, host.thread)
    fabric.host_rules.lock_file = str(run_dir / "lock")
    yield fabric
    await fabric.remove_all()
    await fabric.aclose()


def nothing() -> None:
    """No packet filter."""


def router_of(fabric: Fabric, host: Host, vpc: Vpc) -> Space:
    return Space(host.space.thread, fabric.router(vpc.vpc_id).netns_fd)


@pytest.fixture
async def opened(fabric: Fabric, host: Host) -> AsyncIterator[Space]:
    await fabric.open(vpc(), nothing)
    router = router_of(fabric, host, vpc())
    yield router
    router.close()


async def test_a_router_has_the_addresses_that_tasks_ask_and_answers_from_them(
    opened: Space,
) -> None:
    [lo] = opened.ip("address", "show", "dev", "lo")
    own = {address["local"] for address in lo["addr_info"]}
    assert {"169.254.170.2", "169.254.169.253", "10.0.0.2"} <= own
    for address in ("169.254.170.2", "169.254.169.253", "10.0.0.2"):
        with listening(opened, address, 53):
            assert connects(opened, address, 53)


async def test_nobodys_addresses_and_link_local_ones_are_nowhere(
    fabric: Fabric, opened: Space, host: Host
) -> None:
    await fabric.attach_gateway(vpc().vpc_id)
    for address in ("10.0.0.1", "10.0.200.7", "169.254.169.254", "169.254.1.1"):
        with pytest.raises(OSError, match="Invalid argument"):  # the kernel's word for a black hole
            opened.call(lambda a=address: route_to(a))
    assert opened.call(lambda: route_to("203.0.113.1"))


def route_to(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))
    return True


async def test_the_sysctls_are_those_of_a_router_and_links_are_born_with_them(
    opened: Space,
) -> None:
    expected = {
        "net/ipv4/ip_forward": "1",
        "net/ipv4/conf/up0/rp_filter": "1",
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/up0/arp_ignore": "1",
        "net/ipv4/conf/up0/send_redirects": "0",
        "net/ipv4/conf/all/send_redirects": "0",
        "net/ipv4/conf/up0/accept_redirects": "0",
        "net/ipv4/conf/up0/accept_source_route": "0",
        "net/ipv6/conf/up0/disable_ipv6": "1",
        "net/netfilter/nf_conntrack_tcp_loose": "0",
        "net/netfilter/nf_conntrack_udp_timeout_stream": "180",
        "net/netfilter/nf_conntrack_acct": "1",
        "net/netfilter/nf_conntrack_timestamp": "1",
    }
    assert {key: opened.call(netns.read_sysctl, key) for key in expected} == expected


async def test_a_dual_stack_vpc_forwards_ipv6_and_believes_no_router(
    fabric: Fabric, host: Host
) -> None:
    both = vpc(ipv6="2600:1f18:1:2300::/56")
    await fabric.open(both, nothing)
    router = router_of(fabric, host, both)
    expected = {
        "net/ipv6/conf/up0/disable_ipv6": "0",
        "net/ipv6/conf/all/forwarding": "1",
        "net/ipv6/conf/up0/accept_ra": "0",
        "net/ipv6/conf/up0/accept_redirects": "0",
    }
    assert {key: router.call(netns.read_sysctl, key) for key in expected} == expected
    with listening(router, "fd00:ec2::253", 53):
        assert connects(router, "fd00:ec2::253", 53)
    blackholes = [r["dst"] for r in router.ip("-6", "route") if r.get("type") == "blackhole"]
    assert blackholes == ["2600:1f18:1:2300::/56"]
    uplink = host.space.ip("-6", "address", "show", "dev", "sb7e57u1")
    assert [each for each in uplink if each] == []  # none on the host's side
    router.close()


async def test_the_host_reaches_a_public_block_and_the_vpc_the_world_through_one_uplink(
    fabric: Fabric, opened: Space, host: Host
) -> None:
    await fabric.route_blocks(vpc().vpc_id, [BLOCK])
    await fabric.attach_gateway(vpc().vpc_id)
    opened.run("ip", "address", "add", "198.18.16.5/32", "dev", "lo")
    assert pings(host.space, "198.18.16.5")
    with listening(opened, "198.18.16.5"):
        assert connects(host.space, "198.18.16.5")
    assert pings(opened, "198.19.255.254", source="198.18.16.5")  # what the host is to a task
    assert "sb7e57u1" in host.space.links()
    assert {"up0", "lo"} <= opened.links()
    [link] = host.space.ip("link", "show", "dev", "sb7e57u1")
    assert link["mtu"] == 9001


async def test_without_a_gateway_nothing_leaves_and_nothing_comes_in(
    fabric: Fabric, opened: Space, host: Host
) -> None:
    await fabric.route_blocks(vpc().vpc_id, [BLOCK])
    opened.run("ip", "address", "add", "198.18.16.5/32", "dev", "lo")
    with pytest.raises(OSError, match="unreachable"):
        opened.call(lambda: route_to("203.0.113.1"))
    assert not pings(host.space, "198.18.16.5")
    await fabric.attach_gateway(vpc().vpc_id)
    assert pings(host.space, "198.18.16.5")
    for _ in range(2):
        await fabric.detach_gateway(vpc().vpc_id)
    assert not pings(host.space, "198.18.16.5")


async def test_a_block_is_withdrawn_only_from_the_vpc_that_has_it(
    fabric: Fabric, opened: Space, host: Host
) -> None:
    await fabric.open(vpc(2), nothing)
    await fabric.route_blocks(vpc(1).vpc_id, [BLOCK])
    await fabric.withdraw_blocks(vpc(2).vpc_id, [BLOCK])
    [route] = host.space.ip("route", "show", str(BLOCK))
    assert route["dev"] == "sb7e57u1"
    for _ in range(2):
        await fabric.withdraw_blocks(vpc(1).vpc_id, [BLOCK])
    assert host.space.ip("route", "show", str(BLOCK)) == []


async def test_overlapping_vpcs_live_side_by_side(
    fabric: Fabric, opened: Space, host: Host
) -> None:
    await fabric.open(vpc(2), nothing)
    other = router_of(fabric, host, vpc(2))
    with listening(opened, "10.0.0.2", 5300):
        assert connects(opened, "10.0.0.2", 5300)
        assert not connects(other, "10.0.0.2", 5300)
    other.close()


async def test_opening_again_mends_what_is_missing_and_changes_nothing_else(
    fabric: Fabric, opened: Space, host: Host, run_dir: Path
) -> None:
    await fabric.attach_gateway(vpc().vpc_id)
    before = (opened.ip("route"), opened.ip("address"), host.space.ip("route"))
    await fabric.open(vpc(), nothing)
    assert (opened.ip("route"), opened.ip("address"), host.space.ip("route")) == before
    opened.run("ip", "address", "del", "169.254.170.2/32", "dev", "lo")
    opened.run("ip", "route", "del", "blackhole", "10.0.0.0/16")
    host.space.run("ip", "link", "del", "sb7e57u1")
    await fabric.open(vpc(), nothing)
    await fabric.attach_gateway(vpc().vpc_id)
    assert {r["dst"] for r in opened.ip("route")} == {r["dst"] for r in before[0]}
    assert "sb7e57u1" in host.space.links()
    with listening(opened, "169.254.170.2", 80):
        assert connects(opened, "169.254.170.2", 80)


async def test_the_next_agent_finds_the_same_namespace(
    fabric: Fabric, opened: Space, host: Host, run_dir: Path
) -> None:
    opened.run("ip", "address", "add", "10.0.0.77/32", "dev", "lo")
    await fabric.aclose()
    later = Fabric(run_dir, INSTANCE, POOL, host.thread)
    await later.open(vpc(), nothing)
    assert pings(opened, "10.0.0.77")
    assert os.fstat(later.router(vpc().vpc_id).netns_fd).st_ino == os.fstat(opened.fd).st_ino
    await later.aclose()


async def test_the_packet_filter_is_there_before_the_first_link(
    fabric: Fabric, host: Host, run_dir: Path
) -> None:
    iptables = Iptables.detect(str(run_dir / "lock"))
    seen: list[set[str]] = []

    def prepare() -> None:
        seen.append({name for _, name in socket.if_nameindex()})
        iptables.load(DROP)

    await fabric.open(vpc(), prepare)
    assert [names - {"lo"} for names in seen] == [set()]
    saved = await fabric.inside(vpc().vpc_id, iptables.saved)
    assert ":FORWARD DROP" in saved["mangle"]


async def test_a_filter_that_cannot_be_loaded_leaves_no_link_and_the_next_attempt_goes_on(
    fabric: Fabric, host: Host
) -> None:
    def refuse() -> None:
        raise KernelError("iptables-nft-restore", "no such match", 22)

    with pytest.raises(KernelError, match="no such match"):
        await fabric.open(vpc(), refuse)
    assert "sb7e57u1" not in host.space.links()
    with pytest.raises(NetworkError, match="no router"):
        fabric.router(vpc().vpc_id)
    await fabric.open(vpc(), nothing)
    assert "sb7e57u1" in host.space.links()


async def test_a_deleted_vpc_leaves_nothing_on_the_host(
    fabric: Fabric, opened: Space, host: Host, run_dir: Path
) -> None:
    before = host.space.links()
    routes = host.space.ip("route")
    second = vpc(2)
    await fabric.open(second, nothing)
    await fabric.route_blocks(second.vpc_id, [BLOCK])
    for _ in range(2):
        await fabric.delete(second)
    assert host.space.links() == before
    assert host.space.ip("route") == routes
    assert os.listdir(run_dir / "vpc") == [vpc().vpc_id]


async def test_a_sweep_takes_what_no_vpc_has_and_only_with_our_name(
    fabric: Fabric, opened: Space, host: Host, run_dir: Path
) -> None:
    await fabric.open(vpc(2), nothing)
    for name in ("sb0000u2", "sb7e57u33", "sb7e57x", "dummy7e57"):
        host.space.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"p{name}")
    (run_dir / "vpc" / "vpc-0123").touch()  # made for a pin, and then the agent was killed
    (run_dir / "vpc" / "other").touch()
    swept = await fabric.sweep([vpc()])
    assert sorted(swept) == ["sb7e57u2", "sb7e57u33", vpc(2).vpc_id, "vpc-0123"]
    assert {"sb7e57u1", "sb0000u2", "sb7e57x", "dummy7e57"} <= host.space.links()
    assert sorted(os.listdir(run_dir / "vpc")) == ["other", vpc().vpc_id]
    assert await fabric.sweep([vpc()]) == []
    assert pings(opened, "10.0.0.2")


@pytest.mark.parametrize("name", ["../../etc", "vpc-", "vpc-XYZ", "vpc-" + "0" * 40, ""])
async def test_what_is_no_id_of_a_vpc_becomes_no_path(fabric: Fabric, name: str) -> None:
    hostile = Vpc(vpc_id=name, cidr_block="10.0.0.0/16", number=9, created_at=0)
    with pytest.raises(NetworkError, match="not the id of a VPC"):
        await fabric.open(hostile, nothing)
