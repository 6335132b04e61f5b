"""The one link of a VPC on the host: how it gets out, and how its public addresses are reached.

    router namespace                                     host
    up0  default via <router> ──────── veth ──────── sb<inst>u<n>   <host>/32
                                                      route <public block> via <next hop>

`host` and `next hop` are the last addresses but one and but none of the public pool, the same for
every VPC. The host's end has the first, so a host that is connected to nothing has an address to
speak from, and tasks see the host as what it is to them, a neighbour in the public pool. The second
is nobody's: it is only the key of a permanent neighbour, for a route needs a next hop (`onlink`: it
need not be in a network of the link). Link-local addresses would do as well, but a host may be in a
cloud that uses some of them; these two are in a pool that is known to be free, or no agent starts.

The host's end has IPv6 turned off and forwards, whatever the host's own switch says
(`conf.<link>.forwarding`). Nothing else of the host changes here; its rules are
`network.footprint`'s.

Functions act on the calling thread, a KernelThread in the host's namespace.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from sandbox.errors import KernelError
from sandbox.kernel import netns, rtnetlink
from sandbox.kernel.rtnetlink import Message, Rtnetlink, VethEnd
from sandbox.network.routers import MTU, Router

NAME = "up0"
"""In the router's namespace."""

HOST_MAC = "02:00:00:00:00:02"
ROUTER_MAC = "02:00:00:00:00:03"

EVERYWHERE = IPv4Network("0.0.0.0/0")

_HOST_SYSCTLS = (
    ("forwarding", "1"),
    # Two tasks of one VPC reach each other's public addresses by way of the host: in and out by
    # one link, which is no reason to tell the sender a better way.
    ("send_redirects", "0"),
    ("accept_redirects", "0"),
    ("accept_source_route", "0"),
    # Neighbours are permanent on both ends; nothing is to be learned from a router of ours.
    ("arp_ignore", "1"),
)
"""Below net/ipv4/conf/<link>."""


@dataclass(frozen=True, slots=True)
class Transit:
    host: IPv4Address
    next_hop: IPv4Address


def transit(public_pool: IPv4Network) -> Transit:
    """The last two addresses of the pool, which no VPC is given."""
    last = public_pool.broadcast_address
    return Transit(last - 1, last)


def create_uplink(host: Rtnetlink, router: Router, name: str, transit: Transit) -> None:
    """The pair, up, with its addresses; no route yet on either side. Idempotent."""
    if host.index(name) is None or router.route.index(NAME) is None:
        _make_pair(host, router, name)
    outside, inside = _index(host, name), _index(router.route, NAME)
    for key, value in _HOST_SYSCTLS:
        netns.write_sysctl(f"net/ipv4/conf/{name}/{key}", value)
    if netns.read_sysctl(f"net/ipv6/conf/{name}/disable_ipv6") == "0":
        netns.write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
    router.route.send(
        [rtnetlink.link_up(inside), rtnetlink.neighbour(inside, transit.host, HOST_MAC)]
    )
    host.send(
        [
            rtnetlink.link_up(outside),
            rtnetlink.address(outside, IPv4Interface(transit.host)),
            rtnetlink.neighbour(outside, transit.next_hop, ROUTER_MAC),
        ]
    )


def _make_pair(host: Rtnetlink, router: Router, name: str) -> None:
    """Down at first: the host's end shall have its sysctls before its first packet."""
    host.send([rtnetlink.delete_link(name)], allowing={errno.ENODEV})  # the half of another one
    router.route.send([rtnetlink.delete_link(NAME)], allowing={errno.ENODEV})
    pair = rtnetlink.veth(
        VethEnd(name, HOST_MAC),
        VethEnd(NAME, ROUTER_MAC),
        far_netns_fd=router.netns_fd,
        mtu=MTU,
        is_up=False,
    )
    host.send([pair])


def delete_uplink(host: Rtnetlink, name: str) -> None:
    """With its routes and the other end. Idempotent; takes 16 ms."""
    host.send([rtnetlink.delete_link(name)], allowing={errno.ENODEV})


def attach_gateway(router: Router, transit: Transit) -> None:
    """What has no other route leaves by the uplink. Idempotent."""
    router.route.send([_default_route(router, transit)])


def detach_gateway(router: Router) -> None:
    """What has no other route is unreachable. Idempotent."""
    router.route.send([rtnetlink.delete_route(EVERYWHERE)], allowing={errno.ESRCH})


def _default_route(router: Router, transit: Transit) -> Message:
    index = _index(router.route, NAME)
    return rtnetlink.gateway_route(EVERYWHERE, transit.host, index, is_onlink=True)


def route_blocks(
    host: Rtnetlink, name: str, blocks: Iterable[IPv4Network], transit: Transit
) -> None:
    """The host reaches these public addresses by this VPC's uplink. Idempotent.

    The VPC's packet filter must drop what came by the uplink and would leave by it again: an
    address of a block that is nobody's has no other way, and the packet would go round until its
    time to live is over.
    """
    index = _index(host, name)
    for block in blocks:
        route = rtnetlink.gateway_route(block, transit.next_hop, index, is_onlink=True)
        host.send([route])


def withdraw_blocks(host: Rtnetlink, name: str, blocks: Collection[IPv4Network]) -> None:
    """Only where they lead to this VPC. Idempotent."""
    index = host.index(name)
    if index is not None:
        for block in blocks:
            host.send([rtnetlink.delete_route(block, index)], allowing={errno.ESRCH})


def _index(route: Rtnetlink, name: str) -> int:
    index = route.index(name)
    if index is None:
        raise KernelError("SIOCGIFINDEX", name, errno.ENODEV)
    return index
