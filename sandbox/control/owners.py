"""Tasks that must not outlive the process that ran them: `sandbox run`, `open_sandbox`.

While an agent lives, the control socket sees its clients go, and an embedded agent leaves in order.
This is for the time after an agent that was killed: whoever owns a task that it left is watched,
and the task is stopped when its owner ends, or has ended already.

An owner is named by the boot, its pid and its start time: pids are used again, and mean nothing
after a reboot.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from sandbox.errors import NotFound
from sandbox.kernel.processes import open_process, start_time
from sandbox.store import rows
from sandbox.store.base import Store

OWNER_GONE: Final = "The process that ran the task is gone"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def name(client: str) -> str:
    """The owner's name for BOOT:PID, as which the faces know their clients."""
    pid = int(client.rpartition(":")[2])
    return f"{client}:{start_time(pid) or 0}"


async def serve(store: Store, stop: Callable[..., Awaitable[Any]]) -> None:
    """For the tasks that are there now; ends with the last owner. `stop` is that of `Tasks`."""
    async with trio.open_nursery() as nursery:
        for owner, tasks in _owned(store).items():
            nursery.start_soon(_watch, owner, tasks, store, stop)


def _owned(store: Store) -> Mapping[str, Sequence[str]]:
    owned = defaultdict(list)
    for task in rows.task_ids(store):
        row = rows.desired(store, task)
        if row is not None and row.value.owner is not None and not rows.has_stopped(store, task):
            owned[row.value.owner].append(task)
    return owned


async def _watch(
    owner: str, tasks: Sequence[str], store: Store, stop: Callable[..., Awaitable[Any]]
) -> None:
    await _until_gone(owner)
    for task in tasks:
        if not rows.has_stopped(store, task):
            with contextlib.suppress(NotFound):  # removed meanwhile
                await stop(task, reason=OWNER_GONE)


async def _until_gone(owner: str) -> None:
    boot, pid, started = owner.split(":")
    if boot != _BOOT_ID.read_text().strip():
        return
    process = open_process(int(pid), int(started))
    if process is None:
        return
    try:
        await trio.lowlevel.wait_readable(process)
    finally:
        os.close(process)
