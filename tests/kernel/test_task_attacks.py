"""What a task does to use up what it shares, beside another one that must not notice.

Each attack goes on until the kernel says no or the task is killed for it. Meanwhile the agent
answers on its socket, within a number of turns of its loop and not of milliseconds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from sandbox import connect
from sandbox.agent import Agent
from sandbox.client.api import Task
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import LinuxParameters, MountPoint, Volume
from tests.kernel.conftest import Outcome, finish
from tests.kernel.probe_image import Images
from tests.kernel.tasks import (
    STAYS,
    begin,
    container,
    execute,
    heard,
    of,
    reached,
    started,
    stopped,
)
from tests.kernel.test_entering import compiled
from tests.kernel.test_task_limits import OUT_OF_MEMORY
from tests.sibling import unharmed

MiB = 1 << 20
PATIENCE_S = 120.0
"""Not how fast it is, but that it ends at all."""
TURNS = 500
"""Of the agent's loop, at most, until it has answered `ps`: a few for the answer, and what others
ask of it in between."""


class Turns(trio.abc.Instrument):
    """Counts the turns of the loop in which the agent lives."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


@contextmanager
def turns() -> Iterator[Turns]:
    counter = Turns()
    trio.lowlevel.add_instrument(counter)
    try:
        yield counter
    finally:
        trio.lowlevel.remove_instrument(counter)


@asynccontextmanager
async def answering(agent: Agent, run_dir: Path) -> AsyncIterator[None]:
    """`ps` is asked for again and again over the socket, and answered in time."""
    asked: list[int] = []
    async with connect(run_dir / "agent.sock", on_exit="leave") as sandbox:

        async def ask() -> None:
            while True:
                with turns() as passed, trio.fail_after(PATIENCE_S):
                    assert await sandbox.tasks()
                asked.append(passed.count)
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            yield
            while not asked:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert max(asked) < TURNS


