"""What a task's join and a revocation ask of the kernel: sets and tracked connections.

All of it in a network namespace that goes with this part. A join is one entry of the set that maps
addresses to profiles and one of each of three groups. The peers do the same: pyroute2's IPSet, an
`ipset` program for each join, and one `ipset` that reads commands all the time, on a terminal,
because only there it says that it has done one.
"""

from __future__ import annotations

import os
import pty
import socket
import statistics
import subprocess
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from pyroute2 import IPSet

from sandbox.kernel import native
from sandbox.kernel.conntrack import Conntrack
from sandbox.kernel.flows import Flow
from sandbox.kernel.ipset import AddressSet, AddressSets, Change, Member, Membership
from sandbox.kernel.netfilter import Chain, Iptables, RuleSet, Table
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.thread import KernelThread
from scripts.benchmarks.figures import Figure, Section

GROUPS = ("g1", "g2", "g3")
PROFILE = 0x2A
MANY = 10_000
FLOWS = 16_000
MARK, MARK_MASK = 0x70000, 0xFFFF0000
PROMPT = b"ipset> "
SIZES = {"quick": (50, 2), "full": (1000, 7)}
"""Joins of each, and rounds of what takes longer."""

OURS = "Sandbox, one message"
PYROUTE2 = "pyroute2 IPSet"
FORKED = "`ipset restore`, a program a join"
LASTING = "`ipset -`, one for all"

Join = Callable[[str], object]


def sets(directory: Path, quick: bool) -> Section:
    """In a thread of its own, whose namespace goes with it."""
    directory.mkdir(parents=True)
    with KernelThread("sets") as thread:
        thread.call(native.unshare, native.CLONE_NEWNET)
        return thread.call(measured, str(directory / "lock"), *SIZES["quick" if quick else "full"])


def measured(lock_file: str, joins: int, rounds: int) -> Section:
    joined = join_times(joins)
    filled = fill_times(rounds)
    tracked = flow_times(lock_file, rounds)
    rows = [row(name, each, 1e6, "us") for name, each in joined.items()]
    slower = {**filled, **tracked}
    rows += [row(name, each, 1e3, "ms") for name, each in slower.items()]
    return Section(
        "Sets and connections",
        f"The part of a join that concerns sets: {1 + len(GROUPS)} entries, in turns. "
        f"Then a set of {MANY} members, and {FLOWS} of {2 * FLOWS} tracked connections.",
        ("", "median", "min", "max"),
        rows,
        figures(joined, filled, tracked),
    )


Times = Mapping[str, Sequence[float]]


def figures(joined: Times, filled: Times, tracked: Times) -> list[Figure]:
    def ratio(times: Times, ours: str, peer: str) -> float:
        return statistics.median(times[ours]) / statistics.median(times[peer])

    return [
        Figure(
            "the sets' part of a join", statistics.median(joined[OURS]) * 1e3, "ms", "at most", 0.3
        ),
        Figure("a join, of pyroute2's", ratio(joined, OURS, PYROUTE2), "x", "at most", 0.1),
        Figure("a join, of `ipset -`'s", ratio(joined, OURS, LASTING), "x", "at most", 0.6),
        Figure(
            f"a set of {MANY}, of `ipset restore`'s", ratio(filled, PUT, RESTORE), "x", "at most", 1
        ),
        Figure(
            "a connection of a dump, read",
            statistics.median(tracked[READ]) / FLOWS * 1e6,
            "us",
            "at most",
            25,
        ),
    ]


def row(name: str, times: Sequence[float], scale: float, unit: str) -> tuple[str, ...]:
    values = (statistics.median(times), min(times), max(times))
    return (name, *(f"{value * scale:.{1 if unit == 'us' else 2}f} {unit}" for value in values))


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


# Joins -----------------------------------------------------------------------------------------


def join_times(joins: int) -> Times:
    with AddressSets() as address_sets:
        address_sets.put(AddressSet(name="eni", with_marks=True))
        for group in GROUPS:
            address_sets.put(AddressSet(name=group))
    with ExitStack() as stack:
        peers: dict[str, Join] = {
            OURS: by_message(stack.enter_context(Membership())),
            PYROUTE2: by_pyroute2(stack.enter_context(IPSet())),
            LASTING: stack.enter_context(lasting_ipset()),
            FORKED: by_program,
        }
        times: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(joins):
            for place, (name, join) in enumerate(peers.items()):
                address = f"10.{place}.{number >> 8}.{number & 255}"
                times[name].append(seconds(partial(join, address)))
    expect(joins * len(peers), "eni", *GROUPS)
    return times


def expect(count: int, *names: str) -> None:
    """A peer that was fast and did nothing would be no peer."""
    with AddressSets() as address_sets:
        for name in names:
            found = len(address_sets.members(name))
            if found != count:
                raise RuntimeError(f"{found} members in {name}, not {count}")


