"""The rules of the packet filter of one network namespace.

They are data, and equality decides whether the kernel must be touched. A `RuleSet` is rendered
(pure) to one input of iptables-restore: a table changes wholly or not at all, and packets never see
half of it. Rules come and go rarely; what comes and goes with every task is a member of an address
set (`kernel.ipset`).

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
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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

PLAIN_WORD = re.compile(r"[\w.,:/+=!@%-]+", re.ASCII)
COUNTERS = re.compile(r" \[\d+:\d+\]$", re.ASCII)
COUNTED_RULE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) ")


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    rules: tuple[Rule, ...] = ()
    policy: Literal["ACCEPT", "DROP"] | None = None
    """Of a built-in chain; a chain of our own has none."""


@dataclass(frozen=True, slots=True)
class Table:
    name: Literal["raw", "mangle", "nat", "filter"]
    chains: tuple[Chain, ...] = ()
    first: tuple[tuple[str, Rule], ...] = ()
    """Rules put before all others of chains that are not ours, in their order."""
    without: tuple[tuple[str, Rule], ...] = ()
    """Rules that are taken out of their chains: EINVAL if one is not there."""
    gone: tuple[str, ...] = ()
    """Chains that are no longer. One that still has rules must be among `chains`, empty."""


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
            yield _line("-A", chain.name, *rule)
    for name, rule in table.without:
        yield _line("-D", name, *rule)
    for name, rule in reversed(table.first):
        yield _line("-I", name, "1", *rule)
    for name in table.gone:
        yield _line("-X", name)
    yield "COMMIT"


def _line(verb: str, chain: str, *words: str) -> str:
    return " ".join([verb, *map(_quoted, (chain, *words))])


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

    def saved(self, family: Family = "inet") -> dict[str, tuple[str, ...]]:
        """Chains and rules by table, as the program prints them: ":INPUT DROP", "-A INPUT ...".

        Only tables that somebody has made; none is made by asking.
        """
        found: dict[str, list[str]] = {}
        table = ""
        for line in self._run(family, "save", [], "").splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith((":", "-A ")):
                found.setdefault(table, []).append(COUNTERS.sub("", line))
        return {table: tuple(lines) for table, lines in found.items()}

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
