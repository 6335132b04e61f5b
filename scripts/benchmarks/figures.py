"""What was measured, held against what was promised, as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One number with its target."""

    what: str
    value: float
    unit: str
    limit: Literal["at most", "at least"]
    target: float

    @property
    def is_met(self) -> bool:
        if self.limit == "at most":
            return self.value <= self.target
        return self.value >= self.target

    def row(self) -> tuple[str, ...]:
        return (
            self.what,
            f"{rounded(self.value)} {self.unit}",
            f"{self.limit} {rounded(self.target)} {self.unit}",
            "yes" if self.is_met else "**no**",
        )


@dataclass(frozen=True)
class Section:
    """One part of a run: how it was measured and what came of it."""

    title: str
    how: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    figures: Sequence[Figure] = field(default=())

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.how}\n\n{table(self.header, self.rows)}"


def summary(sections: Sequence[Section]) -> str:
    rows = [figure.row() for section in sections for figure in section.figures]
    return table(("figure", "measured", "target", "met"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rounded(value: float) -> str:
    """Three digits that count, and no more than three after the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}" if value != int(value) else str(int(value))
