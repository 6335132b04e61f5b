"""The rules of one VPC, ready to be asked: security groups, network ACLs, route tables.

Each answers for one packet with a `Step`: allowed or not, the rule that decided, and a line for a
person. Which of them a packet meets, and in which order, is `sandbox.network.verdict`'s.

What is asked for is prepared when it is first asked for, so that a large VPC costs only what its
packets meet. Steps of rules are made then; where no rule matched, the step names the packet.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import msgspec

from sandbox.model.vpc import (
    LOCAL,
    AclEntry,
    Network,
    NetworkInterface,
    Route,
    SecurityGroup,
    SecurityGroupRule,
)
from sandbox.network.matching import (
    Addresses,
    Matcher,
    Packet,
    acl_matcher,
    block,
    first_match,
    group_matcher,
    key_of,
    traffic_of,
)

Rule = Route | AclEntry | SecurityGroupRule
R = TypeVar("R", AclEntry, SecurityGroupRule)

NOBODY = Addresses()
EVERYWHERE = {4: "0.0.0.0/0", 6: "::/0"}


class Stage(enum.StrEnum):
    SOURCE_CHECK = "source check"
    OWN_ADDRESS = "own address"
    """A packet of an interface to itself; it never leaves the task."""
    DESTINATION = "destination"
    """Only where the destination is nobody's, or nobody's who takes such packets."""
    LOCAL_SERVICE = "local service"
    """The VPC's resolver and the task's metadata: beyond groups, ACLs and routes."""
    GROUP_EGRESS = "group egress"
    ACL_EGRESS = "acl egress"
    ROUTE = "route"
    NAT_GATEWAY = "nat gateway"
    INTERNET_GATEWAY = "internet gateway"
    ACL_INGRESS = "acl ingress"
    GROUP_INGRESS = "group ingress"


class Step(msgspec.Struct, frozen=True):
    """`subject` is the id of what decides: a route table, an ACL, a gateway, a group or, where all
    of its groups together deny, the interface; an address where nothing has an id."""

    stage: Stage
    allowed: bool
    subject: str
    rule: Rule | None
    """None: no rule matched, or none is needed."""
    text: str


class _Ready(NamedTuple, Generic[R]):
    """One direction of a group or of an ACL. The three go together, in the order of asking."""

    matchers: tuple[Matcher, ...]
    records: tuple[R, ...]
    steps: tuple[Step, ...]


class Groups:
    """Security groups: all rules of all groups of an interface, united; none that denies."""

    def __init__(self, network: Network) -> None:
        self._network = network
        members: dict[str, set[int]] = {}
        for interface in network.interfaces.values():
            keys = [key_of(address) for address in private_addresses(interface)]
            for group_id in interface.group_ids:
                members.setdefault(group_id, set()).update(keys)
        self._members = {group_id: Addresses.of_keys(keys) for group_id, keys in members.items()}
        self._ready: dict[tuple[str, bool], _Ready[SecurityGroupRule]] = {}

    def judge(self, interface: NetworkInterface, packet: Packet, *, is_egress: bool) -> Step:
        peer = packet.peer(is_egress=is_egress)
        for group_id in interface.group_ids:
            ready = self._rules(group_id, is_egress)
            position = first_match(ready.matchers, packet, peer)
            if position is not None:
                return ready.steps[position]
        stage = Stage.GROUP_EGRESS if is_egress else Stage.GROUP_INGRESS
        text = f"no {direction(is_egress)} rule of {', '.join(interface.group_ids)} allows "
        text += _flow(packet, is_egress)
        return Step(stage, False, interface.network_interface_id, None, text)

    def admitting(
        self, interface: NetworkInterface, packet: Packet, *, is_egress: bool
    ) -> tuple[SecurityGroup, SecurityGroupRule] | None:
        peer = packet.peer(is_egress=is_egress)
        for group_id in interface.group_ids:
            ready = self._rules(group_id, is_egress)
            position = first_match(ready.matchers, packet, peer)
            if position is not None:
                return self._network.groups[group_id], ready.records[position]
        return None

    def is_open_both_ways(
        self, interface: NetworkInterface, packet: Packet, *, is_egress: bool
    ) -> bool:
        """From or to everywhere, and the whole protocol everywhere in the other direction."""
        peer = packet.peer(is_egress=is_egress)
        opening = tuple(self._open(interface, packet, is_egress))
        return first_match(opening, packet, peer) is not None and any(
            matcher.is_whole(packet.protocol)
            for matcher in self._open(interface, packet, not is_egress)
        )

    def _open(
        self, interface: NetworkInterface, packet: Packet, is_egress: bool
    ) -> Iterator[Matcher]:
        """Its rules whose peer is every address of the packet's version of IP."""
        everywhere = EVERYWHERE[packet.source.version]
        for group_id in interface.group_ids:
            ready = self._rules(group_id, is_egress)
            for matcher, rule in zip(ready.matchers, ready.records, strict=True):
                if everywhere in (rule.cidr_ipv4, rule.cidr_ipv6):
                    yield matcher

    def _rules(self, group_id: str, is_egress: bool) -> _Ready[SecurityGroupRule]:
        ready = self._ready.get((group_id, is_egress))
        if ready is None:
            ready = self._ready[group_id, is_egress] = self._prepare(group_id, is_egress)
        return ready

    def _prepare(self, group_id: str, is_egress: bool) -> _Ready[SecurityGroupRule]:
        rules = [
            rule for rule in self._network.groups[group_id].rules if rule.is_egress is is_egress
        ]
        matchers = [group_matcher(rule, self._peers(rule), n) for n, rule in enumerate(rules)]
        stage = Stage.GROUP_EGRESS if is_egress else Stage.GROUP_INGRESS
        way = "to" if is_egress else "from"
        steps = (
            Step(
                stage,
                True,
                group_id,
                rule,
                f"{group_id} {direction(is_egress)} allows {matcher.traffic} {way} {peer_of(rule)}"
                f" ({rule.security_group_rule_id})",
            )
            for rule, matcher in zip(rules, matchers, strict=True)
        )
        return _Ready(tuple(matchers), tuple(rules), tuple(steps))

    def _peers(self, rule: SecurityGroupRule) -> Addresses:
        if rule.referenced_group_id is not None:
            return self._members.get(rule.referenced_group_id, NOBODY)
        if rule.prefix_list_id is not None:
            return Addresses.of_blocks(self._network.prefix_lists[rule.prefix_list_id].entries)
        return Addresses.of_blocks(filter(None, (rule.cidr_ipv4, rule.cidr_ipv6)))


