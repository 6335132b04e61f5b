"""The revision log in one SQLite file: a log, its heads, one writer thread, WAL.

The heads are kept in memory too: a read is a dictionary's, and decodes a value once. A write, which
may wait for a disk, runs in the writer thread. That thread takes whatever has queued up meanwhile
and commits it at once: the more callers wait for the disk, the more of them one fsync serves. When
nobody waits it lingers a moment for more, since every time it wakes it takes the interpreter away
from the event loop. What it has committed reaches the heads, the watches and the callers together.
Durability is SQLite's `synchronous`: FULL syncs the WAL before COMMIT returns; NORMAL leaves that
to the next FULL commit or checkpoint, which syncs everything written before it too.

Only a watch that has fallen behind reads the log, on a connection of its own: in WAL mode neither
waits for the other.

The log is cut at a number of revisions and at a number of bytes, a little at a time. Pages that are
free beyond a quarter of the file go back to the file system.

One process opens a file at a time: the lock of the state directory sees to that, not this module.
A copy of a live directory must be of one instant (a snapshot, or the agent stopped), because
`store.db` and `store.db-wal` are halves of one thing.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import trio

from sandbox.errors import Conflict, StoreError
from sandbox.store.base import Change, Versioned
from sandbox.store.watch import LAST_KEY, Cursor, Sleepers, Watch, span

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x53424C47
"""SQLite's mark for whose file this is: "SBLG"."""

