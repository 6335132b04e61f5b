"""Prefix lists: blocks under one id, which rules of groups name.

A list is the region's. Each VPC whose groups name it has a copy, which changes with it in the same
transaction. How many entries it may have is fixed at any time (`max_entries`): so many it counts
for in each group. (VPC User Guide, "Work with customer-managed prefix lists")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from sandbox.control.vpc import cidr, groups, turns
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.indexes import INDEXES
from sandbox.control.vpc.permissions import Family
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import PrefixList, SecurityGroup, Tag
from sandbox.store.vpc_rows import VpcLedger, ledger_key, vpc_prefix

NAME_MOST: Final = 255


def create_prefix_list(
    draft: Draft,
    prefix_list_name: str,
    max_entries: int,
    entries: Iterable[str] = (),
    *,
    address_family: Family = "IPv4",
    tags: Iterable[Tag] = (),
) -> PrefixList:
    name = _checked_name(prefix_list_name)
    region = draft.region_ledger()
    others = draft.all_of_region(PrefixList).values()
    if len(others) >= draft.region.limits.prefix_lists:
        raise Refusal.PREFIX_LIST_LIMIT.error()
    _check_size(draft, max_entries)
    live = {other.index for other in others}
    found = turns.take(region.prefix_list_indexes, INDEXES, live.__contains__)
    assert found is not None, "there are more indexes than prefix lists may be"
    index, turn = found
    draft.touch_region(prefix_list_indexes=turn)
    prefix_list = PrefixList(
        prefix_list_id=draft.mint("pl"),
        prefix_list_name=name,
        address_family=address_family,
        max_entries=max_entries,
        entries=_checked_entries(entries, address_family, max_entries),
        index=index,
        created_at=draft.now,
        tags=checked_tags(tags),
    )
    return draft.add(prefix_list)


def modify_prefix_list(
    draft: Draft,
    prefix_list_id: str,
    *,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    max_entries: int | None = None,
    prefix_list_name: str | None = None,
    current_version: int | None = None,
) -> PrefixList:
    """A new version. What is removed must be there; what is added and there stays.

    More entries than a group has room for are refused; `current_version`, if given, must be it.
    """
    old = draft.find(PrefixList, prefix_list_id)
    if current_version is not None and current_version != old.version:
        raise Refusal.VERSION_MISMATCH.error(
            id=prefix_list_id, version=old.version, expected=current_version
        )
    size = old.max_entries if max_entries is None else max_entries
    _check_size(draft, size)
    gone = {_block(text, old.address_family) for text in remove}
    if missing := gone - set(old.entries):
        why = "The prefix list has no such entry."
        raise Refusal.VALUE.error(value=min(missing), parameter="RemoveEntry.Cidr", why=why)
    left = (entry for entry in old.entries if entry not in gone)
    new = msgspec.structs.replace(
        old,
        prefix_list_name=(
            old.prefix_list_name if prefix_list_name is None else _checked_name(prefix_list_name)
        ),
        max_entries=size,
        entries=_checked_entries((*left, *add), old.address_family, size),
        version=old.version + 1,
    )
    draft.change(new)
    for vpc_id in tell_vpcs(draft, new):
        for group in draft.all(SecurityGroup, vpc_id).values():
            if any(rule.prefix_list_id == prefix_list_id for rule in group.rules):
                groups.check_weight(draft, group, groups.lists_of(draft, group))
    return new


def delete_prefix_list(draft: Draft, prefix_list_id: str) -> None:
    """Refused while a group names it."""
    prefix_list = draft.find(PrefixList, prefix_list_id)
    if _vpcs_with(draft, prefix_list_id):
        raise Refusal.PREFIX_LIST_IN_USE.error(id=prefix_list_id)
    draft.remove(prefix_list)
    turn = turns.give_back(draft.region_ledger().prefix_list_indexes, prefix_list.index)
    draft.touch_region(prefix_list_indexes=turn)


def tell_vpcs(draft: Draft, prefix_list: PrefixList) -> list[str]:
    """Each VPC that has a copy gets this one; returns them."""
    vpcs = _vpcs_with(draft, prefix_list.prefix_list_id)
    for vpc_id in vpcs:
        draft.save(vpc_prefix(vpc_id, PrefixList) + prefix_list.prefix_list_id, prefix_list)
    return vpcs


def _vpcs_with(draft: Draft, prefix_list_id: str) -> list[str]:
    """Void if a group of any VPC changes its rules meanwhile."""
    found = []
    for vpc_id in draft.region_ledger().vpcs:
        draft.get(ledger_key(vpc_id), VpcLedger)
        if draft.get(vpc_prefix(vpc_id, PrefixList) + prefix_list_id, PrefixList) is not None:
            found.append(vpc_id)
    return found


def _checked_name(text: str) -> str:
    """Amazon's own lists are named com.amazonaws."""
    is_own = not text.startswith("com.amazonaws")
    if not 1 <= len(text) <= NAME_MOST or not text.isprintable() or not is_own:
        why = f"It has 1 to {NAME_MOST} characters and does not begin with com.amazonaws."
        raise Refusal.VALUE.error(value=text, parameter="PrefixListName", why=why)
    return text


def _check_size(draft: Draft, max_entries: int) -> None:
    most = draft.region.limits.entries_per_prefix_list
    if not 1 <= max_entries <= most:
        why = f"It is 1 to {most}."
        raise Refusal.VALUE.error(value=max_entries, parameter="MaxEntries", why=why)


def _checked_entries(entries: Iterable[str], family: Family, max_entries: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for text in entries:
        found[_block(text, family)] = None
        if len(found) > max_entries:
            raise Refusal.PREFIX_LIST_ENTRY_LIMIT.error(max_entries=max_entries, count=len(found))
    return tuple(found)


def _block(text: str, family: Family) -> str:
    if family == "IPv6":
        return str(cidr.ipv6_block(text, "Cidr"))
    return str(cidr.ipv4_block(text, "Cidr"))
