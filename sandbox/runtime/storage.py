"""The ephemeral storage of a task: its writable layers and its volumes, and how much fits in.

    <task directory>/storage.ext4      a file system of the task's own; in it
                     volumes.ext4      the same for the volumes, where they have one (2017)
        <container>/upper, work*       a writable layer
        volumes/<name>                 a volume
        .images                        takes nothing, but counts: Fargate's images do

The file is the intent: whatever is in it goes with it, so undoing needs no look inside. Its device
lives as long as a container of the task or this agent has it open; an agent that finds a task takes
it up again. On a host without loop devices all of this is in the task's directory and has no bound,
which `sandbox doctor` tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from sandbox.errors import KernelError, SandboxError, TaskFailed
from sandbox.images.documents import Image
from sandbox.images.image_store import ImageStore
from sandbox.kernel import filesystems, mounts, native
from sandbox.kernel.filesystems import Filesystem, Usage
from sandbox.kernel.trees import remove_tree
from sandbox.model import names
from sandbox.model.task import TaskDesired
from sandbox.runtime.container import WRITTEN
from sandbox.runtime.node import Node

_GIB: Final = 1 << 30
_IMAGES: Final = ".images"


@dataclass(frozen=True, slots=True)
class Room:
    """One bounded place; without a file system it is the task's directory and has no bound."""

    file: Path
    path: Path
    filesystem: Filesystem | None

    def mount_of(self, directory: str) -> int:
        """A detached mount of a directory in it."""
        if self.filesystem is not None:
            return mounts.part(self.filesystem.mount_fd, directory, self.filesystem.again)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
        fd = native.openat2(native.AT_FDCWD, str(self.path / directory), flags)
        try:
            return mounts.clone(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Storage:
    """Held by the agent for as long as it attends to the task; `close` leaves everything there."""

    layers: Room
    volumes: Room
    """The same room, unless the volumes have their own."""

    @property
    def rooms(self) -> tuple[Room, ...]:
        return tuple({id(room): room for room in (self.layers, self.volumes)}.values())

    def directory(self, container: str) -> Path:
        """Of its writable layer."""
        return self.layers.path / names.container_directory(container)

    @property
    def again(self) -> Callable[[], int] | None:
        """See `mounts.overlay`."""
        return None if self.layers.filesystem is None else self.layers.filesystem.again

    def volume(self, name: str) -> Path:
        return self.volumes.path / "volumes" / name

    def mount_volume(self, name: str) -> int:
        return self.volumes.mount_of(f"volumes/{name}")

    def close(self) -> None:
        for room in self.rooms:
            if room.filesystem is not None:
                room.filesystem.close()


def usage(storage: Storage) -> Usage | None:
    """Of all of it; None where there is no bound."""
    found = [room.filesystem.usage() for room in storage.rooms if room.filesystem is not None]
    if not found:
        return None
    return Usage(sum(each.size_bytes for each in found), sum(each.used_bytes for each in found))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a task takes of the host's disk: now, and when all that it wrote has got there."""

    allocated_bytes: int
    outstanding_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.allocated_bytes + self.outstanding_bytes


def footprint(storage: Storage) -> Footprint:
    each = [_footprint(room.filesystem) for room in storage.rooms if room.filesystem is not None]
    return Footprint(
        sum(one.allocated_bytes for one in each), sum(one.outstanding_bytes for one in each)
    )


def _footprint(filesystem: Filesystem) -> Footprint:
    written = filesystem.usage().used_bytes - filesystem.reserved_bytes(_IMAGES)
    allocated = filesystem.allocated_bytes()
    return Footprint(allocated, max(0, written - allocated))


async def attach(node: Node, task: TaskDesired) -> Storage:
    """What the task has already, or else an empty one."""
    layers = await _room(node, task, "storage.ext4", task.storage.size_gib)
    if task.storage.volumes_gib is None or layers.filesystem is None:
        return Storage(layers, layers)
    try:
        volumes = await _room(node, task, "volumes.ext4", task.storage.volumes_gib)
    except BaseException:
        layers.filesystem.close()
        raise
    return Storage(layers, volumes)


async def _room(node: Node, task: TaskDesired, name: str, size_gib: int) -> Room:
    directory = node.task_dir(task.id)
    if node.filesystems is None:
        return Room(directory, directory, None)
    file = directory / name
    if file.exists():
        found = await trio.to_thread.run_sync(filesystems.reopen, file)
    else:
        found = await node.filesystems.take(file, size_gib * _GIB)
    return Room(file, found.path, found)


def furnish(storage: Storage, task: TaskDesired) -> None:
    """Make the task's volumes, which belong to its root."""
    volumes = storage.volumes.path / "volumes"
    try:
        if task.definition.volumes:
            volumes.mkdir(mode=0o700, exist_ok=True)
        for volume in task.definition.volumes:
            path = volumes / volume.name
            path.mkdir(exist_ok=True)
            os.chmod(path, 0o755)  # whatever our umask
            os.chown(path, task.id_base, task.id_base)
    except OSError as error:
        raise KernelError("mkdir", str(volumes), error.errno or 0) from None


def count_images(storage: Storage, store: ImageStore, images: Collection[Image]) -> None:
    """Let the task's images take their part; TaskFailed when there is not enough for them.

    Up to platform 1.3.0 they also count as they were transferred.
    """
    room = storage.layers.filesystem
    if room is None:
        return
    size_bytes = store.unpacked_bytes(images)
    if storage.volumes is not storage.layers:
        size_bytes += sum({image.digest: image.size_bytes for image in images}.values())
    if not size_bytes:
        return
    try:
        room.reserve(_IMAGES, size_bytes)
    except KernelError as error:
        limit = room.usage().size_bytes
        raise TaskFailed(
            f"CannotPullContainerError: the images have {size_bytes} bytes, the task's ephemeral "
            f"storage {limit}: {os.strerror(error.errno).lower()}"
        ) from None


async def release(node: Node, task: TaskDesired, storage: Storage | None) -> None:
    """Let it go with all that is in it. Nobody may use it any more; may run twice."""
    if node.filesystems is None:
        return await _empty(node, task, node.task_dir(task.id))
    for room in storage.rooms if storage else ():
        if room.filesystem is not None:
            is_empty = False
            with suppress(SandboxError, OSError):  # else it goes as it is
                if room.filesystem.is_small():
                    await _clear(node, task, room)
                    is_empty = True
            node.filesystems.give_back(room.file, room.filesystem, is_empty=is_empty)
    for name in ("storage.ext4", "volumes.ext4"):
        _unlink(node.task_dir(task.id) / name)


async def _clear(node: Node, task: TaskDesired, room: Room) -> None:
    """Delete all that the task has there."""
    await _empty(node, task, room.path)
    with suppress(FileNotFoundError):
        os.unlink(room.path / _IMAGES)
    for directory in _containers(task, room.path):
        with suppress(FileNotFoundError):
            os.rmdir(directory)


async def _empty(node: Node, task: TaskDesired, top: Path) -> None:
    if task.definition.volumes:
        await trio.to_thread.run_sync(remove_tree, top / "volumes")
    for directory in _containers(task, top):
        await node.roots.discard(directory, WRITTEN)


def _containers(task: TaskDesired, top: Path) -> Iterator[Path]:
    for container in task.definition.container_definitions:
        yield top / names.container_directory(container.name)


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise KernelError("unlink", str(file), error.errno or 0) from None
