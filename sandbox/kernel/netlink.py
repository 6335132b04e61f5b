"""Links, addresses, routes and neighbours of one network namespace, through pyroute2.

A `Netlink` belongs to the thread that made it and to the namespace that thread was in. Make, use
and close it on one KernelThread: pyroute2 runs an event loop a thread behind its blocking calls,
and a socket used from several threads leaves descriptors behind (measured, 0.9).

A call costs 0.3-0.7 ms, nearly all of it encoding in Python; whatever is needed for every task is
made ahead of it or sent as prepared bytes, not from here. Nothing here dumps a table: that costs
0.5 ms a link and grows with the host.

A veth is made where its second end shall live, never moved: a move waits for a grace period, 30 ms.
Deleting a link waits 16 ms; letting go of its namespace does the same in the background.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from sandbox.errors import KernelError
from sandbox.kernel.closing import Closing
from sandbox.kernel.rtnetlink import (
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFF_UP,
    RT_SCOPE_LINK,
    Address,
    Interface,
    Network,
)
from sandbox.kernel.rtnetlink import LOOPBACK_INDEX as LOOPBACK_INDEX
from sandbox.kernel.rtnetlink import VethEnd as VethEnd

SEGMENT_MAX_BYTES = 1 << 16
"""What the kernel hands a link at once (gso_max_size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network interface as the kernel describes it."""

    index: int
    name: str
    mac: str
    mtu: int
    is_up: bool


class Netlink(Closing):
    """A route socket of the namespace that this thread is in now."""

    def __init__(self) -> None:
        with _asking("socket", "NETLINK_ROUTE"):
            self._route: Any = IPRoute()

    def find(self, name: str) -> Link | None:
        """The link of that name in this namespace."""
        try:
            with _asking("RTM_GETLINK", name):
                [answer] = self._route.link("get", ifname=name)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return Link(
            index=answer["index"],
            name=answer.get_attr("IFLA_IFNAME"),
            mac=answer.get_attr("IFLA_ADDRESS"),
            mtu=answer.get_attr("IFLA_MTU"),
            is_up=bool(answer["flags"] & IFF_UP),
        )

    def set_loopback_up(self) -> None:
        self.set_up(LOOPBACK_INDEX)

    def set_up(self, index: int) -> None:
        with _asking("RTM_NEWLINK", f"link {index} up"):
            self._route.link("set", index=index, state="up")

    def set_mtu(self, index: int, mtu: int) -> None:
        with _asking("RTM_NEWLINK", f"link {index} mtu {mtu}"):
            self._route.link("set", index=index, mtu=mtu)

    def create_veth(self, near: VethEnd, far: VethEnd, *, far_netns_fd: int, mtu: int) -> Link:
        """`near` here and up, `far` in the namespace behind the descriptor and still down."""
        with _asking("RTM_NEWLINK", f"veth {near.name}"):
            self._route.link(
                "add",
                kind="veth",
                ifname=near.name,
                address=near.mac,
                mtu=mtu,
                state="up",
                peer={
                    "ifname": far.name,
                    "address": far.mac,
                    "mtu": mtu,
                    "net_ns_fd": far_netns_fd,
                },
            )
        link = self.find(near.name)
        if link is None:
            raise KernelError("RTM_GETLINK", near.name, errno.ENODEV)
        return link

    def delete_link(self, index: int) -> None:
        """With its peer. Waits for a grace period."""
        with _asking("RTM_DELLINK", f"link {index}"):
            self._route.link("del", index=index)

    def add_address(self, index: int, address: Interface) -> None:
        """Without the route to the prefix that the kernel adds otherwise, usable at once."""
        flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if address.version == 6 else 0)
        with _asking("RTM_NEWADDR", f"{address} on link {index}"):
            self._route.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                IFA_FLAGS=flags,
            )

    def add_link_route(self, destination: Network, index: int) -> None:
        """`destination` is reached directly through the link."""
        with _asking("RTM_NEWROUTE", f"{destination} on link {index}"):
            self._route.route("add", dst=str(destination), oif=index, scope=RT_SCOPE_LINK)

    def add_route(self, destination: Network, gateway: Address, index: int) -> None:
        with _asking("RTM_NEWROUTE", f"{destination} via {gateway}"):
            self._route.route("add", dst=str(destination), gateway=str(gateway), oif=index)

    def add_blackhole(self, destination: Network) -> None:
        """What no other route matches in `destination` is dropped."""
        with _asking("RTM_NEWROUTE", f"blackhole {destination}"):
            self._route.route("add", dst=str(destination), type="blackhole")

    def delete_route(self, destination: Network) -> None:
        with _asking("RTM_DELROUTE", str(destination)):
            self._route.route("del", dst=str(destination))

    def set_neighbour(self, index: int, address: Address, mac: str) -> None:
        """Permanent: never asked for, never forgotten, and it counts towards no limit."""
        with _asking("RTM_NEWNEIGH", f"{address} on link {index}"):
            self._route.neigh(
                "replace", ifindex=index, dst=str(address), lladdr=mac, state="permanent"
            )

    def limit_rate(self, index: int, rate_mbit: int) -> None:
        """Let no more through what leaves by the link; again with another rate replaces it.

        A token bucket (tc-tbf(8)) of 4 ms of the rate, and never less than two whole segments of
        64 KiB, or they would be cut up one by one; what waits longer than 50 ms is dropped.
        """
        bytes_per_second = rate_mbit * 1_000_000 // 8
        with _asking("RTM_NEWQDISC", f"tbf {rate_mbit} Mbit/s on link {index}"):
            self._route.tc(
                "replace",
                "tbf",
                index,
                handle=0x10000,
                rate=bytes_per_second,
                burst=max(bytes_per_second // 250, 2 * SEGMENT_MAX_BYTES),
                latency="50ms",
            )

    def close(self) -> None:
        self._route.close()


@contextmanager
def _asking(message: str, subject: str) -> Iterator[None]:
    """Turn the kernel's refusal of a message into KernelError."""
    try:
        yield
    except NetlinkError as error:
        raise KernelError(message, subject, error.code) from error
    except OSError as error:
        raise KernelError(message, subject, error.errno or errno.EIO) from error
