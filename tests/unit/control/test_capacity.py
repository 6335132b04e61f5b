"""Whether one more task is taken, from what the live ones were promised and the host has."""

from __future__ import annotations

import os

import pytest

from sandbox.control.capacity import UNAVAILABLE, Capacity, Memory
from sandbox.control.floor import Disk
from sandbox.errors import InvalidParameterException
from sandbox.model.task import Size

GIB = 1 << 30
DISK = Disk(100 * GIB, 50 * GIB)


class Host(Memory):
    def __init__(self, total: int, available: int) -> None:
        self._of = (total, available)

    def read(self) -> tuple[int, int]:
        return self._of


def task(cpu: int = 256, memory_mib: int = 512, storage_gib: int = 20) -> Size:
    return Size(cpu=cpu, memory_mib=memory_mib, storage_gib=storage_gib)


def takes(capacity: Capacity, wanted: Size, *live: Size, disk: Disk = DISK) -> bool:
    try:
        capacity.check(wanted, live, disk)
    except InvalidParameterException as error:
        assert str(error) == UNAVAILABLE
        return False
    return True


def test_promises_beyond_the_host_are_taken_unless_they_are_bounded() -> None:
    many = [task(4096, 30720)] * 100
    assert takes(Capacity(memory=Host(4 * GIB, 4 * GIB)), task(), *many)


def test_memory_is_promised_up_to_the_bound_and_not_beyond() -> None:
    capacity = Capacity(memory=Host(4 * GIB, 4 * GIB), memory_overcommit=1.5)
    assert takes(capacity, task(256, 2048), task(256, 2048), task(256, 2048))
    assert not takes(capacity, task(256, 2048), task(256, 2048), task(256, 2048), task())


def test_processors_are_promised_up_to_the_bound_and_not_beyond() -> None:
    processors = os.cpu_count() or 1
    capacity = Capacity(memory=Host(4 * GIB, 4 * GIB), cpu_overcommit=2)
    live = [task(1024, 2048)] * (2 * processors - 1)
    assert takes(capacity, task(1024, 2048), *live)
    assert not takes(capacity, task(), *live, task(1024, 2048))


def test_storage_is_promised_up_to_the_bound_and_not_beyond() -> None:
    capacity = Capacity(memory=Host(4 * GIB, 4 * GIB), storage_overcommit=0.5)
    assert takes(capacity, task(storage_gib=30), task())
    assert not takes(capacity, task(storage_gib=31), task())


@pytest.mark.parametrize(
    ("disk", "floor_mib", "is_taken"),
    [
        (Disk(100 * GIB, GIB), None, True),
        (Disk(100 * GIB, GIB - 1), None, False),
        (Disk(2 * GIB, GIB // 5), None, True),  # a tenth of a small one
        (Disk(2 * GIB, GIB // 5 - 4096), None, False),
        (Disk(100 * GIB, 4096), 0, True),
        (Disk(100 * GIB, 5 * GIB), 5121, False),
    ],
)
def test_the_host_keeps_some_disk(disk: Disk, floor_mib: int | None, is_taken: bool) -> None:
    capacity = Capacity(memory=Host(4 * GIB, 4 * GIB), host_free_storage_mib=floor_mib)
    assert takes(capacity, task(), disk=disk) is is_taken


@pytest.mark.parametrize(
    ("total", "available", "floor", "is_taken"),
    [
        (4 * GIB, 512 << 20, None, True),
        (4 * GIB, 511 << 20, None, False),
        (100 * GIB, 4 * GIB, None, False),  # 5 % of it
        (4 * GIB, 100 << 20, 99, True),
        (4 * GIB, 100 << 20, 101, False),
    ],
)
def test_the_host_keeps_some_memory(
    total: int, available: int, floor: int | None, is_taken: bool
) -> None:
    capacity = Capacity(memory=Host(total, available), host_free_memory_mib=floor)
    assert takes(capacity, task()) is is_taken


def test_there_is_a_most_of_tasks() -> None:
    capacity = Capacity(max_tasks=2, memory=Host(4 * GIB, 4 * GIB))
    assert takes(capacity, task(), task())
    assert not takes(capacity, task(), task(), task())
