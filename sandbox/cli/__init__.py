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
    open_closed_streams()  # before anything can open a descriptor
    try:
        from sandbox.cli.output import Stdout
        from sandbox.cli.root import invoke

        sys.stdout = Stdout.text(sys.stdout)
        status = invoke(arguments)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def open_closed_streams() -> None:
    """Whoever closed our stdin, stdout or stderr gets nothing there, in and out.

    Were they left closed, what we open next would take their number, and be taken for them.
    """
    names = ("stdin", "stdout", "stderr")
    for number, name in enumerate(names):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(number, True)
            mode = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
