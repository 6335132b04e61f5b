"""An interface for a task: its join, and a thousand of them made and dropped.

Everything happens in namespaces of its own: nothing of the machine's network is touched or seen.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network
from itertools import count
from pathlib import Path

import trio

from sandbox.kernel import native, netns
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.rtnetlink import Address
from sandbox.kernel.slots import SlotPool
from sandbox.kernel.thread import KernelThread
from sandbox.model import names
from sandbox.model.vpc import NetworkInterface, Subnet, Vpc, router_address
from sandbox.network import eni, routers
from sandbox.network.eni import Pair
from sandbox.network.fabric import Fabric
from sandbox.network.routers import MAC, Router
from sandbox.network.warm import Ready, WarmInterfaces
from scripts.benchmarks.figures import Figure, Section
from scripts.benchmarks.machine import field

INSTANCE = "be4c"
IDS = range(0x40000000, 0x7F000000, 1 << 16)
VPC = Vpc(vpc_id="vpc-be4c", cidr_block="10.0.0.0/16", number=1, created_at=0)
SUBNET = Subnet(
    subnet_id="subnet-be4c",
    vpc_id=VPC.vpc_id,
    cidr_block="10.0.0.0/16",
    availability_zone="us-east-1a",
    network_acl_id="acl-be4c",
    network_acl_association_id="aclassoc-be4c",
    created_at=0,
)
SLOTS = 16
GONE_WITHIN_S = 60.0


class Place:
    """A host that is a namespace, with one VPC."""

    def __init__(self, fabric: Fabric, slots: SlotPool, warm: WarmInterfaces) -> None:
        self.fabric = fabric
        self.slots = slots
        self.warm = warm

    @property
    def router(self) -> Router:
        return self.fabric.router(VPC.vpc_id)

    async def links(self) -> int:
        return len(await self.fabric.inside(VPC.vpc_id, routers.link_names))


async def network(directory: Path, joins: int, interfaces: int) -> Section:
    free = list(IDS)
    with KernelThread("host") as host, KernelThread("interfaces") as thread:
        host.call(native.unshare, native.CLONE_NEWNET)
        fabric = Fabric(directory, INSTANCE, IPv4Network("198.18.0.0/15"), host)
        slots = SlotPool(
            SLOTS, lambda many: [free.pop() for _ in range(many)], lambda first: free.append(first)
        )
        warm = WarmInterfaces(fabric, slots, free.append, thread, 8)
        await fabric.open(VPC, lambda: None)
        place = Place(fabric, slots, warm)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(slots.serve)
                took = await alternate(place, thread, joins)
                many = await thousand(place, interfaces)
                nursery.cancel_scope.cancel()
        finally:
            await fabric.remove_all()
            await fabric.aclose()
    return section(took, many, joins, interfaces)


# Joins -----------------------------------------------------------------------------------------


async def alternate(place: Place, thread: KernelThread, rounds: int) -> dict[str, list[float]]:
    """Each way in its turn, on a fresh interface each time; what is made ahead is not counted."""
    ways: dict[str, Callable[[Router, Pair, Ready, NetworkInterface], None]] = {
        "prepared messages": prepared,
        "pyroute2": by_pyroute2,
        "ip -batch": by_ip,
    }
    took: dict[str, list[float]] = {way: [] for way in ways}
    took["join, as the agent awaits it"] = []
    numbers = count()  # an address has its route until the namespace of its last owner has gone
    for _ in range(rounds):
        for way, join in ways.items():
            ready = await place.warm.take(VPC.vpc_id)
            interface = record(ready, next(numbers))
            seconds = thread.call(timed, join, place.router, ready, interface)
            took[way].append(seconds)
            place.warm.discard(ready)
        ready = await place.warm.take(VPC.vpc_id)
        interface = record(ready, next(numbers))
        began = time.perf_counter()
        await place.warm.join(ready, interface, SUBNET)
        took["join, as the agent awaits it"].append(time.perf_counter() - began)
        place.warm.discard(ready)
    return took


def record(ready: Ready, number: int) -> NetworkInterface:
    return NetworkInterface(
        network_interface_id=ready.network_interface_id,
        vpc_id=VPC.vpc_id,
        subnet_id=SUBNET.subnet_id,
        availability_zone=SUBNET.availability_zone,
        private_ip=f"10.0.{number // 250 + 1}.{number % 250 + 1}",
        mac_address=ready.mac_address,
        group_ids=("sg-be4c",),
        attachment_id="",
        task=None,
        created_at=0,
    )


def timed(
    join: Callable[[Router, Pair, Ready, NetworkInterface], None],
    router: Router,
    ready: Ready,
    interface: NetworkInterface,
) -> float:
    began = time.perf_counter()
    join(router, ready.pair, ready, interface)
    return time.perf_counter() - began


def prepared(router: Router, pair: Pair, ready: Ready, interface: NetworkInterface) -> None:
    eni.join(router, pair, interface, SUBNET)


def by_pyroute2(router: Router, pair: Pair, ready: Ready, interface: NetworkInterface) -> None:
    gateway, own = parts(interface)
    with netns.within(ready.slot.netns_fd), Netlink() as netlink:
        index = pair.inside_index
        netlink.add_address(index, own)
        netlink.add_link_route(IPv4Network(f"{gateway}"), index)
        netlink.add_route(IPv4Network("0.0.0.0/0"), gateway, index)
        netlink.set_neighbour(index, gateway, MAC)
    with netns.within(router.netns_fd), Netlink() as netlink:
        netlink.add_link_route(IPv4Network(f"{own.ip}"), pair.outside_index)
        netlink.set_neighbour(pair.outside_index, own.ip, interface.mac_address)


def by_ip(router: Router, pair: Pair, ready: Ready, interface: NetworkInterface) -> None:
    gateway, own = parts(interface)
    link = names.link(INSTANCE, interface.network_interface_id)
    with netns.within(ready.slot.netns_fd):
        batch(
            f"address add {own} dev eth0 noprefixroute",
            f"route add {gateway} dev eth0 scope link",
            f"route add default via {gateway} dev eth0",
            f"neighbour replace {gateway} dev eth0 lladdr {MAC} nud permanent",
        )
    with netns.within(router.netns_fd):
        batch(
            f"route add {own.ip} dev {link} scope link",
            f"neighbour replace {own.ip} dev {link} lladdr {interface.mac_address} nud permanent",
        )


def parts(interface: NetworkInterface) -> tuple[Address, IPv4Interface]:
    length = IPv4Network(SUBNET.cidr_block).prefixlen
    return router_address(SUBNET.cidr_block), IPv4Interface((interface.private_ip, length))


def batch(*lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


# A thousand ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Many:
    """What came of making so many interfaces and dropping them again; for one of them but `gone_s`
    and `left`."""

    made_s: float
    joined_s: float
    gone_s: float
    slab_kib: float
    total_kib: float
    left: int


async def thousand(place: Place, interfaces: int) -> Many:
    await settled(place)
    before = await rested(place)
    with memory() as used:
        began = time.perf_counter()
        ready = [await place.warm.take(VPC.vpc_id) for _ in range(interfaces)]
        made = time.perf_counter()
        for number, each in enumerate(ready):
            await place.warm.join(each, record(each, number), SUBNET)
        joined = time.perf_counter()
    dropped = time.perf_counter()
    while ready:
        place.warm.discard(ready.pop())
    await settled(place)
    gone_s = time.perf_counter() - dropped
    return Many(
        made_s=(made - began) / interfaces,
        joined_s=(joined - made) / interfaces,
        gone_s=gone_s,
        slab_kib=used[0] / interfaces,
        total_kib=used[1] / interfaces,
        left=max(await rested(place) - before, 0),
    )


async def settled(place: Place) -> None:
    """Until the router has no links but lo and the uplink."""
    with trio.fail_after(GONE_WITHIN_S):
        while await place.links() > 2:
            await trio.sleep(0.005)


async def rested(place: Place) -> int:
    """What is kept once the pool of slots is full again."""
    while place.slots.ready < SLOTS:
        await trio.sleep(0.01)
    return kept(place)


def kept(place: Place) -> int:
    """Descriptors of this process, routes and neighbours of the router."""
    with KernelThread("look") as thread:
        found = thread.call(_rows, place.router.netns_fd)
    gc.collect()
    return found + len(os.listdir("/proc/self/fd"))


def _rows(netns_fd: int) -> int:
    with netns.within(netns_fd):
        found = 0
        for command in (("route",), ("neighbour", "show", "nud", "all"), ("-6", "route")):
            done = subprocess.run(["ip", *command], capture_output=True, text=True, check=True)
            found += len(done.stdout.splitlines())
        return found


@contextmanager
def memory() -> Iterator[list[float]]:
    """KiB that the kernel has taken meanwhile: slab, and everything."""
    used: list[float] = []
    slab, free = field("/proc/meminfo", "Slab"), field("/proc/meminfo", "MemAvailable")
    yield used
    used.append(field("/proc/meminfo", "Slab") - slab)
    used.append(free - field("/proc/meminfo", "MemAvailable"))


# Report ----------------------------------------------------------------------------------------


def section(took: dict[str, list[float]], many: Many, joins: int, interfaces: int) -> Section:
    ours = statistics.median(took["prepared messages"])
    ratios = {way: ours / statistics.median(took[way]) for way in ("pyroute2", "ip -batch")}
    rows = [row(way, took[way]) for way in took]
    rows += [
        (f"{interfaces} slots and interfaces made, each", f"{many.made_s * 1e3:.2f}", "", ""),
        (f"{interfaces} joins in a row, each", f"{many.joined_s * 1e3:.3f}", "", ""),
        (f"{interfaces} of them gone after the drop, all", f"{many.gone_s * 1e3:.0f}", "", ""),
        ("slab for one, KiB", f"{many.slab_kib:.0f}", "", ""),
        ("memory for one, KiB", f"{many.total_kib:.0f}", "", ""),
    ]
    return Section(
        "Network",
        "The join of an interface that was made ahead: address, routes and permanent neighbours in "
        f"two namespaces, {joins} times each way in turns. Then {interfaces} user and network "
        "namespaces with an interface each, made, joined and dropped; memory by `/proc/meminfo`, "
        "of the whole machine.",
        ("", "p50 ms", "min ms", "p90 ms"),
        rows,
        [
            Figure("join, messages alone, p50", ours * 1e3, "ms", "at most", 0.3),
            Figure("join, of pyroute2's", ratios["pyroute2"], "x", "at most", 0.1),
            Figure("join, of `ip -batch`'s", ratios["ip -batch"], "x", "at most", 0.1),
            Figure(f"left behind by {interfaces} interfaces", many.left, "objects", "at most", 0),
        ],
    )


def row(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    values = (statistics.median(seconds), min(seconds), statistics.quantiles(seconds, n=10)[-1])
    return (name, *(f"{value * 1e3:.3f}" for value in values))
