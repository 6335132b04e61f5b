"""The verbs of control in the caller's own process and trio loop: no socket between.

The agent that is embedded serves its control socket as any other does, so `sandbox ps` works beside
the program. `sandbox.agent` is imported when it is asked for: a program that only connects never
loads it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trio

from sandbox.client.backend import Progress
from sandbox.client.nursery import open_nursery
from sandbox.client.place import Place
from sandbox.model.image import Image, ImageSummary
from sandbox.model.observed import Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import TaskView

if TYPE_CHECKING:
    from sandbox.agent import Agent


@asynccontextmanager
async def embed(where: Place, config: Mapping[str, Any]) -> AsyncGenerator[Embedded]:
    """An agent in this process; AgentRunning when another holds the state directory."""
    log_to_stderr()
    async with host(where, config) as agent:
        yield Embedded(agent)


@asynccontextmanager
async def host(where: Place, config: Mapping[str, Any]) -> AsyncGenerator[Agent]:
    """An agent in this process, which works until the block is left, cancelled or not.

    Who is cancelled stops his tasks on his way out. That takes an agent that is not cancelled by
    the same stroke: without its supervisors no task ever becomes STOPPED, and he waits for ever.
    """
    from sandbox.agent import open_agent

    left = trio.Event()

    async def serve(task_status: trio.TaskStatus[Agent]) -> None:
        with trio.CancelScope() as scope:
            async with open_agent(Path(where.state_dir), Path(where.run_dir), config) as agent:
                scope.shield = True
                task_status.started(agent)
                await left.wait()

    async with open_nursery() as nursery:
        agent = await nursery.start(serve)
        try:
            yield agent
        finally:
            left.set()


def log_to_stderr() -> None:
    """Unless the program has its own mind: structlog's default would write into its stdout."""
    import structlog

    if not structlog.is_configured():
        structlog.configure(
            # No traceback with local variables, its other default: secrets would be among them.
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.dev.ConsoleRenderer(
                    colors=False, exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger("warning"),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )


class Embedded:
    """The backend over an agent in this process."""

    def __init__(self, agent: Agent) -> None:
        self._tasks = agent.tasks
        self._images = agent.images
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._owner = f"{boot_id}:{os.getpid()}"

    async def run(
        self,
        request: RunRequest,
        *,
        owned: bool,
        streams: Mapping[str, Streams],
        progress: Progress | None,
    ) -> TaskView:
        return await self._tasks.run(
            request,
            owner=self._owner if owned else None,
            streams=dict(streams),
            progress=progress,
        )

    async def stop(self, task: str, *, reason: str | None = None) -> TaskView:
        return await self._tasks.stop(task, reason=reason)

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None:
        await self._tasks.kill(task, signal, container=container)

    async def describe(self, task: str) -> TaskView:
        return self._tasks.describe(task)

    async def tasks(
        self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None
    ) -> list[TaskView]:
        return self._tasks.list(desired_status=desired_status)

    def watch(self, task: str) -> AsyncIterator[TaskView]:
        return self._tasks.watch(task)

    async def remove(self, task: str) -> None:
        await self._tasks.remove(task)

    async def exec(self, task: str, request: ExecRequest, *, streams: Streams) -> int:
        return await self._tasks.exec(task, request, streams=streams)

    def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        return self._tasks.logs(task, container=container, since=since, tail=tail, follow=follow)

    async def stats(self, task: str) -> TaskStats:
        return await self._tasks.stats(task)

    def events(self, *, after: int | None = None, follow: bool = False) -> AsyncIterator[Event]:
        return self._tasks.events(after=after, follow=follow)

    async def put(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        try:
            await self._tasks.put(task, path, archive, container=container)
        finally:
            os.close(archive)

    async def get(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        try:
            await self._tasks.get(task, path, archive, container=container)
        finally:
            os.close(archive)

    async def pull(
        self,
        reference: str,
        *,
        pull: Literal["missing", "always", "never"],
        platform: str | None,
        progress: Progress | None,
    ) -> Image:
        return await self._images.pull(reference, pull=pull, platform=platform, progress=progress)

    async def images(self) -> list[ImageSummary]:
        return self._images.list()

    async def remove_image(self, image: str) -> None:
        await self._images.remove(image)
