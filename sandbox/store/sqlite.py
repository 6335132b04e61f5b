"""The store on one SQLite file (`store.log`): heads in memory, one writer thread, watches.

The heads are kept in memory too: a read is a dictionary's, and decodes a value once. A write, which
may wait for a disk, runs in the writer thread. That thread takes whatever has queued up meanwhile
and commits it at once: the more callers wait for the disk, the more of them one fsync serves. When
nobody waits it lingers a moment for more, since every time it wakes it takes the interpreter away
from the event loop. What it has committed reaches the heads, the watches and the callers together.
Durability is SQLite's `synchronous`: FULL syncs the WAL before COMMIT returns; NORMAL leaves that
to the next FULL commit or checkpoint, which syncs everything written before it too.

Only a watch that has fallen behind reads the log, on a connection of its own: in WAL mode neither
waits for the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import trio

from sandbox.errors import StoreError
from sandbox.store.base import Change, Versioned
from sandbox.store.log import Log, Reader, Reserve, Write
from sandbox.store.watch import LAST_KEY, Cursor, Sleepers, Watch, span

T = TypeVar("T", bound=msgspec.Struct)

_BATCH = 256
"""Transactions in one commit: bounds how long the first of them waits for the last."""
_LINGER_S = 0.002
"""How long a write that nobody waits for may wait for others: what a reader does not notice."""
_RECENT = 512
"""Log entries that are kept in memory for watches: several launches of several tasks at once."""
_PAGE = 64
"""Log entries that a watch reads at a time: bounds what a slow one holds in memory."""


class SqliteStore:
    """`sandbox.store.base.Store` on one file, for the thread that opened it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._reader = Reader(log.path)
        self._heads = {key: _Head(rev, value) for key, rev, value in self._reader.heads()}
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
        reserve: Path | None = None,
    ) -> Self:
        """Open or create the store; the log keeps `keep` revisions, and not above `keep_bytes`.

        `reserve` is a file that keeps room for a full disk, beside it; None keeps none.

        Neither this nor reading needs an event loop. Raises StoreError for a file that is damaged,
        that is no store, or that a newer Sandbox wrote.
        """
        kept = Reserve(reserve) if reserve is not None else None
        return cls(Log.open(path, keep, keep_bytes, clock, kept))

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
            self._check_open()
            self._reader.close()  # first: the last to close moves the WAL into the file
            closing = _Close()
            self._submit(closing)
            self._closing = closing
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
        changes = self._reader.page(cursor, newest, within, _PAGE)
        # Looked at after the read: a compaction raises its floor before it deletes.
        if cursor < (self._log.floor, LAST_KEY):
            raise StoreError(
                f"what followed revision {cursor[0]} is forgotten: the oldest that can be asked"
                f" after is {self._log.floor}"
            )
        if len(changes) < _PAGE:
            return changes, (newest, LAST_KEY)
        return changes, (changes[-1].rev, changes[-1].key)

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
class _Write(_Job, Write):
    is_posted: bool = field(default=False, kw_only=True)
    """Nobody waits for it; its error is told to the next caller."""


@dataclass(eq=False)
class _Compact(_Job):
    keep: int

    def run(self, log: Log) -> None:
        log.compact(log.revision - self.keep)


class _Close(_Job):
    def run(self, log: Log) -> None:
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


def _checked(key: str) -> str:
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key or key >= LAST_KEY:
        raise ValueError(f"not a key: {key!r}")
    key.encode()
    return key
