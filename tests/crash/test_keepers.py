"""kill -9 of what works for the agent, at every system call that it makes.

strace kills it on the way into the Nth call of a kind (strace(1), "Tampering"): a keeper itself, or
the child of its that becomes the container. Which calls there are is counted first, in a run where
nothing happens. What must hold is what `test_faults.py` says; what a container wrote last may be
lost with its keeper.

SANDBOX_FAULTS=all kills at every call; without it at some, evenly spread.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.crash.conftest import Driver, Site
from tests.crash.walker import Walker, chosen

MANY = 16
STRACE = shutil.which("strace")
BIN = ROOT / "sandbox/_bin"
PATH = "run to its exit"
PULL = "pull and run to its exit"
FOLLOWED = ("-f", "-b", "execve")
"""Also what it starts, until that executes the image's program."""

pytestmark = pytest.mark.skipif(STRACE is None, reason="strace is not installed")


@pytest.fixture
def walker(driver: Driver, site: Site, image: str) -> Iterator[Walker]:
    with closing(Walker(driver, site, image)) as walker:
        yield walker


@dataclass(frozen=True)
class Cell:
    call: str
    time: int

    @property
    def options(self) -> Sequence[str]:
        what = f"inject={self.call}:signal=KILL:when={self.time}"
        return ("-e", f"trace={self.call}", "-e", what)

    def __str__(self) -> str:
        return f"{self.call} #{self.time}"


class Stage:
    """Where the agent finds a helper: a program that runs it under strace, which stays a child of
    the agent.

    Of keepers only those that `start` names: "run" for those of containers, "exec" for those of
    commands; so begins the name of the status directory, a keeper's descriptor 4.
    """

    def __init__(self, walker: Walker, helper: str, directory: Path, start: str = "") -> None:
        self.walker = walker
        self._helper = helper
        self._start = start
        self._program = directory / helper
        self._record = directory / "calls"

    @contextmanager
    def traced(self, *options: str) -> Iterator[None]:
        self._record.unlink(missing_ok=True)
        self._write(options)
        self._swap(self._program)
        try:
            yield
        finally:
            if self.walker.is_up:
                self._swap(BIN / self._helper)

    def _swap(self, program: Path) -> None:
        self.walker.ask("swapped", swap=self._helper, program=str(program))

    def _write(self, options: Sequence[str]) -> None:
        helper = BIN / self._helper
        strace = " ".join([str(STRACE), "-D", "-q", *options, str(helper)])
        which = f"*/{self._start}.*" if self._start else "*"
        self._program.write_text(
            f"#!/bin/sh\ncase $(/usr/bin/readlink /proc/self/fd/4) in\n"
            f'{which}) exec {strace} "$@" ;;\n*) exec {helper} "$@" ;;\nesac\n'
        )
        self._program.chmod(0o755)

    def recorded(self) -> AbstractContextManager[None]:
        return self.traced(*FOLLOWED, "-o", str(self._record))

    def killing(self, cell: Cell, who: str) -> AbstractContextManager[None]:
        followed = FOLLOWED if who == "its children" else ()
        return self.traced(*followed, "-o", str(self._record), *cell.options)

    def has_killed(self) -> bool:
        return self._record.exists() and "killed by SIGKILL" in self._record.read_text()

    def cells(self, who: str) -> list[Cell]:
        """Of the helper, or those that only its children make; but for ends of their own."""
        calls = re.findall(r"^(\d+) +(\w+)\(", self._record.read_text(), re.MULTILINE)
        first = calls[0][0]
        own = Counter(call for pid, call in calls if pid == first)
        others = Counter(call for _, call in calls if call not in own)
        found = own if who == "itself" else others
        ends = ("execve", "exit", "exit_group")
        return [Cell(c, n + 1) for c in sorted(found) if c not in ends for n in range(found[c])]


@pytest.mark.parametrize("who", ["itself", "its children"])
async def test_a_keeper_killed_anywhere_costs_its_own_task_and_nothing_else(
    who: str, walker: Walker, tmp_path: Path
) -> None:
    stage = Stage(walker, "keeper", tmp_path, "run")
    assert walker.walk(PATH, stage.recorded()) == []
    cells = stage.cells(who)
    assert len(cells) > MANY
    walker.loses_output, walker.kills = True, who == "its children"
    wrong, killed = [], 0
    for cell in chosen(cells, MANY):
        wrong += [f"{cell}: {what}" for what in walker.walk(PATH, stage.killing(cell, who))]
        killed += stage.has_killed()
    wrong += await walker.end()
    assert not wrong, "\n".join(wrong)
    assert killed > MANY * 2 // 3


@pytest.mark.parametrize("who", ["itself", "its children"])
async def test_a_keeper_of_a_command_killed_anywhere_costs_that_command_and_nothing_else(
    who: str, walker: Walker, tmp_path: Path
) -> None:
    stage = Stage(walker, "keeper", tmp_path, "exec")
    assert walker.enter("exit 4", stage.recorded()) == (4, [])
    cells = stage.cells(who)
    wrong, killed = [], 0
    for cell in chosen(cells, MANY):
        code, harm = walker.enter("echo $$; exit 4", stage.killing(cell, who))
        killed += stage.has_killed()
        is_told = code in (4, 137) or (isinstance(code, str) and code and "\n" not in code)
        wrong += [f"{cell}: {what}" for what in harm + ([] if is_told else [f"told {code!r}"])]
    wrong += await walker.end()
    assert not wrong, "\n".join(wrong)
    assert killed > min(MANY, len(cells)) * 2 // 3


@pytest.mark.parametrize("who", ["itself", "its children"])
@pytest.mark.parametrize(("helper", "path"), [("slot", PATH), ("unpack", PULL)])
async def test_a_helper_killed_anywhere_costs_one_task_at_most(
    helper: str, path: str, who: str, walker: Walker, tmp_path: Path
) -> None:
    stage = Stage(walker, helper, tmp_path)
    assert walker.walk(path, stage.recorded()) == []
    cells = stage.cells(who)
    wrong, killed = [], 0
    for cell in chosen(cells, MANY // 2):
        wrong += [f"{cell}: {what}" for what in walker.walk(path, stage.killing(cell, who))]
        killed += stage.has_killed()
    wrong += await walker.end()
    assert not wrong, "\n".join(wrong)
    assert killed > min(MANY // 2, len(cells)) // 2  # a pool that was refused takes its time
