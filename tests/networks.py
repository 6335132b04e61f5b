"""VPCs for tests: a few words to write one down, and hypothesis strategies that make them.

The strategies hold an evaluator, or the kernel, to one answer. A network of theirs is
small enough to be built in a namespace: at most three subnets and six interfaces, out of few
addresses, since only neighbours can disagree. Packets aim at what the rules name and at the numbers
beside it. ICMP ones are requests: connection tracking lets nothing else begin a flow.

Ids look as real ones do, and interfaces differ in the first eight digits of theirs (which links are
named by).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from typing import Literal, TypeVar

import msgspec
from hypothesis import strategies as st

from sandbox.model.vpc import (
    LOCAL,
    AclEntry,
    InternetGateway,
    NatGateway,
    Network,
    NetworkAcl,
    NetworkInterface,
    PrefixList,
    Route,
    RouteTable,
    SecurityGroup,
    SecurityGroupRule,
    Subnet,
    Vpc,
    resolver_address,
)
from sandbox.network.matching import ICMP_ANSWERS, ICMPV6_ANSWERS, PROTOCOL_NUMBERS
from sandbox.network.verdict import Packet

VPC_ID = "vpc-1"
CIDR = "10.0.0.0/16"
IPV6_CIDR = "2600:1f18:0:aa00::/56"
EVERYWHERE, EVERYWHERE_6 = "0.0.0.0/0", "::/0"
OUTSIDE, OUTSIDE_6 = "203.0.113.9", "2001:db8::9"
"""Somebody on the internet (RFC 5737, RFC 3849)."""

Ports = int | tuple[int, int] | None
Record = (
    Subnet
    | RouteTable
    | InternetGateway
    | NatGateway
    | NetworkAcl
    | PrefixList
    | SecurityGroup
    | NetworkInterface
)


# Written down ----------------------------------------------------------------------------------


def network(
    *records: Record, ipv6: bool = False, enable_dns_support: bool = True, cidr: str = CIDR
) -> Network:
    """With an ACL "acl-default" that allows all, and a main route table "rtb-main" with the local
    routes, where `records` have none of these."""
    vpc = Vpc(
        vpc_id=VPC_ID,
        cidr_block=cidr,
        ipv6_cidr_block=IPV6_CIDR if ipv6 else None,
        number=1,
        enable_dns_support=enable_dns_support,
        created_at=0.0,
    )
    acls = {one.network_acl_id: one for one in records if isinstance(one, NetworkAcl)}
    tables = {one.route_table_id: one for one in records if isinstance(one, RouteTable)}
    if not any(one.is_main for one in tables.values()):
        tables["rtb-main"] = route_table("rtb-main", is_main=True)
    gateways = [one for one in records if isinstance(one, InternetGateway)]
    return Network(
        vpc=vpc,
        subnets={one.subnet_id: one for one in records if isinstance(one, Subnet)},
        route_tables=tables,
        internet_gateway=gateways[0] if gateways else None,
        nat_gateways={one.nat_gateway_id: one for one in records if isinstance(one, NatGateway)},
        network_acls={"acl-default": acl("acl-default", *OPEN_ACL)} | acls,
        prefix_lists={one.prefix_list_id: one for one in records if isinstance(one, PrefixList)},
        groups={one.group_id: one for one in records if isinstance(one, SecurityGroup)},
        interfaces={
            one.network_interface_id: one for one in records if isinstance(one, NetworkInterface)
        },
    )


def subnet(
    subnet_id: str,
    cidr: str,
    *,
    ipv6: str | None = None,
    table: str | None = None,
    acl: str = "acl-default",
    public_block: str | None = None,
) -> Subnet:
    return Subnet(
        subnet_id=subnet_id,
        vpc_id=VPC_ID,
        cidr_block=cidr,
        ipv6_cidr_block=ipv6,
        availability_zone="us-east-1a",
        route_table_id=table,
        network_acl_id=acl,
        network_acl_association_id=f"aclassoc-{subnet_id}",
        public_block=public_block,
        created_at=0.0,
    )


def route_table(table_id: str, *routes: tuple[str, str], is_main: bool = False) -> RouteTable:
    local = ((CIDR, LOCAL), (IPV6_CIDR, LOCAL))
    return RouteTable(
        route_table_id=table_id,
        vpc_id=VPC_ID,
        is_main=is_main,
        routes=tuple(Route(destination=to, target=target) for to, target in (*local, *routes)),
        created_at=0.0,
    )


def internet_gateway(gateway_id: str = "igw-1") -> InternetGateway:
    return InternetGateway(internet_gateway_id=gateway_id, vpc_id=VPC_ID, created_at=0.0)


def nat_gateway(
    nat_id: str, subnet_id: str, private_ip: str, public_ip: str, *, deleted: bool = False
) -> tuple[NatGateway, NetworkInterface]:
    """With its interface."""
    eni = f"eni-{nat_id}"
    gateway = NatGateway(
        nat_gateway_id=nat_id,
        vpc_id=VPC_ID,
        subnet_id=subnet_id,
        network_interface_id=eni,
        private_ip=private_ip,
        allocation_id=f"eipalloc-{nat_id}",
        public_ip=public_ip,
        created_at=0.0,
        deleted_at=1.0 if deleted else None,
    )
    return gateway, interface(eni, subnet_id, private_ip, public_ip=public_ip, task=None)


def interface(
    eni: str,
    subnet_id: str,
    private_ip: str,
    *groups: str,
    public_ip: str | None = None,
    ipv6: str | None = None,
    task: str | None = "task",
) -> NetworkInterface:
    return NetworkInterface(
        network_interface_id=eni,
        vpc_id=VPC_ID,
        subnet_id=subnet_id,
        availability_zone="us-east-1a",
        private_ip=private_ip,
        ipv6_address=ipv6,
        mac_address="0a:00:" + ":".join(f"{byte:02x}" for byte in IPv4Address(private_ip).packed),
        public_ip=public_ip,
        group_ids=tuple(sorted(groups)),
        attachment_id=f"attach-{eni}",
        task=task,
        created_at=0.0,
    )


def group(group_id: str, *rules: SecurityGroupRule, index: int = 1) -> SecurityGroup:
    """Each rule gets an id."""
    return SecurityGroup(
        group_id=group_id,
        vpc_id=VPC_ID,
        group_name=group_id,
        description=group_id,
        index=index,
        rules=tuple(
            msgspec.structs.replace(rule, security_group_rule_id=f"sgr-{group_id}-{n}")
            for n, rule in enumerate(rules)
        ),
        created_at=0.0,
    )


def ingress(protocol: str, ports: Ports = None, peer: str = EVERYWHERE) -> SecurityGroupRule:
    """`peer` is a CIDR block, or the id of a group or of a prefix list; one port is a range of one,
    and for ICMP the type, of any code."""
    return _rule(False, protocol, ports, peer)


def egress(protocol: str, ports: Ports = None, peer: str = EVERYWHERE) -> SecurityGroupRule:
    return _rule(True, protocol, ports, peer)


def _rule(is_egress: bool, protocol: str, ports: Ports, peer: str) -> SecurityGroupRule:
    if isinstance(ports, int):
        ports = (ports, -1 if protocol.startswith("icmp") else ports)
    low, high = ports or (None, None)
    return SecurityGroupRule(
        security_group_rule_id="",
        is_egress=is_egress,
        ip_protocol=protocol,
        from_port=low,
        to_port=high,
        referenced_group_id=peer if peer.startswith("sg-") else None,
        prefix_list_id=peer if peer.startswith("pl-") else None,
        cidr_ipv4=peer if "." in peer else None,
        cidr_ipv6=peer if ":" in peer else None,
    )


def prefix_list(list_id: str, *entries: str, index: int = 1) -> PrefixList:
    return PrefixList(
        prefix_list_id=list_id,
        prefix_list_name=list_id,
        address_family="IPv6" if any(":" in entry for entry in entries) else "IPv4",
        max_entries=max(1, len(entries)),
        entries=entries,
        index=index,
        created_at=0.0,
    )


def acl(acl_id: str, *entries: AclEntry, index: int = 1) -> NetworkAcl:
    return NetworkAcl(
        network_acl_id=acl_id, vpc_id=VPC_ID, index=index, entries=entries, created_at=0.0
    )


def entry(
    number: int,
    way: Literal["ingress", "egress"],
    action: Literal["allow", "deny"],
    protocol: str = "-1",
    ports: Ports = None,
    cidr: str = EVERYWHERE,
) -> AclEntry:
    """`protocol` is a number as text, `ports` as in `ingress`."""
    is_icmp = protocol in ("1", "58")
    if isinstance(ports, int):
        ports = (ports, -1 if is_icmp else ports)
    low, high = ports or (None, None)
    return AclEntry(
        rule_number=number,
        is_egress=way == "egress",
        rule_action=action,
        protocol=protocol,
        cidr_block=None if ":" in cidr else cidr,
        ipv6_cidr_block=cidr if ":" in cidr else None,
        from_port=None if is_icmp else low,
        to_port=None if is_icmp else high,
        icmp_type=low if is_icmp else None,
        icmp_code=high if is_icmp else None,
    )


OPEN_ACL = (
    entry(100, "ingress", "allow"),
    entry(101, "ingress", "allow", cidr=EVERYWHERE_6),
    entry(100, "egress", "allow"),
    entry(101, "egress", "allow", cidr=EVERYWHERE_6),
)
OPEN_GROUP = (ingress("-1"), ingress("-1", peer="::/0"), egress("-1"), egress("-1", peer="::/0"))


def packet(
    source: str,
    destination: str,
    protocol: str = "tcp",
    port: int = 0,
    *,
    source_port: int = 40000,
    code: int = 0,
) -> Packet:
    """`protocol` by name or number; `port` is the destination's, or the ICMP type."""
    number = PROTOCOL_NUMBERS.get(protocol) or int(protocol)
    has_ports = protocol in ("tcp", "udp")
    is_icmp = protocol.startswith("icmp")
    return Packet(
        source=ip_address(source),
        destination=ip_address(destination),
        protocol=number,
        source_port=source_port if has_ports else 0,
        destination_port=port if has_ports else 0,
        icmp_type=port if is_icmp else 0,
        icmp_code=code if is_icmp else 0,
    )


