"""Runs the probe in every way in which a program gets into a task, and prints what it said.

    python -m tests.kernel.probe_tasks IMAGE DIRECTORY [PATH...]

A program of its own, so that a test can start the agent as an odd parent would: with signals
ignored, at another priority, with descriptors and variables that are nobody's business. The ways
run side by side; one JSON object comes out.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from sandbox.agent import Agent, open_agent
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import (
    ContainerDefinition,
    HealthCheck,
    KernelCapabilities,
    KeyValuePair,
    LinuxParameters,
    TaskView,
)
from tests.kernel.conftest import definition, finish
from tests.kernel.probe_image import Report, report

WAYS: dict[str, dict[str, Any]] = {
    "root": {},
    "user": {"user": "app"},
    "init": {"linux_parameters": LinuxParameters(init_process_enabled=True)},
    "read-only": {"readonly_root_filesystem": True},
    "terminal": {"pseudo_terminal": True},
    "variables": {"environment": (KeyValuePair(name="ASKED_FOR", value="yes"),)},
    "with ptrace": {
        "linux_parameters": LinuxParameters(capabilities=KernelCapabilities(add=("SYS_PTRACE",)))
    },
    "without raw": {
        "linux_parameters": LinuxParameters(capabilities=KernelCapabilities(drop=("NET_RAW",)))
    },
    "set-uid": {"user": "app", "command": ("/probe-set-uid",)},
}
"""Name -> what its container's definition has besides an image."""


class Collector:
    def __init__(self, agent: Agent, image: str, paths: tuple[str, ...]) -> None:
        self._agent = agent
        self._image = image
        self._probe = ("/probe", *paths)
        self.reports: dict[str, Report] = {}
        self.facts: dict[str, Any] = {}

    async def _run(self, **members: Any) -> TaskView:
        given = {"name": "app", "image": self._image, "command": self._probe} | members
        wanted = definition(ContainerDefinition(**given))
        return await self._agent.tasks.run(RunRequest(definition=wanted))

    async def to_its_end(self, way: str) -> None:
        outcome = await finish(self._agent, (await self._run(**WAYS[way])).id)
        assert outcome.container.exit_code == 0, f"{way}: {outcome}"
        self.reports[way] = report(outcome.stdout)

    async def as_health_check(self) -> None:
        program, *paths = self._probe
        check = HealthCheck(command=("CMD", program, "-o", "/tmp/report", *paths), interval=5)
        wait = "until [ -e /tmp/report ]; do sleep 0.1; done; cat /tmp/report"
        view = await self._run(command=("sh", "-c", wait), health_check=check)
        self.reports["health check"] = report((await finish(self._agent, view.id)).stdout)

    async def side_by_side(self) -> None:
        """Two tasks that live at once, an exec into each, and what the host sees meanwhile."""
        stay = (self._probe[0], "-s", *self._probe[1:])
        views = [await self._run(command=stay) for _ in range(2)]
        for name, view in zip(("first", "second"), views, strict=True):
            self.reports[name] = await self._first_report(view.id)
        one, other = (view.id for view in views)
        self.reports["exec"] = await self._exec(one, ExecRequest(command=self._probe))
        as_user = ExecRequest(command=self._probe, user="app")
        self.reports["exec as user"] = await self._exec(one, as_user)
        in_terminal = ExecRequest(command=self._probe, terminal=True)
        self.reports["exec in terminal"] = await self._exec(other, in_terminal)
        self._look_from_outside(views)
        for view in views:
            await self._agent.tasks.kill(view.id, signal.SIGKILL)
            await finish(self._agent, view.id)

    async def _first_report(self, task: str) -> Report:
        written = b""
        async for record in self._agent.tasks.logs(task, follow=True):
            written += record.data
            if written.endswith(b"}\n"):
                break
        return report(written.decode())

    async def _exec(self, task: str, request: ExecRequest) -> Report:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        written = bytearray()

        async def read() -> None:
            async with trio.lowlevel.FdStream(ours) as stream:
                async for data in stream:
                    written.extend(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await self._agent.tasks.exec(task, request, streams=Streams(stdout=theirs))
        return report(written.decode())

    def _look_from_outside(self, views: list[TaskView]) -> None:
        self.facts["mounts of the host"] = Path("/proc/self/mountinfo").read_text()
        self.facts["namespaces of the host"] = {
            entry.name: os.readlink(entry) for entry in Path("/proc/self/ns").iterdir()
        }
        self.facts["tasks"] = [view.id for view in views]
        self.facts["bases"] = [view.desired.id_base for view in views]
        self.facts["uids on the host"] = [self._uid_on_the_host(view.id) for view in views]

    def _uid_on_the_host(self, task: str) -> int:
        keeper = self._agent.tasks.describe(task).known.containers[0].keeper
        assert keeper is not None
        return os.stat(f"/proc/{keeper.init_pid}").st_uid


async def collect(image: str, directory: Path, paths: tuple[str, ...]) -> dict[str, Any]:
    settings = {"warm_slots": 4}
    async with open_agent(directory / "state", directory / "run", settings) as agent:
        collector = Collector(agent, image, paths)
        async with trio.open_nursery() as nursery:
            for way in WAYS:
                nursery.start_soon(collector.to_its_end, way)
            nursery.start_soon(collector.as_health_check)
            nursery.start_soon(collector.side_by_side)
    return {"reports": collector.reports, "facts": collector.facts}


def main(image: str, directory: str, *paths: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # where the agent logs
        collected = trio.run(collect, image, Path(directory), paths)
    json.dump(collected, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
