"""Holds what the probe reports from inside a task to a table of rows; pure.

A row is one statement about a task. It names the places in the report at which it shows, what must
be there, and for which ways in something else must be. `judge` fails in both directions: a place
that no row knows is a finding, and so is a row whose places the probe does not report. So neither
can grow without the other.

The rows are in `sandbox.model.protections`.
"""

from __future__ import annotations

import errno
import fnmatch
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

Place = tuple[str, ...]
"""Keys from the top of a report down; the last may be a pattern of fnmatch."""

REPORT_IT: Final = (
    "run no image here that you do not trust, and report this with the output of"
    " `sandbox doctor --deep --json`"
)


@dataclass(frozen=True, slots=True)
class Host:
    """What is to be known of the host to judge a task on it."""

    namespaces: Mapping[str, str]
    """As the links in /proc/self/ns of the agent have them."""
    may_raise_limits: bool
    """The agent has CAP_SYS_RESOURCE; without it a task has what the agent has, if that is less."""


@dataclass(frozen=True, slots=True)
class Demand:
    words: str
    holds: Callable[[Any, Host], bool]
    show: Callable[[Any], str] = repr


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    source: str
    demand: Demand
    places: tuple[Place, ...] = ()
    """The probe must report each of them."""
    maybe: tuple[Place, ...] = ()
    """Not on every kernel, processor or way in."""
    unless: Mapping[str, Demand] = field(default_factory=dict)
    """By trait of a way in; the first that the way has counts."""
    mend: str = REPORT_IT

    def demanded(self, traits: Sequence[str]) -> Demand:
        return next((self.unless[trait] for trait in self.unless if trait in traits), self.demand)


@dataclass(frozen=True, slots=True)
class Finding:
    row: str
    place: str
    found: str
    demanded: str
    mend: str


def judge(
    report: Mapping[str, Any], traits: Sequence[str], host: Host, rows: Sequence[Row]
) -> list[Finding]:
    """What is not as the rows demand it, in the order of the report; then what is missing."""
    index = _Index(rows)
    findings, reported = [], set[tuple[str, Place]]()
    for place, value in index.walk(_by_name(report)):
        found = index.row(place)
        if found is None:
            findings.append(_unknown(place, value))
            continue
        row, known_as = found
        reported.add((row.name, known_as))
        demand = row.demanded(traits)
        if not _holds(demand, value, host):
            shown = demand.show(value)
            findings.append(Finding(row.name, _text(place), shown, demand.words, row.mend))
    for row in rows:
        for place in row.places:
            if (row.name, place) not in reported:
                words = row.demanded(traits).words
                findings.append(Finding(row.name, _text(place), "not reported", words, row.mend))
    return findings


def _holds(demand: Demand, value: Any, host: Host) -> bool:
    try:
        return demand.holds(value, host)
    except (AttributeError, KeyError, TypeError, ValueError):  # of another shape altogether
        return False


def _unknown(place: Place, value: Any) -> Finding:
    words = "nothing that the table does not know"
    return Finding(
        "the report is what the table knows", _text(place), repr(value), words, REPORT_IT
    )


def _text(place: Place) -> str:
    return " ".join(place)


