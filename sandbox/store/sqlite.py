"""The store on one SQLite file (`store.log`): heads in memory, one fsync for many, watches.

The heads are kept in memory too: a read is a dictionary's, and decodes a value once. What is
written is appended in place, in the event loop's thread: that takes less than the way to another
thread and back. What is only posted goes with the next transaction, with the next read, or after a
moment: one commit for all of it. Only who asked for durability waits, for a thread that syncs: one
at a time, and each sync serves all who asked before it began.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import msgspec
import trio

from sandbox.errors import Conflict, StoreError
from sandbox.store.base import Change, Versioned
from sandbox.store.log import Log, Reserve
from sandbox.store.watch import LAST_KEY, Cursor, Sleepers, Watch, span

T = TypeVar("T", bound=msgspec.Struct)

_LINGER_S = 0.005
"""How long what is posted waits for more of it: what a reader does not notice."""
_TELL_S = 0.1
_RECENT = 512
"""Log entries that are kept in memory for watches: several launches of several tasks at once."""
_PAGE = 64
"""Log entries that a watch reads at a time: bounds what a slow one holds in memory."""


class SqliteStore:
    """`sandbox.store.base.Store` on one file, for the thread that opened it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._heads = {key: _Head(rev, _Value(value)) for key, rev, value in log.heads()}
        self._decoders: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {}
        self._sleepers = Sleepers()
        self._posted: list[dict[str, _Value | None]] = []
        self._is_lingering = False
        self._unheard: StoreError | None = None
        """Why something that was posted is not written; for the next caller."""
        self._recent: deque[Change] = deque(maxlen=_RECENT)
        self._before_recent = log.revision
        """The newest revision of which something is no longer in `_recent`."""
        self._disk = trio.Lock()
        """Of the one that waits for the disk."""
        self._thread = trio.CapacityLimiter(1)
        """In which it waits: whatever else has threads, this one is free."""
        self._synced = 0
        self._breach = trio.Event()
        self._is_moving = False
        """The WAL is being moved into the file, or is about to be."""
        self._is_closed = False

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
        self.flush()
        return self._log.revision

    @property
    def compacted(self) -> int:
        self.flush()
        return self._log.floor

    def get(self, key: str, kind: type[T]) -> Versioned[T] | None:
        self.flush()
        head = self._heads.get(key)
        return self._versioned(key, head, kind) if head is not None else None

    def list(self, prefix: str, kind: type[T]) -> Sequence[Versioned[T]]:
        return [self._versioned(key, self._heads[key], kind) for key in self.keys(prefix)]

    def value(self, change: Change, kind: type[T]) -> T:
        head = self._heads.get(change.key)
        if head is None or head.rev != change.rev:
            assert change.value is not None, "a removed key has no value"
            head = _Head(change.rev, _Value(change.value))
        return self._versioned(change.key, head, kind).value

    def keys(self, prefix: str) -> Sequence[str]:
        self.flush()
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
        """As the protocol says. What changes nothing returns the revision that there is already."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        batch = self._batch()
        try:
            batch.expect({_checked(key): rev for key, rev in (expect or {}).items()})
            batch.add(_entries(put, delete))
        finally:
            self._commit(batch)
        rev = self._log.revision
        await (self._sync(rev) if durable else trio.lowlevel.cancel_shielded_checkpoint())
        return rev

    def post(self, put: Mapping[str, msgspec.Struct]) -> None:
        self._check_open()
        self._posted.append(_entries(put, ()))
        if not self._is_lingering:
            trio.lowlevel.spawn_system_task(self._write_posted)
            self._is_lingering = True

    def flush(self) -> None:
        self._check_open()
        if self._posted:
            self._commit(self._batch())

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        if after > self.revision:
            raise StoreError(f"revision {after} was never written; the newest is {self.revision}")
        return Watch(self._sleepers, prefix, after, partial(self._page, span(prefix)))

    async def compact(self, keep: int) -> None:
        if keep < 0:
            raise ValueError(f"cannot keep {keep} revisions")
        floor = self.revision - keep
        while self._log.compact(floor):
            await trio.lowlevel.checkpoint()
            self._check_open()

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._disk:
                if self._is_closed:
                    return
                try:
                    self.flush()
                finally:
                    self._is_closed = True
                    self._sleepers.wake_all()
                    await trio.to_thread.run_sync(self._log.close, limiter=self._thread)
                self._synced = self._log.revision  # the WAL was moved, and synced for that

    async def until_broken(self) -> None:
        """Raises StoreError once nothing is written any more: rows may be there that were refused,
        and nobody looks after them. A moment later, so that who was refused hears of it."""
        await self._breach.wait()
        await trio.sleep(_TELL_S)
        raise StoreError(self._log.broken)

    # Writing ---------------------------------------------------------------------------------

    async def _write_posted(self) -> None:
        try:
            await trio.sleep(_LINGER_S)
        finally:
            self._is_lingering = False
            if self._posted and not self._is_closed:
                with suppress(StoreError):  # the next caller hears of it
                    self._commit(self._batch())

    def _batch(self) -> _Batch:
        """One that begins with what was posted."""
        batch = _Batch(self._log.revision, self._heads, self._log.clock(), bool(self._posted))
        for entries in self._posted:
            batch.add(entries)
        self._posted.clear()
        return batch

    @trio.lowlevel.enable_ki_protection  # what the file has, the heads must have
    def _commit(self, batch: _Batch) -> None:
        """Write it, and tell the heads and the watches of it."""
        if not batch.changes:
            return
        try:
            self._log.append(batch.changes, batch.prevs)
        except StoreError as error:
            self._note_breach()
            if batch.has_posted:
                self._unheard = StoreError(str(error))
            raise
        for change, value in zip(batch.changes, batch.values, strict=True):
            if len(self._recent) == _RECENT:
                self._before_recent = self._recent[0].rev
            self._recent.append(change)
            if value is None:
                del self._heads[change.key]
            else:
                self._heads[change.key] = _Head(change.rev, value)
        for _, changes in groupby(batch.changes, key=attrgetter("rev")):
            self._sleepers.changed(list(changes))
        self._log.trim()
        if self._log.wants_checkpoint and not self._is_moving:
            trio.lowlevel.spawn_system_task(self._move)
            self._is_moving = True

    async def _sync(self, rev: int) -> None:
        """Until revision `rev` is on the disk."""
        with trio.CancelScope(shield=True):
            async with self._disk:
                if self._synced < rev:
                    self._check_open()
                    newest = self._log.revision
                    try:
                        await trio.to_thread.run_sync(self._log.sync, limiter=self._thread)
                    finally:
                        self._note_breach()
                    self._synced = newest

    async def _move(self) -> None:
        """A failure costs room and is tried again later; a damage is told to who writes next."""
        try:
            with suppress(StoreError, RuntimeError):  # the latter: no thread can be had
                async with self._disk:
                    if self._is_closed:
                        return
                    done = await trio.to_thread.run_sync(self._log.checkpoint, limiter=self._thread)
                    if not done:
                        self._log.checkpoint()
        finally:
            self._is_moving = False
            self._note_breach()

    def _note_breach(self) -> None:
        if self._log.broken is not None:
            self._breach.set()

    # Reading ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"{self._log.path} is closed")
        if self._unheard is not None:
            error, self._unheard = self._unheard, None
            raise error

    def _versioned(self, key: str, head: _Head, kind: type[T]) -> Versioned[T]:
        value = head.value
        if type(value.decoded) is not kind:
            value.decoded = self._decode(key, value.encoded, kind)
        return Versioned(key=key, rev=head.rev, value=value.decoded)

    def _decode(self, key: str, encoded: bytes, kind: type[T]) -> T:
        decoder = self._decoders.get(kind)
        if decoder is None:
            decoder = self._decoders[kind] = msgspec.json.Decoder(kind)
        try:
            value: T = decoder.decode(encoded)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._log.path}: {key} is no {kind.__name__}: {error}") from error
        return value

    def _page(self, within: tuple[str, str], cursor: Cursor) -> tuple[Sequence[Change], Cursor]:
        newest = self.revision
        if cursor >= (newest, LAST_KEY):
            return (), cursor
        if cursor >= (max(self._before_recent, self._log.floor), LAST_KEY):
            return self._news(within, cursor), (newest, LAST_KEY)
        changes = self._log.page(cursor, newest, within, _PAGE)
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


def _entries(
    put: Mapping[str, msgspec.Struct], delete: Collection[str]
) -> dict[str, _Value | None]:
    entries: dict[str, _Value | None] = {_checked(key): None for key in delete}
    for key, value in put.items():
        if key in entries:
            raise ValueError(f"{key} is both written and deleted")
        # One that can be changed later is no answer to who reads the key.
        same = value if value.__struct_config__.frozen else None
        entries[_checked(key)] = _Value(msgspec.json.encode(value), same)
    return entries


class _Batch:
    """Transactions for one commit, each a revision that follows the one before. Pure."""

    def __init__(
        self, revision: int, heads: Mapping[str, _Head], at: float, has_posted: bool
    ) -> None:
        self.has_posted = has_posted
        self.changes: list[Change] = []
        self.values: list[_Value | None] = []
        self.prevs: list[int] = []
        """The revisions that the changes replace."""
        self._revision = revision
        self._heads = heads
        self._at = at
        self._revs: dict[str, int] = {}
        """What it makes of the heads' revisions; 0 for a key that is gone."""

    def expect(self, revs: Mapping[str, int]) -> None:
        """Raises Conflict."""
        for key, expected in revs.items():
            if (found := self._rev(key)) != expected:
                raise Conflict(key, expected, found)

    def add(self, entries: Mapping[str, _Value | None]) -> None:
        """One transaction; what changes nothing is none. None as a value removes the key."""
        changed = sorted(k for k, value in entries.items() if value is not None or self._rev(k))
        self._revision += bool(changed)
        for key in changed:
            value = entries[key]
            encoded = value.encoded if value is not None else None
            self.changes.append(Change(rev=self._revision, key=key, value=encoded, at=self._at))
            self.values.append(value)
            self.prevs.append(self._rev(key))
            self._revs[key] = self._revision if value is not None else 0

    def _rev(self, key: str) -> int:
        rev = self._revs.get(key)
        if rev is None:
            head = self._heads.get(key)
            rev = head.rev if head is not None else 0
        return rev


class _Value:
    """What a key was given, and what that was last read as."""

    __slots__ = ("decoded", "encoded")

    def __init__(self, encoded: bytes, decoded: msgspec.Struct | None = None) -> None:
        self.encoded = encoded
        self.decoded: Any = decoded


class _Head(NamedTuple):
    """The newest value of a key."""

    rev: int
    value: _Value


def _checked(key: str) -> str:
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key or key >= LAST_KEY:
        raise ValueError(f"not a key: {key!r}")
    key.encode()
    return key
