"""Route tables and their routes.

Every table has the local route of the VPC, which nothing removes and, at EC2, only an appliance on
an interface may come before ("middlebox routing"): there are none here, so no route lies within the
VPC. A subnet without a table of its own has the main one. The longest prefix wins. A gateway that
goes leaves its routes as black holes. (VPC User Guide, "Route table concepts")
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sandbox.control.vpc import cidr
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import (
    LOCAL,
    InternetGateway,
    NatGateway,
    Route,
    RouteTable,
    Subnet,
    Tag,
    Vpc,
    contains,
)


def create_route_table(draft: Draft, vpc_id: str, *, tags: Iterable[Tag] = ()) -> RouteTable:
    vpc = draft.vpc(vpc_id)
    draft.touch(vpc_id)
    if len(draft.all(RouteTable, vpc_id)) >= draft.region.limits.route_tables_per_vpc:
        raise Refusal.ROUTE_TABLE_LIMIT.error()
    table = RouteTable(
        route_table_id=draft.mint("rtb"),
        vpc_id=vpc_id,
        routes=_local(vpc),
        created_at=draft.now,
        tags=checked_tags(tags),
    )
    return draft.add(table)


def delete_route_table(draft: Draft, route_table_id: str) -> None:
    """Refused for the main one, and while a subnet has it."""
    table = draft.find(RouteTable, route_table_id)
    draft.touch(table.vpc_id)
    subnets = draft.all(Subnet, table.vpc_id).values()
    if table.is_main or any(subnet.route_table_id == route_table_id for subnet in subnets):
        raise Refusal.ROUTE_TABLE_IN_USE.error(id=route_table_id)
    draft.remove(table)


# Routes ------------------------------------------------------------------------------------


def create_route(draft: Draft, route_table_id: str, destination: str, target: str) -> RouteTable:
    """`target` is an internet gateway that the VPC has attached, or a NAT gateway in it."""
    table = draft.find(RouteTable, route_table_id)
    block = str(cidr.block(destination, "destinationCidrBlock"))
    _check_destination(draft, table, block)
    if _route(table, block) is not None:
        raise Refusal.ROUTE_EXISTS.error(destination=block)
    _check_target(draft, table, block, target)
    own = [route for route in table.routes if route.target != LOCAL]
    if len(own) >= draft.region.limits.routes_per_table:
        raise Refusal.ROUTE_LIMIT.error()
    routes = (*table.routes, Route(destination=block, target=target))
    return draft.change(msgspec.structs.replace(table, routes=routes))


def replace_route(draft: Draft, route_table_id: str, destination: str, target: str) -> RouteTable:
    """In place of the one that is there for exactly this destination."""
    table = draft.find(RouteTable, route_table_id)
    block = str(cidr.block(destination, "destinationCidrBlock"))
    _check_destination(draft, table, block)
    old = _needed(table, block)
    _check_target(draft, table, block, target)
    new = Route(destination=block, target=target)
    routes = tuple(new if route is old else route for route in table.routes)
    return draft.change(msgspec.structs.replace(table, routes=routes))


def delete_route(draft: Draft, route_table_id: str, destination: str) -> RouteTable:
    table = draft.find(RouteTable, route_table_id)
    block = str(cidr.block(destination, "destinationCidrBlock"))
    old = _needed(table, block)
    if old.target == LOCAL:
        raise Refusal.LOCAL_ROUTE_STAYS.error(destination=block, table=route_table_id)
    routes = tuple(route for route in table.routes if route is not old)
    return draft.change(msgspec.structs.replace(table, routes=routes))


# Which subnet has which table --------------------------------------------------------------


def associate_route_table(draft: Draft, route_table_id: str, subnet_id: str) -> Subnet:
    """Refused for a subnet that has a table of its own; idempotent if it is this one."""
    table = draft.find(RouteTable, route_table_id)
    subnet = draft.find(Subnet, subnet_id)
    if subnet.route_table_id == route_table_id:
        return subnet
    if subnet.route_table_id is not None and subnet.vpc_id == table.vpc_id:
        raise Refusal.TABLE_ASSOCIATED.error(table=route_table_id)
    return _associate(draft, subnet, table)


def disassociate_route_table(draft: Draft, association_id: str) -> None:
    """The subnet has the main table again. Refused for the association of the main one."""
    found = _associated(draft, association_id)
    if isinstance(found, RouteTable):
        raise Refusal.MAIN_TABLE_STAYS.error(association=association_id)
    draft.touch(found.vpc_id)
    draft.change(
        msgspec.structs.replace(found, route_table_id=None, route_table_association_id=None)
    )


def replace_route_table_association(draft: Draft, association_id: str, route_table_id: str) -> str:
    """Another table for that subnet or, by the association of the main table, for all that have
    none of their own. Returns the new association's id."""
    table = draft.find(RouteTable, route_table_id)
    found = _associated(draft, association_id)
    if isinstance(found, RouteTable):
        return _make_main(draft, found, table)
    new = _associate(draft, found, table).route_table_association_id
    assert new is not None
    return new


