"""The table of protections can fail: whatever of a good report is changed, it finds just that.

The good report is one that the probe wrote as first process of a real task (good_report.json). The
kernel tests hold new ones to the table on every change; this one only has to be changed here.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from errno import EPERM
from pathlib import Path
from typing import Any

import pytest

from native import seccomp_policy
from sandbox.cli.deep import BY_ITSELF, ENTERING, grouped
from sandbox.kernel import capabilities
from sandbox.model import protections
from sandbox.model.judgement import Finding, Host, Place, Row, equal, judge, oom_score
from sandbox.model.protections import REFUSED, ROWS, TABLE, WAYS
from scripts.protections import page

ROOT = Path(__file__).parents[3]
HOST = Host({"user": "user:[4026531837]"}, may_raise_limits=True)

Report = dict[str, Any]


@pytest.fixture
def good() -> Report:
    """As on a host that gives all limits; that of open files is the only one that it did not."""
    report: Report = json.loads(Path(__file__).with_name("good_report.json").read_text())
    report["limits"]["nofile"] = [65535, 65535]
    return report


def test_a_good_report_has_no_finding(good: Report) -> None:
    assert protections.judge(good, "first process", HOST) == []


# What is changed is found ------------------------------------------------------------------

SPOILT_OBJECT = {
    "type": "other",
    "options": "rw",
    "propagation": "shared:1",
    "super_options": "rw",
    "entries": 7,
    "bytes": 7,
    "read": 0,
    "write": 0,
}
OTHERWISE: dict[Place, Any] = {
    ("storage", "bytes"): 1 << 50,
    ("lower_oom_score_adj",): 0,
    ("oom_score_adj",): -1,
    ("raise", "priority"): 0,
    ("raise", "nofile"): 0,
    ("raise", "realtime"): 0,
}
"""Where what `spoilt` makes would do as well."""


def spoilt(place: Place, value: Any) -> Any:
    """Something else in its place that cannot be right."""
    if place in OTHERWISE:
        return OTHERWISE[place]
    if place[0] == "namespaces" and place[1] != "time":
        return HOST.namespaces["user"]
    if place[0] == "limits":
        return [1 << 40, 1 << 41]
    if isinstance(value, int):
        return 0 if value == EPERM else EPERM
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "X=1"]
    return value | SPOILT_OBJECT


def reported(row: Row, good: Report) -> Iterator[Place]:
    """The places of a row that this report has."""
    points = {mount["point"]: mount for mount in good["mounts"]}
    for place in row.places + row.maybe:
        above = points if place[0] == "mounts" else found(good, place[:-1])
        for key in fnmatch.filter(above or (), place[-1]):
            yield (*place[:-1], key)


def found(report: Any, place: Place) -> Any:
    for key in place:
        if key not in report:
            return None
        report = report[key]
    return report


def put(report: Report, place: Place, change: Any) -> None:
    """Apply `change` to what is at this place."""
    if place[0] == "mounts":
        (index,) = (n for n, mount in enumerate(report["mounts"]) if mount["point"] == place[1])
        report["mounts"][index] = change(report["mounts"][index])
        return
    above = found(report, place[:-1])
    above[place[-1]] = change(above[place[-1]])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_changed_in_a_good_report_is_found_and_nothing_else(row: Row, good: Report) -> None:
    for place in reported(row, good):
        bad = deepcopy(good)
        put(bad, place, lambda value, place=place: spoilt(place, value))
        findings = protections.judge(bad, "first process", HOST)
        assert [(f.row, f.place) for f in findings] == [(row.name, " ".join(place))]


def test_the_good_report_shows_nearly_every_row(good: Report) -> None:
    """What it has not is what the machine that it comes from has not."""
    silent = {row.name for row in ROWS if not list(reported(row, good))}
    assert silent == {"and a terminal only if one was asked for"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.places], ids=lambda row: row.name)
def test_a_place_that_is_not_reported_is_found(row: Row, good: Report) -> None:
    for place in row.places:
        bad = deepcopy(good)
        if place[0] == "mounts":
            bad["mounts"] = [mount for mount in bad["mounts"] if mount["point"] != place[1]]
        else:
            del found(bad, place[:-1])[place[-1]]
        (finding,) = protections.judge(bad, "first process", HOST)
        assert (finding.row, finding.place, finding.found) == (
            row.name,
            " ".join(place),
            "not reported",
        )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("devices", "/dev/kvm"), {"type": "character", "major": 10, "minor": 232}),
        (("devices", "/dev/pts/0"), {"type": "character", "major": 136, "minor": 0}),
        (("descriptors", "3"), {"type": "directory", "target": "/"}),
        (("system_calls", "native", "a new one"), 0),
        (("network", "sysctls", "ipv4/new"), "1"),
        (("new",), {"anything": {"at": "all"}}),
    ],
)
def test_a_place_that_no_row_knows_is_found(place: Place, value: Any, good: Report) -> None:
    found(good, place[:-1])[place[-1]] = value
    (finding,) = protections.judge(good, "first process", HOST)
    assert finding.place == " ".join(place)


def test_a_second_mount_on_a_place_is_found(good: Report) -> None:
    good["mounts"].append(next(mount for mount in good["mounts"] if mount["point"] == "/proc"))
    (finding,) = protections.judge(good, "first process", HOST)
    assert finding.place == "mounts /proc, 2 times"


@pytest.mark.parametrize("report", [{}, {"mounts": [], "system_calls": {}}])
def test_an_empty_report_is_all_findings(report: Report) -> None:
    found = {finding.row for finding in protections.judge(report, "first process", HOST)}
    assert found == {row.name for row in ROWS if row.places}


def test_a_value_of_another_shape_is_a_finding_and_no_error(good: Report) -> None:
    for top in good.keys() - {"mounts", "system_calls"}:
        bad = deepcopy(good)
        bad[top] = ["of", {"another": "shape"}]
        assert protections.judge(bad, "first process", HOST)


def test_a_kernel_without_the_32_bit_abi_has_no_door_there(good: Report) -> None:
    del good["system_calls"]["i386"]
    assert protections.judge(good, "first process", HOST) == []


# Ways in -----------------------------------------------------------------------------------


def findings_as(way: str, good: Report) -> set[str]:
    return {finding.row for finding in protections.judge(good, way, HOST)}


def test_what_another_way_in_demands_is_not_what_this_one_does(good: Report) -> None:
    assert findings_as("exec", good) == {"its number is one of its own pid namespace"}
    assert findings_as("with SYS_PTRACE", good) == {
        "the bounding set is the definition's",
        "root holds the bounding set, another user nothing",
        "reaching into other processes takes SYS_PTRACE",
    }
    assert "the root is an overlay without devices" in findings_as("read-only root", good)
    assert "the user is the definition's or the image's" in findings_as("other user", good)


def test_less_than_a_limit_will_do_where_the_agent_may_not_raise_it(good: Report) -> None:
    good["limits"]["nofile"] = [1024, 1024]
    may_not = Host(HOST.namespaces, may_raise_limits=False)
    assert protections.judge(good, "first process", may_not) == []
    (finding,) = protections.judge(good, "first process", HOST)
    assert (finding.row, finding.found) == ("the limit of open files is Fargate's", "[1024, 1024]")


def test_a_higher_oom_score_will_do_where_the_agent_may_not_lower_it() -> None:
    held = [oom_score().holds(500, Host({}, may)) for may in (False, True)]
    assert held == [True, False]


def test_every_trait_that_a_row_distinguishes_belongs_to_a_way_in() -> None:
    known = {trait for traits in WAYS.values() for trait in traits}
    assert {trait for row in ROWS for trait in row.unless} <= known


def test_doctor_takes_every_way_in() -> None:
    assert {"first process", "health check", *BY_ITSELF, *ENTERING} == WAYS.keys()


# The table ---------------------------------------------------------------------------------


def test_names_of_rows_are_unique_and_each_has_its_source() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.source and row.mend and row.places + row.maybe for row in ROWS)


def test_a_place_in_two_rows_is_refused() -> None:
    rows = [Row(name=name, source="", demand=equal(1), places=(("one", "place"),)) for name in "ab"]
    with pytest.raises(ValueError, match="one place is in two rows"):
        judge({}, (), HOST, rows)


def test_an_outcome_is_told_by_its_name() -> None:
    shown = [REFUSED.show(value) for value in (0, EPERM, -11)]
    assert shown == ["success", "EPERM", "ended by signal 11 (Segmentation fault)"]
    assert REFUSED.words == "EPERM"


def test_the_default_capabilities_are_the_products() -> None:
    assert capabilities.mask(capabilities.DEFAULT) == protections.DEFAULT_CAPABILITIES


NOT_ON_OUR_MACHINES = {"pciconfig_iobase", "pciconfig_read", "pciconfig_write"}
OBSOLETE = "forms that no C library of the last twenty years uses"


def test_every_call_that_the_policy_refuses_is_attempted() -> None:
    """The rest has the interpreter of filters in tests/unit/kernel/test_seccomp.py."""
    attempted = re.findall(r'X\("[^"]*", (\w+),', (ROOT / "native/probe_calls.h").read_text())
    refused = {
        name
        for group, names in seccomp_policy.DENIED.items()
        for name in names.split()
        if group != OBSOLETE
    }
    assert refused - NOT_ON_OUR_MACHINES <= set(attempted)


def test_the_page_is_the_table() -> None:
    written = (ROOT / "docs/protections.md").read_text()
    assert written == page(), "python -m scripts.protections > docs/protections.md"
    assert all(f"## {title}" in written for title in TABLE)


def test_equal_findings_of_several_ways_are_told_once() -> None:
    one, other = (Finding(name, "place", "found", "demanded", "mend") for name in "ab")
    assert grouped({"exec": [one, other], "first process": [one]}) == [
        (one, ["first process", "exec"]),
        (other, ["exec"]),
    ]
