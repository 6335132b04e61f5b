"""Where an agent lives: its state directory, its run directory and the control socket in that.

An agent of its own state directory is its own instance, so that several live on one host. Its run
directory is then below the state directory unless it is named: two agents must not meet at the
default one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Self

from sandbox.errors import ConfigError

STATE_DIR = "/var/lib/sandbox"
RUN_DIR = "/run/sandbox"
SOCKET_NAME = "agent.sock"

PathName = str | os.PathLike[str]


class Place(NamedTuple):
    """Absolute paths, links not followed."""

    state_dir: str
    run_dir: str

    @classmethod
    def of(
        cls,
        state_dir: PathName | None = None,
        run_dir: PathName | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Self:
        """What is given, else SANDBOX_STATE_DIR and SANDBOX_RUN_DIR, else the defaults."""
        state = os.path.abspath(state_dir or environ.get("SANDBOX_STATE_DIR") or STATE_DIR)
        run = run_dir or environ.get("SANDBOX_RUN_DIR")
        if not run:
            run = RUN_DIR if state == STATE_DIR else os.path.join(state, "run")
        run = os.path.abspath(run)
        for name, path in (("state", state), ("run", run)):
            if not is_text(path):
                raise ConfigError(f"{name} directory {shown_bytes(path)}: its name is not UTF-8")
        return cls(state, run)

    @property
    def socket(self) -> str:
        return os.path.join(self.run_dir, SOCKET_NAME)


def is_text(text: str) -> bool:
    """False for what stands for bytes that are not UTF-8, as Python has them in file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_bytes(text: str) -> str:
    """Such a text for people: 'a\\xff'."""
    return repr(os.fsencode(text))[1:]


def check_directory(socket: str, actual: str, wanted: str) -> None:
    """ConfigError when the agent that answers is one of another state directory."""
    try:
        same = os.path.samefile(actual, wanted)
    except OSError:
        same = actual == wanted
    if not same:
        raise ConfigError(
            f"the agent at {socket} keeps its state in {actual}, not in {wanted}: "
            "name its run directory"
        )


def anchored(image: str) -> str:
    """An image name as the agent, whose working directory is another, must see it."""
    for scheme in ("oci:", "docker-archive:"):
        if image.startswith(scheme):
            return scheme + os.path.abspath(image.removeprefix(scheme))
    return image
