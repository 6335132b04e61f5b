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
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import Literal

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


def made_id(kind: str, number: int) -> str:
    return f"{kind}-{number:08x}{0:09x}"


def group_rules(peers: Iterable[str]) -> st.SearchStrategy[SecurityGroupRule]:
    """`peers` are ids of groups and prefix lists; blocks of addresses are added."""
    others = tuple(peers)

    def of(
        protocol: str, ranges: st.SearchStrategy[Ports], blocks: tuple[str, ...]
    ) -> st.SearchStrategy[SecurityGroupRule]:
        peer = st.sampled_from(blocks + others)
        return st.builds(_rule, st.booleans(), st.just(protocol), ranges, peer)

    return st.one_of(
        of("tcp", st.sampled_from(RANGES), BLOCKS + BLOCKS_6),
        of("udp", st.sampled_from(RANGES), BLOCKS + BLOCKS_6),
        of("icmp", st.sampled_from(ICMP_RULES), BLOCKS),
        of("icmpv6", st.sampled_from(ICMPV6_RULES), BLOCKS_6),
        of("-1", st.none(), BLOCKS + BLOCKS_6),
        of(OTHER_PROTOCOL, st.none(), BLOCKS + BLOCKS_6),
    )


def acl_entries() -> st.SearchStrategy[tuple[AclEntry, ...]]:
    """With numbers of their own in each direction."""
    ways = st.sampled_from(("ingress", "egress"))
    actions = st.sampled_from(("allow", "allow", "deny"))
    numbers = st.integers(1, 40)

    def of(
        protocols: tuple[str, ...], ranges: st.SearchStrategy[Ports], blocks: tuple[str, ...]
    ) -> st.SearchStrategy[AclEntry]:
        protocol, block = st.sampled_from(protocols), st.sampled_from(blocks)
        return st.builds(entry, numbers, ways, actions, protocol, ranges, block)

    made = st.one_of(
        of(("6", "17"), st.sampled_from(RANGES), BLOCKS + BLOCKS_6),
        of(("1",), st.sampled_from(ICMP_RULES), BLOCKS),
        of(("58",), st.sampled_from(ICMPV6_RULES), BLOCKS_6),
        of(("-1", OTHER_PROTOCOL), st.none(), BLOCKS + BLOCKS_6),
    )
    unique = st.lists(made, max_size=6, unique_by=lambda one: (one.is_egress, one.rule_number))
    return unique.map(tuple)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A VPC with all it refers to; some with IPv6, gateways, black holes, ACLs of their own."""
    has_ipv6 = draw(st.booleans())
    lists = [
        prefix_list(made_id("pl", n), *draw(_prefixes(BLOCKS if n == 0 else BLOCKS_6)), index=n)
        for n in range(2 if has_ipv6 else 1)
    ]
    group_ids = [made_id("sg", n) for n in range(draw(st.integers(1, 3)))]
    peers = [*group_ids, *(one.prefix_list_id for one in lists)]
    groups = [
        group(group_id, *draw(st.lists(group_rules(peers), max_size=6)), index=n)
        for n, group_id in enumerate(group_ids, start=1)
    ]
    acls = [
        acl(made_id("acl", n), *draw(acl_entries()), index=n)
        for n in range(draw(st.integers(0, 2)))
    ]
    subnets = [
        subnet(
            made_id("subnet", n),
            cidr,
            ipv6=f"2600:1f18:0:aa0{n}::/64" if has_ipv6 else None,
            table=draw(st.sampled_from((None, "rtb-1", "rtb-2"))),
            acl=draw(st.sampled_from(("acl-default", *(one.network_acl_id for one in acls)))),
            public_block=PUBLIC_BLOCKS[n],
        )
        for n, cidr in enumerate(SUBNETS[: draw(st.integers(1, 3))])
    ]
    gateways: list[Record] = [internet_gateway()] if draw(st.booleans()) else []
    if draw(st.booleans()):
        gateways += nat_gateway("nat-1", subnets[0].subnet_id, "10.0.0.14", NAT_PUBLIC_IP)
    tables = [route_table(f"rtb-{n}", *draw(_routes())) for n in (1, 2)]
    main = route_table("rtb-main", *draw(_routes()), is_main=True)
    enis = list(_interfaces(draw, subnets, group_ids))
    return network(
        *(*lists, *groups, *acls, *subnets, *gateways, *tables, main, *enis),
        ipv6=has_ipv6,
        enable_dns_support=draw(st.booleans()),
    )


def _prefixes(blocks: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(blocks), max_size=3, unique=True)


def _routes() -> st.SearchStrategy[list[tuple[str, str]]]:
    """To gateways that are there or are not."""
    targets = st.sampled_from(("igw-1", "igw-1", "nat-1", "nat-gone"))
    blocks = st.sampled_from((EVERYWHERE, EVERYWHERE, "203.0.113.0/24", "203.0.113.9/32", "::/0"))
    return st.lists(st.tuples(blocks, targets), max_size=3, unique_by=lambda route: route[0])


def _interfaces(
    draw: st.DrawFn, subnets: list[Subnet], group_ids: list[str]
) -> Iterator[NetworkInterface]:
    """Next to each other in their subnets, from the first address that is assignable on."""
    taken = {one.subnet_id: itertools.count(4) for one in subnets}
    for n in range(draw(st.integers(1, 6))):
        home = draw(st.sampled_from(subnets))
        offset = next(taken[home.subnet_id])
        has_public = draw(st.booleans()) and home.public_block is not None
        yield interface(
            made_id("eni", n),
            home.subnet_id,
            str(IPv4Network(home.cidr_block)[offset]),
            *draw(st.lists(st.sampled_from(group_ids), min_size=1, unique=True)),
            public_ip=str(IPv4Network(home.public_block or "")[offset]) if has_public else None,
            ipv6=str(ip_network(home.ipv6_cidr_block)[offset]) if home.ipv6_cidr_block else None,
        )


@st.composite
def packets(draw: st.DrawFn, among: Network) -> Packet:
    """First of a flow: mostly between interfaces, also with the outside and to nobody."""
    enis = tuple(among.interfaces.values())
    private = [one.private_ip for one in enis]
    private_6 = [one.ipv6_address for one in enis if one.ipv6_address is not None]
    if draw(st.booleans()) and private_6:
        source = draw(st.sampled_from((*private_6, OUTSIDE_6)))
        nobody = ("2600:1f18:0:aa00::ff", OUTSIDE_6, "fd00::1", "fe80::1", "ff02::1", "::1")
        destination = draw(st.sampled_from(private_6) | st.sampled_from(nobody))
        return draw(_traffic(source, destination, "icmpv6", tuple(ICMPV6_ANSWERS)))
    public = [one.public_ip for one in enis if one.public_ip is not None]
    source = draw(st.sampled_from(private) | st.sampled_from((*private, *OUTSIDERS)))
    aims = [st.sampled_from(private), st.sampled_from((*OUTSIDERS, *_nobodys(among)))]
    if public:
        aims.append(st.sampled_from(public))
    return draw(_traffic(source, draw(st.one_of(aims)), "icmp", tuple(ICMP_ANSWERS)))


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


def _traffic(
    source: str, destination: str, icmp: str, types: tuple[int, ...]
) -> st.SearchStrategy[Packet]:
    def made(protocol: str, port: int, source_port: int) -> Packet:
        return packet(source, destination, protocol, port, source_port=source_port)

    with_ports = st.builds(
        made,
        st.sampled_from(("tcp", "udp")),
        st.sampled_from(PORTS),
        st.sampled_from((1023, 40000)),
    )
    with_type = st.builds(made, st.just(icmp), st.sampled_from(types), st.just(0))
    other = st.builds(made, st.sampled_from((OTHER_PROTOCOL, "132")), st.just(0), st.just(0))
    return st.one_of(with_ports, with_ports, with_type, other)


def networks_and_packets() -> st.SearchStrategy[tuple[Network, Packet]]:
    return networks().flatmap(lambda made: st.tuples(st.just(made), packets(made)))
