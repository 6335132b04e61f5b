"""The reader of keepers' logs on files made by hand: torn frames, rubbish, segments that go."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.runtime.logs import Tail

CHUNKS = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=12)
NAMES = {1: "stdout", 2: "stderr"}

Chunk = tuple[int, bytes]


def frame(stream: int, data: bytes, at_ns: int = 5) -> bytes:
    return struct.pack("<QBI", at_ns, stream, len(data)) + data


def frames(chunks: list[Chunk]) -> bytes:
    return b"".join(frame(stream, data) for stream, data in chunks)


def said(tail: Tail) -> list[tuple[str, bytes]]:
    return [(record.stream, record.data) for record in tail.read()]


def named(chunks: list[Chunk]) -> list[tuple[str, bytes]]:
    return [(NAMES[stream], data) for stream, data in chunks]


@contextmanager
def log_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "log").mkdir()
        yield Path(directory)


@pytest.fixture
def status_dir() -> Iterator[Path]:
    with log_directory() as directory:
        yield directory


@given(CHUNKS, st.data())
def test_a_torn_frame_is_read_once_it_is_whole(chunks: list[Chunk], data: st.DataObject) -> None:
    content = frames(chunks)
    cut = data.draw(st.integers(0, len(content)))
    with log_directory() as status_dir:
        tail, segment = Tail(status_dir, "app"), status_dir / "log/1"
        segment.write_bytes(content[:cut])
        first = said(tail)
        assert first == named(chunks)[: len(first)]
        segment.write_bytes(content)
        assert first + said(tail) == named(chunks)
        assert said(tail) == []


@given(st.lists(CHUNKS, min_size=1, max_size=4), st.binary(max_size=12))
def test_a_frame_that_a_crash_cut_off_ends_its_segment_and_no_other(
    segments: list[list[Chunk]], torn: bytes
) -> None:
    with log_directory() as status_dir:
        for number, chunks in enumerate(segments, 1):
            (status_dir / f"log/{number}").write_bytes(frames(chunks) + torn)
        assert said(Tail(status_dir, "app")) == named([c for chunks in segments for c in chunks])


@given(st.binary(max_size=200))
def test_data_that_looks_like_a_frame_is_data(content: bytes) -> None:
    forged = frame(2, content, at_ns=1)
    with log_directory() as status_dir:
        (status_dir / "log/1").write_bytes(frame(1, forged))
        assert said(Tail(status_dir, "app")) == [("stdout", forged)]


def test_a_length_that_no_frame_has_ends_the_segment(status_dir: Path) -> None:
    (status_dir / "log/1").write_bytes(frame(1, b"a") + struct.pack("<QBI", 1, 1, 2**32 - 1))
    (status_dir / "log/2").write_bytes(frame(1, b"b"))
    assert said(Tail(status_dir, "app")) == [("stdout", b"a"), ("stdout", b"b")]


def test_a_reader_that_fell_behind_goes_on_with_the_oldest_that_is_left(status_dir: Path) -> None:
    tail = Tail(status_dir, "app")
    (status_dir / "log/1").write_bytes(frame(1, b"1"))
    assert said(tail) == [("stdout", b"1")]
    (status_dir / "log/1").unlink()
    for number in (3, 10):
        (status_dir / f"log/{number}").write_bytes(frame(1, b"%d" % number))
    assert said(tail) == [("stdout", b"3"), ("stdout", b"10")]


def test_what_came_into_a_segment_before_the_next_one_is_not_missed(status_dir: Path) -> None:
    tail, first = Tail(status_dir, "app"), status_dir / "log/1"
    first.write_bytes(frame(1, b"1"))
    reading = tail.read()
    assert next(reading).data == b"1"
    first.write_bytes(frame(1, b"1") + frame(1, b"more"))
    (status_dir / "log/2").write_bytes(frame(1, b"2"))
    assert [record.data for record in reading] == [b"more", b"2"]


def test_other_files_of_the_directory_are_none_of_its_business(status_dir: Path) -> None:
    (status_dir / "log/1.gz").write_bytes(b"rubbish")
    (status_dir / "log/1").write_bytes(frame(3, b"a") + frame(255, b"b") + frame(77, b"c"))
    assert said(Tail(status_dir, "app")) == [
        ("terminal", b"a"),
        ("keeper", b"b"),
        ("keeper", b"c"),
    ]


def test_a_log_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    assert said(Tail(tmp_path, "app")) == []


def test_a_record_tells_its_container_and_its_time(status_dir: Path) -> None:
    (status_dir / "log/1").write_bytes(frame(1, b"a", at_ns=1_700_000_000_123_456_789))
    (record,) = Tail(status_dir, "web").read()
    assert (record.container, record.at_ns) == ("web", 1_700_000_000_123_456_789)
