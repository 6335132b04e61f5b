"""`sandbox logs` and `sandbox events`: what tasks wrote, and what became of them.

stdout of a container goes to stdout, its stderr to stderr. Into a pipe or file go the raw bytes; on
a terminal the text is made harmless and, with several containers, each line says whose it is.
"""

from __future__ import annotations

import codecs
import re
import sys
from datetime import UTC, datetime
from typing import BinaryIO

import click

from sandbox.cli.connection import connect
from sandbox.cli.output import complain, harmless, print_json
from sandbox.cli.request import duration
from sandbox.cli.root import Command, json_option, place
from sandbox.errors import InvalidParameterException
from sandbox.model.observed import Event, LogRecord
from sandbox.varlink import calls


@click.command("logs", cls=Command)
@click.argument("task")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has stopped.")
@click.option("--since", metavar="TIME", help="Not older than 10m, or 2026-11-23T10:00:00Z.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="The last N records only.")
@click.option("-c", "--container", metavar="NAME", help="One container only.")
@json_option
@click.pass_context
def logs(
    context: click.Context,
    /,
    task: str,
    follow: bool,
    since: str | None,
    tail: int | None,
    container: str | None,
    as_json: bool,
) -> None:
    """Show what the containers of TASK wrote, as they wrote it.

    --json prints one object a record: a chunk as the program wrote it, base64 in `data`.
    """
    wanted = calls.ReadLogs(
        task=task,
        container=container,
        since=point_in_time(since, datetime.now(UTC).timestamp()) if since else None,
        tail=tail,
        follow=follow,
    )
    link, _ = connect(place(context))
    with link:
        described = link.call(calls.DescribeTask(task=task)).task
        several = len(described.desired.definition.container_definitions) > 1
        printer = Printer(name_lines=several and container is None)
        for reply in link.stream(wanted):
            for record in reply.records:
                if as_json:
                    print_json(record)
                else:
                    printer.show(record)
            sys.stdout.flush()
        printer.finish()


def point_in_time(text: str, now: float) -> float:
    """Seconds since the epoch: an ISO 8601 time (UTC unless it says) or an age."""
    try:
        return now - duration(text)
    except InvalidParameterException:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidParameterException(
            f"--since {text}: expected an age (10m) or a time (2026-11-23T10:00:00Z)"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


class Printer:
    """Log records to our two streams; what `harmless` needs of state is kept a source."""

    def __init__(self, *, name_lines: bool) -> None:
        self._name_lines = name_lines
        self._sources: dict[tuple[str, str], Shown] = {}

    def show(self, record: LogRecord) -> None:
        if record.stream == "keeper":
            complain(f"{record.container}: {record.data.decode(errors='replace')}")
            return
        out = sys.stderr if record.stream == "stderr" else sys.stdout
        if not out.isatty():
            out.buffer.write(record.data)
            out.buffer.flush()
            return
        source = (record.container, record.stream)
        if source not in self._sources:
            prefix = f"{harmless(record.container)} | " if self._name_lines else ""
            self._sources[source] = Shown(out.buffer, prefix)
        self._sources[source].write(record.data)

    def finish(self) -> None:
        for shown in self._sources.values():
            shown.finish()


class Shown:
    """One stream of one container on a terminal."""

    def __init__(self, out: BinaryIO, prefix: str) -> None:
        self._out = out
        self._prefix = prefix
        self._text = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._at_line_start = True

    def write(self, data: bytes) -> None:
        self._put(self._text.decode(data))

    def finish(self) -> None:
        self._put(self._text.decode(b"", final=True))

    def _put(self, text: str) -> None:
        for line in re.findall(r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n")):
            prefix = self._prefix if self._at_line_start else ""
            self._at_line_start = line.endswith("\n")
            self._out.write((prefix + harmless(line)).encode())
        self._out.flush()


@click.command("events", cls=Command)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens next.")
@click.option("--after", type=int, metavar="REV", help="Only what is newer than this revision.")
@json_option
@click.pass_context
def events(context: click.Context, /, follow: bool, after: int | None, as_json: bool) -> None:
    """Show the changes of all tasks, oldest first."""
    link, _ = connect(place(context))
    with link:
        for reply in link.stream(calls.ReadEvents(after=after, follow=follow)):
            for event in reply.events:
                if as_json:
                    print_json(event)
                else:
                    print(event_line(event))
            sys.stdout.flush()


def event_line(event: Event) -> str:
    at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds")
    states = f"{event.last_status} (desired {event.desired_status})"
    return harmless(f"{at} {event.rev} {event.task} {states} {event.reason or ''}".rstrip())
