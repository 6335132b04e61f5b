"""The store under kill -9, copied at any moment, and on a full disk.

A child process writes without end and says on a pipe what was acknowledged; then it is killed, or
frozen and its directory copied. What it wrote is checkable by itself: every transaction puts one
number under two keys.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from sandbox.errors import StoreError
from sandbox.store.sqlite import SqliteStore

WRITERS = 8


class Number(msgspec.Struct):
    n: int


async def _write_for_ever(path: Path) -> None:
    store = SqliteStore.open(path, keep=200)

    async def write(writer: int) -> None:
        found = store.get(f"{writer}/left", Number)
        n = found.value.n if found else 0
        while True:
            n += 1
            both = {f"{writer}/left": Number(n), f"{writer}/right": Number(n)}
            await store.txn(both, durable=n % 2 == 0)
            os.write(1, f"{writer} {n}\n".encode())

    async with trio.open_nursery() as nursery:
        for writer in range(WRITERS):
            nursery.start_soon(write, writer)


async def _fill(path: Path) -> None:
    """Write until the disk is full, say how far that went, make room, and write once more."""
    spare = path.with_name("spare")
    spare.write_bytes(bytes(300_000))
    store = SqliteStore.open(path)
    n = 0
    try:
        while n < 10_000:
            await store.txn({f"a/{n}": Number(n), "pad": msgspec.defstruct("P", ["p"])("x" * 9000)})
            n += 1
    except StoreError as error:
        print(f"{n} {error}", flush=True)
    assert len(store.keys("a/")) == n
    spare.unlink()
    await store.txn({"after": Number(n)})
    await store.aclose()


@contextmanager
def _child(job: str, path: Path, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*prefix, sys.executable, "-m", "tests.crash.test_store", job, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def _acknowledged(lines: bytes) -> dict[int, int]:
    """The last number of each writer; a line that was cut off by the kill counts for nothing."""
    whole = lines[: lines.rfind(b"\n") + 1]
    pairs = (line.split() for line in whole.splitlines())
    return {int(writer): int(n) for writer, n in pairs}


def _check(path: Path, acknowledged: dict[int, int]) -> None:
    """Both keys of every transaction, nothing acknowledged lost, and a log that agrees."""
    store = SqliteStore.open(path)

    async def check() -> None:
        for writer, n in acknowledged.items():
            left = store.get(f"{writer}/left", Number)
            right = store.get(f"{writer}/right", Number)
            assert left is not None and right is not None
            assert left.value == right.value
            assert left.rev == right.rev
            assert left.value.n >= n
        heads = {found.key: (found.rev, found.value) for found in store.list("", Number)}
        last: dict[str, tuple[int, Number]] = {}
        changes = store.watch("", max(0, store.revision - 200))
        while max((rev for rev, _ in last.values()), default=0) < store.revision:
            change = await anext(changes)
            assert change.value is not None
            last[change.key] = (change.rev, msgspec.json.decode(change.value, type=Number))
        # The newest revision has two keys and the loop ended at the first of them.
        change = await anext(changes)
        assert change.value is not None
        last[change.key] = (change.rev, msgspec.json.decode(change.value, type=Number))
        assert last.items() <= heads.items()
        await store.aclose()

    trio.run(check)


def test_no_kill_loses_an_acknowledged_write_or_tears_one(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    acknowledged: dict[int, int] = {}
    counts = random.Random(7)
    for _ in range(10):
        with _child("write", path) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(counts.randrange(1, 400))]
            assert lines[-1]
            child.kill()
            acknowledged |= _acknowledged(b"".join([*lines, child.stdout.read()]))
        _check(path, acknowledged)


def test_a_copy_of_the_directory_of_any_moment_opens(tmp_path: Path) -> None:
    path = tmp_path / "live" / "store.db"
    path.parent.mkdir()
    delays = random.Random(7)
    with _child("write", path) as child:
        assert child.stdout is not None
        lines = child.stdout.readline()
        os.set_blocking(child.stdout.fileno(), False)
        for moment in range(10):
            time.sleep(delays.uniform(0.01, 0.1))
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            lines += child.stdout.read() or b""
            shutil.copytree(path.parent, tmp_path / f"copy{moment}")
            child.send_signal(signal.SIGCONT)
            _check(tmp_path / f"copy{moment}" / "store.db", _acknowledged(lines))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")
def test_a_full_disk_refuses_the_write_and_loses_nothing(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && exec "$@"'
    in_namespace = ("unshare", "--mount", "sh", "-ec", mount, "sh")
    with _child("fill", tmp_path / "store.db", *in_namespace) as child:
        assert child.stdout is not None
        written, _, error = child.stdout.read().decode().partition(" ")
        assert child.wait() == 0
    assert int(written) > 10
    assert error.startswith(f"no space left on the disk of {tmp_path}/store.db: free some, then ")


if __name__ == "__main__":
    trio.run({"write": _write_for_ever, "fill": _fill}[sys.argv[1]], Path(sys.argv[2]))
