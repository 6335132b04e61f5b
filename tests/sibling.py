"""A task beside the one that a test is about, which must not notice what happens to that one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sandbox.agent import Agent
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import StopCode
from tests.crash.paths import UNTIL_TOLD, app, log_of, task, until_running, wait

ANSWERS_S = 60.0
"""Not how fast it is, but that it answers at all."""


@asynccontextmanager
async def unharmed(agent: Agent, image: str) -> AsyncIterator[None]:
    """It runs all the time under the same keeper, answers, and ends with its own exit code."""
    with trio.fail_after(ANSWERS_S):
        view = await agent.tasks.run(RunRequest(definition=task(app(image, UNTIL_TOLD))))
        await until_running(agent, view.id)
        while "ready" not in await log_of(agent, view.id, "app"):
            await trio.sleep(0.01)
    before = agent.tasks.describe(view.id).known.containers[0]
    yield
    with trio.fail_after(ANSWERS_S):
        request = ExecRequest(command=("sh", "-c", "exit 4"))
        assert await agent.tasks.exec(view.id, request, streams=Streams()) == 4
        assert agent.tasks.describe(view.id).known.containers[0] == before
        await agent.tasks.stop(view.id)
        await wait(agent, view.id)
        known = agent.tasks.describe(view.id).known
        assert known.stop_code is StopCode.USER_INITIATED
        assert known.containers[0].exit_code == 3
        assert await log_of(agent, view.id, "app") == "ready\nbye\n"
        await agent.tasks.remove(view.id)
