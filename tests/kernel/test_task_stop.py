"""StopTask, and what a task says of itself from PROVISIONING to STOPPED."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.observed import Event
from sandbox.model.task import ContainerDependency, LinuxParameters, Status, StopCode
from tests.kernel.conftest import Run, finish, until
from tests.kernel.probe_image import Images
from tests.kernel.tasks import (
    STAYS,
    begin,
    container,
    heard,
    of,
    processes_of,
    started,
    stopped,
    to_the_end,
)

WITH_INIT = LinuxParameters(init_process_enabled=True)


async def test_one_that_honours_sigterm_ends_with_143(agent: Agent, tiny: str) -> None:
    app = container(tiny, "app", "exec sleep 1000", stop_timeout=120, linux_parameters=WITH_INIT)
    outcome = await stopped(agent, await started(agent, app))
    assert outcome.container.exit_code == 143
    assert outcome.container.reason is None


async def test_one_that_ignores_it_is_killed_after_its_stop_timeout(
    agent: Agent, tiny: str
) -> None:
    script = "trap '' TERM; echo up; while :; do sleep 0.1; done"
    task = await started(agent, container(tiny, "app", script, stop_timeout=2))
    await heard(agent, task, "up")
    outcome = await stopped(agent, task)
    known = outcome.view.known
    assert outcome.container.exit_code == 137
    assert known.stopping_at is not None and known.execution_stopped_at is not None
    assert known.execution_stopped_at - known.stopping_at >= 2


async def test_the_stop_signal_is_the_images(agent: Agent, images: Images) -> None:
    image = images.make("quits", StopSignal="SIGQUIT")
    script = "trap 'exit 33' QUIT; trap 'exit 44' TERM; echo up; while :; do sleep 0.05; done"
    task = await started(agent, container(image, "app", script))
    await heard(agent, task, "up")
    assert (await stopped(agent, task)).container.exit_code == 33


async def test_what_it_started_itself_is_killed_with_it(agent: Agent, tiny: str) -> None:
    script = "(setsid sleep 999 &); sleep 998 & echo up; trap 'exit 0' TERM; while :; do wait; done"
    task = await started(agent, container(tiny, "app", script))
    await heard(agent, task, "up")
    await until(lambda: {"sleep 998", "sleep 999"} <= set(processes_of(agent, task)))
    assert (await stopped(agent, task)).container.exit_code == 0
    assert processes_of(agent, task) == []


async def test_the_reason_is_the_callers_or_ecss(agent: Agent, tiny: str) -> None:
    tasks = [await started(agent, container(tiny, "app", STAYS)) for _ in range(2)]
    await agent.tasks.stop(tasks[0], reason="because of me")
    given = (await stopped(agent, tasks[0])).view
    default = (await stopped(agent, tasks[1])).view
    for view, reason in ((given, "because of me"), (default, "Task stopped by user")):
        assert view.known.stop_code is StopCode.USER_INITIATED
        assert view.known.stopped_reason == reason
        assert view.desired.desired_status == "STOPPED"


async def test_stopping_twice_changes_nothing(agent: Agent, tiny: str) -> None:
    task = await started(agent, container(tiny, "app", STAYS))
    first = await agent.tasks.stop(task, reason="first")
    second = await agent.tasks.stop(task, reason="second")
    assert second.desired == first.desired
    ended = (await stopped(agent, task)).view
    assert ended.known.stopped_reason == "first"
    again = await agent.tasks.stop(task, reason="third")
    assert again == ended


async def test_stopping_a_task_that_ended_by_itself_changes_nothing_of_how_it_ended(
    run: Run, agent: Agent
) -> None:
    before = (await run("true")).view
    after = await agent.tasks.stop(before.id, reason="too late")
    assert after.known == before.known
    assert after.known.stopped_reason == "Essential container in task exited"


@contextlib.asynccontextmanager
async def silent_registry() -> AsyncIterator[tuple[str, trio.Event]]:
    """One that takes connections and never answers: an image's name, and when it was asked."""
    asked = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            asked.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
        (listener,) = await nursery.start(listen)
        yield f"127.0.0.1:{listener.socket.getsockname()[1]}/slow:latest", asked
        nursery.cancel_scope.cancel()


async def test_a_task_can_be_stopped_while_its_image_is_pulled(agent: Agent) -> None:
    async with silent_registry() as (image, asked):
        task = await begin(agent, container(image, "app", "true"))
        with trio.fail_after(10):
            await asked.wait()
        assert agent.tasks.describe(task).known.last_status is Status.PENDING
        known = (await stopped(agent, task)).view.known
    assert known.stop_code is StopCode.USER_INITIATED
    assert known.stopped_reason == "Task stopped by user"
    assert (known.started_at, known.pull_stopped_at) == (None, None)
    (app,) = known.containers
    assert (app.last_status, app.started_at, app.exit_code) == ("STOPPED", None, None)


