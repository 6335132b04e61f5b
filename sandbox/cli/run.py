"""`sandbox run`: one task, attached or left to a resident agent.

Attached it is a Unix program: its own descriptors become the container's, signals reach the
container, its status is the container's. The first Ctrl-C is the program's to handle, the second
stops the task as StopTask does (SIGTERM, then SIGKILL after stopTimeout), the third kills it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any, TextIO

import click

from sandbox.cli.attach import Bar, Signals, answers, raw_terminal, window
from sandbox.cli.connection import connect
from sandbox.cli.output import complain, print_json
from sandbox.cli.request import duration, entry_point, environment, refuse_network
from sandbox.cli.root import OURS, Command, json_option, place
from sandbox.client.link import Link, reach
from sandbox.client.place import Place, is_text
from sandbox.client.request import TaskOptions, task_request
from sandbox.client.shape import main_container, shape
from sandbox.errors import (
    AgentUnavailable,
    ConfigError,
    InvalidParameterException,
    SandboxError,
)
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import Status, StopCode, TaskView
from sandbox.varlink import calls

TIMED_OUT = 124
"""As timeout(1) has it."""

AGENT_ABSENCE_S = 60.0
"""How long a restarting agent may be away before an attached run gives its task up."""


class RunCommand(Command):
    failure = OURS


@click.command(
    "run",
    cls=RunCommand,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
@click.option("--cpu", default="256", metavar="UNITS", help="Task cpu: 256, '1 vCPU' [256].")
@click.option("--memory", default="512", metavar="MIB", help="Task memory: 512, '2GB' [512].")
@click.option("--name", metavar="NAME", help="Name of the task and its container.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Set, or pass on.")
@click.option(
    "--env-file",
    multiple=True,
    type=click.File(encoding="utf-8", errors="surrogateescape"),
    metavar="FILE",
    help="Lines of NAME=VALUE.",
)
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who the program runs as.")
@click.option("-w", "--workdir", metavar="DIR", help="Its working directory.")
@click.option("--entrypoint", metavar="PROGRAM", help="Instead of the image's entry point.")
@click.option("--read-only", is_flag=True, help="Mount the root file system read-only.")
@click.option("--init", is_flag=True, help="Run an init as pid 1 that reaps and forwards.")
@click.option(
    "-v", "--volume", multiple=True, metavar="NAME:/PATH[:ro]", help="A volume of the task."
)
@click.option("--ulimit", multiple=True, metavar="NAME=SOFT[:HARD]", help="A resource limit.")
@click.option("--stop-timeout", type=int, metavar="SECONDS", help="SIGTERM to SIGKILL [30].")
@click.option("-p", "--port", multiple=True, metavar="PORT[/udp]", help="Declare a port.")
@click.option("--pull", type=click.Choice(["missing", "always", "never"]), default="missing")
@click.option("--platform", metavar="OS/ARCH", help="The image's platform [the host's].")
@click.option("--platform-version", default="LATEST", metavar="VERSION", help="Fargate's [LATEST].")
@click.option(
    "--ephemeral-storage", type=int, metavar="GIB", help="Disk of the task, 21 to 200 [20]."
)
@click.option(
    "--pid",
    "pid_mode",
    type=click.Choice(["task"]),
    metavar="task",
    help="'task': one pid namespace for the task's containers, pidMode of ECS.",
)
@click.option("--rm", is_flag=True, help="Forget the task once it has stopped.")
@click.option("--timeout", metavar="TIME", help="Stop the task after 90s, 15m, 2h; exit 124.")
@click.option("-i", "--interactive", is_flag=True, help="Give the program our stdin.")
@click.option("-t", "--tty", is_flag=True, help="Give the program a terminal.")
@click.option("-d", "--detach", is_flag=True, help="Print the task's id and leave it running.")
@click.option("--subnet", hidden=True)
@click.option("--security-group", multiple=True, hidden=True)
@click.option("--public-ip", is_flag=True, hidden=True)
@json_option
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(context: click.Context, /, **given: Any) -> None:
    """Run one task of IMAGE and give its output, its signals and its exit status.

    With --json stdout gets one JSON object, the stopped (or detached: running) task, and the
    program's own stdout goes to stderr.
    """
    refuse_network(given["subnet"], given["security_group"], given["public_ip"])
    wanted = task_request(**_options(given))
    timeout_s = duration(given["timeout"]) if given["timeout"] else None
    where = place(context)
    if given["detach"]:
        if timeout_s is not None or given["interactive"] or given["tty"]:
            raise InvalidParameterException("-d excludes -i, -t and --timeout")
        context.exit(detached(where, wanted, as_json=given["as_json"]))
    attached = Attached(where, wanted, timeout_s)
    with attached.signals.caught(), raw_terminal(given["tty"] and given["interactive"]):
        stopped = attached.follow(_streams(given))
    if given["as_json"]:
        print_json(shape(stopped))
    context.exit(attached.status(stopped))


def _options(given: dict[str, Any]) -> TaskOptions:
    lines = [line for file in given["env_file"] for line in lines_of(file)]
    options = TaskOptions(
        image=given["image"],
        command=given["command"],
        cpu=given["cpu"],
        memory=given["memory"],
        environment=environment(given["env"], lines, os.environ),
        user=given["user"],
        working_directory=given["workdir"],
        entry_point=entry_point(given["entrypoint"]),
        read_only=given["read_only"],
        init=given["init"],
        volumes=given["volume"],
        ulimits=given["ulimit"],
        stop_timeout=given["stop_timeout"],
        ports=given["port"],
        pull=given["pull"],
        platform=given["platform"],
        platform_version=given["platform_version"],
        ephemeral_storage=given["ephemeral_storage"],
        pid_mode=given["pid_mode"],
        remove=given["rm"],
        interactive=given["interactive"],
        terminal=given["tty"],
    )
    if given["name"] is not None:
        options["name"] = given["name"]
    return options


def lines_of(file: TextIO) -> list[str]:
    """Of a file of NAME=VALUE. One that is no text at all is named, and not its content."""
    try:
        lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise ConfigError(f"--env-file {file.name}: {error.strerror}") from None
    if not all(is_text(line) for line in lines):
        raise InvalidParameterException(f"--env-file {file.name}: not UTF-8")
    return lines


def _streams(given: dict[str, Any]) -> tuple[Streams, list[int]]:
    """Our descriptors for the container, and the same as they travel."""
    stdout = 2 if given["as_json"] else 1
    descriptors = [stdout, 2, *([0] if given["interactive"] else [])]
    rows, columns = window()
    streams = Streams(
        stdout=0,
        stderr=1,
        stdin=2 if given["interactive"] else None,
        terminal_rows=rows,
        terminal_cols=columns,
    )
    return streams, descriptors


class Attached:
    """One attached run, from the request to the stopped task."""

    def __init__(self, where: Place, request: RunRequest, timeout_s: float | None) -> None:
        self.signals = Signals()
        self.is_timed_out = False
        self._where = where
        self._request = request
        self._timeout_s = timeout_s
        self._view: TaskView | None = None
        self._interrupts = 0
        self._last_signal: signal.Signals | None = None

    def follow(self, handed: tuple[Streams, list[int]]) -> TaskView:
        streams, descriptors = handed
        link, resident = connect(self._where, create=True)
        name = self._request.definition.container_definitions[0].name
        call = calls.RunTask(request=self._request, owned=True, streams={name: streams})
        link.send(call, descriptors)
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        bar = Bar()
        try:
            replies = answers(link, call, self.signals, self._pass_on, deadline, self._time_out)
            for reply in replies:
                if reply.progress is not None:
                    bar.show(reply.progress.what, reply.progress.done, reply.progress.total)
                if reply.task is not None:
                    self._view = reply.task
                    if reply.task.known.last_status >= Status.ACTIVATING:
                        bar.clear()
        except AgentUnavailable:
            if self._view is None:
                raise
            bar.clear()
            self._follow_again(self._view.id, resident, deadline)
        finally:
            bar.clear()
            link.close()
        return self._stopped()

    def _follow_again(self, task: str, resident: bool, deadline: float | None) -> None:
        """The agent is gone, the task is not: the next agent takes both of us back.

        A resident agent is waited for, since starting one of our own would take its directory.
        """
        link = self._await_agent() if resident else connect(self._where)[0]
        call = calls.WatchTask(task=task, owned=True)
        with link:
            link.send(call)
            for reply in answers(link, call, self.signals, self._pass_on, deadline, self._time_out):
                self._view = reply.task

    def _await_agent(self) -> Link:
        complain("the agent is gone, the task goes on: waiting for the next agent")
        end = time.monotonic() + AGENT_ABSENCE_S
        while True:
            try:
                return reach(self._where.socket)[0]
            except AgentUnavailable:
                if time.monotonic() > end or self.signals.take():
                    raise
                time.sleep(0.2)

    def _stopped(self) -> TaskView:
        if self._view is None or self._view.known.last_status is not Status.STOPPED:
            raise AgentUnavailable("the agent no longer knows the task")
        return self._view

    # What the user does meanwhile ---------------------------------------------------------

    def _pass_on(self, number: signal.Signals) -> None:
        if self._view is None:  # nothing was accepted yet: leaving is enough
            if number != signal.SIGWINCH:
                raise SystemExit(128 + number)
            return
        task = self._view.id
        if number == signal.SIGWINCH:
            rows, columns = window()
            self._tell(calls.ResizeTerminal(task=task, rows=rows, cols=columns))
            return
        self._last_signal = number
        if number == signal.SIGINT:
            self._interrupts += 1
        stop = calls.StopTask(task=task, reason=f"{number.name} from the caller of sandbox run")
        if number == signal.SIGINT and self._interrupts == 2:
            self._tell(stop)
            return
        if number == signal.SIGINT and self._interrupts > 2:
            number = signal.SIGKILL
        delivered = self._tell(calls.KillTask(task=task, signal=number))
        if not delivered:  # it does not run yet, or no longer
            self._tell(stop)

    def _time_out(self) -> None:
        self.is_timed_out = True
        if self._view is not None:
            reason = f"Timed out after {self._timeout_s:g} seconds"
            self._tell(calls.StopTask(task=self._view.id, reason=reason))

    def _tell(self, call: calls.Call[Any]) -> bool:
        with contextlib.suppress(SandboxError), Link(self._where.socket) as link:
            link.call(call)
            return True
        return False

    def status(self, stopped: TaskView) -> int:
        losses = [text for each in stopped.known.containers for text in each.lost_output]
        for loss in losses:
            complain(loss)
        if self.is_timed_out:
            return TIMED_OUT
        if losses:
            return OURS
        status, notes = outcome(stopped)
        if status == OURS and self._last_signal is not None:
            return 128 + self._last_signal
        for note in notes:
            complain(note)
        return status


def detached(where: Place, request: RunRequest, *, as_json: bool) -> int:
    """Leave the task to a resident agent as soon as it runs."""
    link, _ = connect(where, create=True)
    bar = Bar()
    view: TaskView | None = None
    with link:
        for reply in link.stream(calls.RunTask(request=request)):
            if reply.progress is not None:
                bar.show(reply.progress.what, reply.progress.done, reply.progress.total)
            view = reply.task or view
            if view is not None and view.known.last_status >= Status.RUNNING:
                break
    bar.clear()
    if view is None:
        raise AgentUnavailable("the agent no longer knows the task")
    if as_json:
        print_json(shape(view))
    else:
        print(view.id)
    if view.known.stop_code is not StopCode.TASK_FAILED_TO_START:
        return 0
    status, notes = outcome(view)
    for note in notes:
        complain(note)
    return status


def outcome(stopped: TaskView) -> tuple[int, Iterable[str]]:
    """The exit status that a stopped task gives its caller, and what the user should know."""
    known = stopped.known
    main = main_container(stopped)
    code = main.exit_code if main else None
    reason = known.stopped_reason or "the task stopped"
    if known.stop_code is StopCode.TASK_FAILED_TO_START:
        return (code if code in (126, 127) else OURS), [reason]
    if code is None:
        return OURS, [reason]
    notes = [f"{each.name}: {each.reason}" for each in known.containers if each.reason]
    return code, notes
