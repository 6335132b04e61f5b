"""How many flows each rule and each group has admitted, kept over reloads of the kernel's rules.

The rules of groups are only asked about the first packet of a flow (what is established is
accepted before them), so the packets that such a rule counted are the flows that it admitted. The
kernel counts from zero whenever it is given a chain (iptables-restore(8): without `--counters`),
so what it counted is read before a chain is replaced and added up here:

    read, fold, store  ->  replace the chain  ->  `restarted`, store

Flows that begin between the reading and the replacing, a few milliseconds, are not in the sum. A
crash between replacing and storing does no harm as long as it shows: a chain whose counters went
back, or whose rules are others than last time, has begun again.

What is counted has a name, its subject: a rule's id, or `admitted_by` for a group. The order of
subjects in each chain is the compiler's, who made the chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sandbox.errors import NetworkError
from sandbox.kernel.netfilter import Counter
from sandbox.model.task import Record

Layout = Mapping[str, Sequence[str | None]]
"""By chain, the subject of each of its rules, in order; None is not counted. A rule of a group may
have become several: then they have the same subject."""

Reading = Mapping[str, Mapping[str, int]]
"""By chain and subject, what the kernel has counted since it was given the chain."""


class Totals(Record, frozen=True, kw_only=True):
    """Of one VPC. Empty at first."""

    flows: Mapping[str, int] = {}
    """By subject, up to the last reading."""
    last: Mapping[str, Mapping[str, int]] = {}
    """That reading."""


def admitted_by(group_id: str, *, is_egress: bool) -> str:
    """The subject of all that a group admits in one direction: rules that have been revoked, too.

    It is counted where the group writes itself into the connection's mark.
    """
    return f"{group_id} {'egress' if is_egress else 'ingress'}"


def reading(counted: Mapping[str, Sequence[Counter]], layout: Layout) -> Reading:
    """`counted` is what `Iptables.counters` found in the table.

    NetworkError if a chain is not what `layout` says: somebody else has changed it, or it has not
    been loaded yet. Then nothing is known about it, and the last reading remains the last one.
    """
    return {
        chain: _of_chain(chain, counted.get(chain, ()), subjects)
        for chain, subjects in layout.items()
    }


def _of_chain(
    chain: str, counters: Sequence[Counter], subjects: Sequence[str | None]
) -> Mapping[str, int]:
    if len(counters) != len(subjects):
        raise NetworkError(f"chain {chain} has {len(counters)} rules, not {len(subjects)}")
    flows: dict[str, int] = {}
    for counter, subject in zip(counters, subjects, strict=True):
        if subject is not None:
            flows[subject] = flows.get(subject, 0) + counter.packets
    return flows


def fold(totals: Totals, now: Reading) -> Totals:
    """With what was counted since the last reading. Chains that `now` lacks stay as they were."""
    flows = dict(totals.flows)
    for chain, counted in now.items():
        last = totals.last.get(chain, {})
        if _has_restarted(last, counted):
            last = {}
        for subject, count in counted.items():
            flows[subject] = flows.get(subject, 0) + count - last.get(subject, 0)
    return Totals(flows=flows, last={**totals.last, **now})


def _has_restarted(last: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Only a chain that was replaced has other rules; all of its counters begin again together."""
    return last.keys() != now.keys() or any(count < last[rule] for rule, count in now.items())


def restarted(totals: Totals, chains: Iterable[str]) -> Totals:
    """After these chains were replaced or have gone; what was not read before is lost."""
    gone = frozenset(chains)
    last = {chain: counted for chain, counted in totals.last.items() if chain not in gone}
    return Totals(flows=totals.flows, last=last)


def forgotten(totals: Totals, subjects: Iterable[str]) -> Totals:
    """Without the sums of rules and groups that are no more, and whose chains are gone."""
    gone = frozenset(subjects)
    flows = {subject: count for subject, count in totals.flows.items() if subject not in gone}
    return Totals(flows=flows, last=totals.last)
