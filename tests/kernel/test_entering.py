"""What the processes of a task can do to one that comes in: an exec, a health check.

They are given all that a definition may give: uid 0 and SYS_PTRACE, and a processor to spin on.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandbox.agent import Agent
from sandbox.errors import SandboxError
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition, KernelCapabilities, LinuxParameters
from tests.conftest import IN_GUEST, ROOT
from tests.kernel.conftest import finish
from tests.kernel.probe_image import Images
from tests.kernel.tasks import heard, started

EXECS = 20 if IN_GUEST else 150
GIVE_UP_MS = 1000


def compiled(program: Path, *sources: str | Path) -> Path:
    command = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, *sources]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


@pytest.fixture(scope="module")
def lurker(images: Images, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image of tests/kernel/lie_in_wait.c."""
    source = Path(__file__).with_name("lie_in_wait.c")
    program = compiled(tmp_path_factory.mktemp("lurker") / "lie_in_wait", source)
    return images.make("lurker", lambda layer: layer.file("lie", program.read_bytes(), 0o755))


@pytest.fixture
def hasty(agent: Agent, tmp_path: Path) -> Agent:
    """The agent, with a keeper that has less patience than half a minute."""
    sources = sorted((ROOT / "native").glob("keeper*.c"))
    define = f"-DSTART_TIMEOUT_MS={GIVE_UP_MS}"
    agent.node.keeper = compiled(tmp_path / "keeper", define, *sources)
    return agent


async def lie_in_wait(agent: Agent, image: str, *arguments: str) -> str:
    parameters = LinuxParameters(capabilities=KernelCapabilities(add=("SYS_PTRACE",)))
    container = ContainerDefinition(
        name="app", image=image, command=("/lie", *arguments), linux_parameters=parameters
    )
    task = await started(agent, container, cpu="1024", memory="2048")
    await heard(agent, task, "waiting")
    return task


@pytest.fixture
def open_to_others() -> Iterator[None]:
    """On a host of our own: processes that change their ids stay open to others there."""
    if not IN_GUEST:
        yield
        return
    setting = Path("/proc/sys/fs/suid_dumpable")
    before = setting.read_text()
    setting.write_text("1")
    yield
    setting.write_text(before)


@pytest.mark.guest
@pytest.mark.usefixtures("open_to_others")
async def test_nobody_reaches_into_an_exec_before_it_runs_the_tasks_own_program(
    agent: Agent, lurker: str
) -> None:
    task = await lie_in_wait(agent, lurker)
    with trio.fail_after(120):
        for _ in range(EXECS):
            request = ExecRequest(command=("true",))
            assert await agent.tasks.exec(task, request, streams=Streams()) == 0
        await agent.tasks.kill(task, signal.SIGTERM)
        told = json.loads((await finish(agent, task)).stdout.partition("\n")[2])
    assert told.pop("seen") > 0
    made = {what: count for what, (count, _, _) in told.items()}
    assert sum(made.values()) > len(made), "nobody was caught between clone and exec"
    assert {what: n for what, (_, n, _) in told.items() if n} == {}
    assert {what for what, (_, _, able) in told.items() if not able} == {"exe for writing"}


# Not in the guest, where the one processor rarely lets the waiting program in between.
async def test_an_exec_that_the_task_stops_on_its_way_in_is_given_up(
    hasty: Agent, lurker: str
) -> None:
    task = await lie_in_wait(hasty, lurker, "stop")
    request = ExecRequest(command=("true",))
    with trio.fail_after(20):
        with pytest.raises(SandboxError, match="Connection timed out"):
            while True:  # until one is caught before it is the task's own program
                await hasty.tasks.exec(task, request, streams=Streams())
        await hasty.tasks.kill(task, signal.SIGKILL)
        await finish(hasty, task)
