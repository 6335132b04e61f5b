"""Stopped tasks stay visible for an hour, at most a thousand of them; then record and log go.

`run --rm` asks for less: such a task goes as soon as it is STOPPED.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import structlog
import trio

from sandbox.control.tasks import Tasks
from sandbox.errors import KernelError, NotFound
from sandbox.model.task import Status, TaskKnown, TaskView
from sandbox.store import rows
from sandbox.store.base import Store

_RESYNC_S: Final = 60.0
_RETRY_S: Final = 1.0

log = structlog.get_logger()


class Settings(Protocol):
    @property
    def stopped_tasks_kept_s(self) -> int: ...
    @property
    def stopped_tasks_kept(self) -> int: ...


def expired(
    views: Iterable[TaskView], age_s: Callable[[TaskKnown], float], kept_s: float, kept: int
) -> list[str]:
    """Ids of stopped tasks that are to be forgotten; `age_s` is how long ago one has stopped."""
    stopped = [v for v in views if v.known.last_status is Status.STOPPED]
    ages = {view.id: age_s(view.known) for view in stopped}
    stopped.sort(key=lambda view: ages[view.id])
    return [
        view.id
        for place, view in enumerate(stopped)
        if view.desired.remove or place >= kept or ages[view.id] > kept_s
    ]


class Ages:
    """How long ago tasks have stopped. What the clock of the host says of one is believed once,
    when it is first seen; from then on time passes as it does, however that clock is set."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        passing: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._passing = passing
        self._stopped: dict[str, float] = {}

    def of(self, known: TaskKnown) -> float:
        now = self._passing()
        if (stopped := self._stopped.get(known.id)) is None:
            age_s = max(0.0, self._clock() - (known.stopped_at or 0.0))
            stopped = self._stopped[known.id] = now - age_s
        return now - stopped

    def forget(self, task: str) -> None:
        self._stopped.pop(task, None)


async def serve(store: Store, tasks: Tasks, settings: Callable[[], Settings]) -> None:
    """Until cancelled. Looks after each change of a task, and once a minute."""
    ages = Ages()
    while True:
        after, again_s = store.revision, _RESYNC_S
        limits = settings()
        for task in expired(
            tasks.list(), ages.of, limits.stopped_tasks_kept_s, limits.stopped_tasks_kept
        ):
            try:
                await tasks.remove(task)
                ages.forget(task)
            except NotFound:
                continue  # somebody removed it meanwhile
            except KernelError as error:
                log.error("not removed yet", task=task, error=str(error))
                again_s = _RETRY_S
        await _wait(store, after, again_s, ages)


async def _wait(store: Store, after: int, seconds: float, ages: Ages) -> None:
    """For a stopped task that must go at once, and not longer; others are seen to have stopped."""
    with trio.move_on_after(seconds):
        async for change in store.watch(rows.TASKS, after):
            if not change.key.endswith("/known") or change.value is None:
                continue
            task = change.key.split("/")[1]
            row, known = rows.desired(store, task), rows.known(store, task)
            if row is None or known is None or known.last_status is not Status.STOPPED:
                continue
            ages.of(known)
            if row.value.remove:
                return
