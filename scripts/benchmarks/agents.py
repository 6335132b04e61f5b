"""`sandbox agent` as a process of its own, with a state directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SANDBOX = str(Path(sys.executable).parent / "sandbox")
STARTS_S = 30.0


@dataclass(frozen=True)
class RunningAgent:
    pid: int
    socket: Path
    environment: dict[str, str]
    """For commands that shall find it."""


@contextmanager
def running_agent(state_dir: Path) -> Iterator[RunningAgent]:
    """Ready to answer; its tasks must have ended when the block ends."""
    environment = {**os.environ, "SANDBOX_STATE_DIR": str(state_dir)}
    socket = state_dir / "run/agent.sock"
    log = state_dir.with_suffix(".log")
    with log.open("wb") as output:
        agent = subprocess.Popen([SANDBOX, "agent"], env=environment, stderr=output)
    try:
        wait_until_there(socket, agent)
        yield RunningAgent(agent.pid, socket, environment)
    finally:
        agent.terminate()
        agent.wait()


def wait_until_there(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a server has made its socket."""
    deadline = time.monotonic() + STARTS_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"bench: {process.args!r} does not answer")
        time.sleep(0.01)
