"""Requests that are refused for what there is, what there is not, and how many there are."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.control.vpc import Draft, load
from sandbox.control.vpc.acls import (
    create_entry,
    create_network_acl,
    delete_entry,
    delete_network_acl,
    replace_entry,
    replace_network_acl_association,
)
from sandbox.control.vpc.addresses import (
    allocate_address,
    associate_address,
    disassociate_address,
    release_address,
)
from sandbox.control.vpc.defaults import create_default_vpc
from sandbox.control.vpc.dhcp import (
    associate_dhcp_options,
    create_dhcp_options,
    delete_dhcp_options,
)
from sandbox.control.vpc.gateways import (
    attach_internet_gateway,
    create_internet_gateway,
    create_nat_gateway,
    delete_internet_gateway,
    delete_nat_gateway,
    detach_internet_gateway,
)
from sandbox.control.vpc.groups import (
    authorize,
    create_security_group,
    delete_security_group,
    describe_rules,
    revoke,
    revoke_ids,
)
from sandbox.control.vpc.interfaces import (
    modify_groups,
)
from sandbox.control.vpc.permissions import RuleRequest
from sandbox.control.vpc.prefix_lists import (
    create_prefix_list,
    delete_prefix_list,
    modify_prefix_list,
)
from sandbox.control.vpc.routes import (
    associate_route_table,
    create_route,
    create_route_table,
    delete_route,
    delete_route_table,
    disassociate_route_table,
    replace_route,
    replace_route_table_association,
)
from sandbox.control.vpc.subnets import create_subnet, delete_subnet, modify_subnet_attribute
from sandbox.control.vpc.vpcs import create_vpc, delete_vpc, modify_vpc_attribute
from tests.unit.control.vpc.world import ALL, WEB, World, entry, on_interface

STATE: list[tuple[str, str, Callable[[Draft, World], object]]] = [
    # Not there
    (
        "InvalidVpcID.NotFound",
        "The vpc ID 'vpc-0' does not exist",
        lambda d, w: delete_vpc(d, "vpc-0"),
    ),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: create_subnet(d, "vpc-0", "10.0.0.0/24")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: create_route_table(d, "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: create_network_acl(d, "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: create_security_group(d, "a", "d", "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: attach_internet_gateway(d, w.spare, "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: detach_internet_gateway(d, w.igw, "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: modify_vpc_attribute(d, "vpc-0")),
    ("InvalidVpcID.NotFound", "vpc-0", lambda d, w: associate_dhcp_options(d, w.dhcp, "vpc-0")),
    ("InvalidVpcID.NotFound", "'a?b'", lambda d, w: delete_vpc(d, "a\0b")),
    ("InvalidVpcID.NotFound", "...'", lambda d, w: delete_vpc(d, "v" * 10**6)),
    ("InvalidVpcID.NotFound", "ledger", lambda d, w: delete_vpc(d, f"{w.vpc}/ledger")),
    ("InvalidSubnetID.NotFound", "subnet-0", lambda d, w: delete_subnet(d, "subnet-0")),
    ("InvalidSubnetID.NotFound", "subnet-0", lambda d, w: modify_subnet_attribute(d, "subnet-0")),
    ("InvalidSubnetID.NotFound", "''", on_interface(subnet_id="")),
    ("InvalidSubnetID.NotFound", "../", on_interface(subnet_id="../subnet/x")),
    (
        "InvalidSubnetID.NotFound",
        "subnet-0",
        lambda d, w: create_nat_gateway(d, "subnet-0", w.address),
    ),
    (
        "InvalidSubnetID.NotFound",
        "subnet-0",
        lambda d, w: associate_route_table(d, w.table, "subnet-0"),
    ),
    ("InvalidGroup.NotFound", "sg-0", lambda d, w: delete_security_group(d, "sg-0")),
    ("InvalidGroup.NotFound", "sg-0", lambda d, w: authorize(d, "sg-0", [ALL], is_egress=False)),
    ("InvalidGroup.NotFound", "sg-0", lambda d, w: revoke(d, "sg-0", [ALL], is_egress=False)),
    ("InvalidGroup.NotFound", "sg-0", lambda d, w: modify_groups(d, w.interface, ("sg-0",))),
    ("InvalidGroup.NotFound", "sg-0", on_interface(group_ids=("sg-0",))),
    (
        "InvalidGroup.NotFound",
        "The security group 'sg-0' does not exist",
        lambda d, w: authorize(
            d, w.group, [RuleRequest(ip_protocol="-1", referenced_group_id="sg-0")], is_egress=False
        ),
    ),
    (
        "InvalidGroup.NotFound",
        "You have specified two resources that belong to different networks.",
        lambda d, w: authorize(
            d,
            w.group,
            [RuleRequest(ip_protocol="-1", referenced_group_id=w.other_group)],
            is_egress=False,
        ),
    ),
    (
        "InvalidPrefixListID.NotFound",
        "pl-0",
        lambda d, w: authorize(
            d, w.group, [RuleRequest(ip_protocol="-1", prefix_list_id="pl-0")], is_egress=False
        ),
    ),
    ("InvalidPrefixListID.NotFound", "pl-0", lambda d, w: delete_prefix_list(d, "pl-0")),
    ("InvalidPrefixListID.NotFound", "pl-0", lambda d, w: modify_prefix_list(d, "pl-0")),
    (
        "InvalidPermission.NotFound",
        "The specified rule does not exist in this security group.",
        lambda d, w: revoke(d, w.group, [WEB, ALL], is_egress=False),
    ),
    (
        "InvalidSecurityGroupRuleId.NotFound",
        "sgr-0",
        lambda d, w: revoke_ids(d, w.group, ["sgr-0"], is_egress=False),
    ),
    (
        "InvalidSecurityGroupRuleId.NotFound",
        "sgr-0",
        lambda d, w: describe_rules(d, w.group, {"sgr-0": "a"}),
    ),
    ("InvalidRouteTableID.NotFound", "rtb-0", lambda d, w: delete_route_table(d, "rtb-0")),
    (
        "InvalidRouteTableID.NotFound",
        "rtb-0",
        lambda d, w: create_route(d, "rtb-0", "0.0.0.0/0", w.igw),
    ),
    (
        "InvalidRouteTableID.NotFound",
        "rtb-0",
        lambda d, w: associate_route_table(d, "rtb-0", w.subnet),
    ),
    (
        "InvalidRoute.NotFound",
        "no route with destination-cidr-block 1.0.0.0/8 in route table",
        lambda d, w: delete_route(d, w.table, "1.0.0.0/8"),
    ),
    (
        "InvalidRoute.NotFound",
        "1.0.0.0/8",
        lambda d, w: replace_route(d, w.table, "1.0.0.0/8", w.igw),
    ),
    (
        "InvalidGatewayID.NotFound",
        "vgw-0",
        lambda d, w: create_route(d, w.table, "1.0.0.0/8", "vgw-0"),
    ),
    (
        "InvalidInternetGatewayID.NotFound",
        "igw-0",
        lambda d, w: create_route(d, w.table, "1.0.0.0/8", "igw-0"),
    ),
    ("NatGatewayNotFound", "nat-0", lambda d, w: create_route(d, w.table, "1.0.0.0/8", "nat-0")),
    ("NatGatewayNotFound", "nat-0", lambda d, w: delete_nat_gateway(d, "nat-0")),
    (
        "InvalidInternetGatewayID.NotFound",
        "igw-0",
        lambda d, w: delete_internet_gateway(d, "igw-0"),
    ),
    (
        "InvalidInternetGatewayID.NotFound",
        "igw-0",
        lambda d, w: attach_internet_gateway(d, "igw-0", w.vpc),
    ),
    ("InvalidAllocationID.NotFound", "eipalloc-0", lambda d, w: release_address(d, "eipalloc-0")),
    (
        "InvalidAllocationID.NotFound",
        "eipalloc-0",
        lambda d, w: create_nat_gateway(d, w.subnet, "eipalloc-0"),
    ),
    (
        "InvalidAllocationID.NotFound",
        "eipalloc-0",
        lambda d, w: associate_address(d, "eipalloc-0", w.interface),
    ),
    (
        "InvalidNetworkInterfaceID.NotFound",
        "eni-0",
        lambda d, w: associate_address(d, w.address, "eni-0"),
    ),
    (
        "InvalidNetworkInterfaceID.NotFound",
        "eni-0",
        lambda d, w: modify_groups(d, "eni-0", (w.group,)),
    ),
    (
        "InvalidAssociationID.NotFound",
        "eipassoc-0",
        lambda d, w: disassociate_address(d, "eipassoc-0"),
    ),
    (
        "InvalidAssociationID.NotFound",
        "rtbassoc-0",
        lambda d, w: disassociate_route_table(d, "rtbassoc-0"),
    ),
    (
        "InvalidAssociationID.NotFound",
        "a-0",
        lambda d, w: replace_route_table_association(d, "a-0", w.table),
    ),
    (
        "InvalidAssociationID.NotFound",
        "a-0",
        lambda d, w: replace_network_acl_association(d, "a-0", w.acl),
    ),
    ("InvalidNetworkAclID.NotFound", "acl-0", lambda d, w: delete_network_acl(d, "acl-0")),
    ("InvalidNetworkAclID.NotFound", "acl-0", lambda d, w: create_entry(d, "acl-0", entry())),
    (
        "InvalidNetworkAclID.NotFound",
        "acl-0",
        lambda d, w: replace_network_acl_association(d, w.subnet_association, "acl-0"),
    ),
    (
        "InvalidNetworkAclEntry.NotFound",
        "by 90",
        lambda d, w: replace_entry(d, w.custom_acl, entry()),
    ),
    (
        "InvalidNetworkAclEntry.NotFound",
        "The network acl entry identified by 100 does not exist",
        lambda d, w: delete_entry(d, w.custom_acl, 100, is_egress=True),
    ),
    (
        "InvalidDhcpOptionID.NotFound",
        "dopt-0",
        lambda d, w: associate_dhcp_options(d, "dopt-0", w.vpc),
    ),
    ("InvalidDhcpOptionID.NotFound", "dopt-0", lambda d, w: delete_dhcp_options(d, "dopt-0")),
    # There already
    (
        "InvalidGroup.Duplicate",
        "'Web' already exists",
        lambda d, w: create_security_group(d, "Web", "d", w.vpc),
    ),
    (
        "InvalidPermission.Duplicate",
        "TCP",
        lambda d, w: authorize(d, w.group, [WEB], is_egress=False),
    ),
    (
        "InvalidParameterValue",
        "The same permission must not appear multiple times",
        lambda d, w: authorize(d, w.group, [ALL, ALL], is_egress=False),
    ),
    ("RouteAlreadyExists", "0.0.0.0/0", lambda d, w: create_route(d, w.table, "0.0.0.0/0", w.igw)),
    (
        "NetworkAclEntryAlreadyExists",
        "by 100 already",
        lambda d, w: create_entry(d, w.custom_acl, entry(100)),
    ),
    (
        "InvalidSubnet.Conflict",
        "The CIDR '10.0.0.128/25' conflicts with another subnet",
        lambda d, w: create_subnet(d, w.vpc, "10.0.0.128/25"),
    ),
    ("InvalidSubnet.Conflict", "10.0.0.0/20", lambda d, w: create_subnet(d, w.vpc, "10.0.0.0/20")),
    (
        "Resource.AlreadyAssociated",
        "already attached",
        lambda d, w: attach_internet_gateway(d, w.igw, w.other_vpc),
    ),
    (
        "Resource.AlreadyAssociated",
        "already has",
        lambda d, w: attach_internet_gateway(d, w.spare, w.vpc),
    ),
    (
        "Resource.AlreadyAssociated",
        "rtb-",
        lambda d, w: associate_route_table(d, w.table, w.subnet),
    ),
    (
        "DefaultVpcAlreadyExists",
        "A Default VPC",
        lambda d, w: (create_default_vpc(d), create_default_vpc(d)),
    ),
    # In use
    ("DependencyViolation", "The vpc '", lambda d, w: delete_vpc(d, w.vpc)),
    ("DependencyViolation", "The vpc '", lambda d, w: delete_vpc(d, w.other_vpc)),
    ("DependencyViolation", "The subnet '", lambda d, w: delete_subnet(d, w.subnet)),
    (
        "DependencyViolation",
        "has a dependent object",
        lambda d, w: delete_security_group(d, w.group),
    ),
    ("DependencyViolation", "The routeTable '", lambda d, w: delete_route_table(d, w.table)),
    ("DependencyViolation", "The routeTable '", lambda d, w: delete_route_table(d, w.custom_table)),
    (
        "DependencyViolation",
        "The internetGateway '",
        lambda d, w: delete_internet_gateway(d, w.igw),
    ),
    (
        "DependencyViolation",
        "mapped public address",
        lambda d, w: detach_internet_gateway(d, w.igw, w.vpc),
    ),
    ("DependencyViolation", "The prefix list '", lambda d, w: delete_prefix_list(d, w.prefix_list)),
    ("DependencyViolation", "The dhcpOptions '", lambda d, w: delete_dhcp_options(d, w.dhcp)),
    ("InvalidIPAddress.InUse", "10.0.0.4", on_interface(private_ip="10.0.0.4")),
    (
        "InvalidIPAddress.InUse",
        "198.19.255.1 is in use",
        lambda d, w: release_address(d, load(w.ec2.store, w.vpc).nat_gateways[w.nat].allocation_id),
    ),
    ("CannotDelete", 'name: "default"', lambda d, w: delete_security_group(d, w.default_group)),
    ("CannotDelete", "default network ACL", lambda d, w: delete_network_acl(d, w.acl)),
    (
        "InvalidParameterValue",
        "cannot disassociate the main",
        lambda d, w: disassociate_route_table(d, w.table_association),
    ),
    (
        "InvalidParameterValue",
        "cannot remove local route",
        lambda d, w: delete_route(d, w.table, "10.0.0.0/16"),
    ),
]


FULL: list[tuple[str, dict[str, int], Callable[[Draft, World], object]]] = [
    ("VpcLimitExceeded", {"vpcs": 2}, lambda d, w: create_vpc(d, "10.9.0.0/16")),
    (
        "SubnetLimitExceeded",
        {"subnets_per_vpc": 1},
        lambda d, w: create_subnet(d, w.vpc, "10.0.9.0/24"),
    ),
    (
        "RouteTableLimitExceeded",
        {"route_tables_per_vpc": 2},
        lambda d, w: create_route_table(d, w.vpc),
    ),
    (
        "RouteLimitExceeded",
        {"routes_per_table": 1},
        lambda d, w: create_route(d, w.table, "1.0.0.0/8", w.igw),
    ),
    (
        "InternetGatewayLimitExceeded",
        {"internet_gateways": 3},
        lambda d, w: create_internet_gateway(d),
    ),
    (
        "NatGatewayLimitExceeded",
        {"nat_gateways_per_zone": 1},
        lambda d, w: create_nat_gateway(d, w.other_subnet, w.address),
    ),
    ("AddressLimitExceeded", {"elastic_addresses": 2}, lambda d, w: allocate_address(d)),
    ("NetworkAclLimitExceeded", {"acls_per_vpc": 2}, lambda d, w: create_network_acl(d, w.vpc)),
    (
        "NetworkAclEntryLimitExceeded",
        {"entries_per_acl": 1},
        lambda d, w: create_entry(d, w.custom_acl, entry(7)),
    ),
    (
        "SecurityGroupLimitExceeded",
        {"groups": 4},
        lambda d, w: create_security_group(d, "a", "d", w.vpc),
    ),
    (
        "SecurityGroupLimitExceeded",
        {"groups_per_vpc": 2},
        lambda d, w: create_security_group(d, "a", "d", w.vpc),
    ),
    (
        "RulesPerSecurityGroupLimitExceeded",
        {"rules_per_group": 3},
        lambda d, w: authorize(d, w.group, [ALL], is_egress=False),
    ),
    (
        "SecurityGroupsPerInterfaceLimitExceeded",
        {"groups_per_interface": 1},
        lambda d, w: modify_groups(d, w.interface, (w.group, w.default_group)),
    ),
    ("PrefixListLimitExceeded", {"prefix_lists": 1}, lambda d, w: create_prefix_list(d, "a", 1)),
    ("DhcpOptionsLimitExceeded", {"dhcp_options": 1}, lambda d, w: create_dhcp_options(d)),
    ("NetworkInterfaceLimitExceeded", {"interfaces": 2}, on_interface()),
]
