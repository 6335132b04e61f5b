"""The small numbers by which the kernel knows groups and ACLs of a VPC.

A connection that a group let in carries the group's index in its mark as long as it is tracked. So
the index of a deleted group is retired until the data plane has flushed those connections and says
so (`release_index`); then it goes behind all others. ACLs likewise: their chains have to be gone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Literal

from sandbox.control.vpc import turns
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.store.vpc_rows import VpcLedger

INDEXES: Final = range(1, 1 << 16)
"""Half a connection mark; 0 is a connection that no group let in."""

Indexed = Literal["group", "acl"]


def take_index(draft: Draft, vpc_id: str, kind: Indexed, live: Collection[int]) -> int:
    """`live` are those of the kind that there are in this VPC."""
    ledger = draft.ledger(vpc_id)
    turn = ledger.group_indexes if kind == "group" else ledger.acl_indexes
    retired = _retired(ledger, kind)
    found = turns.take(turn, INDEXES, lambda index: index in live or index in retired)
    if found is None:
        raise Refusal.NO_INDEX.error(count=len(retired), vpc=vpc_id)
    index, turn = found
    draft.touch(vpc_id, **{f"{kind}_indexes": turn})
    return index


def retire_index(draft: Draft, vpc_id: str, kind: Indexed, index: int) -> None:
    retired = _retired(draft.ledger(vpc_id), kind)
    if len(retired) >= draft.region.limits.retired_indexes:
        raise Refusal.NO_INDEX.error(count=len(retired), vpc=vpc_id)
    draft.touch(vpc_id, **{f"retired_{kind}s": (*retired, index)})


def retired_indexes(draft: Draft, vpc_id: str, kind: Indexed) -> tuple[int, ...]:
    """What the data plane has to flush and then to release, the oldest first."""
    return _retired(draft.ledger(vpc_id), kind)


def release_index(draft: Draft, vpc_id: str, kind: Indexed, index: int) -> None:
    """Nothing in the kernel carries it any more. Idempotent, also when the VPC is gone."""
    if vpc_id not in draft.region_ledger().vpcs:
        return
    ledger = draft.ledger(vpc_id)
    retired = _retired(ledger, kind)
    if index not in retired:
        return
    turn = ledger.group_indexes if kind == "group" else ledger.acl_indexes
    changes: dict[str, object] = {
        f"retired_{kind}s": tuple(other for other in retired if other != index),
        f"{kind}_indexes": turns.give_back(turn, index),
    }
    draft.touch(vpc_id, **changes)


def _retired(ledger: VpcLedger, kind: Indexed) -> tuple[int, ...]:
    return ledger.retired_groups if kind == "group" else ledger.retired_acls
