"""What became of a container while there was no agent.

Its status directories say it, one for each start. The record does not: it may be older than the
last start, which is written down only after the fact, or silent about a restart that was under way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sandbox.kernel.cgroups import Cgroup
from sandbox.kernel.native import raising
from sandbox.runtime import execs
from sandbox.runtime import keeper as keepers
from sandbox.runtime.keeper import Ended, Failed, Keeper, Lost


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest start that came to be, and what became of it."""

    attempt: int
    newest: int
    """The highest number in use; that start may have come to nothing."""
    outcome: Keeper | Ended | Failed | Lost
    began_at: float


async def look(container_dir: Path, cgroup: Cgroup | None, fences: list[int]) -> Found | None:
    """None when it was never started. Execs are ended: nobody waits for them any more.

    A start that did not come to be was either the first one, or one after an end that called for
    it: then that end is what was found, and calls for it again. `fences`: see `keeper.find`.
    """
    await execs.end_all(container_dir, cgroup)
    starts = _starts(container_dir)
    if not starts:
        return None
    attempt = newest = max(starts)
    outcome = await keepers.find(container_dir / f"run.{newest}", fences)
    if isinstance(outcome, Lost) and not keepers.has_begun(container_dir / f"run.{newest}"):
        attempt = newest - 1
        before = keepers.read_exit(container_dir / f"run.{attempt}")
        if before is None:
            return None
        outcome = before
    began_at = keepers.began_at(container_dir / f"run.{attempt}")
    return Found(attempt=attempt, newest=newest, outcome=outcome, began_at=began_at)


def _starts(container_dir: Path) -> list[int]:
    with raising("readdir", str(container_dir)):
        try:
            parts = [entry.partition(".") for entry in os.listdir(container_dir)]
        except FileNotFoundError:
            return []
    return [int(number) for word, _, number in parts if word == "run" and number.isdecimal()]
