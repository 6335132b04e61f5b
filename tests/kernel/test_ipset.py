"""Address sets in a throw-away network namespace, as ipset(8) and pyroute2 see them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.ipset import FILL_MAX, AddressSet, AddressSets, Change, Member, Membership
from sandbox.kernel.netfilter import Chain, Iptables, RuleSet, Table
from sandbox.kernel.nfnetlink import BATCH_MAX
from sandbox.kernel.thread import KernelThread
from tests.conftest import ROOT

pytestmark = pytest.mark.guest

Answer = TypeVar("Answer")

ENI = AddressSet(name="eni", with_marks=True)
GROUPS = tuple(AddressSet(name=f"g{index}") for index in (1, 7, 300, 65535))
ENI6 = AddressSet(name="eni6", with_marks=True, family="inet6")
GROUP6 = AddressSet(name="g1-6", family="inet6")


def on_sets(inside: KernelThread, act: Callable[[AddressSets], Answer]) -> Answer:
    def run() -> Answer:
        with AddressSets() as sets:
            return act(sets)

    return inside.call(run)


def put(inside: KernelThread, *wanted: AddressSet) -> None:
    def act(sets: AddressSets) -> None:
        for each in wanted:
            sets.put(each)

    on_sets(inside, act)


@pytest.fixture
def membership(inside: KernelThread) -> Iterator[Membership]:
    """Opened inside; the tests use it from their own thread, which stays outside."""
    with inside.call(Membership) as opened:
        yield opened


def saved(inside: KernelThread) -> set[str]:
    """What `ipset` itself says: the members of all sets, without "add"."""
    run = subprocess.run
    done = inside.call(lambda: run(["ipset", "list", "-o", "save"], capture_output=True, text=True))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {line.removeprefix("add ") for line in lines if line.startswith("add ")}


def join(address: str, profile: int, *groups: str, eni: str = "eni") -> list[Change]:
    entry = Change("add", eni, Member(address, profile, 0xFFFF))
    return [entry, *(Change("add", group, Member(address)) for group in groups)]


def leave(changes: list[Change]) -> list[Change]:
    return [change._replace(verb="delete") for change in changes]


# Members of sets that are there ----------------------------------------------------------------


def test_a_join_and_a_leave_are_what_ipset_shows(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, ENI, *GROUPS)
    joined = join("10.0.0.10", 0x2A, *(group.name for group in GROUPS))
    membership.apply(joined)
    assert saved(inside) == {
        "eni 10.0.0.10 skbmark 0x2a/0xffff",
        "g1 10.0.0.10",
        "g7 10.0.0.10",
        "g300 10.0.0.10",
        "g65535 10.0.0.10",
    }
    membership.apply(leave(joined))
    assert saved(inside) == set()


def test_a_join_with_an_ipv6_address_is_what_ipset_shows(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, ENI6, GROUP6)
    membership.apply(join("fd00::a", 0xFFFF, "g1-6", eni="eni6"))
    assert saved(inside) == {"eni6 fd00::a skbmark 0xffff/0xffff", "g1-6 fd00::a"}


def test_networks_come_and_go_in_a_set_of_networks(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, AddressSet(name="pl1", type="hash:net"))
    changes = [Change("add", "pl1", Member(block)) for block in ("10.1.0.0/16", "10.2.0.0/24")]
    membership.apply(changes)
    membership.apply(leave(changes[:1]))
    assert saved(inside) == {"pl1 10.2.0.0/24"}


def test_joining_again_changes_the_mark_and_leaving_again_nothing(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, ENI, GROUPS[0])
    membership.apply(join("10.0.0.10", 1, "g1"))
    membership.apply(join("10.0.0.10", 2, "g1"))
    assert saved(inside) == {"eni 10.0.0.10 skbmark 0x2/0xffff", "g1 10.0.0.10"}
    for _ in range(2):
        membership.apply(leave(join("10.0.0.10", 2, "g1")))
    assert saved(inside) == set()


def test_a_refused_change_is_named_and_the_others_are_made(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, ENI, GROUPS[0])
    with pytest.raises(KernelError, match=r"IPSET_CMD_ADD missing 10\.0\.0\.10: ") as caught:
        membership.apply(join("10.0.0.10", 1, "missing", "g1"))
    assert caught.value.errno == errno.ENOENT
    assert saved(inside) == {"eni 10.0.0.10 skbmark 0x1/0xffff", "g1 10.0.0.10"}
    membership.apply(join("10.0.0.11", 2, "g1"))  # nothing of it is left in the socket
    assert "eni 10.0.0.11 skbmark 0x2/0xffff" in saved(inside)


def test_several_refused_changes_are_counted(inside: KernelThread, membership: Membership) -> None:
    put(inside, ENI)
    with pytest.raises(KernelError, match=r"missing1 10\.0\.0\.10 and 1 more"):
        membership.apply(join("10.0.0.10", 1, "missing1", "missing2"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change("add", "g1", Member("fd00::1")), "protocol error"),
        (Change("add", "g1", Member("10.0.0.1", 5)), "set has no marks"),
        (Change("add", "small", Member("10.0.9.9")), "set is full"),
        (Change("add", "pl1", Member("0.0.0.0/0")), "invalid prefix length"),
    ],
)
def test_a_number_of_ipsets_own_is_a_text_and_einval(
    inside: KernelThread, membership: Membership, change: Change, said: str
) -> None:
    put(
        inside,
        GROUPS[0],
        AddressSet(name="small", max_members=1, members=frozenset({Member("10.0.0.1")})),
        AddressSet(name="pl1", type="hash:net"),
    )
    if change.set_name == "small":  # a hash may hold some more than it was made for
        change = fill_up(membership, change)
    with pytest.raises(KernelError, match=said) as caught:
        membership.apply([change])
    assert caught.value.errno == errno.EINVAL
    assert change.member.address in caught.value.subject


def fill_up(membership: Membership, change: Change) -> Change:
    for number in range(200):
        last = change._replace(member=Member(f"10.0.1.{number}"))
        try:
            membership.apply([last])
        except KernelError:
            break
    return last


def test_more_changes_than_one_batch_are_all_made(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, GROUPS[0])
    addresses = [f"10.0.{number >> 8}.{number & 255}" for number in range(2 * BATCH_MAX + 1)]
    membership.apply([Change("add", "g1", Member(address)) for address in addresses])
    assert saved(inside) == {f"g1 {address}" for address in addresses}


def test_a_batch_of_refusals_does_not_overflow_the_socket(
    inside: KernelThread, membership: Membership
) -> None:
    changes = [Change("add", "missing", Member(f"10.0.0.{number}")) for number in range(BATCH_MAX)]
    with pytest.raises(KernelError, match=f"and {BATCH_MAX - 1} more") as caught:
        membership.apply(changes)
    assert caught.value.errno == errno.ENOENT


def test_no_changes_are_no_message(membership: Membership) -> None:
    membership.apply([])


JOIN = """
from sandbox.kernel import native
from sandbox.kernel.ipset import AddressSet, AddressSets, Change, Member, Membership
import os

