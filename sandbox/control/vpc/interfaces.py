"""Network interfaces: one for a task, from its acceptance to its end.

Taking one is a decision over a draft like all others, so the caller puts the task's row into the
same draft and both are written or neither is. It conflicts only with another in the same subnet and
with changes of what it was given (the subnet, its groups); the first public address of a subnet
also with that of another subnet, since it takes a block of the pool.

An address that is given back goes behind all others of its subnet. Give it back (delete the
interface) after its connections were flushed in the kernel, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import msgspec

from sandbox.control.vpc import addresses, cidr, turns
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.permissions import TEXT
from sandbox.control.vpc.refusals import Refusal
from sandbox.errors import NetworkError
from sandbox.model import names
from sandbox.model.vpc import (
    RESERVED_FIRST,
    ElasticAddress,
    NetworkInterface,
    SecurityGroup,
    Subnet,
    is_assignable,
)
from sandbox.store.vpc_rows import Addresses, Link, addresses_key, link_key, vpc_prefix

_MINTED = 8
"""Ids that are tried: a link's name has 32 bits of them, so two in a row are hardly ever taken."""


@dataclass(frozen=True, kw_only=True)
class InterfaceRequest:
    subnet_id: str
    task: str
    group_ids: tuple[str, ...] = ()
    """Empty: the default group of the VPC."""
    private_ip: str | None = None
    """None: the next one in turn."""
    assign_public_ip: bool | None = None
    """None: as the subnet has it (map_public_ip_on_launch)."""
    network_interface_id: str | None = None
    """Of an interface that was made ahead; None mints one."""
    attachment_id: str | None = None
    description: str = ""
    bandwidth_mbit: int | None = None


def create_network_interface(draft: Draft, request: InterfaceRequest) -> NetworkInterface:
    """Raises the refusals of EC2's, and NetworkError for an id whose link's name is taken."""
    subnet = draft.find(Subnet, request.subnet_id)
    group_ids = request.group_ids or (draft.ledger(subnet.vpc_id).default_group_id,)
    chosen = checked_groups(draft, subnet.vpc_id, group_ids, subnet.subnet_id)
    if not TEXT.fullmatch(request.description):
        why = "It is over 255 characters or has characters that descriptions have not."
        raise Refusal.VALUE.error(value=request.description, parameter="description", why=why)
    _check_count(draft)
    private, offset = _take_address(draft, subnet, request.private_ip)
    wants_public = request.assign_public_ip
    if wants_public is None:
        wants_public = subnet.map_public_ip_on_launch
    interface_id = _claimed_id(draft, request.network_interface_id)
    interface = NetworkInterface(
        network_interface_id=interface_id,
        vpc_id=subnet.vpc_id,
        subnet_id=subnet.subnet_id,
        availability_zone=subnet.availability_zone,
        private_ip=str(private),
        ipv6_address=_ipv6_address(subnet, offset),
        mac_address=names.mac_address(interface_id),
        public_ip=addresses.public_address(draft, subnet, private) if wants_public else None,
        group_ids=chosen,
        attachment_id=request.attachment_id or draft.mint("eni-attach"),
        task=request.task,
        description=request.description,
        bandwidth_mbit=request.bandwidth_mbit,
        created_at=draft.now,
    )
    return _add(draft, interface)


def delete_network_interface(draft: Draft, network_interface_id: str) -> None:
    """Its address goes behind all others, an Elastic one is free again. Idempotent.

    Refused for one that the agent answers itself.
    """
    link = draft.peek(link_key(network_interface_id), Link)
    if link is None or link.network_interface_id != network_interface_id:
        return
    interface = draft.interface(network_interface_id)
    if interface.task is None:
        raise Refusal.NOT_YOURS.error(id=network_interface_id)
    remove(draft, interface)


def remove(draft: Draft, interface: NetworkInterface) -> None:
    """As `delete_network_interface`, whoever answers it."""
    if interface.allocation_id is not None:
        addresses.forget_association(draft, interface.allocation_id)
    draft.remove(interface)
    draft.erase(link_key(interface.network_interface_id))
    subnet = draft.find(Subnet, interface.subnet_id)
    key = addresses_key(subnet.vpc_id, subnet.subnet_id)
    row = draft.get(key, Addresses) or Addresses()
    offset = int(IPv4Address(interface.private_ip)) - int(IPv4Network(subnet.cidr_block)[0])
    turn = turns.give_back(row.turn, offset)
    draft.save(key, Addresses(turn=turn, in_use=row.in_use - 1))


def modify_groups(
    draft: Draft, network_interface_id: str, group_ids: tuple[str, ...]
) -> NetworkInterface:
    """ModifyNetworkInterfaceAttribute: these groups in place of those that it has."""
    interface = draft.interface(network_interface_id)
    if interface.task is None:
        raise Refusal.NOT_YOURS.error(id=network_interface_id)
    draft.touch(interface.vpc_id)
    chosen = checked_groups(draft, interface.vpc_id, group_ids, interface.subnet_id)
    return draft.change(msgspec.structs.replace(interface, group_ids=chosen))


