"""Which flows a change cuts, by the words of the EC2 and VPC User Guides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sandbox.kernel.flows import Flow, FlowTuple
from sandbox.model.vpc import Network, Revocation
from sandbox.network.paths import Arrival, GroupCheck
from sandbox.network.revocation import EGRESS_SHIFT, HALF, Judge, scope
from sandbox.network.verdict import Packet, Policy
from tests.networks import (
    EVERYWHERE,
    OPEN_ACL,
    OPEN_GROUP,
    OUTSIDE,
    acl,
    egress,
    entry,
    group,
    ingress,
    interface,
    internet_gateway,
    nat_gateway,
    network,
    networks,
    packets,
    prefix_list,
    route_table,
    subnet,
)

A, B = "10.0.0.4", "10.0.1.4"
PUBLIC_A, PUBLIC_B, NAT_IP, NAT_PRIVATE = "198.18.0.4", "198.18.0.20", "198.19.255.1", "10.0.0.14"
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "gre": 47}


def flow(
    source: str,
    destination: str,
    protocol: str = "tcp",
    port: int = 80,
    *,
    groups: tuple[int, int] = (0, 0),
    source_here: str | None = None,
    destination_here: str | None = None,
    **members: Any,
) -> Flow:
    """`groups` admitted it at egress and ingress; `..._here` is what answers say instead."""
    ports = protocol in ("tcp", "udp")
    there = FlowTuple(
        source=source,
        destination=destination,
        protocol=PROTOCOLS[protocol],
        source_port=40000 if ports else None,
        destination_port=port if ports else None,
        icmp_type=port if protocol == "icmp" else None,
        icmp_code=0 if protocol == "icmp" else None,
        icmp_id=7 if protocol == "icmp" else None,
    )
    back = replace(
        there,
        source=destination_here or destination,
        destination=source_here or source,
        source_port=there.destination_port,
        destination_port=there.source_port,
        icmp_type=0 if protocol == "icmp" else None,
    )
    mark = groups[0] << EGRESS_SHIFT | groups[1]
    return Flow(original=there, reply=back, mark=mark, **members)


def place(*records: Any, revocation: Revocation = "aws") -> Network:
    """A in sg-a and B in sg-b (unless given), in two subnets, one of them public."""
    given = {type(record) for record in records}
    made = network(
        subnet("subnet-a", "10.0.0.0/28", table="rtb-a", public_block="198.18.0.0/28"),
        subnet("subnet-b", "10.0.1.0/28", table="rtb-b", public_block="198.18.0.16/28"),
        internet_gateway(),
        *records,
        *(one for one in TABLES if type(one) not in given),
        *(one for one in ENIS if type(one) not in given),
    )
    return replace(made, vpc=replace(made.vpc, revocation=revocation))


TABLES = (
    route_table("rtb-a", (EVERYWHERE, "igw-1")),
    route_table("rtb-b", (EVERYWHERE, "igw-1")),
)
ENIS = (
    interface("eni-a", "subnet-a", A, "sg-a", public_ip=PUBLIC_A),
    interface("eni-b", "subnet-b", B, "sg-b", public_ip=PUBLIC_B),
)
SG_A = group("sg-a", egress("-1"), index=1)
SG_B = group("sg-b", ingress("tcp", 80, "sg-a"), ingress("icmp", 8, "10.0.0.0/16"), index=2)
CLOSED_B = group("sg-b", index=2)
CLOSED_A = group("sg-a", index=1)
MODES: tuple[Revocation, ...] = ("aws", "immediate")


def is_cut(before: Network, after: Network, one: Flow, mode: Revocation = "aws") -> bool:
    after = replace(after, vpc=replace(after.vpc, revocation=mode))
    return Judge(before, after).mark(one) is None


# Groups -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "port", "status"), [("tcp", 80, 0), ("tcp", 80, 6), ("icmp", 8, 2), ("gre", 0, 0)]
)
def test_a_tracked_flow_outlives_its_rule_in_aws_and_not_in_immediate(
    protocol: str, port: int, status: int
) -> None:
    rules = (*SG_B.rules, ingress("47", peer="sg-a"))
    before, after = place(SG_A, group("sg-b", *rules, index=2)), place(SG_A, CLOSED_B)
    one = flow(A, B, protocol, port, groups=(1, 2), status=status)
    assert not is_cut(before, after, one, "aws")
    assert is_cut(before, after, one, "immediate")


OPEN_80 = (ingress("tcp", 80, EVERYWHERE), egress("-1"))


@pytest.mark.parametrize(
    ("rules", "source", "protocol", "expected"),
    [
        # The example of the guide: 80 from everywhere is not tracked, 22 from one address is, ICMP
        # always is.
        (OPEN_80, OUTSIDE, "tcp", True),
        ((ingress("tcp", 80, "203.0.113.0/24"), egress("-1")), OUTSIDE, "tcp", False),
        ((ingress("icmp", -1), egress("-1")), OUTSIDE, "icmp", False),
        # No whole protocol in the other direction: tracked.
        ((ingress("tcp", 80), egress("tcp", 443)), OUTSIDE, "tcp", False),
        ((ingress("tcp", 80),), OUTSIDE, "tcp", False),
        # A neighbour is everywhere, too.
        (OPEN_80, A, "tcp", True),
    ],
)
def test_what_ec2_does_not_track_is_cut_with_its_rule(
    rules: tuple[Any, ...], source: str, protocol: str, expected: bool
) -> None:
    before, after = place(SG_A, group("sg-b", *rules, index=2)), place(SG_A, CLOSED_B)
    port = 8 if protocol == "icmp" else 80
    if source == A:
        one = flow(A, B, protocol, port, groups=(1, 2))
    else:
        one = flow(source, PUBLIC_B, protocol, port, groups=(0, 2), destination_here=B)
    assert is_cut(before, after, one, "aws") is expected
    assert is_cut(before, after, one, "immediate")


def test_what_goes_through_a_nat_gateway_is_tracked() -> None:
    tables = (route_table("rtb-a", (EVERYWHERE, "nat-1")), TABLES[1])
    nat = nat_gateway("nat-1", "subnet-b", "10.0.1.14", NAT_IP)
    open_a = group("sg-a", egress("-1"), ingress("-1"), index=1)
    before, after = (place(each, SG_B, *tables, *nat, *ENIS) for each in (open_a, CLOSED_A))
    through = flow(A, OUTSIDE, groups=(1, 0), source_here=NAT_IP)
    assert not is_cut(before, after, through, "aws")
    assert is_cut(before, after, through, "immediate")
    direct = flow(A, OUTSIDE, groups=(1, 0), source_here=PUBLIC_A)
    assert is_cut(place(open_a, SG_B), place(CLOSED_A, SG_B), direct, "aws")


@pytest.mark.parametrize("mode", MODES)
def test_either_end_can_cut(mode: Revocation) -> None:
    open_a = group("sg-a", egress("-1"), ingress("-1"), index=1)
    before = place(open_a, SG_B)
    one = flow(A, B, groups=(1, 2))
    assert not is_cut(before, before, one, mode)
    assert is_cut(before, place(CLOSED_A, SG_B), one, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_flow_stays_and_is_marked_anew_if_another_group_admits_it(mode: Revocation) -> None:
    both = interface("eni-b", "subnet-b", B, "sg-b", "sg-c")
    also = group("sg-c", ingress("tcp", 80, "10.0.0.0/24"), index=3)
    before, after = (place(SG_A, each, also, ENIS[0], both) for each in (SG_B, CLOSED_B))
    after = replace(after, vpc=replace(after.vpc, revocation=mode))
    assert Judge(before, after).mark(flow(A, B, groups=(1, 2))) == 1 << EGRESS_SHIFT | 3


def test_a_tracked_flow_that_nobody_admits_keeps_its_mark_and_later_changes_spare_it() -> None:
    before, after = place(SG_A, SG_B), place(SG_A, CLOSED_B)
    one = flow(A, B, groups=(1, 2))
    assert Judge(before, after).mark(one) == one.mark
    assert Judge(after, place(SG_A, CLOSED_B)).mark(one) == one.mark
    open_b = group("sg-b", ingress("tcp", 22), egress("-1"), index=2)
    assert Judge(after, place(SG_A, open_b)).mark(one) == one.mark


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_groups_of_an_interface_is_a_change_of_its_rules(mode: Revocation) -> None:
    other = interface("eni-b", "subnet-b", B, "sg-c", public_ip=PUBLIC_B)
    nothing = group("sg-c", index=3)
    before = place(SG_A, SG_B, nothing)
    after = place(SG_A, SG_B, nothing, ENIS[0], other)
    assert is_cut(before, after, flow(A, B, groups=(1, 2)), mode) is (mode == "immediate")
    assert scope(before, after).indexes == {2}


def test_who_leaves_a_group_is_its_peer_no_more() -> None:
    other = interface("eni-a", "subnet-a", A, "sg-c", public_ip=PUBLIC_A)
    open_c = group("sg-c", egress("-1"), index=3)
    before = place(SG_A, SG_B, open_c)
    after = place(SG_A, SG_B, open_c, other, ENIS[1])
    assert is_cut(before, after, flow(A, B, groups=(1, 2)), "immediate")
    assert not is_cut(before, after, flow(A, B, "icmp", 8, groups=(1, 2)), "immediate")
    assert scope(before, after).indexes == {1, 2}


# Translated flows -------------------------------------------------------------------------------


def hairpin() -> tuple[Flow, Flow]:
    """A to B's public address: out by the gateway, and in again."""
    return (
        flow(A, PUBLIC_B, groups=(1, 0), source_here=PUBLIC_A),
        flow(PUBLIC_A, PUBLIC_B, groups=(0, 2), destination_here=B),
    )


