"""What tasks could leave behind: compared before and after many of them.

Unlike the tests' own check (tests/leaks.py) this looks only at what belongs to one agent that is
embedded in this process, so that it can be believed on a machine that does other things too.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import trio

SETTLES_S = 10.0
"""The kernel takes cgroups and namespaces down later than it is asked to."""


def seen(state_dir: Path) -> Counter[str]:
    """Everything, named so that a number which differs from task to task does not matter."""
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        found.update(f"process {name_of(pid)}" for pid in (task / "children").read_text().split())
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the descriptor that listed the directory
        found[f"descriptor of {re.sub('[0-9a-f]{8,}|[0-9]+', 'N', target)}"] += 1
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found.update(f"mount {mount[4]}" for mount in mounts)
    instance = json.loads((state_dir / "instance").read_bytes())["instance"]
    for top in [Path(m[4]) for m in mounts if m[m.index("-") + 1].startswith("cgroup")]:
        for directory, _, _ in os.walk(top / f"sandbox-{instance}"):
            found[f"cgroup {directory}"] += 1
    found.update(f"directory {path}" for path in (state_dir / "tasks").iterdir())
    return found


async def left_since(before: Counter[str], state_dir: Path) -> list[str]:
    """What has come and does not go."""
    with trio.move_on_after(SETTLES_S):
        while seen(state_dir) - before:
            await trio.sleep(0.1)
    return sorted((seen(state_dir) - before).elements())


def name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "(gone)"
