"""The log itself: one SQLite file with a table of revisions and one of heads, in WAL mode.

Everything that SQLite does is done here, and nothing else; no event loop is known here. An append
is a write into the page cache (70 us): `synchronous` is NORMAL, and SQLite syncs only the header of
a WAL that begins anew, once in some thousand appends. What waits for a disk is apart, for a thread:
`sync` makes all that was appended durable, `checkpoint` moves the WAL into the file.

The log is cut at a number of revisions and at a number of bytes, a little at a time. Pages that are
free beyond a quarter of the file go back to the file system.

One process opens a file at a time: the lock of the state directory sees to that, not this module.
A copy of a live directory must be of one instant (a snapshot, or the agent stopped), because
`store.db` and `store.db-wal` are halves of one thing.

On a full disk even forgetting needs room: a page in the WAL, and its index when the file is opened.
So a `Reserve` is kept beside the file, given up when there is no room and taken again later.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from sandbox.errors import StoreError
from sandbox.store.base import Change

T = TypeVar("T")

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

_HEADER_BYTES = 100
"""A database file begins with these; SQLite takes a shorter one for an empty database."""
_PATIENCE_S = 0.25
"""How long somebody else's tool may hold the file: the event loop waits meanwhile."""
_PAGE_BYTES = 4096
_WAL_PAGES = 4096
"""So many in the WAL are moved into the file."""
_WAL_MOST = 4 * _WAL_PAGES
"""So many are moved while nobody appends: only when all are moved the WAL begins anew."""
_WAL_LEFT_BYTES = 2 * _WAL_PAGES * _PAGE_BYTES
"""What a WAL that begins anew keeps of its file after a burst."""
_CUT = 64
"""Revisions that are forgotten at a time, and pages given back: less than a millisecond."""
_NEEDED_BYTES = 64 << 10
"""Where a file cannot have these a disk is full: the index of a WAL is half of it."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(StoreError):
    """There is no room for what was to be written, or for opening the file."""


class Reserve:
    """A file of `size` bytes that only keeps room: for forgetting things on a full disk."""

    def __init__(self, path: Path, size: int = 1 << 20, every_s: float = 60) -> None:
        self._path = path
        self._size = size
        self._every_s = every_s
        self._next = 0.0

    def take(self) -> None:
        """Now and then, if it is not there and leaves three times as much to others."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self._every_s
        with suppress(OSError):
            if self._path.exists():
                return
            disk = os.statvfs(self._path.parent)
            if disk.f_bfree * disk.f_frsize < 4 * self._size:
                return
            new = self._path.with_name(f"{self._path.name}.new")
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
            fd = os.open(new, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._size)
                new.rename(self._path)
            except OSError:
                new.unlink()
                raise
            finally:
                os.close(fd)

    def give_up(self) -> bool:
        """Whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


def _with_room(reserve: Reserve | None, act: Callable[[], T]) -> T:
    """What `act` returns; tried once more with the reserve given up when there is no room."""
    try:
        return act()
    except DiskFull:
        if reserve is None or not reserve.give_up():
            raise
        return act()


class Log:
    """The file, open. Used by one thread at a time, but for `sync` and `checkpoint`."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        keep: int,
        keep_bytes: int,
        clock: Callable[[], float],
        reserve: Reserve | None,
    ) -> None:
        self.path = path
        self._reserve = reserve
        self._db = db
        self._keep = keep
        self._keep_bytes = keep_bytes
        self.clock = clock
        self._broken: str | None = None
        self._wal: int | None = None
        """The WAL, open since the first sync: an error that the kernel has told to one descriptor
        is not told to another that is opened later."""
        self._unmoved = 0
        """Pages that went into the WAL since it was last moved into the file, about."""
        self.floor: int = db.execute("SELECT rev FROM compacted").fetchone()[0]
        newest, self._bytes = db.execute(
            "SELECT coalesce(max(rev), 0), coalesce(sum(length(value)), 0) FROM log"
        ).fetchone()
        self.revision: int = max(newest, self.floor)

    @classmethod
    def open(
        cls,
        path: Path,
        keep: int,
        keep_bytes: int,
        clock: Callable[[], float],
        reserve: Reserve | None = None,
    ) -> Self:
        log = _with_room(reserve, lambda: cls._open(path, keep, keep_bytes, clock, reserve))
        if reserve is not None:
            reserve.take()
        return log

    @classmethod
    def _open(
        cls,
        path: Path,
        keep: int,
        keep_bytes: int,
        clock: Callable[[], float],
        reserve: Reserve | None,
    ) -> Self:
        _check_files(path)
        if not path.exists():
            _create(path)
        with _explained(path):
            with closing(_connect(path, "ro")) as db:
                _check(path, db)  # who only reads moves no WAL: what is refused stays as it is
            db = _connect(path)
            try:
                _prepare(path, db)
                return cls(path, db, keep, keep_bytes, clock, reserve)
            except BaseException:
                db.close()
                raise

    def close(self) -> None:
        """The last connection to close moves the WAL into the file and removes it."""
        if self._wal is not None:
            os.close(self._wal)
        with _explained(self.path):
            self._db.close()

    # Reading ---------------------------------------------------------------------------------

    def heads(self) -> Sequence[tuple[str, int, bytes]]:
        """Key, revision and value of every key that exists."""
        return self._rows("SELECT key, rev, value FROM head")

    def page(
        self, after: tuple[int, str], until: int, within: tuple[str, str], limit: int
    ) -> Sequence[Change]:
        """What followed the entry `after`, up to revision `until`, of keys from `within[0]` to
        below `within[1]`: the first `limit` of them."""
        rows = self._rows(
            "SELECT rev, key, value, at FROM log WHERE (rev, key) > (?, ?) AND rev <= ?"
            " AND key >= ? AND key < ? ORDER BY rev, key LIMIT ?",
            *(*after, until, *within, limit),
        )
        return [Change(rev=r, key=k, value=v, at=at) for r, k, v, at in rows]

    def _rows(self, query: str, *values: object) -> Sequence[tuple[Any, ...]]:
        with _explained(self.path):
            # fetchall also ends the statement: an open one would hold back the checkpoints.
            return self._db.execute(query, values).fetchall()

    # Writing ---------------------------------------------------------------------------------

    def append(self, changes: Sequence[Change], prevs: Sequence[int]) -> None:
        """The transactions that follow `revision`, in one commit; not yet synced. `prevs` are the
        revisions that the changes replace, 0 for a key that does not exist."""
        _with_room(self._reserve, lambda: self._insert(changes, prevs))
        self.revision = changes[-1].rev
        size = sum(len(change.value or b"") for change in changes)
        self._bytes += size
        self._unmoved += 2 * len(changes) + 2 * size // _PAGE_BYTES

    def _insert(self, changes: Sequence[Change], prevs: Sequence[int]) -> None:
        rows = zip(changes, prevs, strict=True)
        last = {change.key: change for change in changes}.values()
        put = [(c.key, c.rev, c.value) for c in last if c.value is not None]
        gone = [(c.key,) for c in last if c.value is None]
        with self._transaction():
            self._db.executemany(
                "INSERT INTO log (rev, key, prev, deleted, at, value) VALUES (?, ?, ?, ?, ?, ?)",
                [(c.rev, c.key, prev, c.value is None, c.at, c.value) for c, prev in rows],
            )
            if put:
                self._db.executemany("REPLACE INTO head VALUES (?, ?, ?)", put)
            if gone:
                self._db.executemany("DELETE FROM head WHERE key = ?", gone)

    def sync(self) -> None:
        """All that was appended by now reaches the disk. In a thread of its own: it waits.

        SQLite recovers what the WAL holds, so the WAL is all that must be there; a part of it that
        was moved into the file meanwhile was synced for that. Its locks are on other files, so that
        closing a descriptor of this one drops none.
        """
        self._check_whole()
        try:
            if self._wal is None:
                self._wal = os.open(_wal(self.path), os.O_RDONLY | os.O_CLOEXEC)
                _sync_directory(self.path.parent)
            os.fdatasync(self._wal)
        except OSError as error:
            # The kernel may call the pages clean now: the next sync would be no proof.
            self._broken = f"{self.path}: sync: {error.strerror}"
            raise StoreError(self._broken) from error

    @property
    def wants_checkpoint(self) -> bool:
        return self._unmoved > _WAL_PAGES

    def checkpoint(self) -> bool:
        """Move the WAL into the file. In a thread of its own: it waits for the disk, and whoever
        appends meanwhile does not wait for it. False when the WAL is too long all the same, because
        something was always appended: then it is to be called once more, while nothing is."""
        self._check_whole()
        self._unmoved = 0
        try:
            with _explained(self.path), closing(_connect(self.path)) as db:
                pages: int = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1]
        except StoreError as error:
            self._note_breach(error)
            raise
        return pages < _WAL_MOST

    # Forgetting ------------------------------------------------------------------------------

    def trim(self) -> None:
        """Cut the log a little when it has grown an eighth beyond its bounds; look after the
        reserve."""
        if self._reserve is not None:
            self._reserve.take()
        many = self.revision - self.floor > self._keep + self._keep // 8
        big = self._bytes > self._keep_bytes + self._keep_bytes // 8
        if many or big:
            # A failure costs room, nothing else; the next commit tries again.
            with suppress(StoreError):
                self._cut(self.revision - self._keep, self._bytes - self._keep_bytes)

    def compact(self, floor: int) -> bool:
        """Forget some of the log up to and including revision `floor`; False when all is."""
        if floor <= self.floor:
            return False
        self._cut(floor, 0)
        return True

    def _cut(self, floor: int, excess: int) -> None:
        """Forget the oldest revisions: up to `floor`, and on until `excess` bytes are freed. Only
        some at a time, since the event loop waits."""
        oldest = self._rows(
            "SELECT rev, coalesce(sum(length(value)), 0) FROM log"
            " GROUP BY rev ORDER BY rev LIMIT ?",
            _CUT,
        )
        before, freed = self.floor, 0
        for rev, size in oldest:
            if rev > floor and freed >= excess:
                break
            self.floor, freed = rev, freed + size
        try:
            with self._transaction():
                self._db.execute("DELETE FROM log WHERE rev <= ?", (self.floor,))
                self._db.execute("UPDATE compacted SET rev = ?", (self.floor,))
        except StoreError:
            self.floor = before
            raise
        self._bytes -= freed
        self._unmoved += _CUT
        self._give_back()

    def _give_back(self) -> None:
        with _explained(self.path):
            (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            if free > pages // 4:
                # It steps once a page and has no columns: execute() would stop after one step.
                pages = min(free - pages // 4, _CUT)
                self._db.executescript(f"PRAGMA incremental_vacuum({pages})")

    # -----------------------------------------------------------------------------------------

    @property
    def broken(self) -> str | None:
        """Why nothing is written any more."""
        return self._broken

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise StoreError(f"{self._broken}; nothing is written until the store is opened again")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._check_whole()
        try:
            with _explained(self.path):
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
        except BaseException as error:
            self._note_breach(error)
            try:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            except sqlite3.Error as failure:
                self._broken = f"{self.path}: rollback: {failure}"
            raise

    def _note_breach(self, error: BaseException) -> None:
        """After a failed write or fsync the kernel may drop dirty pages and call them clean: a
        later commit that builds on them could be acknowledged and still be lost."""
        if _code(error.__cause__) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT):
            self._broken = str(error)


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _check_files(path: Path) -> None:
    """Refuse what SQLite would take for less than it is.

    It would open the file behind a link, with a WAL beside that one; and a file whose WAL was taken
    away, as it was when that was last moved: then a sweep would end what runs. A store that was
    closed has neither WAL nor index; both are made in this order and removed in the reverse one.
    """
    wal, index = _wal(path), path.with_name(f"{path.name}-shm")
    for file in (path, wal):
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise StoreError(
                f"{file} is not a regular file: move it away, or choose another state directory"
            )
    if path.exists() and index.exists() and not wal.exists():
        raise StoreError(
            f"{wal} is missing, which held what was written last: restore it, or remove {index} to"
            f" go on with what {path} knows"
        )


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open an existing file; transactions are ours to begin and end."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=_PATIENCE_S,
        check_same_thread=False,
    )


