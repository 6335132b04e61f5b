"""Memory that Sandbox needs beside the programs it runs, as the kernel divides it (PSS).

A page that n processes share counts a n-th for each, so the figures of several processes add up.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import trio

import sandbox
from sandbox.model.task import KeeperIdentity
from scripts.benchmarks.agents import running_agent
from scripts.benchmarks.figures import Figure, Section

TASKS = 100
IDLE = ["sleep", "100000"]
SETTLES_S = 2.0


async def memory(directory: Path, image: str) -> Section:
    with running_agent(directory) as agent:
        async with sandbox.connect(agent.socket) as sb:
            await sb.pull(image)
            fresh = pss([agent.pid])
            first = await idle_task(sb, image)
            await trio.sleep(SETTLES_S)
            alone = helpers(first)
            helpers_pss = pss(alone)
            tasks = [first]
            for _ in range(TASKS - 1):
                tasks.append(await idle_task(sb, image))
            await trio.sleep(SETTLES_S)
            agent_pss = pss([agent.pid])
            all_helpers = pss([pid for task in tasks for pid in helpers(task)])
            for task in tasks:
                await task.kill(signal.SIGKILL)
            for task in tasks:
                await task.wait()
    return Section(
        "Memory",
        "`smaps_rollup` of idle processes. The agent is a `sandbox agent` process, and it has "
        f"pulled the image itself. Each task is one container of `{' '.join(IDLE)}` with "
        "`initProcessEnabled`; the keeper and the init are static programs linked with musl, and "
        "the container's own program is not counted.",
        ("", "PSS kB"),
        [
            ("keeper and init of the only container", f"{helpers_pss:.0f}"),
            (f"keeper and init of one of {TASKS} containers", f"{all_helpers / TASKS:.0f}"),
            ("agent that has pulled an image", f"{fresh:.0f}"),
            (f"agent with {TASKS} idle tasks", f"{agent_pss:.0f}"),
        ],
        [
            Figure("keeper and init of an idle container, PSS", helpers_pss, "kB", "at most", 100),
            Figure(f"agent with {TASKS} tasks, PSS", agent_pss / 1024, "MB", "at most", 80),
        ],
    )


async def idle_task(sb: sandbox.Sandbox, image: str) -> sandbox.Task:
    task = await sb.run_task(image=image, command=IDLE, init=True)
    await task.wait_running()
    return task


def helpers(task: sandbox.Task) -> list[int]:
    """The keeper and its init. An init's only child is the image's program."""
    identity = task.view.known.containers[0].keeper
    assert isinstance(identity, KeeperIdentity)
    return [identity.pid, identity.init_pid]


def pss(pids: Sequence[int]) -> float:
    """In kB."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return float(total)