def by_message(membership: Membership) -> Join:
    def join(address: str) -> None:
        member = Member(address)
        entry = Change("add", "eni", Member(address, PROFILE, 0xFFFF))
        membership.apply([entry, *(Change("add", group, member) for group in GROUPS)])

    return join


def by_pyroute2(opened: IPSet) -> Join:
    def join(address: str) -> None:
        opened.add("eni", address, skbmark=(PROFILE, 0xFFFF), exclusive=False)
        for group in GROUPS:
            opened.add(group, address, exclusive=False)

    return join


def commands(address: str) -> list[str]:
    entry = f"add eni {address} skbmark {PROFILE:#x}/0xffff -exist\n"
    return [entry, *(f"add {group} {address} -exist\n" for group in GROUPS)]


def by_program(address: str) -> None:
    text = "".join(commands(address))
    subprocess.run(["ipset", "restore"], input=text, text=True, check=True)


@contextmanager
def lasting_ipset() -> Iterator[Join]:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    process = subprocess.Popen(["ipset", "-"], stdin=theirs, stdout=theirs)
    os.close(theirs)

    def wait_for_prompt() -> None:
        said = b""
        while not said.endswith(PROMPT):
            said += os.read(ours, 4096)

    def join(address: str) -> None:
        for line in commands(address):
            os.write(ours, line.encode())
            wait_for_prompt()

    try:
        wait_for_prompt()
        yield join
    finally:
        os.write(ours, b"quit\n")
        process.wait()
        os.close(ours)


# A whole set -----------------------------------------------------------------------------------

PUT = f"{MANY} members: Sandbox"
RESTORE = f"{MANY} members: `ipset restore`"


def fill_times(rounds: int) -> Times:
    addresses = [f"10.200.{number >> 8}.{number & 255}" for number in range(MANY)]
    wanted = AddressSet(name="many", members=frozenset(map(Member, addresses)))
    lines = "".join(f"add restored {address}\n" for address in addresses)
    text = f"create restored hash:ip\n{lines}"
    times: dict[str, list[float]] = {PUT: [], RESTORE: []}
    with AddressSets() as address_sets:
        for _ in range(rounds):
            times[PUT].append(seconds(lambda: address_sets.put(wanted)))
            times[RESTORE].append(seconds(lambda: restore(text)))
            expect(MANY, "many", "restored")
            address_sets.destroy("many")
            address_sets.destroy("restored")
    return times


def restore(text: str) -> None:
    subprocess.run(["ipset", "restore"], input=text, text=True, check=True)


# Connections -----------------------------------------------------------------------------------

DUMP = f"{FLOWS} connections by mark: dump"
READ = f"{FLOWS} connections by mark: read what was dumped"
DELETE = f"{FLOWS} connections: delete by tuple, in batches"
FLUSH = f"{FLOWS} connections: flush by mark"
FLUSH_ADDRESS = f"2 connections of {2 * FLOWS}: flush by address"


def flow_times(lock_file: str, rounds: int) -> Times:
    with Netlink() as netlink:
        netlink.set_loopback_up()
    Iptables.detect(lock_file).load(marking())
    times: dict[str, list[float]] = {
        name: [] for name in (DUMP, READ, DELETE, FLUSH_ADDRESS, FLUSH)
    }
    with Conntrack() as conntrack:
        for _ in range(rounds):
            make_flows()
            flush_address = partial(conntrack.flush_address, "127.1.0.0")
            times[FLUSH_ADDRESS].append(seconds(flush_address))
            make_flows()
            took, flows = list_flows(conntrack)
            times[DUMP].append(took[0])
            times[READ].append(took[1])
            times[DELETE].append(seconds(partial(conntrack.delete, flows)))
            make_flows()
            times[FLUSH].append(seconds(lambda: conntrack.flush_mark(MARK, MARK_MASK)))
            if len(flows) != FLOWS or list(conntrack.flows(MARK, MARK_MASK)):
                raise RuntimeError("not all connections were there, or not all went")
    return times


def list_flows(conntrack: Conntrack) -> tuple[tuple[float, float], list[Flow]]:
    began = time.perf_counter()
    dumped = conntrack.flows(MARK, MARK_MASK)
    between = time.perf_counter()
    flows = list(dumped)
    return (between - began, time.perf_counter() - between), flows


def marking() -> RuleSet:
    rule = ("-p", "udp", "--dport", "7001", "-j", "CONNMARK", "--set-mark", hex(MARK))
    return RuleSet(tables=(Table("mangle", (Chain("OUTPUT", (rule,), "ACCEPT"),)),))


def make_flows() -> None:
    """Half of them with the mark."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 5000))
        for number in range(FLOWS):
            for port in (7000, 7001):
                sender.sendto(b"", (f"127.1.{number >> 8}.{number & 255}", port))
