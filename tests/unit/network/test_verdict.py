"""Who may talk to whom: each row a fact of AWS.

VPCUG is the Amazon VPC User Guide, EC2UG the Amazon EC2 User Guide, ECSDG the Amazon ECS Developer
Guide.
"""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from sandbox.model.vpc import AclEntry, Network, Route, SecurityGroupRule
from sandbox.network.paths import AclCheck
from sandbox.network.verdict import Packet, Policy, Stage, admitting, decide, is_tracked
from tests.networks import (
    EVERYWHERE,
    EVERYWHERE_6,
    OPEN_ACL,
    OPEN_GROUP,
    OUTSIDE,
    OUTSIDE_6,
    acl,
    egress,
    entry,
    group,
    ingress,
    interface,
    internet_gateway,
    nat_gateway,
    network,
    packet,
    prefix_list,
    route_table,
    subnet,
)

# One VPC with a subnet of each kind. `web` and `db` share the public one.
WEB, DB, APP, LOST = "10.0.1.10", "10.0.1.11", "10.0.2.10", "10.0.3.10"
WEB_6, APP_6 = "2600:1f18:0:aa01::a", "2600:1f18:0:aa02::a"
WEB_PUBLIC, LOST_PUBLIC, NAT_PUBLIC = "198.18.1.10", "198.18.3.10", "198.19.255.1"
NAT_PRIVATE = "10.0.1.5"

SUBNETS = (
    subnet("subnet-public", "10.0.1.0/24", ipv6="2600:1f18:0:aa01::/64", table="rtb-public"),
    subnet("subnet-private", "10.0.2.0/24", ipv6="2600:1f18:0:aa02::/64", table="rtb-private"),
    subnet("subnet-lost", "10.0.3.0/24", public_block="198.18.3.0/24"),
)
TABLES = (
    route_table("rtb-public", (EVERYWHERE, "igw-1"), (EVERYWHERE_6, "igw-1")),
    route_table(
        "rtb-private",
        (EVERYWHERE, "nat-1"),
        ("203.0.113.0/24", "nat-gone"),
        ("203.0.113.128/25", "nat-1"),
        ("203.0.113.200/32", "igw-1"),
        (EVERYWHERE_6, "igw-1"),
    ),
)
INTERFACES = (
    interface("eni-web", "subnet-public", WEB, "sg-open", public_ip=WEB_PUBLIC, ipv6=WEB_6),
    interface("eni-db", "subnet-public", DB, "sg-open"),
    interface("eni-app", "subnet-private", APP, "sg-open", ipv6=APP_6),
    interface("eni-lost", "subnet-lost", LOST, "sg-open", public_ip=LOST_PUBLIC),
)
NAT = nat_gateway("nat-1", "subnet-public", NAT_PRIVATE, NAT_PUBLIC)
OPEN = network(
    *(*SUBNETS, *TABLES, *INTERFACES, *NAT, internet_gateway(), group("sg-open", *OPEN_GROUP)),
    ipv6=True,
)
NO_GATEWAY = network(*SUBNETS, *TABLES, *INTERFACES, *NAT, group("sg-open", *OPEN_GROUP))
NO_DNS = network(
    *(*SUBNETS, *TABLES, *INTERFACES, *NAT, group("sg-open", *OPEN_GROUP)),
    enable_dns_support=False,
)
CLOSED = network(
    *(*SUBNETS, *TABLES, *INTERFACES, *NAT, internet_gateway(), group("sg-open")),
    acl("acl-default"),
)


def last(among: Network, one: Packet) -> tuple[bool, Stage]:
    verdict = decide(among, one)
    assert verdict.allowed is verdict.steps[-1].allowed
    assert all(step.allowed for step in verdict.steps[:-1])
    return verdict.allowed, verdict.steps[-1].stage


