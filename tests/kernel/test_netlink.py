"""Links between two throw-away network namespaces, used as a program would use them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.netlink import Link, Netlink, VethEnd
from sandbox.kernel.thread import KernelThread

ROUTER = VethEnd(name="sbtest0", mac="02:00:00:00:00:01")
TASK = VethEnd(name="eth0", mac="02:00:00:00:00:02")


@dataclass(frozen=True)
class Namespace:
    """A thread that lives in a network namespace of its own."""

    thread: KernelThread
    fd: int


@pytest.fixture
def router() -> Iterator[Namespace]:
    yield from namespace("router")


@pytest.fixture
def task() -> Iterator[Namespace]:
    yield from namespace("task")


def namespace(name: str) -> Iterator[Namespace]:
    with KernelThread(name) as thread:
        thread.call(native.unshare, native.CLONE_NEWNET)
        fd = thread.call(os.open, "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield Namespace(thread, fd)
        finally:
            os.close(fd)


def connect(router: Namespace, task: Namespace) -> tuple[Link, Link]:
    """A pair between the two with addresses, routes and neighbours: the ends in both."""

    def near() -> Link:
        with Netlink() as netlink:
            netlink.set_loopback_up()
            link = netlink.create_veth(ROUTER, TASK, far_netns_fd=task.fd, mtu=1400)
            netlink.add_address(link.index, ip_interface("10.0.0.1/32"))
            netlink.add_link_route(ip_network("10.0.0.10/32"), link.index)
            netlink.set_neighbour(link.index, ip_address("10.0.0.10"), TASK.mac)
            return link

    def far() -> Link:
        with Netlink() as netlink:
            netlink.set_loopback_up()
            link = netlink.find(TASK.name)
            assert link is not None
            assert not link.is_up
            netlink.set_up(link.index)
            netlink.add_address(link.index, ip_interface("10.0.0.10/20"))
            netlink.add_link_route(ip_network("10.0.0.1/32"), link.index)
            netlink.add_route(ip_network("0.0.0.0/0"), ip_address("10.0.0.1"), link.index)
            netlink.set_neighbour(link.index, ip_address("10.0.0.1"), ROUTER.mac)
            return link

    return router.thread.call(near), task.thread.call(far)


def udp(address: str, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    opened.settimeout(5)
    opened.bind((address, port))
    return opened


def test_a_datagram_crosses_a_pair_that_was_made_in_both_namespaces(
    router: Namespace, task: Namespace
) -> None:
    connect(router, task)
    with router.thread.call(udp, "10.0.0.1", 5000) as near, task.thread.call(udp, "", 0) as far:
        far.sendto(b"hello", ("10.0.0.1", 5000))
        data, sender = near.recvfrom(64)
    assert (data, sender[0]) == (b"hello", "10.0.0.10")


def test_the_ends_have_the_names_addresses_and_mtu_that_were_asked_for(
    router: Namespace, task: Namespace
) -> None:
    near, far = connect(router, task)
    assert (near.name, near.mac, near.mtu, near.is_up) == (ROUTER.name, ROUTER.mac, 1400, True)
    assert (far.name, far.mac, far.mtu) == (TASK.name, TASK.mac, 1400)
    with pytest.raises(OSError):
        socket.if_nametoindex(ROUTER.name)  # nothing of it is seen from the host


def test_the_mtu_can_be_changed(router: Namespace, task: Namespace) -> None:
    near, _ = connect(router, task)

    def change() -> Link | None:
        with Netlink() as netlink:
            netlink.set_mtu(near.index, 9001)
            return netlink.find(near.name)

    changed = router.thread.call(change)
    assert changed is not None
    assert changed.mtu == 9001


def test_no_route_to_the_prefix_is_added_beside_those_asked_for(
    router: Namespace, task: Namespace
) -> None:
    connect(router, task)
    lines = task.thread.call(read, "/proc/thread-self/net/route").splitlines()[1:]
    destinations = sorted(line.split()[1] for line in lines)
    assert destinations == ["00000000", "0100000A"]


def test_a_neighbour_is_permanent(router: Namespace, task: Namespace) -> None:
    connect(router, task)
    [line] = task.thread.call(read, "/proc/thread-self/net/arp").splitlines()[1:]
    address, _, flags, mac, *_ = line.split()
    assert (address, mac, flags) == ("10.0.0.1", ROUTER.mac, "0x6")  # complete, permanent


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def test_ipv6_is_usable_at_once(router: Namespace, task: Namespace) -> None:
    connect(router, task)

    def listen() -> socket.socket:
        with Netlink() as netlink:
            link = netlink.find(TASK.name)
            assert link is not None
            netlink.add_address(link.index, ip_interface("fd00::10/64"))
        opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        opened.bind(("fd00::10", 0))
        return opened

    task.thread.call(listen).close()


def test_a_blackhole_swallows_until_it_is_deleted(router: Namespace, task: Namespace) -> None:
    connect(router, task)
    metadata = ip_network("169.254.0.0/16")

    def send() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            return probe.connect_ex(("169.254.169.254", 80))

    def change(method: str) -> None:
        with Netlink() as netlink:
            getattr(netlink, method)(metadata)

    assert task.thread.call(send) == 0
    task.thread.call(change, "add_blackhole")
    assert task.thread.call(send) == errno.EINVAL  # the kernel's answer for a blackhole
    task.thread.call(change, "delete_route")
    assert task.thread.call(send) == 0


def test_deleting_one_end_deletes_the_other(router: Namespace, task: Namespace) -> None:
    near, _ = connect(router, task)

    def delete() -> None:
        with Netlink() as netlink:
            netlink.delete_link(near.index)

    def find() -> Link | None:
        with Netlink() as netlink:
            return netlink.find(TASK.name)

    router.thread.call(delete)
    assert task.thread.call(find) is None


def test_a_refusal_names_message_object_and_errno(router: Namespace, task: Namespace) -> None:
    near, _ = connect(router, task)

    def again() -> None:
        with Netlink() as netlink:
            netlink.add_address(near.index, ip_interface("10.0.0.1/32"))

    with pytest.raises(KernelError, match=r"RTM_NEWADDR 10\.0\.0\.1/32 on link") as caught:
        router.thread.call(again)
    assert caught.value.errno == errno.EEXIST