@pytest.fixture(scope="module")
def attacker(images: Images, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image of tests/kernel/attack.c."""
    source = Path(__file__).with_name("attack.c")
    program = compiled(tmp_path_factory.mktemp("attacker") / "attack", source)
    return images.make("attacker", lambda layer: layer.file("attack", program.read_bytes(), 0o755))


LARGE = {"cpu": "1024", "memory": "2048"}
"""A whole processor: what is used up is not the time that the smallest task has of it."""
WITH_INIT = {"linux_parameters": LinuxParameters(init_process_enabled=True)}


@dataclass(frozen=True, kw_only=True)
class Attack:
    script: str
    says: str = ""
    exit_code: int = 0
    reason: str | None = None
    members: Mapping[str, Any] = field(default_factory=dict)
    """Of its container."""


ATTACKS: Mapping[str, Attack] = {
    "zombies": Attack(
        script="/attack zombies 1000000", says="zombies: Resource temporarily unavailable"
    ),
    "zombies under our init": Attack(
        script="/attack zombies 1000000",
        says="zombies: Resource temporarily unavailable",
        members=WITH_INIT,
    ),
    "descriptors": Attack(
        script="/attack descriptors 10000000", says="descriptors: Too many open files"
    ),
    "sockets": Attack(script="/attack sockets 10000", says="10000 sockets: no end"),
    "socket buffers": Attack(
        script="/attack socket-buffers 100000",
        exit_code=137,
        reason=OUT_OF_MEMORY,
        members={"memory": 64},
    ),
    "pipe buffers": Attack(
        script="/attack pipe-buffers 100000",
        exit_code=137,
        reason=OUT_OF_MEMORY,
        members={"memory": 16},
    ),
    "the page cache": Attack(
        script="dd if=/dev/zero of=/file bs=1M count=256 && echo written",
        says="written",
        members={"memory": 64},
    ),
    "shared memory": Attack(
        script="dd if=/dev/zero of=/dev/shm/file bs=1M", says="No space left on device", exit_code=1
    ),
    "shared memory beyond its own": Attack(
        script="exec dd if=/dev/zero of=/dev/shm/file bs=1M",
        exit_code=137,
        reason=OUT_OF_MEMORY,
        members={"memory": 32},
    ),
    "a hundred thousand files": Attack(script="/attack files 100000", says="100000 files: no end"),
    "five thousand directories, each in the other": Attack(
        script="/attack directories 5000", says="5000 directories: no end"
    ),
    "locked memory": Attack(
        script="/attack locked 100000", says="locked pieces of memory: Cannot allocate memory"
    ),
    "signals to everybody": Attack(script="sleep 1000 & kill -9 -1; exit 5", exit_code=5),
    "a stop of itself": Attack(script="kill -STOP $$; exit 6", exit_code=6),
    "no right to its root": Attack(script="chmod 0 / /bin /tmp; exit 8", exit_code=8),
    "immutable files": Attack(
        script="/attack immutable 1", says="0 immutable files: Operation not permitted"
    ),
    "its cgroup": Attack(
        script="cd /sys/fs/cgroup; mkdir more; echo 1 >cgroup.freeze; echo max >pids.max; exit 9",
        says="Read-only file system",
        exit_code=9,
    ),
    "no stdout": Attack(script="exec >&- 2>&-; echo lost; exit 7", exit_code=7),
    "a mount that it holds": Attack(
        script="cd /shared; exec 3>open; (sleep 1000 <open) & exit 4",
        exit_code=4,
        members={"mount_points": (MountPoint(source_volume="shared", container_path="/shared"),)},
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_a_task_uses_up_is_its_own(
    attack: str, agent: Agent, attacker: str, tmp_path: Path
) -> None:
    made = ATTACKS[attack]
    wanted = container(attacker, "app", made.script, **made.members)
    volumes = (Volume(name="shared"),) if "mount_points" in made.members else ()
    async with unharmed(agent, attacker), answering(agent, tmp_path / "run"):
        with trio.fail_after(PATIENCE_S):
            outcome = await finish(agent, await begin(agent, wanted, volumes=volumes, **LARGE))
        ended = outcome.container
        assert (ended.exit_code, ended.reason) == (made.exit_code, made.reason), outcome
        assert made.says in outcome.stdout + outcome.stderr
        await agent.tasks.remove(outcome.view.id)


async def test_a_program_that_stops_itself_under_our_init_is_stopped_all_the_same(
    agent: Agent, attacker: str
) -> None:
    wanted = container(attacker, "app", "echo on; kill -STOP $$; exit 6", **WITH_INIT)
    async with unharmed(agent, attacker):
        task = await started(agent, wanted)
        await heard(agent, task, "on")
        assert (await stopped(agent, task)).container.exit_code == 137


async def test_one_of_two_containers_that_wants_all_memory_dies_alone(
    agent: Agent, attacker: str
) -> None:
    hungry = container(attacker, "hungry", "tail /dev/zero", essential=False, memory=64)
    async with unharmed(agent, attacker):
        task = await started(agent, container(attacker, "app", STAYS), hungry)
        view = await reached(agent, task, lambda v: of(v, "hungry").last_status == "STOPPED")
        ended = of(view, "hungry")
        assert (ended.exit_code, ended.reason) == (137, OUT_OF_MEMORY)
        assert of(view, "app").last_status == "RUNNING"
        assert (await stopped(agent, task)).container.exit_code == 0


async def test_a_gigabyte_of_output_costs_32_mib_of_disk_and_no_memory_of_the_agent(
    agent: Agent, attacker: str, state_dir: Path, tmp_path: Path
) -> None:
    flood = "yes 'a line that says nothing at all, again and again' | head -c 1000000000"
    async with unharmed(agent, attacker), answering(agent, tmp_path / "run"):
        before = psutil.Process().memory_info().rss
        task = await begin(agent, container(attacker, "app", flood), **LARGE)
        with trio.fail_after(PATIENCE_S):
            async for view in agent.tasks.watch(task):
                last = view
        assert last.known.containers[0].exit_code == 0
        assert psutil.Process().memory_info().rss - before < 16 * MiB
        log = state_dir / "tasks" / task / "app/run.0/log"
        sizes = [file.stat().st_size for file in log.iterdir()]
        assert len(sizes) == 32 and sum(sizes) <= 33 * MiB
        await agent.tasks.remove(task)


async def test_ten_megabytes_without_a_line_end_are_all_there(agent: Agent, attacker: str) -> None:
    async with unharmed(agent, attacker):
        with trio.fail_after(PATIENCE_S):
            wanted = container(attacker, "app", "head -c 10000000 /dev/zero")
            outcome: Outcome = await finish(agent, await begin(agent, wanted))
        assert outcome.stdout == "\0" * 10_000_000


async def test_two_hundred_execs_at_once_all_end_and_leave_no_descriptor(
    agent: Agent, attacker: str, tmp_path: Path
) -> None:
    async with unharmed(agent, attacker):
        task = await started(agent, container(attacker, "app", STAYS), **LARGE)
        before = len(os.listdir("/proc/self/fd"))
        codes: list[int] = []

        async def enter(number: int) -> None:
            request = ExecRequest(command=("sh", "-c", f"exit {number}"))
            codes.append(await agent.tasks.exec(task, request, streams=Streams()))

        async with answering(agent, tmp_path / "run"):
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    for number in range(200):
                        nursery.start_soon(enter, number % 100)
        assert sorted(codes) == sorted(number % 100 for number in range(200))
        assert len(os.listdir("/proc/self/fd")) <= before
        await stopped(agent, task)


async def test_what_is_copied_out_of_a_storm_of_renames_is_of_the_task(
    agent: Agent, attacker: str, tmp_path: Path
) -> None:
    """A directory and a link that leads out of the root change places all the time."""
    async with unharmed(agent, attacker), connect(tmp_path / "run/agent.sock") as sandbox:
        id = await started(agent, container(attacker, "app", "/attack storm 1000000000"))
        await heard(agent, id, "1000 renames")
        task: Task = await sandbox.task(id)
        for number in range(20):
            await task.get("/storm", tmp_path / f"copy{number}")
        for copy in tmp_path.glob("copy*"):
            names = {path.relative_to(copy).as_posix() for path in copy.rglob("*")}
            assert names <= {"a", "b", "a/shadow", "b/shadow"}
            shadows = [path for path in copy.rglob("shadow") if path.is_file()]
            assert [path.stat().st_size for path in shadows] == [0] * len(shadows)
        assert (await stopped(agent, id)).container.exit_code == 137


@pytest.mark.parametrize("program", ["/proc/self/exe", "/proc/1/exe", "/proc/thread-self/exe"])
async def test_an_exec_of_a_link_to_the_program_that_comes_in_changes_nothing_of_the_hosts(
    program: str, agent: Agent, attacker: str
) -> None:
    """The way of CVE-2019-5736: whoever enters executes itself, and is overwritten meanwhile."""
    overwrite = "while :; do for p in /proc/[0-9]*/exe; do echo x >>$p; done; done 2>/dev/null"
    before = hashlib.sha256(agent.node.keeper.read_bytes()).digest()
    async with unharmed(agent, attacker):
        task = await started(agent, container(attacker, "app", overwrite), cpu="512", memory="1024")
        for _ in range(20):
            await execute(agent, task, program, "-c", "exit 0")
        assert hashlib.sha256(agent.node.keeper.read_bytes()).digest() == before
        assert (await stopped(agent, task)).container.exit_code == 137