def test_both_halves_of_a_hairpin_are_judged_by_the_side_that_they_met() -> None:
    by_address = group("sg-b", ingress("tcp", 80, f"{PUBLIC_A}/32"), index=2)
    before = place(SG_A, by_address)
    out, back = hairpin()
    for after, cut in (
        (before, (False, False)),
        (place(CLOSED_A, by_address), (True, False)),
        (place(SG_A, CLOSED_B), (False, True)),
    ):
        assert (
            is_cut(before, after, out, "immediate"),
            is_cut(before, after, back, "immediate"),
        ) == cut


def test_a_group_is_no_peer_by_a_public_address() -> None:
    before = place(SG_A, group("sg-b", ingress("tcp", 80), index=2))
    after = place(SG_A, SG_B)  # from sg-a alone
    assert is_cut(before, after, hairpin()[1], "immediate")
    assert not is_cut(before, after, flow(A, B, groups=(1, 2)), "immediate")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        {"tables": (route_table("rtb-a"), TABLES[1])},
        {"enis": (interface("eni-a", "subnet-a", A, "sg-a"), ENIS[1])},
        {"enis": (interface("eni-a", "subnet-a", A, "sg-a", public_ip="198.18.0.5"), ENIS[1])},
        {"gateway": None},
    ],
)
def test_a_flow_that_lost_its_way_or_its_public_address_is_cut_in_either_mode(
    mode: Revocation, change: dict[str, Any]
) -> None:
    incoming = group("sg-a", egress("-1"), ingress("-1", None, "203.0.113.0/24"), index=1)
    before = place(incoming, SG_B)
    after = place(incoming, SG_B, *change.get("tables", TABLES), *change.get("enis", ENIS))
    if "gateway" in change:
        after = replace(after, internet_gateway=None)
    outgoing = flow(A, OUTSIDE, groups=(1, 0), source_here=PUBLIC_A)
    coming = flow(OUTSIDE, PUBLIC_A, groups=(0, 1), destination_here=A)
    for one in (outgoing, coming):
        assert not is_cut(before, before, one, mode)
        assert is_cut(before, after, one, mode)
    assert not is_cut(before, after, flow(A, B, groups=(1, 2)), mode)
    assert scope(before, after).everything


