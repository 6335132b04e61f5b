"""Interfaces of tasks in a VPC, seen from inside the tasks' namespaces, without a packet filter."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError, NetworkError
from sandbox.kernel.slots import SlotPool
from sandbox.kernel.thread import KernelThread
from sandbox.model import names
from sandbox.model.vpc import NetworkInterface, Subnet, Vpc
from sandbox.network import routers
from sandbox.network.fabric import Fabric
from sandbox.network.warm import Ready, WarmInterfaces
from tests.kernel.conftest import until
from tests.kernel.namespaces import (
    SOON_S,
    Host,
    Space,
    catching,
    connects,
    forge,
    listening,
    pings,
    playing_host,
)
from tests.kernel.test_fabric import INSTANCE, POOL, nothing, vpc

DUAL = vpc(6, ipv6="2600:1f18:1:2300::/56")
BASES = range(0x7F800000, 0x7FC00000, 65536)


@dataclass
class Ids:
    free: list[int] = field(default_factory=lambda: list(BASES))
    claimed: set[int] = field(default_factory=set)

    def claim(self, count: int) -> list[int]:
        firsts = [self.free.pop(0) for _ in range(count)]
        self.claimed.update(firsts)
        return firsts

    def release(self, first: int) -> None:
        self.claimed.remove(first)
        self.free.append(first)


def subnet(of: Vpc) -> Subnet:
    return Subnet(
        subnet_id=f"subnet-{of.number:017x}",
        vpc_id=of.vpc_id,
        cidr_block="10.0.0.0/20",
        ipv6_cidr_block="2600:1f18:1:2300::/64" if of.ipv6_cidr_block else None,
        availability_zone="us-east-1a",
        network_acl_id="acl-1",
        network_acl_association_id="aclassoc-1",
        created_at=0,
    )


def record(
    ready: Ready, of: Vpc, last: int, *, ipv6: bool = False, mbit: int | None = None
) -> NetworkInterface:
    return NetworkInterface(
        network_interface_id=ready.network_interface_id,
        vpc_id=of.vpc_id,
        subnet_id=subnet(of).subnet_id,
        availability_zone="us-east-1a",
        private_ip=f"10.0.{last // 250}.{last % 250 + 4}",
        ipv6_address=f"2600:1f18:1:2300::{last + 4:x}" if ipv6 else None,
        mac_address=ready.mac_address,
        group_ids=("sg-1",),
        attachment_id="a",
        task="t",
        bandwidth_mbit=mbit,
        created_at=0,
    )


@dataclass
class Task:
    """What a task has of the network: a namespace and the interface in it."""

    ready: Ready
    interface: NetworkInterface
    space: Space

    @property
    def ip(self) -> str:
        return self.interface.private_ip

    @property
    def link(self) -> str:
        return names.link(INSTANCE, self.interface.network_interface_id)


class Vpcs:
    """A fabric with interfaces on a host, and tasks by number."""

    def __init__(
        self, host: Host, fabric: Fabric, warm: WarmInterfaces, slots: SlotPool, ids: Ids
    ) -> None:
        self.host = host
        self.slots = slots
        self.fabric = fabric
        self.warm = warm
        self.ids = ids
        self.messages: list[str] = []
        self._tasks: list[Task] = []

    async def task(
        self, last: int, of: Vpc | None = None, *, ipv6: bool = False, mbit: int | None = None
    ) -> Task:
        of = of or vpc()
        ready = await self.warm.take(of.vpc_id)
        interface = record(ready, of, last, ipv6=ipv6, mbit=mbit)
        await self.warm.join(ready, interface, subnet(of))
        task = Task(ready, interface, Space(self.host.space.thread, ready.slot.netns_fd))
        self._tasks.append(task)
        return task

    def router(self, of: Vpc | None = None) -> Space:
        fd = self.fabric.router((of or vpc()).vpc_id).netns_fd
        return Space(self.host.space.thread, fd)

    def router_links(self, of: Vpc | None = None) -> set[str]:
        router = self.router(of)
        try:
            return router.links() - {"lo", "up0"}
        finally:
            router.close()

    async def end(self, task: Task) -> None:
        """As a supervisor ends it: leave, and then the last descriptors of the namespace."""
        await self.warm.leave(task.interface)
        self.drop(task)

    def drop(self, task: Task) -> None:
        self._tasks.remove(task)
        task.space.close()
        task.ready.slot.close()
        self.ids.release(task.ready.slot.id_base)

    def drop_all(self) -> None:
        for task in list(self._tasks):
            self.drop(task)


@pytest.fixture
def host() -> Iterator[Host]:
    with playing_host() as host:
        yield host


@asynccontextmanager
async def running(host: Host, run_dir: Path, size: int = 2) -> AsyncIterator[Vpcs]:
    ids = Ids()
    messages: list[str] = []
    fabric = Fabric(run_dir, INSTANCE, POOL, host.thread)
    fabric.host_rules.lock_file = str(run_dir / "lock")
    slots = SlotPool(size, ids.claim, ids.release)
    try:
        async with KernelThread("interfaces") as thread, trio.open_nursery() as nursery:
            warm = WarmInterfaces(fabric, slots, ids.release, thread, size, report=messages.append)
            made = Vpcs(host, fabric, warm, slots, ids)
            made.messages = messages
            for each in (vpc(1), vpc(2), DUAL):
                await fabric.open(each, nothing)
            await nursery.start(slots.serve)
            await nursery.start(warm.serve)
            yield made
            made.drop_all()
            nursery.cancel_scope.cancel()
        assert ids.claimed == set()
    finally:
        with trio.CancelScope(shield=True):
            await fabric.remove_all()
            await fabric.aclose()


@pytest.fixture
async def vpcs(host: Host, tmp_path: Path) -> AsyncIterator[Vpcs]:
    async with running(host, tmp_path / "run") as made:
        yield made


async def until_gone(vpcs: Vpcs, *links: str, of: Vpc | None = None) -> None:
    await until(lambda: not vpcs.router_links(of) & set(links))


async def test_two_tasks_of_a_vpc_ping_and_connect(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    assert pings(a.space, b.ip)
    assert pings(b.space, a.ip)
    with listening(b.space) as server:
        assert connects(a.space, b.ip)
        connection, sender = server.accept()
        connection.close()
    assert sender[0] == a.ip


async def test_the_task_sees_the_interface_that_it_would_see_on_aws(vpcs: Vpcs) -> None:
    task = await vpcs.task(1)
    [link] = task.space.ip("link", "show", "dev", "eth0")
    assert (link["mtu"], link["address"]) == (9001, task.interface.mac_address)
    [entry] = [link for link in task.space.ip("-4", "address", "show", "dev", "eth0") if link]
    [address] = entry["addr_info"]
    assert (address["local"], address["prefixlen"]) == (task.ip, 20)
    routes = {(r["dst"], r.get("gateway"), r["dev"]) for r in task.space.ip("route")}
    assert routes == {("default", "10.0.0.1", "eth0"), ("10.0.0.1", None, "eth0")}
    [neighbour] = task.space.ip("neighbour")
    assert (neighbour["dst"], neighbour["lladdr"]) == ("10.0.0.1", routers.MAC)
    assert neighbour["state"] == ["PERMANENT"]
    assert task.space.links() == {"lo", "eth0"}
    assert task.link in vpcs.router_links()
    with pytest.raises(OSError):
        socket.if_nametoindex(task.link)  # nothing of it is seen from the host


async def test_packets_of_the_whole_mtu_pass_and_longer_ones_do_not(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)

    def send(size: int) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
            try:
                return sender.sendto(b"x" * size, (b.ip, 9000))
            except OSError as error:
                return -(error.errno or 0)

    with catching(b.space) as receiver:
        assert a.space.call(send, 9001 - 28) == 9001 - 28
        assert len(receiver.recv(10000)) == 9001 - 28
    assert a.space.call(send, 9001 - 27) == -errno.EMSGSIZE


async def test_a_forged_source_is_dropped_and_the_true_one_passes(vpcs: Vpcs) -> None:
    a, b, c = [await vpcs.task(n) for n in (1, 2, 3)]
    with catching(b.space) as receiver:
        forge(a.space, a.ip, b.ip)
        assert receiver.recv(64) == b"forged"
        for source in (c.ip, "10.0.0.99", "8.8.8.8", "169.254.170.2", "127.0.0.1", "10.0.0.2"):
            forge(a.space, source, b.ip)
        with pytest.raises(TimeoutError):
            receiver.recv(64)


def frame(space: Space, source: str, kind: int, payload: bytes) -> None:
    """Send a raw Ethernet frame from eth0 to everybody; the socket must open."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("eth0", 0))
            head = b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + kind.to_bytes(2, "big")
            assert raw.send(head + payload) > 0

    space.call(send)


