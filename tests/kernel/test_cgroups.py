"""CgroupSuite on the hierarchies of this machine: hybrid on some, pure version 2 in the guest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel.cgroups import Cgroup, CgroupTree, Limits
from sandbox.kernel.cgroups.hierarchies import (
    CONTROLLERS,
    Chosen,
    Mount,
    choose,
    parse_mountinfo,
)
from tests.suites.cgroup_suite import PATIENCE_S, CgroupSuite, KillSuite

pytestmark = pytest.mark.guest


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    opened = CgroupTree.open(secrets.token_hex(2))
    try:
        yield opened
    finally:
        remove(opened)


def remove(tree: CgroupTree) -> None:
    """End and remove everything, also after a test that failed half way."""
    for name in tree.names():
        group = tree.find(name)
        if group is not None:
            group.kill()
            trio.run(group.wait_empty, PATIENCE_S)
            group.close()
    tree.remove()
    tree.close()


class TestThisHost(CgroupSuite):
    """The hierarchies as they are."""


class TestWithoutCgroupKill(KillSuite):
    """As on kernels before 5.14: cgroups are killed by freezing them first."""

    @pytest.fixture
    def tree(self, tree: CgroupTree) -> CgroupTree:
        tree._branches = dataclasses.replace(tree._branches, has_kill=False)
        return tree


def places(tree: CgroupTree) -> list[Path]:
    """The directories of the instance, in every hierarchy that is mounted."""
    unified = Path(tree._branches.unified.path)  # where systemd has delegated it, or at the root
    return [unified, *(Path(mount.path, unified.name) for mount in mounted().legacy.values())]


def mounted() -> Chosen:
    return choose(parse_mountinfo(Path("/proc/self/mountinfo").read_text()))


def test_every_hierarchy_has_the_same_tree_and_loses_it(tree: CgroupTree) -> None:
    assert all(place.is_dir() for place in places(tree))
    tree.create("task-1", Limits())
    assert all((place / "task-1").is_dir() for place in places(tree))
    tree.remove()
    assert not any(place.exists() for place in places(tree))


def test_opening_again_finds_what_is_there(tree: CgroupTree) -> None:
    tree.create("task-1", Limits(pids_max=7))
    again = CgroupTree.open(tree.form.rpartition("sandbox-")[2])
    assert again.names() == ["task-1"]
    again.close()


def test_instances_do_not_see_each_other(tree: CgroupTree) -> None:
    other = CgroupTree.open(secrets.token_hex(2))
    try:
        other.create("task-1", Limits())
        tree.create("task-2", Limits())
        assert (tree.names(), other.names()) == (["task-2"], ["task-1"])
        tree.remove()
        assert other.names() == ["task-1"]
    finally:
        remove(other)


def test_a_task_gets_no_swap_unless_it_is_asked_for(tree: CgroupTree) -> None:
    size = 64 << 20
    without = tree.create("task-without", Limits(memory_max=size))
    granted = tree.create("task-granted", Limits(memory_max=size, swap=True))
    if any("swap is not accounted" in line for line in tree.degraded):
        assert read(tree, without, "memory.swappiness") == "0"
    elif tree._branches.memory.version == 1:
        assert read(tree, without, "memory.memsw.limit_in_bytes") == str(size)
        assert int(read(tree, granted, "memory.memsw.limit_in_bytes")) > size
    else:
        assert read(tree, without, "memory.swap.max") == "0"
        assert read(tree, granted, "memory.swap.max") == "max"


def read(tree: CgroupTree, group: Cgroup, file: str) -> str:
    return tree._branches.memory.read(f"{group.name}/{file}").strip()


def test_a_directory_that_is_no_cgroup_mount_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="not a cgroup file system"):
        CgroupTree.open("beef", mounts=[Mount(str(tmp_path), 2)])
    assert list(tmp_path.iterdir()) == []


OPEN_IN_A_UNIT = """
import os, sys
from pathlib import Path
from sandbox.kernel.cgroups import CgroupTree, Limits
unit, instance = Path(sys.argv[1]), sys.argv[2]
(unit / "cgroup.procs").write_text("0")
tree = CgroupTree.open(instance)
print(tree.form)
print(*tree.enabled)
print(Path("/proc/self/cgroup").read_text())
group = tree.create("task-1", Limits(memory_max=64 << 20))
print(group.stats().memory_max_bytes, (unit / f"sandbox-{instance}" / "task-1").is_dir())
again = CgroupTree.open(instance)
print(again.form, *again.enabled)
again.close()
group.remove()
tree.remove()
"""


def test_a_delegated_unit_holds_the_tree_and_the_agent_its_leaf(tree: CgroupTree) -> None:
    instance = secrets.token_hex(2)
    unit = Path(tree._branches.unified.path).parent / f"sandbox-test-{instance}.service"
    unit.mkdir()
    try:
        os.setxattr(unit, "trusted.delegate", b"1")
        run = subprocess.run(
            [sys.executable, "-c", OPEN_IN_A_UNIT, str(unit), instance],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stderr == ""
        form, enabled, *memberships, effect, again = run.stdout.splitlines()
        assert f"delegated by systemd: {unit}/sandbox-{instance}" in form
        assert any(line.endswith(f"/{unit.name}/agent") for line in memberships)
        assert effect == f"{64 << 20} True"
        legacy = choose(parse_mountinfo(Path("/proc/self/mountinfo").read_text())).legacy
        assert enabled.split() == [name for name in CONTROLLERS if name not in legacy]
        assert again.rstrip() == form, "nothing was left to be enabled"
    finally:
        (unit / "agent").rmdir()
        unit.rmdir()


def test_the_unit_for_tasks_holds_the_tree_of_an_agent_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit = Path(mounted().unified.path, f"sandbox-test-{secrets.token_hex(2)}.service")
    monkeypatch.setattr("sandbox.kernel.cgroups.tree.TASKS_UNIT", unit.name)
    before = CgroupTree.open(stayed := secrets.token_hex(2))
    unit.mkdir()
    os.setxattr(unit, "trusted.delegate", b"1")
    with subprocess.Popen(["sleep", "infinity"]) as holder:
        try:
            (unit / "cgroup.procs").write_text(str(holder.pid))
            own = Path("/proc/self/cgroup").read_text()

            placed = CgroupTree.open(instance := secrets.token_hex(2))
            assert f"delegated by systemd: {unit}/sandbox-{instance}" in placed.form
            with contextlib.closing(placed.create("task-1", Limits(pids_max=3))) as group:
                assert group.stats().pids == 0
            assert (unit / "holder/cgroup.procs").read_text() == f"{holder.pid}\n"
            assert Path("/proc/self/cgroup").read_text() == own
            remove(placed)

            again = CgroupTree.open(stayed)
            assert again.form == before.form, "a tree with tasks does not move"
            again.close()
        finally:
            holder.kill()
    remove(before)
    (unit / "holder").rmdir()
    unit.rmdir()
