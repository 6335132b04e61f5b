"""The network as EC2 describes it, and one VPC of it as a value.

What is stored are the records below, each under its own id; who may change what, and which changes
EC2 refuses, is `control`'s. A `Network` is everything of one VPC at one moment: it is all that
the pure parts of `sandbox.network` see (who may talk to whom, which rules say so), so that the
same value gives the rules in the kernel, the answer of `sandbox explain` and the oracle of the
tests.

    Vpc 1--n Subnet n--1 RouteTable --> InternetGateway | NatGateway | local
             Subnet n--1 NetworkAcl
             Subnet 1--n NetworkInterface n--n SecurityGroup --> SecurityGroup | PrefixList | CIDR

Names and defaults are EC2's (Amazon EC2 API Reference), in snake case. Addresses and CIDR blocks
are text in their shortest form, as EC2 and the kernel print them. Ports and ICMP types mean what
they do in EC2: for "icmp" and "icmpv6" `from_port` is the type and `to_port` the code, -1 is any;
for tcp and udp they are a range; for every other protocol they are None, which is all.

`index` is what the kernel knows a group, a prefix list or an ACL by: a small number, unique in its
VPC, that appears in the names of sets and chains and in connection marks. It is given when the
object is made and not given again while a tracked connection may carry it.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Literal

import msgspec

from sandbox.model.task import Record

LOCAL = "local"
"""The gateway of the route that every route table has for the VPC's own addresses."""

RESERVED_FIRST = 4
"""Addresses at the start of a subnet that are nobody's: itself, router, DNS, future use. The last
one is reserved as well. (VPC User Guide, "Subnet sizing")"""

METADATA = "169.254.170.2"
RESOLVER = "169.254.169.253"
INSTANCE_METADATA = "169.254.169.254"

ACL_LAST = 32767
"""The number of the entry that EC2 shows as `*` and that denies what none before it matched."""

Revocation = Literal["aws", "immediate"]
"""What happens to connections that a changed rule no longer allows. aws: tracked ones go on until
they are idle, untracked ones are cut (EC2 User Guide, "Security group connection tracking").
immediate: all are cut."""


class Tag(Record, frozen=True, kw_only=True):
    key: str
    value: str = ""


class Vpc(Record, frozen=True, kw_only=True):
    vpc_id: str
    cidr_block: str
    """/16 to /28; VPCs may overlap, each has a namespace of its own."""
    ipv6_cidr_block: str | None = None
    number: int
    """Of its uplink on this host; unique among the VPCs that there are."""
    is_default: bool = False
    enable_dns_support: bool = True
    enable_dns_hostnames: bool = False
    dhcp_options_id: str = "default"
    revocation: Revocation = "aws"
    created_at: float
    tags: tuple[Tag, ...] = ()


class DhcpOptions(Record, frozen=True, kw_only=True):
    dhcp_options_id: str
    domain_name: str | None = None
    domain_name_servers: tuple[str, ...] = ("AmazonProvidedDNS",)
    tags: tuple[Tag, ...] = ()


class Subnet(Record, frozen=True, kw_only=True):
    subnet_id: str
    vpc_id: str
    cidr_block: str
    ipv6_cidr_block: str | None = None
    """A dual-stack subnet has one; without it there is no IPv6 on its interfaces at all."""
    availability_zone: str
    """A label: all zones are this host."""
    map_public_ip_on_launch: bool = False
    assign_ipv6_address_on_creation: bool = False
    route_table_id: str | None = None
    """None: the VPC's main route table."""
    route_table_association_id: str | None = None
    network_acl_id: str
    network_acl_association_id: str
    public_block: str | None = None
    """As long as `cidr_block`: its addresses are these one to one, once one was asked for."""
    is_default: bool = False
    created_at: float
    tags: tuple[Tag, ...] = ()


class Route(Record, frozen=True, kw_only=True):
    """`target` is `local`, or the id of an internet gateway or NAT gateway."""

    destination: str
    target: str
    """A gateway that is gone leaves its routes as black holes, as in EC2."""


class RouteTable(Record, frozen=True, kw_only=True):
    route_table_id: str
    vpc_id: str
    is_main: bool = False
    main_association_id: str | None = None
    routes: tuple[Route, ...]
    """With the local ones. The longest prefix wins, whatever the order."""
    created_at: float
    tags: tuple[Tag, ...] = ()


class InternetGateway(Record, frozen=True, kw_only=True):
    internet_gateway_id: str
    vpc_id: str | None = None
    """None: detached. A VPC has at most one."""
    created_at: float
    tags: tuple[Tag, ...] = ()


class NatGateway(Record, frozen=True, kw_only=True):
    nat_gateway_id: str
    vpc_id: str
    subnet_id: str
    """Public when its route table leads to an internet gateway; else nothing gets out."""
    network_interface_id: str
    private_ip: str
    allocation_id: str
    public_ip: str
    created_at: float
    deleted_at: float | None = None
    tags: tuple[Tag, ...] = ()


class ElasticAddress(Record, frozen=True, kw_only=True):
    allocation_id: str
    public_ip: str
    association_id: str | None = None
    network_interface_id: str | None = None
    nat_gateway_id: str | None = None
    created_at: float
    tags: tuple[Tag, ...] = ()


