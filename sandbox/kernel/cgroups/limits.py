"""What is asked of a cgroup and what it answers. Plain data, the same for every kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`None` is the kernel's default: no limit, no guarantee, the weight 100."""

    cpu_quota_us: int | None = None
    cpu_period_us: int = 100_000
    cpu_weight: int | None = None
    """Version 2's scale, 1 to 10000."""
    memory_max: int | None = None
    memory_low: int | None = None
    """What reclaim leaves alone as long as it can; on version 1 the soft limit."""
    swap: bool = False
    pids_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupStats:
    """One reading. Memory includes page cache, as the limit does."""

    cpu_usage_ns: int
    cpu_periods: int
    cpu_throttled_periods: int
    memory_bytes: int
    memory_peak_bytes: int
    memory_max_bytes: int | None
    oom_kills: int
    pids: int
