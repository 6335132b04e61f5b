"""Which tracked connections a change of the network cuts, and the cutting.

The kernel's rules decide about the first packet of a flow only. What is tracked goes on, whatever
the rules say later, until it is taken out of the connection table here; with
nf_conntrack_tcp_loose=0 nothing but a new SYN brings a TCP connection back. What EC2 cuts when:

    security groups   a flow that was tracked goes on until it is idle; one that was not tracked
                      ends with its rule (EC2 User Guide, "Security group connection tracking").
                      A VPC whose `revocation` is "immediate" cuts both.
    network ACLs      are stateless: their rules meet every packet, nothing has to be cut.
    routes, gateways  are stateless as well, but our rules ask about them only once a flow, and a
    public addresses  translated flow keeps its addresses. So these flows are cut in either mode.
    an interface      that is gone, or whose address is another's, is cut from its flows; else who
                      gets the address next would get them, too.

The group that admits a flow stands in its connection mark: in the high half the one at the sender's
interface (egress), in the low half the one at the receiver's (ingress), 0 where nobody was asked.
So a change of a group concerns the flows with its index in either half, and no others: as long as
a flow that stays because *another* group still admits it gets that group's index. That is done
here, too. A flow that stays although no group admits it any more keeps its old one.

Repeating is harmless: what is to be done follows from the two networks and the table alone. After a
crash it has to be done again with the same two; an agent that knows the present one only can give
it as both, and so finds what lost its interface or its way, and in "immediate" everything.

A packet that the old rules admitted is in the table microseconds later, and the table is read
milliseconds after the new rules are in force: nothing slips through between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from itertools import islice
from typing import NamedTuple

from sandbox.kernel.conntrack import Conntrack
from sandbox.kernel.flows import Flow
from sandbox.model.vpc import Network, NetworkInterface, Revocation, SecurityGroupRule
from sandbox.network.matching import Packet
from sandbox.network.paths import Arrival, Paths
from sandbox.network.rules import Stage, Step, private_addresses
from sandbox.network.verdict import Policy

EGRESS_SHIFT = 16
HALF = 0xFFFF
BATCH = 1024
"""Flows that are judged before those of them that are to go are deleted."""


# Whose flows have to be looked at ---------------------------------------------------------------


class Scope(NamedTuple):
    everything: bool
    """Routes, gateways or public addresses have changed: no index says whose these are."""
    indexes: frozenset[int]
    """Of groups: those whose flows may have lost what admits them."""


def scope(before: Network, after: Network) -> Scope:
    """Groups that only gained are in no danger. Interfaces that are gone are `forget`'s."""
    members = _members(before, after), _members(after, after)
    return Scope(
        _ways(before, after) != _ways(after, before),
        frozenset(
            group.index
            for group_id, group in before.groups.items()
            if _has_lost(group_id, before, after, members)
        ),
    )


def _ways(network: Network, other: Network) -> tuple[object, ...]:
    """All that the ways of flows depend on; public addresses of what is there before and after."""
    return (
        network.route_tables,
        network.internet_gateway,
        network.nat_gateways,
        {name: one.route_table_id for name, one in network.subnets.items()},
        {
            name: one.public_ip
            for name, one in network.interfaces.items()
            if name in other.interfaces and other.interfaces[name].public_ip != one.public_ip
        },
    )


Members = Mapping[str, frozenset[tuple[str, str]]]
"""By group, the ids and private addresses of the interfaces that carry it."""


def _members(network: Network, after: Network) -> Members:
    members: dict[str, set[tuple[str, str]]] = {}
    for name, interface in network.interfaces.items():
        if name in after.interfaces:
            pairs = [(name, address) for address in private_addresses(interface)]
            for group_id in interface.group_ids:
                members.setdefault(group_id, set()).update(pairs)
    return {group_id: frozenset(pairs) for group_id, pairs in members.items()}


def _has_lost(
    group_id: str, before: Network, after: Network, members: tuple[Members, Members]
) -> bool:
    """A rule, a peer of a rule, or an interface that carries it."""
    old, new = before.groups[group_id], after.groups.get(group_id)
    if new is None or new.index != old.index or _has_shrunk(group_id, members):
        return True
    kept = {_meaning(rule) for rule in new.rules}
    return any(
        _meaning(rule) not in kept or _has_lost_peers(rule, before, after, members)
        for rule in old.rules
    )