_SCHEMA = (
    """
    CREATE TABLE log (
        rev     INTEGER NOT NULL,  -- revision of the transaction that wrote this; the first is 1
        key     TEXT    NOT NULL,  -- what it wrote: slash-separated, no slash at the ends
        prev    INTEGER NOT NULL,  -- revision that this replaced; 0: the key did not exist
        deleted INTEGER NOT NULL,  -- 1: the key was removed and value is NULL; else 0
        at      REAL    NOT NULL,  -- when, in seconds since the epoch; a clock may have gone back
        value   BLOB,              -- the value as JSON in UTF-8
        PRIMARY KEY (rev, key)     -- a transaction may write many keys, each of them once
    ) STRICT
    """,
    """
    CREATE TABLE head (
        key     TEXT    NOT NULL PRIMARY KEY,  -- every key that exists
        rev     INTEGER NOT NULL,              -- revision that wrote it last
        value   BLOB    NOT NULL               -- the bytes that the log had for it
    ) STRICT
    """,
    """
    CREATE TABLE compacted (
        rev     INTEGER NOT NULL   -- one row: the log entries up to this revision are forgotten
    ) STRICT
    """,
    "INSERT INTO compacted VALUES (0)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_BATCH = 256
"""Transactions in one commit: bounds how long the first of them waits for the last."""
_LINGER_S = 0.002
"""How long a write that nobody waits for may wait for others: what a reader does not notice."""
_RECENT = 512
"""Log entries that are kept in memory for watches: several launches of several tasks at once."""
_PAGE = 64
"""Log entries that a watch reads at a time: bounds what a slow one holds in memory."""
_HEADER_BYTES = 100
"""A database file begins with these; SQLite takes a shorter one for an empty database."""
_WAL_LEFT_BYTES = 4 << 20
"""What a checkpoint may leave of the WAL file after a burst."""


class SqliteStore:
    """`sandbox.store.base.Store` on one file, for the thread that opened it."""

    def __init__(self, log: _Log) -> None:
        self._log = log
        self._reader = _connect(log.path)
        self._heads = _read_heads(log.path, self._reader)
        self._revision = log.revision
        """Up to which the heads are told. The log may be ahead of it by what is in `_answered`."""
        self._decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}
        self._sleepers = Sleepers()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._hurry: queue.SimpleQueue[None] = queue.SimpleQueue()
        """A word for each job that somebody waits for, so that the writer does not linger."""
        self._answered: deque[_Job] = deque()
        self._recent: deque[Change] = deque(maxlen=_RECENT)
        self._before_recent = self._revision
        """The newest revision of which something is no longer in `_recent`."""
        self._closing: _Close | None = None
        self._unheard: Exception | None = None
        self._loop: trio.lowlevel.TrioToken | None = None
        # A daemon: a process that dies without aclose loses nothing that was acknowledged.
        threading.Thread(target=self._work, name="store", daemon=True).start()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        keep: int = 10_000,
        keep_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open or create the store; the log keeps `keep` revisions, and not above `keep_bytes`.

        Neither this nor reading needs an event loop. Raises StoreError for a file that is damaged,
        that is no store, or that a newer Sandbox wrote.
        """
        return cls(_Log.open(path, keep, keep_bytes, clock))

    @property
    def revision(self) -> int:
        self._check_open()
        return self._revision

    @property
    def compacted(self) -> int:
        self._check_open()
        floor: int = self._log.floor
        return floor

    def get(self, key: str, kind: type[T]) -> Versioned[T] | None:
        self._check_open()
        head = self._heads.get(key)
        return self._versioned(key, head, kind) if head is not None else None

    def list(self, prefix: str, kind: type[T]) -> Sequence[Versioned[T]]:
        return [self._versioned(key, self._heads[key], kind) for key in self.keys(prefix)]

    def keys(self, prefix: str) -> Sequence[str]:
        self._check_open()
        span(prefix)  # refuses what is no prefix
        return sorted(key for key in self._heads if key.startswith(prefix))

    async def txn(
        self,
        put: Mapping[str, msgspec.Struct],
        *,
        delete: Collection[str] = (),
        expect: Mapping[str, int] | None = None,
        durable: bool = True,
    ) -> int:
        """As the protocol says. What changes nothing returns the revision that there is already.

        Cancelled before the write was handed over, nothing happens. After that the outcome is
        returned, and the cancellation strikes at the caller's next checkpoint.
        """
        compared = {_checked(k): rev for k, rev in (expect or {}).items()}
        write = _Write(_entries(put, delete), compared, durable)
        await self._do(write)
        return write.rev

    def post(self, put: Mapping[str, msgspec.Struct]) -> None:
        self._submit(_Write(_entries(put, ()), {}, False, is_posted=True))

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        if after > self.revision:
            raise StoreError(f"revision {after} was never written; the newest is {self.revision}")
        return Watch(self._sleepers, prefix, after, partial(self._page, span(prefix)))

    async def compact(self, keep: int) -> None:
        if keep < 0:
            raise ValueError(f"cannot keep {keep} revisions")
        await self._do(_Compact(keep))

    async def aclose(self) -> None:
        if self._closing is None:
            closing = _Close()
            self._submit(closing)
            self._closing = closing
            self._reader.close()
            self._sleepers.wake_all()
        with trio.CancelScope(shield=True):
            await self._closing.done.wait()
        if self._closing.error is not None:
            raise self._closing.error

    # In the event loop's thread --------------------------------------------------------------

    def _check_open(self) -> None:
        if self._answered:
            self._hear()
        if self._closing is not None:
            raise StoreError(f"{self._log.path} is closed")
        if self._unheard is not None:
            error, self._unheard = self._unheard, None
            raise error

    def _read(self, query: str, *values: object) -> Sequence[tuple[Any, ...]]:
        self._check_open()
        with _explained(self._log.path):
            # fetchall also ends the statement: an open one would hold back the checkpoints.
            return self._reader.execute(query, values).fetchall()

    def _versioned(self, key: str, head: _Head, kind: type[T]) -> Versioned[T]:
        known = head.decoded
        if known is None or type(known.value) is not kind:
            known = head.decoded = Versioned(
                key=key, rev=head.rev, value=self._decode(key, head, kind)
            )
        return known

    def _decode(self, key: str, head: _Head, kind: type[T]) -> T:
        decoder = self._decoders.get(kind)
        if decoder is None:
            decoder = self._decoders[kind] = msgspec.json.Decoder(kind)
        try:
            value: T = decoder.decode(head.value)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._log.path}: {key} is no {kind.__name__}: {error}") from error
        return value

    def _page(self, within: tuple[str, str], cursor: Cursor) -> tuple[Sequence[Change], Cursor]:
        newest = self.revision
        if cursor >= (newest, LAST_KEY):
            return (), cursor
        if cursor >= (max(self._before_recent, self._log.floor), LAST_KEY):
            return self._news(within, cursor), (newest, LAST_KEY)
        rows = self._read(
            "SELECT rev, key, value, at FROM log WHERE (rev, key) > (?, ?) AND rev <= ?"
            " AND key >= ? AND key < ? ORDER BY rev, key LIMIT ?",
            *(*cursor, newest, *within, _PAGE),
        )
        # Looked at after the read: a compaction raises its floor before it deletes.
        if cursor < (self._log.floor, LAST_KEY):
            raise StoreError(f"what followed revision {cursor[0]} was compacted: list again")
        behind = rows[-1][:2] if len(rows) == _PAGE else (newest, LAST_KEY)
        return [Change(rev=r, key=k, value=v, at=at) for r, k, v, at in rows], behind

    def _news(self, within: tuple[str, str], cursor: Cursor) -> Sequence[Change]:
        """What followed the cursor, for a watch that is only a little behind."""
        found: list[Change] = []
        for change in reversed(self._recent):
            if (change.rev, change.key) <= cursor:
                break
            if within[0] <= change.key < within[1]:
                found.append(change)
        found.reverse()
        return found

    async def _do(self, job: _Job) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._submit(job)
        with trio.CancelScope(shield=True):
            await job.done.wait()
        if job.error is not None:
            raise job.error

    def _submit(self, job: _Job) -> None:
        self._check_open()
        self._loop = trio.lowlevel.current_trio_token()
        self._jobs.put(job)
        if not (isinstance(job, _Write) and job.is_posted):
            self._hurry.put(None)

    def _hear(self) -> None:
        """What the writer has done since, in its order."""
        while self._answered:
            job = self._answered.popleft()
            self._revision = max(self._revision, job.rev)
            for change in job.changed:
                if len(self._recent) == _RECENT:
                    self._before_recent = self._recent[0].rev
                self._recent.append(change)
                if change.value is None:
                    self._heads.pop(change.key, None)
                else:
                    self._heads[change.key] = _Head(change.rev, change.value)
            job.done.set()
            if job.error is not None and isinstance(job, _Write) and job.is_posted:
                self._unheard = job.error
            self._sleepers.changed(job.changed)

    # In the writer thread --------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            writes, other = _take(self._jobs, self._hurry)
            if writes:
                self._log.commit(writes)
                self._report(writes)
                self._log.trim()
            if other is not None:
                try:
                    other.run(self._log)
                except StoreError as error:
                    other.error = error
                self._report([other])
            if isinstance(other, _Close):
                return

    def _report(self, jobs: Sequence[_Job]) -> None:
        assert self._loop is not None, "_submit has set it"
        self._answered.extend(jobs)
        # When the loop has ended, so has everybody who waited; the next one hears it first.
        with suppress(trio.RunFinishedError):
            self._loop.run_sync_soon(self._hear, idempotent=True)


def _entries(put: Mapping[str, msgspec.Struct], delete: Collection[str]) -> dict[str, bytes | None]:
    entries: dict[str, bytes | None] = {_checked(key): None for key in delete}
    for key, value in put.items():
        if key in entries:
            raise ValueError(f"{key} is both written and deleted")
        entries[_checked(key)] = msgspec.json.encode(value)
    return entries


@dataclass(eq=False)
class _Job:
    """Work for the writer thread; the fields below are its answer, complete when `done` is set."""

    done: trio.Event = field(default_factory=trio.Event, kw_only=True)
    error: Exception | None = field(default=None, kw_only=True)
    rev: int = field(default=0, kw_only=True)
    changed: Sequence[Change] = field(default=(), kw_only=True)


@dataclass(eq=False)
class _Write(_Job):
    entries: Mapping[str, bytes | None]
    expect: Mapping[str, int]
    durable: bool
    is_posted: bool = False
    """Nobody waits for it; its error is told to the next caller."""


@dataclass(eq=False)
class _Compact(_Job):
    keep: int

    def run(self, log: _Log) -> None:
        log.compact(log.revision - self.keep)


class _Close(_Job):
    def run(self, log: _Log) -> None:
        log.close()


def _take(
    jobs: queue.SimpleQueue[_Job], hurry: queue.SimpleQueue[None]
) -> tuple[list[_Write], _Compact | _Close | None]:
    """The writes that wait now, and the job behind them when it is of another kind.

    While nobody waits for them, a moment's more.
    """
    writes: list[_Write] = []
    job = jobs.get()
    with suppress(queue.Empty):
        hurry.get(timeout=_LINGER_S)
        while True:
            hurry.get_nowait()
    while isinstance(job, _Write):
        writes.append(job)
        if len(writes) == _BATCH:
            return writes, None
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return writes, None
    assert isinstance(job, _Compact | _Close)
    return writes, job


class _Head:
    """The newest value of a key, and what it was last read as."""

    __slots__ = ("decoded", "rev", "value")

    def __init__(self, rev: int, value: bytes) -> None:
        self.rev = rev
        self.value = value
        self.decoded: Versioned[Any] | None = None


def _read_heads(path: Path, reader: sqlite3.Connection) -> dict[str, _Head]:
    with _explained(path):
        rows = reader.execute("SELECT key, rev, value FROM head").fetchall()
    return {key: _Head(rev, value) for key, rev, value in rows}


class _Batch:
    """What one commit will write: each transaction after the one before it, or refused. Pure."""

    def __init__(self, revision: int, heads: Mapping[str, int]) -> None:
        self.revision = revision
        self.revs: dict[str, int] = {}
        """What it makes of the heads' revisions; 0 for a key that is gone."""
        self.changes: list[Change] = []
        self.prevs: list[int] = []
        self._heads = heads

    def add(self, write: _Write, at: float) -> None:
        for key, expected in write.expect.items():
            if (found := self._rev(key)) != expected:
                write.error = Conflict(key, expected, found)
                return
        entries = write.entries
        changed = sorted(k for k, value in entries.items() if value is not None or self._rev(k))
        if changed:
            self.revision += 1
        write.rev = self.revision
        write.changed = [
            Change(rev=write.rev, key=key, value=entries[key], at=at) for key in changed
        ]
        self.changes += write.changed
        for key in changed:
            self.prevs.append(self._rev(key))
            self.revs[key] = write.rev if entries[key] is not None else 0

    def _rev(self, key: str) -> int:
        rev = self.revs.get(key)
        return self._heads.get(key, 0) if rev is None else rev


