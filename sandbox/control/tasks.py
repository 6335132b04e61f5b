"""What can be wanted of tasks: run, stop, describe, remove.

Every face (the control socket, the Python API, later AWS's wire) calls these functions and nothing
else. They validate, write desire to the store and answer from the store; the runtime makes it true.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal

from sandbox.model.observed import Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest as RunRequest
from sandbox.model.request import Streams as Streams
from sandbox.model.task import TaskView


class Tasks:
    """Built by `sandbox.agent`; holds no state but the store's."""

    async def run(
        self,
        request: RunRequest,
        *,
        owner: str | None = None,
        streams: dict[str, Streams] | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> TaskView:
        """Accept a task; returns once its desire is durable, before anything was started.

        `streams` is keyed by container name. `progress(what, done, total)` is called while the
        images are pulled, in bytes. Raises ClientException, InvalidParameterException, ApiError.
        """
        raise NotImplementedError

    async def stop(self, task: str, *, reason: str | None = None) -> TaskView:
        """Want the task stopped; returns at once. Stopping a stopped task changes nothing."""
        raise NotImplementedError

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None:
        """Send a signal to a container's first process (the only, or first essential, container)."""
        raise NotImplementedError

    def find(self, task: str) -> str:
        """The id for an id, a unique prefix of one, a name or an ARN; NotFound otherwise."""
        raise NotImplementedError

    def describe(self, task: str) -> TaskView:
        raise NotImplementedError

    def list(self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None) -> list[TaskView]:
        """By creation, oldest first."""
        raise NotImplementedError

    def watch(self, task: str) -> AsyncIterator[TaskView]:
        """The task now, and again at each change; ends after STOPPED was yielded."""
        raise NotImplementedError

    async def remove(self, task: str) -> None:
        """Forget a stopped task, its log too; InvalidParameterException while it is not stopped."""
        raise NotImplementedError

    async def exec(
        self,
        task: str,
        request: ExecRequest,
        *,
        streams: Streams,
        started: Callable[[str], None] | None = None,
    ) -> int:
        """Run a command in a running container; returns its exit code (128+n for a signal).

        `started` is told the exec's id, which `resize` takes. Cancelling kills the command.
        Raises TaskFailed with a text as a shell's when it cannot be started (exit 126 or 127 are
        `error.exit_code`), InvalidParameterException when the container is not running.
        """
        raise NotImplementedError

    async def resize(
        self, task: str, rows: int, cols: int, *, container: str | None = None, exec_id: str | None = None
    ) -> None:
        """Tell a terminal its new size."""
        raise NotImplementedError

    def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]:
        """In order of time; `tail` counts records. With `follow` it ends when the task is STOPPED."""
        raise NotImplementedError

    async def stats(self, task: str) -> TaskStats:
        raise NotImplementedError

    def events(self, *, after: int | None = None, follow: bool = False) -> AsyncIterator[Event]:
        """Events of all tasks, oldest first; `after` is a revision, None is from the beginning."""
        raise NotImplementedError

    async def put(self, task: str, path: str, archive: int, *, container: str | None = None) -> None:
        """Unpack the tar stream readable at descriptor `archive` into directory `path`."""
        raise NotImplementedError

    async def get(self, task: str, path: str, archive: int, *, container: str | None = None) -> None:
        """Write `path` as a tar stream to descriptor `archive`; names start with its last component."""
        raise NotImplementedError
