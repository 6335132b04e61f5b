"""Subnets: blocks of a VPC, each in a zone (a label) and each with exactly one ACL."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

import msgspec

from sandbox.control.vpc import acls, cidr
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.region import Region
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import RESERVED_FIRST, Subnet, Tag, Vpc, contains
from sandbox.store.vpc_rows import Addresses, addresses_key

RESERVED = RESERVED_FIRST + 1


def create_subnet(
    draft: Draft,
    vpc_id: str,
    cidr_block: str,
    *,
    availability_zone: str | None = None,
    ipv6_cidr_block: str | None = None,
    map_public_ip_on_launch: bool = False,
    is_default: bool = False,
    tags: Iterable[Tag] = (),
) -> Subnet:
    """Without a zone it is in the first one."""
    vpc = draft.vpc(vpc_id)
    zone = availability_zone or draft.region.zones[0]
    if zone not in draft.region.zones:
        raise Refusal.ZONE.error(zone=zone, zones=", ".join(draft.region.zones))
    others = draft.all(Subnet, vpc_id)
    block = _ipv4(vpc, cidr_block, others.values())
    ipv6 = _ipv6(vpc, ipv6_cidr_block, others.values()) if ipv6_cidr_block is not None else None
    if len(others) >= draft.region.limits.subnets_per_vpc:
        raise Refusal.SUBNET_LIMIT.error()
    subnet = Subnet(
        subnet_id=draft.mint("subnet"),
        vpc_id=vpc_id,
        cidr_block=block,
        ipv6_cidr_block=ipv6,
        availability_zone=zone,
        map_public_ip_on_launch=map_public_ip_on_launch,
        network_acl_id=acls.default_of(draft, vpc_id).network_acl_id,
        network_acl_association_id=draft.mint("aclassoc"),
        is_default=is_default,
        created_at=draft.now,
        tags=checked_tags(tags),
    )
    draft.save(addresses_key(vpc_id, subnet.subnet_id), Addresses())
    draft.touch(vpc_id, subnets=(*draft.ledger(vpc_id).subnets, subnet.subnet_id))
    return draft.add(subnet)


def delete_subnet(draft: Draft, subnet_id: str) -> None:
    """Refused while it has an interface, that of a NAT gateway too."""
    subnet = draft.find(Subnet, subnet_id)
    key = addresses_key(subnet.vpc_id, subnet_id)
    addresses = draft.get(key, Addresses)
    if addresses is None or addresses.in_use:
        raise Refusal.SUBNET_IN_USE.error(id=subnet_id)
    left = tuple(other for other in draft.ledger(subnet.vpc_id).subnets if other != subnet_id)
    draft.touch(subnet.vpc_id, subnets=left)
    if subnet.public_block is not None:
        draft.touch_region()  # the block is free again
    draft.erase(key)
    draft.remove(subnet)


def modify_subnet_attribute(
    draft: Draft,
    subnet_id: str,
    *,
    map_public_ip_on_launch: bool | None = None,
    assign_ipv6_address_on_creation: bool | None = None,
) -> Subnet:
    """Of interfaces that come later; None leaves it as it is."""
    subnet = draft.find(Subnet, subnet_id)
    if assign_ipv6_address_on_creation and subnet.ipv6_cidr_block is None:
        why = "The subnet has no IPv6 CIDR block."
        raise Refusal.VALUE.error(value=subnet_id, parameter="assignIpv6AddressOnCreation", why=why)
    wanted = {
        "map_public_ip_on_launch": map_public_ip_on_launch,
        "assign_ipv6_address_on_creation": assign_ipv6_address_on_creation,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    return draft.change(msgspec.structs.replace(subnet, **given))


def available_ip_address_count(region: Region, subnet: Subnet) -> int:
    """AvailableIpAddressCount in DescribeSubnets."""
    row = region.store.get(addresses_key(subnet.vpc_id, subnet.subnet_id), Addresses)
    in_use = row.value.in_use if row is not None else 0
    return IPv4Network(subnet.cidr_block).num_addresses - RESERVED - in_use


def _ipv4(vpc: Vpc, cidr_block: str, others: Iterable[Subnet]) -> str:
    network = cidr.ipv4_block(cidr_block)
    if not cidr.is_vpc_size(network) or not contains(vpc.cidr_block, str(network)):
        raise Refusal.SUBNET_RANGE.error(cidr=cidr_block)
    if cidr.overlap(network, (other.cidr_block for other in others)):
        raise Refusal.SUBNET_CONFLICT.error(cidr=cidr_block)
    return str(network)


def _ipv6(vpc: Vpc, ipv6_cidr_block: str, others: Iterable[Subnet]) -> str:
    """A subnet's is always a /64 (VPC User Guide, "Subnet sizing for IPv6")."""
    network = cidr.ipv6_block(ipv6_cidr_block)
    block = vpc.ipv6_cidr_block
    if network.prefixlen != 64 or block is None or not contains(block, str(network)):
        raise Refusal.SUBNET_RANGE.error(cidr=ipv6_cidr_block)
    taken = (other.ipv6_cidr_block for other in others if other.ipv6_cidr_block is not None)
    if any(network.overlaps(IPv6Network(other)) for other in taken):
        raise Refusal.SUBNET_CONFLICT.error(cidr=ipv6_cidr_block)
    return str(network)
