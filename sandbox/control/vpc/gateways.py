"""Internet gateways and NAT gateways."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sandbox.control.vpc import addresses, interfaces
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import ElasticAddress, InternetGateway, NatGateway, Subnet, Tag

NAT_GATEWAY_INTERFACE = "Interface for NAT Gateway "
"""How EC2 describes it, with the gateway's id behind."""


def create_internet_gateway(draft: Draft, *, tags: Iterable[Tag] = ()) -> InternetGateway:
    draft.touch_region()
    vpcs = draft.region_ledger().vpcs
    attached = sum(len(draft.all(InternetGateway, vpc)) for vpc in vpcs)
    if (
        attached + len(draft.all_of_region(InternetGateway))
        >= draft.region.limits.internet_gateways
    ):
        raise Refusal.GATEWAY_LIMIT.error()
    gateway = InternetGateway(
        internet_gateway_id=draft.mint("igw"), created_at=draft.now, tags=checked_tags(tags)
    )
    return draft.add(gateway)


def attach_internet_gateway(draft: Draft, gateway_id: str, vpc_id: str) -> InternetGateway:
    """A gateway has one VPC at most, a VPC one gateway."""
    gateway = draft.find(InternetGateway, gateway_id)
    draft.vpc(vpc_id)
    draft.touch(vpc_id)
    if gateway.vpc_id is not None:
        raise Refusal.GATEWAY_ATTACHED.error(id=gateway_id, vpc=gateway.vpc_id)
    if draft.all(InternetGateway, vpc_id):
        raise Refusal.VPC_HAS_GATEWAY.error(vpc=vpc_id)
    draft.remove(gateway)
    return draft.change(msgspec.structs.replace(gateway, vpc_id=vpc_id))


def detach_internet_gateway(draft: Draft, gateway_id: str, vpc_id: str) -> InternetGateway:
    """Refused while an interface of the VPC has a public address. Routes to it stay, as black
    holes."""
    gateway = draft.find(InternetGateway, gateway_id)
    draft.vpc(vpc_id)
    draft.touch(vpc_id)
    if gateway.vpc_id != vpc_id:
        raise Refusal.GATEWAY_NOT_ATTACHED.error(id=gateway_id, vpc=vpc_id)
    if any(interface.public_ip is not None for interface in draft.interfaces(vpc_id)):
        raise Refusal.ADDRESSES_MAPPED.error(vpc=vpc_id)
    draft.remove(gateway)
    return draft.change(msgspec.structs.replace(gateway, vpc_id=None))


def delete_internet_gateway(draft: Draft, gateway_id: str) -> None:
    gateway = draft.find(InternetGateway, gateway_id)
    if gateway.vpc_id is not None:
        raise Refusal.GATEWAY_IN_USE.error(id=gateway_id)
    draft.remove(gateway)


def create_nat_gateway(
    draft: Draft, subnet_id: str, allocation_id: str, *, tags: Iterable[Tag] = ()
) -> NatGateway:
    """With an Elastic address and an interface of its own in the subnet.

    EC2 answers at once and lets a gateway fail later, with the code that is raised here.
    """
    subnet = draft.find(Subnet, subnet_id)
    address = draft.find(ElasticAddress, allocation_id)
    draft.touch(subnet.vpc_id)
    if not draft.all(InternetGateway, subnet.vpc_id):
        raise Refusal.NO_GATEWAY_FOR_NAT.error(vpc=subnet.vpc_id)
    if address.association_id is not None:
        raise Refusal.ADDRESS_ASSOCIATED.error(id=allocation_id, association=address.association_id)
    _check_zone(draft, subnet)
    checked = checked_tags(tags)
    gateway_id = draft.mint("nat")
    interface = interfaces.add_for_agent(
        draft, subnet, f"{NAT_GATEWAY_INTERFACE}{gateway_id}", address
    )
    gateway = NatGateway(
        nat_gateway_id=gateway_id,
        vpc_id=subnet.vpc_id,
        subnet_id=subnet_id,
        network_interface_id=interface.network_interface_id,
        private_ip=interface.private_ip,
        allocation_id=allocation_id,
        public_ip=address.public_ip,
        created_at=draft.now,
        tags=checked,
    )
    addresses.associate_with(draft, address, interface, nat_gateway_id=gateway_id)
    return draft.add(gateway)


def delete_nat_gateway(draft: Draft, gateway_id: str) -> None:
    """Its address is free for others, but still allocated; routes to it stay, as black holes."""
    gateway = draft.find(NatGateway, gateway_id)
    draft.touch(gateway.vpc_id)
    interfaces.remove(draft, draft.interface(gateway.network_interface_id))
    draft.remove(gateway)


def _check_zone(draft: Draft, subnet: Subnet) -> None:
    here = 0
    for vpc_id in draft.region_ledger().vpcs:
        draft.touch(vpc_id)
        subnets = draft.all(Subnet, vpc_id)
        for gateway in draft.all(NatGateway, vpc_id).values():
            other = subnets[gateway.subnet_id]
            here += other.availability_zone == subnet.availability_zone
    if here >= draft.region.limits.nat_gateways_per_zone:
        raise Refusal.NAT_GATEWAY_LIMIT.error()
