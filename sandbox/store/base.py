"""What the rest of Sandbox may ask of its store, whatever engine keeps it.

The store is one log: every transaction gets the next revision and appends what it wrote. `get`
and `list` read the heads, `watch` replays the log after a revision. That is etcd's contract
(kine showed that a few tables are enough for it), so an etcd engine fits behind this protocol
without a change above it. Values are msgspec Structs, stored as JSON.

Keys are slash-separated and end without a slash: `task/<id>/desired`. A prefix ends with one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class Versioned(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A value with the revision that wrote it; `rev` is what a transaction compares."""

    key: str
    rev: int
    value: T


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log. `value` is the raw JSON, None when the key was deleted."""

    rev: int
    key: str
    value: bytes | None
    at: float
    """Seconds since the epoch when it was written."""


class Store(Protocol):
    """Reads are synchronous and cheap (microseconds) and see every write; what was only posted is
    written by the first of them, which may raise what writing it raises."""

    @property
    def revision(self) -> int:
        """The newest revision; 0 for an empty store."""

    @property
    def compacted(self) -> int:
        """Up to this revision the log is forgotten; 0 when all of it is there."""

    def get(self, key: str, kind: type[T]) -> Versioned[T] | None:
        """The value at `key`, or None."""

    def list(self, prefix: str, kind: type[T]) -> Sequence[Versioned[T]]:
        """All values whose key starts with `prefix`, by key."""

    def value(self, change: Change, kind: type[T]) -> T:
        """What the change wrote; not for one that removed its key."""

    def keys(self, prefix: str) -> Sequence[str]:
        """All keys that start with `prefix`, sorted."""

    async def txn(
        self,
        put: Mapping[str, msgspec.Struct],
        *,
        delete: Collection[str] = (),
        expect: Mapping[str, int] | None = None,
        durable: bool = True,
    ) -> int:
        """Write all of `put` and remove all of `delete`, or nothing; returns the new revision.

        `expect` maps keys to the revision they must be at, 0 for "does not exist"; otherwise
        Conflict. With `durable` the write has reached the disk when this returns, though reads and
        watches see it before; without, it survives a kill of the process but perhaps not a power
        cut. Shielded: a caller that is cancelled once it was written is cancelled at its next
        checkpoint.
        """

    def post(self, put: Mapping[str, msgspec.Struct]) -> None:
        """Write without waiting: as `txn` with durable=False, in order with it, nothing compared.

        For facts that their writer holds anyway. Reads see it; watches, and a kill of the process,
        may see it a moment later. Should it fail, the next call of any kind raises that error.
        """

    def flush(self) -> None:
        """Write what was posted, if it is not yet written. Raises StoreError."""

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        """Changes under `prefix` with a revision above `after`, in order, without end.

        Raises StoreError when `after` has been compacted away: list again and watch from there.
        """

    async def compact(self, keep: int) -> None:
        """Forget log entries older than the newest `keep` revisions; heads are never forgotten."""

    async def aclose(self) -> None:
        """Finish what was begun and close. Later calls raise StoreError."""
