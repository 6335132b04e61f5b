"""What Sandbox could leave on a host, as names that a person can look up.

Of the whole host, for a comparison of before and after; and of one state directory, whose agent has
ended and had no task. Nothing here asks the product: the kernel and the file system are asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from sandbox.kernel.idranges import CLAIMS

OURS = re.compile(r"sandbox|sb[0-9a-f]{4}")
"""Every name that Sandbox gives a kernel object begins so (instance ids are 4 hex digits)."""

TASKS_UNIT = "/system.slice/sandbox-tasks.service"
"""Where trees stand on a machine that scripts/provision prepared."""


def snapshot() -> dict[str, set[str]]:
    """Everything that Sandbox could leave on a host, as names a person can look up."""
    return {
        "link": links(),
        "mount": mounts(),
        "cgroup": cgroups(),
        "process": processes(),
        "descriptor": descriptors(),
        "network namespace": names_in("/run/netns"),
        "loop device": loop_devices(),
    }


def names_in(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def links() -> set[str]:
    return {name for name in names_in("/sys/class/net") if OURS.match(name)}


def mounts() -> set[str]:
    # Not the mount ids: a namespace that is left and entered again gets new ones.
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {f"{field[4]} ({field[3]} of {field[field.index('-') + 1]})" for field in fields}


def cgroups() -> set[str]:
    """Directories of ours in any hierarchy, and everything below them."""
    found = set()
    for top in cgroup_roots():
        for first in top.iterdir():
            if OURS.match(first.name) and first.is_dir():
                found |= {directory for directory, _, _ in os.walk(first)}
    return found


def cgroup_roots() -> list[Path]:
    """Mount points of all hierarchies and, under them, the places of this process and of tasks."""
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tops = [Path(f[4]) for f in fields if f[f.index("-") + 1] in ("cgroup", "cgroup2")]
    own = {line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    places = {top / path.lstrip("/") for top in tops for path in own | {"/", TASKS_UNIT}}
    return sorted(place for place in places if place.is_dir())


def processes() -> set[str]:
    """Children of this process at any depth, and keepers, which outlive their parents."""
    mine = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if Path(process.exe()).name.startswith(("keeper", "unpack")):
                mine.add(process)
        except psutil.Error:
            continue  # gone, or a thread of the kernel
    return {name for process in mine if (name := describe(process))}


def describe(process: psutil.Process) -> str | None:
    try:
        return f"{process.pid} {process.name()}"  # not its state, which changes
    except psutil.Error:
        return None


def descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the descriptor that listed the directory
    return found


def loop_devices() -> set[str]:
    return {
        f"/dev/{device.name} ({file.read_text().strip()})"
        for device in Path("/sys/block").glob("loop*")
        if (file := device / "loop/backing_file").exists()
    }


def leaked(before: dict[str, set[str]]) -> list[str]:
    after = snapshot()
    return [f"{kind} {name}" for kind in after for name in sorted(after[kind] - before[kind])]


# Of one state directory --------------------------------------------------------------------


def of(state: Path) -> list[str]:
    """What is left of an agent that has ended and had no task; the kernel may need a moment."""
    return [
        *(f"cgroup {directory}" for directory in cgroups_of(instance(state))),
        *(f"process {process.pid} {process.name()}" for process in keepers(state)),
        *(f"mount {mount}" for mount in mounts() if str(state) in mount),
        *(f"loop device {device}" for device in loop_devices() if str(state) in device),
        *(f"id range {claim.name}" for claim in claims(state)),
        *(f"descriptor {descriptor}" for descriptor in descriptors() if str(state) in descriptor),
        *(f"file {path}" for path in files(state)),
    ]


def instance(state: Path) -> str:
    return str(json.loads((state / "instance").read_bytes())["instance"])


def cgroups_of(instance: str) -> list[str]:
    tops = [root / f"sandbox-{instance}" for root in cgroup_roots()]
    return [directory for top in tops for directory, _, _ in os.walk(top)]


def claims(state: Path) -> list[Path]:
    """Id ranges of this agent and its tasks."""
    found = []
    for claim in CLAIMS.iterdir():
        with suppress(FileNotFoundError):  # another agent's, who gave it back
            if claim.read_text().startswith(f"{instance(state)} "):
                found.append(claim)
    return found


def keepers(state: Path) -> list[psutil.Process]:
    """Keepers and unpackers that hold something of the state directory open."""
    found = []
    for process in psutil.process_iter():
        try:
            if not Path(process.exe()).name.startswith(("keeper", "unpack")):
                continue
            links = [_target(f.path) for f in os.scandir(f"/proc/{process.pid}/fd")]
            if any(str(state) in link for link in links):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone, or a thread of the kernel
    return found


def files(state: Path) -> Iterator[Path]:
    """Those that no agent without a task has."""
    if (state / "tasks").exists():
        yield from (state / "tasks").iterdir()
    yield from (p for p in (state / "images").rglob(".*"))
    yield from (p for p in (state / "storage").glob("*") if p.suffix != ".empty")
    expected = {"instance", "lock", "images", "reserve", "storage", "tasks"}
    for path in state.iterdir():
        if path.name not in expected and not path.name.startswith("store.db"):
            yield path


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
