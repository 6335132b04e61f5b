from __future__ import annotations

import pytest
import trio
import trio.testing

from sandbox.errors import ImageError, RegistryError
from sandbox.images.flights import Flights, Report, together


class Work:
    """Work that ends when it is told how; counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.gate = trio.Event()
        self.error: Exception | None = None
        self.reports: list[Report] = []

    async def __call__(self, report: Report) -> int:
        self.begun += 1
        self.reports.append(report)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.begun


async def test_those_who_wait_get_what_the_first_one_got() -> None:
    flights, work, got = Flights(), Work(), []

    async def want() -> None:
        got.append(await flights.run("key", work))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(want)
        await trio.testing.wait_all_tasks_blocked()
        assert "key" in flights
        work.gate.set()
    assert (got, work.begun) == ([1, 1, 1], 1)
    assert "key" not in flights


async def test_a_cancelled_first_one_is_succeeded_by_a_waiter() -> None:
    flights, work, got = Flights(), Work(), []
    first = trio.CancelScope()

    async def hasty() -> None:
        with first:
            await flights.run("key", work)

    async def want() -> None:
        got.append(await flights.run("key", work))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hasty)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(want)
        nursery.start_soon(want)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        work.gate.set()
    assert (got, work.begun) == ([2, 2], 2)


async def test_a_failure_is_shared_by_the_same_origin_only() -> None:
    flights, bad, good, ended = Flights(), Work(), Work(), []
    bad.error = RegistryError("x", "wrong password", 401)
    good.gate.set()

    async def want(origin: str, work: Work) -> None:
        try:
            await flights.run("key", work, origin=origin)
        except RegistryError as error:
            ended.append((origin, error.status))
        else:
            ended.append((origin, None))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(want, "a", bad)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(want, "a", bad)
        nursery.start_soon(want, "b", good)
        await trio.testing.wait_all_tasks_blocked()
        bad.gate.set()
    assert sorted(ended, key=str) == [("a", 401), ("a", 401), ("b", None)]
    assert (bad.begun, good.begun) == (1, 1)


async def test_everybody_hears_of_the_progress() -> None:
    flights, work = Flights(), Work()
    heard: list[tuple[str, int]] = []

    async def want(name: str) -> None:
        await flights.run("key", work, report=lambda done, _: heard.append((name, done)))

    async with trio.open_nursery() as nursery:
        for name in ("a", "b"):
            nursery.start_soon(want, name)
            await trio.testing.wait_all_tasks_blocked()
        work.reports[0](7, 9)
        work.gate.set()
    assert sorted(heard) == [("a", 7), ("b", 7)]


async def test_the_first_failure_of_several_jobs_ends_the_others_and_is_itself() -> None:
    async def fail() -> None:
        raise ImageError("first")

    async def wait() -> None:
        await trio.sleep_forever()

    with pytest.raises(ImageError, match="first"):
        await together(wait, fail, wait)
