"""A store whose files were cut, overwritten, taken away or swapped for something else.

Each transaction writes its number under one key for the newest and one of its own, so what a
store holds says how many of them it knows, and a mixture of two moments shows. What is opened is a
whole state that was acknowledged once; anything else is refused with what to do, and refusing
changes nothing on disk.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from sandbox.errors import StoreError
from sandbox.store.sqlite import SqliteStore

MANY = 30
PAGE = 4096
FRAME = 24 + PAGE
WAL_HEADER = 32
"""A header, then frames: https://www.sqlite.org/fileformat2.html#walformat"""


class Text(msgspec.Struct):
    n: int
    text: str


async def fill(store: SqliteStore) -> None:
    for n in range(1, MANY + 1):
        value = Text(n, "x" * (700 * (n % 9)))  # some overflow their page
        await store.txn({"newest": value, f"each/{n}": value}, durable=n % 10 == 0)


def known(path: Path) -> int:
    """How many transactions the store at `path` knows, all of them whole."""
    store = SqliteStore.open(path)
    try:
        newest = store.get("newest", Text)
        many = newest.value.n if newest else 0
        each = store.list("each/", Text)
        assert sorted(found.value.n for found in each) == list(range(1, many + 1))
        assert all(len(found.value.text) == 700 * (found.value.n % 9) for found in each)
        assert store.revision == many
        return many
    finally:
        trio.run(store.aclose)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a store that was closed: all is in the file."""
    directory = tmp_path_factory.mktemp("closed")

    async def make() -> None:
        store = SqliteStore.open(directory / "store.db")
        await fill(store)
        await store.aclose()

    trio.run(make)
    return directory


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a store whose process was killed: nearly all is in the WAL."""
    directory = tmp_path_factory.mktemp("killed")

    async def make() -> None:
        store = SqliteStore.open(directory / "live" / "store.db")
        await fill(store)
        shutil.copytree(directory / "live", directory / "left")
        await store.aclose()

    (directory / "live").mkdir()
    trio.run(make)
    return directory / "left"


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "left")) / "store.db"


def contents(directory: Path) -> dict[str, bytes]:
    """But for what has no meaning: the index, made anew by who comes first, and an empty WAL."""
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    files.pop("store.db-shm", None)
    if not files.get("store.db-wal"):
        files.pop("store.db-wal", None)
    return files


def outcome(path: Path) -> int | str:
    """What the store knows, or how it is refused; then its files are as they were."""
    before = contents(path.parent)
    try:
        return known(path)
    except StoreError as error:
        assert contents(path.parent) == before
        return str(error)


def is_told(text: str, path: Path) -> bool:
    return text.startswith(str(path)) and "\n" not in text and ": restore " in text


def sizes(file: Path) -> Iterator[int]:
    """Every border of a page, the bytes beside it, and some in between."""
    whole = file.stat().st_size
    anywhere = random.Random(7)
    for border in range(0, whole, PAGE):
        yield from {border, max(border - 1, 0), border + 1, border + anywhere.randrange(2, PAGE)}


