"""An agent in memory: control's `Tasks` without a kernel, behind the real control socket.

It keeps to the contract of `sandbox.control.tasks` as far as the faces can see: views that only
move forward, streams that are written to and closed, NotFound for what does not exist. The first
word of a command says what its program does; the faces are what is under test.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from sandbox.api import local
from sandbox.errors import InvalidParameterException, NotFound, TaskFailed
from sandbox.model.observed import ContainerStats, Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import (
    ContainerKnown,
    Status,
    StopCode,
    TaskDesired,
    TaskKnown,
    TaskView,
)

NO_STREAMS = Streams()


class FakeTask:
    def __init__(self, view: TaskView, streams: dict[str, Streams]) -> None:
        self.view = view
        self.streams = streams
        self.changed = trio.Event()
        self.signals: list[int] = []
        self.sizes: list[tuple[int, int]] = []

    def move(self, status: Status, **known: Any) -> None:
        moved = msgspec.structs.replace(self.view.known, last_status=status, **known)
        self.view = msgspec.structs.replace(self.view, known=moved)
        self.changed.set()
        self.changed = trio.Event()


class FakeTasks:
    """Control's verbs on tasks that live in this process."""

    def __init__(self) -> None:
        self.all: dict[str, FakeTask] = {}
        self.owners: dict[str, str | None] = {}
        self.requests: list[RunRequest] = []
        self.execs: list[ExecRequest] = []
        self.execs_killed: list[str] = []
        self.nursery: trio.Nursery

    async def run(
        self,
        request: RunRequest,
        *,
        owner: str | None = None,
        streams: dict[str, Streams] | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> TaskView:
        self.requests.append(request)
        definition = request.definition
        if definition.cpu == "7":
            for each in (streams or {}).values():
                close_streams(each)
            raise InvalidParameterException("No Fargate configuration exists for given values.")
        identity = f"{len(self.all) + 1:032x}"[::-1]
        desired = TaskDesired(
            id=identity,
            cluster=request.cluster,
            group=request.group,
            definition=definition,
            created_at=time.time(),
            id_base=1 << 20,
            owner=owner,
        )
        containers = tuple(
            ContainerKnown(name=each.name) for each in definition.container_definitions
        )
        view = TaskView(
            desired=desired,
            known=TaskKnown(id=identity, containers=containers),
            arn=f"arn:aws:ecs:us-east-1:123456789012:task/default/{identity}",
        )
        task = self.all[identity] = FakeTask(view, streams or {})
        self.owners[identity] = owner
        if progress is not None:
            progress(definition.container_definitions[0].image, 50, 100)
        self.nursery.start_soon(self._live, task)
        return view

    async def _live(self, task: FakeTask) -> None:
        container = task.view.desired.definition.container_definitions[0]
        verb, *words = container.command or ("true",)
        streams = task.streams.get(container.name, NO_STREAMS)
        if verb == "unstartable":
            close_streams(streams)
            self._stop(task, StopCode.TASK_FAILED_TO_START, words[0], int(words[1]))
            return
        task.move(Status.RUNNING, started_at=time.time())
        code = 0
        if verb == "echo" and streams.stdout is not None:
            os.write(streams.stdout, " ".join(words).encode() + b"\n")
        elif verb == "warn" and streams.stderr is not None:
            os.write(streams.stderr, " ".join(words).encode() + b"\n")
        elif verb == "cat" and streams.stdin is not None and streams.stdout is not None:
            while chunk := await trio.to_thread.run_sync(os.read, streams.stdin, 65536):
                await trio.to_thread.run_sync(os.write, streams.stdout, chunk)
        elif verb == "exit":
            code = int(words[0])
        elif verb == "sleep":
            while not task.signals and task.view.desired.desired_status == "RUNNING":
                await task.changed.wait()
            code = 128 + (task.signals[-1] if task.signals else 15)
        elif verb == "overflow":
            (known, *_) = task.view.known.containers
            known = msgspec.structs.replace(known, lost_output=("stdout: No space left on device",))
            task.move(Status.RUNNING, containers=(known,))
        close_streams(streams)
        reason = "OutOfMemoryError: Container killed due to memory usage" if verb == "oom" else None
        self._stop(
            task,
            StopCode.ESSENTIAL_CONTAINER_EXITED,
            "Essential container in task exited",
            137 if verb == "oom" else code,
            reason,
        )

    def _stop(
        self, task: FakeTask, stop: StopCode, text: str, code: int, reason: str | None = None
    ) -> None:
        (known, *_) = task.view.known.containers
        ended = msgspec.structs.replace(
            known, exit_code=code or (None if stop == "TaskFailedToStart" else 0), reason=reason
        )
        task.move(Status.STOPPED, stop_code=stop, stopped_reason=text, containers=(ended,))

    async def stop(self, task: str, *, reason: str | None = None) -> TaskView:
        found = self.all[self.find(task)]
        desired = msgspec.structs.replace(
            found.view.desired, desired_status="STOPPED", stopped_reason=reason
        )
        found.view = msgspec.structs.replace(found.view, desired=desired)
        found.move(found.view.known.last_status)
        return found.view

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None:
        found = self.all[self.find(task)]
        found.signals.append(signal)
        found.move(found.view.known.last_status)

    def find(self, task: str) -> str:
        matches = [each for each in self.all if each.startswith(task)]
        if len(matches) != 1:
            raise NotFound(f"no task {task}")
        return matches[0]

    def describe(self, task: str) -> TaskView:
        return self.all[self.find(task)].view

    def list(
        self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None
    ) -> list[TaskView]:
        views = [task.view for task in self.all.values()]
        return [
            view
            for view in views
            if desired_status is None
            or (view.known.last_status is Status.STOPPED) == (desired_status == "STOPPED")
        ]

    async def watch(self, task: str) -> AsyncIterator[TaskView]:
        found = self.all[self.find(task)]
        while True:
            changed, view = found.changed, found.view
            yield view
            if view.known.last_status is Status.STOPPED:
                return
            await changed.wait()

    async def remove(self, task: str) -> None:
        if self.describe(task).known.last_status is not Status.STOPPED:
            raise InvalidParameterException("the task has not stopped")
        del self.all[self.find(task)]

    async def exec(
        self,
        task: str,
        request: ExecRequest,
        *,
        streams: Streams,
        started: Callable[[str], None] | None = None,
    ) -> int:
        verb, *words = request.command
        try:
            self.find(task)
            if verb == "missing":
                raise TaskFailed(f"exec: {verb}: executable file not found in $PATH", 127)
            if started is not None:
                started("e1")
            self.execs.append(request)
            if verb == "echo" and streams.stdout is not None:
                os.write(streams.stdout, " ".join(words).encode() + b"\n")
            if verb == "sleep":
                try:
                    await trio.sleep_forever()
                finally:
                    self.execs_killed.append(task)
            return int(words[0]) if verb == "exit" else 0
        finally:
            close_streams(streams)

    async def resize(
        self,
        task: str,
        rows: int,
        cols: int,
        *,
        container: str | None = None,
        exec_id: str | None = None,
    ) -> None:
        self.all[self.find(task)].sizes.append((rows, cols))

    async def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        self.find(task)
        for number in range(1000 if tail is None else tail):
            data = b"\x1b[31m\xff%d\n" % number
            yield LogRecord(at_ns=number, container="main", stream="stdout", data=data)
        if follow:
            await trio.sleep_forever()

    async def stats(self, task: str) -> TaskStats:
        one = ContainerStats(
            name="main",
            cpu_usage_ns=1_500_000_000,
            cpu_throttled_periods=1,
            cpu_periods=10,
            memory_bytes=1 << 20,
            memory_peak_bytes=2 << 20,
            memory_max_bytes=512 << 20,
            oom_kills=0,
            pids=3,
        )
        return TaskStats(id=self.find(task), at=time.time(), total=one, containers=(one,))

    async def events(
        self, *, after: int | None = None, follow: bool = False
    ) -> AsyncIterator[Event]:
        for rev, task in enumerate(self.all, start=1):
            yield Event(
                rev=rev,
                at=0.0,
                task=task,
                version=1,
                last_status="RUNNING",
                desired_status="RUNNING",
            )

    async def put(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        self.find(task)
        target = self.root / path.lstrip("/")
        if path.endswith("/.") and not target.is_dir():
            raise InvalidParameterException(f"{path}: No such file or directory")

        def work() -> None:
            with os.fdopen(os.dup(archive), "rb") as stream:
                target.with_suffix(".tar").write_bytes(stream.read())

        await trio.to_thread.run_sync(work)

    async def get(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        self.find(task)
        source = self.root / path.lstrip("/")

        def work() -> None:
            with os.fdopen(os.dup(archive), "wb") as stream:
                stream.write(source.with_suffix(".tar").read_bytes())

        await trio.to_thread.run_sync(work)

    root = Path("/nonexistent")


def close_streams(streams: Streams) -> None:
    for descriptor in (streams.stdin, streams.stdout, streams.stderr):
        if descriptor is not None:
            os.close(descriptor)


class FakeAgent:
    def __init__(self, state_dir: Path, *, resident: bool) -> None:
        self.tasks: Any = FakeTasks()
        self.images: Any = None
        self.presence = local.Presence(resident=resident)
        self.instance = "beef"
        self.state_dir = state_dir


@asynccontextmanager
async def serving(directory: Path, *, resident: bool = True) -> AsyncGenerator[FakeAgent]:
    """A fake agent behind the real server at <directory>/run/agent.sock."""
    (directory / "run").mkdir(exist_ok=True)
    agent = FakeAgent(directory, resident=resident)
    agent.tasks.root = directory
    async with trio.open_nursery() as nursery:
        agent.tasks.nursery = nursery
        listener = local.listen(directory / "run" / "agent.sock")
        await nursery.start(local.serve, agent, listener)
        yield agent
        nursery.cancel_scope.cancel()
