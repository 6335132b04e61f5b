"""The way of a packet through a VPC: what it meets, in order, if every check lets it pass.

    interface --- its groups' egress --- ACL of its subnet --- route table -+- local ------+
                                                                            |              |
                  NAT gateway: ACLs of its own subnet, its own routes ------+              |
                                                                            |              |
                  internet gateway: private address becomes the public one -+              |
                                                                            v              v
    interface --- its groups' ingress --- ACL of its subnet ---- in by the gateway --- from within

That is the order of AWS (VPC Reachability Analyzer shows paths so). What is for a public address of
the same VPC leaves by the internet gateway and comes back as anybody's would, with its
public source. An ACL is met only where the border of a subnet is crossed. The resolver and the
task's metadata are met before all of this; a packet of an interface to itself meets nothing.

Sources: VPC User Guide, "Route tables", "Internet gateways", "NAT gateways", "Network ACLs", "DNS
attributes for your VPC".

Ours alone: a source that is no interface's is somebody outside, who writes a public address. There
are no packets with a source that their interface does not have: the kernel drops them unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from sandbox.model.vpc import (
    INSTANCE_METADATA,
    METADATA,
    RESOLVER,
    NatGateway,
    Network,
    NetworkInterface,
    resolver_address,
    router_address,
)
from sandbox.network.matching import ICMP, PORTS_OF, TCP, UDP, Address, Addresses, Packet, key_of
from sandbox.network.rules import RouteTables, Stage, Step, private_addresses, target_of

DNS_PORT = 53
METADATA_PORT = 80

LINK_LOCAL = ("169.254.0.0/16", "fe80::/10")
NOT_UNICAST = (
    *("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32"),
    *("::/127", "ff00::/8"),
)
"""A VPC carries neither broadcast nor multicast, and these are no host's. (RFC 6890)"""

NOT_CARRIED = (
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    # The platform's own address in the virtual machines of another cloud: it hands out secrets.
    "168.63.129.16/32",
    "fc00::/7",
)
"""An internet gateway leads to the internet, not to the networks of the host (RFC 1918, RFC 6598,
RFC 4193)."""

_PRIVATE = Addresses.of_blocks(NOT_CARRIED)
_LINK_LOCAL = Addresses.of_blocks(LINK_LOCAL)
_NOT_UNICAST = Addresses.of_blocks(NOT_UNICAST)


class GroupCheck(NamedTuple):
    interface: NetworkInterface
    packet: Packet
    is_egress: bool


class AclCheck(NamedTuple):
    """`packet` as it is at the border of this subnet, inside of all gateways."""

    subnet_id: str
    packet: Packet
    is_egress: bool


class Arrival(NamedTuple):
    """In by the internet gateway; `packet` is already to the private address."""

    gateway: str
    interface: NetworkInterface
    packet: Packet


Met = Step | GroupCheck | AclCheck | Arrival


