"""The command line: a thin, blocking client of the control socket.

It has one code path. If no agent lives for the state directory, `connection` starts one in a
process of its own that leaves with its last client; the command goes on as if it had always lived.
Nothing heavy is imported before it is needed: a command costs click, msgspec and a socket.

Exit status: what the container's program gave (`run`, `exec`), 0 for success, 2 for wrong usage, 1
for a failure; `run` and `exec` keep 1 and 2 for the program and use 125 for all that is ours.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The `sandbox` command. Leaves by SystemExit."""
    from sandbox.cli.root import invoke

    try:
        status = invoke(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away (`sandbox ps | head`): that is no error to talk about,
        # and the interpreter shall not find anything left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 128 + signal.SIGPIPE
    sys.exit(status)
