"""What a packet is to a rule: its addresses in blocks, its protocol, port or ICMP type in ranges.

One form serves the rules of security groups and the entries of ACLs (`Matcher`), made once from the
records of `sandbox.model.vpc`, since a rule is asked far more often than it is changed. In it an
address is an integer, an IPv6 one with bit 128 set besides, so that the two versions never meet;
a block is a mask and what is left under it. A set of blocks is one look-up for each length of
prefix in it: as quick for a thousand members of a group as for one.

Ports and ICMP types follow EC2 (API Reference, IpPermission and NetworkAclEntry): None or -1 is
any; protocols that have neither match whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

from sandbox.model.vpc import AclEntry, SecurityGroupRule

Address = IPv4Address | IPv6Address

# IANA, "Assigned Internet Protocol Numbers"
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
PROTOCOL_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOL_NAMES.items()}
PORTS_OF = (TCP, UDP)

PORT_LAST = 65535
TYPE_LAST = 255

# The requests that have an answer, as the kernel's connection tracking pairs them
# (nf_conntrack_proto_icmp.c and nf_conntrack_proto_icmpv6.c, invmap): echo, time stamp,
# information, address mask; echo, node information.
ICMP_ANSWERS = {8: 0, 13: 14, 15: 16, 17: 18}
ICMPV6_ANSWERS = {128: 129, 139: 140}
_OTHER_WAY = {
    protocol: answers | {answer: request for request, answer in answers.items()}
    for protocol, answers in ((ICMP, ICMP_ANSWERS), (ICMPV6, ICMPV6_ANSWERS))
}

_IPV6 = 1 << 128
_EVERY_BIT = (1 << 129) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """ValueError: two versions of IP, or a number that its field in a header cannot hold."""

    source: Address
    destination: Address
    protocol: int
    """IP protocol number."""
    source_port: int = 0
    """tcp, udp"""
    destination_port: int = 0
    icmp_type: int = 0
    """icmp, icmpv6"""
    icmp_code: int = 0
    source_key: int = field(init=False, repr=False, compare=False)
    """The addresses as rules take them, worked out once (`key`)."""
    destination_key: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError(f"from {self.source} to {self.destination}: two versions of IP")
        if not (
            0 <= self.protocol <= 255
            and 0 <= self.source_port <= PORT_LAST
            and 0 <= self.destination_port <= PORT_LAST
            and 0 <= self.icmp_type <= TYPE_LAST
            and 0 <= self.icmp_code <= TYPE_LAST
        ):
            raise ValueError(f"not in a packet: {self}")
        object.__setattr__(self, "source_key", key(self.source))
        object.__setattr__(self, "destination_key", key(self.destination))

    def peer(self, *, is_egress: bool) -> int:
        """The key of the other side, for who sends it or gets it."""
        return self.destination_key if is_egress else self.source_key

    @property
    def selector(self) -> int:
        """What rules call a port: the destination's, or the ICMP type."""
        if self.protocol in PORTS_OF:
            return self.destination_port
        return self.icmp_type if self.protocol in _OTHER_WAY else 0

    @property
    def has_reply(self) -> bool:
        """Nothing answers an ICMP error, nor an answer."""
        if self.protocol == ICMP:
            return self.icmp_type in ICMP_ANSWERS
        return self.protocol != ICMPV6 or self.icmp_type in ICMPV6_ANSWERS

    def reply(self) -> Packet:
        """The first packet of the other direction; an ICMP type that has none stays as it is."""
        other_way = _OTHER_WAY.get(self.protocol, {})
        return replace(
            self,
            source=self.destination,
            destination=self.source,
            source_port=self.destination_port,
            destination_port=self.source_port,
            icmp_type=other_way.get(self.icmp_type, self.icmp_type),
        )


def traffic_of(packet: Packet) -> str:
    """As in "tcp 80"; a person reads it."""
    selector = packet.selector
    return _traffic(packet.protocol, selector, selector, None)


# Addresses -------------------------------------------------------------------------------------


def key(address: Address) -> int:
    return int(address) if address.version == 4 else int(address) | _IPV6


def key_of(text: str) -> int:
    return key(IPv6Address(text) if ":" in text else IPv4Address(text))


def block(text: str) -> tuple[int, int]:
    """The mask and the base of a CIDR block; bits of a host in it are taken for none."""
    network = IPv6Network(text, strict=False) if ":" in text else IPv4Network(text, strict=False)
    return _EVERY_BIT ^ int(network.hostmask), key(network.network_address)


