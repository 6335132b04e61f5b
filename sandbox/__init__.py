"""Runs AWS Fargate tasks on a plain Linux machine.

`open_sandbox` and `connect` give a `Sandbox`; `sandbox.sync` has the same verbs without async.
The names are loaded when they are first asked for: the command line imports this package too, and
must not pay for trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sandbox.client.api import Completed, Sandbox, Task, connect, open_sandbox
    from sandbox.errors import SandboxError

__all__ = ["Completed", "Sandbox", "SandboxError", "Task", "connect", "open_sandbox"]

_HOMES = {"SandboxError": "sandbox.errors"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "sandbox.client.api")), name)
