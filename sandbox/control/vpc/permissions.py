"""What a rule of a security group may say, and which two rules say the same. Pure.

EC2 API Reference, IpPermission and SecurityGroupRuleRequest; the order of checks is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from sandbox.control.vpc import cidr
from sandbox.control.vpc.refusals import Refusal
from sandbox.model.task import Record
from sandbox.model.vpc import PrefixList, SecurityGroupRule, Tag

NAMED: Final[Mapping[str, str]] = {"1": "icmp", "6": "tcp", "17": "udp", "58": "icmpv6"}
NUMBERED: Final[Mapping[str, str]] = {name: number for number, name in NAMED.items()}
ANY: Final = "-1"

TEXT: Final = re.compile(r"[a-zA-Z0-9. _\-:/()#,@\[\]+=&;{}!$*]{0,255}")
"""What names and descriptions are made of."""

Family = Literal["IPv4", "IPv6"]
FAMILIES: Final[tuple[Family, Family]] = ("IPv4", "IPv6")


class RuleRequest(Record, frozen=True, kw_only=True):
    """One rule as it is asked for: EC2's IpPermission with exactly one of its peers."""

    ip_protocol: str
    from_port: int | None = None
    to_port: int | None = None
    cidr_ipv4: str | None = None
    cidr_ipv6: str | None = None
    prefix_list_id: str | None = None
    referenced_group_id: str | None = None
    description: str | None = None
    tags: tuple[Tag, ...] = ()


Meaning = tuple[str, int | None, int | None, str | None, str | None, str | None, str | None]
"""What makes two rules of one direction the same: all but id, description and tags."""


def canonical(request: RuleRequest, id: str, *, is_egress: bool) -> SecurityGroupRule:
    """The rule as EC2 would show it. Raises InvalidParameterValue, InvalidPermission.Malformed."""
    protocol = protocol_of(request.ip_protocol)
    first, last = _ports(protocol, request.from_port, request.to_port)
    peers = (
        request.cidr_ipv4,
        request.cidr_ipv6,
        request.prefix_list_id,
        request.referenced_group_id,
    )
    if sum(peer is not None for peer in peers) != 1:
        raise Refusal.ONE_PEER.error()
    ipv4, ipv6 = request.cidr_ipv4, request.cidr_ipv6
    return SecurityGroupRule(
        security_group_rule_id=id,
        is_egress=is_egress,
        ip_protocol=protocol,
        from_port=first,
        to_port=last,
        cidr_ipv4=str(cidr.ipv4_block(ipv4, "cidrIp")) if ipv4 is not None else None,
        cidr_ipv6=str(cidr.ipv6_block(ipv6, "cidrIpv6")) if ipv6 is not None else None,
        prefix_list_id=request.prefix_list_id,
        referenced_group_id=request.referenced_group_id,
        description=checked_description(request.description),
        tags=request.tags,
    )


def protocol_of(text: str) -> str:
    """tcp, udp, icmp, icmpv6, -1, or another number, in its shortest form."""
    lower = text.lower()
    if lower in NUMBERED:
        return lower
    if lower in (ANY, "all"):
        return ANY
    if re.fullmatch(r"[0-9]{1,3}", text) and int(text) <= 255:
        number = str(int(text))
        return NAMED.get(number, number)
    raise Refusal.PROTOCOL.error(protocol=text)


def checked_description(text: str | None) -> str | None:
    if text is not None and not TEXT.fullmatch(text):
        raise Refusal.RULE_DESCRIPTION.error()
    return text or None


def meaning(rule: SecurityGroupRule) -> Meaning:
    return (
        rule.ip_protocol,
        rule.from_port,
        rule.to_port,
        rule.cidr_ipv4,
        rule.cidr_ipv6,
        rule.prefix_list_id,
        rule.referenced_group_id,
    )


def weight(
    rules: Iterable[SecurityGroupRule],
    family: Family,
    *,
    is_egress: bool,
    lists: Mapping[str, PrefixList],
) -> int:
    """What the rules of one direction count for in the quota of one IP version.

    A group counts in both, whatever its size; a prefix list as many as it may have entries.
    (VPC User Guide, "Amazon VPC quotas", "Security groups")
    """
    total = 0
    for rule in rules:
        if rule.is_egress is not is_egress:
            continue
        if rule.prefix_list_id is not None:
            chosen = lists[rule.prefix_list_id]
            total += chosen.max_entries if chosen.address_family == family else 0
        elif rule.referenced_group_id is not None:
            total += 1
        else:
            total += (rule.cidr_ipv4 if family == "IPv4" else rule.cidr_ipv6) is not None
    return total


def shown(rule: SecurityGroupRule) -> str:
    """As EC2 prints it: peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW"""
    peer = rule.cidr_ipv4 or rule.cidr_ipv6 or rule.prefix_list_id or rule.referenced_group_id
    protocol = "ALL" if rule.ip_protocol == ANY else rule.ip_protocol.upper()
    ports = ""
    if rule.from_port is not None:
        ports = f", from port: {rule.from_port}, to port: {rule.to_port}"
    return f"peer: {peer}, {protocol}{ports}, ALLOW"


def _ports(protocol: str, first: int | None, last: int | None) -> tuple[int | None, int | None]:
    if protocol in ("tcp", "udp"):
        if first is None or last is None:
            raise Refusal.PORTS_MISSING.error()
        if not 0 <= first <= last <= 65535:
            raise Refusal.PORT_RANGE.error(first=first, last=last)
        return first, last
    if protocol in ("icmp", "icmpv6"):
        type_, code = -1 if first is None else first, -1 if last is None else last
        is_any = type_ == -1 and code != -1
        if not -1 <= type_ <= 255 or not -1 <= code <= 255 or is_any:
            raise Refusal.ICMP.error(type=type_, code=code)
        return type_, code
    return None, None  # EC2 takes ports here and does not look at them
