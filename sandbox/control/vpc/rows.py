"""Where the network is kept (the layout is in the package's docstring), and a VPC as a value.

The ledgers are what is not EC2's: whose turn it is, and what there is in a VPC or in the region
without a search of the store, whose keys are mostly tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.turns import Turn
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


@dataclass(frozen=True)
class Kind:
    segment: str
    """Of its keys, behind that of the VPC or the region."""
    id_field: str
    """Of the record; the last part of its key."""
    not_found: Refusal


KINDS: Mapping[type[Record], Kind] = {
    Subnet: Kind("subnet", "subnet_id", Refusal.SUBNET_NOT_FOUND),
    RouteTable: Kind("route-table", "route_table_id", Refusal.ROUTE_TABLE_NOT_FOUND),
    NetworkAcl: Kind("network-acl", "network_acl_id", Refusal.ACL_NOT_FOUND),
    SecurityGroup: Kind("group", "group_id", Refusal.GROUP_NOT_FOUND),
    InternetGateway: Kind(
        "internet-gateway", "internet_gateway_id", Refusal.INTERNET_GATEWAY_NOT_FOUND
    ),
    NatGateway: Kind("nat-gateway", "nat_gateway_id", Refusal.NAT_GATEWAY_NOT_FOUND),
    NetworkInterface: Kind("interface", "private_ip", Refusal.INTERFACE_NOT_FOUND),
    PrefixList: Kind("prefix-list", "prefix_list_id", Refusal.PREFIX_LIST_NOT_FOUND),
    ElasticAddress: Kind("elastic-address", "allocation_id", Refusal.ALLOCATION_NOT_FOUND),
    DhcpOptions: Kind("dhcp-options", "dhcp_options_id", Refusal.DHCP_OPTIONS_NOT_FOUND),
}


def vpc_key(vpc_id: str) -> str:
    return f"{VPCS}{vpc_id}/vpc"


def ledger_key(vpc_id: str) -> str:
    return f"{VPCS}{vpc_id}/ledger"


def addresses_key(vpc_id: str, subnet_id: str) -> str:
    return f"{VPCS}{vpc_id}/addresses/{subnet_id}"


def vpc_prefix(vpc_id: str, kind: type[Record]) -> str:
    return f"{VPCS}{vpc_id}/{KINDS[kind].segment}/"


def region_prefix(kind: type[Record]) -> str:
    return f"ec2/{KINDS[kind].segment}/"


def link_key(network_interface_id: str) -> str:
    """A link's name has the first eight digits: only one live interface has them."""
    return f"ec2/link/{network_interface_id.removeprefix('eni-')[:8]}"


def id_of(record: Record) -> str:
    found: str = getattr(record, KINDS[type(record)].id_field)
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


def load(store: Store, vpc_id: str) -> Network:
    """All of one VPC as it is now. Raises Ec2Error when there is none of that id."""
    vpc = store.get(vpc_key(vpc_id), Vpc)
    if vpc is None:
        raise Refusal.VPC_NOT_FOUND.error(id=vpc_id)
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
