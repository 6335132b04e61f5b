"""All cgroups of one agent: where its tree stands, what is in it, and what the host cannot give."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import ConfigError, KernelError
from sandbox.kernel import native
from sandbox.kernel.cgroups.devices import device_program
from sandbox.kernel.cgroups.group import (
    NAME,
    V1_FILES,
    Branches,
    Cgroup,
    directory_of,
    enable,
)
from sandbox.kernel.cgroups.hierarchies import (
    CONTROLLERS,
    Branch,
    Chosen,
    Mount,
    choose,
    parse_mountinfo,
    parse_own_cgroup,
)
from sandbox.kernel.cgroups.limits import Limits

# systemd marks what it has delegated; the first name since version 251, the second for long.
DELEGATION_MARKS = ("user.delegate", "trusted.delegate")

DEVICES_MARK = "trusted.sandbox.devices"

AGENT_LEAF = "agent"

# The unit that is delegated for tasks alone, so that systemd can start their agent again: see
# docs/adr/0002-tasks-have-a-unit-of-their-own.md.
TASKS_UNIT = "system.slice/sandbox-tasks.service"
HOLDER_LEAF = "holder"


class CgroupTree:
    """`sandbox-<instance>` in every hierarchy in use."""

    def __init__(
        self,
        branches: Branches,
        *,
        form: str,
        degraded: tuple[str, ...],
        enabled: tuple[str, ...] = (),
    ) -> None:
        self._branches = branches
        self.form = form
        """Which hierarchies, and where in them: one line for `doctor`."""
        self.degraded = degraded
        """What is enforced in a weaker way here, and why: lines for `doctor`."""
        self.enabled = enabled
        """The controllers that were made available above the tree. They stay so: whoever else
        uses them since would lose them."""

    @classmethod
    def open(cls, instance: str, *, mounts: Iterable[Mount] | None = None) -> CgroupTree:
        """Find or make this instance's tree; the same again after a crash.

        Moves this process into the leaf `agent/` where systemd delegated its own cgroup to us.
        ConfigError when the host has no version 2 tree or lacks a controller.
        """
        if mounts is None:
            mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
        chosen = choose(mounts)
        tree = f"sandbox-{instance}"
        place = _place(Path(chosen.unified.path), tree)
        with contextlib.ExitStack() as undo:
            base = Branch(chosen.unified, str(place.path))
            undo.callback(base.close)
            if place.leaf:
                _move_into_leaf(base, place.leaf)
            unified = tuple(name for name in CONTROLLERS if name not in chosen.legacy)
            enabled = _enable_missing(base, unified)
            branches = _open_branches(chosen, base, tree)
        return cls(
            branches,
            form=f"{_kind(chosen)}, {place.form}: {branches.unified.path}",
            degraded=(*_degraded(chosen, branches), *_restrict_devices(branches.unified)),
            enabled=enabled,
        )

    def create(self, name: str, limits: Limits) -> Cgroup:
        """A cgroup with these limits; an existing one is reused and gets them.

        `name` is `task-<id>` or `task-<id>/<container>`; the former must exist for the latter and
        holds no process itself. A failure leaves what was made for `find(name).remove()`.
        """
        group = self._group(name)
        group.make(limits)
        return group

    def find(self, name: str) -> Cgroup | None:
        group = self._group(name)
        return group if self._branches.unified.has(directory_of(name)) else None

    def names(self) -> list[str]:
        """Every cgroup of this instance, tasks before their containers."""
        unified = self._branches.unified
        found = []
        for task in unified.children("."):
            found += [task, *(f"{task}/{child}" for child in unified.children(task))]
        return [_name(directory) for directory in found]

    def remove(self) -> None:
        """Remove the whole tree. EBUSY, and nothing is touched, when a process stays in it."""
        top = f"../{os.path.basename(self._branches.unified.path)}"
        self._branches.unified.wait_unpopulated(top)
        self._branches.remove(top)

    def close(self) -> None:
        self._branches.close()

    def _group(self, name: str) -> Cgroup:
        if not NAME.fullmatch(name):
            raise KernelError("mkdir", f"cgroup {name!r}", errno.EINVAL)
        return Cgroup(self._branches, name, directory_of(name))


def _name(directory: str) -> str:
    container = directory.partition("/")[2]
    return directory[:-1] if container[:-1] in V1_FILES else directory


@dataclass(frozen=True, slots=True)
class _Place:
    """The version 2 directory that a tree stands in."""

    path: Path
    form: str
    leaf: str = ""
    """Where the processes go that are in the place itself; the root alone may hold some."""


def _place(mount: Path, tree: str) -> _Place:
    """Where this tree stands already: live tasks stay. Otherwise the first place there is."""
    places = list(_places(mount))
    return next((place for place in places if (place.path / tree).is_dir()), places[0])


def _places(mount: Path) -> Iterator[_Place]:
    own = Path(parse_own_cgroup(Path("/proc/self/cgroup").read_text()))
    unit = mount / (own.parent if own.name == AGENT_LEAF else own).relative_to("/")
    if unit != mount and _is_delegated(unit):
        yield _Place(unit, "delegated by systemd", AGENT_LEAF)
    if _is_delegated(tasks := mount / TASKS_UNIT):
        yield _Place(tasks, "delegated by systemd", HOLDER_LEAF)
    yield _Place(mount, "at the root")


def _is_delegated(unit: Path) -> bool:
    return any(_mark(unit, mark) == b"1" for mark in DELEGATION_MARKS)


def _mark(file: Path | int, name: str) -> bytes | None:
    try:
        return os.getxattr(file, name)
    except OSError:
        return None


def _move_into_leaf(unit: Branch, leaf: str) -> None:
    """Empty the unit's own cgroup into `leaf`: only then may its children have controllers."""
    unit.mkdir(leaf)
    for pid in unit.read("cgroup.procs").split():
        try:
            unit.write(f"{leaf}/cgroup.procs", pid)
        except KernelError as error:
            if error.errno != errno.ESRCH:  # it ended meanwhile
                raise


