"""Reach the agent of a place, or start one that leaves when it is no longer needed.

An ephemeral agent is a process of its own, in a session of its own: Ctrl-C reaches the command and
not the agent, and a killed command is to the agent a lost client, whose task it stops before it
leaves. It says over a pipe when it serves, or in one line why it cannot.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack

from sandbox.client.link import Link, reach
from sandbox.client.place import STATE_DIR, Place, check_directory
from sandbox.errors import AgentUnavailable, ConfigError

READY = b"ready\n"
READY_FD = 3
PATIENCE_S = 10.0
"""An agent that was just started may be stopped or killed before it was reached."""


def connect(place: Place, *, start: bool = True, create: bool = False) -> tuple[Link, bool]:
    """A link to the place's agent, and whether that agent is resident.

    With `start` an ephemeral one is started when there is none. What was started is tried, however
    late it is; who leaves just then makes us start another. Only with `create` it may make the
    state directory: a mistyped one holds nothing that could be read.
    """
    deadline = time.monotonic() + PATIENCE_S
    with ExitStack() as started:
        while True:
            try:
                link, agent = reach(place.socket)
                break
            except AgentUnavailable:
                if not start or time.monotonic() > deadline:
                    raise
                if not create and not is_kept(place):
                    raise ConfigError(
                        f"{place.state_dir}: no agent has kept its state there, nothing was run"
                    ) from None
                started.callback(os.close, start_agent(place))
    try:
        check_directory(place.socket, agent.state_dir, place.state_dir)
    except ConfigError:
        link.close()
        raise
    return link, agent.resident


def is_kept(place: Place) -> bool:
    """An agent has been there before."""
    return os.path.lexists(os.path.join(place.state_dir, "lock"))


def is_untouched(place: Place) -> bool:
    """Nothing was ever run on this host, and nobody named another place: a list is empty."""
    return place.state_dir == STATE_DIR and not is_kept(place)


def start_agent(place: Place) -> int:
    """Start an ephemeral agent and wait until one serves; ConfigError with its own words if not.

    It stays at least until the descriptor is closed.
    """
    if os.geteuid() != 0:
        raise ConfigError("only root may run tasks or talk to the agent: try sudo")
    ready, write = os.pipe()
    try:
        child = os.posix_spawn(
            sys.executable,
            # -P: the working directory may be anybody's, and must not provide modules to root.
            [
                *(sys.executable, "-P", "-m", "sandbox.cli", "agent", "--ephemeral"),
                *("--state-dir", place.state_dir, "--run-dir", place.run_dir),
            ],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, write, READY_FD),
                *((os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (0, 1, 2)),
            ],
            setsid=True,
        )
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(write)
    said = os.read(ready, 4096)
    if said == READY:
        return ready
    os.close(ready)
    os.waitpid(child, 0)
    text = said.decode(errors="replace").strip()
    raise ConfigError(text or "the agent did not start: `sandbox agent` shows why")
