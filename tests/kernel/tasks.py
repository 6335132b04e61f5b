"""Short words for tests that look at a task while it lives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import trio

from sandbox.agent import Agent
from sandbox.control.tasks import Streams
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest
from sandbox.model.task import ContainerDefinition, ContainerKnown, Status, TaskView
from tests.kernel.conftest import Outcome, definition, finish

STAYS = "trap 'exit 0' TERM; while :; do sleep 0.05; done"
"""Runs until it is told to stop; a plain `sleep`, as pid 1, would have to be killed."""


def tree_with_tool(directory: Path) -> Path:
    """A tree of this host with a program `below/tool`, which says `from the host`."""
    tree = directory / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "tool").write_text("#!/bin/sh\necho from the host\n")
    (tree / "below" / "tool").chmod(0o755)
    return tree


def container(image: str, name: str, script: str, **members: Any) -> ContainerDefinition:
    """A container that runs a line of shell; it is killed after two seconds of patience."""
    given: dict[str, Any] = {"stop_timeout": 2, "command": ("sh", "-c", script)} | members
    return ContainerDefinition(name=name, image=image, **given)


async def begin(agent: Agent, *containers: ContainerDefinition, **members: Any) -> str:
    """Want a task; its id."""
    request = RunRequest(definition=definition(*containers, **members))
    return (await agent.tasks.run(request)).id


async def to_the_end(agent: Agent, *containers: ContainerDefinition, **members: Any) -> Outcome:
    with trio.fail_after(30):
        return await finish(agent, await begin(agent, *containers, **members))


async def reached(agent: Agent, task: str, condition: Callable[[TaskView], bool]) -> TaskView:
    """The first state of the task that fulfils the condition; fails after 20 s."""
    with trio.fail_after(20):
        views: AsyncGenerator[TaskView, None] = agent.tasks.watch(task)  # type: ignore[assignment]
        async with contextlib.aclosing(views):
            async for view in views:
                if condition(view):
                    return view
    raise AssertionError(f"the task ended before: {agent.tasks.describe(task).known}")


async def started(agent: Agent, *containers: ContainerDefinition, **members: Any) -> str:
    """A task that is RUNNING; its id."""
    task = await begin(agent, *containers, **members)
    await reached(agent, task, lambda view: view.known.last_status is Status.RUNNING)
    return task


async def stopped(agent: Agent, task: str) -> Outcome:
    """Stop it and see it STOPPED."""
    await agent.tasks.stop(task)
    with trio.fail_after(20):
        return await finish(agent, task)


async def killed(agent: Agent, task: str) -> Outcome:
    """Stop it without patience, and see it STOPPED."""
    await agent.tasks.stop(task)
    supervisor = agent.supervisors.get(task)
    if supervisor is not None:
        for known in agent.tasks.describe(task).known.containers:
            supervisor.containers.kill(known.name)
    with trio.fail_after(20):
        return await finish(agent, task)


def of(view: TaskView, name: str) -> ContainerKnown:
    return next(c for c in view.known.containers if c.name == name)


async def written(agent: Agent, task: str, name: str | None = None) -> str:
    """What a container has written to its log so far."""
    records = [r.data async for r in agent.tasks.logs(task, container=name)]
    return b"".join(records).decode()


async def heard(agent: Agent, task: str, text: str, name: str | None = None) -> str:
    """Wait until the log has this text; all of the log."""
    with trio.fail_after(20):
        while text not in (log := await written(agent, task, name)):
            await trio.sleep(0.01)
    return log


async def execute(agent: Agent, task: str, *command: str, **members: Any) -> tuple[int, str, str]:
    """Run a command in a container to its end: exit code, stdout, stderr."""
    request = ExecRequest(command=command, **members)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            out, err = Collected(nursery), Collected(nursery)
            streams = Streams(stdout=out.give(), stderr=err.give())
            code = await agent.tasks.exec(task, request, streams=streams)
    return code, out.text, err.text


class Collected:
    """The reading end of a pipe, read until every writer has closed it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        reader, self._writer = os.pipe()
        self._stream = trio.lowlevel.FdStream(reader)
        self._parts: list[bytes] = []
        nursery.start_soon(self._read)

    def give(self) -> int:
        """The writing end, which now belongs to who is given it."""
        return self._writer

    async def _read(self) -> None:
        async with self._stream:
            async for part in self._stream:
                self._parts.append(bytes(part))

    @property
    def data(self) -> bytes:
        return b"".join(self._parts)

    @property
    def text(self) -> str:
        return self.data.decode()


def processes_of(agent: Agent, task: str) -> list[str]:
    """The command lines of all processes in the task's cgroup, as the host sees them."""
    cgroup = agent.node.tree.find(f"task-{task}")
    if cgroup is None:
        return []
    lines = []
    for pid in cgroup.pids():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        lines.append(line.replace(b"\0", b" ").decode().strip())
    cgroup.close()
    return sorted(lines)