# Where nothing but the way decides ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "stage"),
    [
        # VPCUG, "Route tables": the local route reaches all subnets of the VPC.
        (WEB, DB, Stage.GROUP_INGRESS),
        (WEB, APP, Stage.GROUP_INGRESS),
        (APP, LOST, Stage.GROUP_INGRESS),
        (WEB_6, APP_6, Stage.GROUP_INGRESS),
        # VPCUG, "Internet gateways": for instances with a public address; IPv6 ones are public.
        (WEB, OUTSIDE, Stage.INTERNET_GATEWAY),
        (WEB_6, OUTSIDE_6, Stage.INTERNET_GATEWAY),
        (APP_6, OUTSIDE_6, Stage.INTERNET_GATEWAY),
        (OUTSIDE, WEB_PUBLIC, Stage.GROUP_INGRESS),
        (OUTSIDE_6, WEB_6, Stage.GROUP_INGRESS),
        # The gateway translates, whatever the subnet's own routes; those are the answer's.
        (OUTSIDE, LOST_PUBLIC, Stage.GROUP_INGRESS),
        # VPCUG, "NAT gateways": out for private subnets; the longest prefix wins.
        (APP, "8.8.8.8", Stage.INTERNET_GATEWAY),
        (APP, "203.0.113.130", Stage.INTERNET_GATEWAY),
        # VPCUG, "Internet gateways": to a public address, also of the same VPC.
        (WEB, WEB_PUBLIC, Stage.GROUP_INGRESS),
        (APP, WEB_PUBLIC, Stage.GROUP_INGRESS),
        # Never out of the task.
        (WEB, WEB, Stage.OWN_ADDRESS),
        (WEB_6, WEB_6, Stage.OWN_ADDRESS),
        # Somebody on the host's own network, or another VPC's public address.
        ("192.168.7.7", WEB_PUBLIC, Stage.GROUP_INGRESS),
        (WEB_PUBLIC, WEB_PUBLIC, Stage.GROUP_INGRESS),
    ],
)
def test_a_way_leads_there(source: str, destination: str, stage: Stage) -> None:
    assert last(OPEN, packet(source, destination, port=80)) == (True, stage)


@pytest.mark.parametrize(
    ("source", "destination", "stage"),
    [
        # VPCUG, "Internet gateways": without a public address nothing is carried.
        (DB, OUTSIDE, Stage.INTERNET_GATEWAY),
        (DB, WEB_PUBLIC, Stage.INTERNET_GATEWAY),
        (APP, "203.0.113.200", Stage.INTERNET_GATEWAY),
        # It leads to no private network (RFC 1918, RFC 6598), and not to other clouds' metadata.
        (WEB, "10.1.0.1", Stage.INTERNET_GATEWAY),
        (WEB, "172.16.0.1", Stage.INTERNET_GATEWAY),
        (WEB, "192.168.0.1", Stage.INTERNET_GATEWAY),
        (WEB, "100.64.0.1", Stage.INTERNET_GATEWAY),
        (WEB, "168.63.129.16", Stage.INTERNET_GATEWAY),
        (WEB_6, "fd00::1", Stage.INTERNET_GATEWAY),
        (APP, "192.168.0.1", Stage.INTERNET_GATEWAY),
        # VPCUG, "Route tables": no route; a route to what was deleted is a black hole.
        (LOST, OUTSIDE, Stage.ROUTE),
        (APP, OUTSIDE, Stage.ROUTE),
        # VPCUG, "Subnet sizing": the router, the reserved ones, the broadcast address.
        (WEB, "10.0.1.1", Stage.DESTINATION),
        (WEB, "10.0.1.2", Stage.DESTINATION),
        (WEB, "10.0.1.255", Stage.DESTINATION),
        # Of the VPC, but nobody's: inside, outside of all subnets, and public.
        (WEB, "10.0.1.77", Stage.DESTINATION),
        (WEB, "10.0.99.1", Stage.DESTINATION),
        (WEB_6, "2600:1f18:0:aa01::ff", Stage.DESTINATION),
        (WEB, "198.18.3.99", Stage.DESTINATION),
        (OUTSIDE, "198.18.3.99", Stage.DESTINATION),
        # Nobody outside can name a private address.
        (OUTSIDE, WEB, Stage.DESTINATION),
        # VPCUG, "NAT gateways": they accept no connection.
        (WEB, NAT_PRIVATE, Stage.DESTINATION),
        (WEB, NAT_PUBLIC, Stage.DESTINATION),
        (OUTSIDE, NAT_PUBLIC, Stage.DESTINATION),
        (NAT_PRIVATE, WEB, Stage.SOURCE_CHECK),
        # VPCUG, "VPC": no multicast, no broadcast; RFC 1122: loopback and 0/8 are on no wire.
        (WEB, "224.0.0.251", Stage.DESTINATION),
        (WEB, "255.255.255.255", Stage.DESTINATION),
        (WEB, "127.0.0.1", Stage.DESTINATION),
        (WEB, "0.0.0.0", Stage.DESTINATION),
        (WEB_6, "ff02::1", Stage.DESTINATION),
        (WEB_6, "::1", Stage.DESTINATION),
        # Link-local addresses that are no service.
        (WEB, "169.254.1.1", Stage.LOCAL_SERVICE),
        (WEB_6, "fe80::1", Stage.LOCAL_SERVICE),
        # Whoever comes from outside has no source of the inside.
        ("10.0.1.77", WEB_PUBLIC, Stage.SOURCE_CHECK),
        ("169.254.169.254", WEB_PUBLIC, Stage.SOURCE_CHECK),
        ("127.0.0.1", WEB_PUBLIC, Stage.SOURCE_CHECK),
        ("255.255.255.255", WEB_PUBLIC, Stage.SOURCE_CHECK),
        ("224.0.0.1", WEB_PUBLIC, Stage.SOURCE_CHECK),
        ("ff02::1", WEB_6, Stage.SOURCE_CHECK),
    ],
)
def test_no_rule_can_open_what_has_no_way(source: str, destination: str, stage: Stage) -> None:
    assert last(OPEN, packet(source, destination, port=80)) == (False, stage)


