"""The SQLite store: the suite, and what only a file can get wrong."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from sandbox.errors import StoreError
from sandbox.store.sqlite import SqliteStore
from tests.suites.store_suite import Number, StoreModel, StoreSuite


class Text(msgspec.Struct):
    text: str


class TestSqliteStore(StoreSuite):
    def open(self, directory: Path) -> SqliteStore:
        return SqliteStore.open(directory / "store.db")


class TestSqliteStoreModel(StoreModel):
    def open(self, directory: Path) -> SqliteStore:
        return SqliteStore.open(directory / "store.db")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store that was closed after 200 transactions."""

    async def fill() -> None:
        store = SqliteStore.open(tmp_path / "store.db")
        for n in range(200):
            await store.txn({f"a/{n}": Text("x" * 500)}, durable=False)
        await store.aclose()

    trio.run(fill)
    return tmp_path / "store.db"


def test_reading_needs_no_event_loop(path: Path) -> None:
    store = SqliteStore.open(path)
    assert store.revision == len(store.keys("a/")) == len(store.list("a/", Text)) == 200


def test_the_file_is_its_owners_alone(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_newer_schema_is_refused_by_number(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(StoreError, match=r"store\.db has schema 7 and this Sandbox knows 1: use"):
        SqliteStore.open(path)


def test_somebody_elses_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "store.db")
    db.execute("CREATE TABLE t (x)")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="not a store of Sandbox: choose another"):
        SqliteStore.open(tmp_path / "store.db")


@pytest.mark.parametrize("size", [0, 50, 4096, 20_000, 70_001])
def test_a_truncated_file_is_refused_with_what_to_do(path: Path, size: int) -> None:
    assert path.stat().st_size > size
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(StoreError, match=r"damaged \(.+\): restore .* or move store\.db\* away"):
        SqliteStore.open(path)


@pytest.mark.parametrize("page", range(1, 40, 3))
def test_a_page_of_rubbish_is_refused_with_what_to_do(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xa5" * 4096)
    with pytest.raises(StoreError, match=r"damaged \(.+\): restore .* or move store\.db\* away"):
        SqliteStore.open(path)


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        SqliteStore.open(path)


def test_half_a_store_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "store.db-wal").write_bytes(b"left behind")
    with pytest.raises(StoreError, match=r"missing but .*store\.db-wal is there"):
        SqliteStore.open(tmp_path / "store.db")
    assert not (tmp_path / "store.db").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"cannot create .*no/store\.db: No such file or directory"
    ):
        SqliteStore.open(tmp_path / "no" / "store.db")


def test_an_interrupted_creation_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "store.db.new").write_bytes(b"half")
    assert SqliteStore.open(tmp_path / "store.db").revision == 0
    assert [file.name for file in tmp_path.glob("*.new*")] == []


@pytest.mark.trio
async def test_the_log_is_cut_at_a_number_of_revisions(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db", keep=80)
    for n in range(200):
        await store.txn({"a": Number(n)}, durable=False)
    with pytest.raises(StoreError, match="is forgotten"):
        await anext(store.watch("", 100))
    assert (await anext(store.watch("", 120))).rev == 121
    await store.aclose()


@pytest.mark.trio
async def test_the_log_is_cut_at_a_number_of_bytes(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db", keep_bytes=100_000)
    for n in range(100):
        await store.txn({f"a/{n}": Text("x" * 10_000)}, durable=False)
    with pytest.raises(StoreError, match="is forgotten"):
        await anext(store.watch("", 80))
    assert (await anext(store.watch("", 91))).rev == 92
    assert len(store.keys("a/")) == 100
    await store.aclose()


@pytest.mark.trio
async def test_the_file_stays_small_and_gives_back_what_a_burst_took(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = SqliteStore.open(path, keep=50)
    for n in range(2000):
        await store.txn({f"a/{n % 10}": Text("x" * 8000)}, durable=False)
    assert path.stat().st_size < 2_000_000
    await store.txn({f"b/{n}": Text("x" * 8000) for n in range(1000)})
    for n in range(1000):
        await store.txn({}, delete=[f"b/{n}"], durable=False)
    await store.aclose()
    assert path.stat().st_size < 2_000_000
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]


@pytest.mark.trio
async def test_a_change_has_the_time_of_the_clock(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db", clock=lambda: 12.5)
    await store.txn({"a": Number(1)})
    assert (await anext(store.watch("", 0))).at == 12.5
    await store.aclose()


def test_one_store_serves_several_event_loops_in_turn(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")

    async def write(n: int) -> None:
        await store.txn({"a": Number(n)})

    trio.run(write, 1)
    trio.run(write, 2)
    found = store.get("a", Number)
    assert found is not None
    assert (found.rev, found.value) == (2, Number(2))
    trio.run(store.aclose)


@pytest.mark.trio
async def test_who_waits_for_the_disk_together_waits_for_few_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        fdatasync(fd)

    store = SqliteStore.open(tmp_path / "store.db")
    await store.txn({"a": Number(0)})  # the first syncs the directory too
    monkeypatch.setattr(os, "fdatasync", counted)
    async with trio.open_nursery() as nursery:
        for n in range(100):
            nursery.start_soon(partial(store.txn, {f"a/{n}": Number(n)}))
    await store.txn({"a": Number(1)}, durable=False)
    assert 1 <= len(synced) <= 2
    await store.aclose()


@pytest.mark.trio
async def test_threads_that_others_keep_busy_hold_up_no_write(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db")
    stalled = threading.Event()
    limiter = trio.to_thread.current_default_thread_limiter()
    async with trio.open_nursery() as nursery:
        for _ in range(int(limiter.total_tokens)):
            nursery.start_soon(partial(trio.to_thread.run_sync, stalled.wait))
        while limiter.available_tokens:
            await trio.sleep(0.001)
        try:
            with trio.fail_after(5):
                await store.txn({"a": Number(1)})
                await store.aclose()
        finally:
            stalled.set()


@pytest.mark.trio
async def test_after_a_failed_sync_nothing_is_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = SqliteStore.open(tmp_path / "store.db")
    await store.txn({"a": Number(0)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StoreError, match="sync: Input/output error"):
            await store.txn({"a": Number(1)})
    with trio.fail_after(5), pytest.raises(StoreError, match="sync: Input/output error"):
        await store.until_broken()
    for durable in (True, False):
        with pytest.raises(StoreError, match="until the store is opened again"):
            await store.txn({"a": Number(2)}, durable=durable)
    await store.aclose()


@pytest.mark.trio
async def test_the_wal_stays_bounded_while_something_is_always_written(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.db", keep=50)
    stop = trio.Event()

    async def write(name: str) -> None:
        text = Text("x" * 4000)
        while not stop.is_set():
            await store.txn({name: text}, durable=False)

    async with trio.open_nursery() as nursery:
        for writer in range(4):
            nursery.start_soon(write, f"a/{writer}")
        while store.revision < 20_000:
            await trio.sleep(0.01)
        stop.set()
    assert (tmp_path / "store.db-wal").stat().st_size < 100 << 20
    await store.aclose()
