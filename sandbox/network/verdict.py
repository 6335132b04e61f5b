"""Would this packet pass, and what decides: the one evaluator of routes, ACLs and groups.

It serves revocation (which tracked flows would no longer be admitted), `sandbox explain`, and the
tests, which hold the kernel to it. It knows the records of one VPC and one packet, the first of a
flow that nobody tracks yet; nothing here touches the system.

What a packet meets is `sandbox.network.paths`', what each of those says `sandbox.network.rules`'.
Groups are stateful: an answer does not meet them. ACLs are not: `Policy.reply` says what becomes of
it. (VPC User Guide, "Compare security groups and network ACLs")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from sandbox.model.vpc import Network, NetworkInterface, SecurityGroup, SecurityGroupRule
from sandbox.network.matching import PORTS_OF, Packet
from sandbox.network.paths import AclCheck, Arrival, GroupCheck, Met, Paths
from sandbox.network.rules import Acls, Groups, Rule, Stage, Step

__all__ = [
    "Packet",
    "Policy",
    "Rule",
    "Stage",
    "Step",
    "Verdict",
    "admitting",
    "decide",
    "is_tracked",
]


class Verdict(msgspec.Struct, frozen=True):
    allowed: bool
    steps: tuple[Step, ...]
    """In the packet's order; the last one denied it, if any did."""


def decide(network: Network, packet: Packet) -> Verdict:
    """For more than a few packets make one `Policy`."""
    return Policy(network).decide(packet)


def admitting(
    network: Network, interface: NetworkInterface, packet: Packet, *, is_egress: bool
) -> tuple[SecurityGroup, SecurityGroupRule] | None:
    """As `Policy.admitting`."""
    return Policy(network).admitting(interface, packet, is_egress=is_egress)


def is_tracked(
    network: Network, interface: NetworkInterface, packet: Packet, is_egress: bool
) -> bool:
    """As `Policy.is_tracked`."""
    return Policy(network).is_tracked(interface, packet, is_egress)


class Policy:
    """A network prepared for many packets: 8 to 40 us each, 5 for `admitting`.

    It is of one moment: after a change, make another. `private_destinations` are blocks of
    `paths.NOT_CARRIED` that the internet gateway carries here all the same.
    """

    def __init__(self, network: Network, *, private_destinations: Iterable[str] = ()) -> None:
        self._groups = Groups(network)
        self._acls = Acls(network)
        self._paths = Paths(network, private_destinations)

    def decide(self, packet: Packet) -> Verdict:
        return _verdict(self.trace(packet))

    def reply(self, packet: Packet) -> Verdict:
        """What becomes of the first answer, supposing that `packet` itself gets through.

        Without steps where nothing is asked: inside a subnet, and for a packet that has no answer
        or no way at all. A route counts where the answer goes out by the internet gateway: into a
        subnet that has none, packets come by a public address, but no answer leaves.
        """
        return _verdict(self.trace_reply(packet))

    def trace(self, packet: Packet) -> Iterator[tuple[Met, Step]]:
        """What the packet meets, with its form there, and what that says; until one denies."""
        for met in self._paths.of(packet):
            step = self._judge(met)
            yield met, step
            if not step.allowed:
                return

    def trace_reply(self, packet: Packet) -> Iterator[tuple[Met, Step]]:
        """The same of `reply`."""
        path = list(self._paths.of(packet))
        if not packet.has_reply or _is_dead_end(path[-1]):
            return
        for met in reversed(path):
            back = _way_back(met)
            if back is None:
                continue
            step = self._judge_reply(back)
            yield back, step
            if not step.allowed:
                return

    def is_carried(self, packet: Packet) -> bool:
        """Whether an internet gateway carries it, if a route leads there."""
        return self._paths.carries(packet)

    def admitting(
        self, interface: NetworkInterface, packet: Packet, *, is_egress: bool
    ) -> tuple[SecurityGroup, SecurityGroupRule] | None:
        """The first rule of the interface's groups, in their order, that admits the packet.

        `packet` as the interface sends or gets it, or as connection tracking has it in the original
        direction: only the other side's address is looked at.
        """
        return self._groups.admitting(interface, packet, is_egress=is_egress)

    def is_tracked(self, interface: NetworkInterface, packet: Packet, is_egress: bool) -> bool:
        """Whether EC2 tracks the flow that `packet` began, so that it outlives its rule.

        Not tracked is TCP or UDP that a rule allows from or to everywhere, while another allows all
        of that protocol everywhere in the other direction; tracked all the same is what goes
        through a NAT gateway. (EC2 User Guide, "Security group connection tracking")
        """
        if packet.protocol not in PORTS_OF:
            return True
        if not self._groups.is_open_both_ways(interface, packet, is_egress=is_egress):
            return True
        return is_egress and self._paths.goes_through_nat(interface, packet)

    def _judge(self, met: Met) -> Step:
        if isinstance(met, GroupCheck):
            return self._groups.judge(met.interface, met.packet, is_egress=met.is_egress)
        if isinstance(met, AclCheck):
            return self._acls.judge(met.subnet_id, met.packet, is_egress=met.is_egress)
        if isinstance(met, Arrival):
            text = f"{met.gateway} brings it in to {met.packet.destination}"
            return Step(Stage.INTERNET_GATEWAY, True, met.gateway, None, text)
        return met

    def _judge_reply(self, met: AclCheck | Arrival) -> Step:
        if isinstance(met, AclCheck):
            return self._judge(met)
        return self._paths.way_out(met.interface.subnet_id, met.packet)


def _verdict(trace: Iterator[tuple[Met, Step]]) -> Verdict:
    steps = tuple(step for _, step in trace)
    return Verdict(not steps or steps[-1].allowed, steps)


def _way_back(met: Met) -> AclCheck | Arrival | None:
    """What the answer meets of this: groups let it pass, gateways translate it back."""
    if isinstance(met, AclCheck):
        return AclCheck(met.subnet_id, met.packet.reply(), not met.is_egress)
    if isinstance(met, Arrival):
        return Arrival(met.gateway, met.interface, met.packet.reply())
    return None


def _is_dead_end(met: Met) -> bool:
    return isinstance(met, Step) and not met.allowed
