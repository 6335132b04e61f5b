"""Rules and sets in a throw-away network namespace, judged by what becomes of packets."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.netfilter import (
    AddressSet,
    AddressSets,
    Chain,
    Iptables,
    Member,
    RuleSet,
    Table,
)
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

Answer = TypeVar("Answer")


@pytest.fixture
def inside() -> Iterator[KernelThread]:
    """A thread in a network namespace of its own, with the loopback up."""

    def enter() -> None:
        native.unshare(native.CLONE_NEWNET)
        with Netlink() as netlink:
            netlink.set_loopback_up()

    with KernelThread("netfilter") as thread:
        thread.call(enter)
        yield thread


@pytest.fixture(params=["nft", "legacy"])
def iptables(request: pytest.FixtureRequest, tmp_path: Path) -> Iptables:
    backend = Iptables(request.param, str(tmp_path / "lock"))
    if not backend.works():
        pytest.skip(f"this kernel or host has no iptables of backend {request.param}")
    return backend


def output(*rules: tuple[str, ...], others: tuple[Chain, ...] = ()) -> RuleSet:
    return RuleSet(tables=(Table("mangle", (Chain("OUTPUT", rules, "ACCEPT"), *others)),))


def arrives(address: str = "127.0.0.1") -> bool:
    """Does a datagram get from this namespace's loopback to itself?"""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((address, 0))
        receiver.settimeout(0.2)
        try:
            sender.sendto(b"?", receiver.getsockname())
            return receiver.recv(1) == b"?"
        except (TimeoutError, PermissionError):
            return False


DROP_ALL = output(("-p", "udp", "-j", "DROP"))


def test_rules_decide_and_are_replaced_whole(iptables: Iptables, inside: KernelThread) -> None:
    assert inside.call(arrives)
    inside.call(iptables.load, DROP_ALL)
    assert not inside.call(arrives)
    inside.call(iptables.load, output())
    assert inside.call(arrives)


def test_one_chain_is_replaced_and_the_others_stay(
    iptables: Iptables, inside: KernelThread
) -> None:
    own = Chain("gi1", (("-j", "ACCEPT"),))
    inside.call(
        iptables.load,
        output(("-j", "gi1"), ("-p", "udp", "-j", "DROP"), others=(own,)),
    )
    assert inside.call(arrives)
    emptied = RuleSet(tables=(Table("mangle", (Chain("gi1"),)),), keep_other_chains=True)
    inside.call(iptables.load, emptied)
    assert not inside.call(arrives)


def test_a_bad_rule_changes_nothing_and_says_why(iptables: Iptables, inside: KernelThread) -> None:
    inside.call(iptables.load, DROP_ALL)
    with pytest.raises(KernelError, match="nowhere") as caught:
        inside.call(iptables.load, output(("-j", "nowhere")))
    assert caught.value.call == f"iptables-{iptables.backend}-restore"
    assert not inside.call(arrives)


def test_words_reach_the_kernel_as_they_are(iptables: Iptables, inside: KernelThread) -> None:
    odd = 'a "quoted" word \\ and -j DROP'
    rule = ("-m", "comment", "--comment", odd, "-j", "ACCEPT")
    inside.call(iptables.load, output(rule, ("-p", "udp", "-j", "DROP")))
    assert inside.call(arrives)


def test_rules_count_what_they_saw(iptables: Iptables, inside: KernelThread) -> None:
    inside.call(iptables.load, output(("-p", "udp", "-j", "ACCEPT"), ("-p", "tcp", "-j", "DROP")))
    for _ in range(3):
        inside.call(arrives)
    udp, tcp = inside.call(iptables.counters, "mangle")["OUTPUT"]
    assert (udp.packets, udp.bytes) == (3, 3 * (20 + 8 + 1))
    assert (tcp.packets, tcp.bytes) == (0, 0)


def test_a_rule_follows_the_members_of_a_set(iptables: Iptables, inside: KernelThread) -> None:
    group = AddressSet(name="g1", members=frozenset({Member("127.0.0.2")}))
    on_sets(inside, lambda sets: sets.put(group))
    to_member = ("-m", "set", "--match-set", "g1", "dst", "-j", "ACCEPT")
    inside.call(iptables.load, output(to_member, ("-p", "udp", "-j", "DROP")))
    assert inside.call(arrives, "127.0.0.2")
    assert not inside.call(arrives, "127.0.0.3")
    on_sets(inside, lambda sets: sets.add(group, Member("127.0.0.3")))
    on_sets(inside, lambda sets: sets.delete(group, Member("127.0.0.2")))
    assert inside.call(arrives, "127.0.0.3")
    assert not inside.call(arrives, "127.0.0.2")
    with pytest.raises(KernelError):
        on_sets(inside, lambda sets: sets.destroy("g1"))


