"""What a task sees and may do, by what a program inside of it reports.

The probe gets in by every way there is: as the first process of a container with each option that
matters, by an exec, as a health check. The agent is started by an odd parent: other signals are
ignored and blocked, it has another priority, umask, groups, directories open, and secrets in its
environment. None of that may show inside.

What every way in has to report stands in sandbox/model/protections.py, row by row. Here is what
takes more than one report, or the host's view, to be said.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from sandbox.cli.deep import PROBE, Report, parsed
from sandbox.model.judgement import Host
from sandbox.model.protections import TABLE, WAYS, judge
from tests.conftest import ROOT, leaving_nothing

pytestmark = [pytest.mark.guest, pytest.mark.only_reads]

SECRET = "SECRET_OF_THE_AGENT"


def be_odd() -> None:
    """In the agent's process, before it is executed."""
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGRTMIN + 5):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMAX})
    os.umask(0o027)
    os.setgroups([4, 27, 1000])
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(3)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("agent")
    program = (sys.executable, "-m", "tests.kernel.probe_tasks", str(directory))
    with leaving_nothing(), socket.socket(socket.AF_UNIX) as of_the_host, stray_directory() as fd:
        of_the_host.bind(f"\0sandbox-test-{os.getpid()}")
        done = subprocess.run(
            program,
            cwd=ROOT,
            env=os.environ | {SECRET: SECRET},
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            preexec_fn=be_odd,
            timeout=300,
            check=True,
        )
    return {"state": str(directory), **json.loads(done.stdout)}


@contextmanager
def stray_directory() -> Iterator[int]:
    """A descriptor that survives exec, of the kind with which a container could leave its root."""
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def reports(collected: Any) -> dict[str, Report]:
    found: dict[str, Report] = collected["reports"]
    return found


@pytest.fixture(scope="module")
def both(collected: Any) -> list[Report]:
    """Of two tasks that live at once."""
    found: list[Report] = collected["both"]
    return found


@pytest.fixture(scope="module")
def facts(collected: Any) -> dict[str, Any]:
    found: dict[str, Any] = collected["facts"]
    return found


@pytest.fixture(scope="module")
def host(facts: dict[str, Any]) -> Host:
    return Host(**facts["host"])


# By the table ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_each_way_in_reports_what_the_table_demands(
    way: str, reports: dict[str, Report], host: Host
) -> None:
    assert judge(reports[way], way, host) == []


def test_a_deliberately_weakened_task_is_found(reports: dict[str, Report], host: Host) -> None:
    found = judge(reports["with SYS_PTRACE"], "first process", host)
    assert {finding.row for finding in found} == {
        "the bounding set is the definition's",
        "root holds the bounding set, another user nothing",
        "reaching into other processes takes SYS_PTRACE",
    }


@pytest.fixture(scope="module")
def outside() -> Report:
    """The probe as a plain process of root."""
    return parsed(subprocess.run([PROBE], stdout=subprocess.PIPE, timeout=60, check=True).stdout)


def test_each_abi_of_the_kernel_is_tried_inside(
    reports: dict[str, Report], outside: Report
) -> None:
    for report in reports.values():
        assert report["system_calls"].keys() == outside["system_calls"].keys()
        for abi, attempts in outside["system_calls"].items():
            assert report["system_calls"][abi].keys() == attempts.keys()


def test_outside_of_a_task_nearly_nothing_holds(outside: Report, host: Host) -> None:
    """What the table demands is not just how Linux is."""
    found = {finding.row for finding in judge(outside, "first process", host)}
    for rows in TABLE.values():
        assert found & {row.name for row in rows}
    assert found >= {
        "ids are a range of the task's own",
        "the bounding set is the definition's",
        "a filter of system calls is loaded",
        "mounts, old and new, are refused",
        "no namespace is entered or made",
        "bpf, perf, userfaultfd and io_uring are refused",
        "no other family does, AF_ALG, AF_VSOCK and AF_XDP among them",
        "nothing is typed into a terminal for somebody else",
        "the root is an overlay without devices",
        "/sys is read-only",
        "what covers a path can be neither written nor executed",
        "what tells of the machine is masked",
        "settings of the kernel cannot be written",
        "no device node can be made",
        "its environment is the image's, the definition's and what a task may know",
        "namespaces are the task's own",
        "interfaces cannot be changed",
        "the report is what the table knows",
    }


# By more than one report -------------------------------------------------------------------


def test_the_ranges_of_two_live_tasks_are_disjoint(
    both: list[Report], facts: dict[str, Any]
) -> None:
    one, other = (int(report["uid_map"].split()[1]) for report in both)
    assert [one, other] == facts["bases"] == facts["uids on the host"]
    assert [report["gid_map"] for report in both] == [report["uid_map"] for report in both]
    assert abs(one - other) >= 65536


def test_two_tasks_share_no_namespace(both: list[Report]) -> None:
    one, other = (report["namespaces"] for report in both)
    assert {kind for kind in one if one[kind] == other[kind]} <= {"time"}


def test_two_tasks_have_different_host_names(both: list[Report], facts: dict[str, Any]) -> None:
    assert [report["hostname"] for report in both] == [task[:12] for task in facts["tasks"]]


def test_the_host_name_in_the_environment_is_the_tasks(reports: dict[str, Report]) -> None:
    for report in reports.values():
        assert f"HOSTNAME={report['hostname']}" in report["environment"]


def test_nothing_it_says_holds_a_secret_of_the_agent(reports: dict[str, Report]) -> None:
    assert SECRET not in json.dumps(reports)


def test_nothing_of_a_task_is_among_the_mounts_of_the_host(
    collected: Any, facts: dict[str, Any]
) -> None:
    lines = facts["mounts of the host"]
    traces = [collected["state"], *facts["tasks"], *map(str, facts["bases"])]
    assert [trace for trace in traces if trace in lines] == []


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> set[str]:
    """The places, as a/b/c, at which two reports are not the same."""
    found = set()
    for key in one.keys() | other.keys():
        here, mine, yours = f"{path}/{key}".lstrip("/"), one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(yours, dict):
            found |= differences(mine, yours, here)
        elif mine != yours:
            found.add(here)
    return found


# A process of its own has numbers of its own; all else of an exec must be as in the container.
OWN = {
    "cgroup",
    "paths//sys/fs/cgroup/entries",
    "pid",
    "descriptors/1/target",
    "descriptors/2/target",
}


def test_an_exec_is_as_the_containers_first_process(reports: dict[str, Report]) -> None:
    assert differences(reports["first process"], reports["exec"]) - OWN == set()
