"""A system call of the agent fails, once, at every step of every path: what then?

strace makes it fail, really: the kernel does not run it and the agent gets the error (strace(1),
"Tampering"). First a path is walked once under strace to see which calls it makes; then for each
call and each of its times the path is walked again, in the same agent, and that one fails. What
must hold each time:

- the task goes as if nothing had been, or ends STOPPED as ECS says that it failed to start, with
  the reason, or the request is refused with one line, or the agent ends because it cannot write its
  store and the next one puts things right
- a task that runs beside it keeps its process, its output and its exit code
- nothing is left: the agent has the descriptors, children, cgroups, id ranges, mounts and files
  that it had, and another task runs

Descriptors and room on the disk run out really: a limit, and a small file system, which leave a
little more each time until the path goes through.

SANDBOX_FAULTS=all walks all cells, some thousands; without it some of each path are walked, evenly
spread, the same ones as long as the path is the same.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from sandbox.model.task import Status
from tests.crash.conftest import Driver, Site
from tests.crash.faults import WALKS
from tests.crash.paths import UNTIL_TOLD
from tests.crash.test_agents import end, fill, left_by, small_disk
from tests.crash.walker import ALL, Walker, chosen, traced

CELLS_PER_PATH = 9

ERRORS: Mapping[str, str] = {
    # processes and threads
    "clone": "EAGAIN",
    "clone3": "EAGAIN",
    "pidfd_open": "ENOMEM",
    "pidfd_send_signal": "EPERM",
    "pidfd_getfd": "EPERM",
    # descriptors and memory
    "openat": "ENFILE",
    "openat2": "ENFILE",
    "memfd_create": "ENOMEM",
    "pipe2": "ENFILE",
    "socketpair": "ENFILE",
    # mounts
    "fsopen": "ENOMEM",
    "fsconfig": "ENOMEM",
    "fsmount": "ENOMEM",
    "open_tree": "ENOMEM",
    "move_mount": "ENOMEM",
    "mount_setattr": "ENOMEM",
    # files: of the state directory, of cgroups, of /run/sandbox-ids
    "mkdir": "ENOSPC",
    "mkdirat": "ENOSPC",
    "rmdir": "EIO",
    "unlink": "EIO",
    "unlinkat": "EIO",
    "rename": "EIO",
    "link": "ENOSPC",
    "chmod": "EPERM",
    "chown": "EPERM",
    "fchown": "EPERM",
    "fchownat": "EPERM",
    "utimensat": "EPERM",
    "flock": "ENOLCK",
    "write": "ENOMEM",
    "pwrite64": "ENOSPC",
    "fallocate": "ENOSPC",
    "fdatasync": "EIO",
    "fsync": "EIO",
}
"""What each call can answer a correct caller: proc(5), cgroups(7), and the page of the call.

Not epoll_ctl: the kernel takes memory for EPOLL_CTL_ADD alone, strace cannot tell one operation
from another, and the event loop does not outlive an error of the descriptor that wakes it.
"""


UNDOING = ("rmdir", "unlink", "unlinkat")
"""What cannot be undone because these fail goes with the next agent."""


@dataclass(frozen=True)
class Cell:
    call: str
    time: int

    def __str__(self) -> str:
        return f"{self.call} {ERRORS[self.call]} #{self.time}"


@pytest.fixture
def walker(driver: Driver, site: Site, image: str) -> Iterator[Walker]:
    with closing(Walker(driver, site, image)) as walker:
        yield walker


def failing(pid: int, cell: Cell, record: Path) -> AbstractContextManager[None]:
    what = f"inject={cell.call}:error={ERRORS[cell.call]}:when={cell.time}"
    return traced(pid, "-o", str(record), "-e", f"trace={cell.call}", "-e", what)


def recording(pid: int, record: Path) -> AbstractContextManager[None]:
    return traced(pid, "-o", str(record), "-e", f"trace={','.join(ERRORS)}")


def counted(record: str) -> list[Cell]:
    """The cells of a walk: each call as often as one thread has made it, strace's own count."""
    calls = re.findall(r"^(\d+) +(\w+)\(", record, re.MULTILINE)
    most: Counter[str] = Counter()
    for (_, call), times in Counter(calls).items():
        most[call] = max(most[call], times)
    return [Cell(call, n + 1) for call in sorted(most) if call in ERRORS for n in range(most[call])]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("name", WALKS)
