"""Chains that drop what a group or an ACL refuses, and log it for the flow log.

Rules that refuse go to one of two chains: what an interface may not send, and what it may not get.
Each logs with a prefix that says which one it was, and whether the packet was of a connection (only
an ACL refuses those). Logging has a rate for each interface, so that who is refused all the time
costs little; what exceeds it is logged once a second under a prefix of its own, so that the flow
log can tell that there was more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sandbox.kernel.netfilter import Chain, Rule
from sandbox.kernel.packetlog import log_rule
from sandbox.model.vpc import Vpc

DROP_EGRESS, DROP_INGRESS = "drop-egress", "drop-ingress"
NEW, ESTABLISHED, MORE = " new", " established", "-more"
"""What follows the chain's name in a prefix."""
REJECTS_A_SECOND = 100
REJECTS_BURST = 500
"""Logged for each interface; of more than these only that there were more."""


def log_group(vpc: Vpc) -> int:
    return vpc.number & 0xFFFF


def drop_chains(group: int | None) -> tuple[Chain, ...]:
    """Chains to go to (`-g`) with what a group or an ACL refuses to send, and to deliver.

    In the mangle table. None: the kernel cannot log; then packets are dropped just the same, and
    only the counters of these chains tell how many.
    """
    return (*_drop_chains(DROP_EGRESS, "srcip", group), *_drop_chains(DROP_INGRESS, "dstip", group))


def _drop_chains(name: str, mode: str, group: int | None) -> Iterator[Chain]:
    drop: Rule = ("-j", "DROP")
    if group is None:
        yield Chain(name, (drop,))
        return

    def rate(which: str, packets: int, burst: int, table: str) -> Rule:
        return (
            *("-m", "hashlimit", f"--hashlimit-{which}", f"{packets}/sec"),
            *("--hashlimit-burst", str(burst), "--hashlimit-mode", mode),
            *("--hashlimit-name", table),
        )

    more = name + MORE
    established = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED")
    new = ("-m", "conntrack", "!", "--ctstate", "ESTABLISHED,RELATED")
    yield Chain(
        name,
        (
            (*rate("above", REJECTS_A_SECOND, REJECTS_BURST, name), "-g", more),
            log_rule(group, name + NEW, *new),
            log_rule(group, name + ESTABLISHED, *established),
            drop,
        ),
    )
    yield Chain(more, (log_rule(group, more, *rate("upto", 1, 1, more)), drop))


class Refusal(NamedTuple):
    is_egress: bool
    is_established: bool
    """The packet is of a connection that is tracked."""
    stands_for_more: bool
    """That are not logged."""


def refusal(prefix: str) -> Refusal | None:
    """What the prefix of a logged packet says; None: the rule is none of `drop_chains`."""
    return _REFUSALS.get(prefix)


_REFUSALS = {
    chain + what: Refusal(chain == DROP_EGRESS, what == ESTABLISHED, what == MORE)
    for chain in (DROP_EGRESS, DROP_INGRESS)
    for what in (NEW, ESTABLISHED, MORE)
}
