"""A task from the call to its end, one at a time and eight at a time, against crun."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import trio

from sandbox import Sandbox, Task
from sandbox.model.task import TaskView
from scripts.benchmarks import leavings
from scripts.benchmarks.crun import COMMAND, Crun
from scripts.benchmarks.figures import Figure, Section

PAUSE_S = 0.05
"""Between two launches, so that neither pays for what the other leaves to the kernel."""
WIDTH = 8
COUNT = 200

STAGES = (
    "accepted, until prepared: cgroups, images, roots",
    "until the program has ended",
    "until STOPPED: all of it undone",
)


async def launch(sandbox: Sandbox, crun: Crun, image: str, pairs: int, warm: int) -> Section:
    ours: list[float] = []
    theirs: list[float] = []
    stages: list[tuple[float, ...]] = []
    for number in range(warm + pairs):
        took, task = await one_task(sandbox, image)
        await task.remove()
        await trio.sleep(PAUSE_S)
        other = await trio.to_thread.run_sync(crun.run, 1)
        await trio.sleep(PAUSE_S)
        if number >= warm:
            ours.append(took)
            theirs.append(other)
            stages.append(stages_of(task.view))
    ratio = statistics.median(ours) / statistics.median(theirs)
    by_stage = list(zip(*stages, strict=True))
    rows = [milliseconds("Sandbox, `run_task` to exit", ours)]
    rows += [
        milliseconds(f"&nbsp;&nbsp;{name}", list(values))
        for name, values in zip(STAGES, by_stage, strict=True)
    ]
    rows += [milliseconds("`crun run`", theirs)]
    return Section(
        "Launch",
        f"One task of `{' '.join(COMMAND)}` at a time, through the embedded Python API: from the "
        "call of `run_task` until `wait` returns, when the task is STOPPED and all that was made "
        "for it is undone. All protections are on, and the agent is warm. After each, one "
        "`crun run` of the same image: the default `crun spec`, read-only root, no rlimits, no "
        "seccomp, in a mount namespace that was made before and hides cgroup v2 from it. "
        f"{pairs} such pairs count, after {warm} that do not.",
        ("", "p50 ms", "min ms", "p90 ms"),
        rows,
        [Figure("launch to exit, p50, of `crun run`'s", ratio, "x", "at most", 0.5)],
    )


async def one_task(sandbox: Sandbox, image: str) -> tuple[float, Task]:
    began = time.perf_counter()
    task = await sandbox.run_task(image=image, command=COMMAND)
    code = await task.wait()
    took = time.perf_counter() - began
    if code != 0:
        raise SystemExit(f"bench: a task failed: {task.stopped_reason}")
    return took, task


def stages_of(view: TaskView) -> tuple[float, ...]:
    known, container = view.known, view.known.containers[0]
    moments = (
        view.desired.created_at,
        known.pull_stopped_at,
        container.finished_at,
        known.stopped_at,
    )
    assert None not in moments
    times = [moment or 0.0 for moment in moments]
    return tuple(after - before for before, after in pairwise(times))


def milliseconds(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    deciles = statistics.quantiles(seconds, n=10)
    values = (statistics.median(seconds), min(seconds), deciles[-1])
    return (name, *(f"{value * 1000:.2f}" for value in values))


# ---------------------------------------------------------------------- eight at a time


async def rate(sandbox: Sandbox, crun: Crun, image: str, rounds: int, state_dir: Path) -> Section:
    ours: list[float] = []
    theirs: list[float] = []
    await many_tasks(sandbox, image)  # whatever is made once is there from now on
    before = await usual(sandbox, image, state_dir)
    for _ in range(rounds):
        ours.append(COUNT / await many_tasks(sandbox, image))
        await trio.sleep(1)
        theirs.append(COUNT / await trio.to_thread.run_sync(crun.run, COUNT, WIDTH))
        await trio.sleep(1)
    left = await leavings.left_since(before, state_dir)
    ratio = statistics.median(ours) / statistics.median(theirs)
    return Section(
        "Rate",
        f"{COUNT} launches of `{' '.join(COMMAND)}`, {WIDTH} at a time, in turns, {rounds} times "
        "each; every one must exit with 0, or the run ends here. Records and logs, which crun does "
        "not keep, are removed after each round. What the tasks could leave behind is compared "
        "before and after: processes and descriptors of the agent, mounts, cgroups, task "
        "directories."
        + (f" Left behind: {', '.join(left)}." if left else " Nothing was left behind."),
        ("", "launches a second, median", "each time"),
        [per_second("Sandbox", ours), per_second("crun", theirs)],
        [
            Figure("launches a second, 8 at a time, of crun's", ratio, "x", "at least", 1.0),
            Figure(f"left behind by {COUNT * rounds} tasks", len(left), "objects", "at most", 0),
        ],
    )


async def usual(sandbox: Sandbox, image: str, state_dir: Path) -> Counter[str]:
    """What an idle agent has at most: its pool of namespaces is not always equally full."""
    found = leavings.seen(state_dir)
    for _ in range(8):
        _, task = await one_task(sandbox, image)
        await task.remove()
        await trio.sleep(0.5)
        found |= leavings.seen(state_dir)
    return found


async def many_tasks(sandbox: Sandbox, image: str) -> float:
    room = trio.CapacityLimiter(WIDTH)
    tasks: list[Task] = []

    async def one() -> None:
        async with room:
            tasks.append((await one_task(sandbox, image))[1])

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(COUNT):
            nursery.start_soon(one)
    took = time.perf_counter() - began
    for task in tasks:
        await task.remove()
    return took


def per_second(name: str, rates: Sequence[float]) -> tuple[str, ...]:
    return (name, f"{statistics.median(rates):.1f}", ", ".join(f"{r:.1f}" for r in rates))