@pytest.mark.parametrize(
    ("source", "destination", "stage"),
    [
        (WEB, OUTSIDE, Stage.ROUTE),
        (APP, "8.8.8.8", Stage.ROUTE),
        (OUTSIDE, WEB_PUBLIC, Stage.INTERNET_GATEWAY),
    ],
)
def test_a_vpc_without_internet_gateway_is_an_island(
    source: str, destination: str, stage: Stage
) -> None:
    assert last(NO_GATEWAY, packet(source, destination, port=80)) == (False, stage)


@pytest.mark.parametrize("protocol", ["47", "132"])
def test_a_nat_gateway_carries_only_tcp_udp_and_icmp(protocol: str) -> None:
    """VPCUG, "NAT gateway basics"."""
    assert last(OPEN, packet(APP, "8.8.8.8", protocol)) == (False, Stage.NAT_GATEWAY)
    assert last(OPEN, packet(WEB, "8.8.8.8", protocol))[0]


def test_a_nat_gateway_in_a_subnet_that_leads_to_no_internet_gateway_lets_nothing_out() -> None:
    """VPCUG, "NAT gateways": a public one is in a public subnet."""
    shut_in = network(
        *(*SUBNETS, *INTERFACES, internet_gateway(), group("sg-open", *OPEN_GROUP)),
        *nat_gateway("nat-1", "subnet-private", "10.0.2.5", NAT_PUBLIC),
        route_table("rtb-public", (EVERYWHERE, "nat-1")),
        route_table("rtb-private", (EVERYWHERE, "nat-1")),
    )
    verdict = decide(shut_in, packet(WEB, OUTSIDE, port=80))
    assert not verdict.allowed
    assert verdict.steps[-1].stage is Stage.ROUTE
    assert verdict.steps[-1].subject == "rtb-private"


def test_a_deleted_nat_gateway_is_a_black_hole() -> None:
    gone = network(
        *(*SUBNETS, *TABLES, *INTERFACES, internet_gateway(), group("sg-open", *OPEN_GROUP)),
        *nat_gateway("nat-1", "subnet-public", NAT_PRIVATE, NAT_PUBLIC, deleted=True),
    )
    step = decide(gone, packet(APP, "8.8.8.8", port=80)).steps[-1]
    assert not step.allowed
    assert step.rule == Route(destination=EVERYWHERE, target="nat-1")


def test_no_route_takes_the_vpcs_own_traffic_elsewhere() -> None:
    """VPCUG, "Route priority": the local route wins here, whatever else there is."""
    bent = network(
        *(*SUBNETS, *INTERFACES, *NAT, internet_gateway(), group("sg-open", *OPEN_GROUP)),
        route_table("rtb-public", ("10.0.2.0/24", "nat-gone"), (f"{DB}/32", "igw-1")),
        route_table("rtb-private", (f"{WEB}/32", "nat-gone")),
    )
    for destination in (DB, APP):
        verdict = decide(bent, packet(WEB, destination, port=80))
        assert verdict.allowed
        [route] = [step.rule for step in verdict.steps if step.stage is Stage.ROUTE]
        assert route == Route(destination="10.0.0.0/16", target="local")


def test_private_destinations_can_be_opened_by_who_owns_the_host() -> None:
    policy = Policy(OPEN, private_destinations=["192.168.7.0/24"])
    assert policy.decide(packet(WEB, "192.168.7.7", port=80)).allowed
    assert not policy.decide(packet(WEB, "192.168.8.7", port=80)).allowed


# What is always reachable ------------------------------------------------------------------------


@pytest.mark.parametrize("among", [OPEN, CLOSED], ids=["open", "closed"])
@pytest.mark.parametrize(
    ("destination", "protocol", "port", "allowed"),
    [
        # VPCUG, "DNS attributes for your VPC": base plus two, and 169.254.169.253.
        ("10.0.0.2", "udp", 53, True),
        ("10.0.0.2", "tcp", 53, True),
        ("169.254.169.253", "udp", 53, True),
        ("169.254.169.253", "tcp", 53, True),
        ("10.0.0.2", "tcp", 80, False),
        ("10.0.0.2", "icmp", 8, False),
        ("169.254.169.253", "udp", 5353, False),
        # ECSDG, "Task metadata available for tasks on Fargate".
        ("169.254.170.2", "tcp", 80, True),
        ("169.254.170.2", "tcp", 443, False),
        ("169.254.170.2", "udp", 80, False),
        # There is no instance whose metadata it could be.
        ("169.254.169.254", "tcp", 80, False),
    ],
)
def test_groups_and_acls_are_not_asked_about_the_vpcs_own_services(
    among: Network, destination: str, protocol: str, port: int, allowed: bool
) -> None:
    found = last(among, packet(APP, destination, protocol, port))
    assert found == (allowed, Stage.LOCAL_SERVICE)


