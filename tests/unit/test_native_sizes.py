"""docs/adr/0003: the programs that run as root can each be read in one sitting."""

from __future__ import annotations

from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"


def lines(pattern: str) -> dict[str, int]:
    return {file.name: len(file.read_text().splitlines()) for file in NATIVE.glob(pattern)}


def test_no_file_is_longer_than_400_lines() -> None:
    assert {name: count for name, count in lines("*.[ch]").items() if count > 400} == {}


@pytest.mark.parametrize(("program", "most"), [("keeper", 1800), ("unpack", 1300)])
def test_a_program_stays_within_its_bound(program: str, most: int) -> None:
    assert 0 < sum(lines(f"{program}*.c").values()) <= most