class Acls:
    """Network ACLs: the first entry that matches decides, and after the last one all is denied."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ready: dict[tuple[str, bool], _Ready[AclEntry]] = {}

    def judge(self, subnet_id: str, packet: Packet, *, is_egress: bool) -> Step:
        acl_id = self._network.subnets[subnet_id].network_acl_id
        ready = self._ready.get((acl_id, is_egress))
        if ready is None:
            ready = self._ready[acl_id, is_egress] = self._prepare(acl_id, is_egress)
        peer = packet.peer(is_egress=is_egress)
        position = first_match(ready.matchers, packet, peer)
        if position is not None:
            return ready.steps[position]
        stage = Stage.ACL_EGRESS if is_egress else Stage.ACL_INGRESS
        text = f"{acl_id} {direction(is_egress)} * denies {_flow(packet, is_egress)}"
        return Step(stage, False, acl_id, None, text)

    def _prepare(self, acl_id: str, is_egress: bool) -> _Ready[AclEntry]:
        acl = self._network.network_acls[acl_id]
        entries = sorted(
            (entry for entry in acl.entries if entry.is_egress is is_egress),
            key=lambda entry: entry.rule_number,
        )
        matchers = [acl_matcher(entry, n) for n, entry in enumerate(entries)]
        stage = Stage.ACL_EGRESS if is_egress else Stage.ACL_INGRESS
        way = "to" if is_egress else "from"
        steps = (
            Step(
                stage,
                entry.rule_action == "allow",
                acl_id,
                entry,
                f"{acl_id} {direction(is_egress)} {entry.rule_number} "
                f"{'allows' if entry.rule_action == 'allow' else 'denies'} {matcher.traffic} "
                f"{way} {entry.cidr_block or entry.ipv6_cidr_block}",
            )
            for entry, matcher in zip(entries, matchers, strict=True)
        )
        return _Ready(tuple(matchers), tuple(entries), tuple(steps))


class RouteTables:
    """The longest prefix wins, but never over the VPC's own (`local`)."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._targets = frozenset(live_gateways(network)) | {LOCAL}
        self._table_ids = {
            subnet_id: network.route_table_of(subnet).route_table_id
            for subnet_id, subnet in network.subnets.items()
        }
        self._ready: dict[str, list[tuple[int, int, Step]]] = {}

    def judge(self, subnet_id: str, packet: Packet) -> Step:
        """Allowed: `rule` is a Route, and its target is there."""
        table_id = self._table_ids[subnet_id]
        routes = self._ready.get(table_id)
        if routes is None:
            routes = self._ready[table_id] = self._prepare(table_id)
        destination = packet.destination_key
        for mask, base, step in routes:
            if destination & mask == base:
                return step
        text = f"{table_id} has no route to {packet.destination}"
        return Step(Stage.ROUTE, False, table_id, None, text)

    def _prepare(self, table_id: str) -> list[tuple[int, int, Step]]:
        def order(route: Route) -> tuple[bool, int]:
            return route.target != LOCAL, -block(route.destination)[0].bit_count()

        routes = sorted(self._network.route_tables[table_id].routes, key=order)
        return [(*block(route.destination), self._step(table_id, route)) for route in routes]

    def _step(self, table_id: str, route: Route) -> Step:
        text = f"{table_id}: {route.destination} -> {route.target}"
        is_there = route.target in self._targets
        if not is_there:
            text += ", which is not there: a black hole"
        return Step(Stage.ROUTE, is_there, table_id, route, text)


def live_gateways(network: Network) -> Iterator[str]:
    """Targets that a route can have, beside `local`."""
    if network.internet_gateway is not None:
        yield network.internet_gateway.internet_gateway_id
    for nat in network.nat_gateways.values():
        if nat.deleted_at is None:
            yield nat.nat_gateway_id


def target_of(step: Step) -> str | None:
    """Of a step at a route table."""
    return step.rule.target if isinstance(step.rule, Route) else None


def private_addresses(interface: NetworkInterface) -> list[str]:
    return [text for text in (interface.private_ip, interface.ipv6_address) if text is not None]


def peer_of(rule: SecurityGroupRule) -> str:
    return (
        rule.cidr_ipv4
        or rule.cidr_ipv6
        or rule.prefix_list_id
        or rule.referenced_group_id
        or "nobody"
    )


def direction(is_egress: bool) -> str:
    return "egress" if is_egress else "ingress"


def _flow(packet: Packet, is_egress: bool) -> str:
    way = f"to {packet.destination}" if is_egress else f"from {packet.source}"
    return f"{traffic_of(packet)} {way}"
