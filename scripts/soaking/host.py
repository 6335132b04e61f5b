"""What the kernel says of live tasks, whoever says what about them."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

from tests.leaks import cgroup_roots

SIZE = 65536


def ids_of_tasks(instance: str) -> dict[str, set[int]]:
    """The first host id of each process of each task, by the task's cgroup."""
    found: dict[str, set[int]] = {}
    for root in cgroup_roots():
        for task in (root / f"sandbox-{instance}").glob("task-*"):
            bases = found.setdefault(task.name.removeprefix("task-"), set())
            for directory, _, _ in os.walk(task):  # which does not mind one that goes meanwhile
                pids = members(Path(directory, "cgroup.procs"))
                bases |= {base for pid in pids if (base := first_id(pid))}
    return found


def members(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []  # it went meanwhile


def first_id(pid: str) -> int | None:
    """None for one that has not entered its user namespace yet, or has ended."""
    try:
        inside, base, count = Path(f"/proc/{pid}/uid_map").read_text().split()
    except (OSError, ValueError):
        return None
    return int(base) if (inside, int(count)) == ("0", SIZE) else None


def mixed_up(tasks: dict[str, set[int]]) -> set[str]:
    """Tasks that share ids, and those whose processes have not all the same."""
    wrong = {f"task {task} has ids from {sorted(b)}" for task, b in tasks.items() if len(b) > 1}
    return wrong | {
        f"tasks {one} and {other} share the ids from {sorted(tasks[one] & tasks[other])}"
        for one, other in combinations(sorted(tasks), 2)
        if tasks[one] & tasks[other]
    }
