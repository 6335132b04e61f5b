"""What Sandbox adds to the rules of the host: three chains with one jump each, and nothing more,
however many VPCs and tasks there are.

    filter FORWARD -> SB-<inst>-FWD    answers of tasks: accept
                                       private destinations of tasks: drop
                                       from and to uplinks: accept
                                       through a link made to forward for our sake, else: drop
    filter INPUT -> SB-<inst>-IN       new connections of tasks to the host: drop
    nat POSTROUTING -> SB-<inst>-POST  the public pool leaves behind the host's own address

All of them match on `sb<inst>u+`, the uplinks of this agent. The host's other rules are neither
read for their meaning nor moved: a jump is put before all others if it is not there at all, so
what others put before it later (Docker does) stays before it.

An internet gateway carries no private destinations. Without the drops a task with a public address
would reach the host's network and, in a cloud, the credentials of the host itself. They are the
private networks of RFC 1918, those of carriers (RFC 6598), link-local ones (RFC 3927) and Azure's
virtual public address (Azure documentation, "What is IP address 168.63.129.16?").

Two backends of iptables may be in use, and a packet must pass both. Ours go where the host's rules
are: to nft, to legacy if that alone shows rules, to both if both do. Asking makes no table.

`net.ipv4.ip_forward` is not touched. Where it is 0, the uplinks forward (`network.uplinks`) and so
do the links with the host's default routes; what these forwarded before is written down before it
is changed and put back by `remove`, and meanwhile they forward to uplinks alone. If somebody turns
`ip_forward` on later, all this is theirs again, at the next `repair`.

The Docker of a host may be set to its own table of nft, and firewalld has one: an accept of ours
does not overrule a drop there.

Functions act on the calling thread, a KernelThread in the host's namespace, and hold the lock of
iptables that all of the host uses.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

import msgspec

from sandbox.errors import KernelError
from sandbox.kernel import netns
from sandbox.kernel.netfilter import BACKENDS, Backend, Chain, Iptables, Rule, RuleSet, Table
from sandbox.model import names

HOST_LOCK = "/run/xtables.lock"
"""iptables(8)"""

PRIVATE = (
    "169.254.0.0/16",
    "168.63.129.16/32",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
)

Hook = Literal["FWD", "IN", "POST"]
HOOKS: tuple[tuple[Hook, Literal["filter", "nat"], str], ...] = (
    ("FWD", "filter", "FORWARD"),
    ("IN", "filter", "INPUT"),
    ("POST", "nat", "POSTROUTING"),
)

Saved = Mapping[str, tuple[str, ...]]
"""Of one backend: see `Iptables.saved`."""

_COPIES_MAX = 16
"""Of one jump: as often as somebody may have loaded a dump of our rules beside them."""
_LINK = re.compile(r"[^\s/]{1,15}")
_FORWARDING = "net/ipv4/conf/{}/forwarding"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Which rules; equality decides whether the host's must be touched."""

    instance: str
    public_pool: IPv4Network
    private_destinations: tuple[str, ...] = ()
    """Networks among `PRIVATE` that an internet gateway carries all the same."""
    guarded: tuple[str, ...] = ()
    """Links that forward for our sake only."""

    @property
    def uplinks(self) -> str:
        return f"{names.uplink(self.instance, 0)[:-1]}+"

    def chain(self, hook: Hook) -> Chain:
        return Chain(names.chain(self.instance, hook), tuple(self._rules(hook)))

    def jump(self, hook: Hook) -> Rule:
        return ("-j", names.chain(self.instance, hook))

    def _rules(self, hook: Hook) -> Iterable[Rule]:
        ours = self.uplinks
        tracked = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED")
        if hook == "FWD":
            # Or nobody in the host's own network could use a public address: it is private, too.
            yield ("-i", ours, *tracked, "-j", "ACCEPT")
            for network in self.private_destinations:
                yield ("-d", network, "-i", ours, "-j", "ACCEPT")
            for network in PRIVATE:
                yield ("-d", network, "-i", ours, "-j", "DROP")
            yield ("-i", ours, "-j", "ACCEPT")
            yield ("-o", ours, "-j", "ACCEPT")
            for link in self.guarded:
                yield ("-i", link, "-j", "DROP")
        elif hook == "IN":
            yield ("-i", ours, "-m", "conntrack", "!", *tracked[2:], "-j", "DROP")
        else:
            yield ("-s", f"{self.public_pool}", "!", "-o", ours, "-j", "MASQUERADE")


