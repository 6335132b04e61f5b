"""Whether this host takes one more task. Limits, not reservations: overcommit is allowed.

RunTask never queues. Beyond what the operator set it answers with Fargate's own text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil

from sandbox.errors import InvalidParameterException
from sandbox.model.task import TaskDefinition

UNAVAILABLE: Final = (
    "Capacity is unavailable at this time. "
    "Please try again later or in a different availability zone"
)
_MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """`host_free_memory_mib` must stay free for the host; None is max(512, 5 %)."""

    max_tasks: int = 2000
    host_free_memory_mib: int | None = None

    def check(self, definition: TaskDefinition, live: int) -> None:
        """InvalidParameterException when the task cannot be taken now."""
        if live >= self.max_tasks:
            raise InvalidParameterException(UNAVAILABLE)
        memory = psutil.virtual_memory()
        floor = self.host_free_memory_mib
        if floor is None:
            floor = max(512, memory.total // _MIB // 20)
        if memory.available // _MIB < floor:
            raise InvalidParameterException(UNAVAILABLE)