@pytest.mark.parametrize("resolver", ["10.0.0.2", "169.254.169.253"])
def test_without_dns_support_there_is_no_resolver(resolver: str) -> None:
    found = decide(NO_DNS, packet(WEB, resolver, "udp", 53)).steps[-1]
    assert (found.allowed, found.stage) == (False, Stage.LOCAL_SERVICE)
    assert found.text == f"{resolver} is silent: vpc-1 has no DNS support"
    assert decide(NO_DNS, packet(WEB, "169.254.170.2", "tcp", 80)).allowed


def test_closed_groups_close_everything_else() -> None:
    assert last(CLOSED, packet(WEB, DB, port=80)) == (False, Stage.GROUP_EGRESS)


# Security groups ---------------------------------------------------------------------------------


def between(
    *rules: SecurityGroupRule, target: tuple[SecurityGroupRule, ...] | None = None
) -> Network:
    """`client` (sg-client) with free egress, `server` (sg-server) with these rules, one subnet."""
    return network(
        subnet("subnet-1", "10.0.1.0/24"),
        subnet("subnet-2", "10.0.2.0/24"),
        group("sg-client", egress("-1"), egress("-1", peer="::/0")),
        group("sg-server", *rules),
        group("sg-other", *(target or ())),
        prefix_list("pl-1", "10.9.0.0/16", "10.0.1.8/29"),
        prefix_list("pl-empty"),
        interface("eni-client", "subnet-1", WEB, "sg-client"),
        interface("eni-server", "subnet-1", DB, "sg-server", "sg-other"),
        interface("eni-far", "subnet-2", APP, "sg-client"),
    )


@pytest.mark.parametrize(
    ("rule", "protocol", "port", "allowed"),
    [
        # EC2 API Reference, IpPermission: -1 is all protocols and ports.
        (ingress("-1"), "tcp", 80, True),
        (ingress("-1"), "icmp", 8, True),
        (ingress("-1"), "47", 0, True),
        # tcp and udp have a range of ports, both ends included.
        (ingress("tcp", (80, 81)), "tcp", 79, False),
        (ingress("tcp", (80, 81)), "tcp", 80, True),
        (ingress("tcp", (80, 81)), "tcp", 81, True),
        (ingress("tcp", (80, 81)), "tcp", 82, False),
        (ingress("tcp", (80, 81)), "udp", 80, False),
        (ingress("tcp", (0, 65535)), "tcp", 65535, True),
        (ingress("6", (80, 80)), "tcp", 80, True),
        (ingress("6", (80, 80)), "tcp", 81, False),
        (ingress("udp", 53), "udp", 53, True),
        (ingress("udp"), "udp", 53, True),
        # icmp has a type and a code, -1 is any.
        (ingress("icmp", (-1, -1)), "icmp", 8, True),
        (ingress("icmp", (8, -1)), "icmp", 8, True),
        (ingress("icmp", (8, 0)), "icmp", 8, True),
        (ingress("icmp", (8, 1)), "icmp", 8, False),
        (ingress("icmp", (0, -1)), "icmp", 8, False),
        (ingress("icmp"), "icmp", 13, True),
        (ingress("icmp", (-1, -1)), "tcp", 80, False),
        # Another protocol is all of it, whatever ports were written.
        (ingress("47"), "47", 0, True),
        (ingress("47", (80, 80)), "47", 0, True),
        (ingress("47"), "132", 0, False),
        # Egress rules admit nothing in.
        (egress("-1"), "tcp", 80, False),
    ],
)
def test_a_rule_admits_its_traffic(
    rule: SecurityGroupRule, protocol: str, port: int, allowed: bool
) -> None:
    found = last(between(rule), packet(WEB, DB, protocol, port))
    assert found == (allowed, Stage.GROUP_INGRESS)


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (EVERYWHERE, True),
        ("10.0.1.10/32", True),
        ("10.0.1.11/32", False),
        ("10.0.1.8/29", True),
        ("10.0.1.0/29", False),
        (EVERYWHERE_6, False),
        # VPCUG, "Managed prefix lists".
        ("pl-1", True),
        ("pl-empty", False),
        # VPCUG, "Security group rules": the interfaces that carry the group, also itself.
        ("sg-client", True),
        ("sg-server", False),
        ("sg-deleted", False),
    ],
)
def test_a_rule_admits_its_peers(peer: str, allowed: bool) -> None:
    found = last(between(ingress("tcp", 80, peer)), packet(WEB, DB, port=80))
    assert found == (allowed, Stage.GROUP_INGRESS)