class Paths:
    """Of one network at one moment."""

    def __init__(self, network: Network, private_destinations: Iterable[str]) -> None:
        """`private_destinations` are blocks of `NOT_CARRIED` that are carried all the same."""
        self._network = network
        vpc = network.vpc
        self._route_tables = RouteTables(network)
        vpc_blocks = list(filter(None, (vpc.cidr_block, vpc.ipv6_cidr_block)))
        self._vpc_blocks = Addresses.of_blocks(vpc_blocks)
        # A private source is none of these: the host's own network is beyond the gateway, too.
        self._never_outside = Addresses.of_blocks((*vpc_blocks, *LINK_LOCAL, *NOT_UNICAST))
        self._resolver = str(resolver_address(vpc.cidr_block))
        self._routers = frozenset(
            str(router_address(subnet.cidr_block)) for subnet in network.subnets.values()
        )
        self._services = dict(_services(network))
        self._owners: dict[int, NetworkInterface] = {}
        self._source_steps: dict[int, Step] = {}
        for eni, interface in network.interfaces.items():
            for address in private_addresses(interface):
                text = f"{address} is the address of {eni}"
                self._owners[key_of(address)] = interface
                self._source_steps[key_of(address)] = Step(
                    Stage.SOURCE_CHECK, True, eni, None, text
                )
        self._reachable = dict(_reachable(network))
        self._public_blocks = Addresses.of_blocks(
            subnet.public_block for subnet in network.subnets.values() if subnet.public_block
        )
        self._nat_gateways = {
            nat.network_interface_id: nat.nat_gateway_id for nat in network.nat_gateways.values()
        }
        self._private_destinations = Addresses.of_blocks(private_destinations)

    def of(self, packet: Packet) -> Iterator[Met]:
        """All that the packet meets if every check lets it pass, in order.

        Where there is no way, whatever groups and ACLs say, the last is a Step that denies.
        """
        sender = self._owners.get(packet.source_key)
        if sender is None:
            yield from self._from_outside(packet)
        else:
            yield from self._from_interface(sender, packet)

    def way_out(self, subnet_id: str, packet: Packet) -> Step:
        """The route, which has to lead to the internet gateway itself."""
        step = self._route_tables.judge(subnet_id, packet)
        gateway = self._network.internet_gateway
        if step.allowed and (gateway is None or target_of(step) != gateway.internet_gateway_id):
            text = f"{step.text}, which is no internet gateway"
            return Step(Stage.ROUTE, False, step.subject, step.rule, text)
        return step

    def carries(self, packet: Packet) -> bool:
        """Whether an internet gateway carries packets to there at all."""
        destination = packet.destination_key
        return destination not in _PRIVATE or destination in self._private_destinations

    def goes_through_nat(self, interface: NetworkInterface, packet: Packet) -> bool:
        route = self._route_tables.judge(interface.subnet_id, packet)
        return route.allowed and target_of(route) in self._network.nat_gateways

    def _from_interface(self, sender: NetworkInterface, packet: Packet) -> Iterator[Met]:
        eni = sender.network_interface_id
        nat_id = self._nat_gateways.get(eni)
        if nat_id is not None:
            text = f"{nat_id} is a NAT gateway and begins nothing itself"
            yield Step(Stage.SOURCE_CHECK, False, nat_id, None, text)
            return
        yield self._source_steps[packet.source_key]
        receiver = self._owners.get(packet.destination_key)
        if (
            receiver is None
            or receiver is sender
            or receiver.network_interface_id in self._nat_gateways
        ):
            end = self._end(sender, receiver, packet)
            if end is not None:
                yield end
                return
        yield GroupCheck(sender, packet, True)
        crosses = receiver is None or receiver.subnet_id != sender.subnet_id
        if crosses:
            yield AclCheck(sender.subnet_id, packet, True)
        route = self._route_tables.judge(sender.subnet_id, packet)
        yield route
        if receiver is not None:
            if crosses:
                yield AclCheck(receiver.subnet_id, packet, False)
            yield GroupCheck(receiver, packet, False)
        elif route.allowed:
            yield from self._beyond(sender, packet, target_of(route) or "")

    def _beyond(self, sender: NetworkInterface, packet: Packet, target: str) -> Iterator[Met]:
        nat = self._network.nat_gateways.get(target)
        if nat is not None:
            yield from self._through_nat(nat, packet)
        else:
            eni = sender.network_interface_id
            yield from self._to_internet(target, packet, sender.public_ip, eni)

    def _end(
        self, sender: NetworkInterface, receiver: NetworkInterface | None, packet: Packet
    ) -> Step | None:
        """Where the destination alone decides, before any rule is asked."""
        destination, eni = packet.destination_key, sender.network_interface_id
        if receiver is sender:
            text = f"{packet.destination} is its own: the packet does not leave it"
            return Step(Stage.OWN_ADDRESS, True, eni, None, text)
        service = self._services.get((destination, packet.protocol, packet.destination_port))
        if service is not None:
            return service
        if receiver is not None:
            nat_id = self._nat_gateways[receiver.network_interface_id]
            text = f"{packet.destination} is {nat_id}, which takes nothing but answers"
            return Step(Stage.DESTINATION, False, nat_id, None, text)
        if destination in self._vpc_blocks:
            return self._nobody_inside(str(packet.destination))
        if destination in _LINK_LOCAL:
            return self._no_service(str(packet.destination))
        if destination in _NOT_UNICAST:
            text = f"{packet.destination}: a VPC carries no broadcast, multicast or loopback"
            return Step(Stage.DESTINATION, False, str(packet.destination), None, text)
        return None

    def _nobody_inside(self, address: str) -> Step:
        if address == self._resolver:
            return self._no_service(address)
        if address in self._routers:
            text = f"{address} is the router, which forwards and answers nothing itself"
        else:
            text = f"{address} is in {self._network.vpc.vpc_id}, but no interface's"
        return Step(Stage.DESTINATION, False, address, None, text)

    def _no_service(self, address: str) -> Step:
        """Nothing there on this port, or nothing there at all."""
        if address == INSTANCE_METADATA:
            text = "is not there: a Fargate task has no instance metadata"
        elif address == METADATA:
            text = f"is the task's metadata, on tcp {METADATA_PORT} only"
        elif address not in (RESOLVER, self._resolver):
            text = "is link-local, and nobody's"
        elif self._network.vpc.enable_dns_support:
            text = f"is the VPC's resolver, on udp and tcp {DNS_PORT} only"
        else:
            text = f"is silent: {self._network.vpc.vpc_id} has no DNS support"
        return Step(Stage.LOCAL_SERVICE, False, address, None, f"{address} {text}")

    def _through_nat(self, nat: NatGateway, packet: Packet) -> Iterator[Met]:
        """NAT gateways carry TCP, UDP and ICMP. (VPC User Guide, "NAT gateway basics")"""
        nat_id = nat.nat_gateway_id
        if packet.destination.version == 6 or packet.protocol not in (TCP, UDP, ICMP):
            text = f"{nat_id} carries tcp, udp and icmp over IPv4, nothing else"
            yield Step(Stage.NAT_GATEWAY, False, nat_id, None, text)
            return
        yield AclCheck(nat.subnet_id, packet, False)
        text = f"{nat_id} sends it on from its own {nat.private_ip}"
        yield Step(Stage.NAT_GATEWAY, True, nat_id, None, text)
        translated = replace(packet, source=IPv4Address(nat.private_ip))
        yield AclCheck(nat.subnet_id, translated, True)
        route = self.way_out(nat.subnet_id, translated)
        yield route
        if route.allowed:
            yield from self._to_internet(target_of(route) or "", translated, nat.public_ip, nat_id)

    def _to_internet(
        self, gateway: str, packet: Packet, public_ip: str | None, sender: str
    ) -> Iterator[Met]:
        """`sender` is what has, or lacks, the public address."""
        destination = packet.destination_key
        if not self.carries(packet):
            text = f"{gateway} carries nothing to private addresses, as {packet.destination} is one"
            yield Step(Stage.INTERNET_GATEWAY, False, gateway, None, text)
            return
        if packet.destination.version == 6:
            text = f"{gateway} carries it out as it is"
            yield Step(Stage.INTERNET_GATEWAY, True, gateway, None, text)
        elif public_ip is None:
            text = f"{sender} has no public address, without which {gateway} carries nothing"
            yield Step(Stage.INTERNET_GATEWAY, False, sender, None, text)
        else:
            text = f"{gateway} carries it out with the public source {public_ip}"
            yield Step(Stage.INTERNET_GATEWAY, True, gateway, None, text)
            if destination in self._reachable or destination in self._public_blocks:
                yield from self._from_outside(replace(packet, source=IPv4Address(public_ip)))

    def _from_outside(self, packet: Packet) -> Iterator[Met]:
        gateway = self._network.internet_gateway
        vpc_id = self._network.vpc.vpc_id
        if gateway is None:
            text = f"{vpc_id} has no internet gateway for anything from outside"
            yield Step(Stage.INTERNET_GATEWAY, False, vpc_id, None, text)
            return
        if packet.source_key in self._never_outside:
            text = f"{packet.source} is nobody's address, inside or outside {vpc_id}"
            yield Step(Stage.SOURCE_CHECK, False, str(packet.source), None, text)
            return
        receiver, private = self._reachable.get(packet.destination_key, (None, packet.destination))
        if receiver is None or receiver.network_interface_id in self._nat_gateways:
            text = f"{packet.destination} is not the public address of a task in {vpc_id}"
            yield Step(Stage.DESTINATION, False, str(packet.destination), None, text)
            return
        packet = replace(packet, destination=private)
        yield Arrival(gateway.internet_gateway_id, receiver, packet)
        yield AclCheck(receiver.subnet_id, packet, False)
        yield GroupCheck(receiver, packet, False)


