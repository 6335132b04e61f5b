"""What can be wanted of tasks: run, stop, describe, remove.

Every face (the control socket, the Python API, later AWS's wire) calls these functions and nothing
else. They validate, write desire to the store and answer from the store; the runtime makes it true.
What needs a live container (exec, signals, terminals, files) is passed on to the task's supervisor.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import signal as signals
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import chain
from typing import Final, Literal

import msgspec
import trio

from sandbox.control import owners
from sandbox.control.capacity import Capacity
from sandbox.control.floor import Disk
from sandbox.errors import (
    ClientException,
    Conflict,
    InvalidParameterException,
    NotFound,
    SandboxError,
    StoreError,
)
from sandbox.images import documents, reference
from sandbox.kernel.native import raising
from sandbox.kernel.slots import Slot
from sandbox.model import fargate, names
from sandbox.model.observed import (
    ContainerStats,
    Event,
    ExecRequest,
    LogRecord,
    StorageStats,
    TaskStats,
)
from sandbox.model.refusals import Text
from sandbox.model.request import RunRequest as RunRequest
from sandbox.model.request import Streams as Streams
from sandbox.model.task import (
    Size,
    Status,
    StopCode,
    TaskDefinition,
    TaskDesired,
    TaskKnown,
    TaskStorage,
    TaskView,
    effective_desire,
    size_of,
)
from sandbox.runtime import archive as archives
from sandbox.runtime.containers import Containers, close_streams
from sandbox.runtime.logs import Tail
from sandbox.runtime.node import Node
from sandbox.runtime.storage import Storage, usage
from sandbox.runtime.supervisor import Handover
from sandbox.runtime.supervisors import Supervisors
from sandbox.store import rows
from sandbox.store.base import Versioned

_FOLLOW_S: Final = 0.05
"""How often a followed log is looked into: below what a reader notices."""
_ATTEMPTS: Final = 8

Progress = Callable[[str, int, int | None], None]


class Tasks:
    """Built by `sandbox.agent`; holds no state but the store's, and what is just being accepted."""

    def __init__(
        self,
        node: Node,
        supervisors: Supervisors,
        capacity: Capacity,
        *,
        era: fargate.Era | None = None,
    ) -> None:
        self._node = node
        self._supervisors = supervisors
        self.capacity = capacity
        self._accepting: list[Size] = []
        self.era = era

    # What is wanted -----------------------------------------------------------------------

    async def run(
        self,
        request: RunRequest,
        *,
        owner: str | None = None,
        streams: dict[str, Streams] | None = None,
        progress: Progress | None = None,
    ) -> TaskView:
        """Accept a task; returns once its desire is durable, before anything was started.

        `owner` is BOOT:PID of a process that the task must not outlive (see `control.owners`).
        `streams` is keyed by container name. `progress(what, done, total)` is called while the
        images are pulled, in bytes. Raises ClientException, InvalidParameterException, ApiError.
        """
        given = streams or {}
        try:
            definition, version, storage = self._accept(request)
            for each in given.values():
                _check_streams(each)
            with self._counted(size_of(definition, storage)):
                slot = await self._node.slots.take()
                row = await self._write(request, owner, definition, version, storage, slot)
                handover = Handover(slot=slot, streams=given, progress=progress)
                given = {}
                self._supervisors.begin(row, handover)
        except BaseException:
            for each in given.values():
                close_streams(each)
            raise
        return self._view(row, rows.not_yet_known(row))

    async def _write(
        self,
        request: RunRequest,
        owner: str | None,
        definition: TaskDefinition,
        version: str,
        storage: TaskStorage,
        slot: Slot,
    ) -> TaskDesired:
        """The desired row, durable; without one nobody else would give the id range back."""
        row = TaskDesired(
            id=names.task_id(os.urandom(16)),
            cluster=request.cluster,
            group=request.group,
            definition=definition,
            created_at=time.time(),
            id_base=slot.id_base,
            platform_version=version,
            storage=storage,
            pull=request.pull,
            platform=request.platform,
            owner=owner and owners.name(owner),
            remove=request.remove,
            started_by=request.started_by,
        )
        self._node.failpoints.reach("accept.do")
        try:
            # A task with an owner does not outlive it, nor a power cut: no need to wait for a disk.
            await self._node.store.txn(
                {rows.desired_key(row.id): row},
                expect={rows.desired_key(row.id): 0},
                durable=owner is None,
            )
        except BaseException:
            slot.close()
            with contextlib.suppress(StoreError):
                # A row that is there, though not on the disk, has the range: the next agent gives
                # it back.
                if rows.desired(self._node.store, row.id) is None:
                    self._node.ranges.release(slot.id_base)
            raise
        self._node.failpoints.reach("accept.done")
        return row

    def _accept(self, request: RunRequest) -> tuple[TaskDefinition, str, TaskStorage]:
        version = fargate.resolve_platform_version(request.platform_version)
        definition = fargate.accept(request.definition, version, self.era)
        for container in definition.container_definitions:
            try:
                reference.parse(container.image)
            except SandboxError as error:
                raise ClientException(str(error)) from None
        if request.platform:
            try:
                documents.parse_platform(request.platform)
            except SandboxError as error:
                raise InvalidParameterException(str(error)) from None
        if definition.ephemeral_storage is not None and self._node.filesystems is None:
            raise ClientException(Text.STORAGE_UNLIMITED)
        storage = fargate.storage(definition, version, self.era)
        self.capacity.check(
            size_of(definition, storage),
            [*self._supervisors.sizes(), *self._accepting],
            Disk.of(self._node.state_dir),
        )
        return definition, version, storage

    @contextlib.contextmanager
    def _counted(self, size: Size) -> Iterator[None]:
        """Until it has begun the task counts here: others ask for the same room."""
        self._accepting.append(size)
        try:
            yield
        finally:
            self._accepting.remove(size)

    async def evict(self, task: str, reason: str) -> None:
        """Stop it for the host's sake, without waiting for its programs."""
        try:
            view = await self.stop(task, reason=reason, code=StopCode.INFRASTRUCTURE_HEALTH)
        except NotFound:
            return  # removed meanwhile
        self._node.log.warning("task stopped", task=task, reason=reason)
        if (supervisor := self._supervisors.get(task)) is not None:
            supervisor.want(view.desired)  # or the end of its containers might be heard of first
            supervisor.containers.kill_all()

    async def stop(
        self,
        task: str,
        *,
        reason: str | None = None,
        code: StopCode = StopCode.USER_INITIATED,
    ) -> TaskView:
        """Want the task stopped; returns at once. Stopping a stopped task changes nothing."""
        task = self.find(task)
        for _ in range(_ATTEMPTS):
            row = rows.desired(self._node.store, task)
            if row is None:
                raise NotFound(names.TASK_NOT_FOUND)
            if row.value.desired_status == "STOPPED":
                break
            wanted = msgspec.structs.replace(
                row.value,
                desired_status="STOPPED",
                stop_code=code,
                stopped_reason=reason or "Task stopped by user",
                stop_requested_at=time.time(),
            )
            with contextlib.suppress(Conflict):
                key = rows.desired_key(task)
                self._node.failpoints.reach("stop.do")
                await self._node.store.txn({key: wanted}, expect={key: row.rev})
                self._node.failpoints.reach("stop.done")
                break
        return self.describe(task)

    async def remove(self, task: str) -> None:
        """Forget a stopped task, its log too; InvalidParameterException while it is not stopped."""
        view = self.describe(task)
        if view.known.last_status is not Status.STOPPED:
            raise InvalidParameterException(f"task {view.id} is not stopped: stop it first")
        # The directory first: a crash in between leaves a record without a log, not the reverse.
        self._node.failpoints.reach("remove.do")
        containers = (names.container_directory(c.name) for c in view.known.containers)
        await archives.remove_directory(self._node.task_dir(view.id), containers)
        self._node.failpoints.reach("remove.emptied")
        gone = [rows.desired_key(view.id), rows.known_key(view.id)]
        await self._node.store.txn({}, delete=gone, durable=False)
        self._node.failpoints.reach("remove.done")

    # What is ------------------------------------------------------------------------------

    def find(self, task: str) -> str:
        """The id for an id, a unique prefix of one, a name or an ARN; NotFound otherwise."""
        if rows.desired(self._node.store, task) is not None:
            return task
        ids = rows.task_ids(self._node.store)
        return names.match(task, ids, place=self._node.place, named=self._named(task, ids))

    def _named(self, name: str, ids: Iterable[str]) -> list[str]:
        """The tasks of that name, those that have not stopped alone if there are any."""
        found = [id for id in ids if self._row(id).value.definition.family == name]
        live = [id for id in found if not rows.has_stopped(self._node.store, id)]
        return live or found

    def _row(self, task: str) -> Versioned[TaskDesired]:
        row = rows.desired(self._node.store, task)
        if row is None:
            raise NotFound(names.TASK_NOT_FOUND)
        return row

    def describe(self, task: str) -> TaskView:
        row = self._row(self.find(task)).value
        known = rows.known(self._node.store, row.id)
        return self._view(row, known or rows.not_yet_known(row))

    def _view(self, row: TaskDesired, known: TaskKnown) -> TaskView:
        arn = self._node.place.task_arn(row.cluster, row.id)
        return TaskView(desired=row, known=known, arn=arn)

    def list(
        self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None
    ) -> list[TaskView]:
        """By creation, oldest first. A task that ended by itself is wanted STOPPED."""
        views = [self.describe(task) for task in rows.task_ids(self._node.store)]
        chosen = [v for v in views if desired_status in (None, effective_desire(v))]
        return sorted(chosen, key=lambda view: view.desired.created_at)

    async def watch(self, task: str) -> AsyncIterator[TaskView]:
        """The task now, and again at each change; ends after STOPPED was yielded."""
        task = self.find(task)
        after = self._node.store.revision
        view = self.describe(task)
        yield view
        if view.known.last_status is Status.STOPPED:
            return
        async for change in self._node.store.watch(f"{rows.TASKS}{task}/", after):
            if change.value is None:
                return  # removed as soon as it was stopped
            if change.key == rows.known_key(task):
                known = self._node.store.value(change, TaskKnown)
                view = msgspec.structs.replace(view, known=known)
            else:
                desired = self._node.store.value(change, TaskDesired)
                view = msgspec.structs.replace(view, desired=desired)
            yield view
            if view.known.last_status is Status.STOPPED:
                return

    async def events(
        self, *, after: int | None = None, follow: bool = False
    ) -> AsyncIterator[Event]:
        """Events of all tasks, oldest first; `after` is a revision, None is from the beginning."""
        store = self._node.store
        until = store.revision
        after = store.compacted if after is None else after
        if not follow and until <= after:
            return
        async for change in store.watch(rows.TASKS, after):
            if not follow and change.rev > until:
                return
            if change.key.endswith("/known") and change.value is not None:
                known = store.value(change, TaskKnown)
                if known.raised_event:
                    yield _event(change.rev, change.at, known)
            if not follow and change.rev >= until:
                return

    # Live containers -------------------------------------------------------------------------

    def _live(self, task: str) -> Containers:
        task = self.find(task)
        supervisor = self._supervisors.get(task)
        if supervisor is None:
            raise InvalidParameterException(f"task {task} is not running")
        return supervisor.containers

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None:
        """Send a signal to the first process of a container, by default the first essential one."""
        if not 1 <= signal < signals.NSIG:
            last = signals.NSIG - 1
            raise InvalidParameterException(f"signal {signal} is none, they are 1 to {last}")
        await self._live(task).signal(signal, container)

    async def exec(
        self,
        task: str,
        request: ExecRequest,
        *,
        streams: Streams,
        started: Callable[[str], None] | None = None,
    ) -> int:
        """Run a command in a running container; returns its exit code (128+n for a signal).

        `started` is told the exec's id, which `resize` takes. Cancelling kills the command.
        Raises TaskFailed with a text as a shell's when it cannot be started (`error.exit_code` is
        126 or 127) or when `streams` did not take its output (125), InvalidParameterException when
        the container is not running.
        """
        try:
            if not request.command:
                raise InvalidParameterException("no command to execute")
            _check_texts(request)
            _check_streams(streams)
            directory = request.working_directory
            if directory and not directory.startswith("/"):
                raise InvalidParameterException(f"working directory {directory} must be absolute")
            return await self._live(task).exec(request, streams, started)
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
        """Tell a terminal its new size."""
        await self._live(task).resize(rows, cols, container, exec_id)

    async def put(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        """Unpack the tar stream readable at descriptor `archive` into directory `path`."""
        async with self._live(task).root(container) as (root, id_base):
            await archives.unpack(root, path, archive, id_base)

    async def get(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None:
        """Write `path` as a tar stream to `archive`; names start with its last component."""
        async with self._live(task).root(container) as (root, id_base):
            await archives.pack(root, path, archive, id_base)

    async def stats(self, task: str) -> TaskStats:
        """Read now, from the cgroups; InvalidParameterException when the task has none any more."""
        view = self.describe(task)
        total = self._counters(names.task_cgroup(view.id), "(task)")
        if total is None:
            raise InvalidParameterException(f"task {view.id} is not running")
        containers = (
            self._counters(names.container_cgroup(view.id, c.name), c.name)
            for c in view.known.containers
        )
        each = tuple(c for c in containers if c is not None)
        supervisor = self._supervisors.get(view.id)
        return TaskStats(
            id=view.id,
            at=time.time(),
            total=total,
            containers=each,
            storage=_storage(supervisor.scene.storage if supervisor else None),
        )

    def _counters(self, cgroup: str, name: str) -> ContainerStats | None:
        found = self._node.tree.find(cgroup)
        if found is None:
            return None
        with contextlib.closing(found):
            s = found.stats()
        return ContainerStats(
            name=name,
            cpu_usage_ns=s.cpu_usage_ns,
            cpu_throttled_periods=s.cpu_throttled_periods,
            cpu_periods=s.cpu_periods,
            memory_bytes=s.memory_bytes,
            memory_peak_bytes=s.memory_peak_bytes,
            memory_max_bytes=s.memory_max_bytes,
            oom_kills=s.oom_kills,
            pids=s.pids,
        )

    # Logs -----------------------------------------------------------------------------------

    async def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """In order of time; `tail` counts records. `follow` ends when the task is STOPPED."""
        view = self.describe(task)
        logs = _Logs(self._node, view, container)
        since_ns = int((since or 0) * 1e9)
        first = (record for record in logs.read() if record.at_ns >= since_ns)
        for record in first if tail is None else _last(first, tail):
            yield record
        while follow:
            ended = self.describe(view.id).known.last_status is Status.STOPPED
            for record in logs.read():
                yield record
            if ended:
                return
            await trio.sleep(_FOLLOW_S)


def _storage(storage: Storage | None) -> StorageStats | None:
    found = usage(storage) if storage is not None else None
    if found is None:
        return None
    return StorageStats(reserved_bytes=found.size_bytes, utilized_bytes=found.used_bytes)


def _check_texts(request: ExecRequest) -> None:
    """They end in system calls, where a NUL byte would end the text."""
    texts = {
        "command": request.command,
        "user": (request.user or "",),
        "workingDirectory": (request.working_directory or "",),
        "environment": (*request.environment, *request.environment.values()),
    }
    for member, values in texts.items():
        if any("\0" in value for value in values):
            raise InvalidParameterException(f"{member} contains a NUL byte")


def _check_streams(streams: Streams) -> None:
    """One that is open for something else would never become ready, or fail only once it is used:
    a caller that had closed its stdout may hand over what has come to stand there."""
    roles = {"stdin": False, "files": False, "stdout": True, "stderr": True}
    for role, is_written in roles.items():
        descriptor: int | None = getattr(streams, role)
        if descriptor is None:
            continue
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        except OSError as error:
            raise InvalidParameterException(f"{role}: {os.strerror(error.errno or 0)}") from None
        unfit = os.O_RDONLY if is_written else os.O_WRONLY
        if flags & os.O_ACCMODE == unfit or flags & os.O_PATH:
            way = "writing" if is_written else "reading"
            raise InvalidParameterException(f"{role}: the descriptor is not open for {way}")


class _Logs:
    """The logs of a task's containers, of all their starts, merged by time."""

    def __init__(self, node: Node, view: TaskView, container: str | None) -> None:
        known = [c.name for c in view.known.containers]
        if container is not None and container not in known:
            raise NotFound(f"task {view.id} has no container {container}: {', '.join(known)}")
        chosen = [container] if container is not None else known
        self._directories = {name: node.container_dir(view.id, name) for name in chosen}
        self._tails: dict[tuple[str, int], Tail] = {}

    def read(self) -> Iterator[LogRecord]:
        """A container's starts follow each other, also where the clock was set back between."""
        self._find_starts()
        starts: defaultdict[str, list[Tail]] = defaultdict(list)
        for (name, _), tail in sorted(self._tails.items()):
            starts[name].append(tail)
        each = [chain.from_iterable(t.read() for t in tails) for tails in starts.values()]
        return heapq.merge(*each, key=lambda record: record.at_ns)

    def _find_starts(self) -> None:
        for name, directory in self._directories.items():
            with raising("readdir", str(directory)), contextlib.suppress(FileNotFoundError):
                for entry in os.listdir(directory):
                    word, _, number = entry.partition(".")
                    if word == "run" and number.isdecimal():
                        key = (name, int(number))
                        self._tails.setdefault(key, Tail(directory / entry, name))


def _last(records: Iterator[LogRecord], count: int) -> list[LogRecord]:
    kept: list[LogRecord] = []
    for record in records:
        kept.append(record)
        if len(kept) > count:
            kept.pop(0)
    return kept


def _event(rev: int, at: float, known: TaskKnown) -> Event:
    return Event(
        rev=rev,
        at=at,
        task=known.id,
        version=known.version,
        last_status=known.last_status.name,
        desired_status="STOPPED" if known.stop_code else "RUNNING",
        reason=known.stopped_reason,
    )