def _create(path: Path) -> None:
    """Make an empty store beside `path` and rename it: a file at `path` was complete once."""
    wal = _wal(path)
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
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(_full(path)) from error
        raise StoreError(f"cannot create {path}: {error.strerror}") from error


def _check(path: Path, db: sqlite3.Connection) -> None:
    """Refuse what is not a whole store of this version."""
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
    (fault,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if fault != "ok":
        raise StoreError(_damaged(path, fault.splitlines()[-1]))


def _prepare(path: Path, db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"{path} is on a file system without shared memory maps: use a local disk")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_LEFT_BYTES}")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")


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
                raise DiskFull(_full(path)) from error
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_CANTOPEN if _is_full(path.parent):
                raise DiskFull(_full(path)) from error
            case sqlite3.SQLITE_BUSY:
                text = f"{path}: another process holds it: {error}"
            case _:
                text = f"{path}: {error}"
        raise StoreError(text) from error


def _full(path: Path) -> str:
    return (
        f"no space left on the disk of {path}: free some, "
        "then `sandbox prune`, `sandbox rm` and `sandbox image rm` can free more"
    )


def _is_full(directory: Path) -> bool:
    """Tried, because counts do not tell: of quotas, of inodes, of what a file system sets aside."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, _NEEDED_BYTES)
    except OSError as error:
        return error.errno in _NO_ROOM
    return False


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code: the extended ones say more in the upper bytes."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
