"""`sandbox doctor`: what this host can give to tasks, tried out and not guessed."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox.cli.output import one_line, print_json
from sandbox.cli.root import Command, json_option, place

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
    if as_json:
        rows = [
            {"name": each.name, "state": each.state.value, "why": each.why, "mend": each.mend}
            for each in findings
        ]
        print_json({"canRunTasks": able, "findings": rows})
    else:
        for each in findings:
            print(f"{MARKS[each.state.value]}  {each.name}: {each.state.value}")
            for detail in (each.why, each.mend):
                if detail:
                    print(f"      {one_line(detail)}")
        print("tasks can run" if able else "tasks cannot run")
    context.exit(0 if able else 1)
