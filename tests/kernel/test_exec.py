"""Commands in a running container."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from sandbox.agent import Agent, open_agent
from sandbox.errors import InvalidParameterException, TaskFailed
from sandbox.kernel.cgroups import Cgroup
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition, KeyValuePair, RestartPolicy
from sandbox.runtime import launch, recovery
from sandbox.runtime.keeper import Keeper
from sandbox.runtime.recovery import Found
from sandbox.runtime.steps import Scene
from tests.kernel.conftest import until
from tests.kernel.tasks import (
    Collected,
    begin,
    container,
    execute,
    heard,
    killed,
    of,
    processes_of,
    reached,
    started,
)

STAYS = "exec sleep 1000"


def app(image: str, script: str = STAYS, **members: object) -> ContainerDefinition:
    return container(image, "app", script, **members)


@pytest.mark.guest
async def test_its_exit_code_and_both_streams_are_its_own(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    answer = await execute(agent, task, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert answer == (7, "out\n", "err\n")
    assert (await execute(agent, task, "sh", "-c", "kill -9 $$"))[0] == 137
    assert (await execute(agent, task, "sh", "-c", "kill -TERM $$"))[0] == 143
    outcome = await killed(agent, task)
    assert (outcome.stdout, outcome.stderr) == ("", "")  # an exec is no part of the log


async def test_it_is_in_the_container(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny, "echo here > /tmp/mark; exec sleep 1000"))
    await until(lambda: "sleep 1000" in processes_of(agent, task))
    assert (await execute(agent, task, "cat", "/tmp/mark"))[1] == "here\n"
    _, seen, _ = await execute(agent, task, "ps", "-o", "pid,args")
    assert "1 sleep 1000" in seen
    _, names, _ = await execute(agent, task, "sh", "-c", "cat /proc/1/environ; hostname")
    assert names.endswith(f"{task[:12]}\n")
    await killed(agent, task)


async def test_what_is_not_said_is_as_the_container_has_it(agent: Agent, tiny: str) -> None:
    script = "id -u; id -g; pwd; echo $A $B $AWS_REGION $HOME"
    task = await started(
        agent,
        app(
            tiny,
            user="app",
            working_directory="/tmp",
            environment=(KeyValuePair(name="A", value="1"), KeyValuePair(name="B", value="2")),
        ),
    )
    own = await execute(agent, task, "sh", "-c", script)
    assert own == (0, "1000\n1000\n/tmp\n1 2 us-east-1 /home/app\n", "")
    other = await execute(
        agent,
        task,
        "sh",
        "-c",
        script,
        user="0:2000",
        working_directory="/etc",
        environment={"B": "3"},
    )
    assert other == (0, "0\n2000\n/etc\n1 3 us-east-1 /root\n", "")
    await killed(agent, task)


async def test_a_container_is_named_or_the_first_essential_one(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "side", "exec sleep 2001", essential=False),
        container(tiny, "main", "exec sleep 2002"),
    )
    await until(lambda: {"sleep 2001", "sleep 2002"} <= set(processes_of(agent, task)))
    assert "2002" in (await execute(agent, task, "cat", "/proc/1/cmdline"))[1]
    assert "2001" in (await execute(agent, task, "cat", "/proc/1/cmdline", container="side"))[1]
    with pytest.raises(InvalidParameterException, match="container other is not running"):
        await execute_alone(agent, task, "true", container="other")
    await killed(agent, task)


async def execute_alone(agent: Agent, task: str, *command: str, **members: object) -> int:
    request = ExecRequest(command=command, **members)  # type: ignore[arg-type]
    return await agent.tasks.exec(task, request, streams=Streams())


@pytest.mark.parametrize(
    ("command", "code", "text"),
    [
        ("nothing", 127, 'exec: "nothing": executable file not found in $PATH'),
        ("/etc/nothing", 127, 'exec: "/etc/nothing": executable file not found in $PATH'),
        ("/etc/passwd", 126, 'exec: "/etc/passwd": Permission denied'),
        ("/etc", 126, 'exec: "/etc": Permission denied'),
    ],
)
async def test_what_cannot_be_executed_is_told_as_a_shell_tells_it(
    agent: Agent, tiny: str, command: str, code: int, text: str
) -> None:
    task = await started(agent, app(tiny))
    with pytest.raises(TaskFailed) as caught:
        await execute_alone(agent, task, command)
    assert (caught.value.exit_code, str(caught.value)) == (code, text)
    assert execs_left(agent, task) == []
    await killed(agent, task)


async def test_a_relative_working_directory_is_refused_as_in_a_definition(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, app(tiny))
    with pytest.raises(InvalidParameterException, match="rel must be absolute"):
        await execute_alone(agent, task, "true", working_directory="rel")
    await killed(agent, task)


async def test_a_working_directory_that_is_not_there_is_named_and_not_made(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, app(tiny))
    told = 'exec: working directory "/missing": No such file or directory'
    with pytest.raises(TaskFailed, match=told) as caught:
        await execute_alone(agent, task, "true", working_directory="/missing")
    assert caught.value.exit_code == 126
    assert (await execute(agent, task, "ls", "-d", "/missing"))[0] != 0
    await killed(agent, task)


async def test_a_user_that_is_not_there_is_named(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    with pytest.raises(Exception, match="unable to find user 'nobody-here'"):
        await execute_alone(agent, task, "true", user="nobody-here")
    with pytest.raises(InvalidParameterException, match="no command"):
        await execute_alone(agent, task)
    assert execs_left(agent, task) == []
    await killed(agent, task)


def execs_left(agent: Agent, task: str) -> list[str]:
    """Status directories and cgroups of execs that are there."""
    directory = agent.node.container_dir(task, "app")
    cgroup = agent.node.tree.find(f"task-{task}/app")
    assert cgroup is not None
    fd = cgroup.directory_fd
    nests = [name for name in os.listdir(fd) if name.startswith("exec.")]
    cgroup.close()
    return [str(path) for path in directory.glob("exec.*")] + nests


async def started_exec(
    nursery: trio.Nursery, agent: Agent, task: str, *command: str, **members: object
) -> tuple[Callable[[], None], str]:
    """An exec that runs, in a scope of its own: how to cancel it, and its id."""
    scope, begun = trio.CancelScope(), trio.Event()
    ids: list[str] = []

    def is_started(exec_id: str) -> None:
        ids.append(exec_id)
        begun.set()

    async def run() -> None:
        request = ExecRequest(command=command, **members)  # type: ignore[arg-type]
        with scope:
            await agent.tasks.exec(task, request, streams=Streams(), started=is_started)

    nursery.start_soon(run)
    with trio.fail_after(10):
        await begun.wait()
    return scope.cancel, ids[0]


@pytest.mark.guest
@pytest.mark.parametrize("pid_mode", [None, "task"])
async def test_one_that_is_cancelled_leaves_nothing(
    agent: Agent, tiny: str, pid_mode: str | None
) -> None:
    task = await started(agent, app(tiny), pid_mode=pid_mode)
    script = "sleep 991 & (setsid sleep 992 &); sleep 993; true"
    async with trio.open_nursery() as nursery:
        cancel, _ = await started_exec(nursery, agent, task, "sh", "-c", script)
        await until(lambda: {"sleep 991", "sleep 992", "sleep 993"} <= {*processes_of(agent, task)})
        cancel()
    assert [line for line in processes_of(agent, task) if line.startswith("sleep 99")] == []
    assert "sleep 1000" in processes_of(agent, task)
    assert execs_left(agent, task) == []
    await killed(agent, task)


async def test_what_it_leaves_in_the_background_runs_on_and_holds_nobody_up(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, app(tiny))
    with trio.fail_after(5):
        assert (await execute(agent, task, "sh", "-c", "sleep 991 & echo gone"))[:2] == (
            0,
            "gone\n",
        )
    await until(lambda: "sleep 991" in processes_of(agent, task))
    outcome = await killed(agent, task)
    assert outcome.container.exit_code == 137
    assert processes_of(agent, task) == []


async def test_it_ends_with_its_container(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    codes: list[int] = []

    async def run() -> None:
        codes.append(await execute_alone(agent, task, "sleep", "991"))

    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await until(lambda: "sleep 991" in processes_of(agent, task))
            await killed(agent, task)
    assert codes == [137]


async def test_what_is_not_running_cannot_be_entered(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny), container(tiny, "side", "true", essential=False))
    await reached(agent, task, lambda view: of(view, "side").last_status == "STOPPED")
    with pytest.raises(InvalidParameterException, match="container side is not running"):
        await execute_alone(agent, task, "true", container="side")
    await killed(agent, task)
    with pytest.raises(InvalidParameterException, match="is not running"):
        await execute_alone(agent, task, "true")


async def test_descriptors_of_a_refused_call_are_closed(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    await killed(agent, task)
    reader, writer = os.pipe()
    with pytest.raises(InvalidParameterException):
        await agent.tasks.exec(task, ExecRequest(command=("true",)), streams=Streams(stdout=writer))
    assert os.read(reader, 1) == b""
    os.close(reader)


async def test_a_terminal_has_the_size_it_is_given_and_hears_of_a_new_one(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, app(tiny))
    script = "trap 'stty size' WINCH; tty; stty size; echo up; while :; do sleep 0.05; done"
    request = ExecRequest(command=("sh", "-c", script), terminal=True)
    ids: list[str] = []
    with trio.fail_after(15):
        async with trio.open_nursery() as nursery:
            out = Collected(nursery)
            streams = Streams(stdout=out.give(), terminal_rows=31, terminal_cols=99)
            scope = trio.CancelScope()

            async def run() -> None:
                with scope:
                    await agent.tasks.exec(task, request, streams=streams, started=ids.append)

            nursery.start_soon(run)
            await until(lambda: "up\r\n" in out.text)
            await agent.tasks.resize(task, 44, 111, exec_id=ids[0])
            await until(lambda: "44 111\r\n" in out.text)
            scope.cancel()
    assert out.text.startswith("/dev/pts/0\r\n31 99\r\n")
    with pytest.raises(InvalidParameterException, match="no exec"):
        await agent.tasks.resize(task, 44, 111, exec_id=ids[0])
    with pytest.raises(InvalidParameterException, match="no terminal"):
        await agent.tasks.resize(task, 44, 111)
    await killed(agent, task)


async def test_a_terminal_that_closes_hangs_up_its_program(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    async with trio.open_nursery() as nursery:
        cancel, _ = await started_exec(nursery, agent, task, "sleep", "991", terminal=True)
        await until(lambda: "sleep 991" in processes_of(agent, task))
        cancel()
    assert "sleep 991" not in processes_of(agent, task)
    await killed(agent, task)


async def test_many_at_once_do_not_mix(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny))
    answers: dict[int, tuple[int, str, str]] = {}

    async def run(number: int) -> None:
        script = f"echo {number}; exit {number}"
        answers[number] = await execute(agent, task, "sh", "-c", script)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(run, number)
    assert answers == {number: (number, f"{number}\n", "") for number in range(20)}
    assert execs_left(agent, task) == []
    await killed(agent, task)


async def test_after_a_restart_in_place_it_enters_the_new_start(
    agent: Agent, tiny: str, any_period: None
) -> None:
    policy = RestartPolicy(enabled=True, restart_attempt_period=0)
    task = await begin(agent, app(tiny, "echo up; exec sleep 1000", restart_policy=policy))
    await heard(agent, task, "up")
    await agent.tasks.kill(task, signal.SIGKILL)
    await heard(agent, task, "up\nup\n")
    assert (await execute(agent, task, "true"))[0] == 0
    await killed(agent, task)


@pytest.mark.parametrize("attempt", [0, 1])
async def test_what_was_heard_can_be_entered_and_signalled(
    agent: Agent, tiny: str, any_period: None, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    """A program may write before its agent has read that it runs; here it always does."""
    may_know, launched = trio.Event(), launch.start

    async def launch_and_wait(
        scene: Scene, wanted: ContainerDefinition, number: int, streams: Streams | None
    ) -> Keeper:
        keeper = await launched(scene, wanted, number, streams)
        if number == attempt:
            await may_know.wait()
        return keeper

    monkeypatch.setattr(launch, "start", launch_and_wait)
    policy = RestartPolicy(enabled=True, restart_attempt_period=0)
    script = "trap 'echo told' USR1; echo up; while :; do sleep 0.05; done"
    task = await begin(agent, app(tiny, script, restart_policy=policy))
    try:
        await heard(agent, task, "up\n")
        if attempt == 1:
            await agent.tasks.kill(task, signal.SIGKILL)
            await heard(agent, task, "up\nup\n")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(enter, agent, task)
            nursery.start_soon(agent.tasks.kill, task, signal.SIGUSR1)
            await trio.testing.wait_all_tasks_blocked()
            may_know.set()
    finally:
        may_know.set()
    await heard(agent, task, "told\n")
    await killed(agent, task)


async def enter(agent: Agent, task: str) -> None:
    assert await execute(agent, task, "echo", "entered") == (0, "entered\n", "")


async def test_the_next_agent_enters_what_it_has_not_found_yet(
    state_dir: Path, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have execs of the agent before to end first; here it looks late in any case."""
    may_look, look = trio.Event(), recovery.look

    async def look_late(
        container_dir: Path, cgroup: Cgroup | None, fences: list[int]
    ) -> Found | None:
        await may_look.wait()
        return await look(container_dir, cgroup, fences)

    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        task = await started(agent, app(tiny))
    monkeypatch.setattr(recovery, "look", look_late)
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, agent, task)
                await trio.testing.wait_all_tasks_blocked()
                may_look.set()
        finally:
            may_look.set()
        await killed(agent, task)
