"""The Python API: a `Sandbox` and its `Task`s, the same over an embedded agent or a running one.

    async with sandbox.open_sandbox() as sb:
        done = await sb.run("debian:12", ["sh", "-c", "echo hello"])
        print(done.stdout, done.exit_code)

`open_sandbox` embeds an agent; if another one holds the state directory it connects to that.
Leaving the context stops what was started in it, unless `on_exit` is "leave".
"""

from __future__ import annotations

import math
import os
import signal
import tarfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Literal, Unpack

import msgspec
import trio

from sandbox.client import archive
from sandbox.client.archive import Files
from sandbox.client.backend import Backend, Progress
from sandbox.client.capture import Capture
from sandbox.client.nursery import open_nursery, unwrapped
from sandbox.client.place import PathName, Place, anchored, check_directory
from sandbox.client.request import (
    Pull,
    RunOptions,
    TaskOptions,
    check_pull,
    check_sequence,
    task_request,
)
from sandbox.client.shape import main_container
from sandbox.errors import (
    AgentRunning,
    AgentUnavailable,
    ConfigError,
    InvalidParameterException,
    SandboxError,
    TaskFailed,
)
from sandbox.model.image import Image, ImageSummary
from sandbox.model.observed import ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import Status, StopCode, TaskView

OUTPUT_LIMIT_BYTES = 16 << 20
"""Of each of stdout and stderr that `run` and `exec` keep, unless told otherwise."""

DRAIN_S = 5.0
"""A stopped task's pipes are at their end; this bounds the wait if somebody else holds them."""

TAKEOVER_S = 10.0
"""How long an agent that holds the directory may take to serve, or to leave."""

OnExit = Literal["stop", "leave"]


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """How a program ended and what it wrote."""

    stdout: bytes
    stderr: bytes
    exit_code: int | None
    """128+n when a signal ended it, as in a shell; None when it had to be given up."""
    oom: bool
    timed_out: bool
    duration_s: float
    truncated: bool = False
    """More was written than was to be kept."""


