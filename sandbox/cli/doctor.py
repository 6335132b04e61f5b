"""`sandbox doctor`: what this host can give to tasks, tried out and not guessed.

With --deep also what real tasks on it are kept from: `sandbox.cli.deep` runs them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sandbox.cli.connection import connect
from sandbox.cli.output import complain, one_line, print_json
from sandbox.cli.root import Command, json_option, place
from sandbox.cli.tasks import listed
from sandbox.client.place import Place
from sandbox.errors import SandboxError
from sandbox.model.task import promised, size_of


def commitment(where: Place) -> dict[str, Any] | None:
    """How much of the host the live tasks of a running agent may use; None without one."""
    try:
        link, _ = connect(where, start=False)
        with link:
            views = listed(link, "RUNNING")
    except SandboxError:
        return None
    of_all = promised(size_of(view.desired.definition, view.desired.storage) for view in views)
    disk_bytes = shutil.disk_usage(where.state_dir).total
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return {
        "tasks": len(views),
        "memoryMib": of_all.memory_mib,
        "memoryOfHost": round(of_all.memory_mib / host_mib, 4),
        "cpu": of_all.cpu,
        "cpuOfHost": round(of_all.cpu / 1024 / (os.cpu_count() or 1), 4),
        "storageGib": of_all.storage_gib,
        "storageOfHost": round((of_all.storage_gib << 30) / disk_bytes, 4),
    }


MARKS = {"active": "ok", "degraded": "--", "missing": "!!"}


@click.command("doctor", cls=Command)
@click.option("--deep", is_flag=True, help="Also run real tasks, and check from inside of them.")
@json_option
@click.pass_context
def doctor(context: click.Context, /, deep: bool, as_json: bool) -> None:
    """Tell each requirement and protection: active, degraded (why) or missing (what mends it).

    The exit status is 0 when tasks can run.

    With --deep a probe is run in real tasks, by every way in which a program gets into one, and
    each protection that it does not find is told. The exit status is then 0 when all of them hold.
    """
    from sandbox.kernel import probe

    where = place(context)
    findings = probe.probe(Path(where.state_dir))
    able = probe.can_run_tasks(findings)
    told: dict[str, Any] = {
        "canRunTasks": able,
        "findings": [
            {"name": each.name, "state": each.state.value, "why": each.why, "mend": each.mend}
            for each in findings
        ],
        "promised": commitment(where),
    }
    if not as_json:
        show(told)
    if deep:
        if not able:
            complain("no task can run here, so none was looked at from inside")
        else:
            told["deep"] = examined(where)
            if not as_json:
                show_examined(told["deep"])
    if as_json:
        print_json(told)
    context.exit(0 if able and not told.get("deep", {}).get("failed") else 1)


def show(told: dict[str, Any]) -> None:
    for each in told["findings"]:
        print(f"{MARKS[each['state']]}  {each['name']}: {each['state']}")
        for detail in (each["why"], each["mend"]):
            if detail:
                print(f"      {one_line(detail)}")
    if told["promised"] is not None:
        print(
            "live tasks: {tasks}, together promised {memoryOfHost:.0%} of the host's memory,"
            " {cpuOfHost:.0%} of its processors and {storageOfHost:.0%} of its disk".format(
                **told["promised"]
            )
        )
    print("tasks can run" if told["canRunTasks"] else "tasks cannot run", flush=True)


def examined(where: Place) -> dict[str, Any]:
    """What real tasks report, held to the table."""
    from sandbox.cli import deep
    from sandbox.model.protections import ROWS, WAYS, judge

    with progress(len(WAYS)) as tell:
        reports = deep.examine(Path(where.state_dir), tell)
    host = deep.this_host()
    found = {way: judge(report, way, host) for way, report in reports.items()}
    failed = [
        {
            "name": finding.row,
            "place": finding.place,
            "found": finding.found,
            "demanded": finding.demanded,
            "mend": finding.mend,
            "ways": ways,
        }
        for finding, ways in deep.grouped(found)
    ]
    return {"checked": len(ROWS), "ways": [way for way in WAYS if way in reports], "failed": failed}


def show_examined(deep: dict[str, Any]) -> None:
    for each in deep["failed"]:
        print(f"!!  {each['name']}")
        print(f"      found at {one_line(each['place'])}: {one_line(each['found'])}")
        print(f"      demanded: {one_line(each['demanded'])}")
        print(f"      {one_line(each['mend'])}")
        if len(each["ways"]) < len(deep["ways"]):
            print(f"      only by: {', '.join(each['ways'])}")
    names = {each["name"] for each in deep["failed"]}
    print(
        f"{deep['checked']} protections checked inside real tasks, by {len(deep['ways'])} ways in: "
        + (f"{len(names)} do not hold" if names else "all hold")
    )


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """How many of the ways are done, on one line of stderr, if that is a terminal."""
    done = 0
    is_shown = sys.stderr.isatty()

    def tell(way: str) -> None:
        nonlocal done
        done += 1
        if is_shown:
            sys.stderr.write(f"\r{done} of {total} ways into a task: {way}\x1b[K")
            sys.stderr.flush()

    try:
        yield tell
    finally:
        if is_shown:
            sys.stderr.write("\r\x1b[K")
