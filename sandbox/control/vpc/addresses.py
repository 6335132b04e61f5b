"""Public addresses: blocks for subnets, and Elastic addresses.

All are of `public_pool`. A subnet gets a block of its own size at its first public address, so that
its private addresses and its public ones are each other's, one to one, by the offset: one rule in
the kernel for all of them. Elastic addresses are the pool's last /24, and NAT gateways have those.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

import msgspec

from sandbox.control.vpc import turns
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import (
    ElasticAddress,
    InternetGateway,
    NetworkInterface,
    Subnet,
    Tag,
)


def allocate_address(draft: Draft, *, tags: Iterable[Tag] = ()) -> ElasticAddress:
    region = draft.region_ledger()
    others = draft.all_of_region(ElasticAddress).values()
    if len(others) >= draft.region.limits.elastic_addresses:
        raise Refusal.ADDRESS_LIMIT.error()
    pool = draft.region.elastic_pool
    taken = {IPv4Address(other.public_ip) for other in others}
    # Neither its ends, nor the one before the last, which is the agent's own.
    offsets = range(1, pool.num_addresses - 2)
    found = turns.take(region.elastic, offsets, lambda offset: pool[offset] in taken)
    if found is None:
        raise Refusal.NO_ELASTIC_ADDRESS.error(pool=draft.region.pool, elastic=pool)
    offset, turn = found
    draft.touch_region(elastic=turn)
    address = ElasticAddress(
        allocation_id=draft.mint("eipalloc"),
        public_ip=str(pool[offset]),
        created_at=draft.now,
        tags=checked_tags(tags),
    )
    return draft.add(address)


def release_address(draft: Draft, allocation_id: str) -> None:
    """Refused while it is associated."""
    address = draft.find(ElasticAddress, allocation_id)
    if address.association_id is not None:
        raise Refusal.ADDRESS_IN_USE.error(address=address.public_ip)
    draft.remove(address)
    offset = int(IPv4Address(address.public_ip)) - int(draft.region.elastic_pool[0])
    turn = turns.give_back(draft.region_ledger().elastic, offset)
    draft.touch_region(elastic=turn)


def associate_address(
    draft: Draft,
    allocation_id: str,
    network_interface_id: str,
    *,
    allow_reassociation: bool = False,
) -> ElasticAddress:
    """The interface's public address is this one; one of the subnet's block that it had is gone.

    With `allow_reassociation` the address is taken from who has it, and the interface from the one
    that it has.
    """
    address = draft.find(ElasticAddress, allocation_id)
    interface = draft.interface(network_interface_id)
    draft.touch(interface.vpc_id)
    if interface.task is None:
        raise Refusal.NOT_YOURS.error(id=network_interface_id)
    if address.network_interface_id == network_interface_id:
        return address
    if not draft.all(InternetGateway, interface.vpc_id):
        raise Refusal.NO_GATEWAY.error(vpc=interface.vpc_id)
    if address.association_id is not None:
        _give_up(draft, allocation_id, address.association_id, allow_reassociation)
    if interface.association_id is not None:
        _give_up(draft, network_interface_id, interface.association_id, allow_reassociation)
    return associate_with(
        draft,
        draft.find(ElasticAddress, allocation_id),
        draft.interface(network_interface_id),
    )


def disassociate_address(draft: Draft, association_id: str) -> None:
    """The interface has no public address then."""
    for address in draft.all_of_region(ElasticAddress).values():
        if address.association_id == association_id:
            break
    else:
        raise Refusal.ASSOCIATION_NOT_FOUND.error(id=association_id)
    if address.nat_gateway_id is not None or address.network_interface_id is None:
        raise Refusal.NOT_YOURS.error(id=address.network_interface_id)
    interface = draft.interface(address.network_interface_id)
    draft.touch(interface.vpc_id)
    draft.change(
        msgspec.structs.replace(interface, public_ip=None, allocation_id=None, association_id=None)
    )
    forget_association(draft, address.allocation_id)


# For the other modules ---------------------------------------------------------------------


def associate_with(
    draft: Draft,
    address: ElasticAddress,
    interface: NetworkInterface,
    *,
    nat_gateway_id: str | None = None,
) -> ElasticAddress:
    association_id = draft.mint("eipassoc")
    draft.change(
        msgspec.structs.replace(
            interface,
            public_ip=address.public_ip,
            allocation_id=address.allocation_id,
            association_id=association_id,
        )
    )
    return draft.change(
        msgspec.structs.replace(
            address,
            association_id=association_id,
            network_interface_id=interface.network_interface_id,
            nat_gateway_id=nat_gateway_id,
        )
    )


def forget_association(draft: Draft, allocation_id: str) -> None:
    draft.change(
        msgspec.structs.replace(
            draft.find(ElasticAddress, allocation_id),
            association_id=None,
            network_interface_id=None,
            nat_gateway_id=None,
        )
    )


def public_address(draft: Draft, subnet: Subnet, private: IPv4Address) -> str:
    """That of the private one; the first of a subnet takes the subnet's block."""
    block = subnet.public_block or _take_block(draft, subnet)
    offset = int(private) - int(IPv4Network(subnet.cidr_block)[0])
    return str(IPv4Network(block)[offset])


def _take_block(draft: Draft, subnet: Subnet) -> str:
    """The next free one of the subnet's size, behind the last that was given, round the pool."""
    pool = draft.region.pool
    length = IPv4Network(subnet.cidr_block).prefixlen
    size = 1 << (32 - length)
    taken: set[int] = set()
    for block in (draft.region.elastic_pool, *_blocks(draft)):
        first = int(block[0]) - int(pool[0])
        taken.update(range(first // size, (first + block.num_addresses - 1) // size + 1))
    count = pool.num_addresses // size
    start = -(-draft.region_ledger().block_cursor // size)
    for number in (*range(start, count), *range(min(start, count))):
        if number not in taken:
            draft.touch_region(block_cursor=(number + 1) * size)
            found = str(IPv4Network((int(pool[0]) + number * size, length)))
            draft.change(msgspec.structs.replace(subnet, public_block=found))
            return found
    raise Refusal.NO_PUBLIC_BLOCK.error(pool=pool, cidr=subnet.cidr_block)


def _blocks(draft: Draft) -> list[IPv4Network]:
    """Those that subnets have, of all VPCs."""
    return [
        IPv4Network(subnet.public_block)
        for vpc_id in draft.region_ledger().vpcs
        for subnet in draft.all(Subnet, vpc_id).values()
        if subnet.public_block is not None
    ]


def _give_up(draft: Draft, id: str, association_id: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise Refusal.ADDRESS_ASSOCIATED.error(id=id, association=association_id)
    disassociate_address(draft, association_id)
