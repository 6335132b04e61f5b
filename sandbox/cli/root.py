"""The tree of commands: names to modules, loaded when one is called.

Global options are accepted before and after the command, so every command has them and the last
one given wins. Every error of ours becomes one line on stderr here, and nowhere else.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from sandbox import __version__
from sandbox.cli.output import StdoutFailed, complain, give_up_stdout
from sandbox.client.place import Place, is_text, shown_bytes
from sandbox.errors import SandboxError

COMMANDS = {
    "agent": "sandbox.cli.agent:agent",
    "completion": "sandbox.cli.completion:completion",
    "cp": "sandbox.cli.copy:cp",
    "doctor": "sandbox.cli.doctor:doctor",
    "events": "sandbox.cli.logs:events",
    "exec": "sandbox.cli.exec:exec_",
    "image": "sandbox.cli.image:image",
    "inspect": "sandbox.cli.tasks:inspect",
    "logs": "sandbox.cli.logs:logs",
    "prune": "sandbox.cli.tasks:prune",
    "ps": "sandbox.cli.tasks:ps",
    "rm": "sandbox.cli.tasks:rm",
    "run": "sandbox.cli.run:run",
    "stats": "sandbox.cli.tasks:stats",
    "stop": "sandbox.cli.tasks:stop",
}

FAILURE = 1
OURS = 125
"""The failure status of `run` and `exec`, as Docker has it: never the program's own."""

NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""A group without a command shows its help; as an error only since click 8.2."""


def global_options() -> list[click.Parameter]:
    def keep(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.meta[f"sandbox.{option.name}"] = value

    def option(name: str, text: str) -> click.Option:
        return click.Option(
            [name], metavar="DIR", help=text, callback=keep, expose_value=False, is_eager=True
        )

    return [
        option("--state-dir", "Where the agent keeps its state [/var/lib/sandbox]."),
        option("--run-dir", "Where its control socket is [/run/sandbox, or STATE-DIR/run]."),
    ]


def place(context: click.Context) -> Place:
    """The agent that this command line means."""
    return Place.of(context.meta.get("sandbox.state_dir"), context.meta.get("sandbox.run_dir"))


@contextmanager
def told(failure: int) -> Iterator[None]:
    """Whatever goes wrong here is one line on stderr, and `failure` the exit status."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`sandbox ps | head`): no error to talk about.
        give_up_stdout()
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None
    except StdoutFailed as error:
        complain(f"stdout: {error.strerror}")
        give_up_stdout()
        raise click.exceptions.Exit(failure) from None
    except SandboxError as error:
        complain(str(error))
        raise click.exceptions.Exit(failure) from None
    except NO_ARGUMENTS:
        raise
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "sandbox"
        complain(f"{error.format_message().rstrip('.')} (see '{where} --help')")
        status = failure if failure == OURS else error.exit_code
        raise click.exceptions.Exit(status) from None
    except (click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if os.environ.get("SANDBOX_DEBUG"):
            raise
        complain(f"internal error: {type(error).__name__}: {error} (SANDBOX_DEBUG=1 shows where)")
        raise click.exceptions.Exit(failure) from None


class Command(click.Command):
    """A command with the global options, whose errors become one line and `failure` as status."""

    failure = FAILURE
    takes_file_names = False
    """File names are bytes; all else travels as JSON, which is text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(context, args)
        for parameter in [] if self.takes_file_names else self.params:
            given = context.params.get(parameter.name or "")
            for text in given if isinstance(given, tuple) else (given,):
                if isinstance(text, str) and not is_text(text):
                    message = f"{shown_bytes(text)} is not UTF-8"
                    raise click.BadParameter(message, context, parameter)
        return rest

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with told(self.failure):
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> Any:
        with told(self.failure):
            return super().invoke(context)


class Group(click.Group):
    """Commands by name; a lazy one is imported when it is called (or listed by --help)."""

    command_class = Command

    def __init__(self, *args: Any, lazy: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy or {}
        self.params.extend(global_options())

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with told(FAILURE):
            return super().make_context(*args, **kwargs)

    def invoke(self, context: click.Context) -> Any:
        with told(FAILURE):
            return super().invoke(context)

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*self._lazy, *super().list_commands(context)})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self._lazy:
            return super().get_command(context, name)
        module, _, attribute = self._lazy[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(
    "sandbox",
    cls=Group,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "--version", message="sandbox %(version)s")
def root() -> None:
    """Run AWS Fargate tasks on this machine."""


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def invoke(arguments: Sequence[str] | None) -> int:
    """Run a command line; returns the exit status."""
    try:
        status = root.main(
            arguments,
            prog_name="sandbox",
            standalone_mode=False,
            complete_var="_SANDBOX_COMPLETE",
        )
    except NO_ARGUMENTS as error:
        error.show()
        return int(error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    return status if isinstance(status, int) else 0
