"""What a client hands over when it wants a task: the request, and its own descriptors.

They live in the model because both ends know them: `control` acts on them, while the command line
and the Python client, which import nothing of the agent, make them.
"""

from __future__ import annotations

from typing import Literal

from sandbox.model.task import Record, TaskDefinition


class RunRequest(Record, frozen=True, kw_only=True):
    """`definition` is checked as RegisterTaskDefinition and RunTask would check it."""

    definition: TaskDefinition
    cluster: str = "default"
    group: str = "sandbox:run"
    started_by: str | None = None
    platform_version: str = "LATEST"
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    remove: bool = False


class Streams(Record, frozen=True, kw_only=True):
    """A client's own descriptors for one container: the keeper copies to and from them.

    They belong to the call that takes them, whether it refuses or not. They are closed when the
    container has started or the task has ended, whatever happens first. On the control socket the
    three are indexes into the descriptors that travel with the call.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    terminal_rows: int = 24
    terminal_cols: int = 80