class PrefixList(Record, frozen=True, kw_only=True):
    prefix_list_id: str
    prefix_list_name: str
    address_family: Literal["IPv4", "IPv6"] = "IPv4"
    max_entries: int
    """What it counts for in the quota of every group that names it."""
    entries: tuple[str, ...] = ()
    version: int = 1
    index: int
    created_at: float
    tags: tuple[Tag, ...] = ()


class SecurityGroupRule(Record, frozen=True, kw_only=True):
    """It allows; exactly one of the four peers is set."""

    security_group_rule_id: str
    is_egress: bool
    ip_protocol: str
    """tcp, udp, icmp, icmpv6, -1 (all), or the number of another protocol."""
    from_port: int | None = None
    to_port: int | None = None
    cidr_ipv4: str | None = None
    cidr_ipv6: str | None = None
    prefix_list_id: str | None = None
    referenced_group_id: str | None = None
    """The private addresses of the interfaces that carry it; traffic that came by a public address
    is not from them."""
    description: str | None = None
    tags: tuple[Tag, ...] = ()


class SecurityGroup(Record, frozen=True, kw_only=True):
    """Stateful; its rules are united with those of the interface's other groups."""

    group_id: str
    vpc_id: str
    group_name: str
    description: str
    index: int
    rules: tuple[SecurityGroupRule, ...] = ()
    created_at: float
    tags: tuple[Tag, ...] = ()


class AclEntry(Record, frozen=True, kw_only=True):
    """The lowest number that matches decides; after the last one, everything is denied."""

    rule_number: int
    is_egress: bool
    """As seen from the subnet."""
    rule_action: Literal["allow", "deny"]
    protocol: str
    """-1 (all) or a number, as EC2 has it here."""
    cidr_block: str | None = None
    ipv6_cidr_block: str | None = None
    from_port: int | None = None
    to_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


class NetworkAcl(Record, frozen=True, kw_only=True):
    """Stateless, and asked only when a packet crosses the border of a subnet."""

    network_acl_id: str
    vpc_id: str
    is_default: bool = False
    index: int
    entries: tuple[AclEntry, ...]
    """Without the last one (`ACL_LAST`), which every ACL has."""
    created_at: float
    tags: tuple[Tag, ...] = ()


class NetworkInterface(Record, frozen=True, kw_only=True):
    """The one interface of a task; it lives from the task's acceptance to its end."""

    network_interface_id: str
    vpc_id: str
    subnet_id: str
    availability_zone: str
    private_ip: str
    ipv6_address: str | None = None
    mac_address: str
    public_ip: str | None = None
    """Of the subnet's block, or an Elastic address (`allocation_id`)."""
    allocation_id: str | None = None
    association_id: str | None = None
    group_ids: tuple[str, ...]
    """1 to 5, sorted: the order means nothing, and equal tuples share their chains."""
    attachment_id: str
    """Of the task, in DescribeTasks."""
    task: str | None
    """None: an address that the agent itself answers (a load balancer, a NAT gateway)."""
    description: str = ""
    bandwidth_mbit: int | None = None
    """By the task's size; None is unlimited."""
    created_at: float


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """One VPC whole, by id. Every id that something here refers to is here."""

    vpc: Vpc
    dhcp_options: DhcpOptions | None = None
    """None: EC2's own, which are the VPC's resolver and the region's domain."""
    subnets: Mapping[str, Subnet] = {}
    route_tables: Mapping[str, RouteTable] = {}
    internet_gateway: InternetGateway | None = None
    nat_gateways: Mapping[str, NatGateway] = {}
    network_acls: Mapping[str, NetworkAcl] = {}
    prefix_lists: Mapping[str, PrefixList] = {}
    groups: Mapping[str, SecurityGroup] = {}
    interfaces: Mapping[str, NetworkInterface] = {}

    def route_table_of(self, subnet: Subnet) -> RouteTable:
        if subnet.route_table_id is not None:
            return self.route_tables[subnet.route_table_id]
        return next(table for table in self.route_tables.values() if table.is_main)


def resolver_address(cidr_block: str) -> IPv4Address:
    """The VPC's DNS server: the base of its network and two."""
    return IPv4Network(cidr_block)[2]


def router_address(cidr_block: str) -> IPv4Address:
    """The gateway of a subnet: the first address after its base."""
    return IPv4Network(cidr_block)[1]


def is_assignable(subnet: Subnet, address: IPv4Address) -> bool:
    """In the subnet, and none of the five that are reserved."""
    network = IPv4Network(subnet.cidr_block)
    offset = int(address) - int(network.network_address)
    return RESERVED_FIRST <= offset < network.num_addresses - 1


def contains(outer: str, inner: str) -> bool:
    """Whether the CIDR block `inner` lies in `outer`; False for those of two IP versions."""
    one, two = _network(outer), _network(inner)
    if isinstance(one, IPv4Network):
        return isinstance(two, IPv4Network) and two.subnet_of(one)
    return isinstance(two, IPv6Network) and two.subnet_of(one)


def _network(block: str) -> IPv4Network | IPv6Network:
    return IPv6Network(block) if ":" in block else IPv4Network(block)