async def test_a_task_can_be_stopped_before_anything_was_done_for_it(
    agent: Agent, tiny: str
) -> None:
    task = await begin(agent, container(tiny, "app", "echo ran"))
    outcome = await stopped(agent, task)
    assert outcome.view.known.stop_code is StopCode.USER_INITIATED
    assert outcome.stdout == ""
    assert outcome.container.started_at is None


async def test_a_container_that_still_waits_is_never_started(agent: Agent, tiny: str) -> None:
    waits = (ContainerDependency(container_name="init", condition="COMPLETE"),)
    task = await begin(
        agent,
        container(tiny, "app", "echo ran", depends_on=waits),
        container(tiny, "init", f"echo up; {STAYS}", essential=False),
    )
    await heard(agent, task, "up")
    assert agent.tasks.describe(task).known.last_status is Status.PENDING
    outcome = await stopped(agent, task)
    assert outcome.stdout == "up\n"
    app, init = of(outcome.view, "app"), of(outcome.view, "init")
    assert (app.last_status, app.started_at, app.exit_code) == ("STOPPED", None, None)
    assert init.exit_code == 0
    assert outcome.view.known.started_at is None


@pytest.mark.guest
async def test_statuses_only_move_right_and_stamps_never_move(agent: Agent, tiny: str) -> None:
    task = await begin(agent, container(tiny, "app", "exec sleep 1000", linux_parameters=WITH_INIT))
    seen = []

    async def watch() -> None:
        async for view in agent.tasks.watch(task):
            seen.append(view.known)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await until(lambda: agent.tasks.describe(task).known.last_status is Status.RUNNING)
        await stopped(agent, task)
    statuses = [known.last_status for known in seen]
    assert statuses == sorted(statuses)
    # All but ACTIVATING, in which nothing is to be done yet.
    assert set(statuses) == set(Status) - {Status.ACTIVATING}
    assert statuses[-1] is Status.STOPPED
    for stamp in ("connectivity_at", "pull_started_at", "started_at", "stopping_at", "stopped_at"):
        values = [value for known in seen if (value := getattr(known, stamp)) is not None]
        assert len(set(values)) == 1, stamp


async def test_each_task_raises_six_events_in_order(agent: Agent, tiny: str) -> None:
    task = await started(
        agent, container(tiny, "app", "exec sleep 1000", linux_parameters=WITH_INIT)
    )
    await stopped(agent, task)
    other = (await to_the_end(agent, container(tiny, "app", "true"))).view.id
    events = [event async for event in agent.tasks.events()]
    for one in (task, other):
        assert [
            (event.version, event.last_status, event.desired_status)
            for event in events
            if event.task == one
        ] == [
            (1, "PROVISIONING", "RUNNING"),
            (2, "PENDING", "RUNNING"),
            (3, "RUNNING", "RUNNING"),
            (4, "RUNNING", "STOPPED"),
            (5, "DEPROVISIONING", "STOPPED"),
            (6, "STOPPED", "STOPPED"),
        ]
    assert [event.rev for event in events] == sorted({event.rev for event in events})
    for place, event in enumerate(events):
        later = [later.rev async for later in agent.tasks.events(after=event.rev)]
        assert later == [event.rev for event in events[place + 1 :]]


async def test_events_can_be_read_after_the_log_was_cut(agent: Agent, tiny: str) -> None:
    await to_the_end(agent, container(tiny, "app", "true"))
    await agent.node.store.compact(keep=1)
    task = (await to_the_end(agent, container(tiny, "app", "true"))).view.id
    events = [event async for event in agent.tasks.events()]
    assert [event.version for event in events if event.task == task] == [1, 2, 3, 4, 5, 6]


async def test_followed_events_come_while_they_happen(agent: Agent, tiny: str) -> None:
    heard_of: list[int] = []

    async def follow() -> None:
        events: AsyncGenerator[Event, None] = agent.tasks.events(follow=True)  # type: ignore[assignment]
        async with contextlib.aclosing(events):
            async for event in events:
                heard_of.append(event.version)
                if event.version == 6:
                    return

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            task = await begin(agent, container(tiny, "app", "true"))
            await finish(agent, task)
    assert heard_of == [1, 2, 3, 4, 5, 6]
