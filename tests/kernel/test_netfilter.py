"""Rules and sets in a throw-away network namespace, judged by what becomes of packets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.errors import KernelError
from sandbox.kernel.ipset import AddressSet, AddressSets, Member
from sandbox.kernel.netfilter import Chain, Iptables, RuleSet, Table
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

Answer = TypeVar("Answer")


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


def test_asking_for_what_is_there_makes_no_table(iptables: Iptables, inside: KernelThread) -> None:
    assert inside.call(iptables.saved) == {}
    inside.call(iptables.load, DROP_ALL)
    saved = inside.call(iptables.saved)
    assert list(saved) == ["mangle"]
    assert "-A OUTPUT -p udp -j DROP" in saved["mangle"]


def test_rules_of_others_stay_around_those_that_come_and_go(
    iptables: Iptables, inside: KernelThread
) -> None:
    inside.call(iptables.load, output(("-p", "tcp", "-j", "ACCEPT")))
    jump = ("OUTPUT", ("-j", "OURS"))
    chain = Chain("OURS", (("-p", "udp", "-j", "DROP"),))
    come = RuleSet(tables=(Table("mangle", (chain,), first=(jump,)),), keep_other_chains=True)
    go = RuleSet(
        tables=(Table("mangle", (Chain("OURS"),), without=(jump,), gone=("OURS",)),),
        keep_other_chains=True,
    )
    before = inside.call(iptables.saved)
    inside.call(iptables.load, come)
    assert not inside.call(arrives)
    inside.call(iptables.load, go)
    assert inside.call(arrives)
    assert inside.call(iptables.saved) == before


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


def on_sets(inside: KernelThread, act: Callable[[AddressSets], Answer]) -> Answer:
    def run() -> Answer:
        with AddressSets() as sets:
            return act(sets)

    return inside.call(run)
