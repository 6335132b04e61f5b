"""What holds in every VPC, whatever its rules: laws, and the rules read plainly, one by one."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from sandbox.model.vpc import AclEntry, Network, SecurityGroup, SecurityGroupRule
from sandbox.network.matching import Addresses, key
from sandbox.network.paths import AclCheck, GroupCheck
from sandbox.network.rules import Stage, Step
from sandbox.network.verdict import Packet, Policy, admitting, decide, is_tracked
from tests.networks import (
    EVERYWHERE_6,
    OPEN_ACL,
    OPEN_GROUP,
    entry,
    group_rules,
    networks,
    networks_and_packets,
    packets,
)

Address = IPv4Address | IPv6Address
CASES = networks_and_packets()
NUMBERS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58}


def with_groups(among: Network, *, rules: tuple[SecurityGroupRule, ...]) -> Network:
    groups = {name: replace(one, rules=rules) for name, one in among.groups.items()}
    return replace(among, groups=groups)


def with_acls(among: Network, *, entries: tuple[AclEntry, ...]) -> Network:
    acls = {name: replace(one, entries=entries) for name, one in among.network_acls.items()}
    return replace(among, network_acls=acls)


# Rules, read plainly -----------------------------------------------------------------------------


def in_block(address: Address, block: str) -> bool:
    return address in ip_network(block)


def is_peer(among: Network, rule: SecurityGroupRule, address: Address) -> bool:
    if rule.referenced_group_id is not None:
        members = [
            one for one in among.interfaces.values() if rule.referenced_group_id in one.group_ids
        ]
        return str(address) in {
            text for one in members for text in (one.private_ip, one.ipv6_address)
        }
    if rule.prefix_list_id is not None:
        entries = among.prefix_lists[rule.prefix_list_id].entries
        return any(in_block(address, one) for one in entries)
    return in_block(address, rule.cidr_ipv4 or rule.cidr_ipv6 or "")


def is_traffic(one: Packet, number: int, first: int | None, second: int | None) -> bool:
    if number == -1:
        return True
    if number != one.protocol:
        return False
    if number in (6, 17):
        return first is None or second is None or first <= one.destination_port <= second
    if number in (1, 58):
        return first in (None, -1, one.icmp_type) and (
            first in (None, -1) or second in (None, -1, one.icmp_code)
        )
    return True


def group_admits(among: Network, check: GroupCheck) -> bool:
    one = check.packet
    peer = one.destination if check.is_egress else one.source
    return any(
        rule.is_egress == check.is_egress
        and is_peer(among, rule, peer)
        and is_traffic(
            one,
            NUMBERS.get(rule.ip_protocol) or int(rule.ip_protocol),
            rule.from_port,
            rule.to_port,
        )
        for group_id in check.interface.group_ids
        for rule in among.groups[group_id].rules
    )


def acl_allows(among: Network, check: AclCheck) -> bool:
    one = check.packet
    peer = one.destination if check.is_egress else one.source
    acl = among.network_acls[among.subnets[check.subnet_id].network_acl_id]
    matching = [
        one_entry
        for one_entry in acl.entries
        if one_entry.is_egress == check.is_egress
        and in_block(peer, one_entry.cidr_block or one_entry.ipv6_cidr_block or "")
        and is_traffic(
            one,
            int(one_entry.protocol),
            one_entry.icmp_type if one_entry.protocol in ("1", "58") else one_entry.from_port,
            one_entry.icmp_code if one_entry.protocol in ("1", "58") else one_entry.to_port,
        )
    ]
    first = min(matching, key=lambda found: found.rule_number, default=None)
    return first is not None and first.rule_action == "allow"


@given(CASES)
def test_every_step_says_what_its_rules_say_when_read_one_by_one(
    case: tuple[Network, Packet],
) -> None:
    among, one = case
    policy = Policy(among)
    for met, step in (*policy.trace(one), *policy.trace_reply(one)):
        if isinstance(met, GroupCheck):
            assert step.allowed == group_admits(among, met)
        elif isinstance(met, AclCheck):
            assert step.allowed == acl_allows(among, met)


@given(st.ip_addresses(), st.lists(st.ip_addresses(), max_size=4), st.data())
def test_blocks_hold_the_addresses_that_they_hold(
    address: Address, others: list[Address], data: st.DataObject
) -> None:
    bases = [address, *others]
    lengths = [data.draw(st.integers(0, base.max_prefixlen)) for base in bases]
    blocks = [
        str(ip_network((int(base), length) if base.version == 4 else (base, length), strict=False))
        for base, length in zip(bases, lengths, strict=True)
    ]
    probes = [address, *others, ip_address(0), ip_address("::"), ip_address("::ffff:10.0.0.1")]
    for probe in probes:
        expected = any(probe in ip_network(block) for block in blocks)
        assert (key(probe) in Addresses.of_blocks(blocks)) == expected


# Laws --------------------------------------------------------------------------------------------


@given(CASES)
def test_a_verdict_ends_with_the_first_step_that_denies(case: tuple[Network, Packet]) -> None:
    verdict = decide(*case)
    assert all(step.allowed for step in verdict.steps[:-1])
    assert verdict.allowed == verdict.steps[-1].allowed
    assert verdict.steps[0].stage in (
        *(Stage.SOURCE_CHECK, Stage.INTERNET_GATEWAY, Stage.DESTINATION),
    )


@given(networks(), st.data())
def test_a_policy_decides_alike_however_often_it_was_asked(
    among: Network, data: st.DataObject
) -> None:
    policy = Policy(among)
    for one in data.draw(st.lists(packets(among), max_size=4)):
        assert policy.decide(one) == decide(among, one)


@given(CASES, st.data())
def test_one_more_rule_never_denies_what_was_allowed(
    case: tuple[Network, Packet], data: st.DataObject
) -> None:
    among, one = case
    before = decide(among, one)
    changed = data.draw(st.sampled_from(sorted(among.groups)))
    rule = data.draw(group_rules((*among.groups, *among.prefix_lists)))
    group = among.groups[changed]
    at = data.draw(st.integers(0, len(group.rules)))
    longer = replace(group, rules=(*group.rules[:at], rule, *group.rules[at:]))
    after = decide(replace(among, groups={**among.groups, changed: longer}), one)
    assert after.allowed or not before.allowed


@given(CASES)
def test_neither_the_order_of_groups_nor_that_of_rules_matters(
    case: tuple[Network, Packet],
) -> None:
    among, one = case
    turned = replace(
        among,
        groups={name: turn(group) for name, group in among.groups.items()},
        interfaces={
            name: replace(eni, group_ids=eni.group_ids[::-1])
            for name, eni in among.interfaces.items()
        },
    )
    there, back = decide(among, one), decide(turned, one)
    assert there.allowed == back.allowed
    assert [step.stage for step in there.steps] == [step.stage for step in back.steps]


def turn(group: SecurityGroup) -> SecurityGroup:
    return replace(group, rules=group.rules[::-1])


@given(CASES)
def test_the_numbers_of_an_acl_are_its_order(case: tuple[Network, Packet]) -> None:
    among, one = case
    shuffled = {
        name: replace(acl, entries=acl.entries[::-1]) for name, acl in among.network_acls.items()
    }
    turned = replace(among, network_acls=shuffled)
    assert decide(turned, one) == decide(among, one)
    assert Policy(turned).reply(one) == Policy(among).reply(one)


@given(CASES)
def test_where_all_is_allowed_only_a_way_is_needed(case: tuple[Network, Packet]) -> None:
    among, one = case
    open_to_all = with_acls(with_groups(among, rules=OPEN_GROUP), entries=OPEN_ACL)
    last = decide(open_to_all, one).steps[-1]
    if not last.allowed:
        assert last.stage in (
            *(Stage.SOURCE_CHECK, Stage.DESTINATION, Stage.LOCAL_SERVICE, Stage.ROUTE),
            *(Stage.NAT_GATEWAY, Stage.INTERNET_GATEWAY),
        )
    private = {key(ip_address(eni.private_ip)) for eni in among.interfaces.values() if eni.task}
    if key(one.source) in private and key(one.destination) in private:
        assert last.allowed


@given(CASES)
def test_an_entry_before_all_others_that_denies_closes_every_border(
    case: tuple[Network, Packet],
) -> None:
    among, one = case
    closed = with_acls(
        with_groups(among, rules=OPEN_GROUP),
        entries=(
            *OPEN_ACL,
            entry(1, "ingress", "deny"),
            entry(2, "ingress", "deny", cidr=EVERYWHERE_6),
            entry(1, "egress", "deny"),
            entry(2, "egress", "deny", cidr=EVERYWHERE_6),
        ),
    )
    for met, step in Policy(closed).trace(one):
        assert step.allowed is not isinstance(met, AclCheck) or is_dead_end(met)


def is_dead_end(met: object) -> bool:
    return isinstance(met, Step) and not met.allowed


@given(CASES)
def test_the_answer_to_an_answer_is_the_packet(case: tuple[Network, Packet]) -> None:
    _, one = case
    assert one.reply() != one or one.source == one.destination
    assert one.reply().reply() == one


@given(CASES)
def test_an_answer_passes_where_its_own_way_is_open_and_groups_are_not_asked(
    case: tuple[Network, Packet],
) -> None:
    """Between interfaces; an answer from outside would have to name a public address."""
    among, one = case
    private = {eni.private_ip for eni in among.interfaces.values() if eni.task}
    assume(str(one.source) in private and str(one.destination) in private)
    without_groups = with_groups(among, rules=OPEN_GROUP)
    assert Policy(among).reply(one).allowed == decide(without_groups, one.reply()).allowed


@given(CASES)
def test_the_admitting_rule_is_the_one_that_decides(case: tuple[Network, Packet]) -> None:
    among, one = case
    for met, step in Policy(among).trace(one):
        if isinstance(met, GroupCheck):
            found = admitting(among, met.interface, met.packet, is_egress=met.is_egress)
            assert (found is not None) == step.allowed
            if found is not None:
                assert (found[0].group_id, found[1]) == (step.subject, step.rule)
                assert found[1] in found[0].rules


@given(CASES)
def test_the_admitting_rule_is_the_same_for_the_packet_that_conntrack_shows(
    case: tuple[Network, Packet],
) -> None:
    """Whose original tuple has the public address where the interface sees its private one."""
    among, one = case
    for met, _ in Policy(among).trace(one):
        if isinstance(met, GroupCheck) and met.packet.source == one.source:
            asked = [
                admitting(among, met.interface, form, is_egress=met.is_egress)
                for form in (met.packet, one)
            ]
            assert asked[0] == asked[1]


@given(CASES)
def test_what_is_untracked_is_admitted_and_has_ports(case: tuple[Network, Packet]) -> None:
    among, one = case
    for met, _ in Policy(among).trace(one):
        if isinstance(met, GroupCheck):
            interface, form, is_egress = met.interface, met.packet, met.is_egress
            if not is_tracked(among, interface, form, is_egress):
                assert admitting(among, interface, form, is_egress=is_egress) is not None
                assert form.protocol in (6, 17)