class _Log:
    """The writing connection. Used by one thread at a time; `revision` and `floor` by all."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        keep: int,
        keep_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self._db = db
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._clock = clock
        self._synchronous = ""
        self._broken: str | None = None
        self._revs: dict[str, int] = dict(db.execute("SELECT key, rev FROM head").fetchall())
        (self.floor,) = db.execute("SELECT rev FROM compacted").fetchone()
        newest, self._bytes = db.execute(
            "SELECT coalesce(max(rev), 0), coalesce(sum(length(value)), 0) FROM log"
        ).fetchone()
        self.revision: int = max(newest, self.floor)

    @classmethod
    def open(cls, path: Path, keep: int, keep_bytes: int, clock: Callable[[], float]) -> Self:
        if not path.exists():
            _create(path)
        with _explained(path):
            db = _connect(path)
            try:
                _check(path, db)
                return cls(path, db, keep, keep_bytes, clock)
            except BaseException:
                db.close()
                raise

    def close(self) -> None:
        """The last connection to close moves the WAL into the file and removes it."""
        with _explained(self.path):
            self._db.close()

    def commit(self, writes: Sequence[_Write]) -> None:
        """One commit for all of `writes`; what a transaction compares is compared one by one."""
        batch = _Batch(self.revision, self._revs)
        for write in writes:
            batch.add(write, self._clock())
        try:
            self._sync("FULL" if any(write.durable for write in writes) else "NORMAL")
            with self._transaction():
                self._store(batch)
        except Exception as error:
            for write in writes:
                write.changed = ()
                # One exception each: every raise would lengthen the traceback of a shared one.
                write.error = StoreError(str(error))
                write.error.__cause__ = error
            return
        self.revision = batch.revision
        self._bytes += sum(len(change.value or b"") for change in batch.changes)
        for key, rev in batch.revs.items():
            if rev:
                self._revs[key] = rev
            else:
                self._revs.pop(key, None)

    def _store(self, batch: _Batch) -> None:
        """Few statements with many rows: between two of them the event loop takes its turn."""
        self._db.executemany(
            "INSERT INTO log (rev, key, prev, deleted, at, value) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (each.rev, each.key, prev, each.value is None, each.at, each.value)
                for each, prev in zip(batch.changes, batch.prevs, strict=True)
            ],
        )
        last = {change.key: change for change in batch.changes}.values()
        put = [(each.key, each.rev, each.value) for each in last if each.value is not None]
        gone = [(each.key,) for each in last if each.value is None]
        if put:
            self._db.executemany("REPLACE INTO head VALUES (?, ?, ?)", put)
        if gone:
            self._db.executemany("DELETE FROM head WHERE key = ?", gone)

    def trim(self) -> None:
        """Cut the log when it has grown an eighth beyond its bounds."""
        many = self.revision - self.floor > self._keep + self._keep // 8
        big = self._bytes > self._keep_bytes + self._keep_bytes // 8
        if many or big:
            # A failure costs room, nothing else; the next commit tries again.
            with suppress(StoreError):
                self.compact(max(self.revision - self._keep, self._newest_beyond_bytes()))

    def _newest_beyond_bytes(self) -> int:
        """The newest revision that, with all after it, takes more than `keep_bytes`."""
        query = (
            "SELECT max(rev) FROM (SELECT rev, sum(length(value)) OVER (ORDER BY rev DESC) AS size"
            " FROM log) WHERE size > ?"
        )
        with _explained(self.path):
            return self._db.execute(query, (self._keep_bytes,)).fetchone()[0] or 0

    def compact(self, floor: int) -> None:
        """Forget the log up to and including revision `floor`."""
        if floor <= self.floor:
            return
        before, self.floor = self.floor, floor
        try:
            with self._transaction():
                (freed,) = self._db.execute(
                    "SELECT coalesce(sum(length(value)), 0) FROM log WHERE rev <= ?", (floor,)
                ).fetchone()
                self._db.execute("DELETE FROM log WHERE rev <= ?", (floor,))
                self._db.execute("UPDATE compacted SET rev = ?", (floor,))
        except StoreError:
            self.floor = before
            raise
        self._bytes -= freed
        self._give_back()

    def _give_back(self) -> None:
        with _explained(self.path):
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            if free > pages // 4:
                # It steps once a page and has no columns: execute() would stop after one step.
                self._db.executescript(f"PRAGMA incremental_vacuum({free - pages // 4})")

    def _sync(self, mode: str) -> None:
        if mode != self._synchronous:
            with _explained(self.path):
                self._db.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = mode

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._broken is not None:
            raise StoreError(f"{self._broken}; nothing is written until the store is opened again")
        try:
            with _explained(self.path):
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            # After a failed write or fsync the kernel may drop dirty pages and call them clean:
            # a later commit that builds on them could be acknowledged and still be lost.
            if _code(error.__cause__) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT):
                self._broken = str(error)
            raise


def _connect(path: Path) -> sqlite3.Connection:
    """Open an existing file; transactions are ours to begin and end."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
    )