def add_main(draft: Draft, vpc: Vpc) -> RouteTable:
    return draft.add(
        RouteTable(
            route_table_id=draft.mint("rtb"),
            vpc_id=vpc.vpc_id,
            is_main=True,
            main_association_id=draft.mint("rtbassoc"),
            routes=_local(vpc),
            created_at=draft.now,
        )
    )


def main_of(draft: Draft, vpc_id: str) -> RouteTable:
    return next(table for table in draft.all(RouteTable, vpc_id).values() if table.is_main)


def _local(vpc: Vpc) -> tuple[Route, ...]:
    blocks = (vpc.cidr_block, vpc.ipv6_cidr_block)
    return tuple(Route(destination=b, target=LOCAL) for b in blocks if b is not None)


def _route(table: RouteTable, block: str) -> Route | None:
    return next((route for route in table.routes if route.destination == block), None)


def _needed(table: RouteTable, block: str) -> Route:
    found = _route(table, block)
    if found is None:
        raise Refusal.ROUTE_NOT_FOUND.error(destination=block, table=table.route_table_id)
    return found


def _check_destination(draft: Draft, table: RouteTable, block: str) -> None:
    for route in table.routes:
        if route.target == LOCAL and contains(route.destination, block):
            raise Refusal.ROUTE_TARGET.error()


def _check_target(draft: Draft, table: RouteTable, block: str, target: str) -> None:
    if target.startswith("nat-"):
        nat_gateway = draft.find(NatGateway, target)
        if nat_gateway.vpc_id != table.vpc_id:
            raise Refusal.ROUTE_ELSEWHERE.error(table=table.route_table_id, gateway=target)
        if ":" in block:
            why = "A NAT gateway carries IPv4."
            raise Refusal.VALUE.error(value=block, parameter="destinationIpv6CidrBlock", why=why)
        return
    if not target.startswith("igw-"):
        raise Refusal.GATEWAY_NOT_FOUND.error(id=target)
    gateway = draft.find(InternetGateway, target)
    if gateway.vpc_id != table.vpc_id:
        raise Refusal.ROUTE_ELSEWHERE.error(table=table.route_table_id, gateway=target)


def _associate(draft: Draft, subnet: Subnet, table: RouteTable) -> Subnet:
    if subnet.vpc_id != table.vpc_id:
        raise Refusal.TABLE_ELSEWHERE.error(table=table.route_table_id, other=subnet.subnet_id)
    draft.touch(subnet.vpc_id)
    return draft.change(
        msgspec.structs.replace(
            subnet,
            route_table_id=table.route_table_id,
            route_table_association_id=draft.mint("rtbassoc"),
        )
    )


def _make_main(draft: Draft, old: RouteTable, new: RouteTable) -> str:
    if old.vpc_id != new.vpc_id:
        raise Refusal.TABLE_ELSEWHERE.error(table=new.route_table_id, other=old.vpc_id)
    draft.touch(old.vpc_id)
    association = draft.mint("rtbassoc")
    draft.change(msgspec.structs.replace(old, is_main=False, main_association_id=None))
    current = draft.find(RouteTable, new.route_table_id)  # it may be the same
    draft.change(msgspec.structs.replace(current, is_main=True, main_association_id=association))
    return association


def _associated(draft: Draft, association_id: str) -> Subnet | RouteTable:
    for vpc_id in draft.region_ledger().vpcs:
        for subnet in draft.all(Subnet, vpc_id).values():
            if subnet.route_table_association_id == association_id:
                return draft.find(Subnet, subnet.subnet_id)
        for table in draft.all(RouteTable, vpc_id).values():
            if table.main_association_id == association_id:
                return draft.find(RouteTable, table.route_table_id)
    raise Refusal.ASSOCIATION_NOT_FOUND.error(id=association_id)
