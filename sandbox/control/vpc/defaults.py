"""The default VPC, with which a task runs where nobody set anything up.

172.31.0.0/16, a /20 in each of three zones, an internet gateway and the route to it; tasks in it
have public addresses. (VPC User Guide, "Default VPC components")
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Final

from sandbox.control.vpc import gateways, routes, subnets, vpcs
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.model.vpc import Vpc
from sandbox.store.vpc_rows import vpc_key

CIDR_BLOCK: Final = "172.31.0.0/16"
SUBNET_PREFIX: Final = 20
ZONES: Final = 3


def ensure_default_vpc(draft: Draft) -> Vpc | None:
    """At every start: makes it once in the life of a state directory. Who deletes it has none."""
    if draft.region_ledger().had_default_vpc:
        return default_vpc(draft)
    return create_default_vpc(draft)


def create_default_vpc(draft: Draft) -> Vpc:
    """Refused while there is one."""
    if default_vpc(draft) is not None:
        raise Refusal.DEFAULT_VPC_EXISTS.error()
    vpc = vpcs.create_vpc(draft, CIDR_BLOCK, is_default=True)
    blocks = IPv4Network(CIDR_BLOCK).subnets(new_prefix=SUBNET_PREFIX)
    for zone, block in zip(draft.region.zones[:ZONES], blocks, strict=False):
        subnets.create_subnet(
            draft,
            vpc.vpc_id,
            str(block),
            availability_zone=zone,
            map_public_ip_on_launch=True,
            is_default=True,
        )
    gateway = gateways.create_internet_gateway(draft)
    gateways.attach_internet_gateway(draft, gateway.internet_gateway_id, vpc.vpc_id)
    main = routes.main_of(draft, vpc.vpc_id)
    routes.create_route(draft, main.route_table_id, "0.0.0.0/0", gateway.internet_gateway_id)
    draft.touch_region(had_default_vpc=True)
    return vpc


def default_vpc(draft: Draft) -> Vpc | None:
    for vpc_id in draft.region_ledger().vpcs:
        vpc = draft.peek(vpc_key(vpc_id), Vpc)
        if vpc is not None and vpc.is_default:
            return vpc
    return None
