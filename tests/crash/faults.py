"""One task along a path of `paths.py` while something fails, beside a task that must not notice.

In the driver's child, at the agent itself: `answer` does what it is asked for. What
went wrong is judged in `walker.py`, from outside.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import trio

from sandbox.agent import Agent
from sandbox.errors import NotFound, SandboxError
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest, Streams
from sandbox.store import rows
from tests.crash.paths import PATHS, app, log_of, task, until_running, view_of, wait

PATIENCE_S = 30.0
WALKS = {"pull and run to its exit": PATHS["run to its exit"], **PATHS}
"""Images that no task uses go after each walk; who walks the first brings a new one."""
BESIDE = "beside"
COUNTS = "trap 'exit 3' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.1; done"


async def beside(agent: Agent, image: str) -> str:
    """The task that runs all the time; an agent that follows another finds it running."""
    await agent.node.store.txn({})  # its WAL is open from here on
    for id in rows.task_ids(agent.node.store):
        if agent.tasks.describe(id).desired.definition.family == BESIDE:
            return id
    wanted = task(app(image, COUNTS), family=BESIDE)
    id = (await agent.tasks.run(RunRequest(definition=wanted))).id
    await until_running(agent, id)
    return id


async def answer(agent: Agent, image: str, asked: dict[str, Any]) -> dict[str, Any]:
    match asked:
        case {"go": path, "image": image}:
            return {"went": await go(agent, image, path)}
        case {"settle": path}:
            return {"settled": await settle(agent, image, path)}
        case {"look": _}:
            return {"seen": await look(agent)}
        case {"swap": helper, "program": program}:
            swap(agent, helper, Path(program))
            return {"swapped": helper}
        case {"exec": script}:
            return {"executed": await execute(agent, script)}
        case {"stop": id}:
            await agent.tasks.stop(id)
            await wait(agent, id)
            return {"stopped": agent.tasks.describe(id).known.containers[0].exit_code}
    raise AssertionError(asked)


async def go(agent: Agent, image: str, name: str) -> dict[str, Any]:
    """As far as it goes; what a user was told when it goes no further."""
    path = WALKS[name]
    try:
        with trio.fail_after(PATIENCE_S):
            wanted = RunRequest(definition=path.define(image), remove=path.remove)
            await path.act(agent, (await agent.tasks.run(wanted)).id)
    except SandboxError as error:
        return {"refused": str(error)}
    except Exception:
        return {"raised": traceback.format_exc()}
    return {}


def swap(agent: Agent, helper: str, program: Path) -> None:
    match helper:
        case "keeper":
            agent.node.keeper = program
        case "slot":
            agent.node.slots._program = program
        case "unpack":
            agent.node.images._layers._unpacker._program = program


async def execute(agent: Agent, script: str) -> int | str:
    """In the task beside: the exit code, or what the user was told."""
    request = ExecRequest(command=("sh", "-c", script))
    try:
        with trio.fail_after(PATIENCE_S):
            return await agent.tasks.exec(await beside(agent, ""), request, streams=Streams())
    except SandboxError as error:
        return str(error)


async def settle(agent: Agent, image: str, name: str) -> dict[str, Any]:
    """Nothing fails any more: take the task to its end, tell how it went, and forget it."""
    path, told = WALKS[name], dict[str, Any]()
    with trio.fail_after(PATIENCE_S):
        for id in rows.task_ids(agent.node.store):
            if (view := view_of(agent, id)) is None or view.desired.definition.family == BESIDE:
                continue
            await path.act(agent, id)
            if (view := view_of(agent, id)) is not None:
                told |= {
                    "status": view.known.last_status.name,
                    "stop_code": view.known.stop_code,
                    "reason": view.known.stopped_reason,
                    "containers": {
                        c.name: [c.last_status, c.exit_code, c.reason]
                        for c in view.known.containers
                    },
                    "logs": {c: await log_of(agent, id, c) for c in path.stdout},
                }
                if not path.remove:
                    await forget(agent, id)
        view = await agent.tasks.run(RunRequest(definition=task(app(image, "exit 42"))))
        await wait(agent, view.id)
        told["second"] = agent.tasks.describe(view.id).known.containers[0].exit_code
        await forget(agent, view.id)
        await agent.images.prune(unused=True)
    return told


async def forget(agent: Agent, id: str) -> None:
    try:
        await agent.tasks.remove(id)
    except NotFound:
        return  # it had been removed, and only that was not told


async def look(agent: Agent) -> dict[str, Any]:
    """At the task beside."""
    id = await beside(agent, "")
    known = agent.tasks.describe(id).known
    keeper = known.containers[0].keeper
    assert keeper is not None
    return {
        "status": known.last_status.name,
        "pid": keeper.init_pid,
        "lines": (await log_of(agent, id, "app")).splitlines(),
        "agent": os.getpid(),
    }
