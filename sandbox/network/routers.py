"""A VPC is a network namespace: its router, with a name that outlives the agent.

All interfaces of the VPC end there, routed one by one, so two VPCs may have the same addresses, and
nothing that the host's owner does to the host's rules or links comes between two tasks. The
namespace is pinned by a mount under `<run-dir>/vpc/<vpc id>`, the only one of Sandbox's that is:
traffic goes on while no agent runs.

    lo      169.254.170.2      task metadata and credentials     the agent's sockets, opened here
            169.254.169.253    resolver (VPC User Guide, "Amazon DNS server"), and at VPC + 2
            fd00:ec2::253      the same, in a VPC with IPv6
    sb...   a task's interface: a /32 route and a permanent neighbour, no address
    up0     the uplink (`network.uplinks`)
    blackhole  the VPC's blocks and 169.254.0.0/16: what is nobody's address is nowhere, and a host
               that is itself in a cloud does not lend its instance metadata to tasks

The sysctls are set before the first link, so each link is born with them (Linux
Documentation/networking/ip-sysctl.rst, nf_conntrack-sysctl.rst). Nothing else writes to this
namespace, which is why `default` can be relied on.

IPv6 stays inside the VPC: it has no route to an uplink.

Functions that act do so on the calling thread, a KernelThread in the host's namespace.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Collection
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_interface
from pathlib import Path

from sandbox.errors import KernelError, NetworkError
from sandbox.kernel import netns, rtnetlink
from sandbox.kernel.rtnetlink import LOOPBACK_INDEX, Interface, Message, Network, Rtnetlink
from sandbox.model.vpc import METADATA, RESOLVER, Vpc, resolver_address

RESOLVER_IPV6 = "fd00:ec2::253"
LINK_LOCAL = IPv4Network("169.254.0.0/16")

MAC = "02:00:00:00:00:01"
"""Of the router's end of every interface. Those of tasks begin with 0a."""

MTU = 9001
"""Of every interface in a VPC (EC2 User Guide, "Jumbo frames")."""

_VPC_ID = re.compile(r"vpc-[0-9a-f]{1,32}")

_IPV4_SYSCTLS = (
    # First: a change of it sets redirects anew.
    ("net/ipv4/ip_forward", "1"),
    # The source of a packet must be routed to the link it came by. The kernel takes the higher
    # value of `all` and the link's.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "1"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    ("net/ipv4/conf/default/accept_source_route", "0"),
    # No link but lo has an address, so no question is answered: neighbours are given, not learned.
    ("net/ipv4/conf/default/arp_ignore", "1"),
    # A packet in mid-stream of a connection that was cut does not become a new one.
    ("net/netfilter/nf_conntrack_tcp_loose", "0"),
    # EC2 User Guide, "Idle connection tracking timeout"; Linux has 120.
    ("net/netfilter/nf_conntrack_udp_timeout_stream", "180"),
    # Flow logs count packets and bytes, from when to when; off in a fresh namespace.
    ("net/netfilter/nf_conntrack_acct", "1"),
    ("net/netfilter/nf_conntrack_timestamp", "1"),
)

_IPV6_OFF = (
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
)

_IPV6_ON = (
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/all/accept_redirects", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
    ("net/ipv6/conf/all/accept_source_route", "-1"),
    ("net/ipv6/conf/default/accept_source_route", "-1"),
    # No address of its own making: a link-local one would answer what comes to it.
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
)


# What a router is like -------------------------------------------------------------------------


def sysctls(*, with_ipv6: bool) -> tuple[tuple[str, str], ...]:
    """Keys and values, in the order in which they are written."""
    return _IPV4_SYSCTLS + (_IPV6_ON if with_ipv6 else _IPV6_OFF)


def own_addresses(vpc: Vpc) -> tuple[Interface, ...]:
    """Those on lo, at which the agent serves the VPC's tasks."""
    found = [f"{resolver_address(vpc.cidr_block)}", RESOLVER, METADATA]
    if vpc.ipv6_cidr_block is not None:
        found.append(RESOLVER_IPV6)
    return tuple(ip_interface(address) for address in found)


