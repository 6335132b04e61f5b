"""A file system for a task: one of the reserve, one that is made then, and mkfs.ext4's."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import trio

from sandbox.kernel import filesystems
from sandbox.kernel.filesystems import Filesystem, FilesystemPool
from scripts.benchmarks.disk import run
from scripts.benchmarks.figures import Figure, Section
from scripts.benchmarks.launch import milliseconds

SIZE_BYTES = 20 << 30


async def storage(directory: Path, rounds: int) -> Section:
    directory.mkdir()
    empty = directory / "empty"
    filesystems.template(empty, SIZE_BYTES)
    taken = await from_the_reserve(directory, rounds)
    made = [on_request(directory / f"made{n}", empty) for n in range(rounds)]
    by_mkfs = [with_mkfs(directory / f"mkfs{n}", directory / "top") for n in range(rounds)]
    return Section(
        "Storage",
        "The 20 GiB of a task: one of the reserve under its own name, made behind the request; one "
        "that is made on request, a sparse copy of an empty ext4 on a loop device, mounted; and "
        f"the same by `mkfs.ext4` and `mount -o loop`. {rounds} times each.",
        ("", "p50 ms", "min ms", "p90 ms"),
        [
            milliseconds("from the reserve", taken),
            milliseconds("made on request", made),
            milliseconds("`mkfs.ext4`, `mount -o loop`", by_mkfs),
        ],
        [
            Figure(
                "storage from the reserve, p50", statistics.median(taken) * 1e3, "ms", "at most", 1
            )
        ],
    )


async def from_the_reserve(directory: Path, rounds: int) -> list[float]:
    pool = FilesystemPool(directory / "reserve", SIZE_BYTES, 4)
    pool.sweep()
    took = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.serve)
        for number in range(rounds):
            while not pool.ready:
                await trio.sleep(0.001)
            file = directory / f"taken{number}"
            began = time.perf_counter()
            filesystem = await pool.take(file, SIZE_BYTES)
            took.append(time.perf_counter() - began)
            pool.give_back(file, filesystem, is_empty=False)  # each one is new
        nursery.cancel_scope.cancel()
    return took


def on_request(file: Path, empty: Path) -> float:
    began = time.perf_counter()
    made: Filesystem = filesystems.make(file, empty)
    took = time.perf_counter() - began
    made.drop()
    file.unlink()
    return took


def with_mkfs(file: Path, top: Path) -> float:
    top.mkdir(exist_ok=True)
    began = time.perf_counter()
    with file.open("xb") as opened:
        opened.truncate(SIZE_BYTES)
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard", file)
    run("mount", "-o", "loop,noinit_itable", file, top)
    took = time.perf_counter() - began
    run("umount", top)
    file.unlink()
    return took