# Decisions -------------------------------------------------------------------------------------


def holding(saved: Mapping[Backend, Saved], instance: str) -> tuple[Backend, ...]:
    """The backends that have rules of others: those decide. The first if none has."""
    found = tuple(b for b in BACKENDS if b in saved and _has_rules(saved[b], instance))
    return found or tuple(saved)[:1]


def _has_rules(saved: Saved, instance: str) -> bool:
    own = names.chain(instance, "")
    lines = [line for table in saved.values() for line in table]
    is_policy = any(line.startswith(":") and line.endswith(" DROP") for line in lines)
    return is_policy or any(line.startswith("-A ") and own not in line for line in lines)


def installing(wanted: Footprint, saved: Saved) -> RuleSet:
    """One transaction: chains become what is wanted, and jumps come where there are none."""
    return _on_tables(
        lambda hook, table, parent: Table(
            table,
            (wanted.chain(hook),),
            first=() if _copies(wanted, hook, saved) else ((parent, wanted.jump(hook)),),
        )
    )


def removing(wanted: Footprint, saved: Saved) -> RuleSet | None:
    """All jumps and chains go; None if there are none. Whatever is in the chains."""

    def gone(hook: Hook, table: Literal["filter", "nat"], parent: str) -> Table:
        name = names.chain(wanted.instance, hook)
        if not any(line.startswith(f":{name} ") for line in saved.get(table, ())):
            return Table(table)
        jumps = ((parent, wanted.jump(hook)),) * _copies(wanted, hook, saved)
        return Table(table, (Chain(name),), without=jumps, gone=(name,))

    rules = _on_tables(gone)
    return rules if any(table.chains for table in rules.tables) else None


def own_lines(saved: Saved, instance: str) -> frozenset[str]:
    """What of it is ours, to see whether somebody has touched it."""
    own = names.chain(instance, "")
    return frozenset(
        f"{table} {line}"
        for table, lines in saved.items()
        for line in lines
        if line.startswith("-A ") and own in line
    )


def _copies(wanted: Footprint, hook: Hook, saved: Saved) -> int:
    table, parent = next((t, p) for h, t, p in HOOKS if h == hook)
    line = " ".join(("-A", parent, *wanted.jump(hook)))
    return min(saved.get(table, ()).count(line), _COPIES_MAX)


def _on_tables(make: Callable[[Hook, Literal["filter", "nat"], str], Table]) -> RuleSet:
    """FWD and IN are of one table, hence of one transaction."""
    merged: dict[str, Table] = {}
    for hook, table, parent in HOOKS:
        one = make(hook, table, parent)
        other = merged.get(table, Table(table))
        merged[table] = Table(
            table,
            other.chains + one.chains,
            first=other.first + one.first,
            without=other.without + one.without,
            gone=other.gone + one.gone,
        )
    return RuleSet(tables=tuple(merged.values()), keep_other_chains=True)


# Effects ---------------------------------------------------------------------------------------


class Forwarding(msgspec.Struct, frozen=True, kw_only=True):
    """Written down before it is changed: what the links forwarded before."""

    links: dict[str, str] = {}


