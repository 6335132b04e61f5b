"""The same verbs without async: a trio loop in a thread of its own does the work.

    with sandbox.sync.open_sandbox() as sb:
        print(sb.run("debian:12", ["echo", "hello"]).stdout)

Objects may be used from any thread. Leaving the context ends the loop, after what `on_exit` says.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar, Unpack

import trio

from sandbox.client import api
from sandbox.client.api import OUTPUT_LIMIT_BYTES, Completed, OnExit
from sandbox.client.archive import Files
from sandbox.client.backend import Progress
from sandbox.client.place import PathName
from sandbox.client.request import RunOptions, TaskOptions
from sandbox.model.image import Image, ImageSummary
from sandbox.model.observed import LogRecord, TaskStats
from sandbox.model.task import TaskView

__all__ = ["Completed", "Sandbox", "Task", "connect", "open_sandbox"]

T = TypeVar("T")


class _Loop:
    """A thread that runs trio with one open `api.Sandbox`, and calls into it."""

    def __init__(self, opened: AbstractAsyncContextManager[api.Sandbox]) -> None:
        self._opened = opened
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sandbox.sync", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._raise_error()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # raised in the thread that opened us
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._leave = trio.Event()
        async with self._opened as self.sandbox, trio.open_nursery() as self._nursery:
            self._ready.set()
            await self._leave.wait()
            self._nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any, **named: Any) -> T:
        return trio.from_thread.run(partial(function, **named), *arguments, trio_token=self._token)

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """The items of an async iterator; it is closed when the iteration is left."""
        send, receive = trio.open_memory_channel[T](64)
        failed: list[Exception] = []

        async def pump() -> None:
            with send:
                try:
                    async for item in source:
                        await send.send(item)
                except trio.BrokenResourceError:
                    pass  # the reader has left
                except Exception as error:  # raised in the reader's thread
                    failed.append(error)
                finally:
                    close = getattr(source, "aclose", None)
                    if close is not None:
                        await close()

        async def begin() -> None:
            self._nursery.start_soon(pump)

        self.call(begin)
        try:
            while True:
                try:
                    yield self.call(receive.receive)
                except trio.EndOfChannel:
                    break
        finally:
            self.call(receive.aclose)
        for error in failed:
            raise error

    def close(self) -> None:
        trio.from_thread.run_sync(self._leave.set, trio_token=self._token)
        self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class Task:
    """A task that was started; see `sandbox.Task`."""

    def __init__(self, loop: _Loop, task: api.Task) -> None:
        self._loop = loop
        self._task = task

    def __repr__(self) -> str:
        return repr(self._task)

    @property
    def view(self) -> TaskView:
        return self._task.view

    @property
    def id(self) -> str:
        return self._task.id

    @property
    def status(self) -> str:
        return self._task.status

    @property
    def exit_code(self) -> int | None:
        return self._task.exit_code

    @property
    def stopped_reason(self) -> str | None:
        return self._task.stopped_reason

    @property
    def private_ip(self) -> str | None:
        return self._task.private_ip

    @property
    def public_ip(self) -> str | None:
        return self._task.public_ip

    def refresh(self) -> None:
        self._loop.call(self._task.refresh)

    def wait_running(self) -> None:
        self._loop.call(self._task.wait_running)

    def wait(self) -> int | None:
        return self._loop.call(self._task.wait)

    def stop(self, reason: str | None = None) -> None:
        self._loop.call(self._task.stop, reason)

    def kill(self, number: int = signal.SIGKILL, *, container: str | None = None) -> None:
        self._loop.call(self._task.kill, number, container=container)

    def remove(self) -> None:
        self._loop.call(self._task.remove)

    def logs(
        self,
        *,
        follow: bool = False,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
    ) -> Iterator[LogRecord]:
        return self._loop.iterate(
            self._task.logs(follow=follow, container=container, since=since, tail=tail)
        )

    def exec(
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
        return self._loop.call(
            self._task.exec,
            command,
            container=container,
            input=input,
            user=user,
            working_directory=working_directory,
            environment=environment,
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
        )

    def stats(self) -> TaskStats:
        return self._loop.call(self._task.stats)

    def put(self, source: PathName, path: str, *, container: str | None = None) -> None:
        self._loop.call(self._task.put, source, path, container=container)

    def get(self, path: str, destination: PathName, *, container: str | None = None) -> int:
        return self._loop.call(self._task.get, path, destination, container=container)


class Sandbox:
    """An agent to run tasks on; see `sandbox.Sandbox`."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        self._sandbox = loop.sandbox

    def run_task(self, *, progress: Progress | None = None, **wanted: Unpack[TaskOptions]) -> Task:
        return Task(
            self._loop, self._loop.call(self._sandbox.run_task, progress=progress, **wanted)
        )

    def run(
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
        return self._loop.call(
            self._sandbox.run,
            image,
            command,
            input=input,
            files=files,
            timeout_s=timeout_s,
            max_output_bytes=max_output_bytes,
            progress=progress,
            **wanted,
        )

    def tasks(self) -> list[Task]:
        return [Task(self._loop, task) for task in self._loop.call(self._sandbox.tasks)]

    def task(self, id: str) -> Task:
        return Task(self._loop, self._loop.call(self._sandbox.task, id))

    def pull(
        self,
        image: str,
        *,
        pull: Literal["missing", "always", "never"] = "always",
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> Image:
        return self._loop.call(
            self._sandbox.pull, image, pull=pull, platform=platform, progress=progress
        )

    def images(self) -> list[ImageSummary]:
        return self._loop.call(self._sandbox.images)

    def remove_image(self, image: str) -> None:
        self._loop.call(self._sandbox.remove_image, image)


@contextmanager
def open_sandbox(
    *,
    state_dir: PathName | None = None,
    run_dir: PathName | None = None,
    on_exit: OnExit = "stop",
    **config: Any,
) -> Iterator[Sandbox]:
    """An agent for the state directory: the live one, or one embedded in this process."""
    opened = api.open_sandbox(state_dir=state_dir, run_dir=run_dir, on_exit=on_exit, **config)
    with _running(opened) as sandbox:
        yield sandbox


@contextmanager
def connect(socket: PathName | None = None, *, on_exit: OnExit = "stop") -> Iterator[Sandbox]:
    """The agent at a control socket; AgentUnavailable when none answers there."""
    with _running(api.connect(socket, on_exit=on_exit)) as sandbox:
        yield sandbox


@contextmanager
def _running(opened: AbstractAsyncContextManager[api.Sandbox]) -> Iterator[Sandbox]:
    loop = _Loop(opened)
    try:
        yield Sandbox(loop)
    finally:
        loop.close()
