"""`sandbox exec`: a command in a running container, with our own descriptors."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import click

from sandbox.cli.attach import Signals, answers, raw_terminal, window
from sandbox.cli.connection import connect
from sandbox.cli.output import complain
from sandbox.cli.request import environment
from sandbox.cli.root import OURS, Command, place
from sandbox.client.link import Link
from sandbox.client.place import Place
from sandbox.errors import AgentUnavailable, SandboxError, TaskFailed
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.varlink import calls


class ExecCommand(Command):
    failure = OURS

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Options may stand on both sides of TASK; the next word begins the command's own."""
        task = len(args) - self._words(context, args)
        if task < len(args) and args[task - 1 : task] != ["--"]:
            options = args[:task] + args[task + 1 :]
            command = len(options) - self._words(context, options)
            end = command - (options[command - 1 : command] == ["--"])
            args = [*options[:end], args[task], *options[command:]]
        return super().parse_args(context, args)

    def _words(self, context: click.Context, args: list[str]) -> int:
        """How many there are from the first on that is no option."""
        given = self.make_parser(context).parse_args(list(args))[0]
        first, others = given.get("task"), given.get("command")
        return isinstance(first, str) + (len(others) if isinstance(others, tuple) else 0)


@click.command("exec", cls=ExecCommand, context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Give the command our stdin.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-c", "--container", metavar="NAME", help="Which container [the first].")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Who runs it.")
@click.option("-w", "--workdir", metavar="DIR", help="Where it runs.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="More environment.")
@click.argument("task")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def exec_(context: click.Context, /, **given: Any) -> None:
    """Run a command in a container of TASK; the exit status is the command's.

    Ctrl-C (without -t) and the loss of this process kill the command.
    """
    import os

    wanted = ExecRequest(
        command=given["command"],
        container=given["container"],
        user=given["user"],
        working_directory=given["workdir"],
        environment=environment(given["env"], (), os.environ),
        terminal=given["tty"],
    )
    signals = Signals()
    with signals.caught(), raw_terminal(given["tty"] and given["interactive"]):
        status = _follow(place(context), given["task"], wanted, given["interactive"], signals)
    context.exit(status)


def _follow(
    where: Place, task: str, request: ExecRequest, interactive: bool, signals: Signals
) -> int:
    rows, columns = window()
    streams = Streams(
        stdout=0,
        stderr=1,
        stdin=2 if interactive else None,
        terminal_rows=rows,
        terminal_cols=columns,
    )
    call = calls.ExecTask(task=task, request=request, streams=streams)
    exec_id: str | None = None

    def pass_on(number: signal.Signals) -> None:
        if number != signal.SIGWINCH:
            raise SystemExit(128 + number)  # closing the link kills the command
        if exec_id is not None:
            rows, columns = window()
            resize = calls.ResizeTerminal(task=task, rows=rows, cols=columns, exec_id=exec_id)
            with contextlib.suppress(SandboxError), Link(where.socket) as other:
                other.call(resize)

    link, _ = connect(where)
    with link:
        link.send(call, [1, 2, *([0] if interactive else [])])
        try:
            for reply in answers(link, call, signals, pass_on):
                exec_id = reply.exec_id or exec_id
                if reply.exit_code is not None:
                    return reply.exit_code
        except TaskFailed as error:
            complain(str(error))
            return error.exit_code or OURS
    raise AgentUnavailable("the agent did not tell how the command ended")
