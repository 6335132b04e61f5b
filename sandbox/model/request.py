"""What a client hands over when it wants a task: the request, and its own descriptors.

They live in the model because both ends know them: `control` acts on them, while the command line
and the Python client, which import nothing of the agent, make them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

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
    numbers are indexes into the descriptors that travel with the call.

    `files` is a tar stream that is unpacked before the container starts, relative names below its
    working directory.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    files: int | None = None
    terminal_rows: int = 24
    terminal_cols: int = 80

    @property
    def descriptors(self) -> tuple[int, ...]:
        given = (self.stdin, self.stdout, self.stderr, self.files)
        return tuple(fd for fd in given if fd is not None)

    def moved(self, to: Callable[[int], int]) -> Streams:
        """The same with `to` of every descriptor in its place."""

        def move(fd: int | None) -> int | None:
            return None if fd is None else to(fd)

        return msgspec.structs.replace(
            self,
            stdin=move(self.stdin),
            stdout=move(self.stdout),
            stderr=move(self.stderr),
            files=move(self.files),
        )
