"""kill -9 of the agent at every step of every path: nothing leaks, and every task ends rightly.

The driver says which failpoints a path passes, so a new one is in the matrix as soon as it exists.
What is right follows from the store as the killed agent left it: a cause to stop stays the cause;
before RUNNING the task is undone; from RUNNING it goes on as if nothing had happened.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.request import RunRequest
from sandbox.model.task import Status, StopCode, TaskView
from tests.crash.conftest import Driver, Rows, Site
from tests.crash.paths import PATHS, Path, app, log_of, task, view_of, wait

RESTARTED = "ResourceInitializationError: the agent was restarted"
PATIENCE_S = 20


@pytest.mark.parametrize("name", PATHS)
async def test_an_agent_killed_anywhere_on_the_way_leaves_nothing_wrong(
    name: str, driver: Driver, site: Site, image: str
) -> None:
    wrong = []
    for point in await failpoints(driver, site, name, image):
        said = driver.ask(verb="run", path=name, image=image, failpoint=point, **site.place)
        if said["ended"] != -9:
            wrong.append(f"{point}: the driver ended with {said['ended']}")
        wrong += [f"{point}: {what}" for what in await recovered(site, PATHS[name], image)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("run to its exit", "roots.done"),
        ("run and stop", "known.running"),
        ("several containers", "keeper.done#2"),
        ("no such command", "known.deprovisioning"),
        ("restart", "restart.do"),
        ("run --rm", "known.deprovisioning"),
    ],
)
async def test_an_agent_killed_again_anywhere_in_its_recovery_leaves_nothing_wrong(
    name: str, first: str, driver: Driver, site: Site, image: str
) -> None:
    def kill_and_recover(**second: str) -> dict[str, Any]:
        killed = driver.ask(verb="run", path=name, image=image, failpoint=first, **site.place)
        assert killed["ended"] == -9
        return driver.ask(verb="recover", path=name, **site.place, **second)

    points = kill_and_recover()["passed"]
    assert not await recovered(site, PATHS[name], image)
    wrong = []
    for point in points:
        said = kill_and_recover(failpoint=point)
        if said["ended"] != -9:
            wrong.append(f"{point}: while recovering the driver ended with {said['ended']}")
        wrong += [f"{point}: {what}" for what in await recovered(site, PATHS[name], image)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["run and stop", "several containers", "no such command"])
async def test_an_agent_killed_while_it_undoes_and_again_at_the_same_point_leaves_nothing_wrong(
    name: str, driver: Driver, site: Site, image: str
) -> None:
    wrong = []
    points = await failpoints(driver, site, name, image)
    for point in (p for p in points if ".undo" in p):
        driver.ask(verb="run", path=name, image=image, failpoint=point, **site.place)
        said = driver.ask(verb="recover", path=name, failpoint=point, **site.place)
        if said["ended"] != -9:
            wrong.append(f"{point}: while recovering the driver ended with {said['ended']}")
        wrong += [f"{point}: {what}" for what in await recovered(site, PATHS[name], image)]
    assert not wrong, "\n".join(wrong)


async def failpoints(driver: Driver, site: Site, name: str, image: str) -> list[str]:
    """Those that the path passes when nothing goes wrong; what it leaves is removed again."""
    said = driver.ask(verb="run", path=name, image=image, **site.place)
    assert said["ended"] == 0
    points: list[str] = said["passed"]
    assert len(points) == len(set(points)) and len(points) > 10
    assert not await recovered(site, PATHS[name], image)
    return points


async def recovered(site: Site, path: Path, image: str) -> list[str]:
    """What is wrong after the next agent has had its turn."""
    left = await site.rows()
    wrong: list[str] = []
    try:
        with trio.fail_after(PATIENCE_S):
            async with site.agent() as agent:
                for id, row in left.items():
                    await path.act(agent, id)
                    wrong += await judged(agent, path, id, row)
                    if view_of(agent, id) is not None and not path.remove:
                        await agent.tasks.remove(id)
                wrong += await second_task(agent, image)
    except* trio.TooSlowError:
        wrong.append("no end in sight")
    return wrong + [f"left behind: {what}" for what in await site.remains()]


async def judged(agent: Agent, path: Path, id: str, row: Rows) -> list[str]:
    view = view_of(agent, id)
    if view is None:
        return []
    known, before, wrong = view.known, row.known, []
    if known.last_status is not Status.STOPPED:
        return [f"the task is {known.last_status.name}"]
    if before is not None and before.stop_code is not None:
        cause = (before.stop_code, before.stopped_reason)
    elif before is None or before.last_status < Status.RUNNING:
        cause = (StopCode.TASK_FAILED_TO_START, RESTARTED)
    else:
        cause = (path.stop_code, known.stopped_reason)
    if (known.stop_code, known.stopped_reason) != cause:
        wrong.append(f"stopped by {known.stop_code} ({known.stopped_reason}), not {cause}")
    if known.stop_code is path.stop_code and path.starts:
        wrong += await judged_containers(agent, path, view)
    wrong += [
        f"{c.name} is {c.last_status}" for c in known.containers if c.last_status == "RUNNING"
    ]
    return wrong


async def judged_containers(agent: Agent, path: Path, view: TaskView) -> list[str]:
    codes = {c.name: c.exit_code for c in view.known.containers}
    logs = {name: await log_of(agent, view.id, name) for name in path.stdout}
    wrong = [
        f"{name} ended with {codes[name]}, not {code}"
        for name, code in path.exit_codes.items()
        if codes[name] != code
    ]
    return wrong + [
        f"{name} wrote {logs[name]!r}, not {text!r}"
        for name, text in path.stdout.items()
        if logs[name] != text
    ]


async def second_task(agent: Agent, image: str) -> list[str]:
    """The agent works: one more task, to its end."""
    view = await agent.tasks.run(RunRequest(definition=task(app(image, "exit 42"))))
    await wait(agent, view.id)
    code = agent.tasks.describe(view.id).known.containers[0].exit_code
    await agent.tasks.remove(view.id)
    return [] if code == 42 else [f"a second task ended with {code}"]
