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

import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from sandbox.errors import KernelError, SandboxError, TaskFailed
from sandbox.kernel.slots import Slot
from sandbox.model import names
from sandbox.model.request import Streams
from sandbox.model.task import Size, Status, StopCode, TaskDesired, TaskKnown, size_of
from sandbox.runtime import ordering, steps
from sandbox.runtime.containers import Containers, close_streams
from sandbox.runtime.node import Node
from sandbox.runtime.ordering import EndCause
from sandbox.runtime.record import Record
from sandbox.runtime.steps import Scene
from sandbox.store import rows

_PULSE_S: Final = 1.0
"""How often time-outs are looked at when nothing happens."""
_RESTARTED: Final = "ResourceInitializationError: the agent was restarted"
_GIVEN_UP: Final = "the task's supervisor kept failing"


class Handover(msgspec.Struct, kw_only=True):
    """What control gives to the supervisor of a task that it accepted, and no store can keep."""

    slot: Slot
    streams: dict[str, Streams] = msgspec.field(default_factory=dict)
    progress: Callable[[str, int, int | None], None] | None = None

    def drop(self) -> None:
        """Nobody takes it; the id range stays claimed."""
        self.slot.close()
        for streams in self.streams.values():
            close_streams(streams)


class Supervisor:
    def __init__(
        self,
        node: Node,
        desired: TaskDesired,
        known: TaskKnown | None,
        handover: Handover | None,
        *,
        interrupted: str = _RESTARTED,
    ) -> None:
        """`interrupted`: why a task that is not yet RUNNING and has no handover is undone."""
        self._node = node
        self._interrupted = interrupted
        self._desired = desired
        self._is_wanted = desired.desired_status == "RUNNING"
        self._is_fresh = known is None and handover is not None
        self._changed = trio.Event()
        self._preparing: trio.CancelScope | None = None
        known = known or rows.not_yet_known(desired)
        self.record = Record(node.store, known, node.failpoints)
        self.scene = Scene(
            node=node,
            task=desired,
            slot=handover.slot if handover else None,
            progress=handover.progress if handover else None,
        )
        self.containers = Containers(
            node, self.scene, self.record, handover.streams if handover else {}, self._change
        )

    @property
    def size(self) -> Size:
        return size_of(self._desired.definition, self._desired.storage)

    def want(self, desired: TaskDesired) -> None:
        """The desired row moved."""
        self._desired = desired
        if desired.desired_status == "STOPPED" and self._is_wanted:
            self._is_wanted = False
            self.containers.hurry()
            if self._preparing is not None:
                self._preparing.cancel()
            self._change()

    async def run(self) -> None:
        """To STOPPED, unless cancelled before."""
        if self.record.known.last_status is Status.STOPPED:
            return
        async with trio.open_nursery() as self.containers.nursery:
            await self._end(await self._live())
            self.containers.nursery.cancel_scope.cancel()

    def forget(self) -> None:
        """After `run`: close whatever a cancelled one still holds."""
        self.containers.forget()
        self.scene.forget()

    async def _live(self) -> EndCause:
        """Until there is a cause to stop; failing to start is one."""
        causes: list[EndCause] = []
        try:
            return await (self._begin() if self._is_fresh else self._resume())
        except* SandboxError as group:
            if self.record.known.last_status >= Status.RUNNING:
                raise  # it runs: looking after it is tried again
            causes.append(self._startup_failure(_first(group)))
        return causes[0]

    def _startup_failure(self, error: SandboxError) -> EndCause:
        if not isinstance(error, TaskFailed):
            text = f"ResourceInitializationError: {error}"
            return EndCause(StopCode.TASK_FAILED_TO_START, text)
        if error.container is not None:
            self.record.note(error.container, reason=error.cause)
        return EndCause(StopCode.TASK_FAILED_TO_START, error.cause)

    # Begin ----------------------------------------------------------------------------------

    async def _begin(self) -> EndCause:
        self.record.save(raised_event=True)
        with trio.CancelScope() as self._preparing:
            if self._is_wanted:
                await self._prepare()
        self._preparing = None
        return await self._tend()

    async def _prepare(self) -> None:
        async with self._node.lane:
            await steps.perform(self.scene, steps.CONNECT)
        now = time.time()
        self.record.save_event(
            2, last_status=Status.PENDING, connectivity_at=now, pull_started_at=now
        )
        await steps.perform(self.scene, steps.PULL)  # others need not wait for a slow registry
        for name, made in self.scene.containers.items():
            runtime_id = names.runtime_id(self._desired.id, name)
            self.record.note(name, image_digest=made.image.digest, runtime_id=runtime_id)
        self.record.change(pull_stopped_at=time.time())
        async with self._node.lane:
            await self._make_roots()

    async def _make_roots(self) -> None:
        with trio.CancelScope(shield=True):
            await steps.perform(self.scene, steps.PIDS + steps.ROOTS)

    async def _resume(self) -> EndCause:
        """Before RUNNING what was begun is undone; from then on the containers are found again."""
        cause = self._cause_from_before()
        if not self._is_wanted:
            self.containers.hurry()
        self.containers.may_restart = self._is_wanted and cause is None
        await self.containers.find()
        self._node.failpoints.reach("found")
        return cause or await self._tend()

    def _cause_from_before(self) -> EndCause | None:
        known = self.record.known
        if known.stop_code is not None and known.stopped_reason is not None:
            return EndCause(known.stop_code, known.stopped_reason)
        if known.last_status < Status.RUNNING and self._is_wanted:
            return EndCause(StopCode.TASK_FAILED_TO_START, self._interrupted)
        return None

    # Tend -----------------------------------------------------------------------------------

    async def _tend(self) -> EndCause:
        while True:
            if (cause := self._cause_to_stop()) is None:
                await self._start_what_may()
                cause = self._cause_to_stop()
            if self._has_started(cause):
                self.record.save_event(3, last_status=Status.RUNNING, started_at=self._started_at())
            if cause is not None:
                return cause
            await self._wait_for_change()

    def _cause_to_stop(self) -> EndCause | None:
        if not self._is_wanted:
            return EndCause(
                self._desired.stop_code or StopCode.USER_INITIATED,
                self._desired.stopped_reason or "Task stopped by user",
            )
        return ordering.end_of_task(self._desired.definition, self.record.facts())

    def _has_started(self, cause: EndCause | None) -> bool:
        """For the first time; a program that ended at once has run nevertheless."""
        if self.record.known.last_status >= Status.RUNNING:
            return False
        if cause is not None and cause.code is not StopCode.ESSENTIAL_CONTAINER_EXITED:
            return False
        return ordering.is_running(self._desired.definition, self.record.facts())

    def _started_at(self) -> float:
        """With its last container; an essential one may have ended before that was noticed."""
        known = self.record.known
        starts = [c.started_at for c in known.containers if c.started_at is not None]
        ends = [known.execution_stopped_at] if known.execution_stopped_at is not None else []
        return min([max(starts), *ends])

    async def _start_what_may(self) -> None:
        definition = self._desired.definition
        for container in definition.container_definitions:
            known = self.record.container(container.name)
            if known.last_status != "PENDING" or known.name in self.record.restarting:
                continue
            verdict = ordering.may_start(definition, container.name, self.record.facts())
            if isinstance(verdict, ordering.Never):
                raise TaskFailed(verdict.reason)
            if isinstance(verdict, ordering.Ready):
                await self.containers.start(container)
                if not ordering.is_running(definition, self.record.facts()):
                    self.record.save()  # else becoming RUNNING writes it

    async def _wait_for_change(self) -> None:
        with trio.move_on_after(_PULSE_S):
            await self._changed.wait()
        self._changed = trio.Event()

    def _change(self) -> None:
        self._changed.set()

    # End ------------------------------------------------------------------------------------

    async def _end(self, cause: EndCause) -> None:
        self.record.save_event(
            4,
            stop_code=cause.code,
            stopped_reason=cause.reason,
            stopping_at=self.record.known.stopping_at or time.time(),
        )
        if self.record.live():
            self._go_on_to(Status.DEACTIVATING)  # nothing is registered anywhere yet
            self._go_on_to(Status.STOPPING)
            await self._stop_containers()
        self.record.note_never_started()
        self.record.save_event(5, last_status=Status.DEPROVISIONING)
        # Meanwhile the keepers write what is left of the logs: nothing that is undone is theirs.
        await steps.undo(self.scene, steps.EVERYTHING)
        await self.containers.leave()
        self._finish(is_undone=True)

    def _go_on_to(self, status: Status) -> None:
        """A step that raises no event; a supervisor that takes over finds it done already."""
        if self.record.known.last_status < status:
            self.record.save(last_status=status)

    async def _stop_containers(self) -> None:
        """In the reverse of their order; each when nothing that waited for it runs any more."""
        told: set[str] = set()
        async with trio.open_nursery() as nursery:
            while live := self.record.live():
                for name in live:
                    facts = self.record.facts()
                    if name not in told and ordering.may_stop(
                        self._desired.definition, name, facts
                    ):
                        told.add(name)
                        nursery.start_soon(self.containers.stop, name)
                await self._wait_for_change()
            nursery.cancel_scope.cancel()

    async def give_up(self) -> None:
        """The last resort, when `run` keeps failing: undone as far as it goes, and recorded."""
        known, is_undone = self.record.known, True
        try:
            await steps.undo(self.scene, steps.EVERYTHING)
        except ExceptionGroup as group:
            is_undone = False
            self._node.log.error("not undone", task=known.id, error=repr(group))
        self.record.note_never_started()
        for name in self.record.live():
            self.record.note(name, last_status="STOPPED", reason=_GIVEN_UP, finished_at=time.time())
        self.record.change(
            stop_code=known.stop_code or StopCode.INFRASTRUCTURE_HEALTH,
            stopped_reason=known.stopped_reason or _GIVEN_UP,
        )
        self._finish(is_undone=is_undone)

    def _finish(self, *, is_undone: bool) -> None:
        """STOPPED; only when that is in the store may another agent take the id range. It stays
        ours as long as something of it may be left."""
        self.record.save_event(6, last_status=Status.STOPPED, stopped_at=time.time())
        self.record.settle()
        if is_undone:
            try:
                self._node.ranges.release(self._desired.id_base)
            except KernelError as error:  # the next agent gives it back
                self._node.log.error("ids stay taken", task=self._desired.id, error=str(error))


def _first(group: BaseExceptionGroup[SandboxError]) -> SandboxError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
