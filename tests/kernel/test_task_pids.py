"""pidMode task: the containers of a task share one pid namespace, whose init is ours."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.model.task import RestartPolicy
from sandbox.runtime import ordering
from tests.kernel.conftest import finish, until
from tests.kernel.tasks import (
    container,
    execute,
    heard,
    killed,
    of,
    processes_of,
    reached,
    started,
    stopped,
    to_the_end,
)

pytestmark = pytest.mark.guest


async def pids_seen(agent: Agent, task: str, name: str) -> dict[str, str]:
    """Command line to pid, as a container sees them."""
    code, out, err = await execute(agent, task, "ps", "-o", "pid,args", container=name)
    assert (code, err) == (0, "")
    pairs = (line.split(maxsplit=1) for line in out.splitlines()[1:])
    return {args.removeprefix("{sandbox-init} "): pid for pid, args in pairs}


async def process_runs(agent: Agent, task: str, line: str) -> None:
    """Wait until a process of the task has that command line."""
    await until(lambda: line in processes_of(agent, task))


async def test_containers_see_each_others_processes_and_our_init_as_pid_1(
    agent: Agent, tiny: str
) -> None:
    task = await started(
        agent,
        container(tiny, "web", "exec sleep 777"),
        container(tiny, "side", "exec sleep 888"),
        pid_mode="task",
    )
    await process_runs(agent, task, "sleep 777")
    await process_runs(agent, task, "sleep 888")
    for name in ("web", "side"):
        seen = await pids_seen(agent, task, name)
        assert {"sleep 777", "sleep 888"} <= seen.keys()
        (init,) = (args for args, pid in seen.items() if pid == "1")
        assert init.startswith("sandbox-init")
    await killed(agent, task)


async def test_without_it_a_container_sees_itself_alone(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "web", "exec sleep 777"),
        container(tiny, "side", "exec sleep 888"),
    )
    await process_runs(agent, task, "sleep 777")
    seen = await pids_seen(agent, task, "web")
    assert seen["sleep 777"] == "1"
    assert "sleep 888" not in seen
    await killed(agent, task)


async def test_what_a_container_leaves_behind_dies_with_it_and_its_sibling_runs_on(
    agent: Agent, tiny: str
) -> None:
    leaves = "sleep 999 & (setsid sleep 998 &) ; sleep 1"
    task = await started(
        agent,
        container(tiny, "web", "exec sleep 777"),
        container(tiny, "side", leaves, essential=False),
        pid_mode="task",
    )
    await process_runs(agent, task, "sleep 998")
    view = await reached(agent, task, lambda view: of(view, "side").last_status == "STOPPED")
    assert of(view, "side").exit_code == 0
    await until(lambda: "sleep 998" not in processes_of(agent, task))
    seen = await pids_seen(agent, task, "web")
    assert "sleep 999" not in seen
    assert "sleep 777" in seen
    await killed(agent, task)


async def test_the_init_reaps_what_is_orphaned(agent: Agent, tiny: str) -> None:
    script = "for i in 1 2 3 4 5; do (sleep 0.1 &); done; sleep 0.5; echo ready; sleep 1000"
    task = await started(agent, container(tiny, "web", script), pid_mode="task")
    await heard(agent, task, "ready")
    code, out, _ = await execute(agent, task, "sh", "-c", "cat /proc/[0-9]*/stat")
    assert code == 0
    assert " Z " not in out
    await killed(agent, task)


async def test_no_container_can_end_the_init(agent: Agent, tiny: str) -> None:
    task = await started(agent, container(tiny, "web", "exec sleep 777"), pid_mode="task")
    for name in ("TERM", "KILL", "INT", "HUP", "CHLD"):
        assert (await execute(agent, task, "kill", f"-{name}", "1"))[0] == 0
    assert "sleep 777" in await pids_seen(agent, task, "web")
    await killed(agent, task)


async def test_a_stop_signal_reaches_a_program_without_a_handler(agent: Agent, tiny: str) -> None:
    # It is not pid 1, so the kernel's default action applies to it.
    task = await started(agent, container(tiny, "web", "exec sleep 777"), pid_mode="task")
    assert (await stopped(agent, task)).container.exit_code == 143


async def test_the_end_of_the_init_ends_the_task(agent: Agent, tiny: str) -> None:
    task = await started(agent, container(tiny, "web", "exec sleep 777"), pid_mode="task")
    supervisor = agent.supervisors.get(task)
    assert supervisor is not None
    pause = supervisor.scene.pause
    assert pause is not None
    pause.signal(signal.SIGTERM)  # from outside of the namespace
    with trio.fail_after(10):
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 137
    assert outcome.view.known.stopped_reason == ordering.ESSENTIAL_EXITED


async def test_a_container_may_be_called_pause(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent, container(tiny, "pause", "cat /proc/1/cmdline"), pid_mode="task"
    )
    assert outcome.container.exit_code == 0
    assert outcome.stdout.startswith("sandbox-init")


async def test_another_agent_finds_the_namespace_again_and_takes_it_down(
    state_dir: Path, tmp_path: Path, tiny: str, any_period: None
) -> None:
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        again = RestartPolicy(enabled=True, restart_attempt_period=0)
        task = await started(
            agent,
            container(tiny, "web", "exec sleep 777"),
            container(tiny, "side", "exec sleep 888", essential=False, restart_policy=again),
            pid_mode="task",
        )
        await process_runs(agent, task, "sleep 888")
        before = await pids_seen(agent, task, "web")
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        await agent.tasks.kill(task, signal.SIGKILL, container="side")
        await reached(agent, task, lambda view: of(view, "side").attempt == 1)
        await process_runs(agent, task, "sleep 888")
        after = await pids_seen(agent, task, "side")
        assert after["sleep 777"] == before["sleep 777"]
        assert after["sleep 888"] != before["sleep 888"]
        await killed(agent, task)
    assert sorted(os.listdir(state_dir / "tasks" / task)) == ["side", "web"]


async def test_an_image_that_cannot_be_pulled_leaves_no_init(agent: Agent, tiny: str) -> None:
    missing = tiny.replace("tiny", "absent")
    outcome = await to_the_end(agent, container(missing, "web", "true"), pid_mode="task")
    assert outcome.view.known.stopped_reason is not None
    assert outcome.view.known.stopped_reason.startswith("CannotPullContainerError")
