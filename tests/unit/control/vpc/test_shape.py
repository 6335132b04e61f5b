"""VPCs, subnets, routes, gateways, ACLs: what comes with what, and what is left when it goes."""

from __future__ import annotations

from ipaddress import IPv6Network

import pytest

from sandbox.control.vpc import Draft, load
from sandbox.control.vpc.acls import (
    create_entry,
    create_network_acl,
    delete_entry,
    delete_network_acl,
    replace_entry,
    replace_network_acl_association,
)
from sandbox.control.vpc.defaults import create_default_vpc, ensure_default_vpc
from sandbox.control.vpc.dhcp import (
    associate_dhcp_options,
    create_dhcp_options,
    delete_dhcp_options,
)
from sandbox.control.vpc.gateways import (
    attach_internet_gateway,
    create_internet_gateway,
    delete_internet_gateway,
    detach_internet_gateway,
)
from sandbox.control.vpc.interfaces import InterfaceRequest, create_network_interface
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
from sandbox.control.vpc.subnets import (
    available_ip_address_count,
    create_subnet,
    delete_subnet,
    modify_subnet_attribute,
)
from sandbox.control.vpc.tagging import create_tags, delete_tags
from sandbox.control.vpc.vpcs import create_vpc, delete_vpc, modify_vpc_attribute
from sandbox.model.vpc import AclEntry, Route, Subnet, Tag, Vpc
from sandbox.store.vpc_rows import VPCS, vpc_ids, vpc_of
from tests.unit.control.vpc.regions import Ec2


@pytest.fixture
def vpc(ec2: Ec2) -> Vpc:
    return ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))


@pytest.fixture
def subnet(ec2: Ec2, vpc: Vpc) -> Subnet:
    return ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.1.0/24"))


def routes(ec2: Ec2, subnet: Subnet) -> list[tuple[str, str]]:
    network = load(ec2.store, subnet.vpc_id)
    table = network.route_table_of(network.subnets[subnet.subnet_id])
    return [(route.destination, route.target) for route in table.routes]


# VPCs --------------------------------------------------------------------------------------


def test_a_vpc_comes_with_its_main_table_default_group_and_default_acl(ec2: Ec2, vpc: Vpc) -> None:
    network = load(ec2.store, vpc.vpc_id)
    (table,) = network.route_tables.values()
    assert table.is_main
    assert table.routes == (Route(destination="10.0.0.0/16", target="local"),)
    (group,) = network.groups.values()
    assert group.group_name == "default"
    assert [(r.is_egress, r.referenced_group_id, r.cidr_ipv4) for r in group.rules] == [
        (False, group.group_id, None),
        (True, None, "0.0.0.0/0"),
    ]
    (acl,) = network.network_acls.values()
    assert acl.is_default
    assert [(e.rule_number, e.is_egress, e.rule_action) for e in acl.entries] == [
        (100, False, "allow"),
        (100, True, "allow"),
    ]


def test_a_block_is_kept_in_its_canonical_form(ec2: Ec2) -> None:
    vpc = ec2.do(lambda draft: create_vpc(draft, "100.68.0.18/18"))
    assert vpc.cidr_block == "100.68.0.0/18"
    subnet = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "100.68.1.2/24"))
    assert subnet.cidr_block == "100.68.1.0/24"


