"""Watching a log: cursors, and who is woken when a key changes. Engine and SQL are elsewhere.

A watch reads the log in pages from its cursor and sleeps when it has seen the newest revision.
`Sleepers` knows only those that sleep, by prefix, and a commit looks up the prefixes of its keys
there: its cost depends on how deep keys are, not on how many watches there are. Sleeping starts in
the same step as the read that found nothing, so no change falls between. A sleeper is handed its
changes: a watch that keeps up reads nothing, and one that is busy collects nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeAlias

import trio

from sandbox.store.base import Change

Cursor: TypeAlias = tuple[int, str]
"""A revision and a key: the place in the log up to which everything was seen or is not wanted."""

LAST_KEY = "\U0010ffff"
"""Above every key."""


class Sleepers:
    """The watches that wait for news. Used by the event loop's thread only."""

    def __init__(self) -> None:
        self._by_prefix: dict[str, set[Watch]] = {}

    def changed(self, changes: Sequence[Change]) -> None:
        """All that one transaction wrote, by key."""
        concerned: dict[Watch, list[Change]] = {}
        for change in changes:
            for prefix in prefixes(change.key):
                for watch in self._by_prefix.get(prefix, ()):
                    concerned.setdefault(watch, []).append(change)
        for watch, its_changes in concerned.items():
            watch.hand(its_changes)

    def wake_all(self) -> None:
        for watches in self._by_prefix.values():
            for watch in watches:
                watch.wake()

    async def sleep(self, watch: Watch, woken: trio.Event) -> None:
        self._by_prefix.setdefault(watch.prefix, set()).add(watch)
        try:
            await woken.wait()
        finally:
            watches = self._by_prefix[watch.prefix]
            watches.remove(watch)
            if not watches:
                del self._by_prefix[watch.prefix]


class Watch(AsyncIterator[Change]):
    """Changes after a cursor, without end. Nothing to close: a watch that does not wait is unknown.

    `read` gives the changes after a cursor and the cursor behind them; it raises when it cannot.
    """

    def __init__(
        self,
        sleepers: Sleepers,
        prefix: str,
        after: int,
        read: Callable[[Cursor], tuple[Sequence[Change], Cursor]],
    ) -> None:
        self.prefix = prefix
        self._sleepers = sleepers
        self._read = read
        self._cursor: Cursor = (after, LAST_KEY)
        self._page: deque[Change] = deque()
        self._woken = trio.Event()

    async def __anext__(self) -> Change:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._page:
            await trio.lowlevel.cancel_shielded_checkpoint()
        while not self._page:
            changes, self._cursor = self._read(self._cursor)
            self._page.extend(changes)
            if not changes:
                self._woken = trio.Event()
                await self._sleepers.sleep(self, self._woken)
        return self._page.popleft()

    def wake(self) -> None:
        self._woken.set()

    def hand(self, changes: Sequence[Change]) -> None:
        """It sleeps, or was woken and has not run since; what it was handed comes first.

        Whatever lies between was written under other prefixes: no need to read past it, and no
        harm if it is compacted.
        """
        rev = changes[0].rev
        self._page.extend(changes)
        self._cursor = (rev, LAST_KEY)
        self.wake()


def span(prefix: str) -> tuple[str, str]:
    """The least key under `prefix`, and what is above them all."""
    if not prefix:
        return "", LAST_KEY
    if prefix[-1] != "/":
        raise ValueError(f"a prefix ends with a slash: {prefix!r}")
    return prefix, prefix[:-1] + chr(ord("/") + 1)


def prefixes(key: str) -> Iterator[str]:
    """Every prefix that `key` is under, the shortest first."""
    yield ""
    slash = key.find("/")
    while slash >= 0:
        yield key[: slash + 1]
        slash = key.find("/", slash + 1)