def test_a_file_that_was_cut_anywhere_is_refused_with_what_to_do(
    closed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    whole = (closed / "store.db").read_bytes()
    for size in sizes(closed / "store.db"):
        path.write_bytes(whole[:size])
        found = outcome(path)
        assert isinstance(found, str) and is_told(found, path), f"{size}: {found}"
    path.write_bytes(whole)
    assert outcome(path) == MANY


@pytest.mark.parametrize("rubbish", [bytes(PAGE), b"\xff" * PAGE, random.Random(7).randbytes(PAGE)])
def test_a_page_that_was_overwritten_is_refused_or_was_of_no_use(
    rubbish: bytes, closed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store.db"
    whole = (closed / "store.db").read_bytes()
    refused = 0
    for at in range(0, len(whole), PAGE):
        path.write_bytes(whole[:at] + rubbish + whole[at + PAGE :])
        found = outcome(path)
        assert found == MANY or isinstance(found, str), f"page {at // PAGE}: {found}"
        refused += isinstance(found, str)
    assert refused > len(whole) // PAGE * 3 // 4


def test_a_wal_that_was_cut_anywhere_holds_what_was_written_before(left: Path) -> None:
    """A power cut takes what was not synced: from the end, SQLite's checksums see where."""
    directory = contents(left.parent)
    wal = directory["store.db-wal"]
    before = 0
    for size in range(WAL_HEADER, len(wal) + 1, 2 * FRAME - 777):
        restored(left.parent, directory | {"store.db-wal": wal[:size]})
        found = outcome(left)
        assert isinstance(found, int) and before <= found <= MANY, f"{size}: {found}"
        before = found
    restored(left.parent, directory)
    assert outcome(left) == MANY


def test_a_frame_of_the_wal_that_was_overwritten_ends_what_is_known(left: Path) -> None:
    directory = contents(left.parent)
    wal = directory["store.db-wal"]
    seen = set()
    for at in range(0, len(wal), FRAME):
        torn = wal[:at] + b"\x5a" * 512 + wal[at + 512 :]
        restored(left.parent, directory | {"store.db-wal": torn})
        found = outcome(left)
        assert isinstance(found, int), f"{at}: {found}"
        seen.add(found)
    assert sorted(seen) == [*range(min(seen), max(seen) + 1)] and min(seen) == 0


def restored(directory: Path, files: dict[str, bytes]) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        if name != "store.db-shm":
            (directory / name).write_bytes(content)


def test_a_wal_that_was_taken_away_is_missed(left: Path) -> None:
    """Without it the file is a whole store, of long ago: what runs now would be swept."""
    left.with_name("store.db-wal").unlink()
    found = outcome(left)
    assert isinstance(found, str), f"{found} transactions are known"
    assert found == (
        f"{left}-wal is missing, which held what was written last: restore it, or remove"
        f" {left}-shm to go on with what {left} knows"
    )
    left.with_name("store.db-shm").unlink()
    assert isinstance(outcome(left), int)


def test_what_is_refused_keeps_its_wal(closed: Path, tmp_path: Path) -> None:
    """SQLite moves it into the file when that is closed: the last good copy of its pages."""
    path = Path(shutil.copy(closed / "store.db", tmp_path / "store.db"))

    async def leave_a_wal() -> dict[str, bytes]:
        store = SqliteStore.open(path)
        await store.txn({"more": Text(0, "")})
        files = contents(tmp_path)
        await store.aclose()
        return files

    files = trio.run(leave_a_wal)
    assert files["store.db-wal"]
    cut = files["store.db"][: len(files["store.db"]) // PAGE // 2 * PAGE]
    restored(tmp_path, files | {"store.db": cut})
    found = outcome(path)
    assert isinstance(found, str) and is_told(found, path)


def test_the_wal_of_another_store_is_not_read_as_its_own(closed: Path, left: Path) -> None:
    """Its salts and checksums are right, its pages are not of this file."""
    shutil.copy(closed / "store.db", left)
    found = outcome(left)
    assert found == MANY or isinstance(found, str)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_to_a_store(path: Path) -> None:
    elsewhere = path.with_name("elsewhere.db")
    trio.run(SqliteStore.open(elsewhere).aclose)
    path.symlink_to(elsewhere)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make", [make_directory, os.mkfifo, make_socket, link_to_a_store, link_to_nothing]
)
def test_what_is_no_regular_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    make(path)
    before = path.lstat()
    found = outcome(path)
    assert found == f"{path} is not a regular file: move it away, or choose another state directory"
    assert path.lstat() == before


def newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 2")
    db.close()


def somebody_elses(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA application_id = 1")
    db.close()


def in_a_newer_file_format(path: Path) -> None:
    """Both version numbers of the header: SQLite itself must not write such a file, or read it."""
    with path.open("r+b") as file:
        file.seek(18)
        file.write(struct.pack("BB", 3, 3))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (newer, " has schema 2 and this Sandbox knows 1: use the newer Sandbox that wrote it, or"),
        (somebody_elses, " is not a store of Sandbox: choose another state directory"),
        (in_a_newer_file_format, " is damaged (file is not a database): restore a copy"),
    ],
)
def test_what_another_program_wrote_is_refused_and_left_alone(
    change: Callable[[Path], None], told: str, closed: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(closed / "store.db", tmp_path / "store.db"))
    change(path)
    found = outcome(path)
    assert isinstance(found, str) and found.startswith(f"{path}{told}"), found
