"""A real agent for a test, and a short way to run a task on it.

`agent` is embedded in the test's own trio loop with a state directory of its own. `tiny` is the
smallest real image (busybox), pulled over HTTP from a real registry. `probe_image` has the probe as
well and needs no registry; `images` makes more like it.

`inside` is a network namespace for a test that needs no agent, `iptables` one backend after the
other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.kernel import native
from sandbox.kernel.netfilter import Iptables
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.thread import KernelThread
from sandbox.model import fargate
from sandbox.model.request import RunRequest
from sandbox.model.task import ContainerDefinition, ContainerKnown, TaskDefinition, TaskView
from tests.conftest import Registry
from tests.kernel.probe_image import Images


@pytest.fixture
def tiny(registry: Registry) -> str:
    return registry.images["tiny"]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("layout"))


@pytest.fixture(scope="session")
def probe_image(images: Images) -> str:
    """Its command is /probe."""
    return images.make("probe")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Not yet made."""
    return tmp_path / "state"


@pytest.fixture
async def agent(state_dir: Path, tmp_path: Path) -> AsyncIterator[Agent]:
    async with open_agent(state_dir, tmp_path / "run", {"warm_slots": 1}, resident=True) as running:
        yield running
        await end_all(running)


async def end_all(agent: Agent) -> None:
    """What a failed test left running would run on without an agent."""
    for view in agent.tasks.list():
        supervisor = agent.supervisors.get(view.id)
        if supervisor is not None:
            await agent.tasks.stop(view.id)
            for container in view.known.containers:
                supervisor.containers.kill(container.name)
            await finish(agent, view.id)


@pytest.fixture
def any_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused: ECS's least periods would make some tests last for minutes."""
    monkeypatch.setattr(fargate, "accept", lambda definition, version, era: definition)


@dataclass(frozen=True)
class Outcome:
    """A task that has ended, and what its containers wrote."""

    view: TaskView
    stdout: str
    stderr: str

    @property
    def container(self) -> ContainerKnown:
        return self.view.known.containers[0]


def definition(*containers: ContainerDefinition, **members: Any) -> TaskDefinition:
    given = {"family": "test", "cpu": "256", "memory": "512"} | members
    return TaskDefinition(container_definitions=containers, **given)


async def finish(agent: Agent, task: str) -> Outcome:
    """Wait until the task is STOPPED, and read its logs."""
    async for view in agent.tasks.watch(task):
        last = view
    written = {stream: bytearray() for stream in ("stdout", "stderr", "terminal", "keeper")}
    async for record in agent.tasks.logs(task):
        written[record.stream] += record.data
    text = {stream: data.decode(errors="replace") for stream, data in written.items()}
    return Outcome(last, text["stdout"] + text["terminal"], text["stderr"])


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Poll, for what has no event; fails the test after `timeout_s`."""
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)


Run = Callable[..., Awaitable[Outcome]]


@pytest.fixture
def run(agent: Agent, tiny: str) -> Run:
    """`await run("sh", "-c", "...", user="1000")`: one container of `tiny`, to its end."""

    async def run(*command: str, **members: Any) -> Outcome:
        given = {"name": "app", "image": tiny, "command": command or None} | members
        wanted = definition(ContainerDefinition(**given))
        with trio.fail_after(60):
            view = await agent.tasks.run(RunRequest(definition=wanted))
            return await finish(agent, view.id)

    return run


@pytest.fixture
def inside() -> Iterator[KernelThread]:
    """A thread in a network namespace of its own, with the loopback up."""

    def enter() -> None:
        native.unshare(native.CLONE_NEWNET)
        with Netlink() as netlink:
            netlink.set_loopback_up()

    with KernelThread("inside") as thread:
        thread.call(enter)
        yield thread


@pytest.fixture(params=["nft", "legacy"])
def iptables(request: pytest.FixtureRequest, tmp_path: Path) -> Iptables:
    backend = Iptables(request.param, str(tmp_path / "lock"))
    if not backend.works():
        pytest.skip(f"this kernel or host has no iptables of backend {request.param}")
    return backend
