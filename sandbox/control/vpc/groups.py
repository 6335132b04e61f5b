"""Security groups and their rules.

Names are case-insensitive and unique in their VPC (EC2 API Reference, CreateSecurityGroup). A new
group lets everything out and nothing in; the default group lets in what comes from itself. Changes
of rules are all or nothing.

A prefix list that a group names is copied into the group's VPC, so that the VPC is whole and hears
of the list's changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from sandbox.control.vpc import indexes, permissions
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.permissions import ANY, FAMILIES, TEXT, Meaning, RuleRequest
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import PrefixList, SecurityGroup, SecurityGroupRule, Tag, Vpc
from sandbox.store.vpc_rows import vpc_prefix

DEFAULT: Final = "default"

_ALL_IPV4: Final = RuleRequest(ip_protocol=ANY, cidr_ipv4="0.0.0.0/0")
_ALL_IPV6: Final = RuleRequest(ip_protocol=ANY, cidr_ipv6="::/0")


def create_security_group(
    draft: Draft,
    group_name: str,
    description: str,
    vpc_id: str | None = None,
    *,
    tags: Iterable[Tag] = (),
) -> SecurityGroup:
    """Without a VPC it is one of the default VPC."""
    vpc = draft.vpc(vpc_id) if vpc_id is not None else _default_vpc(draft)
    name = _checked_name(group_name)
    if not description or not TEXT.fullmatch(description):
        raise Refusal.GROUP_DESCRIPTION.error(description=description)
    draft.touch(vpc.vpc_id)
    others = draft.all(SecurityGroup, vpc.vpc_id)
    if any(other.group_name.lower() == name.lower() for other in others.values()):
        raise Refusal.GROUP_DUPLICATE.error(name=name, vpc=vpc.vpc_id)
    _check_count(draft, others)
    return _add(draft, vpc, draft.mint("sg"), name, description, (), checked_tags(tags))


def delete_security_group(draft: Draft, group_id: str) -> None:
    """Refused while an interface has it or another group's rule names it."""
    group = draft.find(SecurityGroup, group_id)
    if group.group_name == DEFAULT:
        raise Refusal.DEFAULT_GROUP_STAYS.error(id=group_id)
    draft.touch(group.vpc_id)
    others = [g for id, g in draft.all(SecurityGroup, group.vpc_id).items() if id != group_id]
    named = any(rule.referenced_group_id == group_id for g in others for rule in g.rules)
    if named or any(group_id in eni.group_ids for eni in draft.interfaces(group.vpc_id)):
        raise Refusal.GROUP_IN_USE.error(id=group_id)
    indexes.retire_index(draft, group.vpc_id, "group", group.index)
    draft.remove(group)
    _keep_lists(draft, group.vpc_id)


# Rules -------------------------------------------------------------------------------------


def authorize(
    draft: Draft, group_id: str, requests: Sequence[RuleRequest], *, is_egress: bool
) -> tuple[SecurityGroupRule, ...]:
    """AuthorizeSecurityGroupIngress and ...Egress: all of the rules or none; returns them."""
    group = draft.find(SecurityGroup, group_id)
    if not requests:
        raise Refusal.NO_RULES.error()
    if len(requests) > draft.region.limits.rules_per_interface:
        raise Refusal.RULE_LIMIT.error()
    draft.touch(group.vpc_id)
    new = tuple(_rule(draft, group, request, is_egress) for request in requests)
    known: dict[Meaning, SecurityGroupRule] = {}
    for rule in new:
        if known.setdefault(permissions.meaning(rule), rule) is not rule:
            raise Refusal.RULE_TWICE.error()
    for rule in group.rules:
        if rule.is_egress is is_egress and permissions.meaning(rule) in known:
            raise Refusal.RULE_DUPLICATE.error(rule=permissions.shown(rule))
    changed = msgspec.structs.replace(group, rules=(*group.rules, *new))
    check_weight(draft, changed, lists_of(draft, changed))
    draft.change(changed)
    _keep_lists(draft, group.vpc_id)
    return new


def revoke(
    draft: Draft, group_id: str, requests: Sequence[RuleRequest], *, is_egress: bool
) -> None:
    """Those rules, whatever their descriptions; InvalidPermission.NotFound and none if one is
    missing."""
    group = draft.find(SecurityGroup, group_id)
    if not requests:
        raise Refusal.NO_RULES.error()
    wanted = {
        permissions.meaning(permissions.canonical(request, "", is_egress=is_egress))
        for request in requests
    }
    gone = {
        rule.security_group_rule_id
        for rule in group.rules
        if rule.is_egress is is_egress and permissions.meaning(rule) in wanted
    }
    if len(gone) != len(wanted):
        raise Refusal.RULE_NOT_FOUND.error()
    _without(draft, group, gone)


def revoke_ids(draft: Draft, group_id: str, rule_ids: Collection[str], *, is_egress: bool) -> None:
    """The rules of those ids; none if one is not of that group and direction."""
    group = draft.find(SecurityGroup, group_id)
    if not rule_ids:
        raise Refusal.NO_RULES.error()
    known = {r.security_group_rule_id for r in group.rules if r.is_egress is is_egress}
    for id in rule_ids:
        if id not in known:
            raise Refusal.RULE_ID_NOT_FOUND.error(id=id)
    _without(draft, group, rule_ids)


def describe_rules(
    draft: Draft, group_id: str, descriptions: Mapping[str, str | None]
) -> SecurityGroup:
    """UpdateSecurityGroupRuleDescriptionsIngress and ...Egress, by rule id. No packet notices."""
    group = draft.find(SecurityGroup, group_id)
    known = {rule.security_group_rule_id: rule for rule in group.rules}
    for id, text in descriptions.items():
        if id not in known:
            raise Refusal.RULE_ID_NOT_FOUND.error(id=id)
        description = permissions.checked_description(text)
        known[id] = msgspec.structs.replace(known[id], description=description)
    return draft.change(msgspec.structs.replace(group, rules=tuple(known.values())))