@pytest.mark.parametrize("mode", MODES)
def test_a_public_address_that_is_anothers_takes_no_flow_with_it(mode: Revocation) -> None:
    open_a, open_b = (group(f"sg-{x}", *OPEN_GROUP, index=n) for n, x in enumerate("ab", start=1))
    before = place(open_a, open_b)
    enis = (
        interface("eni-a", "subnet-a", A, "sg-a", public_ip=PUBLIC_B),
        interface("eni-b", "subnet-b", B, "sg-b", public_ip=PUBLIC_A),
    )
    coming = flow(OUTSIDE, PUBLIC_A, groups=(0, 1), destination_here=A)
    assert not is_cut(before, before, coming, mode)
    assert is_cut(before, place(open_a, open_b, *enis), coming, mode)


@pytest.mark.parametrize("mode", MODES)
def test_another_nat_gateway_has_another_address(mode: Revocation) -> None:
    nats = (
        *nat_gateway("nat-1", "subnet-b", "10.0.1.13", NAT_IP),
        *nat_gateway("nat-2", "subnet-b", "10.0.1.14", "198.19.255.2"),
    )
    before, after = (
        place(SG_A, SG_B, route_table("rtb-a", (EVERYWHERE, nat)), TABLES[1], *nats, *ENIS)
        for nat in ("nat-1", "nat-2")
    )
    one = flow(A, OUTSIDE, groups=(1, 0), source_here=NAT_IP)
    assert not is_cut(before, before, one, mode)
    assert is_cut(before, after, one, mode)


