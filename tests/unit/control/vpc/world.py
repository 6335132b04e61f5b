"""A region with something of everything, for requests that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sandbox.control.vpc import Draft
from sandbox.control.vpc.acls import (
    create_entry,
    create_network_acl,
)
from sandbox.control.vpc.addresses import (
    allocate_address,
)
from sandbox.control.vpc.dhcp import (
    associate_dhcp_options,
    create_dhcp_options,
)
from sandbox.control.vpc.gateways import (
    attach_internet_gateway,
    create_internet_gateway,
    create_nat_gateway,
)
from sandbox.control.vpc.groups import (
    authorize,
    create_security_group,
)
from sandbox.control.vpc.interfaces import (
    InterfaceRequest,
    create_network_interface,
)
from sandbox.control.vpc.permissions import RuleRequest
from sandbox.control.vpc.prefix_lists import (
    create_prefix_list,
)
from sandbox.control.vpc.routes import (
    associate_route_table,
    create_route,
    create_route_table,
    main_of,
)
from sandbox.control.vpc.subnets import create_subnet
from sandbox.control.vpc.vpcs import create_vpc
from sandbox.model.vpc import AclEntry
from tests.unit.control.vpc.regions import Ec2

ALL = RuleRequest(ip_protocol="-1", cidr_ipv4="0.0.0.0/0")
WEB = RuleRequest(ip_protocol="tcp", from_port=80, to_port=80, cidr_ipv4="10.0.0.0/8")


def entry(number: int = 90, protocol: str = "-1", block: str | None = "0.0.0.0/0") -> AclEntry:
    return AclEntry(
        rule_number=number,
        is_egress=False,
        rule_action="deny",
        protocol=protocol,
        cidr_block=block,
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """Two VPCs with the same block, one of them with something of everything."""

    ec2: Ec2
    vpc: str
    subnet: str
    subnet_association: str
    acl: str
    custom_acl: str
    table: str
    table_association: str
    custom_table: str
    custom_association: str
    igw: str
    nat: str
    spare: str
    address: str
    default_group: str
    group: str
    interface: str
    prefix_list: str
    dhcp: str
    other_vpc: str
    other_subnet: str
    other_group: str
    other_table: str
    other_igw: str


def make_world(ec2: Ec2, draft: Draft) -> World:
    vpc = create_vpc(draft, "10.0.0.0/16").vpc_id
    subnet = create_subnet(draft, vpc, "10.0.0.0/24")
    acl, custom_acl = subnet.network_acl_id, create_network_acl(draft, vpc).network_acl_id
    create_entry(draft, custom_acl, entry(100))
    table = main_of(draft, vpc)
    custom_table = create_route_table(draft, vpc).route_table_id
    associated = associate_route_table(draft, custom_table, subnet.subnet_id)
    igw = create_internet_gateway(draft).internet_gateway_id
    attach_internet_gateway(draft, igw, vpc)
    create_route(draft, table.route_table_id, "0.0.0.0/0", igw)
    addresses = [allocate_address(draft).allocation_id for _ in range(2)]
    nat = create_nat_gateway(draft, subnet.subnet_id, addresses[0]).nat_gateway_id
    group = create_security_group(draft, "web", "of a test", vpc).group_id
    request = InterfaceRequest(
        subnet_id=subnet.subnet_id, task="t", group_ids=(group,), assign_public_ip=True
    )
    interface = create_network_interface(draft, request).network_interface_id
    prefix_list = create_prefix_list(draft, "offices", 2, ["192.0.2.0/24"]).prefix_list_id
    authorize(
        draft,
        group,
        [WEB, RuleRequest(ip_protocol="-1", prefix_list_id=prefix_list)],
        is_egress=False,
    )
    dhcp = create_dhcp_options(draft).dhcp_options_id
    associate_dhcp_options(draft, dhcp, vpc)
    other = create_vpc(draft, "10.0.0.0/16").vpc_id
    other_igw = create_internet_gateway(draft).internet_gateway_id
    attach_internet_gateway(draft, other_igw, other)
    return World(
        ec2=ec2,
        vpc=vpc,
        subnet=subnet.subnet_id,
        subnet_association=subnet.network_acl_association_id,
        acl=acl,
        custom_acl=custom_acl,
        table=table.route_table_id,
        table_association=table.main_association_id or "",
        custom_table=custom_table,
        custom_association=associated.route_table_association_id or "",
        igw=igw,
        nat=nat,
        spare=create_internet_gateway(draft).internet_gateway_id,
        address=addresses[1],
        default_group=draft.ledger(vpc).default_group_id,
        group=group,
        interface=interface,
        prefix_list=prefix_list,
        dhcp=dhcp,
        other_vpc=other,
        other_subnet=create_subnet(draft, other, "10.0.0.0/24").subnet_id,
        other_group=create_security_group(draft, "web", "of a test", other).group_id,
        other_table=create_route_table(draft, other).route_table_id,
        other_igw=other_igw,
    )


def on_interface(**members: object) -> Callable[[Draft, World], object]:
    def take(draft: Draft, w: World) -> object:
        given: dict[str, object] = {"subnet_id": w.subnet, "task": "t"}
        for name, value in members.items():
            given[name] = value(w) if callable(value) else value
        return create_network_interface(draft, InterfaceRequest(**given))  # type: ignore[arg-type]

    return take