# Made by hypothesis ----------------------------------------------------------------------------

SUBNETS = ("10.0.0.0/28", "10.0.0.16/28", "10.0.1.0/28")
PUBLIC_BLOCKS = ("198.18.0.0/28", "198.18.0.16/28", "198.18.0.32/28")
NAT_PUBLIC_IP = "198.19.255.1"
OUTSIDERS = ("203.0.113.9", "203.0.113.10", "198.51.100.7")
NOBODY_6 = ("2600:1f18:0:aa00::ff", "fd00::1", "fe80::1", "ff02::1", "::1")
PRIVATE_ELSEWHERE = ("10.1.0.5", "192.168.7.7", "172.16.0.1", "100.64.0.1", "168.63.129.16")
BLOCKS = (
    *(EVERYWHERE, "10.0.0.0/16", "10.0.0.0/28", "10.0.0.4/31", "10.0.0.5/32", "10.0.0.16/28"),
    *("203.0.113.0/24", "203.0.113.9/32", "198.18.0.0/15", "198.18.0.4/32"),
)
BLOCKS_6 = (EVERYWHERE_6, IPV6_CIDR, "2600:1f18:0:aa00::/64", "2600:1f18:0:aa00::4/127")
OTHER_PROTOCOL = "47"
PORTS = (22, 53, 79, 80, 81, 443, 1023, 1024, 8080, 65535)
RANGES = ((0, 65535), (80, 80), (79, 81), (0, 80), (1024, 65535), (65535, 65535), (0, 0))
ICMP_RULES = ((-1, -1), (8, -1), (8, 0), (13, 0), (3, 4))
ICMPV6_RULES = ((-1, -1), (128, -1), (128, 0), (1, -1))


