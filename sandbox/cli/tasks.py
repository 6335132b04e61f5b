"""Commands on tasks that exist: ps, inspect, stop, rm, prune, stats."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

import click

from sandbox.cli.connection import connect, is_untouched
from sandbox.cli.output import complain, print_json, print_table, since, size
from sandbox.cli.root import Command, json_option, place
from sandbox.client.link import Link
from sandbox.client.shape import main_container, shape
from sandbox.errors import ApiError, ImageError, SandboxError
from sandbox.model.observed import TaskStats
from sandbox.model.task import Status, TaskView
from sandbox.varlink import calls

SHORT_ID = 12
"""Of 32 hex digits: unique among any number of tasks that one host can hold."""


@click.command("ps", cls=Command)
@click.option("-a", "--all", "everything", is_flag=True, help="Stopped tasks too.")
@json_option
@click.pass_context
def ps(context: click.Context, /, everything: bool, as_json: bool) -> None:
    """List tasks, oldest first."""
    where, views = place(context), list[TaskView]()
    if not is_untouched(where):
        with connect(where)[0] as link:
            views = listed(link, None if everything else "RUNNING")
    if as_json:
        print_json([shape(view) for view in views])
        return
    print_table(
        ("TASK", "NAME", "IMAGE", "STATUS", "CREATED", "EXIT", "REASON"),
        [ps_row(view) for view in views],
    )


def listed(link: Link, desired_status: Literal["RUNNING", "STOPPED"] | None) -> list[TaskView]:
    """The tasks that are wanted so, or all of them; oldest first."""
    wanted = calls.ListTasks(desired_status=desired_status)
    return [view for reply in link.stream(wanted) for view in reply.tasks]


def ps_row(view: TaskView) -> tuple[str, ...]:
    definition = view.desired.definition
    main = main_container(view)
    code = main.exit_code if main is not None else None
    return (
        view.id[:SHORT_ID],
        definition.family,
        ",".join(dict.fromkeys(each.image for each in definition.container_definitions)),
        view.known.last_status.name,
        since(view.desired.created_at),
        "-" if code is None else str(code),
        view.known.stopped_reason or "",
    )


@click.command("inspect", cls=Command)
@click.argument("tasks", nargs=-1, required=True)
@json_option
@click.pass_context
def inspect(context: click.Context, /, tasks: Sequence[str], as_json: bool) -> None:
    """Show all that is known of TASKS, as a JSON array."""
    link, _ = connect(place(context))
    with link:
        print_json([shape(link.call(calls.DescribeTask(task=task)).task) for task in tasks])


@click.command("stop", cls=Command)
@click.argument("tasks", nargs=-1, required=True)
@click.option("--reason", metavar="TEXT", help="The stopped reason [Task stopped by user].")
@click.option("--no-wait", is_flag=True, help="Do not wait until they have stopped.")
@click.pass_context
def stop(
    context: click.Context, /, tasks: Sequence[str], reason: str | None, no_wait: bool
) -> None:
    """Stop TASKS: SIGTERM, then SIGKILL after stopTimeout."""
    link, _ = connect(place(context))
    with link:

        def want_stopped(task: str) -> None:
            link.call(calls.StopTask(task=task, reason=reason))

        def wait_stopped(task: str) -> None:
            for _ in link.stream(calls.WatchTask(task=task)):
                pass
            print(task)

        stopping = for_each(tasks, want_stopped)
        waited = [] if no_wait else for_each(stopping, wait_stopped)
    context.exit(0 if len(stopping) == len(tasks) and (no_wait or len(waited) == len(tasks)) else 1)


@click.command("rm", cls=Command)
@click.argument("tasks", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Stop them first.")
@click.pass_context
def rm(context: click.Context, /, tasks: Sequence[str], force: bool) -> None:
    """Forget stopped TASKS: the record and the log."""
    link, _ = connect(place(context))
    with link:

        def remove(task: str) -> None:
            if force:
                stop_and_wait(link, task)
            link.call(calls.RemoveTask(task=task))
            print(task)

        removed = for_each(tasks, remove)
    context.exit(0 if len(removed) == len(tasks) else 1)


def stop_and_wait(link: Link, task: str) -> None:
    link.call(calls.StopTask(task=task))
    for _ in link.stream(calls.WatchTask(task=task)):
        pass


def for_each(names: Sequence[str], act: Callable[[str], None]) -> list[str]:
    """Act on everything that is named, complain of what is refused, return the rest."""
    done = []
    for name in names:
        try:
            act(name)
        except (ApiError, ImageError) as error:
            is_named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error))
            complain(str(error) if is_named else f"{name}: {error}")
        else:
            done.append(name)
    return done


@click.command("prune", cls=Command)
@json_option
@click.pass_context
def prune(context: click.Context, /, as_json: bool) -> None:
    """Forget all stopped tasks. Images have `sandbox image prune`."""
    link, _ = connect(place(context))
    with link:
        views = listed(link, "STOPPED")
        stopped = [view.id for view in views if view.known.last_status is Status.STOPPED]
        removed = for_each(stopped, lambda task: void(link.call(calls.RemoveTask(task=task))))
    if as_json:
        print_json({"removed": removed})
    else:
        print(f"{len(removed)} stopped tasks forgotten")


def void(_: object) -> None:
    """For calls whose answer says nothing."""


@click.command("stats", cls=Command)
@click.argument("tasks", nargs=-1)
@json_option
@click.pass_context
def stats(context: click.Context, /, tasks: Sequence[str], as_json: bool) -> None:
    """Show what TASKS (or all running ones) have used since they started."""
    link, _ = connect(place(context))
    with link:
        named = bool(tasks)
        if not named:
            views = listed(link, "RUNNING")
            tasks = [view.id for view in views if view.known.last_status is Status.RUNNING]
        found = []
        for task in tasks:
            try:
                found.append(link.call(calls.GetStats(task=task)).stats)
            except SandboxError:
                if named:
                    raise
                continue  # it ended since it was listed
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.id[:SHORT_ID],
            each.name,
            f"{each.cpu_usage_ns / 1e9:.2f}s",
            f"{each.cpu_throttled_periods}/{each.cpu_periods}",
            f"{size(each.memory_bytes)} / {size(each.memory_max_bytes)}",
            size(each.memory_peak_bytes),
            str(each.oom_kills),
            str(each.pids),
            _storage(one) if each is one.total else "",
        )
        for one in found
        for each in (one.total, *one.containers)
    ]
    print_table(
        ("TASK", "CONTAINER", "CPU", "THROTTLED", "MEMORY", "PEAK", "OOM", "PIDS", "STORAGE"), rows
    )


def _storage(stats: TaskStats) -> str:
    """The containers of a task share it."""
    if stats.storage is None:
        return "no limit"
    return f"{size(stats.storage.utilized_bytes)} / {size(stats.storage.reserved_bytes)}"