def test_rules_of_ipv6_are_of_ipv6_alone() -> None:
    """0.0.0.0/0 is no IPv6 address, nor ::/0 an IPv4 one. (VPCUG, "Security group rules")"""

    def both(peer: str) -> Network:
        return network(
            *(*SUBNETS, *TABLES, *INTERFACES, *NAT, internet_gateway()),
            group("sg-open", egress("-1"), egress("-1", peer="::/0"), ingress("-1", peer=peer)),
            ipv6=True,
        )

    for peer, four, six in ((EVERYWHERE, True, False), (EVERYWHERE_6, False, True)):
        assert decide(both(peer), packet(WEB, DB, port=80)).allowed is four
        assert decide(both(peer), packet(WEB_6, APP_6, port=80)).allowed is six
    # A reference is both.
    assert decide(both("sg-open"), packet(WEB, DB, port=80)).allowed
    assert decide(both("sg-open"), packet(WEB_6, APP_6, "icmpv6", 128)).allowed


def test_the_rules_of_all_groups_are_united() -> None:
    one = between(ingress("tcp", 80), target=(ingress("tcp", 443),))
    assert decide(one, packet(WEB, DB, port=80)).steps[-1].subject == "sg-server"
    assert decide(one, packet(WEB, DB, port=443)).steps[-1].subject == "sg-other"
    assert not decide(one, packet(WEB, DB, port=22)).allowed


def test_a_group_holds_also_inside_a_subnet_and_towards_its_own_members() -> None:
    members = network(
        subnet("subnet-1", "10.0.1.0/24"),
        group("sg-1", egress("-1")),
        interface("eni-1", "subnet-1", WEB, "sg-1"),
        interface("eni-2", "subnet-1", DB, "sg-1"),
    )
    assert last(members, packet(WEB, DB, port=80)) == (False, Stage.GROUP_INGRESS)


def test_egress_of_the_sender_is_asked_before_ingress_of_the_receiver() -> None:
    shut = network(
        subnet("subnet-1", "10.0.1.0/24"),
        group("sg-1", egress("tcp", 80, "sg-2")),
        group("sg-2", ingress("tcp", (80, 81), "sg-1")),
        interface("eni-1", "subnet-1", WEB, "sg-1"),
        interface("eni-2", "subnet-1", DB, "sg-2"),
    )
    assert last(shut, packet(WEB, DB, port=80)) == (True, Stage.GROUP_INGRESS)
    assert last(shut, packet(WEB, DB, port=81)) == (False, Stage.GROUP_EGRESS)
    assert last(shut, packet(DB, WEB, port=80)) == (False, Stage.GROUP_EGRESS)


@pytest.mark.parametrize("source", [WEB, LOST, APP])
def test_what_comes_by_a_public_address_is_no_member_of_a_group(source: str) -> None:
    """VPCUG, "Security group rules": references are private addresses."""
    members = network(
        *(*SUBNETS, *INTERFACES, *NAT, internet_gateway()),
        route_table("rtb-public", (EVERYWHERE, "igw-1")),
        route_table("rtb-private", (EVERYWHERE, "nat-1")),
        route_table("rtb-main", (EVERYWHERE, "igw-1"), is_main=True),
        group("sg-open", egress("-1"), ingress("-1", peer="sg-open")),
    )
    assert decide(members, packet(source, DB, port=80)).allowed
    assert last(members, packet(source, WEB_PUBLIC, port=80)) == (False, Stage.GROUP_INGRESS)


@pytest.mark.parametrize(
    ("source", "seen"), [(WEB, WEB_PUBLIC), (APP, NAT_PUBLIC), (OUTSIDE, OUTSIDE)]
)
def test_a_block_admits_the_source_that_the_internet_shows(source: str, seen: str) -> None:
    admits = network(
        *(*SUBNETS, *TABLES, *INTERFACES, *NAT, internet_gateway()),
        group("sg-open", egress("-1"), ingress("-1", peer=f"{seen}/32")),
    )
    assert decide(admits, packet(source, WEB_PUBLIC, port=80)).allowed
    assert not decide(admits, packet("203.0.113.10", WEB_PUBLIC, port=80)).allowed


# Network ACLs ------------------------------------------------------------------------------------


