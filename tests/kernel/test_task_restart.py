"""restartPolicy: a container that ended is started again in place."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.errors import InvalidParameterException
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition, RestartPolicy, TaskView
from sandbox.runtime import steps
from sandbox.runtime.steps import Scene
from tests.kernel.tasks import (
    begin,
    container,
    execute,
    heard,
    killed,
    of,
    reached,
    started,
    stopped,
    to_the_end,
    written,
)

pytestmark = pytest.mark.usefixtures("any_period")

AT_ONCE = RestartPolicy(enabled=True, restart_attempt_period=0)
COUNT_TO_3 = (
    "n=$(cat /n 2>/dev/null || echo 0); n=$((n+1)); echo $n | tee /n; exit $((n == 3 ? 9 : n))"
)


def is_running_again(view: TaskView) -> bool:
    """In the record: a program may have written before its agent has heard that it runs."""
    return of(view, "app").attempt == 1 and of(view, "app").last_status == "RUNNING"


async def test_it_is_started_again_on_its_own_writable_layer_until_a_code_is_ignored(
    agent: Agent, tiny: str
) -> None:
    policy = RestartPolicy(enabled=True, restart_attempt_period=0, ignored_exit_codes=(9,))
    outcome = await to_the_end(agent, container(tiny, "app", COUNT_TO_3, restart_policy=policy))
    assert outcome.stdout == "1\n2\n3\n"
    assert outcome.container.exit_code == 9
    assert outcome.container.attempt == 2
    assert outcome.view.known.stopped_reason == "Essential container in task exited"


async def test_one_that_did_not_run_long_enough_is_left_alone(agent: Agent, tiny: str) -> None:
    policy = RestartPolicy(enabled=True, restart_attempt_period=2)
    outcome = await to_the_end(agent, container(tiny, "app", "echo x", restart_policy=policy))
    assert outcome.stdout == "x\n"
    assert outcome.container.attempt == 0


async def test_a_policy_that_is_not_enabled_does_nothing(agent: Agent, tiny: str) -> None:
    policy = RestartPolicy(enabled=False, restart_attempt_period=0)
    outcome = await to_the_end(agent, container(tiny, "app", "echo x", restart_policy=policy))
    assert outcome.stdout == "x\n"


async def test_the_task_stays_running_and_the_sibling_unharmed(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "web", "exec sleep 1000"),
        container(tiny, "app", "echo up; exec sleep 1000", restart_policy=AT_ONCE),
    )
    await heard(agent, task, "up", "app")
    before = agent.tasks.describe(task)
    await agent.tasks.kill(task, signal.SIGKILL, container="app")
    view = await reached(agent, task, is_running_again)
    assert of(view, "web") == of(before, "web")
    assert of(view, "app").runtime_id == of(before, "app").runtime_id
    assert of(view, "app").exit_code is None
    await heard(agent, task, "up\nup\n", "app")
    assert (await execute(agent, task, "true", container="app"))[0] == 0
    outcome = await stopped(agent, task)
    assert of(outcome.view, "app").exit_code == 137


async def test_between_two_starts_it_is_not_running(
    agent: Agent, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal is for the start that has ended, not for the next one."""
    between, may_go_on, make_root = trio.Event(), trio.Event(), steps.make_root

    async def make_root_late(scene: Scene, wanted: ContainerDefinition) -> None:
        between.set()
        await may_go_on.wait()
        await make_root(scene, wanted)

    task = await started(
        agent, container(tiny, "app", "echo up; exec sleep 1000", restart_policy=AT_ONCE)
    )
    await heard(agent, task, "up")
    monkeypatch.setattr(steps, "make_root", make_root_late)
    await agent.tasks.kill(task, signal.SIGKILL)
    try:
        with trio.fail_after(20):
            await between.wait()
        with pytest.raises(InvalidParameterException, match="container app is not running"):
            await agent.tasks.kill(task, signal.SIGKILL)
        with pytest.raises(InvalidParameterException, match="container app is not running"):
            await agent.tasks.exec(task, ExecRequest(command=("true",)), streams=Streams())
    finally:
        may_go_on.set()
    await reached(agent, task, is_running_again)
    await killed(agent, task)


async def test_what_it_left_running_is_gone_before_it_starts_again(agent: Agent, tiny: str) -> None:
    script = "(setsid sleep 999 &); echo up; exec sleep 1000"
    task = await started(
        agent, container(tiny, "app", script, restart_policy=AT_ONCE), pid_mode="task"
    )
    await heard(agent, task, "up")
    await agent.tasks.kill(task, signal.SIGKILL)
    await heard(agent, task, "up\nup\n")
    await reached(agent, task, is_running_again)
    _, out, _ = await execute(agent, task, "ps", "-o", "args")
    assert out.splitlines().count("sleep 999") == 1
    await killed(agent, task)


async def test_stopping_ends_a_container_that_restarts_without_pause(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, container(tiny, "app", "echo x", restart_policy=AT_ONCE))
    await reached(agent, task, lambda view: of(view, "app").attempt > 3)
    outcome = await stopped(agent, task)
    assert outcome.view.known.stopped_reason == "Task stopped by user"
    assert outcome.container.started_at is not None
    assert outcome.container.finished_at is not None
    assert outcome.container.started_at <= outcome.container.finished_at
    count = len(await written(agent, task))
    await trio.sleep(0.2)
    assert len(await written(agent, task)) == count


async def test_an_essential_end_is_not_held_up_by_a_sibling_that_restarts(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "sleep 1"),
        container(tiny, "loop", "true", essential=False, restart_policy=AT_ONCE),
    )
    assert outcome.view.known.stopped_reason == "Essential container in task exited"
    assert of(outcome.view, "loop").attempt > 1


async def test_what_ended_while_no_agent_was_there_is_started_by_the_next_one(
    state_dir: Path, tmp_path: Path, tiny: str
) -> None:
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        script = "echo up; test -e /again && exec sleep 1000; touch /again; sleep 1"
        task = await begin(agent, container(tiny, "app", script, restart_policy=AT_ONCE))
        await heard(agent, task, "up")
    await trio.sleep(1.2)
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        await heard(agent, task, "up\nup\n")
        await reached(agent, task, is_running_again)
        await killed(agent, task)
