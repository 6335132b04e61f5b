"""A task's interface, and what its containers are told about the network.

The namespace itself comes from the warm pool with the task's slot. As long as there is no VPC, a
task has `lo` and nothing else: nothing reaches it and it reaches nothing, its containers talk over
localhost. The door is the one through which interfaces will come: attach before the pull (Fargate's
order: connectivity first), detach when the last container has ended.

An interface in a VPC is a pair of links, made ahead (`network.warm`): `eth0` where the task is, and
in the router's namespace an end whose name says whose it is.

    eth0  10.0.0.10/20, MAC of the ENI          sb<inst><8 digits>  MAC of all routers, no address
          10.0.0.1 dev eth0                     10.0.0.10/32 dev sb...
          default via 10.0.0.1                  neighbour 10.0.0.10, permanent
          neighbour 10.0.0.1, permanent

So the task sees what it would see on AWS, every packet goes to the router, also those to its own
subnet, and nobody has to ask or believe a neighbour. The router's address is nobody's: it is the
name of the neighbour. With IPv6 the same, via fe80::1.

Making the pair costs a millisecond; becoming a member is the messages of `joining`, two `send`s.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_network,
)

from sandbox.errors import KernelError, NetworkError
from sandbox.kernel import netns, rtnetlink
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.rtnetlink import Address, Message, Network, Rtnetlink, VethEnd
from sandbox.model import names
from sandbox.model.vpc import NetworkInterface, Subnet, router_address
from sandbox.network.routers import MAC, MTU, Router

NAME = "eth0"
ROUTER_IPV6 = IPv6Address("fe80::1")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What every container of the task is given to read."""

    hostname: str
    hosts: str
    """/etc/hosts"""
    resolv_conf: str
    private_ip: str | None = None


class Interfaces:
    """All interfaces of this agent, by task."""

    async def attach(self, task: str, netns_fd: int) -> Interface:
        """Idempotent: attaching again gives what is there."""
        hostname = task[:12]
        hosts = f"127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost ip6-loopback\n"
        return Interface(hostname=hostname, hosts=hosts, resolv_conf="# no resolver: only lo\n")

    async def detach(self, task: str) -> None:
        """Idempotent. The namespace goes with its last descriptor; there is no link to delete."""


# An interface in a VPC: messages ---------------------------------------------------------------


def joining(interface: NetworkInterface, subnet: Subnet, index: int) -> list[Message]:
    """What makes link `index` of the task's namespace this interface."""
    network = IPv4Network(subnet.cidr_block)
    gateway = router_address(subnet.cidr_block)
    messages = [
        rtnetlink.address(index, IPv4Interface((interface.private_ip, network.prefixlen))),
        rtnetlink.link_route(IPv4Network(gateway), index),
        rtnetlink.gateway_route(_EVERYWHERE, gateway, index),
        rtnetlink.neighbour(index, gateway, MAC),
    ]
    if interface.ipv6_address is not None and subnet.ipv6_cidr_block is not None:
        length = IPv6Network(subnet.ipv6_cidr_block).prefixlen
        messages += [
            rtnetlink.address(index, IPv6Interface((interface.ipv6_address, length))),
            rtnetlink.gateway_route(_EVERYWHERE_IPV6, ROUTER_IPV6, index),
            rtnetlink.neighbour(index, ROUTER_IPV6, MAC),
        ]
    return messages


def admitting(interface: NetworkInterface, index: int) -> list[Message]:
    """What makes the interface's addresses reachable by link `index` of the router's namespace,
    wherever they were before."""
    messages = []
    for address in _addresses(interface):
        messages.append(rtnetlink.link_route(_alone(address), index))
        messages.append(rtnetlink.neighbour(index, address, interface.mac_address))
    return messages


def dismissing(interface: NetworkInterface, index: int) -> list[Message]:
    """What makes its addresses unreachable at once; ESRCH if they are already, or another's."""
    return [rtnetlink.delete_route(_alone(address), index) for address in _addresses(interface)]


def _addresses(interface: NetworkInterface) -> list[Address]:
    found: list[Address] = [IPv4Address(interface.private_ip)]
    if interface.ipv6_address is not None:
        found.append(IPv6Address(interface.ipv6_address))
    return found


def _alone(address: Address) -> Network:
    return ip_network(address)


_EVERYWHERE = IPv4Network("0.0.0.0/0")
_EVERYWHERE_IPV6 = IPv6Network("::/0")


# Its links; on a KernelThread ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """The two links of an interface, and a route socket of the task's namespace.

    The socket holds the namespace, and with it the links: close it once the interface has joined.
    """

    inside: Rtnetlink
    inside_index: int
    outside_index: int

    def close(self) -> None:
        self.inside.close()


def make_pair(router: Router, instance: str, eni: str, netns_fd: int) -> Pair:
    """Links for interface `eni` with one end behind the descriptor, both up, without addresses.

    Those that are there already are taken as they are. What was made goes with the namespace.
    """
    name = names.link(instance, eni)
    with netns.within(netns_fd):
        inside = Rtnetlink()
    try:
        if inside.index(NAME) is None:
            router.route.send(
                [
                    rtnetlink.veth(
                        VethEnd(name, MAC),
                        VethEnd(NAME, names.mac_address(eni)),
                        far_netns_fd=netns_fd,
                        mtu=MTU,
                    )
                ]
            )
        pair = Pair(inside, _index(inside, NAME), _index(router.route, name))
        inside.send([rtnetlink.link_up(pair.inside_index), rtnetlink.notice(pair.inside_index)])
        router.route.send([rtnetlink.notice(pair.outside_index)])
    except BaseException:
        inside.close()
        raise
    return pair


def join(router: Router, pair: Pair, interface: NetworkInterface, subnet: Subnet) -> None:
    """Idempotent. The interface's members must be in the VPC's sets before."""
    if interface.subnet_id != subnet.subnet_id:
        raise NetworkError(f"{interface.network_interface_id} is not in {subnet.subnet_id}")
    pair.inside.send(joining(interface, subnet, pair.inside_index))
    router.route.send(admitting(interface, pair.outside_index))


def limit_bandwidth(router: Router, pair: Pair, netns_fd: int, rate_mbit: int) -> None:
    """What the task sends waits at its own end, which slows it down; what it is sent, at the
    router's. Idempotent; 3 ms."""
    for namespace, index in (
        (netns_fd, pair.inside_index),
        (router.netns_fd, pair.outside_index),
    ):
        with netns.within(namespace), Netlink() as netlink:
            netlink.limit_rate(index, rate_mbit)


def leave(router: Router, instance: str, interface: NetworkInterface) -> bool:
    """Its addresses lead nowhere from now on. False if its link has gone already."""
    index = router.route.index(names.link(instance, interface.network_interface_id))
    if index is None:
        return False
    router.route.send(dismissing(interface, index), allowing={errno.ESRCH, errno.ENODEV})
    return True


def delete_link(router: Router, name: str) -> bool:
    """For a link that stays although its task has gone; 16 ms. Whether there was one."""
    if router.route.index(name) is None:
        return False
    router.route.send([rtnetlink.delete_link(name)], allowing={errno.ENODEV})
    return True


def _index(route: Rtnetlink, name: str) -> int:
    index = route.index(name)
    if index is None:
        raise KernelError("SIOCGIFINDEX", name, errno.ENODEV)
    return index
