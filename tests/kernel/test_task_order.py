"""dependsOn and essential: who starts when, who stops first, and what ends the task."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from sandbox.agent import Agent
from sandbox.model.task import (
    ContainerDependency,
    HealthCheck,
    MountPoint,
    Status,
    StopCode,
    Volume,
    VolumeFrom,
)
from tests.kernel.conftest import Outcome
from tests.kernel.tasks import (
    STAYS,
    container,
    heard,
    killed,
    of,
    reached,
    started,
    stopped,
    to_the_end,
)

ENDS_AT_SIGTERM = "trap 'echo told; sleep 0.3; exit 0' TERM; echo up; while :; do sleep 0.05; done"
ESSENTIAL_ENDED = "Essential container in task exited"

Condition = Literal["START", "COMPLETE", "SUCCESS", "HEALTHY"]


def after(name: str, condition: Condition) -> dict[str, Any]:
    return {"depends_on": (ContainerDependency(container_name=name, condition=condition),)}


def failed_to_start(outcome: Outcome, reason: str) -> None:
    """The task says why, and `app` never started."""
    known = outcome.view.known
    assert (known.stop_code, known.stopped_reason) == (StopCode.TASK_FAILED_TO_START, reason)
    assert known.started_at is None
    app = of(outcome.view, "app")
    assert (app.started_at, app.exit_code) == (None, None)


# Starting ------------------------------------------------------------------------------------


async def test_start_waits_for_the_start_whatever_the_order_of_the_definition(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "true", **after("db", "START")),
        container(tiny, "db", STAYS, essential=False),
    )
    app, db = of(outcome.view, "app"), of(outcome.view, "db")
    assert app.started_at is not None
    assert db.started_at is not None
    assert db.started_at < app.started_at
    assert (app.exit_code, db.exit_code) == (0, 0)


@pytest.mark.parametrize(("condition", "code"), [("COMPLETE", 3), ("SUCCESS", 0)])
async def test_complete_and_success_wait_for_the_end(
    agent: Agent, tiny: str, condition: Condition, code: int
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "echo app", **after("init", condition)),
        container(tiny, "init", f"sleep 0.2; echo init; exit {code}", essential=False),
    )
    app, init = of(outcome.view, "app"), of(outcome.view, "init")
    assert outcome.stdout == "init\napp\n"
    assert app.started_at is not None
    assert init.finished_at is not None
    assert init.finished_at <= app.started_at
    assert (app.exit_code, init.exit_code) == (0, code)
    assert outcome.view.known.stopped_reason == ESSENTIAL_ENDED


async def test_healthy_waits_for_the_health_check(
    agent: Agent, tiny: str, any_period: None
) -> None:
    check = HealthCheck(command=("CMD", "test", "-e", "/ready"), interval=1)
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "echo app", **after("db", "HEALTHY")),
        container(
            tiny,
            "db",
            f"sleep 0.5; echo db; touch /ready; {STAYS}",
            essential=False,
            health_check=check,
        ),
    )
    assert outcome.stdout == "db\napp\n"
    assert outcome.container.exit_code == 0


async def test_a_task_runs_when_all_of_a_chain_have_started(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "c", STAYS, **after("b", "START")),
        container(tiny, "b", STAYS, **after("a", "SUCCESS")),
        container(tiny, "a", "sleep 0.2", essential=False),
        container(tiny, "v", STAYS, volumes_from=(VolumeFrom(source_container="c"),)),
    )
    view = agent.tasks.describe(task)
    stamps = [of(view, name).started_at for name in "abcv"]
    assert None not in stamps
    assert stamps == sorted(stamps)  # type: ignore[type-var]
    assert view.known.started_at is not None
    assert view.known.started_at >= (stamps[-1] or 0)
    await killed(agent, task)


# Dependencies that fail ----------------------------------------------------------------------


async def test_success_that_fails_ends_the_task_with_both_names(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "true", **after("init", "SUCCESS")),
        container(tiny, "init", "exit 3", essential=False),
    )
    failed_to_start(
        outcome,
        "Task failed to start: container 'app' needs 'init' to end with 0, but it ended with 3",
    )
    assert of(outcome.view, "init").exit_code == 3


@pytest.mark.parametrize("condition", ["START", "COMPLETE", "SUCCESS"])
async def test_a_dependency_that_cannot_start_ends_the_task(
    agent: Agent, tiny: str, condition: Condition
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "true", **after("init", condition)),
        container(tiny, "init", "", command=("no-such-program",), essential=False),
    )
    failed_to_start(
        outcome,
        f"Task failed to start: container 'app' needs 'init' to {condition}, but it did not start",
    )
    assert of(outcome.view, "init").exit_code == 127


async def test_what_becomes_healthy_too_late_ends_the_task(
    agent: Agent, tiny: str, any_period: None
) -> None:
    check = HealthCheck(command=("CMD", "false"), interval=1)
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "true", **after("db", "HEALTHY")),
        container(tiny, "db", ENDS_AT_SIGTERM, start_timeout=2, health_check=check),
    )
    failed_to_start(
        outcome,
        "Task failed to start: container 'app' needs 'db' to be HEALTHY, but its startTimeout of "
        "2 s is over",
    )
    stopping_at, started_at = outcome.view.known.stopping_at, of(outcome.view, "db").started_at
    assert stopping_at is not None and started_at is not None
    assert stopping_at - started_at >= 2
    assert of(outcome.view, "db").exit_code == 0


async def test_the_start_timeout_of_what_completes_in_time_is_no_matter(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "sleep 2.5; exit 5", **after("init", "COMPLETE")),
        container(tiny, "init", "true", essential=False, start_timeout=2),
    )
    assert outcome.container.exit_code == 5


# Ends ----------------------------------------------------------------------------------------


async def test_an_essential_end_stops_the_others_and_what_waits_never_starts(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "web", ENDS_AT_SIGTERM),
        container(tiny, "late", "true", essential=False, **after("long", "COMPLETE")),
        container(tiny, "long", ENDS_AT_SIGTERM, essential=False),
        container(tiny, "app", "sleep 0.5"),
    )
    known = outcome.view.known
    assert known.stop_code is StopCode.ESSENTIAL_CONTAINER_EXITED
    assert known.stopped_reason == ESSENTIAL_ENDED
    assert [of(outcome.view, n).exit_code for n in ("web", "long", "app")] == [0, 0, 0]
    assert outcome.stdout.count("told") == 2
    late = of(outcome.view, "late")
    assert (late.last_status, late.started_at, late.exit_code) == ("STOPPED", None, None)
    assert known.execution_stopped_at == of(outcome.view, "app").finished_at


async def test_the_end_of_one_that_is_not_essential_is_told_and_the_task_runs_on(
    agent: Agent, tiny: str
) -> None:
    task = await started(
        agent,
        container(tiny, "app", STAYS),
        container(tiny, "side", "exit 4", essential=False),
    )
    view = await reached(agent, task, lambda view: of(view, "side").last_status == "STOPPED")
    assert of(view, "side").exit_code == 4
    assert view.known.last_status is Status.RUNNING
    assert view.known.execution_stopped_at is None
    assert of(view, "app").last_status == "RUNNING"
    await stopped(agent, task)


async def test_containers_stop_in_the_reverse_of_their_order(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "db", ENDS_AT_SIGTERM),
        container(tiny, "api", ENDS_AT_SIGTERM, **after("db", "START")),
        container(tiny, "web", ENDS_AT_SIGTERM, **after("api", "START")),
    )
    for name in ("db", "api", "web"):
        await heard(agent, task, "up", name)
    outcome = await stopped(agent, task)
    told = {}
    async for record in agent.tasks.logs(task):
        if record.data == b"told\n":
            told[record.container] = record.at_ns / 1e9
    ends = {c.name: c.finished_at or 0 for c in outcome.view.known.containers}
    assert told["web"] < ends["web"] <= told["api"] < ends["api"] <= told["db"] < ends["db"]


async def test_containers_without_an_order_stop_at_once_together(agent: Agent, tiny: str) -> None:
    # Each ends only when all have been told.
    script = (
        "trap 'touch /told/{name}' TERM; echo up;"
        " until [ -e /told/a -a -e /told/b -a -e /told/c ]; do sleep 0.05; done"
    )
    told = (MountPoint(source_volume="told", container_path="/told"),)
    task = await started(
        agent,
        *(
            container(tiny, n, script.format(name=n), stop_timeout=120, mount_points=told)
            for n in ("a", "b", "c")
        ),
        volumes=(Volume(name="told"),),
    )
    for name in ("a", "b", "c"):
        await heard(agent, task, "up", name)
    outcome = await stopped(agent, task)
    assert {c.exit_code for c in outcome.view.known.containers} == {0}
