"""Tasks, from what is wanted to how they ended, as a user and the kernel see them."""

from __future__ import annotations

from sandbox.agent import Agent
from sandbox.model.task import Status, StopCode
from tests.kernel.conftest import Run


async def test_a_task_runs_to_its_exit_code(run: Run) -> None:
    outcome = await run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert outcome.container.exit_code == 7
    assert (outcome.stdout, outcome.stderr) == ("out\n", "err\n")
    assert outcome.view.known.last_status is Status.STOPPED
    assert outcome.view.known.stop_code is StopCode.ESSENTIAL_CONTAINER_EXITED
    assert outcome.view.known.stopped_reason == "Essential container in task exited"


async def test_time_stamps_come_in_fargates_order(run: Run) -> None:
    known = (view := (await run("true")).view).known
    stamps = [
        view.desired.created_at,
        known.connectivity_at,
        known.pull_started_at,
        known.pull_stopped_at,
        known.started_at,
        known.execution_stopped_at,
        known.stopping_at,
        known.stopped_at,
    ]
    assert None not in stamps
    assert stamps == sorted(stamps)  # type: ignore[type-var]


async def test_a_command_that_is_not_there_is_told_as_a_shell_tells_it(run: Run) -> None:
    outcome = await run("no-such-program")
    assert outcome.container.exit_code == 127
    assert outcome.container.reason == (
        'CannotStartContainerError: exec: "no-such-program": executable file not found in $PATH'
    )
    assert outcome.view.known.stop_code is StopCode.TASK_FAILED_TO_START
    assert outcome.view.known.started_at is None


async def test_memory_is_a_hard_limit_and_an_oom_kill_is_named(run: Run) -> None:
    outcome = await run("dd", "if=/dev/zero", "of=/dev/null", "bs=700M")
    assert outcome.container.exit_code == 137
    assert outcome.container.reason == "OutOfMemoryError: Container killed due to memory usage"


async def test_a_task_is_root_only_in_its_own_range_of_ids(run: Run, agent: Agent) -> None:
    outcome = await run("cat", "/proc/self/uid_map", "/proc/self/gid_map")
    base = outcome.view.desired.id_base
    assert [line.split() for line in outcome.stdout.splitlines()] == [["0", str(base), "65536"]] * 2