def _has_shrunk(group_id: str, members: tuple[Members, Members]) -> bool:
    old, new = (each.get(group_id, frozenset()) for each in members)
    return not old <= new


def _has_lost_peers(
    rule: SecurityGroupRule, before: Network, after: Network, members: tuple[Members, Members]
) -> bool:
    if rule.referenced_group_id is not None:
        return _has_shrunk(rule.referenced_group_id, members)
    if rule.prefix_list_id is None:
        return False
    old, new = (each.prefix_lists.get(rule.prefix_list_id) for each in (before, after))
    return old is not None and (new is None or not set(old.entries) <= set(new.entries))


def _meaning(rule: SecurityGroupRule) -> tuple[object, ...]:
    return (
        *(rule.is_egress, rule.ip_protocol, rule.from_port, rule.to_port),
        *(rule.cidr_ipv4, rule.cidr_ipv6, rule.prefix_list_id, rule.referenced_group_id),
    )


# One flow ---------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """Where a flow meets the groups of an interface."""

    address: str
    """Of the interface: private, for what the first packet is from and what answers are from is
    not translated yet."""
    is_egress: bool
    marked: int
    """The index of the group that admitted it there; 0: none was asked."""


class Judge:
    """What becomes of flows by a change from one network to another, in the mode of the latter."""

    def __init__(
        self,
        before: Network,
        after: Network,
        *,
        looks_at_ways: bool = True,
        private_destinations: Iterable[str] = (),
    ) -> None:
        """`looks_at_ways`: False where no route, gateway or public address has changed."""
        destinations = tuple(private_destinations)
        self._old = Policy(before, private_destinations=destinations)
        self._new = Policy(after, private_destinations=destinations)
        self._old_owners, self._owners = _owners(before), _owners(after)
        self._nat_gateways = after.nat_gateways
        self._paths = Paths(after, destinations) if looks_at_ways else None
        self._revocation = after.vpc.revocation

    def mark(self, flow: Flow) -> int | None:
        """The mark that the flow has to have, mostly the one that it has; None: it is cut."""
        if self._paths is not None and not self._has_way(self._paths, flow):
            return None
        mark = 0
        for side in _sides(flow):
            index = self._index(flow, side)
            if index is None:
                return None
            mark |= index << EGRESS_SHIFT if side.is_egress else index
        return mark

    def _index(self, flow: Flow, side: _Side) -> int | None:
        """Of the group that admits it now, or still counts as the one that did."""
        old, new = self._old_owners.get(side.address), self._owners.get(side.address)
        if old is not None and (
            new is None or new.network_interface_id != old.network_interface_id
        ):
            return None
        if side.marked == 0:
            return 0
        if new is None:
            return None
        packet = _packet_at(flow, side)
        admitting = self._new.admitting(new, packet, is_egress=side.is_egress)
        if admitting is not None:
            return admitting[0].index
        if self._revocation == "immediate" or self._was_untracked(
            old or new, packet, side.is_egress
        ):
            return None
        return side.marked

    def _was_untracked(self, interface: NetworkInterface, packet: Packet, is_egress: bool) -> bool:
        """Only what the old rules still admitted: the others go on because they were tracked."""
        return self._old.admitting(
            interface, packet, is_egress=is_egress
        ) is not None and not self._old.is_tracked(interface, packet, is_egress)

    def _has_way(self, paths: Paths, flow: Flow) -> bool:
        """Do routes and gateways still carry it, with the addresses that it has?"""
        sender = self._owners.get(flow.original.source)
        receiver = self._owners.get(flow.reply.source)
        if sender is None and receiver is None:
            return True  # the namespace's own, or that of an interface that is gone
        packet = _packet(flow, flow.original.destination, flow.original.destination_port)
        sources = {flow.original.source}
        for met in paths.of(packet):
            if isinstance(met, Step):
                if not met.allowed:
                    return False
                if sources == {flow.original.source}:  # a NAT gateway's address is final
                    sources = self._translated(met, sender, packet) or sources
            elif isinstance(met, Arrival):
                if receiver is not None and met.interface != receiver:
                    return False
                if not paths.way_out(met.interface.subnet_id, met.packet.reply()).allowed:
                    return False
        return flow.reply.destination in sources

    def _translated(self, met: Step, sender: NetworkInterface | None, packet: Packet) -> set[str]:
        """What the source becomes here; nothing if it stays what it is."""
        if met.stage is Stage.NAT_GATEWAY:
            nat = self._nat_gateways[met.subject]
            return {nat.private_ip, nat.public_ip}
        if met.stage is Stage.INTERNET_GATEWAY and sender and packet.source.version == 4:
            return {sender.public_ip} if sender.public_ip else set()
        return set()