class Addresses:
    """A set of addresses and blocks of them, asked by `key`."""

    __slots__ = ("_by_mask",)

    def __init__(self, by_mask: Iterable[tuple[int, frozenset[int]]] = ()) -> None:
        self._by_mask = tuple(by_mask)

    @classmethod
    def of_blocks(cls, blocks: Iterable[str]) -> Addresses:
        by_mask: dict[int, set[int]] = {}
        for mask, base in map(block, blocks):
            by_mask.setdefault(mask, set()).add(base)
        return cls((mask, frozenset(bases)) for mask, bases in by_mask.items())

    @classmethod
    def of_keys(cls, keys: Iterable[int]) -> Addresses:
        return cls([(_EVERY_BIT, frozenset(keys))])

    def __contains__(self, address: int) -> bool:
        for mask, bases in self._by_mask:  # noqa: SIM110 - a generator doubles a rule's time
            if address & mask in bases:
                return True
        return False


# Rules -----------------------------------------------------------------------------------------


class Matcher(NamedTuple):
    """A rule, ready to be asked."""

    protocol: int | None
    low: int
    """Of the ports, or of the ICMP types."""
    high: int
    code: int | None
    peers: Addresses
    position: int
    """Of the rule among those it was given with."""

    @property
    def traffic(self) -> str:
        return _traffic(self.protocol, self.low, self.high, self.code)

    def is_whole(self, protocol: int) -> bool:
        """Whether it takes all of a protocol, whatever the port."""
        return self.protocol in (None, protocol) and self.low == 0 and self.high == PORT_LAST


def first_match(matchers: tuple[Matcher, ...], packet: Packet, peer: int) -> int | None:
    """The position of the first rule that takes this packet from or to `peer`."""
    packet_protocol, selector, packet_code = packet.protocol, packet.selector, packet.icmp_code
    for protocol, low, high, code, peers, position in matchers:
        if (
            (protocol is None or protocol == packet_protocol)
            and low <= selector <= high
            and (code is None or code == packet_code)
            and peer in peers
        ):
            return position
    return None


def group_matcher(rule: SecurityGroupRule, peers: Addresses, position: int) -> Matcher:
    protocol = protocol_number(rule.ip_protocol)
    if protocol in _OTHER_WAY:
        return _icmp(protocol, rule.from_port, rule.to_port, peers, position)
    return _ports(protocol, rule.from_port, rule.to_port, peers, position)


def acl_matcher(entry: AclEntry, position: int) -> Matcher:
    protocol = protocol_number(entry.protocol)
    peers = Addresses.of_blocks(filter(None, (entry.cidr_block, entry.ipv6_cidr_block)))
    if protocol in _OTHER_WAY:
        return _icmp(protocol, entry.icmp_type, entry.icmp_code, peers, position)
    return _ports(protocol, entry.from_port, entry.to_port, peers, position)


def protocol_number(name: str) -> int | None:
    """None: all (-1)."""
    number = PROTOCOL_NUMBERS.get(name)
    if number is None:
        number = int(name)
    return None if number == -1 else number


def _ports(
    protocol: int | None, low: int | None, high: int | None, peers: Addresses, position: int
) -> Matcher:
    if protocol not in PORTS_OF or low is None or high is None or low == -1:
        low, high = 0, PORT_LAST
    return Matcher(protocol, low, high, None, peers, position)


def _icmp(
    protocol: int, type_: int | None, code: int | None, peers: Addresses, position: int
) -> Matcher:
    if type_ is None or type_ == -1:
        return Matcher(protocol, 0, TYPE_LAST, None, peers, position)
    return Matcher(protocol, type_, type_, None if code == -1 else code, peers, position)


def _traffic(protocol: int | None, low: int, high: int, code: int | None) -> str:
    if protocol is None:
        return "all traffic"
    name = PROTOCOL_NAMES.get(protocol, f"protocol {protocol}")
    if protocol in PORTS_OF:
        if (low, high) == (0, PORT_LAST):
            return f"all {name}"
        return f"{name} {low}" if low == high else f"{name} {low}-{high}"
    if protocol in _OTHER_WAY:
        if (low, high) == (0, TYPE_LAST):
            return f"all {name}"
        return f"{name} type {low}" + ("" if code is None else f" code {code}")
    return name
