"""Tags that come and go on what there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.prefix_lists import tell_vpcs
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.task import Record
from sandbox.model.vpc import (
    DhcpOptions,
    ElasticAddress,
    InternetGateway,
    NatGateway,
    NetworkAcl,
    PrefixList,
    RouteTable,
    SecurityGroup,
    Subnet,
    Tag,
)

_KINDS: Mapping[str, type[Record]] = {
    "subnet": Subnet,
    "rtb": RouteTable,
    "acl": NetworkAcl,
    "sg": SecurityGroup,
    "igw": InternetGateway,
    "nat": NatGateway,
    "eipalloc": ElasticAddress,
    "dopt": DhcpOptions,
    "pl": PrefixList,
}


def create_tags(draft: Draft, resources: Sequence[str], tags: Iterable[Tag]) -> None:
    """A key that is there takes the new value."""
    new = checked_tags(tags)
    keys = {tag.key for tag in new}
    for id in resources:
        record, old = _tagged(draft, id)
        kept = (tag for tag in old if tag.key not in keys)
        _retag(draft, record, checked_tags((*kept, *new)))


def delete_tags(draft: Draft, resources: Sequence[str], keys: Collection[str]) -> None:
    """Those that are not there are not missed."""
    for id in resources:
        record, old = _tagged(draft, id)
        _retag(draft, record, tuple(tag for tag in old if tag.key not in keys))


def _tagged(draft: Draft, id: str) -> tuple[Record, tuple[Tag, ...]]:
    prefix = id.rpartition("-")[0]
    if prefix == "vpc":
        vpc = draft.vpc(id)
        return vpc, vpc.tags
    kind = _KINDS.get(prefix)
    if kind is None:
        raise Refusal.VALUE.error(value=id, parameter="resourceId", why="It cannot be tagged.")
    record = draft.find(kind, id)
    tags: tuple[Tag, ...] = getattr(record, "tags")  # noqa: B009
    return record, tags


def _retag(draft: Draft, record: Record, tags: tuple[Tag, ...]) -> None:
    changed = msgspec.structs.replace(record, tags=tags)
    draft.change(changed)
    if isinstance(changed, PrefixList):
        tell_vpcs(draft, changed)
