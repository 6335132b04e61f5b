"""All supervisors: one for each task that is not STOPPED, started by what the store says.

    recover   at start: a supervisor for every task of the store, and what no task claims is swept
    serve     then, for each new desired row, a supervisor; for each moved one, a word to it

A supervisor that raises is logged, its rows are read again, and it is started again with back-off;
after `_ATTEMPTS` the task is given up and undone. One task's failure never touches another's. Only
the loss of the store ends the agent.
"""

from __future__ import annotations

import shutil
import time
from typing import Final

import msgspec
import trio

from sandbox.errors import SandboxError, StoreError
from sandbox.model.task import Status, StopCode, TaskDesired, TaskKnown
from sandbox.runtime import steps
from sandbox.runtime.containers import close_streams
from sandbox.runtime.node import Node
from sandbox.runtime.steps import Scene
from sandbox.runtime.supervisor import Handover, Supervisor
from sandbox.store import rows

_ATTEMPTS: Final = 5
_SWEEP_TIMEOUT_S: Final = 10


class Supervisors:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._live: dict[str, Supervisor] = {}
        self._handovers: dict[str, Handover] = {}
        self._nursery: trio.Nursery | None = None

    def hand_over(self, task: str, handover: Handover) -> None:
        """Before the desired row is written; `take_back` when writing it failed."""
        self._handovers[task] = handover

    def take_back(self, task: str) -> None:
        handover = self._handovers.pop(task, None)
        if handover is not None:
            handover.slot.close()
            for streams in handover.streams.values():
                close_streams(streams)

    def get(self, task: str) -> Supervisor | None:
        """The supervisor of a task that is not STOPPED."""
        return self._live.get(task)

    def __len__(self) -> int:
        return len(self._live)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; ready once everything from before was taken over."""
        async with trio.open_nursery() as self._nursery:
            after = self._node.store.revision
            await self._recover()
            task_status.started()
            async for change in self._node.store.watch(rows.TASKS, after):
                if change.key.endswith("/desired") and change.value is not None:
                    self._desire(msgspec.json.decode(change.value, type=TaskDesired))

    def _desire(self, desired: TaskDesired) -> None:
        supervisor = self._live.get(desired.id)
        if supervisor is not None:
            supervisor.want(desired)
        elif desired.id in self._handovers:
            self._start(desired, None, self._handovers.pop(desired.id))

    def _start(
        self, desired: TaskDesired, known: TaskKnown | None, handover: Handover | None
    ) -> None:
        supervisor = Supervisor(self._node, desired, known, handover)
        self._live[desired.id] = supervisor
        assert self._nursery is not None
        self._nursery.start_soon(self._supervise, supervisor)

    async def _supervise(self, supervisor: Supervisor) -> None:
        task = supervisor.record.known.id
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    return await supervisor.run()
                except* StoreError:
                    raise
                except* Exception as group:
                    self._node.log.exception("supervisor failed", task=task, error=repr(group))
                    await trio.sleep(2**attempt * 0.05)
                supervisor = self._again(supervisor)
            await self._give_up(supervisor)
        finally:
            supervisor.forget()
            self._live.pop(task, None)

    def _again(self, supervisor: Supervisor) -> Supervisor:
        desired, known = self._rows(supervisor.record.known.id)
        again = Supervisor(self._node, desired, known or supervisor.record.known, None)
        again.scene.slot, supervisor.scene.slot = supervisor.scene.slot, None
        supervisor.forget()
        self._live[again.record.known.id] = again
        return again

    def _rows(self, task: str) -> tuple[TaskDesired, TaskKnown | None]:
        desired = rows.desired(self._node.store, task)
        assert desired is not None  # control removes it only after STOPPED
        return desired.value, rows.known(self._node.store, task)

    async def _give_up(self, supervisor: Supervisor) -> None:
        """The last resort: undone by its names, and recorded."""
        try:
            await steps.undo(Scene(node=self._node, task=supervisor.scene.task), steps.EVERYTHING)
        except ExceptionGroup as group:
            self._node.log.error("give up", task=supervisor.record.known.id, error=repr(group))
        known = msgspec.structs.replace(
            supervisor.record.known,
            last_status=Status.STOPPED,
            stop_code=supervisor.record.known.stop_code or StopCode.INFRASTRUCTURE_HEALTH,
            stopped_reason=supervisor.record.known.stopped_reason
            or "the task's supervisor kept failing",
            stopped_at=time.time(),
        )
        await self._node.store.txn({rows.known_key(known.id): known}, durable=False)

    # After an agent that ended or died ------------------------------------------------------

    async def _recover(self) -> None:
        tasks = rows.task_ids(self._node.store)
        for task in tasks:
            desired, known = self._rows(task)
            if known is None or known.last_status is not Status.STOPPED:
                self._start(desired, known, None)
        await self._sweep_cgroups(set(self._live))
        self._sweep_directories(set(tasks))

    async def _sweep_cgroups(self, live: set[str]) -> None:
        for name in self._node.tree.names():
            if "/" in name or name.removeprefix("task-") in live:
                continue  # a container goes with its task
            cgroup = self._node.tree.find(name)
            if cgroup is None:
                continue
            try:
                cgroup.kill()
                await cgroup.wait_empty(_SWEEP_TIMEOUT_S)
                cgroup.remove()
                self._node.log.info("swept", cgroup=name)
            except SandboxError as error:
                self._node.log.error("sweep", cgroup=name, error=str(error))
            finally:
                cgroup.close()

    def _sweep_directories(self, known: set[str]) -> None:
        for directory in self._node.tasks_dir.iterdir():
            if directory.name not in known:
                shutil.rmtree(directory, ignore_errors=True)
                self._node.log.info("swept", directory=str(directory))