ROUTES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ((EVERYWHERE, "igw-1"), (EVERYWHERE_6, "igw-1")),
    ((EVERYWHERE, "igw-1"), ("203.0.113.0/24", "nat-gone"), ("203.0.113.9/32", "igw-1")),
    ((EVERYWHERE, "nat-1"), (EVERYWHERE_6, "nat-1")),
    ((EVERYWHERE, "nat-1"), ("203.0.113.0/24", "igw-1")),
    (("203.0.113.0/24", "nat-1"), ("198.18.0.0/15", "igw-1"), (EVERYWHERE, "nat-gone")),
)
"""What a table has beside the local routes; the gateways are there or are not."""

T = TypeVar("T")


@lru_cache(maxsize=4096)
def _any_of(options: tuple[T, ...]) -> st.SearchStrategy[T]:
    """Made once: most of the time that an example takes goes into making strategies."""
    return st.sampled_from(options)


def made_id(kind: str, number: int) -> str:
    return f"{kind}-{number:08x}{0:09x}"


@lru_cache
def group_rules(peers: tuple[str, ...]) -> st.SearchStrategy[SecurityGroupRule]:
    """`peers` are ids of groups and prefix lists; blocks of addresses are added."""

    def of(
        protocol: str, ranges: tuple[Ports, ...], blocks: tuple[str, ...]
    ) -> Iterator[SecurityGroupRule]:
        # References come first and twice: there are few of them and many blocks.
        for is_egress, peer in itertools.product((False, True), peers * 2 + blocks):
            yield from (_rule(is_egress, protocol, ports, peer) for ports in ranges)

    return st.one_of(
        _any_of(tuple(of("tcp", RANGES, BLOCKS + BLOCKS_6))),
        _any_of(tuple(of("udp", RANGES, BLOCKS + BLOCKS_6))),
        _any_of((*of("icmp", ICMP_RULES, BLOCKS), *of("icmpv6", ICMPV6_RULES, BLOCKS_6))),
        _any_of(tuple(of("-1", (None,), BLOCKS + BLOCKS_6))),
        _any_of(tuple(of(OTHER_PROTOCOL, (None,), BLOCKS + BLOCKS_6))),
    )


