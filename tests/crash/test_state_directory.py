"""A state directory that somebody has damaged while its task ran on without an agent.

The daemon refuses with one line that names the file and says what to do, and ends with 1. It has
ended nothing, swept nothing and changed nothing; when the damage is undone the next one goes on.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.kernel.idranges import CLAIMS
from sandbox.model.task import Status, StopCode
from tests.crash.conftest import Driver, Site
from tests.crash.test_agents import (
    is_running,
    left_by,
    outcome,
    own_cgroups,
    sandbox,
    small_disk,
    stopped,
)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(4096))


def gone(path: Path) -> None:
    path.unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_away(path: Path, kept: Path) -> None:
    """What keepers have open stays the same; a file may be damaged in its place. The files of a
    store are one thing."""
    if path.is_dir():
        path.rename(kept / path.name)
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy2(file, kept)


def put_back(path: Path, kept: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink()
    for file in kept.iterdir():
        file.rename(path.with_name(file.name))


def names(site: Site) -> set[str]:
    """Of all files; those beside the store's come and go with whoever opens it."""
    return {str(p) for p in site.state.rglob("*") if not p.name.startswith("store.db-")}


def a_file(path: Path) -> None:
    path.touch()


def of_a_newer_sandbox(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


DAMAGES: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("store.db", emptied, "is damaged (it has 0 bytes): restore a copy of the state directory, or"),
    ("store.db", overwritten, "is damaged (file is not a database): restore a copy of the state"),
    ("store.db", gone, "is missing but"),
    ("store.db", a_directory, "is not a regular file: move it away, or choose another state"),
    ("store.db", of_a_newer_sandbox, "has schema 99 and this Sandbox knows 1: use the newer"),
    ("store.db-wal", gone, "is missing, which held what was written last: restore it, or remove"),
    ("store.db-wal", a_directory, "is not a regular file: move it away, or choose another state"),
    ("instance", emptied, "Input data was truncated: remove the file if no task of it runs"),
    ("instance", overwritten, ": remove the file if no task of it runs"),
    ("instance", a_directory, "Is a directory"),
    ("instance", gone, "is missing, but tasks of it run: restore it, or choose another"),
    ("lock", a_directory, "Is a directory"),
    ("tasks", a_file, "File exists"),
    ("images", a_file, "Not a directory"),
)


@pytest.mark.parametrize(
    ("name", "damage", "told"), DAMAGES, ids=[f"{n} {d.__name__}" for n, d, _ in DAMAGES]
)
async def test_a_damaged_state_directory_is_refused_and_nothing_is_lost(
    name: str,
    damage: Callable[[Path], None],
    told: str,
    driver: Driver,
    site: Site,
    image: str,
    tmp_path: Path,
) -> None:
    id = left_by(driver, site, image)
    (keeper,) = site.keepers()
    (container,) = keeper.children()
    ids = Path(f"/proc/{container.pid}/uid_map").read_text().split()[1]
    cgroups = set(own_cgroups(site))
    file, kept = site.state / name, tmp_path / "kept"
    kept.mkdir()
    put_away(file, kept)
    damage(file)
    before = names(site)
    code, said, why = outcome(sandbox(site, "agent"))
    refusal = why.splitlines()[-1]
    assert (code, said) == (1, "") and "Traceback" not in why, why
    assert f"{site.state}/{name}" in refusal and told in refusal, refusal
    assert is_running(keeper.pid)
    assert names(site) == before
    put_back(file, kept)
    assert set(own_cgroups(site)) == cgroups and (CLAIMS / ids).exists()
    async with site.agent() as agent:
        assert agent.tasks.describe(id).known.last_status is Status.RUNNING
        await agent.tasks.stop(id)
        known = (await stopped(agent, id)).known
        assert (known.stop_code, known.containers[0].exit_code) == (StopCode.USER_INITIATED, 3)
        await agent.tasks.remove(id)
    assert await site.remains() == []


async def test_a_disk_that_became_read_only_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        site = Site(disk / "state", tmp_path / "run")
        async with site.agent():
            pass
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        code, said, why = outcome(sandbox(site, "agent"))
        assert (code, said) == (1, "")
        assert why.splitlines()[-1].endswith(f"{site.state}/lock: Read-only file system"), why
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        async with site.agent():
            pass
        assert await site.remains() == []