def _services(network: Network) -> Iterator[tuple[tuple[int, int, int], Step]]:
    """What answers in the VPC itself, by address, protocol and port."""
    text = f"the task's metadata is always reachable at {METADATA}"
    yield (
        (key_of(METADATA), TCP, METADATA_PORT),
        Step(Stage.LOCAL_SERVICE, True, METADATA, None, text),
    )
    if not network.vpc.enable_dns_support:
        return
    for address in (RESOLVER, str(resolver_address(network.vpc.cidr_block))):
        text = f"the VPC's resolver is always reachable at {address}"
        step = Step(Stage.LOCAL_SERVICE, True, address, None, text)
        for protocol in PORTS_OF:
            yield (key_of(address), protocol, DNS_PORT), step


def _reachable(network: Network) -> Iterator[tuple[int, tuple[NetworkInterface, Address]]]:
    """Interfaces by the address that those outside know, and which one that becomes inside."""
    for interface in network.interfaces.values():
        if interface.public_ip is not None:
            yield key_of(interface.public_ip), (interface, IPv4Address(interface.private_ip))
        if interface.ipv6_address is not None:
            yield key_of(interface.ipv6_address), (interface, IPv6Address(interface.ipv6_address))
    for nat in network.nat_gateways.values():
        if nat.deleted_at is None:
            interface = network.interfaces[nat.network_interface_id]
            yield key_of(nat.public_ip), (interface, IPv4Address(nat.private_ip))
