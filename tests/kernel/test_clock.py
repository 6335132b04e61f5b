"""The host's clock is set, a day forward or back, while tasks run.

CLOCK_REALTIME belongs to no namespace (time_namespaces(7)), so this runs where the clock is ours
alone: in the guest.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.request import RunRequest
from sandbox.model.task import (
    ContainerDependency,
    HealthCheck,
    RestartPolicy,
    Status,
    StopCode,
)
from tests.conftest import IN_GUEST
from tests.kernel.conftest import definition, finish
from tests.kernel.tasks import STAYS, begin, container, heard, killed, of, reached, started

DAY_S = 86400
pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not IN_GUEST, reason="sets the clock of the machine"),
]

Jump = Callable[[], None]


@pytest.fixture(params=[DAY_S, -DAY_S], ids=["forward", "back"])
def jump(request: pytest.FixtureRequest) -> Iterator[Jump]:
    offset_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def set_clock(by_s: float) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME) + offset_s
        time.clock_settime(time.CLOCK_REALTIME, now + by_s)

    yield lambda: set_clock(request.param)
    set_clock(0)


async def test_a_stop_timeout_lasts_as_long_as_it_says(
    jump: Jump, agent: Agent, probe_image: str
) -> None:
    deaf = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    task = await started(agent, container(probe_image, "app", deaf, stop_timeout=3))
    await heard(agent, task, "ready")
    began = time.monotonic()
    await agent.tasks.stop(task)
    await trio.sleep(0.5)
    jump()
    known = (await finish(agent, task)).view.known
    assert 3 <= time.monotonic() - began < 15
    assert (known.stop_code, known.containers[0].exit_code) == (StopCode.USER_INITIATED, 137)


async def test_a_start_timeout_is_not_over_because_the_clock_was_set(
    jump: Jump, agent: Agent, probe_image: str
) -> None:
    check = HealthCheck(command=("CMD-SHELL", "test -e /ok"), interval=5, timeout=5, retries=10)
    script = f"sleep 3; touch /ok; {STAYS}"
    awaited = container(probe_image, "awaited", script, health_check=check, start_timeout=110)
    after = (ContainerDependency(container_name="awaited", condition="HEALTHY"),)
    task = await begin(agent, awaited, container(probe_image, "app", STAYS, depends_on=after))
    await reached(agent, task, lambda view: of(view, "awaited").started_at is not None)
    jump()
    with trio.fail_after(100):
        await reached(agent, task, lambda view: view.known.last_status is Status.RUNNING)
    await killed(agent, task)


@pytest.mark.parametrize(("period_s", "again"), [(1, True), (100, False)])
async def test_a_container_is_started_again_for_how_long_it_ran_and_not_for_the_clock(
    period_s: int, again: bool, jump: Jump, agent: Agent, probe_image: str, any_period: None
) -> None:
    policy = RestartPolicy(enabled=True, restart_attempt_period=period_s)
    task = await started(agent, container(probe_image, "app", STAYS, restart_policy=policy))
    await trio.sleep(1.5)
    jump()
    await agent.tasks.kill(task, signal.SIGKILL)
    view = await reached(
        agent, task, lambda view: of(view, "app").attempt == 1 or view.known.stop_code is not None
    )
    assert (of(view, "app").attempt == 1) is again
    await killed(agent, task)


async def test_stopped_tasks_are_kept_for_as_long_as_they_are_meant_to_be(
    jump: Jump, agent: Agent, probe_image: str
) -> None:
    first = await begin(agent, container(probe_image, "app", "echo kept"))
    assert (await finish(agent, first)).stdout == "kept\n"
    await trio.sleep(0.5)  # who looks after them hears of it a moment later
    jump()
    wanted = RunRequest(definition=definition(container(probe_image, "app", "true")), remove=True)
    gone = (await agent.tasks.run(wanted)).id
    with trio.fail_after(60):
        while gone in {view.id for view in agent.tasks.list()}:  # retention looks at all of them
            await trio.sleep(0.05)
    assert agent.tasks.describe(first).known.containers[0].exit_code == 0
    await agent.tasks.remove(first)


async def test_what_was_written_and_what_happened_stays_in_its_order(
    jump: Jump, agent: Agent, probe_image: str
) -> None:
    script = "trap 'echo after; exit 0' TERM; echo before; while :; do sleep 0.05; done"
    before_s = time.time()
    task = await started(agent, container(probe_image, "app", script))
    await heard(agent, task, "before")
    jump()
    after_s = time.time()
    await agent.tasks.stop(task)
    assert (await finish(agent, task)).stdout == "before\nafter\n"
    records = [r async for r in agent.tasks.logs(task)]
    assert [r.data for r in records] == [b"before\n", b"after\n"]
    assert before_s <= records[0].at_ns / 1e9 < before_s + 60
    assert after_s <= records[1].at_ns / 1e9 < after_s + 60
    since = [r.data async for r in agent.tasks.logs(task, since=after_s)]
    assert since[-1] == b"after\n" and (b"before\n" in since) is (after_s < before_s)
    events = [e async for e in agent.tasks.events()]
    assert [e.rev for e in events] == sorted({e.rev for e in events})
    assert events[-1].last_status == "STOPPED"