def bordered(*entries: AclEntry) -> Network:
    """The private subnet behind these entries, all other subnets open."""
    subnets = (
        SUBNETS[0],
        subnet("subnet-private", "10.0.2.0/24", table="rtb-private", acl="acl-1"),
        SUBNETS[2],
    )
    return network(
        *(*subnets, *TABLES, *INTERFACES, *NAT, internet_gateway()),
        interface("eni-near", "subnet-private", "10.0.2.11", "sg-open"),
        group("sg-open", *OPEN_GROUP),
        acl("acl-1", *entries),
    )


@pytest.mark.parametrize(
    ("entries", "protocol", "port", "allowed"),
    [
        # VPCUG, "Network ACL rules": the lowest number that matches, whatever comes after.
        ((entry(100, "ingress", "allow"),), "tcp", 80, True),
        ((entry(100, "ingress", "allow"), entry(90, "ingress", "deny")), "tcp", 80, False),
        ((entry(100, "ingress", "allow"), entry(110, "ingress", "deny")), "tcp", 80, True),
        (
            (entry(90, "ingress", "deny", "6", 81), entry(100, "ingress", "allow")),
            *("tcp", 80, True),
        ),
        (
            (entry(90, "ingress", "deny", "6", 80), entry(100, "ingress", "allow")),
            *("tcp", 80, False),
        ),
        # After the last one, nothing passes.
        ((), "tcp", 80, False),
        ((entry(100, "egress", "allow"),), "tcp", 80, False),
        # Protocols are numbers here; icmp has type and code.
        ((entry(100, "ingress", "allow", "17"),), "udp", 80, True),
        ((entry(100, "ingress", "allow", "17"),), "tcp", 80, False),
        ((entry(100, "ingress", "allow", "1", (8, -1)),), "icmp", 8, True),
        ((entry(100, "ingress", "allow", "1", (0, -1)),), "icmp", 8, False),
        ((entry(100, "ingress", "allow", "1"),), "icmp", 8, True),
        ((entry(100, "ingress", "allow", "6", (80, 90)),), "tcp", 90, True),
        ((entry(100, "ingress", "allow", "6", (80, 90)),), "tcp", 91, False),
        ((entry(100, "ingress", "allow", "47"),), "47", 0, True),
        # Blocks.
        ((entry(100, "ingress", "allow", cidr="10.0.1.0/24"),), "tcp", 80, True),
        ((entry(100, "ingress", "allow", cidr="10.0.1.11/32"),), "tcp", 80, False),
        ((entry(100, "ingress", "allow", cidr="::/0"),), "tcp", 80, False),
    ],
)
def test_the_first_entry_that_matches_decides(
    entries: tuple[AclEntry, ...], protocol: str, port: int, allowed: bool
) -> None:
    stage = Stage.GROUP_INGRESS if allowed else Stage.ACL_INGRESS
    found = last(bordered(*entries), packet(WEB, APP, protocol, port))
    assert found == (allowed, stage)


def test_an_acl_is_not_asked_inside_of_its_subnet() -> None:
    """VPCUG, "Network ACL basics": traffic that enters or leaves a subnet."""
    shut = bordered()
    assert decide(shut, packet(APP, "10.0.2.11", port=80)).allowed
    assert Policy(shut).reply(packet(APP, "10.0.2.11", port=80)).steps == ()
    assert last(shut, packet(APP, WEB, port=80)) == (False, Stage.ACL_EGRESS)


def test_an_acl_sees_private_addresses_inside_and_public_ones_outside() -> None:
    """VPCUG, "Internet gateways": the translation is outside of the subnet."""
    names = network(
        *(*SUBNETS, *TABLES, *INTERFACES, *NAT, internet_gateway()),
        group("sg-open", *OPEN_GROUP),
    )
    trace = Policy(names).trace(packet(APP, WEB_PUBLIC, port=80))
    checks = [(met.packet, step.stage) for met, step in trace if isinstance(met, AclCheck)]
    seen = [(stage, str(one.source), str(one.destination)) for one, stage in checks]
    assert seen == [
        (Stage.ACL_EGRESS, APP, WEB_PUBLIC),
        (Stage.ACL_INGRESS, APP, WEB_PUBLIC),
        (Stage.ACL_EGRESS, NAT_PRIVATE, WEB_PUBLIC),
        (Stage.ACL_INGRESS, NAT_PUBLIC, WEB),
    ]


