"""Records on disk: bounded, read while they are written, and after any crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from sandbox.errors import KernelError
from sandbox.network.flowlog import FlowRecord
from sandbox.network.flowlog_files import (
    POLL_S,
    FlowLogReader,
    FlowLogWriter,
    records,
    segments,
)


def made(*numbers: int) -> list[FlowRecord]:
    return [
        FlowRecord(account_id="123456789012", interface_id=f"eni-{number}", start=1, end=2)
        for number in numbers
    ]


LINE_BYTES = len(made(1)[0].line()) + 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "flows" / "vpc-1"


def test_a_reader_gets_each_record_once_and_in_order(directory: Path) -> None:
    reader, writer = FlowLogReader(directory), FlowLogWriter(directory)
    assert list(reader.read()) == []
    assert writer.write(made(1, 2)) == 2
    assert list(reader.read()) == made(1, 2)
    assert list(reader.read()) == []
    writer.write(made(3))
    writer.close()
    FlowLogWriter(directory).write(made(4))
    assert list(reader.read()) == made(3, 4)
    assert list(FlowLogReader(directory).read()) == made(1, 2, 3, 4)


def test_the_oldest_go_when_there_are_too_many(directory: Path) -> None:
    writer = FlowLogWriter(directory, segment_bytes=2 * LINE_BYTES, segments_max=3)
    reader = FlowLogReader(directory)
    for number in range(1, 10):
        writer.write(made(number))
        if number == 1:
            assert list(reader.read()) == made(1)
    writer.close()
    assert segments(directory) == [3, 4, 5]
    assert list(reader.read()) == made(5, 6, 7, 8, 9)


def test_it_is_for_root_alone(directory: Path) -> None:
    writer = FlowLogWriter(directory)
    writer.write(made(1))
    writer.close()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "1").stat().st_mode & 0o777 == 0o600


def test_a_line_that_was_cut_off_is_not_there_and_nothing_comes_after_it(directory: Path) -> None:
    writer = FlowLogWriter(directory)
    writer.write(made(1, 2))
    writer.close()
    path = directory / "1"
    os.truncate(path, path.stat().st_size - 5)
    reader = FlowLogReader(directory)
    assert list(reader.read()) == made(1)
    FlowLogWriter(directory).write(made(3))
    assert segments(directory) == [1, 2]
    assert list(reader.read()) == made(3)


@pytest.mark.parametrize("junk", [b"\xff\n", b"2 x\n", b"\n\n", b"9" * (1 << 20), b"\0" * 5000])
def test_what_is_no_record_is_passed_over(directory: Path, junk: bytes) -> None:
    directory.mkdir(parents=True)
    (directory / "1").write_bytes(junk)
    (directory / "2").write_text(made(7)[0].line() + "\n")
    (directory / "not-a-number").touch()
    assert list(FlowLogReader(directory).read()) == made(7)


def test_after_a_refusal_a_new_segment_is_begun(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FlowLogWriter(directory)
    writer.write(made(1))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:10]) and real(-1, b""))
    with pytest.raises(KernelError, match="write"):
        writer.write(made(2))
    monkeypatch.undo()
    writer.write(made(3))
    assert list(FlowLogReader(directory).read()) == made(1, 3)
    writer.close()


async def test_a_follower_waits_for_more(
    directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    writer = FlowLogWriter(directory)
    writer.write(made(1))
    found = records(directory, follow=True)
    assert [await anext(found)] == made(1)
    with trio.move_on_after(10 * POLL_S) as scope:
        await anext(found)
    assert scope.cancelled_caught
    writer.write(made(2))
    assert [record async for record in records(directory)] == made(1, 2)
    writer.close()
