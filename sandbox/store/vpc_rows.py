"""Where the network is kept: EC2's objects each in a row, and what control needs to give them out.

All of a VPC is under `vpc/<vpc id>/`: one watch of `vpc/` hears of everything that changes in one,
and the key says in which (`vpc_of`). `network` is all of one as a value. Control writes them all.

    vpc/<vpc>/vpc                          Vpc
    vpc/<vpc>/ledger                       VpcLedger
    vpc/<vpc>/subnet/<id>                  Subnet; likewise route-table, network-acl, group,
                                           nat-gateway, internet-gateway
    vpc/<vpc>/prefix-list/<id>             a copy of each list that a group of the VPC names
    vpc/<vpc>/addresses/<subnet>           Addresses
    vpc/<vpc>/interface/<private address>  NetworkInterface: the key is the claim on the address
    ec2/ledger                             RegionLedger
    ec2/internet-gateway/<id>              a detached one; it moves when it is attached
    ec2/elastic-address/<id>, ec2/prefix-list/<id>, ec2/dhcp-options/<id>
    ec2/link/<8 hex digits>                Link: the interface whose link has that name

The ledgers are what is not EC2's: whose turn it is, and what there is in a VPC or in the region
without a search of the store, whose keys are mostly tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from sandbox.model.task import Record
from sandbox.model.vpc import (
    DhcpOptions,
    ElasticAddress,
    InternetGateway,
    NatGateway,
    Network,
    NetworkAcl,
    NetworkInterface,
    PrefixList,
    RouteTable,
    SecurityGroup,
    Subnet,
    Vpc,
)
from sandbox.store.base import Store

T = TypeVar("T", bound=Record)

VPCS: Final = "vpc/"
REGION_LEDGER: Final = "ec2/ledger"


class Turn(Record, frozen=True, kw_only=True):
    """Of numbers that are given in turn: see `sandbox.control.vpc.turns`."""

    cursor: int = 0
    """The first that is tried; the one after what was given last."""
    resting: tuple[int, ...] = ()
    """What came back, the longest ago first."""


class RegionLedger(Record, frozen=True, kw_only=True):
    writes: int = 0
    """Counts the transactions that rest on the whole region: two of them conflict."""
    vpcs: tuple[str, ...] = ()
    vpc_numbers: Turn = Turn()
    prefix_list_indexes: Turn = Turn()
    elastic: Turn = Turn()
    """Offsets in the pool of Elastic addresses."""
    block_cursor: int = 0
    """Where the search for the next public block begins: an offset in the public pool."""
    had_default_vpc: bool = False
    """Once made it is the user's: deleted, it is not made again unasked."""


class VpcLedger(Record, frozen=True, kw_only=True):
    writes: int = 0
    """Counts the transactions that rest on the shape of the VPC: two of them conflict."""
    default_group_id: str
    subnets: tuple[str, ...] = ()
    group_indexes: Turn = Turn()
    acl_indexes: Turn = Turn()
    retired_groups: tuple[int, ...] = ()
    """Of deleted groups, until the data plane says that no connection carries them any more."""
    retired_acls: tuple[int, ...] = ()


class Addresses(Record, frozen=True, kw_only=True):
    """Of one subnet. Who has an address is the interface's row; here is whose turn it is."""

    turn: Turn = Turn()
    """Offsets in the subnet."""
    in_use: int = 0


class Link(Record, frozen=True, kw_only=True):
    """The interface of which a link has its name, and where its row is."""

    network_interface_id: str
    vpc_id: str
    private_ip: str


SEGMENTS: Mapping[type[Record], tuple[str, str]] = {
    Subnet: ("subnet", "subnet_id"),
    RouteTable: ("route-table", "route_table_id"),
    NetworkAcl: ("network-acl", "network_acl_id"),
    SecurityGroup: ("group", "group_id"),
    InternetGateway: ("internet-gateway", "internet_gateway_id"),
    NatGateway: ("nat-gateway", "nat_gateway_id"),
    NetworkInterface: ("interface", "private_ip"),
    PrefixList: ("prefix-list", "prefix_list_id"),
    ElasticAddress: ("elastic-address", "allocation_id"),
    DhcpOptions: ("dhcp-options", "dhcp_options_id"),
}
"""What follows the VPC or the region in the keys of a kind, and the member that ends them."""


def vpc_key(vpc_id: str) -> str:
    return f"{VPCS}{vpc_id}/vpc"


def ledger_key(vpc_id: str) -> str:
    return f"{VPCS}{vpc_id}/ledger"


def addresses_key(vpc_id: str, subnet_id: str) -> str:
    return f"{VPCS}{vpc_id}/addresses/{subnet_id}"


def vpc_prefix(vpc_id: str, kind: type[Record]) -> str:
    return f"{VPCS}{vpc_id}/{SEGMENTS[kind][0]}/"


def region_prefix(kind: type[Record]) -> str:
    return f"ec2/{SEGMENTS[kind][0]}/"


def link_key(network_interface_id: str) -> str:
    """A link's name has the first eight digits: only one live interface has them."""
    return f"ec2/link/{network_interface_id.removeprefix('eni-')[:8]}"


def id_of(record: Record) -> str:
    found: str = getattr(record, SEGMENTS[type(record)][1])
    return found


def key_of(record: Record) -> str:
    """Where the record is kept; a prefix list as the region has it."""
    if isinstance(record, Vpc):
        return vpc_key(record.vpc_id)
    vpc_id: str | None = getattr(record, "vpc_id", None)
    kind = type(record)
    prefix = region_prefix(kind) if vpc_id is None else vpc_prefix(vpc_id, kind)
    return prefix + id_of(record)


def vpc_of(key: str) -> str | None:
    """Which VPC a changed key is of; None for what is not of one."""
    return key.split("/", 2)[1] if key.startswith(VPCS) else None


def vpc_ids(store: Store) -> tuple[str, ...]:
    ledger = store.get(REGION_LEDGER, RegionLedger)
    return ledger.value.vpcs if ledger else ()


def network(store: Store, vpc_id: str) -> Network | None:
    """All of one VPC as it is now; None when there is none of that id."""
    vpc = store.get(vpc_key(vpc_id), Vpc)
    if vpc is None:
        return None
    options = store.get(region_prefix(DhcpOptions) + vpc.value.dhcp_options_id, DhcpOptions)
    keys = store.keys(f"{VPCS}{vpc_id}/")

    def each(kind: type[T]) -> dict[str, T]:
        prefix = vpc_prefix(vpc_id, kind)
        found = (store.get(key, kind) for key in keys if key.startswith(prefix))
        return {id_of(row.value): row.value for row in found if row is not None}

    interfaces = each(NetworkInterface).values()
    return Network(
        vpc=vpc.value,
        dhcp_options=options.value if options else None,
        subnets=each(Subnet),
        route_tables=each(RouteTable),
        internet_gateway=next(iter(each(InternetGateway).values()), None),
        nat_gateways=each(NatGateway),
        network_acls=each(NetworkAcl),
        prefix_lists=each(PrefixList),
        groups=each(SecurityGroup),
        interfaces={interface.network_interface_id: interface for interface in interfaces},
    )
