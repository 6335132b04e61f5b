"""`sandbox agent`: the daemon, in the foreground; and the ephemeral one that a command starts.

SIGTERM and SIGINT leave tasks running, SIGHUP reads the configuration again. Under systemd the unit
is of type notify. The ephemeral form has no terminal and no log of its own: it says on a pipe that
it serves, or why not, and leaves when nobody needs it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import tomllib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.connection import READY, READY_FD
from sandbox.cli.root import Command, place
from sandbox.client.place import Place
from sandbox.errors import AgentRunning, AgentUnavailable, ConfigError, SandboxError

if TYPE_CHECKING:
    from sandbox.agent import Agent
    from sandbox.client.link import Link

CONFIG = "/etc/sandbox/agent.toml"

LINGER_S = 0.2
"""How long it stays when its last client has gone: a script calls us again at once."""

TAKEOVER_S = 10.0
"""How long an agent waits for one that is just leaving the same state directory."""


@click.command("agent", cls=Command)
@click.option("--config", metavar="FILE", help=f"Its configuration [{CONFIG}, if it is there].")
@click.option("--ephemeral", is_flag=True, hidden=True)
@click.pass_context
def agent(context: click.Context, /, config: str | None, ephemeral: bool) -> None:
    """Keep tasks: the daemon, in the foreground."""
    where = place(context)
    if ephemeral:
        context.exit(_run_ephemeral(where, configuration(config)))
    if os.geteuid() != 0:
        raise ConfigError("the agent must be root: try sudo")

    _log_json()
    _protect()
    _run(_serve, where, lambda: configuration(config))


def configuration(path: str | None) -> dict[str, Any]:
    """The file's settings; a missing default file has none."""
    try:
        with open(path or CONFIG, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        if path is None:
            return {}
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # not TOML, or not even UTF-8
        raise ConfigError(f"{path or CONFIG}: {error}") from None


async def _serve(where: Place, read_configuration: Callable[[], dict[str, Any]]) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with AsyncExitStack() as stack:
            running = await _open_resident(stack, where, read_configuration())
            notify("READY=1")
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                notify("RELOADING=1")
                _reload(running, read_configuration)
                notify("READY=1")
            notify("STOPPING=1")


def _reload(running: Agent, read_configuration: Callable[[], dict[str, Any]]) -> None:
    """A configuration that is broken changes nothing: who sent the signal finds it in the log."""
    import structlog

    log = structlog.get_logger()
    try:
        running.reload(read_configuration())
    except ConfigError as error:
        log.error("the configuration was not read again, the old one holds", error=str(error))
    else:
        log.info("the configuration was read again")


async def _open_resident(stack: AsyncExitStack, where: Place, config: dict[str, Any]) -> Agent:
    """A resident agent, as soon as an ephemeral one that lingers there has left."""
    import trio

    from sandbox.agent import open_agent

    deadline = trio.current_time() + LINGER_S * 10
    while True:
        try:
            return await stack.enter_async_context(
                open_agent(Path(where.state_dir), Path(where.run_dir), config, resident=True)
            )
        except AgentRunning:
            if trio.current_time() > deadline:
                raise
        await trio.sleep(0.05)


def _log_json() -> None:
    """One JSON object a line on stderr, which the service manager or the terminal keeps."""
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _protect() -> None:
    """As well as this host allows; `sandbox doctor` says the same."""
    import structlog

    from sandbox.agent import protect_from_oom

    if why := protect_from_oom():
        structlog.get_logger().warning("the kernel may end the agent for want of memory", why=why)


def notify(state: str) -> None:
    """Tell the service manager, if one asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            manager.sendto(state.encode(), address)
        except OSError as error:
            print(f"sandbox: cannot notify {address!r}: {error}", file=sys.stderr)


def _run(serve: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """trio.run, with an error of ours taken out of the groups that nurseries put around it."""
    import trio

    try:
        trio.run(serve, *arguments)
    except BaseExceptionGroup as group:
        expected, unexpected = group.split(SandboxError)
        if expected is None or unexpected is not None:
            raise
        error: BaseException = expected
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _run_ephemeral(where: Place, config: dict[str, Any]) -> int:
    from sandbox.agent import protect_from_oom

    os.chdir("/")
    protect_from_oom()
    try:
        _run(_serve_ephemeral, where, config)
    except SandboxError as error:
        os.write(READY_FD, str(error).encode())
        return 1
    return 0


async def _serve_ephemeral(where: Place, config: dict[str, Any]) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_on, signals, nursery.cancel_scope)
            await _serve_until_idle(where, config)
            nursery.cancel_scope.cancel()


async def _serve_until_idle(where: Place, config: dict[str, Any]) -> None:
    import trio

    from sandbox.agent import open_agent

    deadline = trio.current_time() + TAKEOVER_S
    while _is_wanted():
        try:
            async with open_agent(Path(where.state_dir), Path(where.run_dir), config) as running:
                with running.presence.hold():
                    await _see_reached()
                await running.presence.idle(first_within_s=0, linger_s=LINGER_S)
                return  # no await before the agent is left: it would answer one more client
        except AgentRunning:
            link = _answering(where)
            if link is not None:
                with link:  # as its client we keep it there
                    await _see_reached()
                return
            if trio.current_time() > deadline:
                raise
        await trio.sleep(0.05)


async def _leave_on(signals: Any, leaving: Any) -> None:
    async for _ in signals:
        leaving.cancel()


def _is_wanted() -> bool:
    """The command that started us still waits: it has not closed its end of the pipe."""
    pipe = select.poll()
    pipe.register(READY_FD, 0)
    return not pipe.poll(0)


async def _see_reached() -> None:
    """Tell the command that started us that it is served, and wait until it is, or has ended."""
    import trio

    os.write(READY_FD, READY)
    await trio.lowlevel.wait_readable(READY_FD)  # woken by the error that nobody reads it any more
    os.close(READY_FD)


def _answering(where: Place) -> Link | None:
    """Somebody else's agent serves here: then that one is what the command wanted."""
    from sandbox.client.link import reach

    try:
        return reach(where.socket)[0]
    except AgentUnavailable:
        return None
