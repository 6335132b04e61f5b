"""Network ACLs: numbered entries, the lowest that matches decides, after the last one denies.

A subnet has always exactly one: the VPC's default ACL, which allows all, until another is put in
its place. A new ACL denies all. (VPC User Guide, "Control subnet traffic with network ACLs")
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from sandbox.control.vpc import cidr, indexes
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.permissions import ANY, NUMBERED
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import ACL_LAST, AclEntry, NetworkAcl, Subnet, Tag, Vpc

ALLOW_ALL_NUMBER: Final = 100
ALLOW_ALL_IPV6_NUMBER: Final = 101

TCP, UDP = NUMBERED["tcp"], NUMBERED["udp"]
ICMP, ICMPV6 = NUMBERED["icmp"], NUMBERED["icmpv6"]


def create_network_acl(draft: Draft, vpc_id: str, *, tags: Iterable[Tag] = ()) -> NetworkAcl:
    vpc = draft.vpc(vpc_id)
    draft.touch(vpc_id)
    if len(draft.all(NetworkAcl, vpc_id)) >= draft.region.limits.acls_per_vpc:
        raise Refusal.ACL_LIMIT.error()
    return _add(draft, vpc, (), checked_tags(tags), is_default=False)


def delete_network_acl(draft: Draft, network_acl_id: str) -> None:
    """Refused for the default one, and while a subnet has it."""
    acl = draft.find(NetworkAcl, network_acl_id)
    if acl.is_default:
        raise Refusal.DEFAULT_ACL_STAYS.error(id=network_acl_id)
    draft.touch(acl.vpc_id)
    subnets = draft.all(Subnet, acl.vpc_id).values()
    if any(subnet.network_acl_id == network_acl_id for subnet in subnets):
        raise Refusal.ACL_IN_USE.error(id=network_acl_id)
    indexes.retire_index(draft, acl.vpc_id, "acl", acl.index)
    draft.remove(acl)


def replace_network_acl_association(
    draft: Draft, association_id: str, network_acl_id: str
) -> Subnet:
    """The subnet of that association gets another ACL, and a new association's id."""
    acl = draft.find(NetworkAcl, network_acl_id)
    for vpc_id in draft.region_ledger().vpcs:
        for subnet in draft.all(Subnet, vpc_id).values():
            if subnet.network_acl_association_id == association_id:
                return _associate(draft, subnet, acl)
    raise Refusal.ASSOCIATION_NOT_FOUND.error(id=association_id)


def create_entry(draft: Draft, network_acl_id: str, entry: AclEntry) -> NetworkAcl:
    """NetworkAclEntryAlreadyExists for a number that is there in that direction."""
    acl = draft.find(NetworkAcl, network_acl_id)
    checked = checked_entry(entry)
    if _entry(acl, checked.rule_number, checked.is_egress) is not None:
        raise Refusal.ACL_ENTRY_EXISTS.error(number=checked.rule_number)
    same_way = [e for e in acl.entries if e.is_egress is checked.is_egress]
    if len(same_way) >= draft.region.limits.entries_per_acl:
        raise Refusal.ACL_ENTRY_LIMIT.error()
    return _with_entries(draft, acl, (*acl.entries, checked))


def replace_entry(draft: Draft, network_acl_id: str, entry: AclEntry) -> NetworkAcl:
    acl = draft.find(NetworkAcl, network_acl_id)
    checked = checked_entry(entry)
    old = _needed(acl, checked.rule_number, checked.is_egress)
    left = (e for e in acl.entries if e is not old)
    return _with_entries(draft, acl, (*left, checked))


def delete_entry(
    draft: Draft, network_acl_id: str, rule_number: int, *, is_egress: bool
) -> NetworkAcl:
    """Refused for the last one, which is always there."""
    acl = draft.find(NetworkAcl, network_acl_id)
    if rule_number == ACL_LAST:
        raise Refusal.ACL_NUMBER.error(number=rule_number)
    old = _needed(acl, rule_number, is_egress)
    return _with_entries(draft, acl, (e for e in acl.entries if e is not old))


def checked_entry(entry: AclEntry) -> AclEntry:
    """As EC2 would show it: the protocol as a number, one canonical block, what belongs to the
    protocol and nothing else. Raises InvalidParameterValue, MissingParameter."""
    if not 1 <= entry.rule_number < ACL_LAST:
        raise Refusal.ACL_NUMBER.error(number=entry.rule_number)
    if (entry.cidr_block is None) == (entry.ipv6_cidr_block is None):
        raise Refusal.MISSING.error(parameter="cidrBlock or ipv6CidrBlock")
    protocol = _protocol(entry.protocol)
    first, last = _ports(entry) if protocol in (TCP, UDP) else (None, None)
    type_, code = _icmp(entry) if protocol in (ICMP, ICMPV6) else (None, None)
    ipv4, ipv6 = entry.cidr_block, entry.ipv6_cidr_block
    return AclEntry(
        rule_number=entry.rule_number,
        is_egress=entry.is_egress,
        rule_action=entry.rule_action,
        protocol=protocol,
        cidr_block=str(cidr.ipv4_block(ipv4)) if ipv4 is not None else None,
        ipv6_cidr_block=str(cidr.ipv6_block(ipv6)) if ipv6 is not None else None,
        from_port=first,
        to_port=last,
        icmp_type=type_,
        icmp_code=code,
    )