def _enable_missing(place: Branch, controllers: tuple[str, ...]) -> tuple[str, ...]:
    """Make these controllers available to our tree; which of them were not."""
    if not controllers:
        return ()
    known = place.read("cgroup.controllers").split()
    for controller in controllers:
        if controller not in known:
            raise ConfigError(
                f"no {controller} controller in {place.path}: enable it on the kernel's command"
                f" line (cgroup_enable={controller}) or for the unit (Delegate=yes)"
            )
    enabled = place.read("cgroup.subtree_control").split()
    missing = tuple(name for name in controllers if name not in enabled)
    enable(place, "", missing)
    return missing


def _open_branches(chosen: Chosen, place: Branch, name: str) -> Branches:
    with contextlib.ExitStack() as undo:
        place.mkdir(name)
        unified = Branch(chosen.unified, place.subject(name))
        undo.callback(unified.close)
        by_mount: dict[Mount, Branch] = {}
        for mount in chosen.legacy.values():
            if mount not in by_mount:
                by_mount[mount] = _open_legacy(mount, name)
                undo.callback(by_mount[mount].close)
        serving = {
            controller: by_mount[chosen.legacy[controller]]
            if controller in chosen.legacy
            else unified
            for controller in CONTROLLERS
        }
        enable(unified, "", tuple(name for name in CONTROLLERS if serving[name] is unified))
        memory = serving["memory"]
        swap_file = "memory.memsw.limit_in_bytes" if memory.version == 1 else "memory.swap.max"
        branches = Branches(
            unified=unified,
            cpu=serving["cpu"],
            memory=memory,
            pids=serving["pids"],
            swap_accounted=memory.has(swap_file),
            has_kill=unified.has("cgroup.kill"),
        )
        undo.pop_all()
        return branches


def _open_legacy(mount: Mount, name: str) -> Branch:
    root = Branch(mount, mount.path)
    try:
        root.mkdir(name)
        return Branch(mount, root.subject(name))
    finally:
        root.close()


def _restrict_devices(tree: Branch) -> tuple[str, ...]:
    """Attach the device policy above all tasks, so that none has to do it; what failed, in words.

    Attaching adds to what is attached. The mark, set last, tells the next agent that it was done.
    """
    program = device_program()
    mark = hashlib.sha256(program).hexdigest().encode()
    try:
        if _mark(tree.fd, DEVICES_MARK) != mark:
            program_fd = native.bpf_device_program(program)
            try:
                native.bpf_attach_cgroup_device(tree.fd, program_fd)
            finally:
                os.close(program_fd)
            with native.raising("setxattr", tree.path):
                os.setxattr(tree.fd, DEVICES_MARK, mark)
    except KernelError as error:
        return (f"no device policy beside /dev: {error}",)
    return ()


def _kind(chosen: Chosen) -> str:
    return f"hybrid (v1: {', '.join(_legacy(chosen))})" if chosen.legacy else "cgroup v2"


def _legacy(chosen: Chosen) -> list[str]:
    return [controller for controller in CONTROLLERS if controller in chosen.legacy]


def _degraded(chosen: Chosen, branches: Branches) -> tuple[str, ...]:
    found = [f"{controller} is limited through cgroup v1" for controller in _legacy(chosen)]
    if not branches.swap_accounted:
        found.append("swap is not accounted for: tasks are kept out of it by swappiness 0 at most")
    if not branches.has_kill:
        found.append("no cgroup.kill (Linux 5.14): tasks are killed by freezing them first")
    return tuple(found)