def _by_name(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its list of mounts by their points."""
    seen = Counter[str]()
    mounts = {}
    for mount in report.get("mounts", ()):
        point = mount["point"]
        seen[point] += 1
        again = f", {seen[point]} times" if seen[point] > 1 else ""
        mounts[point + again] = mount
    return {**report, "mounts": mounts}


class _Index:
    """Rows by the places that they know."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._exact: dict[Place, Row] = {}
        self._patterns: list[tuple[Place, Row]] = []
        self._above: set[Place] = set()
        for row in rows:
            for place in row.places + row.maybe:
                self._above |= {place[:length] for length in range(1, len(place))}
                if any(letter in place[-1] for letter in "*["):
                    self._patterns.append((place, row))
                elif place in self._exact:
                    raise ValueError(f"{_text(place)} is in two rows")
                else:
                    self._exact[place] = row

    def row(self, place: Place) -> tuple[Row, Place] | None:
        """And the place as the row has it."""
        if place in self._exact:
            return self._exact[place], place
        for pattern, row in self._patterns:
            if pattern[:-1] == place[:-1] and fnmatch.fnmatchcase(place[-1], pattern[-1]):
                return row, pattern
        return None

    def walk(self, told: Mapping[str, Any], above: Place = ()) -> Iterator[tuple[Place, Any]]:
        """Down to the places that a row knows, or below which none knows any."""
        for key, value in told.items():
            place = (*above, key)
            if isinstance(value, Mapping) and place in self._above:
                yield from self.walk(value, place)
            else:
                yield place, value


# Demands -----------------------------------------------------------------------------------


def outcome_text(value: Any) -> str:
    """An errno by its name, as a person looks it up."""
    if not isinstance(value, int):
        return repr(value)
    if value < 0:
        return f"ended by signal {-value} ({signal.strsignal(-value)})"
    return errno.errorcode.get(value, str(value)) if value else "success"


def outcome(*allowed: int) -> Demand:
    """One of these errnos; 0 is success."""
    words = " or ".join(outcome_text(each) for each in allowed)
    return Demand(words, lambda value, _: value in allowed, outcome_text)


def not_outcome(*refused: int) -> Demand:
    words = "any answer but " + " and ".join(outcome_text(each) for each in refused)
    return Demand(words, lambda value, _: value not in refused, outcome_text)


def equal(*allowed: Any) -> Demand:
    """One of these; None is what the host's kernel does not have."""
    words = " or ".join(
        "absent" if each is None else " ".join(f"{each}".split()) for each in allowed
    )
    return Demand(words, lambda value, _: value in allowed)


def octal(mode: int) -> Demand:
    def show(value: Any) -> str:
        return f"{value:04o}" if isinstance(value, int) else repr(value)

    return Demand(f"{mode:04o}", lambda value, _: value == mode, show)


def within(low: int, high: int) -> Demand:
    return Demand(f"from {low} to {high}", lambda value, _: low <= value <= high)


def like(pattern: str, words: str) -> Demand:
    return Demand(words, lambda value, _: re.fullmatch(pattern, value) is not None)


def lines_like(pattern: str, words: str) -> Demand:
    """Each line, of at least one."""

    def holds(value: str, _: Host) -> bool:
        return all(re.fullmatch(pattern, line) for line in value.split("\n"))

    return Demand(words, holds)


def mask(bits: int) -> Demand:
    return Demand(f"{bits:016x}", lambda value, _: int(value, 16) == bits)


def members(words: str, **wanted: Any) -> Demand:
    """An object that has at least these members with these values."""
    return Demand(words, lambda value, _: wanted.items() <= value.items())


def own_ids() -> Demand:
    """One line of a map of ids: all 65536 from 0 on, onto none below 65536."""

    def holds(value: str, _: Host) -> bool:
        first, base, count = map(int, value.split())
        return (first, count) == (0, 65536) and base >= 65536

    return Demand("0 to 65535, onto ids of the host from 65536 on", holds)


def own_namespace() -> Demand:
    def holds(value: str, host: Host) -> bool:
        return value not in host.namespaces.values()

    return Demand("another than the host's", holds)


def limit(soft: int, hard: int) -> Demand:
    """Of a resource; -1 is no limit. Where the agent may not raise limits, less will do."""

    def holds(value: Sequence[int], host: Host) -> bool:
        return list(value) == [soft, hard] or (
            not host.may_raise_limits and all(map(_is_at_most, value, (soft, hard)))
        )

    return Demand(f"soft {_limit_text(soft)}, hard {_limit_text(hard)}", holds)


def _is_at_most(one: int, other: int) -> bool:
    return other == -1 or 0 <= one <= other


def _limit_text(value: int) -> str:
    return "unlimited" if value == -1 else str(value)


def equal_limits() -> Demand:
    """What the kernel computes from its memory is the same for soft and hard."""
    return Demand("soft as hard", lambda value, _: value[0] == value[1] != 0)


def oom_score() -> Demand:
    """A process without CAP_SYS_RESOURCE can raise a score and not lower it again (proc(5))."""

    def holds(value: int, host: Host) -> bool:
        return value == 0 or (value > 0 and not host.may_raise_limits)

    return Demand("0", holds)


def mounted(kind: str, flags: str, options: str = "") -> Demand:
    """Exactly these flags, propagated nowhere; any type if `kind` is empty. `options` is a pattern
    that the options of the file system must contain."""

    def holds(mount: Mapping[str, str], _: Host) -> bool:
        found = set(mount["options"].split(",")) - {"relatime"}
        return (
            kind in ("", mount["type"])
            and found == set(flags.split(","))
            and mount["propagation"] == ""
            and re.search(options, mount["super_options"]) is not None
        )

    words = f"{kind or 'any type'}, {flags}, private" + (f", {options}" if options else "")
    return Demand(words, holds)


def covering() -> Demand:
    """A mount that hides or protects a path: nothing can be written or run by way of it."""

    def holds(mount: Mapping[str, str], _: Host) -> bool:
        flags = set(mount["options"].split(","))
        return mount["propagation"] == "" and flags >= {"ro", "nosuid", "noexec"}

    return Demand("ro, nosuid, noexec, private", holds)


def masked() -> Demand:
    """Not there, or an empty directory that stays empty, or the null device."""

    def holds(path: Mapping[str, Any], _: Host) -> bool:
        if path["type"] == "directory":
            return bool(path["entries"] == 0 and path["write"] != 0)
        null = {"type": "character", "major": 1, "minor": 3, "bytes": 0}
        return path["type"] == "absent" or null.items() <= path.items()

    return Demand("absent or empty", holds)


def empty() -> Demand:
    """Whatever else it is, nothing is to be had there."""
    return Demand("absent or empty", lambda path, _: path.get("entries", 0) == 0)


def unwritable() -> Demand:
    def holds(path: Mapping[str, Any], _: Host) -> bool:
        return bool(path["type"] == "absent" or path["write"] != 0)

    return Demand("absent or not writable", holds)


def unreadable() -> Demand:
    """And not writable."""

    def holds(path: Mapping[str, Any], _: Host) -> bool:
        is_refused = path["read"] != 0 and path["write"] != 0
        return bool(path["type"] == "absent" or is_refused)

    return Demand("absent or neither readable nor writable", holds)


def readable() -> Demand:
    return Demand("something to read", lambda path, _: path["bytes"] > 0 and path["write"] != 0)


def entries(*patterns: str) -> Demand:
    """A list with exactly one entry for each pattern, and no other."""

    def holds(value: Sequence[str], _: Host) -> bool:
        left = list(value)
        for pattern in patterns:
            found = [entry for entry in left if re.fullmatch(pattern, entry)]
            if len(found) != 1:
                return False
            left.remove(found[0])
        return not left

    return Demand(", ".join(patterns) or "nothing", holds)


def never(words: str) -> Demand:
    return Demand(words, lambda value, _: False)
