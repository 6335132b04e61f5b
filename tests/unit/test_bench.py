"""What scripts/bench makes of numbers, and of a host's mounts."""

from __future__ import annotations

import pytest

from scripts.benchmarks.crun import hybrid_mounts
from scripts.benchmarks.figures import Figure, Section, rounded, summary, table

V1 = "31 25 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:7 - cgroup cgroup rw,cpu\n"
V2_BESIDE = "40 25 0:36 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
V2_ALONE = "25 20 0:24 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("value", "limit", "is_met"),
    [
        (0.5, "at most", True),
        (0.51, "at most", False),
        (1, "at least", True),
        (0.9, "at least", False),
    ],
)
def test_a_figure_is_met_at_its_target_and_on_the_right_side_of_it(
    value: float, limit: object, is_met: bool
) -> None:
    target = 0.5 if limit == "at most" else 1.0
    assert Figure("launch", value, "x", limit, target).is_met is is_met  # type: ignore[arg-type]


def test_the_summary_shows_every_figure_with_its_target_and_whether_it_is_met() -> None:
    figures = [
        Figure("launch", 0.123, "x", "at most", 0.5),
        Figure("pull", 12.34, "s", "at most", 3.0),
    ]
    section = Section("Launch", "As it was.", ("",), [("row",)], figures)
    assert summary([section]).splitlines()[2:] == [
        "| launch | 0.12 x | at most 0.50 x | yes |",
        "| pull | 12.3 s | at most 3 s | **no** |",
    ]


def test_a_table_is_markdown_with_a_line_under_its_header() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    ("value", "text"), [(100.4, "100"), (44.26, "44.3"), (1.104, "1.10"), (72.0, "72")]
)
def test_numbers_show_three_digits(value: float, text: str) -> None:
    assert rounded(value) == text


@pytest.mark.parametrize(
    ("mountinfo", "hidden"),
    [(V1 + V2_BESIDE, ["/sys/fs/cgroup/unified"]), (V2_ALONE, []), (V1, [])],
)
def test_only_a_second_cgroup_version_is_hidden_from_crun(
    mountinfo: str, hidden: list[str]
) -> None:
    assert hybrid_mounts(mountinfo) == hidden
