"""Why does this packet pass, or not, and what would change that: both directions, in words.

An `Explanation` is a verdict on a packet and on its answer, and one line of advice about the step
that decides. The advice changes that step only: what comes after it is seen by asking again.
Rendering is the command line's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_network

from sandbox.model.vpc import ACL_LAST, AclEntry, Network, NetworkInterface, Route
from sandbox.network.matching import (
    ICMP,
    ICMPV6,
    PORTS_OF,
    PROTOCOL_NAMES,
    Address,
    Packet,
)
from sandbox.network.paths import AclCheck, Arrival, GroupCheck, Met
from sandbox.network.rules import Stage, Step, direction, live_gateways, private_addresses
from sandbox.network.verdict import Policy, Verdict

EPHEMERAL = range(1024, 65536)
"""The ports of clients that rules of ACLs should leave open. (VPC User Guide, "Ephemeral ports")"""

EPHEMERAL_PORT = 49152
"""A client's port if none is given: in the range of every system, and the first of IANA's."""

ACL_STEP = 100
"""Between numbers of entries, so that others fit in. (VPC User Guide, "Network ACL rules")"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    packet: Packet
    verdict: Verdict
    reply: Verdict
    """Of the first answer; without steps where nothing is asked about it."""
    advice: str | None
    """A command, or what else would change the answer. None: it passes, or nothing would."""

    @property
    def allowed(self) -> bool:
        return self.verdict.allowed and self.reply.allowed

    @property
    def deciding(self) -> Step:
        """What denies the packet or, if nothing does, its answer; else the last that allows it."""
        if self.verdict.allowed and not self.reply.allowed:
            return self.reply.steps[-1]
        return self.verdict.steps[-1]


def explain(
    network: Network, packet: Packet, *, private_destinations: Iterable[str] = ()
) -> Explanation:
    """A tcp or udp packet without a source port is given `EPHEMERAL_PORT`."""
    if packet.protocol in PORTS_OF and packet.source_port == 0:
        packet = replace(packet, source_port=EPHEMERAL_PORT)
    policy = Policy(network, private_destinations=private_destinations)
    there, back = list(policy.trace(packet)), list(policy.trace_reply(packet))
    verdict, reply = policy.decide(packet), policy.reply(packet)
    advice = None
    if not verdict.allowed:
        is_behind_nat = any(step.stage is Stage.NAT_GATEWAY for step in verdict.steps)
        if verdict.steps[-1].stage is not Stage.ROUTE or policy.is_carried(packet):
            advice = _advice(network, packet, *there[-1], is_behind_nat=is_behind_nat)
    elif not reply.allowed:
        advice = _advice(network, packet, *back[-1], is_answer=True)
    return Explanation(packet=packet, verdict=verdict, reply=reply, advice=advice)


def _advice(
    network: Network,
    packet: Packet,
    met: Met,
    step: Step,
    *,
    is_behind_nat: bool = False,
    is_answer: bool = False,
) -> str | None:
    if isinstance(met, GroupCheck):
        return _allow_in_group(network, met)
    if isinstance(met, AclCheck):
        return _allow_in_acl(network, met, step, is_answer=is_answer)
    if isinstance(met, Arrival):
        return _route_to(network, met.packet, step, is_public=True)
    if step.stage is Stage.ROUTE:
        sender = _owner(network, packet.source)
        is_public = is_behind_nat or packet.source.version == 6 or _has_public_ip(sender)
        return _route_to(network, packet, step, is_public=is_public)
    if step.stage is Stage.INTERNET_GATEWAY and step.subject == network.vpc.vpc_id:
        return _attach(network)
    if step.stage is Stage.INTERNET_GATEWAY and step.subject in network.interfaces:
        return "give the task a public address: --public-ip"
    return None


def _allow_in_group(network: Network, check: GroupCheck) -> str:
    group_id = check.interface.group_ids[0]
    way = direction(check.is_egress)
    peer = _cidr(check.packet.destination if check.is_egress else check.packet.source)
    source = None if check.is_egress else _owner(network, check.packet.source)
    if source is not None:
        peer = f"--from-group {source.group_ids[0]}"
    return f"sandbox sg allow {group_id} --{way} {_traffic(check.packet)} {peer}"


def _allow_in_acl(network: Network, check: AclCheck, step: Step, *, is_answer: bool) -> str | None:
    number = _free_number(network, check, step)
    if number is None:
        return None
    way = direction(check.is_egress)
    peer = _cidr(check.packet.destination if check.is_egress else check.packet.source)
    traffic = _traffic(check.packet, is_answer=is_answer)
    return f"sandbox acl allow {step.subject} {number} --{way} {traffic} {peer}"


def _free_number(network: Network, check: AclCheck, step: Step) -> int | None:
    """Before the entry that denies: what is earlier did not match and need not be passed."""
    taken = {
        entry.rule_number
        for entry in network.network_acls[step.subject].entries
        if entry.is_egress is check.is_egress
    }
    if isinstance(step.rule, AclEntry):
        before = step.rule.rule_number
    else:
        before = ACL_LAST
        tidy = (max(taken, default=0) // ACL_STEP + 1) * ACL_STEP
        if tidy < ACL_LAST:
            return tidy
    return next((number for number in range(before - 1, 0, -1) if number not in taken), None)


def _route_to(network: Network, packet: Packet, step: Step, *, is_public: bool) -> str:
    """By the internet gateway; for who has no public address by a NAT gateway, if there is one."""
    if network.internet_gateway is None:
        return _attach(network)
    target = network.internet_gateway.internet_gateway_id
    if not is_public:
        target = next((gateway for gateway in live_gateways(network) if gateway != target), target)
    if isinstance(step.rule, Route):
        return f"sandbox route replace {step.subject} {step.rule.destination} {target}"
    everywhere = "::/0" if packet.destination.version == 6 else "0.0.0.0/0"
    return f"sandbox route add {step.subject} {everywhere} {target}"


def _attach(network: Network) -> str:
    return f"attach an internet gateway to {network.vpc.vpc_id}"


def _traffic(packet: Packet, *, is_answer: bool = False) -> str:
    """Of an answer: to all ports of clients, since which one the next has, nobody knows."""
    name = PROTOCOL_NAMES.get(packet.protocol, str(packet.protocol))
    if is_answer and packet.protocol in PORTS_OF and packet.destination_port in EPHEMERAL:
        return f"--proto {name} --port {EPHEMERAL[0]}-{EPHEMERAL[-1]}"
    if packet.protocol in (*PORTS_OF, ICMP, ICMPV6):
        return f"--proto {name} --port {packet.selector}"
    return f"--proto {name}"


def _cidr(address: Address) -> str:
    return f"--cidr {ip_network(address)}"


def _owner(network: Network, address: Address) -> NetworkInterface | None:
    """Whose private address it is."""
    enis = network.interfaces.values()
    return next((eni for eni in enis if str(address) in private_addresses(eni)), None)


def _has_public_ip(interface: NetworkInterface | None) -> bool:
    return interface is not None and interface.public_ip is not None
