"""Ranges of 65536 host ids, each for one task, disjoint from every other user of ids on the host.

Never handed out: ids of the host's users and groups, what /etc/subuid and /etc/subgid promise to
others, and ranges that any agent of this host has claimed. Agents do not know each other; they meet
in one directory, by default /run/sandbox-ids: a file there, named after the first id, is a claim.
It appears whole or not at all (link(2) never replaces), and goes with a reboot, as processes do. It
says whose it is, the same for every claim of an agent, so all of them are links to one file:

    INSTANCE PID START-TIME STATE-DIRECTORY

A claim outlives its agent, because the tasks do. It is taken away only by the same instance, which
knows its tasks (`recover`), or when its agent has died, the state directory is gone, and no
process has the range mapped: then nobody is left who could. One that somebody else took away is
claimed again before the agent claims another.

From 0x70000000 to 0x7fffffff is what systemd's list of id ranges leaves free: 4096 ranges. They are
used in turn, so that a range just released (whose ids may still be on some file) rests longest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sandbox.errors import KernelError
from sandbox.kernel.native import raising
from sandbox.kernel.processes import start_time

SIZE = 65536
WINDOW = range(0x70000000, 0x80000000, SIZE)
CLAIMS = Path("/run/sandbox-ids")


# Decisions ---------------------------------------------------------------------------------


def next_free(
    window: range, reserved: Iterable[range], claimed: Container[int], after: int
) -> int | None:
    """The first range of the window behind `after`, then from its start, that nobody has."""
    near = [r for r in reserved if r and r.start < window.stop and window.start < r.stop]
    start = next((n for n, first in enumerate(window) if first > after), 0)
    for first in chain(window[start:], window[:start]):
        is_reserved = any(r.start < first + SIZE and first < r.stop for r in near)
        if not is_reserved and first not in claimed:
            return first
    return None


def account_ids(text: str) -> list[range]:
    """The ids in the third field of /etc/passwd or /etc/group."""
    fields = (line.split(":") for line in text.splitlines())
    return [range(int(f[2]), int(f[2]) + 1) for f in fields if len(f) > 2 and f[2].isdecimal()]


def subordinate_ids(text: str) -> list[range]:
    """The ranges of /etc/subuid or /etc/subgid: NAME:FIRST:COUNT."""
    fields = (line.strip().split(":") for line in text.splitlines())
    return [
        range(int(f[1]), int(f[1]) + int(f[2]))
        for f in fields
        if len(f) == 3 and f[1].isdecimal() and f[2].isdecimal()
    ]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has claimed a range."""

    instance: str
    pid: int
    start_time: int
    state_dir: str

    def __str__(self) -> str:
        return f"{self.instance} {self.pid} {self.start_time} {self.state_dir}\n"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        fields = text.rstrip("\n").split(" ", 3)
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[2].isdecimal()):
            return None
        return cls(fields[0], int(fields[1]), int(fields[2]), fields[3])


# The host ----------------------------------------------------------------------------------