def _create(path: Path) -> None:
    """Make an empty store beside `path` and rename it: a file at `path` was complete once."""
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists():
        raise StoreError(f"{path} is missing but {wal} is there: restore it, or remove both")
    new = path.with_name(f"{path.name}.new")
    try:
        os.close(os.open(new, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        with _explained(new):
            db = _connect(new)
            try:
                # Before the first table, or it needs a full VACUUM.
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                db.execute("BEGIN")
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute("COMMIT")
            finally:
                db.close()
        new.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StoreError(f"cannot create {path}: {error.strerror}") from error


def _check(path: Path, db: sqlite3.Connection) -> None:
    """Refuse what is not a whole store of this version; leave the connection in WAL mode."""
    size = path.stat().st_size
    if size < _HEADER_BYTES:
        raise StoreError(_damaged(path, f"it has {size} bytes"))
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if owner != _APPLICATION_ID:
        raise StoreError(f"{path} is not a store of Sandbox: choose another state directory")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version} and this Sandbox knows {SCHEMA_VERSION}: "
            "use the newer Sandbox that wrote it, or another state directory"
        )
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"{path} is on a file system without shared memory maps: use a local disk")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_LEFT_BYTES}")
    (fault,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        raise StoreError(_damaged(path, fault.splitlines()[-1]))


def _damaged(path: Path, how: str) -> str:
    return (
        f"{path} is damaged ({how}): restore a copy of the state directory, "
        f"or move {path.name}* away to begin with an empty store"
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors leave as StoreError, saying what to do where that is known."""
    try:
        yield
    except sqlite3.Error as error:
        match _code(error):
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                text = _damaged(path, str(error))
            case sqlite3.SQLITE_FULL:
                text = f"{path}: no space left on its disk"
            case sqlite3.SQLITE_BUSY:
                text = f"{path}: another process holds it: {error}"
            case _:
                text = f"{path}: {error}"
        raise StoreError(text) from error


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code: the extended ones say more in the upper bytes."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _checked(key: str) -> str:
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key or key >= LAST_KEY:
        raise ValueError(f"not a key: {key!r}")
    key.encode()
    return key
