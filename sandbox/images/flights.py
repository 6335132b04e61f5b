"""Work that several tasks want, done once.

Whoever comes first does it; the others wait for its result. Nobody's work outlives its caller
(there is no background task): when the first is cancelled, a waiter does the work again from what
is there. A failure is shared with waiters of the same origin (same registry and credentials) and
retried by the others, so that one user's wrong password never fails another's pull.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

import trio

from sandbox.errors import SandboxError

T = TypeVar("T")
Report = Callable[[int, int | None], None]
"""Bytes done, bytes in all."""


class _Flight:
    def __init__(self, origin: Hashable) -> None:
        self.origin = origin
        self.ended = trio.Event()
        self.succeeded = False
        self.result: Any = None
        self.error: SandboxError | None = None
        self.watchers: list[Report] = []

    def report(self, done: int, total: int | None) -> None:
        for watcher in self.watchers:
            watcher(done, total)


class Flights:
    """One flight a key at a time."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    async def run(
        self,
        key: str,
        work: Callable[[Report], Awaitable[T]],
        *,
        origin: Hashable = None,
        report: Report | None = None,
    ) -> T:
        """What `work` for `key` returned, to this caller or to another that was doing it.

        `report` hears of the progress of whoever does it.
        """
        while (flight := self._flights.get(key)) is not None:
            await _wait(flight, report)
            if flight.succeeded:
                result: T = flight.result
                return result
            if flight.error is not None and flight.origin == origin:
                raise type(flight.error)(*flight.error.args) from flight.error
        flight = self._flights[key] = _Flight(origin)
        if report is not None:
            flight.watchers.append(report)
        try:
            flight.result = result = await work(flight.report)
            flight.succeeded = True
            return result
        except SandboxError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.ended.set()


async def _wait(flight: _Flight, report: Report | None) -> None:
    if report is not None:
        flight.watchers.append(report)
    try:
        await flight.ended.wait()
    finally:
        if report is not None:
            flight.watchers.remove(report)


async def together(*jobs: Callable[[], Awaitable[None]]) -> None:
    """Run all; the first SandboxError cancels the rest and is raised as itself, not in a group."""
    failures: list[SandboxError] = []

    async def guarded(job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except SandboxError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(guarded, job)
    if failures:
        raise failures[0]