async def test_a_system_call_that_fails_anywhere_on_the_way_harms_only_its_own_task(
    name: str, walker: Walker, tmp_path: Path
) -> None:
    record = tmp_path / "calls"
    assert walker.walk(name) == []  # imports what is imported late
    assert walker.walk(name, recording(walker.pid, record)) == []
    cells = counted(record.read_text())
    assert len(cells) > CELLS_PER_PATH
    wrong, walked, failed = [], chosen(cells, CELLS_PER_PATH), 0
    for cell in walked:
        walker.may_stay = cell.call in UNDOING
        found = walker.walk(name, failing(walker.pid, cell, record))
        failed += "(INJECTED)" in record.read_text()
        wrong += [f"{cell}: {what}" for what in found]
    wrong += await walker.end()
    assert not wrong, "\n".join(wrong)
    print(f"{failed} of {len(walked)} calls were made, and failed")  # threads take turns
    assert failed > len(walked) * 2 // 3


# Descriptors ---------------------------------------------------------------------------------


@contextmanager
def few_descriptors(pid: int, free: int) -> Iterator[None]:
    """The agent may open `free` more: its lowest free number is the first that counts."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    numbers = [n for n in range(len(used) + free + 1) if n not in used]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (numbers[free], before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("name", chosen(list(WALKS), 4))
async def test_an_agent_that_runs_out_of_descriptors_anywhere_on_the_way_harms_only_that_task(
    name: str, walker: Walker
) -> None:
    assert walker.walk(name) == []
    walker.may_stay = True
    wrong, untroubled = [], 0
    for free in count(0, 1 if ALL else 5):
        if untroubled == 2:
            break
        wrong += [
            f"{free} free: {what}" for what in walker.walk(name, few_descriptors(walker.pid, free))
        ]
        untroubled = untroubled + 1 if walker.told.is_untroubled(WALKS[name]) else 0
    wrong += await walker.end()
    assert not wrong, "\n".join(wrong)


# Room on the disk ----------------------------------------------------------------------------


@contextmanager
def little_room(disk: Path, blocks: int) -> Iterator[None]:
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - 4096 * blocks)
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)


@contextmanager
def few_inodes(disk: Path, free: int) -> Iterator[None]:
    directory = disk / "inodes"
    directory.mkdir()
    for n in range(os.statvfs(disk).f_favail - free):
        (directory / str(n)).touch()
    try:
        yield
    finally:
        shutil.rmtree(directory)


async def test_a_task_that_was_started_with_the_last_inodes_is_found_again(
    driver: Driver, image: str, tmp_path: Path
) -> None:
    """What its keeper writes down when it runs is what the next agent finds it by."""
    wrong, found = [], 0
    with small_disk(tmp_path, "-N", "1024") as disk:
        site = Site(disk / "state", tmp_path / "run")
        left_by(driver, site, image)
        async with site.agent() as agent:
            await end(agent, agent.tasks.list()[0].id)
        for free in range(60):
            if found == 3:
                break
            with few_inodes(disk, free):
                driver.start(verb="hold", image=image, script=UNTIL_TOLD, **site.place)
                if "ended" not in driver.hear("ready", "ended"):
                    driver.signal(signal.SIGKILL)
            left = await site.rows()
            async with site.agent() as agent:
                for id, row in left.items():
                    if row.known is not None and row.known.last_status is Status.RUNNING:
                        found += 1
                        known = agent.tasks.describe(id).known
                        if known.last_status is not Status.RUNNING:
                            wrong.append(f"{free}: {known}")
                    await end(agent, id)
            wrong += [f"{free}: left behind: {what}" for what in await site.remains()]
    assert not wrong and found, "\n".join(wrong)


ROOM = [("blocks", n) for n in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 280)]
INODES = [("inodes", n) for n in range(14)]
SHORTAGES = {"blocks": little_room, "inodes": few_inodes}


@pytest.mark.parametrize(
    "name", chosen(["pull and run to its exit", "several containers", "exec"], 2)
)
async def test_a_disk_that_is_full_anywhere_on_the_way_harms_only_that_task(
    name: str, driver: Driver, image: str, tmp_path: Path
) -> None:
    """Each time with a fresh agent, which has a reserve, and once more with that one, which has
    given it up: then it may have to end, because it cannot write its store."""
    with (
        small_disk(tmp_path, "-N", "1024") as disk,
        closing(Walker(driver, Site(disk / "state", tmp_path / "run"), image)) as walker,
    ):
        walker.loses_output = True
        assert walker.walk(name) == []
        wrong = []
        for kind, free in chosen([*ROOM, *INODES], CELLS_PER_PATH):
            walker.follow()
            for turn in ("with a reserve", "without one"):
                found = walker.walk(name, SHORTAGES[kind](disk, free))
                wrong += [f"{free} {kind} free, {turn}: {what}" for what in found]
        wrong += await walker.end()
        assert not wrong, "\n".join(wrong)