def _acl_entries() -> st.SearchStrategy[list[AclEntry]]:
    def of(protocol: str, ranges: tuple[Ports, ...], blocks: tuple[str, ...]) -> Iterator[AclEntry]:
        actions: tuple[Literal["allow", "deny"], ...] = ("allow", "allow", "deny")
        ways: tuple[Literal["ingress", "egress"], ...] = ("ingress", "egress")
        for way, action, ports, block in itertools.product(ways, actions, ranges, blocks):
            yield entry(1, way, action, protocol, ports, block)

    one = st.one_of(
        _any_of(tuple(of("6", RANGES, BLOCKS + BLOCKS_6))),
        _any_of(tuple(of("17", RANGES, BLOCKS + BLOCKS_6))),
        _any_of((*of("1", ICMP_RULES, BLOCKS), *of("58", ICMPV6_RULES, BLOCKS_6))),
        _any_of(tuple(of("-1", (None,), BLOCKS + BLOCKS_6))),
        _any_of(tuple(of(OTHER_PROTOCOL, (None,), BLOCKS + BLOCKS_6))),
    )
    return st.lists(one, max_size=6)


def _numbered(entries: list[AclEntry]) -> tuple[AclEntry, ...]:
    """Each its own number, not in the order in which they are written down."""
    return tuple(
        msgspec.structs.replace(one, rule_number=10 + n * 17 % 41) for n, one in enumerate(entries)
    )


