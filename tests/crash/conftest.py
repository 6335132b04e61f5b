"""A driver to be killed, a place for its state, and what must not be left of either.

The leak check of tests/conftest.py compares the whole host around a whole test. Here a test kills
an agent many times over; `Site.remains` says after each of them what is left of this state
directory's agent alone, so the one kill that left something is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.kernel.idranges import CLAIMS
from sandbox.model.task import TaskDesired, TaskKnown
from sandbox.store import rows
from sandbox.store.sqlite import SqliteStore
from scripts import make_image
from tests.conftest import ROOT, cgroup_roots, loop_devices

SETTINGS = {"warm_slots": 1, "warm_storage": 1, "host_free_storage_mib": 0}


class Driver:
    """tests/crash/driver.py, which forks for each request."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.driver"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = 0
        """Of the process that works on the request."""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Until it has ended: everything that was said, put together."""
        self.start(**request)
        return self.hear("ended")

    def start(self, **request: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.pid = self.hear("pid")["pid"]

    def hear(self, last: str) -> dict[str, Any]:
        assert self._process.stdout
        facts: dict[str, Any] = {}
        while last not in facts:
            line = self._process.stdout.readline()
            assert line, "the driver has ended"
            facts |= json.loads(line)
        return facts

    def signal(self, number: int) -> dict[str, Any]:
        os.kill(self.pid, number)
        return self.hear("ended")

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        with self._process:
            self._process.stdin.close()


@dataclass(frozen=True)
class Rows:
    """What the store knows of a task."""

    desired: TaskDesired
    known: TaskKnown | None


@dataclass(frozen=True)
class Site:
    """The directories of one agent after the other."""

    state: Path
    run: Path

    @property
    def place(self) -> dict[str, str]:
        """For a request to the driver."""
        return {"state": str(self.state), "run": str(self.run)}

    @property
    def instance(self) -> str:
        return str(msgspec.json.decode((self.state / "instance").read_bytes())["instance"])

    @asynccontextmanager
    async def agent(self, **settings: Any) -> AsyncIterator[Agent]:
        async with open_agent(self.state, self.run, SETTINGS | settings, resident=True) as agent:
            yield agent

    async def rows(self) -> dict[str, Rows]:
        """What an agent that was killed has left in the store."""
        if not (self.state / "store.db").exists():
            return {}
        store = SqliteStore.open(self.state / "store.db")
        try:
            found = {task: rows.desired(store, task) for task in rows.task_ids(store)}
            return {
                task: Rows(row.value, rows.known(store, task)) for task, row in found.items() if row
            }
        finally:
            await store.aclose()

    async def write(self, put: Mapping[str, msgspec.Struct]) -> None:
        """Change what an agent that was killed has left."""
        store = SqliteStore.open(self.state / "store.db")
        await store.txn(put)
        await store.aclose()

    async def remains(self) -> list[str]:
        """What is left of an agent that has ended and had no task; given a moment to go."""
        deadline = time.monotonic() + 5
        while (left := list(self._remains())) and time.monotonic() < deadline:
            await trio.sleep(0.02)
        return left

    def _remains(self) -> Iterator[str]:
        for root in cgroup_roots():
            if (root / f"sandbox-{self.instance}").exists():
                yield from (f"cgroup {d}" for d, _, _ in os.walk(root / f"sandbox-{self.instance}"))
        yield from (f"process {p.pid} {p.name()}" for p in self.keepers())
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(self.state) in line:
                yield f"mount {line}"
        loops = (device for device in loop_devices() if str(self.state) in device)
        yield from (f"loop device {device}" for device in loops)
        yield from (f"id range {claim.name}" for claim in self.claims())
        for number in os.listdir("/proc/self/fd"):
            target = _target(f"/proc/self/fd/{number}")
            if str(self.state) in target:
                yield f"descriptor {number} -> {target}"
        yield from (f"file {path}" for path in self._files())

    def _files(self) -> Iterator[Path]:
        """Those that no agent without a task has."""
        if (self.state / "tasks").exists():
            yield from (self.state / "tasks").iterdir()
        yield from (p for p in (self.state / "images").rglob(".*"))
        yield from (p for p in (self.state / "storage").glob("*") if p.suffix != ".empty")
        expected = {"instance", "lock", "images", "reserve", "storage", "tasks"}
        for path in self.state.iterdir():
            if path.name not in expected and not path.name.startswith("store.db"):
                yield path

    def claims(self) -> list[Path]:
        """Id ranges of this agent and its tasks."""
        found = []
        for claim in CLAIMS.iterdir():
            with suppress(FileNotFoundError):  # another agent's, who gave it back
                if claim.read_text().startswith(f"{self.instance} "):
                    found.append(claim)
        return found

    def keepers(self) -> list[psutil.Process]:
        """Keepers and unpackers that hold something of the state directory open."""
        found = []
        for process in psutil.process_iter():
            try:
                if not Path(process.exe()).name.startswith(("keeper", "unpack")):
                    continue
                links = [_target(f.path) for f in os.scandir(f"/proc/{process.pid}/fd")]
                if any(str(self.state) in link for link in links):
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # gone, or a thread of the kernel
        return found


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


@pytest.fixture(scope="session")
def image() -> str:
    """Busybox as an OCI layout on disk: nothing here needs a registry."""
    return f"oci:{make_image.cached('tiny', ROOT / 'build/images')}:latest"


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "state", tmp_path / "run")