def blackholes(vpc: Vpc) -> tuple[Network, ...]:
    """They do not shadow `own_addresses`: those are in the table that is asked first."""
    blocks: list[Network] = [IPv4Network(vpc.cidr_block), LINK_LOCAL]
    if vpc.ipv6_cidr_block is not None:
        blocks.append(IPv6Network(vpc.ipv6_cidr_block))
    return tuple(blocks)


def first_messages(vpc: Vpc) -> list[Message]:
    """What makes a fresh namespace the router of `vpc`; sending it again changes nothing."""
    return [
        rtnetlink.link_up(LOOPBACK_INDEX),
        *(rtnetlink.blackhole(block) for block in blackholes(vpc)),
        *(rtnetlink.address(LOOPBACK_INDEX, address) for address in own_addresses(vpc)),
    ]


def pin_path(directory: Path, vpc_id: str) -> Path:
    if _VPC_ID.fullmatch(vpc_id) is None:
        raise NetworkError(f"not the id of a VPC: {vpc_id!r}")
    return directory / vpc_id


# Making and removing it ------------------------------------------------------------------------


class Router:
    """The router namespace of one VPC, held open: `netns_fd`, and a route socket of it."""

    def __init__(self, vpc: Vpc, netns_fd: int) -> None:
        self.vpc = vpc
        self.netns_fd = netns_fd
        with netns.within(netns_fd):
            self.route = Rtnetlink()

    def close(self) -> None:
        """The namespace and all in it stays."""
        self.route.close()
        os.close(self.netns_fd)


def open_router(directory: Path, vpc: Vpc, prepare: Callable[[], None]) -> Router:
    """The VPC's namespace, made if it is not there, and in either case as it should be.

    `prepare` runs inside before there is a link: the packet filter comes first, so that nothing
    ever passes without it. It must be idempotent.
    """
    path = pin_path(directory, vpc.vpc_id)
    fd = netns.pinned(path)
    if fd is None:
        _load_ipv6()
        fd = netns.create()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            netns.pin(fd, path)
        except BaseException:
            os.close(fd)
            raise
    try:
        router = Router(vpc, fd)
    except BaseException:
        os.close(fd)
        raise
    try:
        furnish(router, prepare)
    except BaseException:
        router.close()
        raise
    return router


def furnish(router: Router, prepare: Callable[[], None]) -> None:
    """Rules, sysctls, addresses and black holes, in this order; again after the VPC's blocks have
    changed. What the VPC has no longer stays until the namespace goes."""
    with netns.within(router.netns_fd):
        prepare()
        write_sysctls(sysctls(with_ipv6=router.vpc.ipv6_cidr_block is not None))
    router.route.send(first_messages(router.vpc))


def write_sysctls(wanted: Collection[tuple[str, str]]) -> None:
    """Those of an IP version that the kernel has not are left out if they turn it off."""
    for key, value in wanted:
        try:
            netns.write_sysctl(key, value)
        except KernelError:
            if not key.endswith("/disable_ipv6") or value != "1" or netns.read_sysctl(key):
                raise


def delete_router(directory: Path, vpc_id: str) -> None:
    """Unpin it. The namespace goes in the background, with all rules, sets, links and connections
    in it, once the last task of it has gone. Idempotent."""
    netns.unpin(pin_path(directory, vpc_id))


def pinned_routers(directory: Path) -> list[str]:
    """The ids of VPCs whose names are taken, also of those that were only half made."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KernelError("listdir", f"{directory}", error.errno or 0) from error
    return sorted(name for name in names if _VPC_ID.fullmatch(name))


def link_names() -> list[str]:
    """All links in the namespace of this thread."""
    return [name for _, name in socket.if_nameindex()]


def _load_ipv6() -> None:
    """If it is a module, have it loaded now: loaded later it would come to all namespaces there
    are, with its own defaults, which are on."""
    with suppress(OSError):  # a kernel without it
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).close()
