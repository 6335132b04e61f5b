"""An agent in a process of its own, which may be killed at any moment.

    python -m tests.crash.driver        reads requests from stdin, one JSON object a line

It imports everything once and forks for each request; the child is what a failpoint kills. Said on
stdout, a JSON object a line: by the child {"ready"}, {"task"} and at its end {"passed"}; then by
the parent {"ended": signal or exit code}.

    run       a fresh agent takes one task along a path of `paths.py` to its end
    recover   an agent takes over what is in the state directory, and to its end
    hold      an agent, with a new task if there is a `script`, until a signal ends it; the task
              must not outlive the process `owner`, by default (0) this one
    serve     an agent with a task that stays beside whatever happens, for the requests that
              `tests/crash/faults.py` has answers to, a JSON object a line, until an empty one; when
              it loses its store it says {"lost": why}
    churn     an agent that runs tasks and stops some of them until a signal ends it; what was
              acknowledged is said: {"acknowledged": "run" or "stop", "task"}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
import trio

from sandbox.agent import Agent, open_agent
from sandbox.errors import StoreError
from sandbox.model.request import RunRequest
from sandbox.model.task import TaskDefinition
from sandbox.store import rows
from tests.crash.faults import answer, beside
from tests.crash.paths import PATHS, UNTIL_TOLD, app, task, until_running, wait

SETTINGS = {"warm_slots": 1, "warm_storage": 1, "host_free_storage_mib": 0}
PATIENCE_S = 30.0


def say(**fact: Any) -> None:
    os.writev(1, [json.dumps(fact).encode(), b"\n"])  # not a call that is made to fail


async def run(agent: Agent, request: dict[str, Any]) -> None:
    path = PATHS[request["path"]]
    wanted = RunRequest(definition=path.define(request["image"]), remove=path.remove)
    view = await agent.tasks.run(wanted)
    say(task=view.id)
    await path.act(agent, view.id)


async def recover(agent: Agent, request: dict[str, Any]) -> None:
    for id in rows.task_ids(agent.node.store):
        await PATHS[request["path"]].act(agent, id)


async def hold(agent: Agent, request: dict[str, Any]) -> None:
    if "script" in request:
        owner = None
        if "owner" in request:
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            owner = f"{boot_id}:{request['owner'] or os.getpid()}"
        wanted = RunRequest(definition=task(app(request["image"], request["script"])))
        view = await agent.tasks.run(wanted, owner=owner)
        await until_running(agent, view.id)
        await agent.node.store.txn({})  # what is known of it was only posted
        say(task=view.id)
    say(ready=True)
    await trio.sleep_forever()


async def serve_requests(agent: Agent, request: dict[str, Any]) -> None:
    say(ready=True, beside=await beside(agent, request["image"]))
    async for asked in requests():
        say(**await answer(agent, request["image"], asked))


async def churn(agent: Agent, request: dict[str, Any]) -> None:
    say(ready=True)
    async with trio.open_nursery() as nursery:
        for script in ("sleep 0.05; exit 7", UNTIL_TOLD):
            nursery.start_soon(run_for_ever, agent, task(app(request["image"], script)))


async def run_for_ever(agent: Agent, definition: TaskDefinition) -> None:
    while True:
        id = (await agent.tasks.run(RunRequest(definition=definition))).id
        say(acknowledged="run", task=id)
        await until_running(agent, id)
        await agent.tasks.stop(id)
        say(acknowledged="stop", task=id)
        await wait(agent, id)


async def requests() -> AsyncIterator[dict[str, Any]]:
    """The lines after our own request: the parent reads none while it waits for us."""
    while True:
        await trio.lowlevel.wait_readable(0)
        if not (asked := json.loads(os.read(0, 1 << 16))):
            return
        yield asked


VERBS: dict[str, Callable[[Agent, dict[str, Any]], Awaitable[None]]] = {
    "run": run,
    "recover": recover,
    "hold": hold,
    "serve": serve_requests,
    "churn": churn,
}


ENDLESS = ("hold", "serve", "churn")


async def serve(request: dict[str, Any]) -> None:
    state, run_dir = Path(request["state"]), Path(request["run"])
    with trio.fail_after(float("inf") if request["verb"] in ENDLESS else PATIENCE_S):
        async with open_agent(state, run_dir, SETTINGS, resident=True) as agent:
            await VERBS[request["verb"]](agent, request)
            failpoints = agent.node.failpoints
    say(passed=failpoints.passed)


def child(request: dict[str, Any]) -> None:
    # A name that no failpoint has makes the agent remember those that it passes.
    os.environ["SANDBOX_FAILPOINT"] = request.get("failpoint") or "none"
    structlog.configure(
        # Not with local variables, its default: that holds up the agent for seconds.
        processors=[
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ],
        wrapper_class=structlog.make_filtering_bound_logger("error"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    trio.run(serve, request)


def lost_store(error: BaseException) -> str | None:
    """The text, when that alone has ended the agent: `sandbox agent` tells it so too."""
    while isinstance(error, BaseExceptionGroup):
        lost, others = error.split(StoreError)
        if lost is None or others is not None:
            return None
        error = lost.exceptions[0]
    return str(error) if isinstance(error, StoreError) else None


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "verb" not in request:
            continue  # for one that has ended meanwhile
        pid = os.fork()
        if pid == 0:
            try:
                child(request)
            except BaseException as error:
                if (lost := lost_store(error)) is not None:
                    say(lost=lost)
                else:
                    sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        say(pid=pid)
        _, status = os.waitpid(pid, 0)
        say(ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