OPEN_EGRESS = (egress("-1"), egress("-1", peer=EVERYWHERE_6))
STARTS = _any_of(((), OPEN_EGRESS, OPEN_EGRESS, OPEN_GROUP))
"""Without these, hardly a packet would get past the first group."""
ACL_STARTS = _any_of(((), OPEN_ACL, OPEN_ACL))
ACL_ENTRIES = _acl_entries()
TABLES = _any_of(ROUTES)
FEW, SOME, MORE = st.integers(0, 2), st.integers(1, 3), st.integers(2, 6)
MAYBE = st.booleans()
PREFIXES, PREFIXES_6 = (
    st.lists(_any_of(blocks), max_size=3, unique=True) for blocks in (BLOCKS, BLOCKS_6)
)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A VPC with all it refers to; some with IPv6, gateways, black holes, ACLs of their own."""
    has_ipv6 = draw(MAYBE)
    lists = [prefix_list(made_id("pl", 0), *draw(PREFIXES), index=1)]
    if has_ipv6:
        lists.append(prefix_list(made_id("pl", 1), *draw(PREFIXES_6), index=2))
    group_ids = tuple(made_id("sg", n) for n in range(draw(SOME)))
    rules = _rule_lists((*group_ids, *(one.prefix_list_id for one in lists)))
    groups = [
        group(group_id, *draw(STARTS), *draw(rules), index=n)
        for n, group_id in enumerate(group_ids, start=1)
    ]
    acls = [
        acl(made_id("acl", n), *_numbered(draw(ACL_ENTRIES)), *draw(ACL_STARTS), index=n + 1)
        for n in range(draw(FEW))
    ]
    of_subnet = _any_of(("acl-default", *(one.network_acl_id for one in acls)))
    subnets = [
        subnet(
            made_id("subnet", n),
            cidr,
            ipv6=f"2600:1f18:0:aa0{n}::/64" if has_ipv6 else None,
            table=draw(_any_of((None, "rtb-1", "rtb-2"))),
            acl=draw(of_subnet),
            public_block=PUBLIC_BLOCKS[n],
        )
        for n, cidr in enumerate(SUBNETS[: draw(SOME)])
    ]
    gateways: list[Record] = [internet_gateway()] if draw(_any_of((True, True, False))) else []
    if draw(MAYBE):
        gateways += nat_gateway(
            "nat-1",
            subnets[-1].subnet_id,
            str(IPv4Network(subnets[-1].cidr_block)[14]),
            NAT_PUBLIC_IP,
        )
    tables = [route_table(f"rtb-{n}", *draw(TABLES)) for n in (1, 2)]
    main = route_table("rtb-main", *draw(TABLES), is_main=True)
    enis = list(_interfaces(draw, subnets, group_ids))
    return network(
        *(*lists, *groups, *acls, *subnets, *gateways, *tables, main, *enis),
        ipv6=has_ipv6,
        enable_dns_support=draw(MAYBE),
    )


@lru_cache
def _rule_lists(peers: tuple[str, ...]) -> st.SearchStrategy[list[SecurityGroupRule]]:
    return st.lists(group_rules(peers), max_size=5)


def _interfaces(
    draw: st.DrawFn, subnets: list[Subnet], group_ids: tuple[str, ...]
) -> Iterator[NetworkInterface]:
    """Next to each other in their subnets, from the first address that is assignable on."""
    taken = {one.subnet_id: itertools.count(4) for one in subnets}
    some_groups = _any_of(_subsets(group_ids))
    homes = st.integers(0, len(subnets) - 1)
    for n in range(draw(MORE)):
        home = subnets[draw(homes)]
        offset = next(taken[home.subnet_id])
        public_block = home.public_block if draw(MAYBE) else None
        yield interface(
            made_id("eni", n),
            home.subnet_id,
            str(IPv4Network(home.cidr_block)[offset]),
            *draw(some_groups),
            public_ip=str(IPv4Network(public_block)[offset]) if public_block else None,
            ipv6=str(IPv6Network(home.ipv6_cidr_block)[offset]) if home.ipv6_cidr_block else None,
        )


def _subsets(ids: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """All but the empty one, small ones first."""
    sizes = range(1, len(ids) + 1)
    return tuple(itertools.chain.from_iterable(itertools.combinations(ids, n) for n in sizes))


@st.composite
def packets(draw: st.DrawFn, among: Network) -> Packet:
    """First of a flow: mostly between interfaces, also with the outside and to nobody."""
    enis = tuple(one for one in among.interfaces.values() if one.task is not None)
    private = tuple(one.private_ip for one in enis)
    private_6 = tuple(one.ipv6_address for one in enis if one.ipv6_address is not None)
    if draw(_any_of((False, False, True))) and private_6:
        source = draw(_any_of((*private_6 * 2, OUTSIDE_6)))
        others = _without(source, private_6)
        to: tuple[tuple[str, ...], ...] = (others, others, (OUTSIDE_6,), NOBODY_6)
        return _made(source, draw(_any_of(draw(_any_of(to)))), draw(TRAFFIC_6))
    public = tuple(one.public_ip for one in enis if one.public_ip is not None) or OUTSIDERS
    is_from_outside = draw(_any_of((False, False, False, True)))
    source = draw(_any_of(OUTSIDERS if is_from_outside else private))
    nobody = (source, *_nobodys(among))
    if is_from_outside:
        to = (public, public, public, private, nobody)
    else:
        others = _without(source, private)
        to = (others, others, others, public, OUTSIDERS, nobody)
    return _made(source, draw(_any_of(draw(_any_of(to)))), draw(TRAFFIC))


def _without(source: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Of a lonely interface, itself."""
    return tuple(address for address in addresses if address != source) or (source,)


