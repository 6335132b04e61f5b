"""The ways a task can go, each from RunTask to its end, for an agent that may die on the way.

A path is a task and what its user does with it. `act` may be begun anew on another agent, whatever
the one before has lived to see: it looks first, and does what is still to be done. So the same
function takes a task to its end in the agent that is killed and in the one that recovers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from sandbox.agent import Agent
from sandbox.errors import InvalidParameterException, NotFound
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import (
    ContainerDefinition,
    ContainerDependency,
    MountPoint,
    RestartPolicy,
    Status,
    StopCode,
    TaskDefinition,
    TaskView,
    Volume,
)
from sandbox.runtime.keeper import read_exit

LINES = "".join(f"line {n}\n" for n in range(50))
COUNT = "n=0; while [ $n -lt 50 ]; do echo line $n; n=$((n+1)); done; sleep 0.1; echo end; exit 7"
UNTIL_TOLD = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 1 & wait $!; done"
RESTARTING = """
trap 'exit 1' USR1
n=$(($(cat /n 2>/dev/null || echo 0) + 1)); echo $n >/n; echo run $n
[ $n -eq 1 ] || exit 9
while :; do sleep 1 & wait $!; done
"""
_LOOK_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Path:
    define: Callable[[str], TaskDefinition]
    """The task, of this image."""
    act: Callable[[Agent, str], Awaitable[None]]
    """From wherever the task is to its end, as its user."""
    stop_code: StopCode
    exit_codes: Mapping[str, int | None] = field(default_factory=dict)
    stdout: Mapping[str, str] = field(default_factory=dict)
    """The whole log of a container that has run; one not named here is not looked at."""
    starts: bool = True
    """It comes to RUNNING unless something kills the agent before."""
    remove: bool = False


# Looking -----------------------------------------------------------------------------------


def view_of(agent: Agent, task: str) -> TaskView | None:
    try:
        return agent.tasks.describe(task)
    except NotFound:
        return None


def is_over(agent: Agent, task: str) -> bool:
    view = view_of(agent, task)
    return view is None or view.known.last_status is Status.STOPPED


async def log_of(agent: Agent, task: str, container: str) -> str:
    records = agent.tasks.logs(task, container=container)
    return b"".join([record.data async for record in records]).decode()


async def until_running(agent: Agent, task: str) -> None:
    """Or past it."""
    while (view := view_of(agent, task)) and view.known.last_status < Status.RUNNING:
        await trio.sleep(_LOOK_S)


async def _until_written(agent: Agent, task: str, text: str) -> None:
    while not is_over(agent, task) and text not in await log_of(agent, task, "app"):
        await trio.sleep(_LOOK_S)


# Acting ------------------------------------------------------------------------------------


async def wait(agent: Agent, task: str) -> None:
    while not is_over(agent, task):
        await trio.sleep(_LOOK_S)


async def stop(agent: Agent, task: str) -> None:
    await until_running(agent, task)
    await _until_written(agent, task, "ready")
    if not is_over(agent, task):
        await agent.tasks.stop(task)
    await wait(agent, task)


async def enter_then_stop(agent: Agent, task: str) -> None:
    await until_running(agent, task)
    await _until_written(agent, task, "ready")
    request = ExecRequest(command=("sh", "-c", "sleep 0.05; exit 4"))
    with contextlib.suppress(InvalidParameterException):  # it has ended, or never ran
        code = await agent.tasks.exec(task, request, streams=Streams())
        view = view_of(agent, task)
        is_going_down = view is not None and view.known.stop_code is not None
        assert code == 4 or is_going_down
    await stop(agent, task)


async def let_it_restart(agent: Agent, task: str) -> None:
    """ECS asks for a minute of running before it restarts: so the record is made to say so, by
    either clock, and the file from which who takes over learns when it began."""
    await until_running(agent, task)
    await _until_written(agent, task, "run 1")
    supervisor = agent.supervisors.get(task)
    first = agent.node.container_dir(task, "app") / "run.0"
    identity = supervisor.record.container("app").keeper if supervisor is not None else None
    if supervisor is not None and identity is not None and read_exit(first) is None:  # not yet told
        earlier = identity.init_start_time - 3600 * os.sysconf("SC_CLK_TCK")
        identity = msgspec.structs.replace(identity, init_start_time=earlier)
        supervisor.record.note("app", started_at=time.time() - 3600, keeper=identity)
        os.utime(first / "pid", (time.time() - 3600,) * 2)
        supervisor.record.save()
        supervisor.record.settle()
        if read_exit(first) is None:  # else what is told is the second start
            with contextlib.suppress(InvalidParameterException):
                await agent.tasks.kill(task, signal.SIGUSR1)
    await wait(agent, task)


async def wait_until_gone(agent: Agent, task: str) -> None:
    while view_of(agent, task) is not None:
        await trio.sleep(_LOOK_S)


async def forget(agent: Agent, task: str) -> None:
    await wait(agent, task)
    if view_of(agent, task) is not None:
        await agent.tasks.remove(task)


# Tasks -------------------------------------------------------------------------------------


def app(image: str, script: str, **members: Any) -> ContainerDefinition:
    given: dict[str, Any] = {"name": "app", "stop_timeout": 2} | members
    return ContainerDefinition(image=image, command=("sh", "-c", script), **given)


def task(*containers: ContainerDefinition, **members: Any) -> TaskDefinition:
    given: dict[str, Any] = {"family": "crash", "cpu": "256", "memory": "512"} | members
    return TaskDefinition(container_definitions=containers, **given)


def _several(image: str) -> TaskDefinition:
    shared = (MountPoint(source_volume="shared", container_path="/shared"),)
    after = (ContainerDependency(container_name="first", condition="SUCCESS"),)
    first = app(image, "echo hello >/shared/x", name="first", essential=False, mount_points=shared)
    beside = app(image, UNTIL_TOLD, name="beside", essential=False, depends_on=after)
    last = app(image, "cat /shared/x; sleep 0.1; exit 5", depends_on=after, mount_points=shared)
    return task(first, beside, last, volumes=(Volume(name="shared"),))


def _restarting(image: str) -> TaskDefinition:
    policy = RestartPolicy(enabled=True, restart_attempt_period=60)
    return task(app(image, RESTARTING, restart_policy=policy))


_EXITED = StopCode.ESSENTIAL_CONTAINER_EXITED

PATHS: Mapping[str, Path] = {
    "run to its exit": Path(
        define=lambda image: task(app(image, COUNT)),
        act=wait,
        stop_code=_EXITED,
        exit_codes={"app": 7},
        stdout={"app": LINES + "end\n"},
    ),
    "run and stop": Path(
        define=lambda image: task(app(image, UNTIL_TOLD)),
        act=stop,
        stop_code=StopCode.USER_INITIATED,
        exit_codes={"app": 3},
        stdout={"app": "ready\nbye\n"},
    ),
    "several containers": Path(
        define=_several,
        act=wait,
        stop_code=_EXITED,
        exit_codes={"first": 0, "app": 5},
        stdout={"first": "", "app": "hello\n"},
    ),
    "no such command": Path(
        define=lambda image: task(
            ContainerDefinition(name="app", image=image, command=("no-such-program",))
        ),
        act=wait,
        stop_code=StopCode.TASK_FAILED_TO_START,
        starts=False,
    ),
    "no such image": Path(
        define=lambda image: task(app("oci:/no/such/layout", "true")),
        act=wait,
        stop_code=StopCode.TASK_FAILED_TO_START,
        starts=False,
    ),
    "exec": Path(
        define=lambda image: task(app(image, UNTIL_TOLD)),
        act=enter_then_stop,
        stop_code=StopCode.USER_INITIATED,
        exit_codes={"app": 3},
        stdout={"app": "ready\nbye\n"},
    ),
    "shared pid namespace": Path(
        define=lambda image: task(
            app(image, COUNT),
            app(image, UNTIL_TOLD, name="beside", essential=False),
            pid_mode="task",
        ),
        act=wait,
        stop_code=_EXITED,
        exit_codes={"app": 7},
        stdout={"app": LINES + "end\n"},
    ),
    "restart": Path(
        define=_restarting,
        act=let_it_restart,
        stop_code=_EXITED,
        exit_codes={"app": 9},
        stdout={"app": "run 1\nrun 2\n"},
    ),
    "run --rm": Path(
        define=lambda image: task(app(image, COUNT)),
        act=wait_until_gone,
        stop_code=_EXITED,
        exit_codes={"app": 7},
        remove=True,
    ),
    "run and remove": Path(
        define=lambda image: task(app(image, COUNT)),
        act=forget,
        stop_code=_EXITED,
        exit_codes={"app": 7},
    ),
}
