"""All supervisors: one for each task that is not STOPPED, started by what the store says.

    recover   at start: a supervisor for every task of the store, and what no task claims is swept
    begin     a supervisor for a task that control has accepted
    serve     then, for each desired row that moved, a word to its supervisor

A supervisor that raises is logged, its rows are read again, and it is started again with back-off;
after `_ATTEMPTS` the task is given up and undone. One task's failure never touches another's. Only
the loss of the store ends the agent.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import trio

from sandbox.errors import SandboxError, StoreError
from sandbox.kernel.trees import remove_tree
from sandbox.model import names
from sandbox.model.task import Size, Status, TaskDesired, TaskKnown
from sandbox.runtime.node import Node
from sandbox.runtime.storage import Footprint, footprint
from sandbox.runtime.supervisor import Handover, Supervisor
from sandbox.store import rows

_ATTEMPTS: Final = 5
_SWEEP_TIMEOUT_S: Final = 10


class Supervisors:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._live: dict[str, Supervisor] = {}
        self._nursery: trio.Nursery | None = None

    def begin(self, desired: TaskDesired, handover: Handover) -> None:
        """After that row was written; it may have moved since. The handover is taken always.

        What the store may raise is raised after the task has begun: it has a row.
        """
        if self._nursery is None:  # the agent ends: the next one undoes it
            return handover.drop()
        try:
            desired, _ = self._rows(desired.id)
        finally:
            self._start(desired, None, handover)

    def get(self, task: str) -> Supervisor | None:
        """The supervisor of a task that is not STOPPED."""
        return self._live.get(task)

    def sizes(self) -> Collection[Size]:
        """Of the tasks that have begun and are not STOPPED."""
        return [live.size for live in self._live.values()]

    def footprints(self) -> dict[str, Footprint]:
        """What these tasks take of the host's disk."""
        held = {task: live.scene.storage for task, live in self._live.items()}
        return {task: footprint(storage) for task, storage in held.items() if storage is not None}

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; ready once everything from before was taken over."""
        async with trio.open_nursery() as self._nursery:
            try:
                after = self._node.store.revision
                await self._recover()
                task_status.started()
                async for change in self._node.store.watch(rows.TASKS, after):
                    if change.key.endswith("/desired") and change.value is not None:
                        self._desire(self._node.store.value(change, TaskDesired))
            finally:
                self._nursery = None

    def _desire(self, desired: TaskDesired) -> None:
        supervisor = self._live.get(desired.id)
        if supervisor is not None:
            supervisor.want(desired)

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
                    reason = f"ResourceInitializationError: {_first(group)}"
                if supervisor.record.known.last_status is Status.STOPPED:
                    return  # all was done; by now its row may be gone
                supervisor = self._again(supervisor, reason)
            await supervisor.give_up()
        finally:
            supervisor.forget()
            self._live.pop(task, None)

    def _again(self, supervisor: Supervisor, reason: str) -> Supervisor:
        """Another one that takes over from it, as after an agent that died."""
        known = supervisor.record.known  # at least as new as what is in the store
        desired, _ = self._rows(known.id)
        again = Supervisor(self._node, desired, known, None, interrupted=reason)
        again.scene.slot, supervisor.scene.slot = supervisor.scene.slot, None
        supervisor.forget()
        self._live[again.record.known.id] = again
        return again

    def _rows(self, task: str) -> tuple[TaskDesired, TaskKnown | None]:
        desired = rows.desired(self._node.store, task)
        assert desired is not None  # control removes it only after STOPPED
        return desired.value, rows.known(self._node.store, task)

    # After an agent that ended or died ------------------------------------------------------

    async def _recover(self) -> None:
        tasks = rows.task_ids(self._node.store)
        for task in tasks:
            desired, known = self._rows(task)
            if known is None or known.last_status is not Status.STOPPED:
                self._start(desired, known, None)
        await self._sweep_cgroups(set(self._live))
        await self._sweep_directories(set(tasks))

    async def _sweep_cgroups(self, live: set[str]) -> None:
        for name in self._node.tree.names():
            task = names.task_of_cgroup(name)
            if task is None or task in live:
                continue  # a container goes with its task; and others may have put something there
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

    async def _sweep_directories(self, known: set[str]) -> None:
        for directory in self._node.tasks_dir.iterdir():
            if directory.name in known or not names.is_task_id(directory.name):
                continue
            try:
                await trio.to_thread.run_sync(remove_tree, directory)
                self._node.log.info("swept", directory=str(directory))
            except SandboxError as error:
                self._node.log.error("sweep", directory=str(directory), error=str(error))


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