# Interfaces, services, ACLs ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "enis", [(ENIS[0],), (ENIS[0], interface("eni-new", "subnet-b", B, "sg-b", public_ip=PUBLIC_B))]
)
def test_flows_of_who_is_gone_are_nobodys(mode: Revocation, enis: tuple[Any, ...]) -> None:
    before, after = place(SG_A, SG_B), place(SG_A, SG_B, *enis)
    assert is_cut(before, after, flow(A, B, groups=(1, 2)), mode)
    assert is_cut(before, after, flow(OUTSIDE, PUBLIC_B, groups=(0, 2), destination_here=B), mode)


def test_after_a_crash_the_present_alone_still_finds_what_is_admitted_no_more() -> None:
    now = place(SG_A, CLOSED_B, ENIS[0])
    assert is_cut(now, now, flow(A, B, groups=(1, 2)), "aws")  # B is nobody's
    now = place(SG_A, CLOSED_B)
    assert is_cut(now, now, flow(A, B, groups=(1, 2)), "immediate")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("destination", ["169.254.169.253", "169.254.170.2", "10.0.0.2"])
def test_the_resolver_and_the_metadata_are_beyond_groups(
    mode: Revocation, destination: str
) -> None:
    port = 80 if destination.endswith("170.2") else 53
    one = flow(A, destination, "tcp", port)
    assert not is_cut(place(SG_A, SG_B), place(CLOSED_A, CLOSED_B), one, mode)


def test_what_is_the_namespaces_own_is_left_alone() -> None:
    one = flow("127.0.0.1", "127.0.0.1")
    assert not is_cut(place(SG_A, SG_B), place(SG_A, SG_B, route_table("rtb-a"), TABLES[1]), one)


@pytest.mark.parametrize("mode", MODES)
def test_an_acl_cuts_by_itself(mode: Revocation) -> None:
    """Its rules come before those for established packets; nothing has to be looked at."""
    before = place(SG_A, SG_B)
    closed = acl("acl-default", entry(100, "ingress", "deny"))
    after = place(SG_A, SG_B, closed)
    assert not is_cut(before, after, flow(A, B, groups=(1, 2)), mode)
    assert scope(before, after) == (False, frozenset())