class Task:
    """A task that was started; what it says of itself is as of the last wait or `refresh`."""

    def __init__(self, backend: Backend, view: TaskView) -> None:
        self._backend = backend
        self.view = view

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.status}>"

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def status(self) -> str:
        return self.view.known.last_status.name

    @property
    def exit_code(self) -> int | None:
        """Of the first essential container, once it has ended."""
        main = main_container(self.view)
        return main.exit_code if main is not None else None

    @property
    def stopped_reason(self) -> str | None:
        return self.view.known.stopped_reason

    @property
    def private_ip(self) -> str | None:
        """None: in this version a task has only its loopback interface."""
        return None

    @property
    def public_ip(self) -> str | None:
        return None

    async def refresh(self) -> None:
        self.view = await self._backend.describe(self.id)

    async def wait_running(self) -> None:
        """Return once it runs, or has run; TaskFailed when it stopped before."""
        await self._watch_until(Status.RUNNING)
        self.raise_failure()

    async def wait(self) -> int | None:
        """Return the exit code once it has stopped; None when it never ran."""
        await self._watch_until(Status.STOPPED)
        return self.exit_code

    async def _watch_until(self, status: Status) -> None:
        views = self._backend.watch(self.id)
        try:
            async for view in views:
                self.view = view
                if view.known.last_status >= status:
                    return
        finally:
            if isinstance(views, AsyncGenerator):
                await views.aclose()

    def raise_failure(self) -> None:
        """TaskFailed if it stopped before it ran."""
        if self.view.known.stop_code is StopCode.TASK_FAILED_TO_START:
            raise TaskFailed(self.stopped_reason or "Task failed to start", self.exit_code)

    async def stop(self, reason: str | None = None) -> None:
        """SIGTERM, after stopTimeout SIGKILL; returns once it has stopped."""
        self.view = await self._backend.stop(self.id, reason=reason)
        await self.wait()

    async def kill(self, number: int = signal.SIGKILL, *, container: str | None = None) -> None:
        """Send a signal to a container's first process."""
        await self._backend.kill(self.id, number, container=container)

    async def remove(self) -> None:
        """Forget the stopped task and its log."""
        await self._backend.remove(self.id)

    def logs(
        self,
        *,
        follow: bool = False,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
    ) -> AsyncIterator[LogRecord]:
        """What was written, in order of time; with `follow` until the task has stopped."""
        if since is not None and not math.isfinite(since):
            raise InvalidParameterException(f"since is {since}, not a time")
        return self._backend.logs(
            self.id, container=container, since=since, tail=tail, follow=follow
        )

    async def exec(
        self,
        command: Sequence[str],
        *,
        container: str | None = None,
        input: bytes | None = None,
        user: str | None = None,
        working_directory: str | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Completed:
        """Run a command in a running container and give what it wrote.

        Cancelling, or `timeout_s`, kills it.
        """
        check_sequence("command", command)
        deadline_s = _timeout(timeout_s)
        request = ExecRequest(
            command=tuple(command),
            container=container,
            user=user,
            working_directory=working_directory,
            environment=dict(environment or {}),
        )
        begun = time.monotonic()
        code: int | None = None
        with Capture(input, max_output_bytes) as capture:
            async with open_nursery() as nursery:
                nursery.start_soon(capture.pump)
                with trio.move_on_after(deadline_s) as limit:
                    code = await self._backend.exec(self.id, request, streams=capture.hand_over())
                nursery.cancel_scope.deadline = trio.current_time() + DRAIN_S
        return Completed(
            stdout=bytes(capture.stdout),
            stderr=bytes(capture.stderr),
            exit_code=code,
            oom=False,
            timed_out=limit.cancelled_caught,
            duration_s=time.monotonic() - begun,
            truncated=capture.truncated,
        )

    async def stats(self) -> TaskStats:
        return await self._backend.stats(self.id)

    async def put(self, source: PathName, path: str, *, container: str | None = None) -> None:
        """Copy a file or tree of this host into the task, as `path`, or into it if it ends in /."""
        directory, name = os.path.split(path)
        name = name or os.path.basename(os.path.abspath(source))
        read, write = os.pipe()
        failed: list[SandboxError] = []
        refused: list[SandboxError] = []
        async with open_nursery() as nursery:
            nursery.start_soon(_pack, os.fspath(source), name, write, failed)
            try:
                await self._backend.put(self.id, directory or "/", read, container=container)
            except SandboxError as error:
                refused.append(error)
        for each in (*failed, *refused):  # without a source the archive is none either
            raise each

    async def get(self, path: str, destination: PathName, *, container: str | None = None) -> int:
        """Copy a file or tree of the task to `destination`, or into it if it is a directory.

        Returns how many devices, sockets and fifos were left out. What is mounted below `path`
        (volumes, /proc, /sys, /dev) is no part of it.
        """
        read, write = os.pipe()
        skipped: list[int] = []
        failed: list[SandboxError] = []
        refused: list[SandboxError] = []
        async with open_nursery() as nursery:
            nursery.start_soon(_unpack, read, os.fspath(destination), skipped, failed)
            try:
                await self._backend.get(self.id, path, write, container=container)
            except SandboxError as error:
                refused.append(error)
        # Who is refused sends no archive; who cannot unpack reads none.
        ours = [error for error in failed if not isinstance(error, archive.NoArchive)]
        for each in (*ours, *refused, *failed):
            raise each
        return sum(skipped)


class Sandbox:
    """An agent to run tasks on. Made by `open_sandbox` and `connect`."""

    def __init__(self, backend: Backend, *, on_exit: OnExit) -> None:
        self._backend = backend
        self._on_exit = on_exit
        self._started: dict[str, Task] = {}

    async def run_task(
        self,
        *,
        progress: Progress | None = None,
        streams: Mapping[str, Streams] | None = None,
        **wanted: Unpack[TaskOptions],
    ) -> Task:
        """Start a task; returns once it is accepted. `TaskOptions` says what can be wanted.

        `streams` are descriptors for containers by name; they belong to the call.
        """
        return await self._run(task_request(**wanted), streams or {}, progress)

    async def _run(
        self, request: RunRequest, streams: Mapping[str, Streams], progress: Progress | None
    ) -> Task:
        owned = self._on_exit == "stop"
        view = await self._backend.run(request, owned=owned, streams=streams, progress=progress)
        task = self._started[view.id] = Task(self._backend, view)
        return task

    async def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        input: bytes | None = None,
        files: Files | None = None,
        timeout_s: float | None = None,
        max_output_bytes: int = OUTPUT_LIMIT_BYTES,
        progress: Progress | None = None,
        **wanted: Unpack[RunOptions],
    ) -> Completed:
        """Run a program to its end and give what it wrote: subprocess.run in a sandbox.

        `files` are there before it starts: by name, which is relative to the working directory
        unless it begins with a slash, contents as bytes, or the path of a file or tree of this
        host. They belong to the task's root, with mode 0644 or the host's.

        The task is forgotten afterwards. Cancelling, or `timeout_s` after the call, kills it.
        TaskFailed when it could not be started.
        """
        request = task_request(image=image, command=command, **wanted)
        deadline_s = _timeout(timeout_s)
        name = request.definition.container_definitions[0].name
        begun = time.monotonic()
        bundled = await trio.to_thread.run_sync(archive.bundle, files) if files else None
        with Capture(input, max_output_bytes, bundled) as capture:
            task = await self._run(request, {name: capture.hand_over()}, progress)
            try:
                async with open_nursery() as nursery:
                    nursery.start_soon(capture.pump)
                    with trio.move_on_after(deadline_s) as limit:
                        await task.wait()
                    if limit.cancelled_caught:
                        await _end(task)
                    nursery.cancel_scope.deadline = trio.current_time() + DRAIN_S
            finally:
                with trio.CancelScope(shield=True):
                    await _end(task)
                    await self._forget(task)
        if not limit.cancelled_caught:
            task.raise_failure()
        return Completed(
            stdout=bytes(capture.stdout),
            stderr=bytes(capture.stderr),
            exit_code=task.exit_code,
            oom=_was_oom(task.view),
            timed_out=limit.cancelled_caught,
            duration_s=_duration_s(task.view, time.monotonic() - begun),
            truncated=capture.truncated,
        )

    async def _forget(self, task: Task) -> None:
        self._started.pop(task.id, None)
        with suppress(SandboxError):  # forgotten by `remove`, by somebody else, or by retention
            await task.remove()

    async def tasks(self) -> list[Task]:
        """All tasks of the agent, also those of others, oldest first."""
        return [Task(self._backend, view) for view in await self._backend.tasks()]

    async def task(self, id: str) -> Task:
        """A task by id, unique prefix, name or ARN."""
        return Task(self._backend, await self._backend.describe(id))

    async def pull(
        self,
        image: str,
        *,
        pull: Pull = "always",
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Get an image ready to run; `always` asks the registry what the name stands for now."""
        check_pull(pull)
        return await self._backend.pull(
            anchored(image), pull=pull, platform=platform, progress=progress
        )

    async def images(self) -> list[ImageSummary]:
        """The images that are stored here, by name."""
        return await self._backend.images()

    async def remove_image(self, image: str) -> None:
        """Forget a name, and with its last name the image."""
        await self._backend.remove_image(image)

    async def close(self) -> None:
        """Stop what was started here and has not stopped, unless `on_exit` is "leave"."""
        if self._on_exit == "leave":
            return
        async with open_nursery() as nursery:
            for task in self._started.values():
                nursery.start_soon(_stop_quietly, task)
        self._started.clear()


@asynccontextmanager
async def open_sandbox(
    *,
    state_dir: PathName | None = None,
    run_dir: PathName | None = None,
    on_exit: OnExit = "stop",
    **config: Any,
) -> AsyncGenerator[Sandbox]:
    """An agent for the state directory: the live one, or one embedded in this process.

    `config` are the members of agent.toml, for an embedded agent; a live one has its own.
    """
    with unwrapped():
        async with AsyncExitStack() as stack:
            yield await _hold_or_reach(stack, Place.of(state_dir, run_dir), on_exit, config)


async def _hold_or_reach(
    stack: AsyncExitStack, where: Place, on_exit: OnExit, config: Mapping[str, Any]
) -> Sandbox:
    """Embed, or connect to who holds the directory; who begins or leaves soon allows either."""
    from sandbox.client.embedded import embed

    deadline = trio.current_time() + TAKEOVER_S
    while True:
        try:
            backend = await stack.enter_async_context(embed(where, config))
            return await stack.enter_async_context(_closing(backend, on_exit))
        except AgentRunning:
            with suppress(AgentUnavailable):
                reached = _reach(where.socket, on_exit, state_dir=where.state_dir)
                return await stack.enter_async_context(reached)
            if trio.current_time() > deadline:
                raise
        await trio.sleep(0.05)


@asynccontextmanager
async def connect(
    socket: PathName | None = None, *, on_exit: OnExit = "stop"
) -> AsyncGenerator[Sandbox]:
    """The agent at a control socket; AgentUnavailable when none answers there."""
    async with _reach(os.fspath(socket or Place.of().socket), on_exit) as sandbox:
        yield sandbox


@asynccontextmanager
async def _reach(
    socket: str, on_exit: OnExit, state_dir: str | None = None
) -> AsyncGenerator[Sandbox]:
    from sandbox.client.remote import Remote

    async with open_nursery() as nursery:
        backend = Remote(socket, nursery)
        agent = await backend.agent()
        if state_dir is not None:
            check_directory(socket, agent.state_dir, state_dir)
        async with _closing(backend, on_exit) as sandbox:
            yield sandbox
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _closing(backend: Backend, on_exit: OnExit) -> AsyncGenerator[Sandbox]:
    sandbox = Sandbox(backend, on_exit=on_exit)
    try:
        yield sandbox
    finally:
        with trio.CancelScope(shield=True):  # bounded: SIGKILL follows after stopTimeout
            await sandbox.close()


async def _end(task: Task) -> None:
    """Make sure that it has stopped, at once."""
    if task.view.known.last_status is Status.STOPPED:
        return
    with suppress(SandboxError):  # nothing runs yet, or no longer
        await task.kill(signal.SIGKILL)
    await task.stop()


async def _stop_quietly(task: Task) -> None:
    with suppress(SandboxError):  # forgotten already, or its agent is gone: nothing of ours is left
        await task.stop()


def _was_oom(view: TaskView) -> bool:
    return any((each.reason or "").startswith("OutOfMemoryError") for each in view.known.containers)


def _duration_s(view: TaskView, otherwise: float) -> float:
    """How long the program ran, by the keeper's clock where it was told."""
    main = main_container(view)
    if main is None or main.started_at is None or main.finished_at is None:
        return otherwise
    return main.finished_at - main.started_at


def _timeout(timeout_s: float | None) -> float:
    if timeout_s is None:
        return math.inf
    if not timeout_s >= 0:
        raise InvalidParameterException(f"timeout_s is {timeout_s}, not a number of seconds")
    return timeout_s


async def _pack(source: str, name: str, descriptor: int, failed: list[SandboxError]) -> None:
    def work() -> None:
        try:
            with os.fdopen(descriptor, "wb") as out:
                archive.pack(source, name, out)
        except BrokenPipeError:
            pass  # the agent gave up, and its answer says why
        except (OSError, tarfile.TarError) as error:
            failed.append(ConfigError(f"{source}: {error}"))

    await trio.to_thread.run_sync(work)


async def _unpack(
    descriptor: int, destination: str, skipped: list[int], failed: list[SandboxError]
) -> None:
    def work() -> None:
        try:
            with os.fdopen(descriptor, "rb") as stream:
                skipped.append(archive.unpack(stream, destination))
        except SandboxError as error:
            failed.append(error)

    await trio.to_thread.run_sync(work)
