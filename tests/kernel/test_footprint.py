"""The host's own rules: what is added to them, beside what hosts have, in a namespace that plays
the host.

The rules of others are what their documentation and sources say, cut down to what decides: Docker's
chains ("Packet filtering and firewalls"), ufw's (ufw-framework(8)), and a table with a later
priority as firewalld has one, which no rule of ours can overrule.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox.kernel import netns
from sandbox.kernel.netfilter import BACKENDS, Backend, Chain, Iptables, Rule, RuleSet, Table
from sandbox.network.fabric import Fabric
from tests.kernel.namespaces import (
    Host,
    Space,
    catching,
    forge,
    pings,
    playing_host,
)
from tests.kernel.test_fabric import BLOCK, INSTANCE, POOL, nothing, router_of, vpc

PUBLIC = "198.18.16.5"

DOCKER = RuleSet(
    tables=(
        Table(
            "filter",
            (
                Chain(
                    "FORWARD",
                    (
                        ("-j", "DOCKER-USER"),
                        ("-j", "DOCKER-FORWARD"),
                    ),
                    "DROP",
                ),
                Chain("DOCKER-USER", (("-j", "RETURN"),)),
                Chain(
                    "DOCKER-FORWARD",
                    (
                        ("-i", "docker0", "!", "-o", "docker0", "-j", "ACCEPT"),
                        (
                            *("-o", "docker0", "-m", "conntrack"),
                            *("--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"),
                        ),
                    ),
                ),
            ),
        ),
        Table(
            "nat",
            (
                Chain(
                    "POSTROUTING",
                    (("-s", "172.17.0.0/16", "!", "-o", "docker0", "-j", "MASQUERADE"),),
                    "ACCEPT",
                ),
            ),
        ),
    )
)

ESTABLISHED: Rule = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
UFW = RuleSet(
    tables=(
        Table(
            "filter",
            (
                Chain("INPUT", (("-j", "ufw-before-input"),), "DROP"),
                Chain("FORWARD", (("-j", "ufw-before-forward"), ("-j", "ufw-reject")), "DROP"),
                Chain("OUTPUT", (), "ACCEPT"),
                Chain("ufw-before-input", (("-i", "lo", "-j", "ACCEPT"), ESTABLISHED)),
                Chain("ufw-before-forward", (ESTABLISHED,)),
                Chain("ufw-reject", (("-j", "REJECT"),)),
            ),
        ),
    )
)
PLAIN = RuleSet(
    tables=(Table("filter", (Chain("INPUT", (("-i", "lo", "-j", "ACCEPT"),), "ACCEPT"),)),)
)

BESIDE = {"docker": DOCKER, "ufw": UFW, "plain": PLAIN}


@pytest.fixture
def host() -> Iterator[Host]:
    with playing_host() as host:
        # A host that forwards, unless a test says otherwise.
        host.space.call(netns.write_sysctl, "net/ipv4/ip_forward", "1")
        yield host


@pytest.fixture
async def fabric(host: Host, tmp_path: Path) -> AsyncIterator[Fabric]:
    fabric = Fabric(tmp_path / "run", INSTANCE, POOL, host.thread)
    fabric.host_rules.lock_file = str(tmp_path / "lock")
    yield fabric
    await fabric.remove_all()
    await fabric.aclose()


@pytest.fixture
async def router(fabric: Fabric, host: Host) -> AsyncIterator[Space]:
    """Of a VPC with a gateway, which has a public address itself."""
    await fabric.open(vpc(), nothing)
    await fabric.attach_gateway(vpc().vpc_id)
    await fabric.route_blocks(vpc().vpc_id, [BLOCK])
    router = router_of(fabric, host, vpc())
    router.run("ip", "address", "add", f"{PUBLIC}/32", "dev", "lo")
    yield router
    router.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    chosen: Backend = request.param
    if not Iptables(chosen, str(tmp_path / "lock")).works():
        pytest.skip(f"this kernel or host has no iptables of backend {chosen}")
    return chosen


def iptables(fabric: Fabric, backend: Backend) -> Iptables:
    return Iptables(backend, fabric.host_rules.lock_file)


def north_south(host: Host, router: Space) -> dict[str, bool]:
    """What gets through, as a task with a public address would try it."""
    host.lan.run("ip", "route", "replace", f"{BLOCK}", "via", Host.ADDRESS)
    with catching(host.lan, address=Host.PRIVATE) as private:
        forge(router, PUBLIC, Host.PRIVATE)
        reached = arrives(private)
    return {
        "internet": pings(router, Host.INTERNET, source=PUBLIC),
        "from outside": pings(host.lan, PUBLIC),
        "private": reached,
        "the host": pings(router, Host.ADDRESS, source=PUBLIC),
        "from the host": pings(host.space, PUBLIC),
    }


def arrives(receiver: socket.socket) -> bool:
    try:
        receiver.recv(64)
    except TimeoutError:
        return False
    return True


AS_WANTED = {
    "internet": True,
    "from outside": True,
    "private": False,
    "the host": False,
    "from the host": True,
}


@pytest.mark.parametrize("beside", BESIDE)
async def test_north_and_south_work_beside_the_rules_of_others_and_nothing_stays_of_ours(
    fabric: Fabric, host: Host, router: Space, backend: Backend, beside: str
) -> None:
    rules = iptables(fabric, backend)
    host.thread.call(rules.load, BESIDE[beside])
    before = host.thread.call(rules.saved)
    for _ in range(2):
        await fabric.thread.run(fabric.host_rules.install)
        assert north_south(host, router) == AS_WANTED
    saved = host.thread.call(rules.saved)
    jumps = [line for line in saved["filter"] if line.startswith("-A FORWARD")]
    assert jumps[0] == "-A FORWARD -j SB-7e57-FWD"
    assert len([line for lines in saved.values() for line in lines if "-j SB-7e57" in line]) == 3
    for _ in range(2):
        await fabric.thread.run(fabric.host_rules.remove)
    after = host.thread.call(rules.saved)
    assert {t: lines for t, lines in after.items() if t in before} == before
    assert "SB-" not in f"{after}"


async def test_what_leaves_hides_behind_the_hosts_address(
    fabric: Fabric, host: Host, router: Space, backend: Backend
) -> None:
    host.thread.call(iptables(fabric, backend).load, PLAIN)
    await fabric.thread.run(fabric.host_rules.install)
    with catching(host.lan, address=Host.INTERNET) as receiver:
        forge(router, PUBLIC, Host.INTERNET)
        _, sender = receiver.recvfrom(64)
    assert sender[0] == Host.ADDRESS


@pytest.mark.parametrize(
    "damage",
    [
        ("-F", "FORWARD"),
        ("-F",),
        ("-D", "INPUT", "-j", "SB-7e57-IN"),
        ("-F", "SB-7e57-FWD"),
        ("-t", "nat", "-F"),
        ("-D", "SB-7e57-FWD", "1"),
    ],
    ids=" ".join,
)
async def test_what_a_third_party_takes_away_is_seen_and_repaired(
    fabric: Fabric, host: Host, router: Space, backend: Backend, damage: tuple[str, ...]
) -> None:
    host.thread.call(iptables(fabric, backend).load, DOCKER)
    rules = fabric.host_rules
    await fabric.thread.run(rules.install)
    assert not await fabric.thread.run(rules.repair)
    host.space.run(f"iptables-{backend}", *damage)
    assert await fabric.thread.run(rules.repair)
    assert not await fabric.thread.run(rules.repair)
    assert north_south(host, router) == AS_WANTED


async def test_others_may_come_before_us(
    fabric: Fabric, host: Host, router: Space, backend: Backend
) -> None:
    await fabric.thread.run(fabric.host_rules.install)
    host.space.run(f"iptables-{backend}", "-I", "FORWARD", "1", "-i", "docker0", "-j", "ACCEPT")
    await fabric.thread.run(fabric.host_rules.repair)
    assert north_south(host, router) == AS_WANTED


async def test_a_host_with_rules_in_both_backends_gets_ours_in_both(
    fabric: Fabric, host: Host, router: Space, tmp_path: Path
) -> None:
    if not all(iptables(fabric, backend).works() for backend in BACKENDS):
        pytest.skip("this kernel or host has not both backends of iptables")
    host.thread.call(iptables(fabric, "nft").load, UFW)
    await fabric.thread.run(fabric.host_rules.install)
    assert "SB-" not in f"{host.thread.call(iptables(fabric, 'legacy').saved)}"
    host.thread.call(iptables(fabric, "legacy").load, DOCKER)  # and then somebody comes
    assert not pings(router, Host.INTERNET, source=PUBLIC)
    assert await fabric.thread.run(fabric.host_rules.repair)
    assert north_south(host, router) == AS_WANTED
    await fabric.thread.run(fabric.host_rules.remove)
    for backend in BACKENDS:
        assert "SB-" not in f"{host.thread.call(iptables(fabric, backend).saved)}"


async def test_a_drop_in_a_later_table_is_not_overruled(
    fabric: Fabric, host: Host, router: Space
) -> None:
    """As in firewalld's own table of nft, which is asked after ours and wants the uplinks in a zone
    that accepts; `security` is such a table that iptables can write."""
    await fabric.thread.run(fabric.host_rules.install)
    later = ("iptables-nft", "-t", "security")
    host.space.run(*later, "-A", "FORWARD", "-j", "DROP")
    assert not pings(router, Host.INTERNET, source=PUBLIC)
    for direction in ("-i", "-o"):
        host.space.run(*later, "-I", "FORWARD", "1", direction, "sb7e57u+", "-j", "ACCEPT")
    assert north_south(host, router) == AS_WANTED


# Forwarding ------------------------------------------------------------------------------------


def forwarding(host: Host, link: str) -> str | None:
    return host.space.call(netns.read_sysctl, f"net/ipv4/conf/{link}/forwarding")


def sets_ip_forward(host: Host, value: str) -> None:
    host.space.call(netns.write_sysctl, "net/ipv4/ip_forward", value)


async def test_a_host_that_does_not_forward_does_so_for_uplinks_alone(
    fabric: Fabric, host: Host, router: Space, tmp_path: Path
) -> None:
    sets_ip_forward(host, "0")  # also turns it off on the links there are
    await fabric.open(vpc(), nothing)
    await fabric.thread.run(fabric.host_rules.install)
    assert host.space.call(netns.read_sysctl, "net/ipv4/ip_forward") == "0"
    assert (forwarding(host, "eth0"), forwarding(host, "lo")) == ("1", "0")
    assert north_south(host, router) == AS_WANTED
    saved = host.thread.call(iptables(fabric, "nft").saved)
    assert "-A SB-7e57-FWD -i eth0 -j DROP" in saved["filter"]
    memory = json.loads((tmp_path / "run/forwarding.json").read_bytes())
    assert memory == {"links": {"eth0": "0"}}
    await fabric.thread.run(fabric.host_rules.remove)
    assert forwarding(host, "eth0") == "0"
    assert not (tmp_path / "run/forwarding.json").exists()


async def test_what_was_changed_is_known_to_the_next_agent(
    fabric: Fabric, host: Host, router: Space, tmp_path: Path
) -> None:
    sets_ip_forward(host, "0")
    await fabric.thread.run(fabric.host_rules.install)
    later = Fabric(tmp_path / "run", INSTANCE, POOL, host.thread)
    later.host_rules.lock_file = fabric.host_rules.lock_file
    await later.thread.run(later.host_rules.install)
    assert json.loads((tmp_path / "run/forwarding.json").read_bytes()) == {"links": {"eth0": "0"}}
    await later.thread.run(later.host_rules.remove)
    assert forwarding(host, "eth0") == "0"
    await later.aclose()


async def test_forwarding_that_somebody_turns_on_later_is_theirs(
    fabric: Fabric, host: Host, router: Space
) -> None:
    sets_ip_forward(host, "0")
    rules = fabric.host_rules
    await fabric.thread.run(rules.install)
    sets_ip_forward(host, "1")  # as Docker does when it starts
    assert await fabric.thread.run(rules.repair)
    saved = host.thread.call(iptables(fabric, "nft").saved)
    assert "-i eth0" not in f"{saved['filter']}"
    await fabric.thread.run(rules.remove)
    assert forwarding(host, "eth0") == "1"


async def test_a_link_that_gets_the_default_route_later_forwards_then(
    fabric: Fabric, host: Host, router: Space
) -> None:
    sets_ip_forward(host, "0")
    rules = fabric.host_rules
    host.space.run("ip", "route", "del", "default")
    await fabric.thread.run(rules.install)
    assert forwarding(host, "eth0") == "0"
    host.space.run("ip", "route", "add", "default", "via", "192.168.77.1")
    assert await fabric.thread.run(rules.repair)
    assert forwarding(host, "eth0") == "1"
    host.space.run("ip", "route", "del", "default")
    assert await fabric.thread.run(rules.repair)
    assert forwarding(host, "eth0") == "0"
