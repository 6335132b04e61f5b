"""One task, from PROVISIONING to STOPPED.

A supervisor alone writes its task's `known` row. It never decides: `runtime.ordering` says which
container may move now, `runtime.steps` how things are made and undone, the `desired` row what is
wanted. Here is only the waiting in between:

    begin    steps, then start what may start, RUNNING when all have
    resume   after an agent died: find the keepers again, or learn how they ended
    tend     until there is a cause to stop: something essential ended, or it is wanted
    end      write the cause, stop in order, undo the steps, STOPPED

Cancelling a supervisor means "stop watching": containers run on, and the next agent resumes. The
steps and the undoing are shielded, so that a cancellation falls between them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import trio

from sandbox.errors import InvalidParameterException, KernelError, SandboxError, TaskFailed
from sandbox.images.documents import Image, ImageConfig
from sandbox.kernel import mounts, native
from sandbox.kernel.slots import Slot
from sandbox.model import names
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import (
    ContainerDefinition,
    ContainerKnown,
    Status,
    StopCode,
    TaskDesired,
    TaskKnown,
)
from sandbox.runtime import execs, health, ordering, steps
from sandbox.runtime import keeper as keepers
from sandbox.runtime.container import Place, VolumeMount, choose_limits, compile_container
from sandbox.runtime.keeper import Ended, Failed, Keeper, Lost, StartFailed
from sandbox.runtime.node import Node
from sandbox.runtime.ordering import EndCause, Facts
from sandbox.runtime.steps import ContainerScene, Scene
from sandbox.store import rows

DEFAULT_STOP_TIMEOUT_S: Final = 30
_OOM_REASON: Final = "OutOfMemoryError: Container killed due to memory usage"
_LOST_REASON: Final = "ContainerRuntimeError: the keeper was killed, how it ended is unknown"
_PULSE_S: Final = 1.0
"""How often time-outs are looked at when nothing happens."""


class Handover(msgspec.Struct, kw_only=True):
    """What control gives to the supervisor of a task that it accepted, and no store can keep."""

    slot: Slot
    streams: dict[str, Streams] = msgspec.field(default_factory=dict)
    progress: Callable[[str, int, int | None], None] | None = None


class Supervisor:
    def __init__(
        self, node: Node, desired: TaskDesired, known: TaskKnown | None, handover: Handover | None
    ) -> None:
        self._node = node
        self._desired = desired
        self._is_fresh = known is None and handover is not None
        self.known = known or rows.not_yet_known(desired)
        self._streams = dict(handover.streams) if handover else {}
        self.scene = Scene(
            node=node,
            task=desired,
            slot=handover.slot if handover else None,
            progress=handover.progress if handover else None,
        )
        self.keepers: dict[str, Keeper] = {}
        self._execs: dict[str, Keeper] = {}
        self._restarting: set[str] = set()
        self._told_to_stop: set[str] = set()
        self._changed = trio.Event()
        self._preparing: trio.CancelScope | None = None
        self._is_wanted = desired.desired_status == "RUNNING"

    # What others may say ----------------------------------------------------------------

    def want(self, desired: TaskDesired) -> None:
        """The desired row moved."""
        self._desired = desired
        if desired.desired_status == "STOPPED" and self._is_wanted:
            self._is_wanted = False
            if self._preparing is not None:
                self._preparing.cancel()
            self._change()

    def container(self, name: str) -> ContainerKnown:
        return next(c for c in self.known.containers if c.name == name)

    def is_stopping(self) -> bool:
        return self.known.stop_code is not None

    # What is asked of live containers ------------------------------------------------------

    def _chosen(self, container: str | None) -> str:
        """The named container, else the first essential one; it must be running."""
        definitions = self._desired.definition.container_definitions
        if container is None:
            container = next((d.name for d in definitions if d.essential), definitions[0].name)
        if container not in self.keepers:
            raise InvalidParameterException(f"container {container} is not running")
        return container

    def signal(self, number: int, container: str | None) -> None:
        """To the container's first process. One that has just ended is no error."""
        self.keepers[self._chosen(container)].signal(number)

    async def exec(
        self, request: ExecRequest, streams: Streams, started: Callable[[str], None] | None
    ) -> int:
        target = self._target(self._chosen(request.container))
        return await execs.run(target, request, streams, self._execs, started)

    def resize(self, rows: int, cols: int, container: str | None, exec_id: str | None) -> None:
        keeper = self._execs.get(exec_id) if exec_id else self.keepers[self._chosen(container)]
        if keeper is None:
            raise InvalidParameterException(f"no exec {exec_id} is running")
        keeper.resize(rows, cols)

    @contextlib.contextmanager
    def root(self, container: str | None) -> Iterator[tuple[int, int]]:
        """The container's root as a descriptor, and the first id of its range."""
        keeper = self.keepers[self._chosen(container)]
        fd = keeper.open_root()
        try:
            yield fd, self._desired.id_base
        finally:
            os.close(fd)

    def _config(self, name: str) -> ImageConfig:
        made = self.scene.containers.get(name)
        return made.image.config if made else self._stored_image(name).config

    def _stored_image(self, name: str) -> Image:
        return self._node.images.find(self.container(name).image_digest or "")

    def _target(self, name: str) -> execs.Target:
        hostname = self.scene.interface.hostname if self.scene.interface else None
        return execs.Target(
            self._node,
            self._desired.id,
            self._desired.id_base,
            self.scene.definition(name),
            self._config(name),
            self.keepers[name],
            hostname or self._desired.id[:12],
        )

    # The life of the task ----------------------------------------------------------------

    async def run(self) -> None:
        if self.known.last_status is Status.STOPPED:
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._end(await self._live())
            nursery.cancel_scope.cancel()

    async def _live(self) -> EndCause:
        """Until there is a cause to stop; failing to start is one."""
        causes: list[EndCause] = []
        try:
            return await (self._begin() if self._is_fresh else self._resume())
        except* SandboxError as group:
            causes.append(_startup_failure(_first(group)))
        return causes[0]

    async def _begin(self) -> EndCause:
        await self._save()
        with trio.CancelScope() as self._preparing:
            if self._is_wanted:
                async with self._node.lane:
                    await self._prepare()
        self._preparing = None
        return await self._tend()

    async def _prepare(self) -> None:
        await steps.perform(self.scene, steps.CONNECT)
        now = time.time()
        await self._save(
            last_status=Status.PENDING, version=2, connectivity_at=now, pull_started_at=now
        )
        await steps.perform(self.scene, steps.PULL)
        digests = {name: made.image.digest for name, made in self.scene.containers.items()}
        for name, digest in digests.items():
            self._note(
                name, image_digest=digest, runtime_id=names.runtime_id(self._desired.id, name)
            )
        self.known = msgspec.structs.replace(self.known, pull_stopped_at=time.time())
        with trio.CancelScope(shield=True):
            await steps.perform(self.scene, steps.ROOTS)

    async def _resume(self) -> EndCause:
        """Before RUNNING what was begun is undone; from then on the containers are found again."""
        if self.known.stop_code is not None and self.known.stopped_reason is not None:
            cause = EndCause(self.known.stop_code, self.known.stopped_reason)
        elif self.known.last_status < Status.RUNNING and self._is_wanted:
            return EndCause(
                StopCode.TASK_FAILED_TO_START,
                "ResourceInitializationError: the agent was restarted",
            )
        else:
            cause = None
        for container in self.known.containers:
            if container.last_status == "RUNNING":
                await self._find(container)
        return cause or await self._tend()

    async def _find(self, container: ContainerKnown) -> None:
        found = keepers.find(self._status_dir(container.name, container.attempt))
        if isinstance(found, Keeper):
            self._take_slot_from(found)
            self._attend_to(container.name, found)
        else:
            await self._after_end(container.name, found, None)

    def _take_slot_from(self, keeper: Keeper) -> None:
        """A keeper holds the task's namespaces: another start of a container needs them."""
        if self.scene.slot is None and (held := keeper.namespaces()) is not None:
            self.scene.slot = Slot(*held, self._desired.id_base)

    async def _tend(self) -> EndCause:
        while True:
            if (cause := self._cause_to_stop()) is not None:
                return cause
            await self._start_what_may()
            if ordering.is_running(self._desired.definition, self._facts()):
                await self._become_running()
            if (cause := self._cause_to_stop()) is not None:
                return cause
            await self._wait_for_change()

    def _cause_to_stop(self) -> EndCause | None:
        if not self._is_wanted:
            return EndCause(
                self._desired.stop_code or StopCode.USER_INITIATED,
                self._desired.stopped_reason or "Task stopped by user",
            )
        return ordering.end_of_task(self._desired.definition, self._facts())

    async def _start_what_may(self) -> None:
        for definition in self._desired.definition.container_definitions:
            if self.container(definition.name).last_status != "PENDING":
                continue
            verdict = ordering.may_start(self._desired.definition, definition.name, self._facts())
            if isinstance(verdict, ordering.Never):
                raise TaskFailed(verdict.reason)
            if isinstance(verdict, ordering.Ready):
                await self._start(definition)

    async def _become_running(self) -> None:
        if self.known.last_status < Status.RUNNING:
            await self._save(last_status=Status.RUNNING, version=3, started_at=time.time())

    async def _wait_for_change(self) -> None:
        with trio.move_on_after(_PULSE_S):
            await self._changed.wait()
        self._changed = trio.Event()

    def _change(self) -> None:
        self._changed.set()

    # Containers -----------------------------------------------------------------------------

    async def _start(self, definition: ContainerDefinition) -> None:
        name = definition.name
        self._node.failpoints.reach("keeper.do")
        attempt = self.container(name).attempt
        try:
            keeper = await self._launch(definition, attempt)
        except StartFailed as error:
            self._record_failure(name, error)
            return
        self._node.failpoints.reach("keeper.done")
        self._note(
            name,
            last_status="RUNNING",
            keeper=keeper.identity,
            started_at=time.time(),
            lowered=self.scene.containers[name].limits.lowered,
        )
        if not ordering.is_running(self._desired.definition, self._facts()):
            await self._save()  # else becoming RUNNING writes it
        self._attend_to(name, keeper)

    def _attend_to(self, name: str, keeper: Keeper) -> None:
        self.keepers[name] = keeper
        self._nursery.start_soon(self._attend, name, keeper)

    async def _launch(self, definition: ContainerDefinition, attempt: int) -> Keeper:
        made = self.scene.containers[definition.name]
        streams = self._streams.pop(definition.name, None)
        volumes: list[VolumeMount] = []
        try:
            volumes.extend(self._volumes(definition))
            program = compile_container(
                definition,
                made.image.config,
                self._place(definition, tuple(volumes)),
                user=made.user,
                limits=made.limits,
                streams=streams,
            )
            directory = self._status_dir(definition.name, attempt)
            return await keepers.start(program, binary=self._node.keeper, status_dir=directory)
        finally:
            for volume in volumes:
                os.close(volume.descriptor)
            if made.root is not None:
                os.close(made.root)
                made.root = None
            close_streams(streams)

    def _place(self, definition: ContainerDefinition, volumes: tuple[VolumeMount, ...]) -> Place:
        made, scene = self.scene.containers[definition.name], self.scene
        assert made.cgroup and made.root is not None and scene.slot and scene.interface
        return Place(
            userns=scene.slot.userns_fd,
            netns=scene.slot.netns_fd,
            pidns=None,
            id_base=self._desired.id_base,
            cgroup=made.cgroup.directory_fd,
            tasks_files=made.cgroup.tasks_fds,
            root=made.root,
            volumes=volumes,
            hostname=scene.interface.hostname,
            hosts=scene.interface.hosts,
            resolv_conf=scene.interface.resolv_conf,
            region=self._node.place.region,
        )

    def _volumes(self, definition: ContainerDefinition) -> list[VolumeMount]:
        wanted = {m.container_path: (m.source_volume, m.read_only) for m in definition.mount_points}
        for origin in definition.volumes_from:
            for m in self.scene.definition(origin.source_container).mount_points:
                read_only = m.read_only or origin.read_only
                wanted.setdefault(m.container_path, (m.source_volume, read_only))
        directory = self._node.task_dir(self._desired.id) / "volumes"
        opened: list[VolumeMount] = []
        for path, (volume, read_only) in wanted.items():
            fd = native.openat2(
                native.AT_FDCWD, str(directory / volume), os.O_PATH | os.O_DIRECTORY
            )
            try:
                copy = mounts.clone(fd)
            finally:
                os.close(fd)
            opened.append(VolumeMount(descriptor=copy, path=path, read_only=read_only))
        return opened

    def _status_dir(self, name: str, attempt: int) -> Path:
        return self._node.container_dir(self._desired.id, name) / f"run.{attempt}"

    async def _attend(self, name: str, keeper: Keeper) -> None:
        """One start of a container: its health while it runs, its end, then perhaps another."""
        async with trio.open_nursery() as nursery:
            check = self.scene.definition(name).health_check
            if check is not None:
                nursery.start_soon(health.watch, check, self._target(name), self._hear(name))
            end = await keeper.wait()
            nursery.cancel_scope.cancel()
        await self._after_end(name, end, keeper)
        self._change()

    async def _after_end(
        self, name: str, end: Ended | Failed | Lost, keeper: Keeper | None
    ) -> None:
        again = self._shall_restart(name, end)
        if again:
            self._restarting.add(name)
        self._record_end(name, end)
        if again:
            await self._restart(name, keeper)
            self._restarting.discard(name)

    def _hear(self, name: str) -> Callable[[health.Verdict], Awaitable[None]]:
        async def hear(verdict: health.Verdict) -> None:
            since = self.container(name).health_since
            if verdict.health != self.container(name).health:
                since = time.time()
            self._note(
                name, health=verdict.health, health_since=since, health_output=verdict.output
            )
            overall = ordering.task_health(
                self._desired.definition, {c.name: c.health for c in self.known.containers}
            )
            await self._save(health=overall)
            self._change()

        return hear

    def _shall_restart(self, name: str, end: Ended | Failed | Lost) -> bool:
        policy = self.scene.definition(name).restart_policy
        began = self.container(name).started_at or time.time()
        stopping = self.is_stopping() or not self._is_wanted
        return isinstance(end, Ended) and ordering.should_restart(
            policy, exit_code=end.exit_code, ran_s=end.at - began, stopping=stopping
        )

    async def _restart(self, name: str, keeper: Keeper | None) -> None:
        """In place: the same writable layer, a new program, its log beside the first one's."""
        self.kill_container(name)
        if keeper is not None:
            await keeper.wait_gone()
            del self.keepers[name]
            keeper.close()
        known = self.container(name)
        definition = self.scene.definition(name)
        try:
            await self._again_in_place(definition)
        except SandboxError as error:
            self._note(name, reason=f"CannotStartContainerError: {error}")
            return
        self._note(
            name,
            last_status="PENDING",
            attempt=known.attempt + 1,
            exit_code=None,
            finished_at=None,
            reason=None,
        )
        await self._start(definition)

    async def _again_in_place(self, definition: ContainerDefinition) -> None:
        """What an agent that did not make the task must first find again."""
        if definition.name not in self.scene.containers:
            limits = choose_limits(definition.ulimits, may_raise=self._node.may_raise_limits)
            image = self._stored_image(definition.name)
            self.scene.containers[definition.name] = ContainerScene(image=image, limits=limits)
        if self.scene.interface is None and self.scene.slot is not None:
            await steps.perform(self.scene, steps.NETWORK)
        await steps.make_root(self.scene, definition)

    def _record_end(self, name: str, end: Ended | Failed | Lost) -> None:
        oom = self._was_oom_killed(name)
        match end:
            case Ended():
                reason = _OOM_REASON if oom else None
                self._note(
                    name,
                    last_status="STOPPED",
                    exit_code=end.exit_code,
                    reason=reason,
                    finished_at=end.at,
                )
            case Failed():
                text = f"CannotStartContainerError: {os.strerror(end.errno)}"
                self._note(name, last_status="STOPPED", reason=text, finished_at=end.at)
            case Lost():
                self._note(
                    name, last_status="STOPPED", reason=_LOST_REASON, finished_at=time.time()
                )
        if self.known.execution_stopped_at is None and self.scene.definition(name).essential:
            finished = self.container(name).finished_at
            self.known = msgspec.structs.replace(self.known, execution_stopped_at=finished)

    def _record_failure(self, name: str, error: StartFailed) -> None:
        reason, code = start_failure(error)
        self._note(
            name, last_status="STOPPED", reason=reason, exit_code=code, finished_at=time.time()
        )
        self._change()

    def _was_oom_killed(self, name: str) -> bool:
        made = self.scene.containers.get(name)
        cgroup = made.cgroup if made else None
        try:
            if cgroup is not None:
                return cgroup.oom_kills() > 0
            found = self._node.tree.find(names.container_cgroup(self._desired.id, name))
            if found is None:
                return False
            try:
                return found.oom_kills() > 0
            finally:
                found.close()
        except KernelError:
            return False

    # Stopping -------------------------------------------------------------------------------

    async def _end(self, cause: EndCause) -> None:
        now = time.time()
        await self._save(
            last_status=max(self.known.last_status, Status.DEACTIVATING)
            if self.known.started_at
            else max(self.known.last_status, Status.STOPPING),
            version=max(self.known.version + 1, 4),
            stop_code=cause.code,
            stopped_reason=cause.reason,
            stopping_at=self.known.stopping_at or now,
        )
        await self._stop_containers()
        await self._save(last_status=Status.DEPROVISIONING, version=max(self.known.version + 1, 5))
        await self._let_keepers_finish()
        await self._undo()
        for streams in self._streams.values():
            close_streams(streams)
        self._streams.clear()
        await self._save(
            last_status=Status.STOPPED,
            version=max(self.known.version + 1, 6),
            stopped_at=time.time(),
        )

    async def _stop_containers(self) -> None:
        async with trio.open_nursery() as nursery:
            while live := [c.name for c in self.known.containers if c.last_status == "RUNNING"]:
                for name in live:
                    if name not in self._told_to_stop and ordering.may_stop(
                        self._desired.definition, name, self._facts()
                    ):
                        self._told_to_stop.add(name)
                        nursery.start_soon(self._stop_container, name)
                await self._wait_for_change()
            nursery.cancel_scope.cancel()

    async def _stop_container(self, name: str) -> None:
        definition = self.scene.definition(name)
        keeper = self.keepers.get(name)
        if keeper is not None and keeper.signal(self._config(name).stop_signal):
            await trio.sleep(definition.stop_timeout or DEFAULT_STOP_TIMEOUT_S)
        self.kill_container(name)

    def kill_container(self, name: str) -> None:
        """Everything in the container's cgroup, at once."""
        cgroup = self._node.tree.find(names.container_cgroup(self._desired.id, name))
        if cgroup is not None:
            try:
                cgroup.kill()
            finally:
                cgroup.close()

    async def _let_keepers_finish(self) -> None:
        """Output is passed on to the clients in full, as long as they are there to take it."""
        for keeper in self.keepers.values():
            with trio.move_on_after(0 if not self._is_wanted else float("inf")):
                await keeper.wait_gone()
                continue
            keeper.detach()
            with trio.move_on_after(10):
                await keeper.wait_gone()
                continue
            keeper.kill()
            await keeper.wait_gone()

    async def _undo(self) -> None:
        try:
            await steps.undo(self.scene, steps.EVERYTHING)
        except ExceptionGroup as group:
            self._node.log.error(
                "undo", task=self._desired.id, errors=[str(e) for e in group.exceptions]
            )
        for keeper in self.keepers.values():
            keeper.close()
        self.keepers.clear()
        self._node.ranges.release(self._desired.id_base)

    # The record ---------------------------------------------------------------------------------

    def _facts(self) -> Mapping[str, Facts]:
        now = time.time()
        return {
            c.name: Facts(
                started=c.started_at is not None,
                ended=c.last_status == "STOPPED" and c.name not in self._restarting,
                exit_code=c.exit_code,
                health=c.health,
                reason=c.reason,
                age_s=now - (c.started_at or now),
            )
            for c in self.known.containers
        }

    def _note(self, name: str, **changes: object) -> None:
        self.known = msgspec.structs.replace(
            self.known,
            containers=tuple(
                msgspec.structs.replace(c, **changes) if c.name == name else c
                for c in self.known.containers
            ),
        )

    async def _save(self, **changes: object) -> None:
        """Facts of this host survive a kill of the agent; a power cut ends the task anyway."""
        self.known = msgspec.structs.replace(self.known, **changes)
        await self._node.store.txn({rows.known_key(self.known.id): self.known}, durable=False)


def close_streams(streams: Streams | None) -> None:
    if streams is not None:
        for fd in {streams.stdin, streams.stdout, streams.stderr} - {None}:
            os.close(fd)  # type: ignore[arg-type]


def start_failure(error: StartFailed) -> tuple[str, int | None]:
    """ECS's text for a container that could not be started, and a shell's exit code for it."""
    if not error.is_exec:
        return f"CannotStartContainerError: {error}", None
    program = f'CannotStartContainerError: exec: "{error.subject}"'
    match error.errno:
        case 2:
            return f"{program}: executable file not found in $PATH", 127
        case 13:
            return f"{program}: permission denied", 126
        case _:
            return (
                f"{program}: {os.strerror(error.errno).lower()}",
                126,
            )


def _startup_failure(error: SandboxError) -> EndCause:
    text = error.cause if isinstance(error, TaskFailed) else f"ResourceInitializationError: {error}"
    return EndCause(StopCode.TASK_FAILED_TO_START, text)


def _first(group: BaseExceptionGroup[SandboxError]) -> SandboxError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
