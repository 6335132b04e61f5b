"""Whether this host takes one more task. Limits, not reservations: overcommit is allowed.

RunTask never queues. Beyond what the operator set it answers with Fargate's own text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

import psutil

from sandbox.errors import InvalidParameterException
from sandbox.model.task import TaskDefinition

UNAVAILABLE: Final = (
    "Capacity is unavailable at this time. "
    "Please try again later or in a different availability zone"
)
_MIB: Final = 1 << 20
_FRESH_S: Final = 0.1
"""How old a reading may be: a task takes longer to fill its memory."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """`host_free_memory_mib` must stay free for the host; None is max(512, 5 %)."""

    max_tasks: int = 2000
    host_free_memory_mib: int | None = None
    memory: Memory = field(default_factory=lambda: Memory())

    def check(self, definition: TaskDefinition, live: int) -> None:
        """InvalidParameterException when the task cannot be taken now."""
        if live >= self.max_tasks:
            raise InvalidParameterException(UNAVAILABLE)
        total, available = self.memory.read()
        floor = self.host_free_memory_mib
        if floor is None:
            floor = max(512, total // _MIB // 20)
        if available // _MIB < floor:
            raise InvalidParameterException(UNAVAILABLE)


class Memory:
    """The host's, in bytes. Asked for each task of a burst the kernel would sum it up each time."""

    def __init__(self) -> None:
        self._read_at = -_FRESH_S
        self._found = (0, 0)

    def read(self) -> tuple[int, int]:
        """Total, and available without swapping."""
        now = time.monotonic()
        if now - self._read_at >= _FRESH_S:
            memory = psutil.virtual_memory()
            self._found, self._read_at = (memory.total, memory.available), now
        return self._found