def _nobodys(among: Network) -> Iterator[str]:
    """And what has rules of its own."""
    for one in among.subnets.values():
        block = IPv4Network(one.cidr_block)
        yield from (str(block[1]), str(block[2]), str(block[13]), str(block[-1]))
        yield str(IPv4Network(one.public_block or block)[13])
    yield str(resolver_address(among.vpc.cidr_block))
    yield from ("169.254.169.253", "169.254.169.254", "169.254.170.2", "169.254.1.1")
    yield from (NAT_PUBLIC_IP, *PRIVATE_ELSEWHERE, "10.0.200.1")
    yield from ("224.0.0.1", "255.255.255.255", "127.0.0.1")


Traffic = tuple[str, int, int]
"""Protocol, port or ICMP type, source port."""


def _traffic(icmp: str, types: Iterable[int]) -> st.SearchStrategy[Traffic]:
    with_ports = itertools.product(("tcp", "udp"), PORTS, (40000, 1023))
    with_type = ((icmp, number, 0) for number in types)
    whole = ((OTHER_PROTOCOL, 0, 0), ("132", 0, 0))
    return st.one_of(_any_of(tuple(with_ports)), _any_of((*with_type, *whole)))


TRAFFIC = _traffic("icmp", ICMP_ANSWERS)
TRAFFIC_6 = _traffic("icmpv6", ICMPV6_ANSWERS)


def _made(source: str, destination: str, traffic: Traffic) -> Packet:
    protocol, port, source_port = traffic
    return packet(source, destination, protocol, port, source_port=source_port)


@st.composite
def networks_and_packets(draw: st.DrawFn) -> tuple[Network, Packet]:
    made = draw(networks())
    return made, draw(packets(made))
