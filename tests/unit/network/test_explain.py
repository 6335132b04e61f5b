"""What `sandbox explain` says, and that its advice does what it promises."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from msgspec.structs import replace

from sandbox.model.vpc import Network, Route, SecurityGroupRule
from sandbox.network.explain import EPHEMERAL_PORT, explain
from sandbox.network.rules import Stage
from sandbox.network.verdict import Packet, Policy, decide
from tests.networks import (
    EVERYWHERE,
    OUTSIDE,
    PUBLIC_BLOCKS,
    acl,
    egress,
    entry,
    group,
    ingress,
    interface,
    internet_gateway,
    nat_gateway,
    network,
    networks_and_packets,
    packet,
    route_table,
    subnet,
)

WEB, DB, APP, LONE = "10.0.1.10", "10.0.1.11", "10.0.2.10", "10.0.3.10"
WEB_PUBLIC, LONE_PUBLIC = "198.18.1.10", "198.18.3.10"
SHOP = network(
    subnet("subnet-web", "10.0.1.0/24", table="rtb-web"),
    subnet("subnet-app", "10.0.2.0/24", acl="acl-app"),
    subnet("subnet-lone", "10.0.3.0/24"),
    route_table("rtb-web", (EVERYWHERE, "igw-1"), ("203.0.113.0/24", "nat-gone")),
    internet_gateway(),
    *nat_gateway("nat-1", "subnet-web", "10.0.1.5", "198.19.255.1"),
    acl(
        "acl-app",
        entry(90, "ingress", "deny", "6", 8081),
        entry(91, "ingress", "deny", "6", 8082),
        entry(100, "ingress", "allow", cidr="10.0.0.0/16"),
        entry(100, "egress", "allow", "6", (5000, 5001)),
    ),
    group("sg-web", egress("-1"), ingress("tcp", 80, "198.51.100.0/24")),
    group("sg-app", ingress("tcp", (8080, 8083), "sg-web")),
    interface("eni-web", "subnet-web", WEB, "sg-web", public_ip=WEB_PUBLIC),
    interface("eni-db", "subnet-web", DB, "sg-app", "sg-web"),
    interface("eni-app", "subnet-app", APP, "sg-app"),
    interface("eni-lone", "subnet-lone", LONE, "sg-web", public_ip=LONE_PUBLIC),
)


@pytest.mark.parametrize(
    ("one", "stage", "advice"),
    [
        # A member of a group is named by it, somebody outside by the address.
        (
            packet(WEB, DB, port=22),
            Stage.GROUP_INGRESS,
            "sandbox sg allow sg-app --ingress --proto tcp --port 22 --from-group sg-web",
        ),
        (
            packet(OUTSIDE, WEB_PUBLIC, port=80),
            Stage.GROUP_INGRESS,
            f"sandbox sg allow sg-web --ingress --proto tcp --port 80 --cidr {OUTSIDE}/32",
        ),
        # By its public address it is no member.
        (
            packet(WEB, WEB_PUBLIC, "icmp", 8),
            Stage.GROUP_INGRESS,
            f"sandbox sg allow sg-web --ingress --proto icmp --port 8 --cidr {WEB_PUBLIC}/32",
        ),
        (
            packet(APP, WEB, "47"),
            Stage.GROUP_EGRESS,
            f"sandbox sg allow sg-app --egress --proto 47 --cidr {WEB}/32",
        ),
        # A free number before the entry that denies, or after all of them.
        (
            packet(WEB, APP, port=8081),
            Stage.ACL_INGRESS,
            f"sandbox acl allow acl-app 89 --ingress --proto tcp --port 8081 --cidr {WEB}/32",
        ),
        (
            packet(WEB, APP, port=8082),
            Stage.ACL_INGRESS,
            f"sandbox acl allow acl-app 89 --ingress --proto tcp --port 8082 --cidr {WEB}/32",
        ),
        # The answer is to any client's port.
        (
            packet(WEB, APP, port=8080),
            Stage.ACL_EGRESS,
            f"sandbox acl allow acl-app 200 --egress --proto tcp --port 1024-65535 --cidr {WEB}/32",
        ),
        (
            packet(WEB, APP, port=8080, source_port=1023),
            Stage.ACL_EGRESS,
            f"sandbox acl allow acl-app 200 --egress --proto tcp --port 1023 --cidr {WEB}/32",
        ),
        # Who has a public address goes by the internet gateway, others by a NAT gateway.
        (packet(LONE, OUTSIDE), Stage.ROUTE, "sandbox route add rtb-main 0.0.0.0/0 igw-1"),
        (packet(WEB, OUTSIDE), Stage.ROUTE, "sandbox route replace rtb-web 203.0.113.0/24 igw-1"),
        (packet(DB, OUTSIDE), Stage.ROUTE, "sandbox route replace rtb-web 203.0.113.0/24 nat-1"),
        (
            packet(DB, "8.8.8.8"),
            Stage.INTERNET_GATEWAY,
            "give the task a public address: --public-ip",
        ),
        # An answer has to get out by the gateway that the packet came in by.
        (
            packet("198.51.100.7", LONE_PUBLIC, port=80),
            Stage.ROUTE,
            "sandbox route add rtb-main 0.0.0.0/0 igw-1",
        ),
        # Nothing to be done: no route leads to where no gateway does.
        (packet(LONE, "192.168.1.1"), Stage.ROUTE, None),
        (packet(WEB, "10.0.1.77"), Stage.DESTINATION, None),
        (packet(WEB, "192.168.1.1"), Stage.INTERNET_GATEWAY, None),
        (packet(WEB, "169.254.169.254", port=80), Stage.LOCAL_SERVICE, None),
        # Nothing to be changed.
        (packet(WEB, "8.8.8.8", port=443), Stage.INTERNET_GATEWAY, None),
        (packet(WEB, APP, port=8080, source_port=5000), Stage.GROUP_INGRESS, None),
    ],
)
def test_the_advice_is_a_command_for_the_step_that_decides(
    one: Packet, stage: Stage, advice: str | None
) -> None:
    found = explain(SHOP, one)
    assert found.deciding.stage is stage
    assert found.deciding.allowed is found.allowed
    assert found.advice == advice


def test_without_an_internet_gateway_one_has_to_be_attached() -> None:
    island = replace(SHOP, internet_gateway=None)
    for one in (packet(WEB, "8.8.8.8"), packet(OUTSIDE, WEB_PUBLIC)):
        assert explain(island, one).advice == "attach an internet gateway to vpc-1"


def test_a_nat_gateway_itself_needs_the_internet_gateway() -> None:
    shut_in = network(
        subnet("subnet-app", "10.0.2.0/24", table="rtb-app"),
        subnet("subnet-nat", "10.0.3.0/24"),
        route_table("rtb-app", (EVERYWHERE, "nat-1")),
        internet_gateway(),
        *nat_gateway("nat-1", "subnet-nat", "10.0.3.5", "198.19.255.1"),
        group("sg-app", egress("-1")),
        interface("eni-app", "subnet-app", APP, "sg-app"),
    )
    found = explain(shut_in, packet(APP, OUTSIDE))
    assert found.deciding.subject == "rtb-main"
    assert found.advice == "sandbox route add rtb-main 0.0.0.0/0 igw-1"


def test_an_acl_without_a_number_before_the_denial_gets_no_advice() -> None:
    full = replace(
        SHOP, network_acls={"acl-default": acl("acl-default", entry(1, "egress", "deny"))}
    )
    found = explain(full, packet(WEB, "8.8.8.8"))
    assert (found.deciding.stage, found.advice) == (Stage.ACL_EGRESS, None)


def test_the_last_numbers_of_an_acl_are_used_before_it_is_full() -> None:
    entries = [entry(number, "egress", "allow", "17") for number in (32700, 32766)]
    nearly = replace(SHOP, network_acls={"acl-default": acl("acl-default", *entries)})
    command = explain(nearly, packet(WEB, "8.8.8.8")).advice or ""
    assert command.startswith("sandbox acl allow acl-default 32765 --egress")


def test_a_client_without_a_port_is_given_an_ephemeral_one() -> None:
    found = explain(SHOP, packet(WEB, DB, port=80, source_port=0))
    assert found.packet.source_port == EPHEMERAL_PORT
    assert explain(SHOP, packet(WEB, DB, "47")).packet.source_port == 0


def test_a_denied_packet_is_explained_with_the_answer_it_would_get() -> None:
    found = explain(SHOP, packet(WEB, APP, port=9000))
    assert [step.stage for step in found.verdict.steps][-1] is Stage.GROUP_INGRESS
    assert [step.allowed for step in found.reply.steps] == [False]
    assert found.deciding is found.verdict.steps[-1]


@given(networks_and_packets())
def test_who_follows_the_advice_gets_through_or_is_told_that_there_is_no_way(
    case: tuple[Network, Packet],
) -> None:
    among, one = case
    found = explain(among, one)
    for _ in range(20):
        if found.advice is None:
            break
        among = follow(among, one, found.advice)
        again = explain(among, one)
        assert (again.deciding, again.advice) != (found.deciding, found.advice), "no effect"
        found = again
    assert found.advice is None
    if not found.allowed:
        assert found.deciding.stage in (
            *(Stage.SOURCE_CHECK, Stage.DESTINATION, Stage.LOCAL_SERVICE),
            *(Stage.NAT_GATEWAY, Stage.INTERNET_GATEWAY, Stage.ROUTE),
        )
        assert found.deciding.stage is not Stage.ROUTE or not Policy(among).is_carried(one)


@given(networks_and_packets())
def test_an_explanation_decides_as_everybody_else_does(case: tuple[Network, Packet]) -> None:
    among, one = case
    found = explain(among, one)
    assert found.verdict == decide(among, found.packet)
    assert found.allowed is found.deciding.allowed
    assert found.allowed is (found.verdict.allowed and found.reply.allowed)
    assert found.advice is None or not found.allowed


# To do what an advice says -----------------------------------------------------------------------


def follow(among: Network, one: Packet, advice: str) -> Network:
    match shlex.split(advice):
        case ["sandbox", "sg", "allow", group_id, way, *options]:
            changed = among.groups[group_id]
            rule = group_rule(way, options)
            longer = replace(changed, rules=(*changed.rules, rule))
            return replace(among, groups={**among.groups, group_id: longer})
        case ["sandbox", "acl", "allow", acl_id, number, way, *options]:
            words = dict(zip(options[::2], options[1::2], strict=True))
            protocol = {"tcp": "6", "udp": "17", "icmp": "1", "icmpv6": "58"}
            name = words["--proto"]
            new = entry(
                int(number),
                "egress" if way == "--egress" else "ingress",
                "allow",
                protocol.get(name, name),
                ports(words),
                words["--cidr"],
            )
            old = among.network_acls[acl_id]
            assert all(
                (new.rule_number, new.is_egress) != (one.rule_number, one.is_egress)
                for one in old.entries
            )
            entries = (*old.entries, new)
            acls = {**among.network_acls, acl_id: replace(old, entries=entries)}
            return replace(among, network_acls=acls)
        case ["sandbox", "route", verb, table_id, destination, target]:
            table = among.route_tables[table_id]
            kept = [route for route in table.routes if route.destination != destination]
            assert (len(kept) == len(table.routes)) is (verb == "add")
            routes = (*kept, Route(destination=destination, target=target))
            tables = {**among.route_tables, table_id: replace(table, routes=routes)}
            return replace(among, route_tables=tables)
        case ["attach", "an", "internet", "gateway", "to", "vpc-1"]:
            return replace(among, internet_gateway=internet_gateway())
    assert advice == "give the task a public address: --public-ip"
    [sender] = [eni for eni in among.interfaces.values() if eni.private_ip == str(one.source)]
    public = replace(sender, public_ip=PUBLIC_BLOCKS[0].replace(".0/28", ".15"))
    eni = sender.network_interface_id
    return replace(among, interfaces={**among.interfaces, eni: public})


def group_rule(way: str, options: list[str]) -> SecurityGroupRule:
    words = dict(zip(options[::2], options[1::2], strict=True))
    peer = words.get("--from-group") or words["--cidr"]
    return (egress if way == "--egress" else ingress)(words["--proto"], ports(words), peer)


def ports(words: dict[str, str]) -> int | tuple[int, int] | None:
    if "--port" not in words:
        return None
    low, _, high = words["--port"].partition("-")
    return (int(low), int(high)) if high else int(low)
