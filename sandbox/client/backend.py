"""What the Python API stands on: the verbs of control, here or at the other end of a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal, Protocol

from sandbox.model.image import Image, ImageSummary
from sandbox.model.observed import Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import TaskView

Progress = Callable[[str, int, int | None], None]
"""Told what is pulled, how many bytes are there, and of how many if that is known."""


class Backend(Protocol):
    """`client.embedded` and `client.remote` are the two; control's docstrings say what is meant.

    Descriptors in `streams` and `archive` belong to the call: it closes them, whatever happens.
    """

    async def run(
        self,
        request: RunRequest,
        *,
        owned: bool,
        streams: Mapping[str, Streams],
        progress: Progress | None,
    ) -> TaskView: ...

    async def stop(self, task: str, *, reason: str | None = None) -> TaskView: ...

    async def kill(self, task: str, signal: int, *, container: str | None = None) -> None: ...

    async def describe(self, task: str) -> TaskView: ...

    async def tasks(
        self, *, desired_status: Literal["RUNNING", "STOPPED"] | None = None
    ) -> list[TaskView]: ...

    def watch(self, task: str) -> AsyncIterator[TaskView]: ...

    async def remove(self, task: str) -> None: ...

    async def exec(self, task: str, request: ExecRequest, *, streams: Streams) -> int: ...

    def logs(
        self,
        task: str,
        *,
        container: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        follow: bool = False,
    ) -> AsyncIterator[LogRecord]: ...

    async def stats(self, task: str) -> TaskStats: ...

    def events(self, *, after: int | None = None, follow: bool = False) -> AsyncIterator[Event]: ...

    async def put(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None: ...

    async def get(
        self, task: str, path: str, archive: int, *, container: str | None = None
    ) -> None: ...

    async def pull(
        self,
        reference: str,
        *,
        pull: Literal["missing", "always", "never"],
        platform: str | None,
        progress: Progress | None,
    ) -> Image: ...

    async def images(self) -> list[ImageSummary]: ...

    async def remove_image(self, image: str) -> None: ...