def arp(operation: int, mac: str, ip: str, target: str) -> bytes:
    body = b"\0\1\x08\0\6\4" + operation.to_bytes(2, "big")
    body += bytes.fromhex(mac.replace(":", "")) + socket.inet_aton(ip)
    return body + b"\xff" * 6 + socket.inet_aton(target)


async def test_nobody_believes_an_arp_frame_or_answers_one(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    router = vpcs.router()
    before = router.ip("neighbour"), b.space.ip("neighbour")
    evil = "0a:66:66:66:66:66"
    heard = a.space.call(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0608))
    with heard:
        heard.settimeout(SOON_S)
        for operation in (1, 2):
            for ip, target in ((b.ip, b.ip), (b.ip, "10.0.0.1"), ("10.0.0.1", a.ip)):
                frame(a.space, evil, 0x0806, arp(operation, evil, ip, target))
        with pytest.raises(TimeoutError):
            while heard.recvfrom(128)[1][2] == socket.PACKET_OUTGOING:
                pass
    after = router.ip("neighbour"), b.space.ip("neighbour")

    def plain(entries: list[dict[str, object]]) -> list[tuple[object, ...]]:
        return sorted((e["dst"], e["dev"], e["lladdr"]) for e in entries)

    assert [plain(each) for each in after] == [plain(each) for each in before]
    assert pings(a.space, b.ip)
    router.close()