native.unshare(native.CLONE_NEWNET)
with AddressSets() as sets:
    sets.put(AddressSet(name="eni", with_marks=True))
    for group in "abcde":
        sets.put(AddressSet(name=group))
address = "10.0.0.10"
groups = [Change("add", group, Member(address)) for group in "abcde"]
with Membership() as membership:
    os.write(2, b"[begin]")
    membership.apply([Change("add", "eni", Member(address, 7, 0xFFFF)), *groups])
    os.write(2, b"[end]")
"""


def test_a_join_of_five_groups_is_one_system_call_and_one_answer(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-o", trace, sys.executable, "-c", JOIN],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    _, after = trace.read_text().split("[begin]")
    between, _ = after.split("[end]")
    calls = [line.split()[1].partition("(")[0] for line in between.splitlines()[1:-1]]
    # Where there is no vDSO, Python's clock is a system call of its own.
    assert [call for call in calls if call != "clock_gettime"] == ["sendto", "recvfrom"]


def test_the_socket_is_usable_when_its_thread_is_gone_and_stays_in_its_namespace(
    inside: KernelThread,
) -> None:
    put(inside, GROUPS[0])
    namespace = inside.call(os.open, "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(namespace, "rb"), KernelThread("short-lived") as short:
        short.call(native.setns, namespace)
        membership = short.call(Membership)
    with membership:
        membership.apply([Change("add", "g1", Member("10.0.0.1"))])
    assert saved(inside) == {"g1 10.0.0.1"}


# Many members at once --------------------------------------------------------------------------


def many(count: int, **members: object) -> AddressSet:
    found = frozenset(Member(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}") for n in range(count))
    return AddressSet(name="many", members=found, **members)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, FILL_MAX, FILL_MAX + 1, 10_000])
def test_a_set_of_any_size_is_filled(inside: KernelThread, count: int) -> None:
    wanted = many(count)
    put(inside, wanted)
    assert saved(inside) == {f"many {member.address}" for member in wanted.members}


def test_a_set_is_filled_with_ipv6_addresses_and_marks(inside: KernelThread) -> None:
    members = frozenset(Member(f"fd00::{n:x}", n, 0xFFFF) for n in range(1, FILL_MAX + 1))
    put(inside, AddressSet(name="eni6", family="inet6", with_marks=True, members=members))
    assert on_sets(inside, lambda sets: sets.members("eni6")) == members


def test_filling_names_the_member_that_was_refused(
    inside: KernelThread, membership: Membership
) -> None:
    put(inside, GROUPS[0])
    members = [Member(f"10.0.0.{n}") for n in range(9)]
    with pytest.raises(KernelError, match=r"g1 fd00::1 \(protocol error") as caught:
        membership.fill("g1", [*members, Member("fd00::1"), Member("10.0.0.9")])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(KernelError, match="missing") as caught:
        membership.fill("missing", members)
    assert caught.value.errno == errno.ENOENT


def test_a_refused_filling_leaves_the_old_set(inside: KernelThread) -> None:
    old = AddressSet(name="g1", members=frozenset({Member("10.0.0.1")}))
    put(inside, old)
    wrong = AddressSet(name="g1", members=frozenset({Member("fd00::1")}))
    with pytest.raises(KernelError):
        put(inside, wrong)
    assert saved(inside) == {"g1 10.0.0.1"}
    assert on_sets(inside, lambda sets: sets.names()) == ["g1"]


def test_a_set_that_a_rule_names_is_busy(inside: KernelThread, iptables: Iptables) -> None:
    put(inside, GROUPS[0])
    rule = ("-m", "set", "--match-set", "g1", "dst", "-j", "ACCEPT")
    rules = RuleSet(tables=(Table("mangle", (Chain("OUTPUT", (rule,), "ACCEPT"),)),))
    inside.call(iptables.load, rules)
    with pytest.raises(KernelError) as caught:
        on_sets(inside, lambda sets: sets.destroy("g1"))
    assert caught.value.errno == errno.EBUSY
    assert on_sets(inside, lambda sets: sets.names()) == ["g1"]


# Sets ------------------------------------------------------------------------------------------


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
