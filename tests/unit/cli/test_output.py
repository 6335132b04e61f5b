"""What is shown is aligned, fits, and cannot command the terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.cli.attach import Bar
from sandbox.cli.logs import Shown, point_in_time
from sandbox.cli.output import age, harmless, one_line, size, table
from sandbox.cli.request import duration, entry_point, environment, refuse_network
from sandbox.errors import InvalidParameterException


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    for character in harmless(text):
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Zl", "Zp")
    assert not set(harmless(text)) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068")
    assert "\n" not in one_line(text)


def test_what_was_hidden_is_shown() -> None:
    assert harmless("\x1b[2J\x07\x7f\x9b31m\u202e") == "^[[2J^G^?\\x9b31m\\u202e"
    assert harmless("naïve 日本\n\ttext") == "naïve 日本\n\ttext"


cells = st.lists(st.tuples(*[st.text(max_size=30)] * 3), max_size=5)


@given(cells, st.integers(min_value=20, max_value=120))
def test_a_table_fits_its_terminal(rows: list[tuple[str, str, str]], width: int) -> None:
    lines = table(("A", "B", "C"), rows, width)
    assert len(lines) == len(rows) + 1
    assert all(len(line) <= width for line in lines)


def test_a_table_for_a_pipe_is_never_cut() -> None:
    lines = table(("TASK", "REASON"), [("a", "x" * 500), ("bbbbbb", "y")])
    assert lines == ["TASK    REASON", "a       " + "x" * 500, "bbbbbb  y"]


def test_a_cut_cell_says_so_and_short_columns_stay_whole() -> None:
    lines = table(("ID", "REASON"), [("abc", "a long reason to stop")], 16)
    assert lines == ["ID   REASON", "abc  a long rea…"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3599, "59m"),
        (7200, "2h"),
        (200_000, "2d"),
        (-5, "0s"),
    ],
)
def test_ages_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (5000 << 30, "5000.0 GiB"),
    ],
)
def test_sizes_are_in_powers_of_1024(count: int | None, text: str) -> None:
    assert size(count) == text


def test_characters_and_lines_that_come_in_pieces_stay_whole() -> None:
    out = io.BytesIO()
    shown = Shown(out, "web | ")
    for byte in "é\nzwei\r\n\x1b".encode():
        shown.write(bytes([byte]))
    shown.write(b"[0m\xe9")
    shown.finish()
    lines = out.getvalue().decode().split("\n")
    assert lines == ["web | é", "web | zwei^M", "web | ^[[0m\\xe9"]


@given(st.integers(0, 10**9), st.none() | st.integers(1, 10**9), st.integers(10, 200))
def test_a_progress_line_fits_its_terminal_or_is_only_its_numbers(
    done: int, total: int | None, columns: int
) -> None:
    line = Bar.line("layer\x1b[2J", done, total, columns)
    assert "\x1b" not in line
    assert len(line) < max(columns, 60)


def test_layers_that_come_side_by_side_are_shown_as_their_sum() -> None:
    assert Bar.sum({"a": (5, 10)}) == ("a", 5, 10)
    assert Bar.sum({"a": (10, 10), "b": (1, 30)}) == ("1 of 2 layers", 11, 40)
    assert Bar.sum({"a": (10, 10), "b": (1, None)}) == ("1 of 2 layers", 11, None)


def test_a_pull_moves_on_and_never_jumps_back() -> None:
    seen = []
    parts: dict[str, tuple[int, int | None]] = {"a": (0, 100), "b": (0, 50)}
    for what, done in (("a", 10), ("b", 20), ("a", 20), ("b", 50), ("a", 100)):
        parts[what] = (done, parts[what][1])
        seen.append(Bar.sum(parts)[1])
    assert seen == sorted(seen) and seen[-1] == 150


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86400), ("0.5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    assert point_in_time(text, 100_000.0) == 100_000.0 - seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1w", "nan", "inf", "1e400"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="not a duration"):
        duration(text)


def test_a_point_in_time_is_utc_unless_it_says_otherwise() -> None:
    assert point_in_time("1970-01-01T00:01:00Z", 0) == 60
    assert point_in_time("1970-01-01T00:01:00", 0) == 60
    assert point_in_time("1970-01-01T01:01:00+01:00", 0) == 60
    with pytest.raises(InvalidParameterException, match="--since"):
        point_in_time("yesterday", 0)


def test_options_win_over_files_and_a_bare_name_is_passed_on() -> None:
    lines = ["# comment", "", "A=file", "B=b=c", "  HOME", "GONE"]
    merged = environment(["A=option", "EMPTY="], lines, {"HOME": "/root"})
    assert merged == {"A": "option", "B": "b=c", "HOME": "/root", "EMPTY": ""}
    with pytest.raises(InvalidParameterException):
        environment(["=x"], (), {})


def test_an_empty_entry_point_drops_the_images() -> None:
    assert (entry_point(None), entry_point(""), entry_point("/bin/sh -c")) == (
        None,
        (),
        ("/bin/sh -c",),
    )


def test_network_options_are_refused_by_name() -> None:
    refuse_network(None, (), False)
    with pytest.raises(InvalidParameterException, match="--security-group, --public-ip"):
        refuse_network(None, ("g",), True)
