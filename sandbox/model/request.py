"""What a client hands over when it wants a task: the request, and its own descriptors.

They live in the model because both ends know them: `control` acts on them, while the command line
and the Python client, which import nothing of the agent, make them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sandbox.model.task import TaskDefinition


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """`definition` is checked as RegisterTaskDefinition and RunTask would check it."""

    definition: TaskDefinition
    cluster: str = "default"
    group: str = "sandbox:run"
    started_by: str | None = None
    platform_version: str = "LATEST"
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    remove: bool = False


class Streams(msgspec.Struct, frozen=True, kw_only=True):
    """A client's own descriptors for one container: the keeper copies to and from them.

    They are closed when the container has started or the task has ended, whatever happens first.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    terminal_rows: int = 24
    terminal_cols: int = 80
