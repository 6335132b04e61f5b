"""What is true of a region at any time, whatever was asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations

from sandbox.control.vpc import Draft, Region, load, permissions
from sandbox.model.vpc import (
    ElasticAddress,
    Network,
    NetworkInterface,
    PrefixList,
    contains,
    is_assignable,
)
from sandbox.store.vpc_rows import (
    Addresses,
    Link,
    VpcLedger,
    addresses_key,
    ledger_key,
    link_key,
    vpc_ids,
    vpc_of,
)


def check(region: Region) -> None:
    store = region.store
    networks = [load(store, vpc_id) for vpc_id in vpc_ids(store)]
    known = {network.vpc.vpc_id for network in networks}
    assert {vpc_of(key) for key in store.keys("vpc/")} <= known
    for network in networks:
        _check_subnets(region, network)
        _check_interfaces(region, network)
        _check_groups(region, network)
        _check_acls(region, network)
        _check_tables(region, network)
    interfaces = [each for network in networks for each in network.interfaces.values()]
    assert _are_unique([network.vpc.number for network in networks])
    assert len(networks) <= region.limits.vpcs
    _check_public(region, networks, interfaces)
    _check_links(region, interfaces)
    _check_elastic(region, networks, interfaces)


def _check_subnets(region: Region, network: Network) -> None:
    subnets = network.subnets.values()
    blocks = [IPv4Network(subnet.cidr_block) for subnet in subnets]
    assert not any(one.overlaps(other) for one, other in combinations(blocks, 2))
    for subnet in subnets:
        assert contains(network.vpc.cidr_block, subnet.cidr_block)
        assert subnet.network_acl_id in network.network_acls
        assert network.route_table_of(subnet) is not None
        row = region.store.get(addresses_key(subnet.vpc_id, subnet.subnet_id), Addresses)
        assert row is not None
        here = [e for e in network.interfaces.values() if e.subnet_id == subnet.subnet_id]
        assert row.value.in_use == len(here)
        base = int(IPv4Network(subnet.cidr_block)[0])
        held = {int(IPv4Address(interface.private_ip)) - base for interface in here}
        assert not held & set(row.value.turn.resting)
    ledger = region.store.get(ledger_key(network.vpc.vpc_id), VpcLedger)
    assert ledger is not None
    assert set(ledger.value.subnets) == set(network.subnets)
    assert ledger.value.default_group_id in network.groups
    assert len(blocks) <= region.limits.subnets_per_vpc


def _check_interfaces(region: Region, network: Network) -> None:
    interfaces = network.interfaces.values()
    assert _are_unique([interface.private_ip for interface in interfaces])
    for interface in interfaces:
        subnet = network.subnets[interface.subnet_id]
        assert is_assignable(subnet, IPv4Address(interface.private_ip))
        assert set(interface.group_ids) <= set(network.groups)
        assert list(interface.group_ids) == sorted(set(interface.group_ids))
        least = 0 if interface.task is None else 1
        assert least <= len(interface.group_ids) <= region.limits.groups_per_interface


def _check_groups(region: Region, network: Network) -> None:
    groups = network.groups.values()
    assert _are_unique([group.group_name.lower() for group in groups])
    assert sum(group.group_name == "default" for group in groups) == 1
    ledger = region.store.get(ledger_key(network.vpc.vpc_id), VpcLedger)
    assert ledger is not None
    assert _are_unique([*(group.index for group in groups), *ledger.value.retired_groups])
    named = set()
    for group in groups:
        for is_egress in (False, True):
            one_way = [rule for rule in group.rules if rule.is_egress is is_egress]
            assert _are_unique([permissions.meaning(rule) for rule in one_way])
            for family in permissions.FAMILIES:
                weight = permissions.weight(
                    one_way, family, is_egress=is_egress, lists=network.prefix_lists
                )
                assert weight <= region.limits.rules_per_group
        for rule in group.rules:
            assert rule.referenced_group_id is None or rule.referenced_group_id in network.groups
            named |= {rule.prefix_list_id} - {None}
    assert named == set(network.prefix_lists)
    lists = Draft(region).all_of_region(PrefixList)
    assert all(lists[id] == copy for id, copy in network.prefix_lists.items())
    assert _are_unique([each.index for each in lists.values()])


def _check_acls(region: Region, network: Network) -> None:
    acls = network.network_acls.values()
    assert sum(acl.is_default for acl in acls) == 1
    for acl in acls:
        numbers = [(entry.is_egress, entry.rule_number) for entry in acl.entries]
        assert numbers == sorted(set(numbers))
        counts = Counter(is_egress for is_egress, _ in numbers)
        assert max(counts.values(), default=0) <= region.limits.entries_per_acl
    assert _are_unique([acl.index for acl in acls])


def _check_tables(region: Region, network: Network) -> None:
    tables = network.route_tables.values()
    assert sum(table.is_main for table in tables) == 1
    for table in tables:
        assert table.is_main is (table.main_association_id is not None)
        assert table.routes[0].target == "local"
        assert table.routes[0].destination == network.vpc.cidr_block
        assert _are_unique([route.destination for route in table.routes])
        assert len(table.routes) - 1 <= region.limits.routes_per_table


def _check_public(
    region: Region, networks: Iterable[Network], interfaces: Iterable[NetworkInterface]
) -> None:
    assert _are_unique([e.public_ip for e in interfaces if e.public_ip is not None])
    subnets = [subnet for network in networks for subnet in network.subnets.values()]
    blocks = [IPv4Network(s.public_block) for s in subnets if s.public_block is not None]
    for one, other in combinations([*blocks, region.elastic_pool], 2):
        assert not one.overlaps(other)
    assert all(block.subnet_of(region.pool) for block in blocks)
    by_id = {subnet.subnet_id: subnet for subnet in subnets}
    for interface in interfaces:
        if interface.public_ip is not None and interface.allocation_id is None:
            subnet = by_id[interface.subnet_id]
            assert subnet.public_block is not None
            private, public = IPv4Network(subnet.cidr_block), IPv4Network(subnet.public_block)
            offset = int(IPv4Address(interface.private_ip)) - int(private[0])
            assert public[offset] == IPv4Address(interface.public_ip)


def _check_links(region: Region, interfaces: Iterable[NetworkInterface]) -> None:
    expected = {link_key(each.network_interface_id): each for each in interfaces}
    assert set(region.store.keys("ec2/link/")) == set(expected)
    for key, interface in expected.items():
        row = region.store.get(key, Link)
        assert row is not None
        assert row.value.network_interface_id == interface.network_interface_id
        assert (row.value.vpc_id, row.value.private_ip) == (
            interface.vpc_id,
            interface.private_ip,
        )


def _check_elastic(
    region: Region, networks: Iterable[Network], interfaces: Iterable[NetworkInterface]
) -> None:
    addresses = Draft(region).all_of_region(ElasticAddress)
    assert len(addresses) <= region.limits.elastic_addresses
    assert _are_unique([address.public_ip for address in addresses.values()])
    associated = {
        (e.allocation_id, e.association_id, e.network_interface_id, e.public_ip)
        for e in interfaces
        if e.allocation_id is not None
    }
    assert associated == {
        (a.allocation_id, a.association_id, a.network_interface_id, a.public_ip)
        for a in addresses.values()
        if a.association_id is not None
    }
    for network in networks:
        for gateway in network.nat_gateways.values():
            interface = network.interfaces[gateway.network_interface_id]
            assert interface.private_ip == gateway.private_ip
            assert interface.public_ip == gateway.public_ip
            assert addresses[gateway.allocation_id].nat_gateway_id == gateway.nat_gateway_id


def _are_unique(values: Sequence[object]) -> bool:
    return len(set(values)) == len(values)
