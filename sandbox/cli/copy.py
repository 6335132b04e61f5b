"""`sandbox cp`: files into a task and out of it, as a tar stream through a pipe."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryFile

import click

from sandbox.cli.connection import connect
from sandbox.cli.output import complain
from sandbox.cli.root import Command, place
from sandbox.client.archive import pack, unpack
from sandbox.client.link import Link
from sandbox.errors import ConfigError, InvalidParameterException
from sandbox.varlink import calls


class CopyCommand(Command):
    takes_file_names = True


@click.command("cp", cls=CopyCommand)
@click.option("-c", "--container", metavar="NAME", help="Which container [the first].")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.pass_context
def cp(context: click.Context, /, container: str | None, source: str, destination: str) -> None:
    """Copy a file or a tree; one of SRC and DST is TASK:PATH.

    DST names the copy; if it is a directory or ends with a slash, the copy is made inside.
    """
    from_task, to_task = task_path(source), task_path(destination)
    if (from_task is None) == (to_task is None):
        raise InvalidParameterException(
            "one of SRC and DST must be TASK:PATH, the other a path here"
        )
    link, _ = connect(place(context))
    with link:
        if to_task is not None:
            put(link, source, *to_task, container)
        elif from_task is not None:
            get(link, *from_task, destination, container)


def task_path(text: str) -> tuple[str, str] | None:
    """TASK and PATH of TASK:PATH; None for a path of this host (./a:b is one)."""
    task, colon, path = text.partition(":")
    if not colon or "/" in task or not task:
        return None
    if not path.startswith("/"):
        raise InvalidParameterException(f"{text}: the path in a task must be absolute")
    return task, path


def put(link: Link, source: str, task: str, path: str, container: str | None) -> None:
    if not os.path.lexists(source):
        raise ConfigError(f"{source}: {os.strerror(2)}")
    name = os.path.basename(os.path.abspath(source))
    if not path.endswith("/") and not is_directory(link, task, path, container):
        path, name = os.path.split(path)
    read, write = os.pipe()
    failed: list[Exception] = []

    def send() -> None:
        try:
            with os.fdopen(write, "wb") as out:
                pack(source, name, out)
        except BrokenPipeError:
            pass  # the agent gave up, and its answer says why
        except (OSError, tarfile.TarError) as error:
            failed.append(error)

    call = calls.PutArchive(task=task, path=path or "/", archive=0, container=container)
    _transfer(link, call, read, send)
    for error in failed:
        raise ConfigError(f"{source}: {error}")


def is_directory(link: Link, task: str, path: str, container: str | None) -> bool:
    """Whether nothing at all can be copied into it."""
    with TemporaryFile() as nothing:
        call = calls.PutArchive(task=task, path=f"{path}/.", archive=0, container=container)
        try:
            with tarfile.open(fileobj=nothing, mode="w"):
                pass
            nothing.seek(0)
            link.call(call, [nothing.fileno()])
        except InvalidParameterException:
            return False
    return True


def get(link: Link, task: str, path: str, destination: str, container: str | None) -> None:
    read, write = os.pipe()
    skipped: list[int] = []
    failed: list[Exception] = []

    def receive() -> None:
        try:
            with os.fdopen(read, "rb") as stream:
                skipped.append(unpack(stream, destination))
        except Exception as error:  # raised below, in the thread that may tell the user
            failed.append(error)

    call = calls.GetArchive(task=task, path=path, archive=0, container=container)
    _transfer(link, call, write, receive)
    for error in failed:
        raise error
    if skipped != [0]:
        complain(f"{sum(skipped)} devices, sockets or fifos were not copied")


def _transfer(
    link: Link,
    call: calls.PutArchive | calls.GetArchive,
    theirs: int,
    ours: Callable[[], None],
) -> None:
    """Our end of the pipe is worked in a thread, while the agent works theirs."""
    worker = threading.Thread(target=ours, daemon=True)
    worker.start()
    try:
        link.send(call, [theirs])
    finally:
        os.close(theirs)  # the agent has its own; the end of the stream must be seen
    with suppress(KeyboardInterrupt):
        link.receive(call)
        worker.join()
        return
    raise SystemExit(130)
