"""The control socket: `io.sandbox` over varlink, for the command line and the Python client.

Whoever connects must be uid 0 (or the agent's own user): the socket's mode keeps others out, and
SO_PEERCRED, which the kernel fixed at connect time, is asked again. Each method has one function
here, which calls control and nothing else.

A lost client ends only its own streams. Cancelling never stops a task (see `runtime`); that the
task of an attached `run` stops with its client is desire, written as such by `_owning`. When the
agent itself goes away no task is touched: who owns what is in the store, the next agent reads it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

import sandbox
from sandbox.api import introspection
from sandbox.api.connection import Connection, Handler, Methods, closing
from sandbox.control.images import Images
from sandbox.control.tasks import Tasks
from sandbox.errors import AgentRunning, ConfigError, InvalidParameterException, SandboxError
from sandbox.model.task import Status
from sandbox.varlink import calls

CONNECTION_LIMIT = 1024
"""A farm of attached runs fits; a client that leaks connections does not eat all descriptors."""

OWNER_GONE = "The client that ran the task is gone"

log = structlog.get_logger()


class Presence:
    """Who still needs this agent: connections, and tasks that are being stopped for lost clients.

    A `resident` agent stays whoever comes and goes, so it may be given tasks to keep.
    """

    def __init__(self, *, resident: bool) -> None:
        self.resident = resident
        self._holds = 0
        self._changed = trio.Event()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, by: int) -> None:
        self._holds += by
        self._changed.set()
        self._changed = trio.Event()

    async def idle(self, *, first_within_s: float, linger_s: float = 0) -> None:
        """Return once nobody has needed the agent for `linger_s`, or nobody ever came.

        What the caller does before its next await, no new client can come between.
        """
        with trio.move_on_after(first_within_s):
            while self._holds == 0:
                await self._changed.wait()
        while True:
            while self._holds:
                await self._changed.wait()
            with trio.move_on_after(linger_s) as lingering:
                await self._changed.wait()
            if lingering.cancelled_caught and not self._holds:
                return


class Services(Protocol):
    """What the control socket is a face of; `sandbox.agent` provides it."""

    @property
    def tasks(self) -> Tasks: ...
    @property
    def images(self) -> Images: ...
    @property
    def presence(self) -> Presence: ...
    @property
    def instance(self) -> str: ...
    @property
    def state_dir(self) -> Path: ...


def listen(path: Path) -> trio.SocketListener:
    """The listening socket at `path`, mode 0600; replaces one that a dead agent left.

    The caller holds the lock of its state directory, so a live socket belongs to an agent of
    another one: AgentRunning.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bind(listener, f"/proc/self/fd/{directory}/{path.name}", path)
        finally:
            os.close(directory)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        listener.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))


def _bind(listener: socket.socket, address: str, path: Path) -> None:
    """`address` reaches `path` in a form that is never too long for sockaddr_un."""
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path} is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        refused = probe.connect_ex(address)
    if refused == 0:
        raise AgentRunning(f"another agent answers at {path}: give this one its own --run-dir")
    if refused == errno.ECONNREFUSED:
        path.unlink()
    # The mode of a bound socket is 0777 less the umask; fchmod on the socket itself sets the mode
    # that bind starts from, so that there is no moment at which others may connect.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(address)
    path.chmod(0o600)


