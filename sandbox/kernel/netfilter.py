"""The packet filter of one network namespace: rule sets and address sets.

Both are data, and equality decides whether the kernel must be touched. A `RuleSet` is rendered
(pure) to one input of iptables-restore: a table changes wholly or not at all, and packets never see
half of it. Rules come and go rarely; what comes and goes with every task is a member of an
`AddressSet`, and that costs 0.3 ms and no rule.

Everything acts on the namespace of the calling thread: a KernelThread that has entered one of ours.
The programs take a lock file shared by the whole host; ours is named by the caller, since nobody
else writes to our namespaces.

Two backends exist. nft is preferred: the legacy tables are disappearing from distributions. Both
refuse a bad line with a message of their own and change nothing.

Not here: which rules. A program that is missing, too slow or refuses is a KernelError whose call is
the program's name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from pyroute2 import IPSet
from pyroute2.netlink.exceptions import NetlinkError

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.thread import KernelThread

Family = Literal["inet", "inet6"]
Backend = Literal["nft", "legacy"]
Rule = tuple[str, ...]
"""The words of one rule, without `-A CHAIN`: ("-i", "eth0", "-j", "ACCEPT")."""

BACKENDS: tuple[Backend, ...] = ("nft", "legacy")
LOCK_WAIT_S = 5
TIMEOUT_S = 30.0

SET_NAME_MAX_BYTES = 31
PLAIN_WORD = re.compile(r"[\w.,:/+=!@%-]+", re.ASCII)
COUNTED_RULE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) ")

# linux/netfilter/ipset/ip_set.h
LIST_NAMES = 2
FIRST_PRIVATE_ERROR = 4096


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    rules: tuple[Rule, ...] = ()
    policy: Literal["ACCEPT", "DROP"] | None = None
    """Of a built-in chain; a chain of our own has none."""


@dataclass(frozen=True, slots=True)
class Table:
    name: Literal["raw", "mangle", "nat", "filter"]
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    tables: tuple[Table, ...]
    family: Family = "inet"
    keep_other_chains: bool = False
    """False: the tables become exactly this. True: only the chains named here are replaced."""


PROBE = RuleSet(
    tables=(Table("mangle", (Chain("FORWARD", (("-j", "probe"),), "DROP"), Chain("probe"))),)
)


@dataclass(frozen=True, slots=True)
class Counter:
    packets: int
    bytes: int


def render(rules: RuleSet) -> str:
    """The input of iptables-restore. Every word is one word there, whatever it contains."""
    return "".join(line + "\n" for table in rules.tables for line in _table(table))


def _table(table: Table) -> Iterator[str]:
    yield f"*{table.name}"
    for chain in table.chains:
        yield f":{_quoted(chain.name)} {chain.policy or '-'} [0:0]"
    for chain in table.chains:
        for rule in chain.rules:
            yield " ".join(["-A", *map(_quoted, (chain.name, *rule))])
    yield "COMMIT"


def _quoted(word: str) -> str:
    if PLAIN_WORD.fullmatch(word):
        return word
    if not word.isprintable():
        raise ValueError(f"not printable in a rule: {word!r}")
    return '"' + word.replace("\\", r"\\").replace('"', r"\"") + '"'


@dataclass(frozen=True, slots=True)
class Iptables:
    """The programs of one backend."""

    backend: Backend
    lock_file: str

    @classmethod
    def detect(cls, lock_file: str) -> Iptables:
        """The first backend whose programs are installed and which this kernel can do."""
        for backend in BACKENDS:
            found = cls(backend, lock_file)
            if found.works():
                return found
        raise KernelError("iptables-restore", "neither nft nor legacy works", errno.ENOENT)

    def works(self) -> bool:
        """Tried out in a namespace of its own: `--test` passes even where the kernel cannot."""
        with KernelThread("iptables-probe") as scratch:
            try:
                scratch.call(native.unshare, native.CLONE_NEWNET)
                scratch.call(self.load, PROBE)
            except KernelError:
                return False
        return True

    def load(self, rules: RuleSet) -> None:
        """Make the kernel's tables these. All of a table or nothing of it; tables one by one."""
        options = ["--noflush"] if rules.keep_other_chains else []
        self._run(rules.family, "restore", options, render(rules))

    def counters(self, table: str, family: Family = "inet") -> dict[str, tuple[Counter, ...]]:
        """Packets and bytes of each rule, by chain, in the order of the rules."""
        found: dict[str, list[Counter]] = {}
        for line in self._run(family, "save", ["-c", "-t", table], "").splitlines():
            if match := COUNTED_RULE.match(line):
                counter = Counter(int(match[1]), int(match[2]))
                found.setdefault(match[3], []).append(counter)
        return {chain: tuple(counters) for chain, counters in found.items()}

    def _run(self, family: Family, verb: str, options: list[str], text: str) -> str:
        prefix = "iptables" if family == "inet" else "ip6tables"
        name = f"{prefix}-{self.backend}-{verb}"
        program = shutil.which(name, path=_search_path())
        if program is None:
            raise KernelError("exec", name, errno.ENOENT)
        if verb == "restore":
            options = ["-w", str(LOCK_WAIT_S), *options]
        try:
            done = subprocess.run(
                [program, *options],
                input=text,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env={"PATH": _search_path(), "XTABLES_LOCKFILE": self.lock_file},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(name, f"after {TIMEOUT_S} s", errno.ETIMEDOUT) from error
        except OSError as error:
            raise KernelError("exec", name, error.errno or errno.EIO) from error
        if done.returncode != 0:
            raise KernelError(name, _complaint(done.stderr), errno.EINVAL)
        return done.stdout


def _search_path() -> str:
    # An agent that was started by hand may lack the directories of the administrator's programs.
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _complaint(message: str) -> str:
    """What is wrong, without "iptables-nft-restore v1.8.9 (nf_tables): " before it."""
    text = re.sub(r"^\S+ v[\d.]+ \(\w+\): ", "", message).strip()
    return text.partition("\n")[0] or "no message"


# Address sets ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    address: str
    """An address, or in a hash:net a network, in its usual short form."""
    mark: int | None = None
    """What `-j SET --map-mark` writes to the packet: needs a set `with_marks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSet:
    name: str
    type: Literal["hash:ip", "hash:net"] = "hash:ip"
    family: Family = "inet"
    with_marks: bool = False
    max_members: int = 65536
    members: frozenset[Member] = frozenset()


class AddressSets:
    """An ipset socket of the namespace that this thread is in now; the thread's own, as Netlink."""

    def __init__(self) -> None:
        with _asking("socket", "NETLINK_NETFILTER"):
            self._ipset: Any = IPSet()

    def put(self, wanted: AddressSet) -> None:
        """Create the set, or replace it in one step: rules see the old members or the new ones.

        An existing set keeps its type, family and marks: EINVAL if `wanted` has others.
        """
        if self._create(wanted, wanted.name):
            self._fill(wanted, wanted.name)
        else:
            self._replace(wanted)

    def add(self, to: AddressSet, member: Member) -> None:
        """A member that is there takes the new mark."""
        self._add(to, to.name, member)

    def delete(self, where: AddressSet, member: Member) -> None:
        """Nothing to do if it is not there."""
        with _asking("IPSET_CMD_DEL", f"{where.name} {member.address}"):
            self._ipset.delete(
                where.name,
                member.address,
                family=_address_family(where.family),
                etype=_entry(where),
                exclusive=False,
            )

    def members(self, name: str) -> frozenset[Member]:
        with _asking("IPSET_CMD_LIST", name):
            answers = list(self._ipset.list(name))
        return frozenset(member for answer in answers for member in _members(answer))

    def names(self) -> list[str]:
        with _asking("IPSET_CMD_LIST", "all sets"):
            answers = list(self._ipset.list(flags=LIST_NAMES))
        return sorted(answer.get_attr("IPSET_ATTR_SETNAME") for answer in answers)

    def destroy(self, name: str) -> None:
        """EBUSY while a rule names it. Nothing to do if it is gone."""
        try:
            with _asking("IPSET_CMD_DESTROY", name):
                self._ipset.destroy(name)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        self._ipset.close()

    def _replace(self, wanted: AddressSet) -> None:
        beside = f"{wanted.name[: SET_NAME_MAX_BYTES - 1]}~"
        self.destroy(beside)  # what an earlier attempt left
        self._create(wanted, beside)
        try:
            self._fill(wanted, beside)
            with _asking("IPSET_CMD_SWAP", wanted.name):
                self._ipset.swap(beside, wanted.name)
        finally:
            self.destroy(beside)

    def _create(self, wanted: AddressSet, name: str) -> bool:
        """False when a set of that name exists."""
        try:
            with _asking("IPSET_CMD_CREATE", name):
                self._ipset.create(
                    name,
                    stype=wanted.type,
                    family=_address_family(wanted.family),
                    maxelem=wanted.max_members,
                    skbinfo=wanted.with_marks,
                )
        except KernelError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True

    def _fill(self, wanted: AddressSet, name: str) -> None:
        for member in wanted.members:
            self._add(wanted, name, member)

    def _add(self, kind: AddressSet, name: str, member: Member) -> None:
        with _asking("IPSET_CMD_ADD", f"{name} {member.address}"):
            self._ipset.add(
                name,
                member.address,
                family=_address_family(kind.family),
                etype=_entry(kind),
                exclusive=False,
                skbmark=None if member.mark is None else (member.mark, 0xFFFFFFFF),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _members(answer: Any) -> Iterator[Member]:
    """The members in one part of a listing; a long set comes in several."""
    entries = answer.get_attr("IPSET_ATTR_ADT")
    for entry in entries.get_attrs("IPSET_ATTR_DATA") if entries else ():
        start = entry.get_attr("IPSET_ATTR_IP_FROM")
        address = start.get_attr("IPSET_ATTR_IPADDR_IPV4") or start.get_attr(
            "IPSET_ATTR_IPADDR_IPV6"
        )
        prefix_length = entry.get_attr("IPSET_ATTR_CIDR")
        mark = entry.get_attr("IPSET_ATTR_SKBMARK")
        yield Member(
            address if prefix_length is None else f"{address}/{prefix_length}",
            None if mark is None else mark[0],
        )


def _entry(kind: AddressSet) -> str:
    return kind.type.removeprefix("hash:")


def _address_family(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family == "inet" else socket.AF_INET6


@contextmanager
def _asking(message: str, subject: str) -> Iterator[None]:
    """Turn the kernel's refusal of a message into KernelError."""
    try:
        yield
    except NetlinkError as error:
        if error.code < FIRST_PRIVATE_ERROR:
            raise KernelError(message, subject, error.code) from error
        # ipset has numbers of its own, for which there is a text but no errno.
        said = error.args[1] if len(error.args) > 1 else f"ipset error {error.code}"
        raise KernelError(message, f"{subject} ({said})", errno.EINVAL) from error
    except OSError as error:
        raise KernelError(message, subject, error.errno or errno.EINVAL) from error