class IdRanges:
    """The ranges of one agent, for one thread; `window` steps by SIZE and is aligned to it."""

    def __init__(
        self,
        instance: str,
        state_dir: Path,
        *,
        window: range = WINDOW,
        claims: Path = CLAIMS,
        etc: Path = Path("/etc"),
    ) -> None:
        if window.step != SIZE or window.start % SIZE:
            raise ValueError(f"{window} would overlap the ranges of other agents")
        pid = os.getpid()
        self._owner = Owner(instance, pid, start_time(pid) or 0, str(state_dir.absolute()))
        self._window = window
        self._claims = claims
        self._etc = etc
        self._last = window.start - 1
        self._known: dict[str, tuple[tuple[int, ...], list[range]]] = {}
        """What the files of `etc` say, and of which state of theirs."""
        self._held: set[int] = set()
        self._make_directory()
        self._source = claims / f".{instance}.{pid}"

    def recover(self, kept: Collection[int]) -> None:
        """Own exactly the ranges `kept` by our tasks; forget ours of before and those of nobody.

        KernelError EEXIST if another agent has one of them: two tasks would share their ids.
        """
        for first in self._claimed():
            owner = self._owner_of(first)
            if owner is None or (first in kept and self._is_ours(owner)):
                continue
            if self._is_ours(owner) or self._is_void(owner, first):
                self.release(first)
        for first in kept:
            owner = self._owner_of(first)
            if not (owner and self._is_ours(owner)):
                self._link(first)
        self._held = set(kept)
        for source in self._claims.glob(".*"):
            if self._is_left_over(source.name):
                source.unlink(missing_ok=True)

    def _is_left_over(self, source: str) -> bool:
        """Its agent has died; one that is not whole says whose it was by its name alone."""
        owner = self._owner_of(source)
        if owner is not None:
            return start_time(owner.pid) != owner.start_time
        pid = source.split(".")[2:3]
        return bool(pid) and pid[0].isdecimal() and start_time(int(pid[0])) is None

    def close(self) -> None:
        """Claim nothing more. What is claimed stays so."""
        self._source.unlink(missing_ok=True)

    def claim(self) -> int:
        """The first id of a range that is now ours; KernelError EUSERS when none is left."""
        return self.claim_many(1)[0]

    def claim_many(self, count: int) -> list[int]:
        """`count` of them, or KernelError and none."""
        reserved = self._reserved()
        claimed = self._claimed()
        self._claim_again(self._held - claimed)
        found: list[int] = []
        try:
            while len(found) < count:
                found.append(self._claim(reserved, claimed))
        except KernelError:
            for first in found:
                self.release(first)
            raise
        return found

    def _claim(self, reserved: list[range], claimed: set[int]) -> int:
        while True:
            first = next_free(self._window, reserved, claimed, self._last)
            if first is None:
                raise KernelError("claim", f"an id range in {self._claims}", errno.EUSERS)
            try:
                self._link(first)
            except KernelError as error:
                if error.errno != errno.EEXIST:
                    raise
                claimed.add(first)  # another agent was faster
            else:
                claimed.add(first)
                self._held.add(first)
                self._last = first
                return first

    def _claim_again(self, lost: Iterable[int]) -> None:
        for first in lost:
            try:
                self._link(first)
            except KernelError as error:
                if error.errno != errno.EEXIST:  # somebody else has it: too late
                    raise

    def release(self, first: int) -> None:
        """Give a range back; nothing of its ids may run or be reachable any more. Idempotent."""
        with raising("unlink", str(self._claims / str(first))):
            (self._claims / str(first)).unlink(missing_ok=True)
        self._held.discard(first)

    def _link(self, first: int) -> None:
        claim = f"{self._claims}/{first}"
        with raising("link", claim):
            try:
                os.link(self._source, claim)
            except FileNotFoundError:
                self._write_source()
                os.link(self._source, claim)

    def _write_source(self) -> None:
        """Whole before it has its name: a claim is never read half-written."""
        aside = self._source.with_name(f"{self._source.name}.new")
        aside.write_text(str(self._owner))
        aside.rename(self._source)

    def _make_directory(self) -> None:
        with raising("mkdir", str(self._claims)):
            self._claims.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _claimed(self) -> set[int]:
        self._make_directory()  # somebody may have cleared /run
        with raising("readdir", str(self._claims)):
            return {int(name) for name in os.listdir(self._claims) if name.isdecimal()}

    def _owner_of(self, first: int | str) -> Owner | None:
        """None if it is not claimed or not readable as a claim; the latter stays taken."""
        with suppress(OSError, UnicodeDecodeError):
            return Owner.parse((self._claims / str(first)).read_text())
        return None

    def _is_ours(self, owner: Owner) -> bool:
        return owner.instance == self._owner.instance

    def _is_void(self, owner: Owner, first: int) -> bool:
        is_alive = start_time(owner.pid) == owner.start_time
        return not (is_alive or os.path.exists(owner.state_dir) or _is_mapped(first))

    def _reserved(self) -> list[range]:
        """The files are read again when they were changed: every claim asks."""
        found: list[range] = []
        for name, parse in _FILES.items():
            path = f"{self._etc}/{name}"
            try:
                status = os.stat(path)
                state = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                if (known := self._known.get(name)) is None or known[0] != state:
                    text = Path(path).read_text(errors="replace")
                    known = self._known[name] = (state, parse(text))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise KernelError("read", path, error.errno or errno.EIO) from error
            found += known[1]
        return found


_FILES = {
    "passwd": account_ids,
    "group": account_ids,
    "subuid": subordinate_ids,
    "subgid": subordinate_ids,
}


def _is_mapped(first: int) -> bool:
    """Whether any process lives in a user namespace that has this range."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):  # it ended meanwhile
            lines = Path(f"/proc/{name}/uid_map").read_text().splitlines()
            if any(first <= int(line.split()[1]) < first + SIZE for line in lines):
                return True
    return False
