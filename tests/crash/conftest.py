"""A driver to be killed, a place for its state, and what must not be left of either.

The leak check of tests/conftest.py compares the whole host around a whole test. Here a test kills
an agent many times over; `Site.remains` says after each of them what is left of this state
directory's agent alone, so the one kill that left something is named.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.model.task import TaskDesired, TaskKnown
from sandbox.store import rows
from sandbox.store.sqlite import SqliteStore
from scripts import make_image
from tests import leaks
from tests.conftest import ROOT

SETTINGS = {"warm_slots": 1, "warm_storage": 1, "host_free_storage_mib": 0}
SILENT_S = 60.0
"""Longer than a driver is patient with anything."""


class Driver:
    """tests/crash/driver.py, which forks for each request."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.driver"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what was not heard is in the pipe, nowhere else
        )
        self.pid = 0
        """Of the process that works on the request."""

    def ask(self, **request: Any) -> dict[str, Any]:
        """Until it has ended: everything that was said, put together."""
        self.start(**request)
        return self.hear("ended")

    def start(self, **request: Any) -> None:
        self.tell(**request)
        self.pid = self.hear("pid")["pid"]

    def tell(self, **request: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def hear(self, *last: str) -> dict[str, Any]:
        """What is said, up to one of these."""
        assert self._process.stdout
        facts: dict[str, Any] = {}
        while not facts.keys() & set(last):
            assert select.select([self._process.stdout], [], [], SILENT_S)[0], "it says nothing"
            line = self._process.stdout.readline()
            assert line, "the driver has ended"
            facts |= json.loads(line)
        return facts

    def heard(self) -> list[dict[str, Any]]:
        """What was said and not yet heard, of one who says nothing now."""
        assert self._process.stdout
        lines = []
        while select.select([self._process.stdout], [], [], 0)[0]:
            lines.append(json.loads(self._process.stdout.readline()))
        return lines

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
        return leaks.instance(self.state)

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
        while (left := leaks.of(self.state)) and time.monotonic() < deadline:
            await trio.sleep(0.02)
        return left

    def claims(self) -> list[Path]:
        return leaks.claims(self.state)

    def keepers(self) -> list[psutil.Process]:
        return leaks.keepers(self.state)


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