async def serve(
    agent: Services,
    listener: trio.SocketListener,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on `listener` until cancelled. Tasks of clients are not touched by that."""
    async with trio.open_nursery() as nursery:
        server = _Server(agent, nursery)
        await nursery.start(
            partial(trio.serve_listeners, server.admit, [listener], handler_nursery=nursery)
        )
        task_status.started()


class _Server:
    """What the connections share."""

    def __init__(self, agent: Services, nursery: trio.Nursery) -> None:
        self._agent = agent
        self._tasks = agent.tasks
        self._images = agent.images
        self._nursery = nursery
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._open = 0
        self._methods = self._table()

    async def admit(self, stream: trio.SocketStream) -> None:
        """One client, from its connect to its loss. Nothing that it does ends the agent."""
        pid, uid = _peer(stream.socket)
        if uid not in (0, os.geteuid()) or self._open >= CONNECTION_LIMIT:
            log.warning("client refused", uid=uid, pid=pid, connections=self._open)
            return
        self._open += 1
        try:
            with self._agent.presence.hold():
                await Connection(stream, owner=f"{self._boot_id}:{pid}").run(self._methods)
        except Exception:
            log.exception("a connection failed", pid=pid)
        finally:
            self._open -= 1

    @contextlib.asynccontextmanager
    async def _owning(self, at: Connection, task: str, owned: bool) -> AsyncGenerator[None]:
        """Stop the task if the client is lost meanwhile; not if only the agent goes away."""
        try:
            yield
        finally:
            if owned and at.is_lost:
                with trio.CancelScope(shield=True), contextlib.suppress(SandboxError):
                    await self._tasks.stop(task, reason=OWNER_GONE)
                    self._nursery.start_soon(self._see_out, task)

    async def _see_out(self, task: str) -> None:
        """Hold the agent until a task whose client is lost has stopped."""
        with self._agent.presence.hold(), contextlib.suppress(SandboxError):  # removed: it is gone
            async with closing(self._tasks.watch(task)) as views:
                async for _ in views:
                    pass

    def _table(self) -> Methods:
        """Every method by its full name."""
        handlers: dict[type[calls.Call[Any]], Handler] = {
            calls.GetAgent: self._get_agent,
            calls.RunTask: self._run_task,
            calls.WatchTask: self._watch_task,
            calls.StopTask: self._stop_task,
            calls.KillTask: self._kill_task,
            calls.DescribeTask: self._describe_task,
            calls.ListTasks: self._list_tasks,
            calls.RemoveTask: self._remove_task,
            calls.ExecTask: self._exec_task,
            calls.ResizeTerminal: self._resize_terminal,
            calls.ReadLogs: self._read_logs,
            calls.GetStats: self._get_stats,
            calls.ReadEvents: self._read_events,
            calls.PutArchive: self._put_archive,
            calls.GetArchive: self._get_archive,
            calls.PullImage: self._pull_image,
            calls.ListImages: self._list_images,
            calls.InspectImage: self._inspect_image,
            calls.RemoveImage: self._remove_image,
            calls.ImportImage: self._import_image,
            calls.PruneImages: self._prune_images,
        }
        ours = {calls.name(kind): (kind, handler) for kind, handler in handlers.items()}
        return {**ours, **introspection.METHODS}

    # Methods: one function each

    async def _get_agent(self, at: Connection, call: calls.GetAgent) -> calls.AgentReply:
        return calls.AgentReply(
            version=sandbox.__version__,
            instance=self._agent.instance,
            state_dir=str(self._agent.state_dir),
            resident=self._agent.presence.resident,
        )

    async def _run_task(self, at: Connection, call: calls.RunTask) -> calls.RunReply:
        if not call.owned and not self._agent.presence.resident:
            raise ConfigError("no agent stays to keep a detached task: start `sandbox agent` first")

        def progress(what: str, done: int, total: int | None) -> None:
            at.offer(calls.RunReply(progress=calls.Progress(what=what, done=done, total=total)))

        streams = at.claim(call.streams)
        with trio.CancelScope(shield=True):  # short; an accepted task must not be forgotten here
            view = await self._tasks.run(
                call.request,
                owner=at.owner if call.owned else None,
                streams=streams,
                progress=progress,
            )
        async with (
            self._owning(at, view.id, call.owned),
            closing(self._tasks.watch(view.id)) as views,
        ):
            await at.send(calls.RunReply(task=view))
            async for view in views:
                if view.known.last_status is not Status.STOPPED:
                    await at.send(calls.RunReply(task=view))
        return calls.RunReply(task=view)

    async def _watch_task(self, at: Connection, call: calls.WatchTask) -> calls.TaskReply:
        view = self._tasks.describe(call.task)
        async with (
            self._owning(at, view.id, call.owned),
            closing(self._tasks.watch(view.id)) as views,
        ):
            async for view in views:
                if view.known.last_status is not Status.STOPPED:
                    await at.send(calls.TaskReply(task=view))
        return calls.TaskReply(task=view)

    async def _stop_task(self, at: Connection, call: calls.StopTask) -> calls.TaskReply:
        return calls.TaskReply(task=await self._tasks.stop(call.task, reason=call.reason))

    async def _kill_task(self, at: Connection, call: calls.KillTask) -> calls.Nothing:
        await self._tasks.kill(call.task, call.signal, container=call.container)
        return calls.Nothing()

    async def _describe_task(self, at: Connection, call: calls.DescribeTask) -> calls.TaskReply:
        return calls.TaskReply(task=self._tasks.describe(call.task))

    async def _list_tasks(self, at: Connection, call: calls.ListTasks) -> calls.TasksReply:
        tasks = self._tasks.list(desired_status=call.desired_status)
        while len(tasks) > 50:  # a definition is at most 64 KiB: the message stays within its bound
            await at.send(calls.TasksReply(tasks=tuple(tasks[:50])))
            tasks = tasks[50:]
        return calls.TasksReply(tasks=tuple(tasks))

    async def _remove_task(self, at: Connection, call: calls.RemoveTask) -> calls.Nothing:
        await self._tasks.remove(call.task)
        return calls.Nothing()

    async def _exec_task(self, at: Connection, call: calls.ExecTask) -> calls.ExecReply:
        streams = at.claim({"": call.streams})[""]
        code = await self._tasks.exec(
            call.task,
            call.request,
            streams=streams,
            started=lambda exec_id: at.offer(calls.ExecReply(exec_id=exec_id)),
        )
        return calls.ExecReply(exit_code=code)

    async def _resize_terminal(self, at: Connection, call: calls.ResizeTerminal) -> calls.Nothing:
        await self._tasks.resize(
            call.task, call.rows, call.cols, container=call.container, exec_id=call.exec_id
        )
        return calls.Nothing()

    async def _read_logs(self, at: Connection, call: calls.ReadLogs) -> calls.LogsReply:
        records = self._tasks.logs(
            call.task,
            container=call.container,
            since=call.since,
            tail=call.tail,
            follow=call.follow,
        )
        await at.relay(records, lambda batch: calls.LogsReply(records=batch))
        return calls.LogsReply()

    async def _get_stats(self, at: Connection, call: calls.GetStats) -> calls.StatsReply:
        return calls.StatsReply(stats=await self._tasks.stats(call.task))

    async def _read_events(self, at: Connection, call: calls.ReadEvents) -> calls.EventsReply:
        events = self._tasks.events(after=call.after, follow=call.follow)
        await at.relay(events, lambda batch: calls.EventsReply(events=batch))
        return calls.EventsReply()

    async def _put_archive(self, at: Connection, call: calls.PutArchive) -> calls.Nothing:
        archive = at.borrow(call.archive)
        await self._tasks.put(call.task, call.path, archive, container=call.container)
        return calls.Nothing()

    async def _get_archive(self, at: Connection, call: calls.GetArchive) -> calls.Nothing:
        archive = at.borrow(call.archive)
        await self._tasks.get(call.task, call.path, archive, container=call.container)
        return calls.Nothing()

    async def _pull_image(self, at: Connection, call: calls.PullImage) -> calls.PullReply:
        image = await self._images.pull(
            call.reference,
            pull=call.pull,
            platform=call.platform,
            progress=partial(_tell_progress, at),
        )
        return calls.PullReply(image=image)

    async def _list_images(self, at: Connection, call: calls.ListImages) -> calls.ImagesReply:
        images = self._images.list()
        while len(images) > 1000:
            await at.send(calls.ImagesReply(images=tuple(images[:1000])))
            images = images[1000:]
        return calls.ImagesReply(images=tuple(images))

    async def _inspect_image(self, at: Connection, call: calls.InspectImage) -> calls.ImageReply:
        return calls.ImageReply(image=self._images.inspect(call.image))

    async def _remove_image(self, at: Connection, call: calls.RemoveImage) -> calls.Nothing:
        await self._images.remove(call.image)
        return calls.Nothing()

    async def _import_image(self, at: Connection, call: calls.ImportImage) -> calls.PullReply:
        if not call.source.startswith("/"):
            raise InvalidParameterException(f"{call.source}: the path must be absolute")
        image = await self._images.import_(
            Path(call.source),
            call.tag,
            entrypoint=call.entrypoint,
            cmd=call.cmd,
            env=call.env,
            user=call.user,
            working_dir=call.working_dir,
            stop_signal=call.stop_signal,
            platform=call.platform,
            progress=partial(_tell_progress, at),
        )
        return calls.PullReply(image=image)

    async def _prune_images(self, at: Connection, call: calls.PruneImages) -> calls.PrunedReply:
        return calls.PrunedReply(pruned=await self._images.prune(unused=call.unused))


def _tell_progress(at: Connection, what: str, done: int, total: int | None) -> None:
    at.offer(calls.PullReply(progress=calls.Progress(what=what, done=done, total=total)))


def _peer(peer: trio.socket.SocketType) -> tuple[int, int]:
    """The pid and uid that the kernel noted when the client connected."""
    form = struct.Struct("3i")
    pid, uid, _ = form.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size))
    return pid, uid
