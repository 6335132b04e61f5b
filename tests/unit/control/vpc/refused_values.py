"""Requests that are refused for what they say."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.control.vpc import Draft
from sandbox.control.vpc.acls import (
    create_entry,
    delete_entry,
)
from sandbox.control.vpc.addresses import (
    associate_address,
)
from sandbox.control.vpc.dhcp import (
    create_dhcp_options,
)
from sandbox.control.vpc.gateways import (
    create_nat_gateway,
    detach_internet_gateway,
)
from sandbox.control.vpc.groups import (
    authorize,
    create_security_group,
    revoke,
    revoke_ids,
)
from sandbox.control.vpc.interfaces import (
    InterfaceRequest,
    create_network_interface,
    modify_groups,
)
from sandbox.control.vpc.permissions import RuleRequest
from sandbox.control.vpc.prefix_lists import (
    create_prefix_list,
    modify_prefix_list,
)
from sandbox.control.vpc.routes import (
    associate_route_table,
    create_route,
    replace_route,
    replace_route_table_association,
)
from sandbox.control.vpc.subnets import create_subnet, modify_subnet_attribute
from sandbox.control.vpc.tagging import create_tags
from sandbox.control.vpc.vpcs import create_vpc
from sandbox.model.vpc import Tag
from tests.unit.control.vpc.world import World, entry, on_interface

VALUES: list[tuple[str, str, Callable[[Draft, World], object]]] = [
    (
        "InvalidVpc.Range",
        "The CIDR '10.0.0.0/15' is invalid.",
        lambda d, w: create_vpc(d, "10.0.0.0/15"),
    ),
    ("InvalidVpc.Range", "10.0.0.0/29", lambda d, w: create_vpc(d, "10.0.0.0/29")),
    ("InvalidVpc.Range", "169.254.0.0/16", lambda d, w: create_vpc(d, "169.254.0.0/16")),
    ("InvalidVpc.Range", "127.0.0.0/16", lambda d, w: create_vpc(d, "127.0.0.0/16")),
    ("InvalidVpc.Range", "230.0.0.0/16", lambda d, w: create_vpc(d, "230.0.0.0/16")),
    ("InvalidVpc.Range", "public_pool 198.18.0.0/15", lambda d, w: create_vpc(d, "198.19.0.0/16")),
    (
        "InvalidParameterValue",
        "Value (10.0.0.0) for parameter cidrBlock",
        lambda d, w: create_vpc(d, "10.0.0.0"),
    ),
    ("InvalidParameterValue", "not a valid CIDR block", lambda d, w: create_vpc(d, "10.0.0/16\n")),
    (
        "InvalidSubnet.Range",
        "The CIDR '10.1.0.0/24' is invalid.",
        lambda d, w: create_subnet(d, w.vpc, "10.1.0.0/24"),
    ),
    ("InvalidSubnet.Range", "10.0.1.0/29", lambda d, w: create_subnet(d, w.vpc, "10.0.1.0/29")),
    ("InvalidSubnet.Range", "10.0.0.0/8", lambda d, w: create_subnet(d, w.vpc, "10.0.0.0/8")),
    (
        "InvalidSubnet.Range",
        "fd00::/64",
        lambda d, w: create_subnet(d, w.vpc, "10.0.9.0/24", ipv6_cidr_block="fd00::/64"),
    ),
    (
        "InvalidParameterValue",
        "us-east-1a, us-east-1b, us-east-1c",
        lambda d, w: create_subnet(d, w.vpc, "10.0.9.0/24", availability_zone="eu-west-1a"),
    ),
    (
        "InvalidParameterValue",
        "no IPv6 CIDR block",
        lambda d, w: modify_subnet_attribute(d, w.subnet, assign_ipv6_address_on_creation=True),
    ),
    ("InvalidParameterValue", "not fall within", on_interface(private_ip="10.0.1.4")),
    *[
        ("InvalidParameterValue", "reserved", on_interface(private_ip=f"10.0.0.{n}"))
        for n in (0, 1, 2, 3, 255)
    ],
    ("InvalidParameterValue", "address: 10.0.0", on_interface(private_ip="10.0.0")),
    ("InvalidParameterValue", "parameter description", on_interface(description="\0")),
    (
        "InvalidParameter",
        "belong to different networks",
        on_interface(group_ids=lambda w: (w.other_group,)),
    ),
    (
        "InvalidParameter",
        "different networks",
        lambda d, w: modify_groups(d, w.interface, (w.other_group,)),
    ),
    ("MissingParameter", "SecurityGroupId", lambda d, w: modify_groups(d, w.interface, ())),
    (
        "SecurityGroupsPerInterfaceLimitExceeded",
        "security groups per interface",
        on_interface(group_ids=tuple(f"sg-{n}" for n in range(6))),
    ),
    ("InvalidParameterValue", "sg-*", lambda d, w: create_security_group(d, "SG-a", "d", w.vpc)),
    (
        "InvalidParameterValue",
        "reserved security group name",
        lambda d, w: create_security_group(d, "Default", "d", w.vpc),
    ),
    *[
        (
            "InvalidParameterValue",
            "parameter GroupName",
            lambda d, w, n=name: create_security_group(d, n, "d", w.vpc),
        )
        for name in ("", "   ", "a" * 256, "é", "a\n", "a'b", "a\0")
    ],
    (
        "InvalidParameterValue",
        "parameter GroupDescription",
        lambda d, w: create_security_group(d, "a", "", w.vpc),
    ),
    (
        "InvalidParameterValue",
        "parameter GroupDescription",
        lambda d, w: create_security_group(d, "a", "é", w.vpc),
    ),
    ("MissingParameter", "vpcId", lambda d, w: create_security_group(d, "a", "d")),
    ("MissingParameter", "ipPermissions", lambda d, w: authorize(d, w.group, [], is_egress=False)),
    ("MissingParameter", "ipPermissions", lambda d, w: revoke(d, w.group, [], is_egress=False)),
    ("MissingParameter", "ipPermissions", lambda d, w: revoke_ids(d, w.group, [], is_egress=False)),
    (
        "InvalidPermission.Malformed",
        "exactly one",
        lambda d, w: authorize(d, w.group, [RuleRequest(ip_protocol="-1")], is_egress=False),
    ),
    (
        "InvalidParameterValue",
        "Route target is not supported",
        lambda d, w: create_route(d, w.table, "10.0.0.0/16", w.igw),
    ),
    (
        "InvalidParameterValue",
        "Route target is not supported",
        lambda d, w: create_route(d, w.table, "10.0.3.0/24", w.igw),
    ),
    (
        "InvalidParameterValue",
        "Route target is not supported",
        lambda d, w: replace_route(d, w.table, "10.0.0.0/16", w.igw),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: create_route(d, w.table, "1.0.0.0/8", w.other_igw),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: create_route(d, w.table, "1.0.0.0/8", w.spare),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: create_route(d, w.other_table, "1.0.0.0/8", w.nat),
    ),
    (
        "InvalidParameterValue",
        "NAT gateway carries IPv4",
        lambda d, w: create_route(d, w.table, "::/0", w.nat),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: associate_route_table(d, w.other_table, w.subnet),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: replace_route_table_association(d, w.custom_association, w.other_table),
    ),
    (
        "InvalidParameterValue",
        "belong to different networks",
        lambda d, w: replace_route_table_association(d, w.table_association, w.other_table),
    ),
    *[
        (
            "InvalidParameterValue",
            "not 1 to 32766",
            lambda d, w, n=number: create_entry(d, w.custom_acl, entry(n)),
        )
        for number in (0, -1, 32767, 2**70)
    ],
    (
        "InvalidParameterValue",
        "32767",
        lambda d, w: delete_entry(d, w.custom_acl, 32767, is_egress=False),
    ),
    (
        "MissingParameter",
        "cidrBlock",
        lambda d, w: create_entry(d, w.custom_acl, entry(block=None)),
    ),
    (
        "MissingParameter",
        "portRange",
        lambda d, w: create_entry(d, w.custom_acl, entry(protocol="6")),
    ),
    (
        "MissingParameter",
        "icmpTypeCode",
        lambda d, w: create_entry(d, w.custom_acl, entry(protocol="icmp")),
    ),
    (
        "InvalidParameterValue",
        "Unknown protocol",
        lambda d, w: create_entry(d, w.custom_acl, entry(protocol="x")),
    ),
    (
        "InvalidParameterValue",
        "cidrBlock",
        lambda d, w: create_entry(d, w.custom_acl, entry(block="::/0")),
    ),
    (
        "Gateway.NotAttached",
        "not attached to network",
        lambda d, w: detach_internet_gateway(d, w.spare, w.vpc),
    ),
    (
        "Gateway.NotAttached",
        "has no Internet gateway attached",
        lambda d, w: (
            detach_internet_gateway(d, w.other_igw, w.other_vpc),
            create_nat_gateway(d, w.other_subnet, w.address),
        ),
    ),
    (
        "Gateway.NotAttached",
        "is not attached to any internet gateway",
        lambda d, w: (
            detach_internet_gateway(d, w.other_igw, w.other_vpc),
            associate_address(
                d,
                w.address,
                create_network_interface(
                    d, InterfaceRequest(subnet_id=w.other_subnet, task="t")
                ).network_interface_id,
            ),
        ),
    ),
    (
        "InvalidParameterValue",
        "PrefixListName",
        lambda d, w: create_prefix_list(d, "com.amazonaws.a", 1),
    ),
    ("InvalidParameterValue", "PrefixListName", lambda d, w: create_prefix_list(d, "", 1)),
    ("InvalidParameterValue", "MaxEntries", lambda d, w: create_prefix_list(d, "a", 0)),
    ("InvalidParameterValue", "MaxEntries", lambda d, w: create_prefix_list(d, "a", 1001)),
    (
        "InvalidParameterValue",
        "parameter Cidr",
        lambda d, w: create_prefix_list(d, "a", 1, ["::/0"]),
    ),
    (
        "PrefixListMaxEntriesExceeded",
        "1 entries, not 2",
        lambda d, w: create_prefix_list(d, "a", 1, ["1.0.0.0/8", "2.0.0.0/8"]),
    ),
    (
        "PrefixListMaxEntriesExceeded",
        "1 entries",
        lambda d, w: modify_prefix_list(d, w.prefix_list, add=["1.0.0.0/8"], max_entries=1),
    ),
    (
        "InvalidParameterValue",
        "no such entry",
        lambda d, w: modify_prefix_list(d, w.prefix_list, remove=["1.0.0.0/8"]),
    ),
    (
        "IncorrectState",
        "version 1, not 7",
        lambda d, w: modify_prefix_list(d, w.prefix_list, current_version=7),
    ),
    (
        "RulesPerSecurityGroupLimitExceeded",
        "rules per",
        lambda d, w: modify_prefix_list(d, w.prefix_list, max_entries=60),
    ),
    (
        "InvalidParameterValue",
        "domain-name",
        lambda d, w: create_dhcp_options(d, domain_name="a..b"),
    ),
    (
        "InvalidParameterValue",
        "domain-name",
        lambda d, w: create_dhcp_options(d, domain_name="a b\n"),
    ),
    (
        "InvalidParameterValue",
        "1 to 4 servers",
        lambda d, w: create_dhcp_options(d, domain_name_servers=("1.1.1.1",) * 5),
    ),
    (
        "InvalidParameterValue",
        "address: x",
        lambda d, w: create_dhcp_options(d, domain_name_servers=("x",)),
    ),
    ("InvalidParameterValue", "aws:", lambda d, w: create_tags(d, [w.vpc], [Tag(key="AWS:a")])),
    ("InvalidParameterValue", "Tag.Key", lambda d, w: create_tags(d, [w.vpc], [Tag(key="")])),
    (
        "InvalidParameterValue",
        "Tag.Value",
        lambda d, w: create_tags(d, [w.vpc], [Tag(key="\ud800")]),
    ),
    (
        "InvalidParameterValue",
        "Tag.Value",
        lambda d, w: create_tags(d, [w.vpc], [Tag(key="a", value="v" * 257)]),
    ),
    (
        "InvalidParameterValue",
        "Duplicate",
        lambda d, w: create_tags(d, [w.vpc], [Tag(key="a")] * 2),
    ),
    (
        "TagLimitExceeded",
        "50",
        lambda d, w: create_tags(d, [w.vpc], [Tag(key=f"{n}") for n in range(51)]),
    ),
    ("InvalidParameterValue", "cannot be tagged", lambda d, w: create_tags(d, ["x-1"], [])),
]