# Scope ------------------------------------------------------------------------------------------


def test_a_group_that_only_gains_is_not_looked_at() -> None:
    more = group("sg-b", *SG_B.rules, ingress("tcp", 443), index=2)
    assert scope(place(SG_A, SG_B), place(SG_A, more)) == (False, frozenset())


def test_a_rule_with_another_id_or_description_is_the_same_rule() -> None:
    renamed = [replace(rule, security_group_rule_id="x", description="d") for rule in SG_B.rules]
    after = place(SG_A, replace(SG_B, rules=tuple(renamed)))
    assert scope(place(SG_A, SG_B), after) == (False, frozenset())


def test_a_prefix_list_that_shrinks_concerns_the_groups_that_name_it() -> None:
    named = group("sg-b", ingress("tcp", 80, "pl-1"), index=2)
    before, after = (
        place(SG_A, named, prefix_list("pl-1", *entries))
        for entries in (("10.0.0.0/28", "10.9.0.0/16"), ("10.9.0.0/16",))
    )
    assert scope(before, after).indexes == {2}
    assert scope(after, before).indexes == set()
    assert is_cut(before, after, flow(A, B, groups=(1, 2)), "immediate")


def test_tasks_that_come_and_go_concern_no_flow_of_others() -> None:
    before = place(SG_A, SG_B)
    after = place(SG_A, SG_B, ENIS[1], interface("eni-c", "subnet-a", "10.0.0.5", "sg-a"))
    assert scope(before, after) == (False, frozenset())


def test_a_group_that_is_gone_or_new_under_its_id_is_looked_at() -> None:
    before = place(SG_A, SG_B, group("sg-c", index=9))
    assert scope(before, place(SG_A, SG_B)).indexes == {9}
    assert scope(before, place(SG_A, SG_B, group("sg-c", index=8))).indexes == {9}


# Laws -------------------------------------------------------------------------------------------


def flows_of(among: Network, packet: Packet) -> list[Flow]:
    """As the kernel tracks them, marked by the groups that admit them; none if it does not pass."""
    policy = Policy(among)
    if not policy.decide(packet).allowed:
        return []
    path = [met for met, _ in policy.trace(packet)]
    marks = [0, 0]
    for met in path:
        if isinstance(met, GroupCheck):
            found = policy.admitting(met.interface, met.packet, is_egress=met.is_egress)
            assert found is not None
            marks[0 if met.is_egress else 1] = found[0].index
    arrived = next((met.packet for met in path if isinstance(met, Arrival)), None)
    owners = {one.private_ip: one for one in among.interfaces.values()}
    sender = owners.get(str(packet.source))
    if sender is None and ":" not in str(packet.source):
        assert arrived is not None
        return [tracked(packet, marks, destination_here=str(arrived.destination))]
    subjects = [getattr(met, "subject", "") for met in path]
    public = None
    if nat := next((subject for subject in subjects if subject in among.nat_gateways), None):
        public = among.nat_gateways[nat].public_ip
    elif any(subject.startswith("igw") for subject in subjects) and sender is not None:
        public = sender.public_ip
    if arrived is None or sender is None:
        return [tracked(packet, marks, source_here=public)]
    out = tracked(packet, [marks[0], 0], source_here=public)
    returning = FlowTuple(**{**tuple_members(out.original), "source": str(arrived.source)})
    back = Flow(
        original=returning,
        reply=replace(out.reply, source=str(arrived.destination), destination=str(arrived.source)),
        mark=marks[1],
    )
    return [out, back]


def tuple_members(one: FlowTuple) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__struct_fields__}


