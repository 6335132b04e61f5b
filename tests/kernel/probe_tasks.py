"""Runs the probe by every way into a task, and prints what it said and what the host saw.

    python -m tests.kernel.probe_tasks DIRECTORY

A program of its own, so that a test can start the agent as an odd parent would: with signals
ignored, at another priority, with descriptors and variables that are nobody's business. The ways
are those of `sandbox doctor --deep`; two tasks that live at once come on top. One JSON object
comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import trio

from sandbox.agent import Agent, open_agent
from sandbox.cli.deep import Prober, this_host
from sandbox.client.api import Task


def uid_on_the_host(agent: Agent, task: Task) -> int:
    keeper = agent.tasks.describe(task.id).known.containers[0].keeper
    assert keeper is not None
    return os.stat(f"/proc/{keeper.init_pid}").st_uid


def seen_from_outside(agent: Agent, tasks: tuple[Task, ...]) -> dict[str, Any]:
    host = this_host()
    return {
        "mounts of the host": Path("/proc/self/mountinfo").read_text(),
        "host": {"namespaces": host.namespaces, "may_raise_limits": host.may_raise_limits},
        "tasks": [task.id for task in tasks],
        "bases": [agent.tasks.describe(task.id).desired.id_base for task in tasks],
        "uids on the host": [uid_on_the_host(agent, task) for task in tasks],
    }


async def collect(directory: Path) -> dict[str, Any]:
    settings = {"warm_slots": 2}
    async with (
        open_agent(directory / "state", directory / "run", settings) as agent,
        Prober.on(agent, directory) as prober,
    ):
        reports = await prober.collect(lambda way: None)
        async with prober.staying() as one, prober.staying() as other:
            both = [await prober.first_report(task) for task in (one, other)]
            facts = seen_from_outside(agent, (one, other))
    return {"reports": reports, "both": both, "facts": facts}


def main(directory: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # where the agent logs
        collected = trio.run(collect, Path(directory))
    json.dump(collected, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
