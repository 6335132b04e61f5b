"""What can be watched of tasks: log records, statistics, events, progress of a pull."""

from __future__ import annotations

import msgspec

from sandbox.model.task import Record


class LogRecord(Record, frozen=True, kw_only=True):
    """A chunk as the program wrote it: never split by content, not even at line ends."""

    at_ns: int
    """Nanoseconds since the epoch."""
    container: str
    stream: str
    """"stdout", "stderr", "terminal", or "keeper" for a marker, e.g. of bytes that were dropped."""
    data: bytes


class ContainerStats(Record, frozen=True, kw_only=True):
    name: str
    cpu_usage_ns: int
    cpu_throttled_periods: int
    cpu_periods: int
    memory_bytes: int
    memory_peak_bytes: int
    memory_max_bytes: int | None
    oom_kills: int
    pids: int


class StorageStats(Record, frozen=True, kw_only=True):
    """Of a task's ephemeral storage, images included, as df in the task tells it."""

    reserved_bytes: int
    utilized_bytes: int


class TaskStats(Record, frozen=True, kw_only=True):
    """Counters since the start; `total` is the task's own cgroup, the sum of its containers."""

    id: str
    at: float
    total: ContainerStats
    containers: tuple[ContainerStats, ...]
    storage: StorageStats | None = None
    """Absent on a host that cannot limit it, and once the task has given it back."""


class Event(Record, frozen=True, kw_only=True):
    """One change of a task as the log of the store tells it."""

    rev: int
    at: float
    task: str
    version: int
    last_status: str
    desired_status: str
    reason: str | None = None


class ExecRequest(Record, frozen=True, kw_only=True):
    """A command in a running container; unset members are those of the container itself."""

    command: tuple[str, ...]
    container: str | None = None
    user: str | None = None
    working_directory: str | None = None
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    terminal: bool = False
