"""`sandbox doctor --deep` as a command: on this host, on a weakened product, and interrupted.

What its table demands, tests/kernel/test_isolation.py holds the product to.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from sandbox.agent import Agent
from sandbox.model.protections import ROWS, WAYS
from tests.conftest import ROOT

DOCTOR = (sys.executable, "-m", "sandbox.cli", "doctor", "--deep")


def deep(
    state: Path, *options: str, prefix: Sequence[str] = (), package: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *DOCTOR, "--state-dir", str(state), *options],
        capture_output=True,
        text=True,
        cwd=package,
        timeout=200,
        check=False,
    )


def traces(directory: Path) -> list[str]:
    """Of what it makes beside or in the state directory, and for its socket."""
    return [
        *(path.name for path in directory.glob(".doctor-*")),
        *(path.name for path in Path("/tmp").glob("sandbox-doctor-*")),
    ]


async def test_all_protections_hold_on_this_host_beside_a_running_agent(
    agent: Agent, state_dir: Path
) -> None:
    """The agent that holds the state directory is not asked, and nothing is left in it."""
    before = sorted(os.listdir(state_dir))
    done = await trio.to_thread.run_sync(deep, state_dir, "--json")
    assert done.stderr == ""
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["deep"] == {"checked": len(ROWS), "ways": list(WAYS), "failed": []}
    assert (told["canRunTasks"], done.returncode) == (True, 0)
    assert agent.tasks.list() == []
    assert sorted(os.listdir(state_dir)) == before
    assert traces(state_dir) == []


WEAKENED = {
    "reaching into other processes takes SYS_PTRACE": ("_bin/seccomp-default.bpf", None),
    "what tells of the machine is masked": (
        "runtime/container.py",
        ('    "proc/timer_list",\n', ""),
    ),
    "sysctl net/ipv4/ping_group_range is 0 65535": (
        "kernel/slots.py",
        ("ping_group_range=0 65535", "ping_group_range=0 65534"),
    ),
}
"""Row -> what is changed in a copy of the product: a file, and a text in it with its successor."""


def weakened(directory: Path) -> Path:
    shutil.copytree(ROOT / "sandbox", directory / "sandbox")
    for file, change in WEAKENED.values():
        path = directory / "sandbox" / file
        if change is None:
            shutil.copy(path.with_name("seccomp-ptrace.bpf"), path)
        else:
            text = path.read_text()
            assert change[0] in text
            path.write_text(text.replace(*change))
    return directory


def test_each_protection_that_does_not_hold_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = deep(tmp_path / "state", package=weakened(tmp_path / "copy"))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    told = {line.removeprefix("!!  ") for line in lines if line.startswith("!!  ")}
    assert told == WEAKENED.keys()
    assert lines[-1].endswith(f"by {len(WAYS)} ways in: {len(WEAKENED)} do not hold")
    start = lines.index("!!  sysctl net/ipv4/ping_group_range is 0 65535")
    assert lines[start + 1 : start + 3] == [
        "      found at network sysctls ipv4/ping_group_range: '0\\t65534'",
        "      demanded: 0 65535",
    ]
    assert "doctor --deep --json" in lines[start + 3]
    assert lines.index("tasks can run") < start
    assert traces(tmp_path) == []


def test_where_no_task_can_run_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = deep(tmp_path / "state", prefix=("setpriv", "--bounding-set", "-sys_admin"))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "tasks cannot run"
    assert done.stderr == "sandbox: no task can run here, so none was looked at from inside\n"
    assert not (tmp_path / "state").exists()


def test_one_that_is_ended_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    """Of its tasks at least the one with the health check runs by then."""
    command = [*DOCTOR, "--state-dir", str(tmp_path / "state")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: bool(list(tmp_path.glob(".doctor-*/tasks/*/*/run.*/pid"))))
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, told) == (1, "sandbox: ended by SIGTERM\n")
    assert traces(tmp_path) == []


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.02)