# The answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "allowed"),
    [
        # VPCUG, "Network ACLs": stateless, an answer needs its own rule, to the client's port.
        ((), False),
        ((entry(100, "egress", "allow"),), True),
        ((entry(100, "egress", "allow", "6", (1024, 65535)),), True),
        ((entry(100, "egress", "allow", "6", (80, 80)),), False),
        ((entry(100, "egress", "allow", "17"),), False),
    ],
)
def test_an_answer_needs_an_entry_of_its_own(entries: tuple[AclEntry, ...], allowed: bool) -> None:
    policy = Policy(bordered(entry(100, "ingress", "allow"), *entries))
    request = packet(WEB, APP, port=80, source_port=40000)
    assert policy.decide(request).allowed
    reply = policy.reply(request)
    assert reply.allowed is allowed
    assert reply.steps[0].stage is Stage.ACL_EGRESS
    assert reply.steps[0].subject == "acl-1"


def test_an_answer_to_a_ping_is_an_echo_reply() -> None:
    pings = bordered(
        entry(1, "ingress", "allow", "1", (8, -1)), entry(1, "egress", "allow", "1", 0)
    )
    assert Policy(pings).reply(packet(WEB, APP, "icmp", 8)).allowed
    times = bordered(entry(1, "ingress", "allow", "1"), entry(1, "egress", "allow", "1", 0))
    assert not Policy(times).reply(packet(WEB, APP, "icmp", 13)).allowed


def test_groups_are_not_asked_about_an_answer() -> None:
    """VPCUG, "Security group basics": stateful."""
    policy = Policy(between(ingress("tcp", 80)))
    assert policy.decide(packet(APP, DB, port=80)).allowed
    assert [step.stage for step in policy.reply(packet(APP, DB, port=80)).steps] == [
        Stage.ACL_EGRESS,
        Stage.ACL_INGRESS,
    ]


def test_an_answer_to_the_internet_needs_a_route_to_the_gateway() -> None:
    """VPCUG, "Internet gateways": the subnet's table has to lead there."""
    reply = Policy(OPEN).reply(packet(OUTSIDE, LOST_PUBLIC, port=80))
    assert [(step.stage, step.allowed) for step in reply.steps] == [
        (Stage.ACL_EGRESS, True),
        (Stage.ROUTE, False),
    ]
    assert Policy(OPEN).reply(packet(OUTSIDE, WEB_PUBLIC, port=80)).allowed


def test_an_answer_through_a_nat_gateway_crosses_its_subnet_twice() -> None:
    reply = Policy(OPEN).reply(packet(APP, "8.8.8.8", port=80))
    assert [step.stage for step in reply.steps] == [
        Stage.ACL_INGRESS,
        Stage.ACL_EGRESS,
        Stage.ACL_INGRESS,
    ]


@pytest.mark.parametrize("type_", [0, 3, 11])
def test_nothing_answers_an_icmp_error_or_an_answer(type_: int) -> None:
    shut = bordered(entry(1, "ingress", "allow"))
    assert Policy(shut).reply(packet(WEB, APP, "icmp", type_)).steps == ()
    assert packet(WEB, APP, "icmp", 3).reply().icmp_type == 3


# Which rule decides ------------------------------------------------------------------------------


def test_each_step_names_its_subject_and_its_rule() -> None:
    verdict = decide(OPEN, packet(WEB, APP, port=80))
    assert [(step.stage, step.subject) for step in verdict.steps] == [
        (Stage.SOURCE_CHECK, "eni-web"),
        (Stage.GROUP_EGRESS, "sg-open"),
        (Stage.ACL_EGRESS, "acl-default"),
        (Stage.ROUTE, "rtb-public"),
        (Stage.ACL_INGRESS, "acl-default"),
        (Stage.GROUP_INGRESS, "sg-open"),
    ]
    assert [step.rule for step in verdict.steps] == [
        None,
        OPEN.groups["sg-open"].rules[2],
        OPEN_ACL[2],
        Route(destination="10.0.0.0/16", target="local"),
        OPEN_ACL[0],
        OPEN.groups["sg-open"].rules[0],
    ]


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (packet(WEB, APP, port=80), "sg-open ingress allows all traffic from 0.0.0.0/0 (sgr-"),
        (packet(LOST, OUTSIDE), f"rtb-main has no route to {OUTSIDE}"),
        (packet(APP, OUTSIDE), "rtb-private: 203.0.113.0/24 -> nat-gone, which is not there: a bl"),
        (packet(DB, OUTSIDE), "eni-db has no public address, without which igw-1 carries nothing"),
        (packet(WEB, OUTSIDE), f"igw-1 carries it out with the public source {WEB_PUBLIC}"),
        (packet(WEB, "10.0.1.1"), "10.0.1.1 is the router, which forwards and answers nothing"),
    ],
)
def test_a_step_says_in_a_line_what_decided(one: Packet, text: str) -> None:
    found = decide(OPEN, one).steps[-1].text
    assert found.startswith(text)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("protocol", "port", "traffic"),
    [
        ("tcp", 80, "tcp 80"),
        ("udp", 53, "udp 53"),
        ("icmp", 8, "icmp type 8"),
        ("47", 0, "protocol 47"),
    ],
)
def test_a_denial_says_what_was_asked_for(protocol: str, port: int, traffic: str) -> None:
    one = packet(WEB, DB, protocol, port)
    assert decide(between(), one).steps[-1].text == (
        f"no ingress rule of sg-other, sg-server allows {traffic} from {WEB}"
    )
    assert decide(between(), one).steps[-1].subject == "eni-server"
    crossing = packet(WEB, APP, protocol, port)
    assert (
        decide(bordered(), crossing).steps[-1].text
        == f"acl-1 ingress * denies {traffic} from {WEB}"
    )