def check_weight(draft: Draft, group: SecurityGroup, lists: Mapping[str, PrefixList]) -> None:
    """Raises RulesPerSecurityGroupLimitExceeded."""
    most = draft.region.limits.rules_per_group
    for family in FAMILIES:
        for is_egress in (False, True):
            weight = permissions.weight(group.rules, family, is_egress=is_egress, lists=lists)
            if weight > most:
                raise Refusal.RULE_LIMIT.error()


def lists_of(draft: Draft, group: SecurityGroup) -> dict[str, PrefixList]:
    """The prefix lists that its rules name, as the region has them."""
    ids = {rule.prefix_list_id for rule in group.rules if rule.prefix_list_id is not None}
    return {id: draft.find(PrefixList, id) for id in ids}


def forget_list(draft: Draft, vpc_id: str, prefix_list_id: str) -> None:
    """Remove the VPC's copy."""
    draft.erase(vpc_prefix(vpc_id, PrefixList) + prefix_list_id)


def _keep_lists(draft: Draft, vpc_id: str) -> None:
    """The VPC has a copy of each prefix list that a group of it names, and of no other."""
    named: dict[str, PrefixList] = {}
    for group in draft.all(SecurityGroup, vpc_id).values():
        for rule in group.rules:
            if (id := rule.prefix_list_id) is not None and id not in named:
                named[id] = draft.find(PrefixList, id)
    copies = draft.all(PrefixList, vpc_id)
    for id in copies.keys() - named.keys():
        forget_list(draft, vpc_id, id)
    for id, wanted in named.items():
        if copies.get(id) != wanted:
            draft.save(vpc_prefix(vpc_id, PrefixList) + id, wanted)


def _rule(
    draft: Draft, group: SecurityGroup, request: RuleRequest, is_egress: bool
) -> SecurityGroupRule:
    tagged = msgspec.structs.replace(request, tags=checked_tags(request.tags))
    rule = permissions.canonical(tagged, draft.mint("sgr"), is_egress=is_egress)
    if rule.referenced_group_id is not None:
        _check_reference(draft, group, rule.referenced_group_id)
    if rule.prefix_list_id is not None:
        draft.find(PrefixList, rule.prefix_list_id)
    return rule


def _check_reference(draft: Draft, group: SecurityGroup, referenced: str) -> None:
    if referenced != group.group_id:
        other = draft.find(SecurityGroup, referenced)
        if other.vpc_id != group.vpc_id:
            raise Refusal.GROUP_ELSEWHERE.error()


def _without(draft: Draft, group: SecurityGroup, gone: Collection[str]) -> None:
    draft.touch(group.vpc_id)
    left = tuple(rule for rule in group.rules if rule.security_group_rule_id not in gone)
    draft.change(msgspec.structs.replace(group, rules=left))
    _keep_lists(draft, group.vpc_id)


# Making one --------------------------------------------------------------------------------


def add_default(draft: Draft, vpc: Vpc, group_id: str) -> SecurityGroup:
    """The group that an interface gets that asks for none."""
    itself = RuleRequest(ip_protocol=ANY, referenced_group_id=group_id)
    description = "default VPC security group"
    return _add(draft, vpc, group_id, DEFAULT, description, (itself,), ())


def _add(
    draft: Draft,
    vpc: Vpc,
    group_id: str,
    name: str,
    description: str,
    ingress: Iterable[RuleRequest],
    tags: tuple[Tag, ...],
) -> SecurityGroup:
    egress = (_ALL_IPV4, _ALL_IPV6) if vpc.ipv6_cidr_block is not None else (_ALL_IPV4,)
    rules = [permissions.canonical(r, draft.mint("sgr"), is_egress=False) for r in ingress]
    rules += [permissions.canonical(r, draft.mint("sgr"), is_egress=True) for r in egress]
    live = {other.index for other in draft.all(SecurityGroup, vpc.vpc_id).values()}
    return draft.add(
        SecurityGroup(
            group_id=group_id,
            vpc_id=vpc.vpc_id,
            group_name=name,
            description=description,
            index=indexes.take_index(draft, vpc.vpc_id, "group", live),
            rules=tuple(rules),
            created_at=draft.now,
            tags=tags,
        )
    )


def _checked_name(text: str) -> str:
    name = text.rstrip(" ")  # EC2 trims
    if not name or not TEXT.fullmatch(name):
        raise Refusal.GROUP_NAME.error(name=text)
    if name.lower().startswith("sg-"):
        raise Refusal.GROUP_NAME_RESERVED.error()
    if name.lower() == DEFAULT:
        raise Refusal.GROUP_NAME_DEFAULT.error()
    return name


def _check_count(draft: Draft, others: Mapping[str, SecurityGroup]) -> None:
    limits = draft.region.limits
    if limits.groups_per_vpc is not None and len(others) >= limits.groups_per_vpc:
        raise Refusal.GROUP_LIMIT.error()
    if limits.groups is not None:
        draft.touch_region()
        vpcs = draft.region_ledger().vpcs
        if sum(len(draft.all(SecurityGroup, vpc)) for vpc in vpcs) >= limits.groups:
            raise Refusal.GROUP_LIMIT.error()


def _default_vpc(draft: Draft) -> Vpc:
    for vpc_id in draft.region_ledger().vpcs:
        vpc = draft.vpc(vpc_id)
        if vpc.is_default:
            return vpc
    raise Refusal.MISSING.error(parameter="vpcId")