def _owners(network: Network) -> dict[str, NetworkInterface]:
    return {
        address: interface
        for interface in network.interfaces.values()
        for address in private_addresses(interface)
    }


def _sides(flow: Flow) -> tuple[_Side, _Side]:
    """The sender's, then the receiver's."""
    return (
        _Side(flow.original.source, True, flow.mark >> EGRESS_SHIFT),
        _Side(flow.reply.source, False, flow.mark & HALF),
    )


def _packet_at(flow: Flow, side: _Side) -> Packet:
    """The first of the flow, as it is at that interface."""
    if side.is_egress:
        return _packet(flow, flow.original.destination, flow.original.destination_port)
    return _packet(flow, flow.reply.source, flow.reply.source_port)


def _packet(flow: Flow, destination: str, destination_port: int | None) -> Packet:
    original = flow.original
    return Packet(
        source=ip_address(original.source),
        destination=ip_address(destination),
        protocol=original.protocol,
        source_port=original.source_port or 0,
        destination_port=destination_port or 0,
        icmp_type=original.icmp_type or 0,
        icmp_code=original.icmp_code or 0,
    )


# The table --------------------------------------------------------------------------------------


class Revoked(NamedTuple):
    looked_at: int
    cut: int
    remarked: int
    """Another group admits them now."""


def revoke(
    conntrack: Conntrack,
    before: Network,
    after: Network,
    *,
    private_destinations: Iterable[str] = (),
) -> Revoked:
    """After the rules and sets of `after` are in force. Idempotent.

    It works for some 40 us a flow and never waits: have it on a thread, not in the loop.
    """
    concerned = scope(before, after)
    judge = Judge(
        before,
        after,
        looks_at_ways=concerned.everything,
        private_destinations=private_destinations,
    )
    total = Revoked(0, 0, 0)
    for flows in _in_batches(_flows(conntrack, concerned)):
        marks = [(flow, judge.mark(flow)) for flow in flows]
        cut = conntrack.delete(flow for flow, mark in marks if mark is None)
        remarked = conntrack.set_marks(
            (flow, mark) for flow, mark in marks if mark is not None and mark != flow.mark
        )
        total = Revoked(total.looked_at + len(flows), total.cut + cut, total.remarked + remarked)
    return total


def _flows(conntrack: Conntrack, concerned: Scope) -> Iterator[Flow]:
    """One with two of the indexes comes twice; the second time it is gone, or fine."""
    if concerned.everything:
        yield from conntrack.flows()
        return
    for index in sorted(concerned.indexes):
        for mark, mask in _halves(index):
            yield from conntrack.flows(mark, mask)


def _halves(index: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (index << EGRESS_SHIFT, HALF << EGRESS_SHIFT), (index, HALF)


def _in_batches(flows: Iterator[Flow]) -> Iterator[list[Flow]]:
    while several := list(islice(flows, BATCH)):
        yield several


def forget(conntrack: Conntrack, interface: NetworkInterface) -> None:
    """After an interface's addresses are in no set any more, and before they are anybody's again.

    By its public address, too: a packet of its own that came back by the internet gateway is from
    that. Idempotent.
    """
    for address in (*private_addresses(interface), interface.public_ip):
        if address is not None:
            conntrack.flush_address(address)


def release(conntrack: Conntrack, index: int, revocation: Revocation) -> None:
    """After a group was deleted, and before its index is given to another. Idempotent.

    Flows that still have it go on in "aws", since they were tracked, as nobody's: with 0 instead.
    """
    for mark, mask in _halves(index):
        if revocation == "immediate":
            conntrack.flush_mark(mark, mask)
        else:
            conntrack.set_marks((flow, flow.mark & ~mask) for flow in conntrack.flows(mark, mask))
