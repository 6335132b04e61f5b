"""Tasks never fill the host's disk: before they would, the one that takes most of it is stopped.

A task's storage is a sparse file, so tasks may be promised more than the disk has. On a full disk
what was written into such a file would be lost without a word, and the agent could not write its
store. So some of the disk stays free: below that floor no task is taken, and live ones are stopped,
the largest first, at once and with a reason, until the rest fits.

What a task wrote and the kernel has not yet put into its file counts as taken: it can be no more
than the host's memory, and is only looked at when the disk has no more than that left.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from sandbox.runtime.storage import Footprint

_PERIOD_S: Final = 0.25
"""A floor of 1 GiB lasts so long against 4 GiB/s."""
_FAR_S, _FAR_BYTES = 2.0, 8 << 30
"""As long as there is so much more, looking less often will do."""
_FLOOR_BYTES: Final = 1 << 30
_MEMORY_BYTES: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_NEGLIGIBLE_BYTES: Final = 4 << 20
"""Stopping a task for less helps nobody: the disk is filled by others."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The one that the state directory is on."""

    total_bytes: int
    free_bytes: int

    @staticmethod
    def of(directory: Path) -> Disk:
        found = os.statvfs(directory)
        return Disk(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def floor(self, wanted_mib: int | None) -> int:
        """What stays free; by default a tenth of it, at most 1 GiB."""
        if wanted_mib is not None:
            return wanted_mib << 20
        return min(_FLOOR_BYTES, self.total_bytes // 10)


def largest(tasks: Mapping[str, Footprint], free_bytes: int, floor_bytes: int) -> str | None:
    """The task to stop, if any: when what is free will not cover what all have written."""
    outstanding = sum(each.outstanding_bytes for each in tasks.values())
    if not tasks or free_bytes - outstanding >= floor_bytes:
        return None
    task = max(tasks, key=lambda name: tasks[name].total_bytes)
    return task if tasks[task].total_bytes > _NEGLIGIBLE_BYTES else None


async def serve(
    directory: Path,
    floor_mib: Callable[[], int | None],
    footprints: Callable[[], Mapping[str, Footprint]],
    evict: Callable[[str, str], Awaitable[None]],
) -> None:
    """Until cancelled. `evict(task, reason)` stops a task at once; one is stopped at a time, and
    what it takes counts as free while it goes."""
    going: set[str] = set()
    period = _PERIOD_S
    while True:
        await trio.sleep(period)
        disk = Disk.of(directory)
        floor = disk.floor(floor_mib())
        spare = disk.free_bytes - _MEMORY_BYTES - floor
        period = _FAR_S if spare >= _FAR_BYTES else _PERIOD_S
        if spare >= 0:
            continue
        found = footprints()
        going &= found.keys()
        coming = sum(found[task].allocated_bytes for task in going)
        others = {task: found[task] for task in found.keys() - going}
        task = largest(others, disk.free_bytes + coming, floor)
        if task is not None:
            going.add(task)
            await evict(task, _reason(disk.free_bytes, floor, found[task]))


def _reason(free_bytes: int, floor_bytes: int, task: Footprint) -> str:
    return (
        f"The host's disk is almost full: {free_bytes >> 20} MiB are left, {floor_bytes >> 20} MiB "
        f"are to stay free, and this task takes the most, {task.total_bytes >> 20} MiB"
    )
