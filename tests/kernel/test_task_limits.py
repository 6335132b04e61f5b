"""What a task may use: cpu, memory and processes, and that a sibling is not harmed."""

from __future__ import annotations

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.observed import TaskStats
from sandbox.model.task import LinuxParameters, StopCode
from tests.kernel.conftest import finish, until
from tests.kernel.tasks import (
    begin,
    container,
    execute,
    heard,
    killed,
    of,
    reached,
    started,
    to_the_end,
)

pytestmark = pytest.mark.guest

OUT_OF_MEMORY = "OutOfMemoryError: Container killed due to memory usage"
SPIN = "while :; do :; done"
EAT = "exec dd if=/dev/zero of=/dev/null bs=700M"
"""More than any limit here, in one piece: quick even with a quarter of a processor."""
MIB = 1 << 20


async def stats_over(agent: Agent, task: str, seconds: float) -> tuple[TaskStats, TaskStats]:
    before = await agent.tasks.stats(task)
    await trio.sleep(seconds)
    return before, await agent.tasks.stats(task)


async def test_the_cpu_of_a_task_is_a_hard_quota_for_all_its_containers(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, *(container(tiny, name, SPIN) for name in ("a", "b", "c")))
    before, after = await stats_over(agent, task, 2)
    used = (after.total.cpu_usage_ns - before.total.cpu_usage_ns) / 1e9 / (after.at - before.at)
    assert 0.15 < used < 0.30  # a quarter of a processor was asked for
    assert after.total.cpu_throttled_periods > before.total.cpu_throttled_periods + 5
    assert after.total.cpu_periods >= after.total.cpu_throttled_periods
    each = [c.cpu_usage_ns for c in after.containers]
    assert min(each) > max(each) / 4
    await killed(agent, task)


async def test_the_cpu_of_a_container_is_its_weight_among_its_siblings(
    agent: Agent, tiny: str
) -> None:
    # One for each processor, so that they meet on every one.
    everywhere = f"for n in $(seq $(nproc)); do ({SPIN}) & done; wait"
    task = await started(
        agent,
        container(tiny, "much", everywhere, cpu=800),
        container(tiny, "little", everywhere, cpu=100),
        cpu="1024",
        memory="2048",
    )
    before, after = await stats_over(agent, task, 2)
    much, little = (
        b.cpu_usage_ns - a.cpu_usage_ns
        for a, b in zip(before.containers, after.containers, strict=True)
    )
    assert much > 3 * little > 0
    await killed(agent, task)


async def test_an_idle_task_is_not_throttled(agent: Agent, tiny: str) -> None:
    task = await started(agent, container(tiny, "app", "echo up; exec sleep 1000"))
    await heard(agent, task, "up")
    await trio.sleep(0.5)
    before, after = await stats_over(agent, task, 0.5)
    assert after.total.cpu_throttled_periods == before.total.cpu_throttled_periods
    assert after.total.cpu_usage_ns - before.total.cpu_usage_ns < 50_000_000
    await killed(agent, task)


async def test_the_memory_of_a_container_kills_in_it_alone(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(tiny, "web", "exec sleep 1000"),
        container(tiny, "hungry", EAT, memory=32, essential=False),
        cpu="1024",
        memory="2048",
    )
    view = await reached(agent, task, lambda view: of(view, "hungry").last_status == "STOPPED")
    hungry = of(view, "hungry")
    assert (hungry.exit_code, hungry.reason) == (137, OUT_OF_MEMORY)
    assert of(view, "web").last_status == "RUNNING"
    assert (await execute(agent, task, "echo", "well", container="web"))[1] == "well\n"
    stats = {c.name: c for c in (await agent.tasks.stats(task)).containers}
    assert stats["hungry"].oom_kills == 1
    assert stats["hungry"].memory_max_bytes == 32 * MIB
    assert stats["hungry"].memory_peak_bytes <= 32 * MIB
    assert stats["web"].oom_kills == 0
    await killed(agent, task)


async def test_the_memory_of_a_task_is_the_sum_and_the_biggest_dies(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "small", "exec sleep 1000"),
        container(tiny, "hungry", EAT),
    )
    small, hungry = outcome.view.known.containers
    assert (hungry.exit_code, hungry.reason) == (137, OUT_OF_MEMORY)
    assert small.reason is None
    assert outcome.view.known.stop_code is StopCode.ESSENTIAL_CONTAINER_EXITED


async def test_the_kernels_victim_dies_and_not_the_container(agent: Agent, tiny: str) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=700M; echo the child ended with $?; exit 5"
    outcome = await to_the_end(agent, container(tiny, "app", script, memory=32))
    assert outcome.stdout == "the child ended with 137\n"
    assert (outcome.container.exit_code, outcome.container.reason) == (5, OUT_OF_MEMORY)


async def test_under_our_init_the_reason_is_told_as_well(agent: Agent, tiny: str) -> None:
    with_init = LinuxParameters(init_process_enabled=True)
    outcome = await to_the_end(
        agent, container(tiny, "app", EAT, memory=32, linux_parameters=with_init)
    )
    assert (outcome.container.exit_code, outcome.container.reason) == (137, OUT_OF_MEMORY)


async def test_shared_memory_and_temporary_files_count(agent: Agent, tiny: str) -> None:
    fill = "dd if=/dev/zero of=/dev/shm/big bs=1M count=60; echo no"
    outcome = await to_the_end(agent, container(tiny, "app", fill, memory=32))
    assert outcome.container.reason == OUT_OF_MEMORY


async def test_a_fork_bomb_meets_a_limit_and_its_task_is_ended_whole(
    agent: Agent, tiny: str
) -> None:
    other = await started(agent, container(tiny, "app", "exec sleep 1000"))
    bomb = "echo up; f() { f | f & }; f; exec sleep 1000"
    task = await begin(agent, container(tiny, "app", bomb), cpu="1024", memory="8192")
    await heard(agent, task, "up")
    pids = 0

    async def count() -> None:
        nonlocal pids
        while True:
            pids = max(pids, (await agent.tasks.stats(task)).total.pids)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with trio.move_on_after(5):
            await until(lambda: pids >= 4096)
        nursery.cancel_scope.cancel()
    assert 100 < pids <= 4096
    await agent.tasks.kill(task, 9)
    with trio.fail_after(20):
        await finish(agent, task)
    assert (await execute(agent, other, "echo", "well"))[1] == "well\n"
    await killed(agent, other)


async def test_the_limit_of_processes_is_the_tasks(agent: Agent, tiny: str) -> None:
    task = await started(
        agent, container(tiny, "a", "exec sleep 1000"), container(tiny, "b", "exec sleep 1000")
    )
    total = (await agent.tasks.stats(task)).total
    assert total.pids == 2
    assert total.memory_max_bytes == 512 * MIB
    await killed(agent, task)
