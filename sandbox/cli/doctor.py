"""`sandbox doctor`: what this host can give to tasks, tried out and not guessed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from sandbox.cli.connection import connect
from sandbox.cli.output import one_line, print_json
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
@json_option
@click.pass_context
def doctor(context: click.Context, /, as_json: bool) -> None:
    """Tell each requirement and protection: active, degraded (why) or missing (what mends it).

    The exit status is 0 when tasks can run.
    """
    from sandbox.kernel import probe

    findings = probe.probe(Path(place(context).state_dir))
    able = probe.can_run_tasks(findings)
    committed = commitment(place(context))
    if as_json:
        rows = [
            {"name": each.name, "state": each.state.value, "why": each.why, "mend": each.mend}
            for each in findings
        ]
        print_json({"canRunTasks": able, "findings": rows, "promised": committed})
    else:
        for each in findings:
            print(f"{MARKS[each.state.value]}  {each.name}: {each.state.value}")
            for detail in (each.why, each.mend):
                if detail:
                    print(f"      {one_line(detail)}")
        if committed is not None:
            print(
                "live tasks: {tasks}, together promised {memoryOfHost:.0%} of the host's memory,"
                " {cpuOfHost:.0%} of its processors and {storageOfHost:.0%} of its disk".format(
                    **committed
                )
            )
        print("tasks can run" if able else "tasks cannot run")
    context.exit(0 if able else 1)
