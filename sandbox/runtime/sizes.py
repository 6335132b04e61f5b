"""ECS's sizes as the kernel's limits. Pure."""

from __future__ import annotations

from typing import Final

from sandbox.kernel.cgroups import Limits
from sandbox.model.task import ContainerDefinition, TaskDefinition

_PERIOD_US: Final = 100_000
_MIB: Final = 1 << 20
TASK_PIDS: Final = 4096
"""Processes and threads of a task: enough for servers, finite for fork bombs."""


def task_limits(definition: TaskDefinition) -> Limits:
    """Hard for the sum of the task's containers; a task never swaps."""
    return Limits(
        cpu_quota_us=int(definition.cpu) * _PERIOD_US // 1024,
        cpu_period_us=_PERIOD_US,
        memory_max=int(definition.memory) * _MIB,
        pids_max=TASK_PIDS,
    )


def container_limits(definition: ContainerDefinition) -> Limits:
    """cpu is a weight among the task's containers, memory a limit, the reservation a guarantee."""
    reserved = definition.memory_reservation
    return Limits(
        cpu_weight=weight(definition.cpu),
        memory_max=definition.memory * _MIB if definition.memory else None,
        memory_low=reserved * _MIB if reserved else None,
    )


def weight(shares: int) -> int:
    """cgroup v2's weight (1..10000) for ECS's cpu shares (2..262144), by the kernel's convention.

    The OCI run time specification's formula; shares below 2 count as 2, as ECS's agent does it.
    """
    shares = min(max(shares, 2), 262_144)
    return 1 + (shares - 2) * 9999 // 262_142
