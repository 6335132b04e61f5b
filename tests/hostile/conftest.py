"""What the hostile images lead to, and the line that says how many of them did what."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from sandbox.kernel import slots
from tests.hostile.images import OUTSIDE
from tests.kernel.conftest import agent as agent
from tests.kernel.conftest import state_dir as state_dir
from tests.unit.images.http_server import Server, serving

ID_BASE = 0x7FFE0000


@dataclass
class Tally:
    """Of the cases that ran, by name."""

    rejected: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    escaped: set[str] = field(default_factory=set)
    wrongly: set[str] = field(default_factory=set)
    """Accepted, though they should have been refused or should look otherwise."""

    def line(self) -> str:
        cases = len(self.rejected | self.accepted)
        return (
            f"corpus: {cases} cases, {len(self.rejected)} rejected, {len(self.accepted)} accepted, "
            f"{len(self.escaped)} escaped, {len(self.wrongly)} accepted wrongly"
        )


TALLY = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tally = config.stash[TALLY]
    if tally.rejected or tally.accepted:
        terminalreporter.write_line(tally.line())


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash[TALLY]


def state(directory: Path) -> list[tuple[object, ...]]:
    """All that an image could have changed there, and in the host's list of users."""
    about = [(p, p.lstat()) for p in (Path("/etc/passwd"), directory, *directory.rglob("*"))]
    return sorted(
        (str(p), s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns, s.st_ctime_ns)
        for p, s in about
    )


@pytest.fixture(scope="session")
def outside() -> Iterator[Path]:
    (OUTSIDE / "directory").mkdir(parents=True)
    (OUTSIDE / "file").write_text("app:x:0:0::/:/bin/sh\n")
    yield OUTSIDE
    shutil.rmtree(OUTSIDE)


@pytest.fixture(autouse=True)
def nothing_escapes(outside: Path, tally: Tally, request: pytest.FixtureRequest) -> Iterator[None]:
    before = state(outside)
    yield
    if state(outside) != before:
        tally.escaped.add(request.node.name)
    assert state(outside) == before


@pytest.fixture(scope="session")
def slot() -> Iterator[slots.Slot]:
    """The namespaces of a task, one for all cases."""
    (slot,) = trio.run(slots.make, [ID_BASE])
    yield slot
    slot.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one
