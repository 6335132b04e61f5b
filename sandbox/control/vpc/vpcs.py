"""VPCs. Each is made with what EC2 makes with it: main route table, default group and default ACL.

VPCs may overlap each other: each is a namespace of its own. None overlaps the public pool, or its
tasks could not reach those addresses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from ipaddress import IPv6Network
from typing import Final

import msgspec

from sandbox.control.vpc import acls, cidr, groups, routes, turns
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import (
    InternetGateway,
    NetworkAcl,
    PrefixList,
    Revocation,
    RouteTable,
    SecurityGroup,
    Tag,
    Vpc,
)
from sandbox.store.vpc_rows import VpcLedger, ledger_key, vpc_key

MADE_WITH_IT: Final = (SecurityGroup, NetworkAcl, RouteTable)
"""One of each; they cannot be deleted but with it."""
NUMBERS: Final = range(1, 10_000)
"""A link's name has 15 bytes, and `sb` + 4 + `u` are 7 of them."""


def create_vpc(
    draft: Draft,
    cidr_block: str,
    *,
    amazon_provided_ipv6_cidr_block: bool = False,
    is_default: bool = False,
    tags: Iterable[Tag] = (),
) -> Vpc:
    network = cidr.ipv4_block(cidr_block)
    if not cidr.is_vpc_size(network) or cidr.is_unroutable(network):
        raise Refusal.VPC_RANGE.error(cidr=cidr_block)
    if network.overlaps(draft.region.pool):
        raise Refusal.VPC_IN_PUBLIC_POOL.error(cidr=cidr_block, pool=draft.region.pool)
    ledger = draft.region_ledger()
    if len(ledger.vpcs) >= draft.region.limits.vpcs:
        raise Refusal.VPC_LIMIT.error()
    vpc_id = draft.mint("vpc")
    ipv6 = str(_ipv6_block(vpc_id)) if amazon_provided_ipv6_cidr_block else None
    vpc = Vpc(
        vpc_id=vpc_id,
        cidr_block=str(network),
        ipv6_cidr_block=ipv6,
        number=_take_number(draft, vpc_id),
        is_default=is_default,
        enable_dns_hostnames=is_default,
        created_at=draft.now,
        tags=checked_tags(tags),
    )
    draft.add(vpc)
    group_id = draft.mint("sg")
    draft.save(ledger_key(vpc_id), VpcLedger(default_group_id=group_id))
    groups.add_default(draft, vpc, group_id)
    acls.add_default(draft, vpc)
    routes.add_main(draft, vpc)
    return vpc


def delete_vpc(draft: Draft, vpc_id: str) -> None:
    """Refused while there is anything in it but what was made with it."""
    vpc = draft.vpc(vpc_id)
    draft.touch(vpc_id)
    ledger = draft.ledger(vpc_id)
    if ledger.subnets or draft.all(InternetGateway, vpc_id):
        raise Refusal.VPC_IN_USE.error(id=vpc_id)
    found = (
        *draft.all(SecurityGroup, vpc_id).values(),
        *draft.all(NetworkAcl, vpc_id).values(),
        *draft.all(RouteTable, vpc_id).values(),
    )
    if len(found) > len(MADE_WITH_IT):
        raise Refusal.VPC_IN_USE.error(id=vpc_id)
    for record in (*found, vpc):
        draft.remove(record)
    for id in draft.all(PrefixList, vpc_id):
        groups.forget_list(draft, vpc_id, id)
    draft.erase(ledger_key(vpc_id))
    region = draft.region_ledger()
    draft.touch_region(
        vpcs=tuple(other for other in region.vpcs if other != vpc_id),
        vpc_numbers=turns.give_back(region.vpc_numbers, vpc.number),
    )


def modify_vpc_attribute(
    draft: Draft,
    vpc_id: str,
    *,
    enable_dns_support: bool | None = None,
    enable_dns_hostnames: bool | None = None,
    revocation: Revocation | None = None,
) -> Vpc:
    """None leaves it as it is. `revocation` is ours, EC2 has only its own."""
    wanted = {
        "enable_dns_support": enable_dns_support,
        "enable_dns_hostnames": enable_dns_hostnames,
        "revocation": revocation,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    return draft.change(msgspec.structs.replace(draft.vpc(vpc_id), **given))


def _take_number(draft: Draft, vpc_id: str) -> int:
    region = draft.region_ledger()
    taken = set()
    for other in region.vpcs:
        vpc = draft.peek(vpc_key(other), Vpc)
        if vpc is not None:
            taken.add(vpc.number)
    found = turns.take(region.vpc_numbers, NUMBERS, taken.__contains__)
    if found is None:
        raise Refusal.VPC_LIMIT.error()
    number, turn = found
    draft.touch_region(vpcs=(*region.vpcs, vpc_id), vpc_numbers=turn)
    return number


def _ipv6_block(vpc_id: str) -> IPv6Network:
    """A /56 of the unique local addresses (RFC 4193), where Amazon would give one of its own."""
    digest = hashlib.sha256(vpc_id.encode()).digest()[:6]
    return IPv6Network((bytes([0xFD, *digest]) + bytes(9), 56))