def tracked(
    packet: Packet,
    marks: list[int],
    *,
    source_here: str | None = None,
    destination_here: str | None = None,
) -> Flow:
    has_ports, is_icmp = packet.protocol in (6, 17), packet.protocol in (1, 58)
    original = FlowTuple(
        source=str(packet.source),
        destination=str(packet.destination),
        protocol=packet.protocol,
        source_port=packet.source_port if has_ports else None,
        destination_port=packet.destination_port if has_ports else None,
        icmp_type=packet.icmp_type if is_icmp else None,
        icmp_code=packet.icmp_code if is_icmp else None,
        icmp_id=1 if is_icmp else None,
    )
    reply = replace(
        original,
        source=destination_here or original.destination,
        destination=source_here or original.source,
        source_port=original.destination_port,
        destination_port=original.source_port,
    )
    return Flow(original=original, reply=reply, mark=marks[0] << EGRESS_SHIFT | marks[1])


def with_mode(among: Network, mode: Revocation) -> Network:
    return replace(among, vpc=replace(among.vpc, revocation=mode))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Network, Network, list[Packet]]:
    """Some rules go, and routes or the internet gateway become those of another network."""
    before = draw(networks())
    after = before
    if draw(st.booleans()):
        other = draw(networks())
        name = draw(st.sampled_from(["route_tables", "internet_gateway"]))
        after = replace(after, **{name: getattr(other, name)})
    kept = draw(st.sampled_from([slice(0), slice(1), slice(1, None), slice(None, None, 2)]))
    groups = {name: replace(one, rules=one.rules[kept]) for name, one in before.groups.items()}
    return before, replace(after, groups=groups), draw(some_packets(before))


def some_packets(among: Network) -> st.SearchStrategy[list[Packet]]:
    return st.lists(packets(among), min_size=4, max_size=8)


@given(networks().flatmap(lambda one: st.tuples(st.just(one), some_packets(one))))
def test_nothing_is_cut_or_marked_anew_where_nothing_has_changed(
    case: tuple[Network, list[Packet]],
) -> None:
    among, some = case
    assert scope(among, among) == (False, frozenset())
    for mode in MODES:
        judge = Judge(with_mode(among, mode), with_mode(among, mode))
        for packet in filter(way_back(among), some):
            flows = flows_of(among, packet)
            assert [judge.mark(one) for one in flows] == [one.mark for one in flows]


def way_back(among: Network) -> Callable[[Packet], bool]:
    """Without a route for answers to what comes by a gateway, there is no flow; ACLs aside."""
    open_acls = {name: replace(one, entries=OPEN_ACL) for name, one in among.network_acls.items()}
    policy = Policy(replace(among, network_acls=open_acls))
    return lambda packet: policy.reply(packet).allowed


@given(changes())
def test_what_is_admitted_is_never_cut_and_immediate_cuts_all_that_aws_cuts_and_is_no_more(
    change: tuple[Network, Network, list[Packet]],
) -> None:
    before, after, some = change
    concerned = scope(before, after)
    judges = {mode: Judge(before, with_mode(after, mode)) for mode in MODES}
    policy, had_way, has_way = Policy(after), way_back(before), way_back(after)
    for packet in filter(had_way, some):
        then, now = flows_of(before, packet), flows_of(after, packet)
        cut = {mode: [judges[mode].mark(one) is None for one in then] for mode in MODES}
        assert all(immediate or not aws for aws, immediate in zip(*cut.values(), strict=True))
        if ends(then) == ends(now) and has_way(packet):
            assert not any(cut["immediate"])
        elif then and not any(cut["immediate"]):
            denied = [step for _, step in policy.trace(packet) if not step.allowed]
            assert all("acl" in step.stage for step in denied)
        for one, is_cut_at_once in zip(then, cut["immediate"], strict=True):
            halves = {one.mark >> EGRESS_SHIFT, one.mark & HALF} - {0}
            assert not is_cut_at_once or concerned.everything or halves & concerned.indexes


def ends(flows: list[Flow]) -> list[tuple[FlowTuple, FlowTuple]]:
    return [(one.original, one.reply) for one in flows]