def test_vpcs_may_overlap_and_have_numbers_of_their_own(ec2: Ec2) -> None:
    made = [ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16")) for _ in range(4)]
    assert [vpc.number for vpc in made] == [1, 2, 3, 4]
    ec2.do(lambda draft: delete_vpc(draft, made[1].vpc_id))
    assert ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16")).number == 5


def test_a_vpc_leaves_nothing(ec2: Ec2, vpc: Vpc) -> None:
    ec2.do(lambda draft: delete_vpc(draft, vpc.vpc_id))
    assert ec2.store.keys("vpc/") == []
    assert vpc_ids(ec2.store) == ()


def test_a_dual_stack_vpc_has_a_block_of_its_own_and_rules_for_it(ec2: Ec2) -> None:
    vpc = ec2.do(
        lambda draft: create_vpc(draft, "10.0.0.0/16", amazon_provided_ipv6_cidr_block=True)
    )
    assert vpc.ipv6_cidr_block is not None
    block = IPv6Network(vpc.ipv6_cidr_block)
    assert block.prefixlen == 56
    first = str(next(block.subnets(new_prefix=64)))
    subnet = ec2.do(
        lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.0/24", ipv6_cidr_block=first)
    )
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t", private_ip="10.0.0.9")
    interface = ec2.do(lambda draft: create_network_interface(draft, request))
    assert interface.ipv6_address == str(IPv6Network(first)[9])
    network = load(ec2.store, vpc.vpc_id)
    (table,) = network.route_tables.values()
    assert [route.destination for route in table.routes] == ["10.0.0.0/16", vpc.ipv6_cidr_block]
    (acl,) = network.network_acls.values()
    assert [entry.ipv6_cidr_block for entry in acl.entries] == [None, None, "::/0", "::/0"]
    code, _ = ec2.refused(
        lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.1.0/24", ipv6_cidr_block=first)
    )
    assert code == "InvalidSubnet.Conflict"


def test_attributes_are_changed_one_by_one(ec2: Ec2, vpc: Vpc) -> None:
    ec2.do(lambda d: modify_vpc_attribute(d, vpc.vpc_id, enable_dns_hostnames=True))
    ec2.do(lambda d: modify_vpc_attribute(d, vpc.vpc_id, revocation="immediate"))
    now = ec2.do(lambda d: modify_vpc_attribute(d, vpc.vpc_id, enable_dns_support=False))
    assert (now.enable_dns_hostnames, now.revocation, now.enable_dns_support) == (
        True,
        "immediate",
        False,
    )


def test_a_changed_key_says_which_vpc_it_is_of(ec2: Ec2, vpc: Vpc, subnet: Subnet) -> None:
    draft = Draft(ec2.region)
    create_network_interface(draft, InterfaceRequest(subnet_id=subnet.subnet_id, task="t"))
    assert {vpc_of(key) for key in draft.put if key.startswith(VPCS)} == {vpc.vpc_id}
    assert vpc_of("ec2/link/01234567") is None


# Subnets -----------------------------------------------------------------------------------


def test_a_subnet_has_the_default_acl_the_main_table_and_five_addresses_less(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    network = load(ec2.store, vpc.vpc_id)
    assert network.network_acls[subnet.network_acl_id].is_default
    assert network.route_table_of(subnet).is_main
    assert subnet.availability_zone == "us-east-1a"
    assert available_ip_address_count(ec2.region, subnet) == 251
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t")
    ec2.do(lambda draft: create_network_interface(draft, request))
    assert available_ip_address_count(ec2.region, subnet) == 250


def test_a_deleted_subnet_makes_room_for_another(ec2: Ec2, vpc: Vpc, subnet: Subnet) -> None:
    ec2.do(lambda draft: delete_subnet(draft, subnet.subnet_id))
    again = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.0/22"))
    assert list(load(ec2.store, vpc.vpc_id).subnets) == [again.subnet_id]


def test_what_new_interfaces_get_can_be_changed(ec2: Ec2, subnet: Subnet) -> None:
    assert not subnet.map_public_ip_on_launch
    ec2.do(lambda d: modify_subnet_attribute(d, subnet.subnet_id, map_public_ip_on_launch=True))
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t")
    assert ec2.do(lambda draft: create_network_interface(draft, request)).public_ip is not None


# Routes ------------------------------------------------------------------------------------


def test_a_subnet_takes_another_table_and_comes_back_to_the_main_one(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    table = ec2.do(lambda draft: create_route_table(draft, vpc.vpc_id))
    id = table.route_table_id
    one = ec2.do(lambda draft: associate_route_table(draft, id, subnet.subnet_id))
    assert one.route_table_id == id
    same = ec2.do(lambda draft: associate_route_table(draft, id, subnet.subnet_id))
    assert same == one
    assert ec2.refused(lambda draft: delete_route_table(draft, id))[0] == "DependencyViolation"
    association = one.route_table_association_id
    assert association is not None
    ec2.do(lambda draft: disassociate_route_table(draft, association))
    assert load(ec2.store, vpc.vpc_id).subnets[subnet.subnet_id].route_table_id is None
    ec2.do(lambda draft: delete_route_table(draft, id))


def test_another_table_becomes_the_main_one(ec2: Ec2, vpc: Vpc, subnet: Subnet) -> None:
    (old,) = load(ec2.store, vpc.vpc_id).route_tables.values()
    new = ec2.do(lambda draft: create_route_table(draft, vpc.vpc_id))
    assert old.main_association_id is not None
    ec2.do(
        lambda draft: replace_route_table_association(
            draft, old.main_association_id or "", new.route_table_id
        )
    )
    network = load(ec2.store, vpc.vpc_id)
    assert network.route_table_of(subnet).route_table_id == new.route_table_id
    ec2.do(lambda draft: delete_route_table(draft, old.route_table_id))


def test_a_route_leads_to_the_gateway_of_the_vpc_and_stays_when_that_goes(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    (table,) = load(ec2.store, vpc.vpc_id).route_tables
    gateway = ec2.do(create_internet_gateway).internet_gateway_id
    ec2.do(lambda draft: attach_internet_gateway(draft, gateway, vpc.vpc_id))
    ec2.do(lambda draft: create_route(draft, table, "0.0.0.0/0", gateway))
    ec2.do(lambda draft: create_route(draft, table, "1.2.3.4/8", gateway))
    ec2.do(lambda draft: replace_route(draft, table, "1.0.0.0/8", gateway))
    assert routes(ec2, subnet) == [
        ("10.0.0.0/16", "local"),
        ("0.0.0.0/0", gateway),
        ("1.0.0.0/8", gateway),
    ]
    ec2.do(lambda draft: delete_route(draft, table, "1.0.0.0/8"))
    ec2.do(lambda draft: detach_internet_gateway(draft, gateway, vpc.vpc_id))
    ec2.do(lambda draft: delete_internet_gateway(draft, gateway))
    assert routes(ec2, subnet) == [("10.0.0.0/16", "local"), ("0.0.0.0/0", gateway)]
    assert load(ec2.store, vpc.vpc_id).internet_gateway is None


# ACLs --------------------------------------------------------------------------------------


def entry(number: int = 90, **members: object) -> AclEntry:
    given: dict[str, object] = {"cidr_block": "0.0.0.0/0", "protocol": "-1", **members}
    return AclEntry(
        rule_number=number,
        is_egress=bool(given.pop("is_egress", False)),
        rule_action="deny",
        **given,  # type: ignore[arg-type]
    )


def test_a_new_acl_denies_all_and_takes_the_place_of_the_default_one(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    acl = ec2.do(lambda draft: create_network_acl(draft, vpc.vpc_id))
    assert acl.entries == ()
    old = subnet.network_acl_association_id
    now = ec2.do(lambda draft: replace_network_acl_association(draft, old, acl.network_acl_id))
    assert now.network_acl_id == acl.network_acl_id
    assert now.network_acl_association_id != old
    assert load(ec2.store, vpc.vpc_id).subnets[subnet.subnet_id] == now
    gone = lambda draft: delete_network_acl(draft, acl.network_acl_id)  # noqa: E731
    assert ec2.refused(gone)[0] == "DependencyViolation"
    ec2.do(
        lambda draft: replace_network_acl_association(
            draft, now.network_acl_association_id, subnet.network_acl_id
        )
    )
    ec2.do(gone)


def test_entries_are_kept_by_number_and_as_ec2_shows_them(ec2: Ec2, vpc: Vpc) -> None:
    id = ec2.do(lambda draft: create_network_acl(draft, vpc.vpc_id)).network_acl_id
    web = entry(200, protocol="tcp", from_port=80, to_port=443, cidr_block="10.1.2.3/8")
    ec2.do(lambda draft: create_entry(draft, id, web))
    ping = entry(1, protocol="1", icmp_type=8, icmp_code=-1, from_port=5)
    ec2.do(lambda draft: create_entry(draft, id, ping))
    ec2.do(lambda draft: create_entry(draft, id, entry(200, is_egress=True, from_port=1)))
    acl = load(ec2.store, vpc.vpc_id).network_acls[id]
    assert [
        (e.rule_number, e.is_egress, e.protocol, e.cidr_block, e.from_port, e.icmp_type)
        for e in acl.entries
    ] == [
        (1, False, "1", "0.0.0.0/0", None, 8),
        (200, False, "6", "10.0.0.0/8", 80, None),
        (200, True, "-1", "0.0.0.0/0", None, None),
    ]
    ec2.do(lambda draft: replace_entry(draft, id, entry(200, protocol="47")))
    ec2.do(lambda draft: delete_entry(draft, id, 1, is_egress=False))
    acl = load(ec2.store, vpc.vpc_id).network_acls[id]
    assert [(e.rule_number, e.is_egress, e.protocol) for e in acl.entries] == [
        (200, False, "47"),
        (200, True, "-1"),
    ]


# DHCP options, tags, the default VPC -------------------------------------------------------


def test_a_vpc_takes_a_set_of_dhcp_options_and_gives_it_up(ec2: Ec2, vpc: Vpc) -> None:
    options = ec2.do(
        lambda draft: create_dhcp_options(
            draft, domain_name="corp.example", domain_name_servers=("10.0.0.5",)
        )
    )
    id = options.dhcp_options_id
    ec2.do(lambda draft: associate_dhcp_options(draft, id, vpc.vpc_id))
    assert load(ec2.store, vpc.vpc_id).dhcp_options == options
    assert ec2.refused(lambda draft: delete_dhcp_options(draft, id))[0] == "DependencyViolation"
    ec2.do(lambda draft: associate_dhcp_options(draft, "default", vpc.vpc_id))
    assert load(ec2.store, vpc.vpc_id).dhcp_options is None
    ec2.do(lambda draft: delete_dhcp_options(draft, id))


def test_tags_come_and_go(ec2: Ec2, vpc: Vpc, subnet: Subnet) -> None:
    both = [vpc.vpc_id, subnet.subnet_id]
    new = [Tag(key="b", value="1"), Tag(key="a")]
    ec2.do(lambda draft: create_tags(draft, both, new))
    ec2.do(lambda draft: create_tags(draft, both, [Tag(key="b", value="2")]))
    ec2.do(lambda draft: delete_tags(draft, [vpc.vpc_id], ["a", "z"]))
    network = load(ec2.store, vpc.vpc_id)
    assert network.vpc.tags == (Tag(key="b", value="2"),)
    assert network.subnets[subnet.subnet_id].tags == (Tag(key="a"), Tag(key="b", value="2"))


def test_the_default_vpc_is_made_once_and_lets_tasks_out(ec2: Ec2) -> None:
    vpc = ec2.do(ensure_default_vpc)
    assert vpc is not None
    network = load(ec2.store, vpc.vpc_id)
    assert vpc.is_default
    assert sorted((s.cidr_block, s.availability_zone) for s in network.subnets.values()) == [
        ("172.31.0.0/20", "us-east-1a"),
        ("172.31.16.0/20", "us-east-1b"),
        ("172.31.32.0/20", "us-east-1c"),
    ]
    assert all(s.map_public_ip_on_launch and s.is_default for s in network.subnets.values())
    assert network.internet_gateway is not None
    (table,) = network.route_tables.values()
    assert table.routes[1] == Route(
        destination="0.0.0.0/0", target=network.internet_gateway.internet_gateway_id
    )
    before = ec2.store.revision
    assert ec2.do(ensure_default_vpc) == vpc
    assert ec2.store.revision == before


def test_a_default_vpc_that_was_deleted_is_made_again_only_when_asked_for(ec2: Ec2) -> None:
    vpc = ec2.do(ensure_default_vpc)
    assert vpc is not None
    network = load(ec2.store, vpc.vpc_id)
    assert network.internet_gateway is not None
    gateway = network.internet_gateway.internet_gateway_id
    ec2.do(lambda draft: detach_internet_gateway(draft, gateway, vpc.vpc_id))
    for subnet_id in network.subnets:
        ec2.do(lambda draft, id=subnet_id: delete_subnet(draft, id))  # type: ignore[misc]
    ec2.do(lambda draft: delete_vpc(draft, vpc.vpc_id))
    assert ec2.do(ensure_default_vpc) is None
    again = ec2.do(create_default_vpc)
    assert ec2.do(ensure_default_vpc) == again