@dataclass
class HostRules:
    """The footprint on this host. `memory` is a file that says what must be put back."""

    instance: str
    public_pool: IPv4Network
    memory: Path
    private_destinations: tuple[str, ...] = ()
    lock_file: str = HOST_LOCK
    _seen: dict[Backend, frozenset[str]] = field(default_factory=dict)

    def install(self) -> None:
        """Idempotent. All of a table or nothing of it."""
        wanted = self._wanted(self._open_forwarding())
        saved = self._saved()
        seen: dict[Backend, frozenset[str]] = {}
        for backend in holding(saved, self.instance):
            iptables = self._iptables(backend)
            iptables.load(installing(wanted, saved.get(backend, {})))
            seen[backend] = own_lines(iptables.saved(), self.instance)
        self._seen = seen

    def is_present(self) -> bool:
        """Whether the host's rules are as the last `install` left them, in the backends that hold
        its rules now. One program a backend, 3 ms each where the host has few rules."""
        saved = self._saved()
        chosen = holding(saved, self.instance)
        now = {b: own_lines(saved.get(b, {}), self.instance) for b in chosen}
        return now == self._seen and self._links_to_open() == self._remembered().links.keys()

    def repair(self) -> bool:
        """Install again if something is missing; whether there was."""
        if self.is_present():
            return False
        self.install()
        return True

    def remove(self) -> None:
        """Everything, in both backends, whoever installed it. Idempotent."""
        for backend, saved in self._saved().items():
            rules = removing(self._wanted(()), saved)
            if rules is not None:
                self._iptables(backend).load(rules)
        self._close_forwarding(self._remembered().links)
        self.memory.unlink(missing_ok=True)
        self._seen = {}

    def _wanted(self, guarded: Iterable[str]) -> Footprint:
        return Footprint(
            instance=self.instance,
            public_pool=self.public_pool,
            private_destinations=self.private_destinations,
            guarded=tuple(sorted(guarded)),
        )

    def _iptables(self, backend: Backend) -> Iptables:
        return Iptables(backend, self.lock_file)

    def _saved(self) -> dict[Backend, Saved]:
        """Of the backends whose programs are installed."""
        found: dict[Backend, Saved] = {}
        for backend in BACKENDS:
            try:
                found[backend] = self._iptables(backend).saved()
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
        if not found:
            raise KernelError("exec", "iptables-nft-save", errno.ENOENT)
        return found

    # Forwarding

    def _links_to_open(self) -> set[str]:
        if netns.read_sysctl("net/ipv4/ip_forward") != "0":
            return set()
        return default_route_links()

    def _open_forwarding(self) -> set[str]:
        """Let the links with default routes forward, and write down first what they did before."""
        links, known = self._links_to_open(), self._remembered().links
        before = {link: known.get(link) or _forwarding(link) or "0" for link in links}
        gone = {link: value for link, value in known.items() if link not in links}
        if before != known:
            self._remember(before | gone)
            for link in links:
                netns.write_sysctl(_FORWARDING.format(link), "1")
            self._close_forwarding(gone)
            self._remember(before)
        return {link for link, value in before.items() if value == "0"}

    def _close_forwarding(self, before: Mapping[str, str]) -> None:
        """Not where somebody has turned forwarding on for all links since."""
        if netns.read_sysctl("net/ipv4/ip_forward") != "0":
            return
        for link, value in before.items():
            if _forwarding(link) is not None:
                netns.write_sysctl(_FORWARDING.format(link), value)

    def _remembered(self) -> Forwarding:
        try:
            return msgspec.json.decode(self.memory.read_bytes(), type=Forwarding)
        except FileNotFoundError:
            return Forwarding()
        except (OSError, msgspec.MsgspecError) as error:
            raise KernelError("read", f"{self.memory} ({error})", errno.EIO) from error

    def _remember(self, links: Mapping[str, str]) -> None:
        fresh = self.memory.with_suffix(".new")
        try:
            self.memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.encode(Forwarding(links=dict(links))))
            os.replace(fresh, self.memory)
        except OSError as error:
            raise KernelError("write", f"{self.memory}", error.errno or errno.EIO) from error


def default_route_links() -> set[str]:
    """The links that lead out of the host by IPv4 (proc_pid_net(5): route)."""
    with open("/proc/thread-self/net/route") as file:
        rows = [line.split() for line in file.read().splitlines()[1:]]
    found = {row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"}
    return {link for link in found if _LINK.fullmatch(link)}


def _forwarding(link: str) -> str | None:
    return netns.read_sysctl(_FORWARDING.format(link))