def add_default(draft: Draft, vpc: Vpc) -> NetworkAcl:
    entries = [_allow_all(ALLOW_ALL_NUMBER, "0.0.0.0/0", None, out) for out in (False, True)]
    if vpc.ipv6_cidr_block is not None:
        entries += [_allow_all(ALLOW_ALL_IPV6_NUMBER, None, "::/0", out) for out in (False, True)]
    return _add(draft, vpc, entries, (), is_default=True)


def default_of(draft: Draft, vpc_id: str) -> NetworkAcl:
    return next(acl for acl in draft.all(NetworkAcl, vpc_id).values() if acl.is_default)


def _associate(draft: Draft, subnet: Subnet, acl: NetworkAcl) -> Subnet:
    if subnet.vpc_id != acl.vpc_id:
        raise Refusal.ACL_ELSEWHERE.error(acl=acl.network_acl_id, subnet=subnet.subnet_id)
    draft.touch(subnet.vpc_id)
    current = draft.find(Subnet, subnet.subnet_id)
    return draft.change(
        msgspec.structs.replace(
            current,
            network_acl_id=acl.network_acl_id,
            network_acl_association_id=draft.mint("aclassoc"),
        )
    )


def _add(
    draft: Draft,
    vpc: Vpc,
    entries: Iterable[AclEntry],
    tags: tuple[Tag, ...],
    *,
    is_default: bool,
) -> NetworkAcl:
    live = {other.index for other in draft.all(NetworkAcl, vpc.vpc_id).values()}
    return draft.add(
        NetworkAcl(
            network_acl_id=draft.mint("acl"),
            vpc_id=vpc.vpc_id,
            is_default=is_default,
            index=indexes.take_index(draft, vpc.vpc_id, "acl", live),
            entries=tuple(entries),
            created_at=draft.now,
            tags=tags,
        )
    )


def _with_entries(draft: Draft, acl: NetworkAcl, entries: Iterable[AclEntry]) -> NetworkAcl:
    ordered = sorted(entries, key=lambda entry: (entry.is_egress, entry.rule_number))
    return draft.change(msgspec.structs.replace(acl, entries=tuple(ordered)))


def _entry(acl: NetworkAcl, number: int, is_egress: bool) -> AclEntry | None:
    found = (e for e in acl.entries if e.rule_number == number and e.is_egress is is_egress)
    return next(found, None)


def _needed(acl: NetworkAcl, number: int, is_egress: bool) -> AclEntry:
    found = _entry(acl, number, is_egress)
    if found is None:
        raise Refusal.ACL_ENTRY_NOT_FOUND.error(number=number)
    return found


def _allow_all(number: int, ipv4: str | None, ipv6: str | None, is_egress: bool) -> AclEntry:
    action: Literal["allow"] = "allow"
    return AclEntry(
        rule_number=number,
        is_egress=is_egress,
        rule_action=action,
        protocol=ANY,
        cidr_block=ipv4,
        ipv6_cidr_block=ipv6,
    )


def _protocol(text: str) -> str:
    """Here EC2 has numbers where groups have names."""
    lower = text.lower()
    if lower in NUMBERED:
        return NUMBERED[lower]
    if lower in (ANY, "all"):
        return ANY
    if re.fullmatch(r"[0-9]{1,3}", text) and int(text) <= 255:
        return str(int(text))
    raise Refusal.PROTOCOL.error(protocol=text)


def _ports(entry: AclEntry) -> tuple[int, int]:
    if entry.from_port is None or entry.to_port is None:
        raise Refusal.MISSING.error(parameter="portRange")
    if not 0 <= entry.from_port <= entry.to_port <= 65535:
        raise Refusal.PORT_RANGE.error(first=entry.from_port, last=entry.to_port)
    return entry.from_port, entry.to_port


def _icmp(entry: AclEntry) -> tuple[int, int]:
    if entry.icmp_type is None or entry.icmp_code is None:
        raise Refusal.MISSING.error(parameter="icmpTypeCode")
    type_, code = entry.icmp_type, entry.icmp_code
    is_any = type_ == -1 and code != -1
    if not -1 <= type_ <= 255 or not -1 <= code <= 255 or is_any:
        raise Refusal.ICMP.error(type=type_, code=code)
    return type_, code
