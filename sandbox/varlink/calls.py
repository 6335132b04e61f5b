"""The methods of `io.sandbox`: one class each, its members the parameters.

A class names its reply as the argument of `Call`, so `link.call(StopTask(task="x"))` is known to
give a `TaskReply`, and no method is written down twice: the agent decodes into these classes, the
clients encode from them. `api/io.sandbox.varlink` is the same list for people and for varlinkctl; a
test holds the two together.

Descriptors are given as indexes into those that travel with the call. A method is a `Stream` when
it may answer more than once; then it must be called with `more`.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec

from sandbox.model.image import Image, ImageSummary, Pruned
from sandbox.model.observed import Event, ExecRequest, LogRecord, TaskStats
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import Record, TaskView
from sandbox.varlink.faults import INTERFACE

R = TypeVar("R", bound=Record)


class Call(Record, Generic[R], frozen=True, kw_only=True):
    """The parameters of a method that answers once, with an `R`."""


class Stream(Call[R], Generic[R], frozen=True, kw_only=True):
    """The parameters of a method that answers with any number of `R`."""


# Replies -------------------------------------------------------------------------------------


class Nothing(Record, frozen=True, kw_only=True):
    pass


class AgentReply(Record, frozen=True, kw_only=True):
    version: str
    instance: str
    """The instance id in the names of this agent's kernel objects."""
    state_dir: str
    resident: bool
    """False: it leaves when its clients are done, so it takes no detached task."""


class TaskReply(Record, frozen=True, kw_only=True):
    task: TaskView


class TasksReply(Record, frozen=True, kw_only=True):
    tasks: tuple[TaskView, ...] = ()


class Progress(Record, frozen=True, kw_only=True):
    """Bytes of a pull."""

    what: str
    done: int
    total: int | None = None


class RunReply(Record, frozen=True, kw_only=True):
    """The task as it is now, or how far its pull is."""

    task: TaskView | None = None
    progress: Progress | None = None


class ExecReply(Record, frozen=True, kw_only=True):
    """First the exec's id, at the end the exit code."""

    exec_id: str | None = None
    exit_code: int | None = None


class LogsReply(Record, frozen=True, kw_only=True):
    records: tuple[LogRecord, ...] = ()


class StatsReply(Record, frozen=True, kw_only=True):
    stats: TaskStats


class EventsReply(Record, frozen=True, kw_only=True):
    events: tuple[Event, ...] = ()


class PullReply(Record, frozen=True, kw_only=True):
    """How far it is, at the end the image."""

    progress: Progress | None = None
    image: Image | None = None


class ImageReply(Record, frozen=True, kw_only=True):
    image: Image


class ImagesReply(Record, frozen=True, kw_only=True):
    images: tuple[ImageSummary, ...] = ()


class PrunedReply(Record, frozen=True, kw_only=True):
    pruned: Pruned


# Methods -------------------------------------------------------------------------------------


class GetAgent(Call[AgentReply], frozen=True, kw_only=True):
    """Who answers here."""


class RunTask(Stream[RunReply], frozen=True, kw_only=True):
    """Run a task and follow it to its end.

    With `owned` the task is stopped when this connection is lost; without, only the following ends.
    """

    request: RunRequest
    owned: bool = False
    streams: dict[str, Streams] = msgspec.field(default_factory=dict)


class WatchTask(Stream[TaskReply], frozen=True, kw_only=True):
    """The task now and after each change, until it is STOPPED. `owned` is as in RunTask."""

    task: str
    owned: bool = False


class StopTask(Call[TaskReply], frozen=True, kw_only=True):
    task: str
    reason: str | None = None


class KillTask(Call[Nothing], frozen=True, kw_only=True):
    task: str
    signal: int
    container: str | None = None


class DescribeTask(Call[TaskReply], frozen=True, kw_only=True):
    task: str


class ListTasks(Stream[TasksReply], frozen=True, kw_only=True):
    desired_status: Literal["RUNNING", "STOPPED"] | None = None


class RemoveTask(Call[Nothing], frozen=True, kw_only=True):
    task: str


class ExecTask(Stream[ExecReply], frozen=True, kw_only=True):
    """The command is killed when this connection is lost."""

    task: str
    request: ExecRequest
    streams: Streams = Streams()


class ResizeTerminal(Call[Nothing], frozen=True, kw_only=True):
    task: str
    rows: int
    cols: int
    container: str | None = None
    exec_id: str | None = None


class ReadLogs(Stream[LogsReply], frozen=True, kw_only=True):
    task: str
    container: str | None = None
    since: float | None = None
    tail: int | None = None
    follow: bool = False


class GetStats(Call[StatsReply], frozen=True, kw_only=True):
    task: str


class ReadEvents(Stream[EventsReply], frozen=True, kw_only=True):
    after: int | None = None
    follow: bool = False


class PutArchive(Call[Nothing], frozen=True, kw_only=True):
    """`archive` is the index of a descriptor from which a tar stream can be read."""

    task: str
    path: str
    archive: int
    container: str | None = None


class GetArchive(Call[Nothing], frozen=True, kw_only=True):
    """`archive` is the index of a descriptor to which the tar stream is written."""

    task: str
    path: str
    archive: int
    container: str | None = None


class PullImage(Stream[PullReply], frozen=True, kw_only=True):
    """`pull` as for a task: missing, always (ask the registry what the name stands for), never."""

    reference: str
    pull: Literal["missing", "always", "never"] = "always"
    platform: str | None = None


class ListImages(Stream[ImagesReply], frozen=True, kw_only=True):
    pass


class InspectImage(Call[ImageReply], frozen=True, kw_only=True):
    image: str


class RemoveImage(Call[Nothing], frozen=True, kw_only=True):
    image: str


class ImportImage(Stream[PullReply], frozen=True, kw_only=True):
    """Make an image of a root file system: an absolute path of a directory or a tar."""

    source: str
    tag: str
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    user: str = ""
    working_dir: str = ""
    stop_signal: str = ""
    platform: str | None = None


class PruneImages(Call[PrunedReply], frozen=True, kw_only=True):
    """Remove images without a name, with `unused` all that no task uses."""

    unused: bool = False


def name(kind: type[Call[Any]]) -> str:
    """The method's full name."""
    return f"{INTERFACE}.{kind.__name__}"


def reply_type(call: Call[R]) -> type[R]:
    """The `R` that the call's class names."""
    (reply,) = get_args(type(call).__orig_bases__[0])  # type: ignore[attr-defined]
    return reply  # type: ignore[no-any-return]
