"""Prepared messages between two throw-away namespaces, seen by `ip` and by packets."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import rtnetlink
from sandbox.kernel.nfnetlink import BATCH_MAX
from sandbox.kernel.rtnetlink import LOOPBACK_INDEX, Message, VethEnd
from sandbox.kernel.thread import KernelThread
from tests.kernel.namespaces import Space

ROUTER = VethEnd("sbtest0", "02:00:00:00:00:01")
TASK = VethEnd("eth0", "0a:00:00:00:00:02")


@pytest.fixture
def spaces() -> Iterator[tuple[Space, Space]]:
    with KernelThread("spaces") as thread:
        router, task = Space(thread), Space(thread)
        yield router, task
        router.close()
        task.close()


def join(router: Space, task: Space) -> None:
    near, far = router.index(ROUTER.name), task.index(TASK.name)
    task.route.send(
        [
            rtnetlink.address(far, ip_interface("10.0.0.10/20")),
            rtnetlink.link_route(ip_network("10.0.0.1/32"), far),
            rtnetlink.gateway_route(ip_network("0.0.0.0/0"), ip_address("10.0.0.1"), far),
            rtnetlink.neighbour(far, ip_address("10.0.0.1"), ROUTER.mac),
        ]
    )
    router.route.send(
        [
            rtnetlink.link_route(ip_network("10.0.0.10/32"), near),
            rtnetlink.neighbour(near, ip_address("10.0.0.10"), TASK.mac),
        ]
    )


def pair(router: Space, task: Space) -> None:
    router.route.send([rtnetlink.veth(ROUTER, TASK, far_netns_fd=task.fd, mtu=9001)])
    task.route.send([rtnetlink.link_up(task.index(TASK.name))])


def state(space: Space) -> tuple[Any, ...]:
    return (
        [link.get("addr_info") for link in space.ip("address")],
        space.ip("route"),
        space.ip("neighbour"),
        space.ip("-6", "route"),
        space.ip("-6", "neighbour"),
    )


def test_a_pair_is_made_in_both_namespaces_with_both_ends_up(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    for space, end in ((router, ROUTER), (task, TASK)):
        [link] = space.ip("link", "show", "dev", end.name)
        assert (link["ifname"], link["address"], link["mtu"]) == (end.name, end.mac, 9001)
        assert link["operstate"] == "UP"
    with pytest.raises(KernelError, match="RTM_NEWLINK veth sbtest0") as caught:
        router.route.send([rtnetlink.veth(ROUTER, TASK, far_netns_fd=task.fd, mtu=9001)])
    assert caught.value.errno == errno.EEXIST


def test_a_join_is_two_sends_and_then_datagrams_cross(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    join(router, task)
    router.route.send([rtnetlink.address(LOOPBACK_INDEX, ip_interface("10.0.0.2/32"))])

    def bound(address: str) -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.settimeout(5)
        opened.bind((address, 5000))
        return opened

    with router.call(bound, "10.0.0.2") as near, task.call(bound, "") as far:
        far.sendto(b"hello", ("10.0.0.2", 5000))
        assert near.recvfrom(16) == (b"hello", ("10.0.0.10", 5000))


def test_what_was_put_reads_as_ip_would_have_made_it(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    join(router, task)
    prepared = state(task), state(router)
    for space, words in (
        (task, "neighbour del 10.0.0.1 dev eth0"),
        (task, "address del 10.0.0.10/20 dev eth0"),
        (router, "route del 10.0.0.10 dev sbtest0"),
        (router, "neighbour del 10.0.0.10 dev sbtest0"),
    ):
        space.ip(*words.split())
    task.ip("route", "flush", "table", "main")
    for space, words in (
        (task, "address add 10.0.0.10/20 dev eth0 noprefixroute"),
        (task, "route add 10.0.0.1 dev eth0 scope link proto static"),
        (task, "route add default via 10.0.0.1 dev eth0 proto static"),
        (task, f"neighbour replace 10.0.0.1 dev eth0 lladdr {ROUTER.mac} nud permanent"),
        (router, "route add 10.0.0.10 dev sbtest0 scope link proto static"),
        (router, f"neighbour replace 10.0.0.10 dev sbtest0 lladdr {TASK.mac} nud permanent"),
    ):
        space.ip(*words.split())
    assert (state(task), state(router)) == prepared


def test_joining_again_changes_nothing(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    join(router, task)
    before = state(task), state(router)
    join(router, task)
    assert (state(task), state(router)) == before


def test_an_address_moves_to_the_link_that_has_it_now(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    other = VethEnd("sbtest1", ROUTER.mac)
    router.route.send(
        [rtnetlink.veth(other, VethEnd("eth1", TASK.mac), far_netns_fd=task.fd, mtu=1500)]
    )
    address = ip_network("10.0.0.10/32")
    first, second = router.index("sbtest0"), router.index("sbtest1")
    router.route.send([rtnetlink.link_route(address, first)])
    router.route.send([rtnetlink.link_route(address, second)])
    assert [route["dev"] for route in router.ip("route")] == ["sbtest1"]
    with pytest.raises(KernelError, match=r"RTM_DELROUTE 10.0.0.10/32") as caught:
        router.route.send([rtnetlink.delete_route(address, first)])
    assert caught.value.errno == errno.ESRCH
    router.route.send([rtnetlink.delete_route(address, first)], allowing={errno.ESRCH})
    router.route.send([rtnetlink.delete_route(address, second)])
    assert router.ip("route") == []


def test_a_failure_names_the_message_and_what_came_after_it_was_done(
    spaces: tuple[Space, Space],
) -> None:
    router, _ = spaces
    unreachable = rtnetlink.gateway_route(
        ip_network("10.9.0.0/16"), ip_address("10.0.0.1"), LOOPBACK_INDEX
    )
    with pytest.raises(KernelError, match=r"RTM_NEWROUTE 10.9.0.0/16 via 10.0.0.1 .*gateway"):
        router.route.send([unreachable, rtnetlink.blackhole(ip_network("10.8.0.0/16"))])
    assert [route["dst"] for route in router.ip("route")] == ["10.8.0.0/16"]
    router.route.send([rtnetlink.link_up(LOOPBACK_INDEX)])  # the socket is as good as before


def test_all_messages_of_a_full_batch_may_be_refused(spaces: tuple[Space, Space]) -> None:
    router, _ = spaces
    missing = [rtnetlink.link_up(9999)] * BATCH_MAX
    for _ in range(3):
        with pytest.raises(KernelError, match="link 9999 up") as caught:
            router.route.send(missing)
        assert caught.value.errno == errno.ENODEV
    with pytest.raises(ValueError, match="at once"):
        router.route.send([*missing, missing[0]])


def test_ipv6_is_joined_the_same_way(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    near, far = router.index(ROUTER.name), task.index(TASK.name)
    gateway = ip_address("fe80::1")
    wanted: list[Message] = [
        rtnetlink.address(far, ip_interface("fd00::10/64")),
        rtnetlink.gateway_route(ip_network("::/0"), gateway, far),
        rtnetlink.neighbour(far, gateway, ROUTER.mac),
    ]
    for _ in range(2):
        task.route.send(wanted)
        router.route.send(
            [
                rtnetlink.link_route(ip_network("fd00::10/128"), near),
                rtnetlink.neighbour(near, ip_address("fd00::10"), TASK.mac),
                rtnetlink.blackhole(ip_network("fd00::/56")),
            ]
        )
    [link] = filter(None, task.ip("-6", "address", "show", "dev", "eth0"))
    assert [address["local"] for address in link["addr_info"]] == ["fd00::10"]
    assert {"dst": "default", "gateway": "fe80::1", "dev": "eth0"}.items() <= task.ip(
        "-6", "route", "show", "default"
    )[0].items()
    kinds = {route["dst"]: route.get("type", "unicast") for route in router.ip("-6", "route")}
    assert kinds["fd00::10"] == "unicast"
    assert kinds["fd00::/56"] == "blackhole"


def test_deleting_one_end_deletes_the_other(spaces: tuple[Space, Space]) -> None:
    router, task = spaces
    pair(router, task)
    router.route.send([rtnetlink.delete_link(ROUTER.name)])
    assert [link["ifname"] for link in task.ip("link")] == ["lo"]
    with pytest.raises(KernelError, match="RTM_DELLINK sbtest0") as caught:
        router.route.send([rtnetlink.delete_link(ROUTER.name)])
    assert caught.value.errno == errno.ENODEV
