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
from sandbox.model.task import Status, TaskView
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


def expired(views: Iterable[TaskView], now: float, kept_s: float, kept: int) -> list[str]:
    """Ids of stopped tasks that are to be forgotten; pure."""
    stopped = [v for v in views if v.known.last_status is Status.STOPPED]
    stopped.sort(key=lambda view: view.known.stopped_at or 0, reverse=True)
    return [
        view.id
        for place, view in enumerate(stopped)
        if view.desired.remove or place >= kept or (view.known.stopped_at or 0) < now - kept_s
    ]


async def serve(store: Store, tasks: Tasks, settings: Callable[[], Settings]) -> None:
    """Until cancelled. Looks after each change of a task, and once a minute."""
    while True:
        after, again_s = store.revision, _RESYNC_S
        now, limits = time.time(), settings()
        for task in expired(
            tasks.list(), now, limits.stopped_tasks_kept_s, limits.stopped_tasks_kept
        ):
            try:
                await tasks.remove(task)
            except NotFound:
                continue  # somebody removed it meanwhile
            except KernelError as error:
                log.error("not removed yet", task=task, error=str(error))
                again_s = _RETRY_S
        await _wait(store, after, again_s)


async def _wait(store: Store, after: int, seconds: float) -> None:
    """For a stopped task that must go at once, and not longer."""
    with trio.move_on_after(seconds):
        async for change in store.watch(rows.TASKS, after):
            if not change.key.endswith("/known") or change.value is None:
                continue
            task = change.key.split("/")[1]
            row = rows.desired(store, task)
            if row is not None and row.value.remove and rows.has_stopped(store, task):
                return