def checked_groups(
    draft: Draft, vpc_id: str, group_ids: tuple[str, ...], subnet_id: str
) -> tuple[str, ...]:
    """Sorted, each once. Refused for none, too many, unknown ones, and those of another VPC."""
    chosen = tuple(sorted(set(group_ids)))
    if not chosen:
        raise Refusal.MISSING.error(parameter="SecurityGroupId")
    if len(chosen) > draft.region.limits.groups_per_interface:
        raise Refusal.GROUPS_ON_INTERFACE.error()
    for id in chosen:
        group = draft.find(SecurityGroup, id)
        if group.vpc_id != vpc_id:
            raise Refusal.GROUP_ON_OTHER_SUBNET.error(group=id, subnet=subnet_id)
    return chosen


def add_for_agent(
    draft: Draft, subnet: Subnet, description: str, address: ElasticAddress
) -> NetworkInterface:
    """One that the agent itself answers, for a gateway: it has no groups and no task."""
    _check_count(draft)
    private, offset = _take_address(draft, subnet, None)
    interface_id = _claimed_id(draft, None)
    interface = NetworkInterface(
        network_interface_id=interface_id,
        vpc_id=subnet.vpc_id,
        subnet_id=subnet.subnet_id,
        availability_zone=subnet.availability_zone,
        private_ip=str(private),
        ipv6_address=_ipv6_address(subnet, offset),
        mac_address=names.mac_address(interface_id),
        public_ip=address.public_ip,
        group_ids=(),
        attachment_id=draft.mint("eni-attach"),
        task=None,
        description=description,
        created_at=draft.now,
    )
    return _add(draft, interface)


def _add(draft: Draft, interface: NetworkInterface) -> NetworkInterface:
    link = Link(
        network_interface_id=interface.network_interface_id,
        vpc_id=interface.vpc_id,
        private_ip=interface.private_ip,
    )
    draft.save(link_key(interface.network_interface_id), link)
    return draft.add(interface)


def _claimed_id(draft: Draft, wanted: str | None) -> str:
    """One whose link has a name of its own. Void if somebody else claims it meanwhile."""
    for _ in range(_MINTED):
        id = wanted or draft.mint("eni")
        names.mac_address(id)  # refuses what is no id
        if draft.peek(link_key(id), Link) is None:
            draft.get(link_key(id), Link)
            return id
        if wanted is not None:
            break
    raise NetworkError(f"interface {id}: another one has a link of its name: try again")


def _take_address(draft: Draft, subnet: Subnet, wanted: str | None) -> tuple[IPv4Address, int]:
    """An address of the subnet and its offset there."""
    key = addresses_key(subnet.vpc_id, subnet.subnet_id)
    row = draft.get(key, Addresses) or Addresses()
    network = IPv4Network(subnet.cidr_block)
    prefix = vpc_prefix(subnet.vpc_id, NetworkInterface)

    def is_taken(offset: int) -> bool:
        return draft.peek(f"{prefix}{network[offset]}", NetworkInterface) is not None

    if wanted is not None:
        offset = _wanted_offset(subnet, wanted)
        if is_taken(offset):
            raise Refusal.ADDRESS_IN_USE.error(address=wanted)
        turn = turns.without(row.turn, offset)
    else:
        offsets = range(RESERVED_FIRST, network.num_addresses - 1)
        is_full = row.in_use >= len(offsets)
        found = None if is_full else turns.take(row.turn, offsets, is_taken)
        if found is None:
            raise Refusal.NO_FREE_ADDRESS.error()
        offset, turn = found
    draft.save(key, Addresses(turn=turn, in_use=row.in_use + 1))
    return network[offset], offset


def _wanted_offset(subnet: Subnet, wanted: str) -> int:
    address = cidr.address(wanted)
    network = IPv4Network(subnet.cidr_block)
    if address not in network:
        raise Refusal.ADDRESS_OUTSIDE.error(address=wanted)
    if not is_assignable(subnet, address):
        raise Refusal.ADDRESS_RESERVED.error(address=wanted)
    return int(address) - int(network[0])


def _ipv6_address(subnet: Subnet, offset: int) -> str | None:
    """With the offset of the private one, so it is nobody else's. A task in a dual-stack subnet
    always has one: assignIpv6AddressOnCreation is about instances."""
    if subnet.ipv6_cidr_block is None:
        return None
    return str(IPv6Network(subnet.ipv6_cidr_block)[offset])


def _check_count(draft: Draft) -> None:
    """By the counts of the subnets, which others may change meanwhile: a quota is no invariant, and
    comparing them would make every interface of the region conflict with every other."""
    total = 0
    for vpc_id in draft.region_ledger().vpcs:
        for subnet_id in draft.ledger(vpc_id).subnets:
            row = draft.peek(addresses_key(vpc_id, subnet_id), Addresses)
            total += row.in_use if row is not None else 0
    if total >= draft.region.limits.interfaces:
        raise Refusal.INTERFACE_LIMIT.error()
