"""`sandbox doctor`: what this host can give to tasks, tried out and not guessed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from sandbox.cli.connection import connect
from sandbox.cli.output import one_line, print_json
from sandbox.cli.root import Command, json_option, place
from sandbox.cli.tasks import listed
from sandbox.client.place import Place
from sandbox.errors import SandboxError
from sandbox.model.task import promised


def commitment(where: Place) -> dict[str, Any] | None:
    """How much of the host the live tasks of a running agent may use; None without one."""
    try:
        link, _ = connect(where, start=False)
        with link:
            views = listed(link, "RUNNING")
    except SandboxError:
        return None
    cpu, memory_mib = promised(view.desired.definition for view in views)
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return {
        "tasks": len(views),
        "memoryMib": memory_mib,
        "memoryOfHost": round(memory_mib / host_mib, 4),
        "cpu": cpu,
        "cpuOfHost": round(cpu / 1024 / (os.cpu_count() or 1), 4),
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
                "live tasks: {tasks}, together promised {memoryOfHost:.0%} of the host's memory"
                " and {cpuOfHost:.0%} of its processors".format(**committed)
            )
        print("tasks can run" if able else "tasks cannot run")
    context.exit(0 if able else 1)