async def test_a_router_advertisement_has_no_effect(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1, DUAL, ipv6=True), await vpcs.task(2, DUAL, ipv6=True)
    advertisement = (
        b"\x60\0\0\0\0\x10\x3a\xff"
        + socket.inet_pton(socket.AF_INET6, "fe80::66")
        + socket.inet_pton(socket.AF_INET6, "ff02::1")
        + b"\x86\0\x7b\xbb\x40\0\x07\x08\0\0\0\0\0\0\0\0"
    )
    router = vpcs.router(DUAL)
    before = router.ip("-6", "route"), b.space.ip("-6", "route")
    frame(a.space, a.interface.mac_address, 0x86DD, advertisement)
    await trio.sleep(0.1)
    assert (router.ip("-6", "route"), b.space.ip("-6", "route")) == before
    router.close()


async def test_an_address_that_is_nobodys_is_nowhere(vpcs: Vpcs) -> None:
    a = await vpcs.task(1)
    with catching(vpcs.host.lan) as receiver:
        for address in ("10.0.0.99", "10.0.15.254", "10.0.200.1", "169.254.169.254"):
            assert not pings(a.space, address)
            forge(a.space, a.ip, address)
        with pytest.raises(TimeoutError):
            receiver.recv(64)


async def test_an_address_is_unreachable_as_soon_as_its_interface_left(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    assert pings(a.space, b.ip)
    for _ in range(2):
        await vpcs.warm.leave(b.interface)
    assert not pings(a.space, b.ip)
    vpcs.drop(b)
    await until_gone(vpcs, b.link)
    assert not await vpcs.fabric.thread.run(
        lambda: vpcs.fabric.router(vpc().vpc_id).route.index(b.link)
    )
    await vpcs.warm.leave(b.interface)  # also when all of it has gone
    assert vpcs.messages == []


async def test_an_address_that_is_given_again_leads_to_its_new_owner(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    again = await vpcs.task(2)  # before the first one's namespace has gone
    with catching(again.space) as receiver:
        forge(a.space, a.ip, b.ip)
        assert receiver.recv(64) == b"forged"
        await vpcs.end(b)
        await until_gone(vpcs, b.link)
        forge(a.space, a.ip, again.ip)
        assert receiver.recv(64) == b"forged"


async def test_a_link_whose_namespace_somebody_holds_is_deleted_and_named(
    vpcs: Vpcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.network.warm._GONE_WITHIN_S", 0.2)
    a = await vpcs.task(1)
    await vpcs.warm.leave(a.interface)
    await until(lambda: bool(vpcs.messages))
    assert a.link in vpcs.messages[0]
    assert a.link not in vpcs.router_links()


async def test_overlapping_vpcs_do_not_reach_each_other(vpcs: Vpcs) -> None:
    here, there = await vpcs.task(1), await vpcs.task(1, vpc(2))
    neighbour = await vpcs.task(2)
    assert here.ip == there.ip
    with listening(here.space):
        assert connects(neighbour.space, here.ip)
        vpcs.drop(neighbour)
    with listening(here.space), catching(there.space) as receiver:
        stranger = await vpcs.task(2, vpc(2))
        assert not connects(stranger.space, here.ip)
        forge(stranger.space, stranger.ip, there.ip)
        assert receiver.recv(64) == b"forged"


async def test_ipv6_works_in_a_dual_stack_subnet(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1, DUAL, ipv6=True), await vpcs.task(2, DUAL, ipv6=True)
    assert b.interface.ipv6_address
    # The kernel gives a new IPv6 address its route in the background.
    await until(lambda: pings(a.space, b.interface.ipv6_address or ""))
    with listening(b.space, b.interface.ipv6_address):
        assert connects(a.space, b.interface.ipv6_address)
    assert not pings(a.space, "2600:1f18:1:2300::99")
    assert pings(a.space, b.ip)
    await vpcs.warm.leave(b.interface)
    assert not pings(a.space, b.interface.ipv6_address)


async def test_without_it_an_interface_has_no_ipv6_at_all(vpcs: Vpcs) -> None:
    for of in (vpc(), DUAL):
        task = await vpcs.task(1, of)
        assert [
            each for each in task.space.ip("-6", "address", "show", "dev", "eth0") if each
        ] == []
        assert task.space.ip("-6", "route", "show", "default") == []
        assert pings(task.space, "::1")


async def test_a_rate_bounds_what_is_sent_and_what_is_received(vpcs: Vpcs) -> None:
    slow, fast = await vpcs.task(1, mbit=50), await vpcs.task(2)
    for sender, receiver in ((slow, fast), (fast, slow)):
        mbit = await trio.to_thread.run_sync(throughput_mbit, sender.space, receiver)
        assert 25 < mbit < 60
    [inside] = slow.space.ip("-s", "link", "show", "dev", "eth0")
    assert inside["qdisc"] == "tbf"


def throughput_mbit(sender: Space, receiver: Task) -> float:
    size = 4 << 20
    with listening(receiver.space, port=8001) as server:
        client = sender.call(socket.create_connection, (receiver.ip, 8001))
        accepted, _ = server.accept()
        with client, accepted:
            client.setblocking(False)
            accepted.settimeout(10)
            began, got, left = time.monotonic(), 0, memoryview(bytes(size))
            while got < size:
                with suppress(BlockingIOError):
                    left = left[client.send(left) :] if left else left
                got += len(accepted.recv(1 << 16))
            return size * 8 / (time.monotonic() - began) / 1e6


async def test_a_pool_is_refilled_behind_the_request_and_for_each_vpc_that_asked(
    vpcs: Vpcs,
) -> None:
    vpcs.warm.keep_warm(vpc().vpc_id)
    await vpcs.task(1, vpc(2))
    await until(lambda: all(vpcs.warm.ready(vpc(n).vpc_id) == 2 for n in (1, 2)))
    assert vpcs.warm.ready(DUAL.vpc_id) == 0
    taken = await vpcs.warm.take(vpc(1).vpc_id)
    assert vpcs.warm.ready(vpc(1).vpc_id) == 1
    vpcs.warm.discard(taken)
    await vpcs.warm.forget(vpc(2).vpc_id)
    assert vpcs.warm.ready(vpc(2).vpc_id) == 0


async def test_a_cancelled_request_leaves_nothing(vpcs: Vpcs) -> None:
    for _ in range(20):
        with trio.move_on_after(0.001):
            vpcs.warm.discard(await vpcs.warm.take(DUAL.vpc_id))


async def test_an_interface_of_another_subnet_does_not_join(vpcs: Vpcs) -> None:
    ready = await vpcs.warm.take(vpc().vpc_id)
    with pytest.raises(NetworkError, match="is not in subnet-"):
        await vpcs.warm.join(ready, record(ready, vpc(), 1), subnet(vpc(2)))
    vpcs.warm.discard(ready)


async def test_a_vpc_that_is_not_open_has_no_interfaces(vpcs: Vpcs) -> None:
    for _ in range(2):
        with pytest.raises(NetworkError, match="no router"):
            await vpcs.warm.take("vpc-404")
    with pytest.raises(NetworkError, match="no router"):
        vpcs.warm.keep_warm("vpc-404")


async def test_a_vpc_whose_pool_cannot_be_filled_holds_up_no_other(vpcs: Vpcs) -> None:
    vpcs.warm.keep_warm(vpc(1).vpc_id)
    await vpcs.fabric.delete(vpc(1))  # without `forget`: its interfaces cannot be made any more
    vpcs.warm.keep_warm(vpc(2).vpc_id)
    await until(lambda: vpcs.warm.ready(vpc(2).vpc_id) == 2)


async def test_a_task_of_an_earlier_agent_joins_again_in_its_namespace(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    router = vpcs.router()
    before = (b.space.ip("route"), router.ip("route"))
    for _ in range(2):
        await vpcs.warm.rejoin(b.interface, subnet(vpc()), b.ready.slot.netns_fd)
    assert (b.space.ip("route"), router.ip("route")) == before
    router.close()
    assert pings(a.space, b.ip)
    # One whose links somebody deleted gets them again.
    b.space.run("ip", "link", "del", "eth0")
    assert not pings(a.space, b.ip)
    await vpcs.warm.rejoin(b.interface, subnet(vpc()), b.ready.slot.netns_fd)
    assert pings(a.space, b.ip)


async def test_a_sweep_takes_interfaces_that_no_task_has(vpcs: Vpcs) -> None:
    a, b = await vpcs.task(1), await vpcs.task(2)
    kept = [a.interface.network_interface_id]
    await vpcs.warm.forget(vpc().vpc_id)
    await until_gone(vpcs, *(vpcs.router_links() - {a.link, b.link}))
    assert await vpcs.warm.sweep(vpc().vpc_id, kept) == [b.link]
    assert vpcs.router_links() == {a.link}
    assert await vpcs.warm.sweep(vpc().vpc_id, kept) == []


async def test_fifty_interfaces_made_and_dropped_leave_nothing(vpcs: Vpcs) -> None:
    router = vpcs.router()
    settled = await vpcs.task(0)
    await vpcs.warm.forget(vpc().vpc_id)
    await until(lambda: vpcs.slots.ready == 2)
    before = (router.ip("route"), router.ip("neighbour"), router.ip("-6", "route"))
    descriptors = len(os.listdir("/proc/self/fd"))
    tasks = [await vpcs.task(n) for n in range(1, 51)]
    assert len({task.link for task in tasks} & router.links()) == 50
    assert pings(tasks[0].space, tasks[49].ip)
    for task in tasks:
        await vpcs.end(task)
    await vpcs.warm.forget(vpc().vpc_id)
    await until(lambda: router.links() == {"lo", "up0", settled.link})
    assert (router.ip("route"), router.ip("neighbour"), router.ip("-6", "route")) == before
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    assert vpcs.messages == []
    router.close()


async def test_a_failed_join_names_the_message(vpcs: Vpcs) -> None:
    ready = await vpcs.warm.take(vpc().vpc_id)
    space = Space(vpcs.host.space.thread, ready.slot.netns_fd)
    space.run("ip", "link", "del", "eth0")
    with pytest.raises(KernelError, match=r"RTM_NEWADDR 10.0.0.5/20 on link \d"):
        await vpcs.warm.join(ready, record(ready, vpc(), 1), subnet(vpc()))
    space.close()
    vpcs.warm.discard(ready)
