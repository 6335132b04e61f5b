"""The verbs of control over the control socket, for trio programs.

Each call has a connection of its own, so a slow stream never delays another call, and cancelling a
call closes its connection, which is all that the agent needs to know. The connection of an owned
task stays open in `nursery` until the task has stopped: its loss is what stops the task.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Literal

import trio

from sandbox.client import varlink
from sandbox.client.backend import Progress
from sandbox.client.link import connect
from sandbox.errors import AgentUnavailable, SandboxError
from sandbox.model.image import Image, ImageSummary
from sandbox.model.observed import Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import TaskView
from sandbox.varlink import calls, frames
from sandbox.varlink.calls import Call, R, Stream


class AsyncLink:
    """One connection to the agent; calls are made one after another."""

    def __init__(self, path: str, stream: trio.SocketStream) -> None:
        self._path = path
        self._stream = stream
        self._frames = frames.Frames()
        self._waiting: list[frames.Frame] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str) -> AsyncGenerator[AsyncLink]:
        """Connect; AgentUnavailable when nobody listens there."""
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connect(endpoint, path)  # a local listener with room in its queue: it does not block
        except OSError as error:
            endpoint.close()
            raise varlink.absent(path, os.strerror(error.errno or 0)) from None
        link = cls(path, trio.SocketStream(trio.socket.from_stdlib_socket(endpoint)))
        try:
            yield link
        finally:
            link._frames.close()
            link._stream.socket.close()

    async def send(self, call: Call[R], descriptors: Sequence[int] = ()) -> None:
        """Make a call; its answers are for `receive`. The descriptors stay the caller's own."""
        message = varlink.question(call)
        try:
            sent = await self._stream.socket.sendmsg([message], frames.rights(descriptors))
            await self._stream.send_all(message[sent:])
        except (OSError, trio.BrokenResourceError):
            raise varlink.lost(self._path) from None

    async def receive(self, call: Call[R]) -> tuple[R, bool]:
        while not self._waiting:
            self._waiting = await self._read()
        return varlink.answer(call, self._waiting.pop(0))

    async def _read(self) -> list[frames.Frame]:
        try:
            data, ancillary, flags, _ = await self._stream.socket.recvmsg(
                frames.CHUNK, frames.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if data:
                return self._frames.feed(data, frames.received(ancillary, flags))
        except (OSError, frames.Broken):
            pass  # said below, in the words for every way of losing an agent
        raise varlink.lost(self._path)


class Remote:
    """The backend over the socket of a running agent."""

    def __init__(self, path: str, nursery: trio.Nursery) -> None:
        self._path = path
        self._nursery = nursery

    async def _call(self, call: Call[R], descriptors: Sequence[int] = ()) -> R:
        async with AsyncLink.open(self._path) as link:
            await link.send(call, descriptors)
            return (await link.receive(call))[0]

    async def _stream(self, call: Stream[R]) -> AsyncGenerator[R]:
        async with AsyncLink.open(self._path) as link:
            await link.send(call)
            continues = True
            while continues:
                reply, continues = await link.receive(call)
                yield reply

    async def agent(self) -> calls.AgentReply:
        return await self._call(calls.GetAgent())

    async def run(
        self,
        request: RunRequest,
        *,
        owned: bool,
        streams: Mapping[str, Streams],
        progress: Progress | None,
    ) -> TaskView:
        indexed, descriptors = index(streams)
        call = calls.RunTask(request=request, owned=owned, streams=indexed)
        try:
            view: TaskView = await self._nursery.start(self._hold, call, descriptors, progress)
        finally:
            frames.close_all(descriptors)
        return view

    async def _hold(
        self,
        call: calls.RunTask,
        descriptors: Sequence[int],
        progress: Progress | None,
        *,
        task_status: trio.TaskStatus[TaskView],
    ) -> None:
        """Keep the connection of a task until the task has stopped."""
        accepted = False
        try:
            async with AsyncLink.open(self._path) as link:
                await link.send(call, descriptors)
                continues = True
                while continues:
                    reply, continues = await link.receive(call)
                    if reply.task is not None and not accepted:
                        accepted = True
                        task_status.started(reply.task)
                    if reply.progress is not None and progress is not None:
                        progress(reply.progress.what, reply.progress.done, reply.progress.total)
        except SandboxError:
            if not accepted:
                raise
            # The agent is gone or restarting: whoever asks for the task next is told so.

    async def stop(self, task: str, *, reason: str | None = None) -> TaskView:
        return (await self._call(calls.StopTask(task=task, reason=reason))).task

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None:
        await self._call(calls.KillTask(task=task, signal=signal, container=container))

    async def describe(self, task: str) -> TaskView:
        return (await self._call(calls.DescribeTask(task=task))).task

    async def tasks(
        self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None
    ) -> list[TaskView]:
        wanted = calls.ListTasks(desired_status=desired_status)
        async with aclosing(self._stream(wanted)) as replies:
            return [view async for reply in replies for view in reply.tasks]

    async def watch(self, task: str) -> AsyncIterator[TaskView]:
        async with aclosing(self._stream(calls.WatchTask(task=task))) as replies:
            async for reply in replies:
                yield reply.task

    async def remove(self, task: str) -> None:
        await self._call(calls.RemoveTask(task=task))

    async def exec(self, task: str, request: ExecRequest, *, streams: Streams) -> int:
        indexed, descriptors = index({"": streams})
        call = calls.ExecTask(task=task, request=request, streams=indexed[""])
        async with self._asked(call, descriptors) as link:
            continues = True
            while continues:
                reply, continues = await link.receive(call)
                if reply.exit_code is not None:
                    return reply.exit_code
        raise AgentUnavailable("the agent did not tell how the command ended")

    async def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        wanted = calls.ReadLogs(
            task=task, container=container, since=since, tail=tail, follow=follow
        )
        async with aclosing(self._stream(wanted)) as replies:
            async for reply in replies:
                for record in reply.records:
                    yield record

    async def stats(self, task: str) -> TaskStats:
        return (await self._call(calls.GetStats(task=task))).stats

    async def events(
        self, *, after: int | None = None, follow: bool = False
    ) -> AsyncIterator[Event]:
        wanted = calls.ReadEvents(after=after, follow=follow)
        async with aclosing(self._stream(wanted)) as replies:
            async for reply in replies:
                for event in reply.events:
                    yield event

    async def put(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        await self._transfer(
            calls.PutArchive(task=task, path=path, archive=0, container=container), archive
        )

    async def get(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        await self._transfer(
            calls.GetArchive(task=task, path=path, archive=0, container=container), archive
        )

    async def pull(
        self,
        reference: str,
        *,
        pull: Literal["missing", "always", "never"],
        platform: str | None,
        progress: Progress | None,
    ) -> Image:
        wanted = calls.PullImage(reference=reference, pull=pull, platform=platform)
        async with aclosing(self._stream(wanted)) as replies:
            async for reply in replies:
                if reply.progress is not None and progress is not None:
                    progress(reply.progress.what, reply.progress.done, reply.progress.total)
                if reply.image is not None:
                    return reply.image
        raise varlink.lost(self._path)

    async def images(self) -> list[ImageSummary]:
        async with aclosing(self._stream(calls.ListImages())) as replies:
            return [image async for reply in replies for image in reply.images]

    async def remove_image(self, image: str) -> None:
        await self._call(calls.RemoveImage(image=image))

    async def _transfer(self, call: Call[calls.Nothing], archive: int) -> None:
        async with self._asked(call, [archive]) as link:
            await link.receive(call)

    @asynccontextmanager
    async def _asked(self, call: Call[R], descriptors: Sequence[int]) -> AsyncGenerator[AsyncLink]:
        """A connection on which the call was made. The descriptors are closed, also where there is
        no agent to take them: who is at their other end must see it."""
        async with AsyncExitStack() as opened:
            try:
                link = await opened.enter_async_context(AsyncLink.open(self._path))
                await link.send(call, descriptors)
            finally:
                frames.close_all(descriptors)
            yield link


def index(streams: Mapping[str, Streams]) -> tuple[dict[str, Streams], list[int]]:
    """Streams with indexes in place of descriptors, and the descriptors in that order."""
    descriptors: list[int] = []

    def place(descriptor: int) -> int:
        descriptors.append(descriptor)
        return len(descriptors) - 1

    return {name: each.moved(place) for name, each in streams.items()}, descriptors