def test_a_member_carries_its_mark_to_the_packet(iptables: Iptables, inside: KernelThread) -> None:
    eni = AddressSet(name="eni", with_marks=True, members=frozenset({Member("127.0.0.2", 0x2A)}))
    on_sets(inside, lambda sets: sets.put(eni))
    marked = RuleSet(
        tables=(
            Table(
                "mangle",
                (
                    Chain(
                        "OUTPUT",
                        (
                            ("-j", "SET", "--map-set", "eni", "dst", "--map-mark"),
                            ("-m", "mark", "--mark", "0x2a", "-j", "ACCEPT"),
                            ("-p", "udp", "-j", "DROP"),
                        ),
                        "ACCEPT",
                    ),
                ),
            ),
        )
    )
    inside.call(iptables.load, marked)
    assert inside.call(arrives, "127.0.0.2")
    assert not inside.call(arrives, "127.0.0.3")


def test_the_lock_of_the_legacy_backend_is_a_file_of_our_own(
    inside: KernelThread, tmp_path: Path
) -> None:
    legacy = Iptables("legacy", str(tmp_path / "lock"))
    inside.call(legacy.load, output())
    assert (tmp_path / "lock").exists()


def test_a_backend_that_works_is_found(inside: KernelThread, tmp_path: Path) -> None:
    found = Iptables.detect(str(tmp_path / "lock"))
    inside.call(found.load, DROP_ALL)
    assert not inside.call(arrives)


# Sets ------------------------------------------------------------------------------------------


def on_sets(inside: KernelThread, act: Callable[[AddressSets], Answer]) -> Answer:
    def run() -> Answer:
        with AddressSets() as sets:
            return act(sets)

    return inside.call(run)


@pytest.mark.parametrize(
    "wanted",
    [
        AddressSet(name="empty"),
        AddressSet(name="g1", members=frozenset({Member("10.0.0.1"), Member("10.0.0.2")})),
        AddressSet(name="eni", with_marks=True, members=frozenset({Member("10.0.0.1", 7)})),
        AddressSet(name="pl1", type="hash:net", members=frozenset({Member("10.1.0.0/16")})),
        AddressSet(name="g6", family="inet6", members=frozenset({Member("fd00::1")})),
        AddressSet(
            name="pl6", type="hash:net", family="inet6", members=frozenset({Member("fd00::/64")})
        ),
        AddressSet(name="n" * 31, members=frozenset({Member("10.0.0.1")})),
        AddressSet(
            name="many", members=frozenset(Member(f"10.0.{n // 250}.{n % 250}") for n in range(600))
        ),
    ],
    ids=lambda wanted: wanted.name,
)
def test_a_set_has_the_members_that_were_put(inside: KernelThread, wanted: AddressSet) -> None:
    on_sets(inside, lambda sets: sets.put(wanted))
    assert on_sets(inside, lambda sets: sets.members(wanted.name)) == wanted.members
    assert on_sets(inside, lambda sets: sets.names()) == [wanted.name]


def test_putting_again_replaces_the_members_and_leaves_nothing_beside(
    inside: KernelThread,
) -> None:
    first = AddressSet(name="g1", members=frozenset({Member("10.0.0.1")}))
    second = AddressSet(name="g1", members=frozenset({Member("10.0.0.2")}))
    on_sets(inside, lambda sets: sets.put(first))
    on_sets(inside, lambda sets: sets.put(second))
    assert on_sets(inside, lambda sets: sets.members("g1")) == {Member("10.0.0.2")}
    assert on_sets(inside, lambda sets: sets.names()) == ["g1"]


def test_another_type_under_the_same_name_is_refused(inside: KernelThread) -> None:
    on_sets(inside, lambda sets: sets.put(AddressSet(name="g1")))
    with pytest.raises(KernelError, match="type does not match") as caught:
        on_sets(inside, lambda sets: sets.put(AddressSet(name="g1", type="hash:net")))
    assert caught.value.errno == errno.EINVAL
    assert on_sets(inside, lambda sets: sets.names()) == ["g1"]


def test_adding_and_deleting_may_be_repeated(inside: KernelThread) -> None:
    eni = AddressSet(name="eni", with_marks=True)

    def act(sets: AddressSets) -> frozenset[Member]:
        sets.put(eni)
        sets.add(eni, Member("10.0.0.1", 1))
        sets.add(eni, Member("10.0.0.1", 2))
        found = sets.members("eni")
        for _ in range(2):
            sets.delete(eni, Member("10.0.0.1"))
        for _ in range(2):
            sets.destroy("eni")
        return found

    assert on_sets(inside, act) == {Member("10.0.0.1", 2)}
    assert on_sets(inside, lambda sets: sets.names()) == []


def test_a_full_set_and_a_missing_one_refuse(inside: KernelThread) -> None:
    small = AddressSet(name="small", max_members=2)
    with pytest.raises(KernelError, match="IPSET_CMD_ADD"):
        on_sets(inside, lambda sets: fill_beyond(sets, small))
    with pytest.raises(KernelError) as caught:
        on_sets(inside, lambda sets: sets.members("missing"))
    assert caught.value.errno == errno.ENOENT


def fill_beyond(sets: AddressSets, small: AddressSet) -> None:
    sets.put(small)
    for number in range(200):
        sets.add(small, Member(f"10.0.0.{number}"))


def test_sockets_are_closed(inside: KernelThread) -> None:
    on_sets(inside, lambda sets: sets.names())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        on_sets(inside, lambda sets: sets.names())
    assert len(os.listdir("/proc/self/fd")) == before