def test_the_admitting_rule_is_the_first_of_the_first_group_that_has_one() -> None:
    one = between(ingress("tcp", 80), ingress("-1"), target=(ingress("tcp", 443),))
    server = one.interfaces["eni-server"]
    for port, group_id, position in (
        (80, "sg-server", 0),
        (443, "sg-other", 0),
        (22, "sg-server", 1),
    ):
        found = admitting(one, server, packet(WEB, DB, port=port), is_egress=False)
        assert found == (one.groups[group_id], one.groups[group_id].rules[position])
    assert admitting(one, server, packet(DB, WEB, port=80), is_egress=True) is None


# Tracking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "source", "protocol", "tracked"),
    [
        # EC2UG, "Security group connection tracking", "Untracked connections".
        ((ingress("tcp", 80), egress("-1")), OUTSIDE, "tcp", False),
        ((ingress("udp", 80), egress("-1")), OUTSIDE, "udp", False),
        ((ingress("-1"), egress("-1")), WEB, "tcp", False),
        ((ingress("tcp", 80), egress("tcp", (0, 65535))), OUTSIDE, "tcp", False),
        # A narrower peer, or a narrower answer.
        ((ingress("tcp", 80, "203.0.113.0/24"), egress("-1")), OUTSIDE, "tcp", True),
        ((ingress("tcp", 80), egress("tcp", (1024, 65535))), OUTSIDE, "tcp", True),
        ((ingress("tcp", 80), egress("udp", (0, 65535))), OUTSIDE, "tcp", True),
        ((ingress("tcp", 80), egress("-1", peer="10.0.0.0/16")), OUTSIDE, "tcp", True),
        ((ingress("tcp", 80), egress("-1", peer="::/0")), OUTSIDE, "tcp", True),
        ((ingress("tcp", 80),), OUTSIDE, "tcp", True),
        # Open to everywhere, but not this; narrow for this.
        ((ingress("tcp", 81), ingress("tcp", 80, "sg-client"), egress("-1")), WEB, "tcp", True),
        # ICMP always, other protocols by address.
        ((ingress("-1"), egress("-1")), OUTSIDE, "icmp", True),
        ((ingress("-1"), egress("-1")), OUTSIDE, "47", True),
    ],
)
def test_a_flow_is_untracked_only_if_both_directions_are_open(
    rules: tuple[SecurityGroupRule, ...], source: str, protocol: str, tracked: bool
) -> None:
    one = between(*rules)
    port = 80 if protocol in ("tcp", "udp") else 0
    found = is_tracked(one, one.interfaces["eni-server"], packet(source, DB, protocol, port), False)
    assert found is tracked


def test_both_directions_may_be_open_by_different_groups() -> None:
    one = between(ingress("tcp", 80), target=(egress("-1"),))
    assert not is_tracked(one, one.interfaces["eni-server"], packet(WEB, DB, port=80), False)


def test_what_goes_through_a_nat_gateway_is_tracked() -> None:
    """EC2UG, "Automatically tracked connections"."""
    app, web = OPEN.interfaces["eni-app"], OPEN.interfaces["eni-web"]
    assert is_tracked(OPEN, app, packet(APP, "8.8.8.8", port=443), True)
    assert not is_tracked(OPEN, app, packet(APP, WEB, port=443), True)
    assert not is_tracked(OPEN, web, packet(WEB, "8.8.8.8", port=443), True)
    # In, it is the other's way that counts, even if an answer would be sent to the NAT gateway.
    assert not is_tracked(OPEN, app, packet(OUTSIDE, "198.18.2.10", port=443), False)


# Packets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": 256},
        {"protocol": -1},
        {"source_port": 65536},
        {"destination_port": -1},
        {"icmp_type": 256},
        {"icmp_code": 256},
        {"destination": ip_address("::1")},
    ],
)
def test_what_fits_no_header_is_no_packet(fields: dict[str, int]) -> None:
    good = {"source": ip_address(WEB), "destination": ip_address(DB), "protocol": 6}
    with pytest.raises(ValueError):
        Packet(**good | fields)  # type: ignore[arg-type]
