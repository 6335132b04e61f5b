"""The leak check itself: it must see what a broken test would leave."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.leaks import cgroup_roots, leaked, snapshot


def test_what_a_test_leaves_behind_is_named(tmp_path: Path) -> None:
    before = snapshot()
    with ExitStack() as undo:
        child = subprocess.Popen(["sleep", "60"])
        undo.callback(child.wait)
        undo.callback(child.kill)

        descriptor = os.open(tmp_path, os.O_RDONLY)
        undo.callback(os.close, descriptor)

        mounted = tmp_path / "mounted"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "leak", mounted], check=True)
        undo.callback(subprocess.check_call, ["umount", mounted])

        cgroup = cgroup_roots()[0] / f"sandbox-leak-{os.getpid()}"
        cgroup.mkdir()
        undo.callback(cgroup.rmdir)

        left = leaked(before)
    assert {
        f"process {child.pid} sleep",
        f"descriptor {descriptor} -> {tmp_path}",
        f"mount {mounted} (/ of tmpfs)",
        f"cgroup {cgroup}",
    } <= set(left)
    assert not [name for name in leaked(before) if str(tmp_path) in name or str(cgroup) in name]
