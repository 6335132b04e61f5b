"""Whether this host takes one more task. Limits, not reservations: overcommit is allowed.

Only memory and disk are looked at as they are: a host needs some of both for itself.

RunTask never queues. Beyond what the operator set it answers with Fargate's own text.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

import psutil

from sandbox.control.floor import Disk
from sandbox.errors import InvalidParameterException
from sandbox.kernel.native import raising
from sandbox.model.task import Size, promised

UNAVAILABLE: Final = (
    "Capacity is unavailable at this time. "
    "Please try again later or in a different availability zone"
)
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_FRESH_S: Final = 0.1
"""How old a reading may be: a task takes longer to fill its memory."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """`host_free_memory_mib` must stay free for the host; None is max(512, 5 %).

    `host_free_storage_mib` likewise of its disk; None is a tenth, at most 1024.
    `memory_overcommit`, `cpu_overcommit` and `storage_overcommit` bound the sum of all tasks'
    sizes, in hosts; None is no bound.
    """

    max_tasks: int = 2000
    host_free_memory_mib: int | None = None
    host_free_storage_mib: int | None = None
    memory_overcommit: float | None = None
    cpu_overcommit: float | None = None
    storage_overcommit: float | None = None
    memory: Memory = field(default_factory=lambda: Memory())

    def check(self, wanted: Size, live: Collection[Size], disk: Disk) -> None:
        """InvalidParameterException when the task cannot be taken now, beside the `live` ones."""
        if len(live) >= self.max_tasks or not self._has_memory():
            raise InvalidParameterException(UNAVAILABLE)
        if disk.free_bytes < disk.floor(self.host_free_storage_mib):
            raise InvalidParameterException(UNAVAILABLE)
        if self._is_overcommitted((*live, wanted), disk):
            raise InvalidParameterException(UNAVAILABLE)

    def _is_overcommitted(self, sizes: Collection[Size], disk: Disk) -> bool:
        bounds = (self.memory_overcommit, self.cpu_overcommit, self.storage_overcommit)
        if bounds == (None, None, None):
            return False
        all_of_them = promised(sizes)
        most_mib = (self.memory_overcommit or math.inf) * self.memory.read()[0] / _MIB
        most_cpu = (self.cpu_overcommit or math.inf) * 1024 * (os.cpu_count() or 1)
        most_gib = (self.storage_overcommit or math.inf) * disk.total_bytes / _GIB
        return (
            all_of_them.memory_mib > most_mib
            or all_of_them.cpu > most_cpu
            or all_of_them.storage_gib > most_gib
        )

    def _has_memory(self) -> bool:
        total, available = self.memory.read()
        floor = self.host_free_memory_mib
        if floor is None:
            floor = max(512, total // _MIB // 20)
        return available // _MIB >= floor


class Memory:
    """The host's, in bytes. Asked for each task of a burst the kernel would sum it up each time."""

    def __init__(self) -> None:
        self._read_at = -_FRESH_S
        self._found = (0, 0)

    def read(self) -> tuple[int, int]:
        """Total, and available without swapping."""
        now = time.monotonic()
        if now - self._read_at >= _FRESH_S:
            with raising("read", "/proc/meminfo"):
                memory = psutil.virtual_memory()
            self._found, self._read_at = (memory.total, memory.available), now
        return self._found
