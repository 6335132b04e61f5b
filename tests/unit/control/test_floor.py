"""Which task is stopped when the host's disk runs out, and how much stays free."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from sandbox.control import floor
from sandbox.control.floor import Disk, largest
from sandbox.runtime.storage import Footprint

MIB, GIB = 1 << 20, 1 << 30


def task(allocated_mib: int, outstanding_mib: int = 0) -> Footprint:
    return Footprint(allocated_mib * MIB, outstanding_mib * MIB)


def test_nobody_is_stopped_as_long_as_the_floor_holds() -> None:
    assert largest({"a": task(500)}, GIB, GIB) is None


def test_below_it_the_largest_is_stopped() -> None:
    tasks = {"a": task(500), "b": task(900), "c": task(600)}
    assert largest(tasks, GIB - 1, GIB) == "b"


def test_what_is_written_and_not_yet_on_the_disk_counts() -> None:
    tasks = {"a": task(500), "b": task(10, 600)}
    assert largest(tasks, GIB + 600 * MIB, GIB) is None
    assert largest(tasks, GIB + 599 * MIB, GIB) == "b"


def test_nobody_is_stopped_for_what_others_have_filled() -> None:
    assert largest({"a": task(1)}, 0, GIB) is None
    assert largest({}, 0, GIB) is None


@pytest.mark.parametrize(
    ("total", "wanted_mib", "expected"),
    [(100 * GIB, None, GIB), (GIB, None, GIB // 10), (GIB, 0, 0), (GIB, 2048, 2 * GIB)],
)
def test_a_tenth_stays_free_at_most_a_gib_unless_it_is_set(
    total: int, wanted_mib: int | None, expected: int
) -> None:
    assert Disk(total, 0).floor(wanted_mib) == expected


async def test_one_is_stopped_at_a_time_and_what_it_takes_counts_as_free(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    free = Disk.of(tmp_path).free_bytes
    live = {"a": Footprint(free, 0), "b": Footprint(free // 2, 0), "c": Footprint(free, 1)}
    stopped: list[str] = []

    async def evict(task: str, reason: str) -> None:
        assert reason.startswith("The host's disk is almost full: ")
        stopped.append(task)
        await trio.sleep(0)

    async with trio.open_nursery() as nursery:
        wanted_mib = int(free * 1.5) >> 20  # until c is gone, its space is as good as free
        nursery.start_soon(floor.serve, tmp_path, lambda: wanted_mib, lambda: live, evict)
        await trio.sleep(5)
        assert stopped == ["c"]
        del live["c"]  # and still too little
        await trio.sleep(5)
        assert stopped == ["c", "a"]
        nursery.cancel_scope.cancel()
