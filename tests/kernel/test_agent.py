"""`sandbox agent` as a process of its own: what it does for itself, and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox.kernel import capabilities
from sandbox.kernel.cgroups.hierarchies import choose, parse_mountinfo
from tests.conftest import ROOT
from tests.kernel.tasks import STAYS

pytestmark = pytest.mark.guest


def effective() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff:")).split()[1], 16)


SANDBOX = (sys.executable, "-m", "sandbox.cli")
FILE = "/proc/self/oom_score_adj"
WITHOUT = ("setpriv", "--bounding-set", "-sys_resource")
MAY_PROTECT = capabilities.mask(["SYS_RESOURCE"]) & effective()
LOOK = f"cat {FILE}; echo -1 2>/dev/null >{FILE}; cat {FILE}"


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path)


class Daemon:
    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.log = directory / "log"
        self._places = ("--state-dir", str(self.state), "--run-dir", str(directory / "run"))
        self.socket = directory / "run" / "agent.sock"

    def ask(self, *words: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        command = [*prefix, *SANDBOX, *words[:1], *self._places, *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    @contextmanager
    def running(self, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [*prefix, *SANDBOX, "agent", *self._places]
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            deadline = time.monotonic() + 20
            while not self.socket.exists():
                assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.01)
            yield process
        finally:
            process.terminate()
            process.wait()

    def said(self) -> dict[str, dict[str, Any]]:
        lines = map(json.loads, self.log.read_text().splitlines())
        return {line["event"]: line for line in lines}


def is_keeper_of(process: psutil.Process, daemon: Daemon) -> bool:
    """By the log that it holds open."""
    with suppress(psutil.Error):
        if Path(process.exe()).name == "keeper":
            return any(file.path.startswith(str(daemon.state)) for file in process.open_files())
    return False


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.skipif(not MAY_PROTECT, reason="root of this machine has no CAP_SYS_RESOURCE")
def test_an_agent_and_its_keepers_are_kept_from_the_oom_killer_and_tasks_are_not(
    daemon: Daemon, tiny: str
) -> None:
    with daemon.running() as process:
        assert score(process.pid) == -900
        task = daemon.ask("run", "-d", tiny, "sh", "-c", f"{LOOK}; {STAYS}").stdout.strip()
        told = daemon.ask("exec", task, "sh", "-c", LOOK)
        (keeper,) = (p.pid for p in psutil.process_iter() if is_keeper_of(p, daemon))
        assert score(keeper) == -900
        daemon.ask("stop", task)
        own = daemon.ask("logs", task)
    for seen in (told, own):
        assert seen.stdout == "0\n0\n", "it has 0 and cannot lower it"


def test_an_agent_that_may_not_protect_itself_runs_and_says_so(daemon: Daemon) -> None:
    with daemon.running(*WITHOUT) as process:
        assert score(process.pid) == score(os.getpid())
    said = daemon.said()["the kernel may end the agent for want of memory"]
    assert said["level"] == "warning"
    assert said["why"] == "write /proc/self/oom_score_adj: Permission denied"
    told = json.loads(daemon.ask("doctor", "--json", prefix=WITHOUT).stdout)["findings"]
    (found,) = (each for each in told if each["name"] == "agent kept from the OOM killer")
    assert found["state"] == "degraded" and "OOMScoreAdjust=-900" in found["mend"]


def test_an_agent_says_at_its_start_who_it_is_and_what_the_host_cannot_give(
    daemon: Daemon,
) -> None:
    with daemon.running():
        pass
    said = daemon.said()["agent starts"]
    instance = json.loads((daemon.state / "instance").read_text())["instance"]
    assert (said["instance"], said["state_dir"]) == (instance, str(daemon.state))
    assert said["cgroup"].endswith(f"/sandbox-{instance}")
    legacy = choose(parse_mountinfo(Path("/proc/self/mountinfo").read_text())).legacy
    for controller in legacy:
        assert f"{controller} is limited through cgroup v1" in said["degraded"]
