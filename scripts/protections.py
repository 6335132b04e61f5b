#!/usr/bin/env python3
"""The table of protections as docs/protections.md.

python -m scripts.protections > docs/protections.md
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from sandbox.model.judgement import Place, Row
from sandbox.model.protections import TABLE, WAYS

HEAD = """\
# What every task is held to

Each line is demanded of every way into a task:

{ways}.

A probe (`native/probe.h`) runs in a task by each of them and reports what it finds; a report with
anything that no line knows fails as well as one without what a line names. `sandbox doctor --deep`
does that on your host, `tests/kernel/test_isolation.py` on every change.

This page is `sandbox/model/protections.py`, written by `python -m scripts.protections`.
"""


def page() -> str:
    lines = [HEAD.format(ways=textwrap.fill(_listed(WAYS), 100))]
    for title, rows in TABLE.items():
        lines += [f"## {title}", "", "| what holds | demanded | where it shows | why |"]
        lines += ["| --- | --- | --- | --- |", *map(_line, rows), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    demands = [row.demand.words]
    demands += [f"{trait}: {demand.words}" for trait, demand in row.unless.items()]
    cells = (row.name, "; ".join(demands), _places(row.places + row.maybe), row.source)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _places(places: Iterable[Place]) -> str:
    """What several places share is said once, and a call once for all ABIs."""
    below: dict[str, dict[str, None]] = {}
    for *above, key in places:
        top = "calls" if above[:1] == ["system_calls"] else " ".join(above)
        below.setdefault(top, {})[key] = None
    return "; ".join(f"{top} `{', '.join(keys)}`".strip() for top, keys in below.items())


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


if __name__ == "__main__":
    print(page(), end="")
