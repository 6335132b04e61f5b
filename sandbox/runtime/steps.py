"""What is done for a task before its containers run, and how it is undone.

A step's deed is named by the task's id alone, so its undoing needs no memory: `undo` works after a
`do` that succeeded, failed half-way, or never began, and it may run twice. The task's row in the
store is the intent of them all; nothing is done for a task that has no row, and whatever exists
without a row is swept. Undoing goes on after an error and raises all of them together.

    directory   <state>/tasks/<id>                  undo: nothing, logs stay
    storage     writable layers and volumes         undo: it goes with all that is in it
    cgroup      task-<id>, with the task's limits   undo: everything in it is killed, then it goes
    network     the slot's namespace, an interface  undo: descriptors are dropped
    images      pulled and held                     undo: nothing; prune collects what nobody uses
    pids        pidMode task: the namespace's init  undo: it is killed, and all in the namespace
    roots       a cgroup and a root file system for each container
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import trio

from sandbox.errors import ImageError, KernelError, SandboxError, TaskFailed
from sandbox.images import reference
from sandbox.images.documents import Image
from sandbox.images.failures import pull_failure_text
from sandbox.images.rootfs import Rootfs
from sandbox.kernel import slots
from sandbox.kernel.cgroups import Cgroup
from sandbox.kernel.slots import Slot
from sandbox.model import names
from sandbox.model.task import ContainerDefinition, MountPoint, TaskDesired
from sandbox.network.eni import Interface
from sandbox.runtime import pause
from sandbox.runtime import storage as storages
from sandbox.runtime.container import (
    Identity,
    LimitChoice,
    arguments,
    choose_limits,
)
from sandbox.runtime.keeper import Keeper
from sandbox.runtime.node import Node
from sandbox.runtime.sizes import container_limits, task_limits
from sandbox.runtime.storage import Storage

_KILL_TIMEOUT_S = 30.0
"""A killed process leaves when its last system call lets it; longer is a kernel in trouble."""


@dataclass(kw_only=True)
class ContainerScene:
    """What was made for one container."""

    image: Image
    limits: LimitChoice
    cgroup: Cgroup | None = None
    root: int | None = None
    """A detached mount, until the container has it."""
    layers: tuple[int, ...] = ()
    """What was needed to make it, until the keeper closes it."""
    user: Identity = field(default_factory=Identity)

    def forget(self) -> None:
        for fd in self.take_root():
            os.close(fd)
        if self.cgroup is not None:
            self.cgroup.close()
        self.cgroup = None

    def release_layers(self) -> None:
        for fd in self.layers:
            os.close(fd)
        self.layers = ()

    def take_root(self) -> tuple[int, ...]:
        """The root, if there is one, and its layers; the caller closes them."""
        taken = (self.root, *self.layers) if self.root is not None else ()
        self.root, self.layers = None, ()
        return taken


@dataclass(kw_only=True)
class Scene:
    """What was made for a task, as far as this agent knows: empty after a restart."""

    node: Node
    task: TaskDesired
    storage: Storage | None = None
    slot: Slot | None = None
    interface: Interface | None = None
    pidns: int | None = None
    """The pid namespace that the containers share, with pidMode task."""
    pause: Keeper | None = None
    """Of that namespace's init."""
    containers: dict[str, ContainerScene] = field(default_factory=dict)
    progress: Callable[[str, int, int | None], None] | None = None
    _directories: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def directory(self) -> Path:
        return self.node.task_dir(self.task.id)

    def container_dir(self, name: str) -> Path:
        if (found := self._directories.get(name)) is None:
            found = self._directories[name] = self.node.container_dir(self.task.id, name)
        return found

    def definition(self, name: str) -> ContainerDefinition:
        return next(c for c in self.task.definition.container_definitions if c.name == name)

    def forget(self) -> None:
        """Close what this agent holds of it; what was made stays."""
        if self.slot is not None:
            self.slot.close()
        if self.pause is not None:
            self.pause.close()
        if self.pidns is not None:
            os.close(self.pidns)
        if self.storage is not None:
            self.storage.close()
        self.storage = self.slot = self.pause = self.pidns = None
        for made in self.containers.values():
            made.forget()


@dataclass(frozen=True)
class Step:
    name: str
    do: Callable[[Scene], Awaitable[None]]
    undo: Callable[[Scene], Awaitable[None]]


async def perform(scene: Scene, steps: tuple[Step, ...]) -> None:
    for step in steps:
        scene.node.failpoints.reach(f"{step.name}.do")
        await step.do(scene)
        scene.node.failpoints.reach(f"{step.name}.done")


async def undo(scene: Scene, steps: tuple[Step, ...]) -> None:
    """In reverse; all of them, whatever fails. Shielded: half an undoing helps nobody."""
    errors: list[Exception] = []
    with trio.CancelScope(shield=True):
        for step in reversed(steps):
            scene.node.failpoints.reach(f"{step.name}.undo")
            try:
                await step.undo(scene)
            except (SandboxError, OSError) as error:
                errors.append(error)
            scene.node.failpoints.reach(f"{step.name}.undone")
    if errors:
        raise ExceptionGroup(f"task {scene.task.id} could not be undone in full", errors)


async def _nothing(scene: Scene) -> None:
    """Logs stay until the task is removed, images until nobody uses them."""


# directory ---------------------------------------------------------------------------------


async def _make_directory(scene: Scene) -> None:
    directory = scene.directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for container in scene.task.definition.container_definitions:
            scene.container_dir(container.name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise KernelError("mkdir", str(directory), error.errno or 0) from None


# storage -----------------------------------------------------------------------------------


async def _attach_storage(scene: Scene) -> None:
    if scene.storage is None:
        scene.storage = await storages.attach(scene.node, scene.task)
    storages.furnish(scene.storage, scene.task)


async def _release_storage(scene: Scene) -> None:
    storage, scene.storage = scene.storage, None
    await storages.release(scene.node, scene.task, storage)


# cgroup ------------------------------------------------------------------------------------


async def _make_cgroup(scene: Scene) -> None:
    name = names.task_cgroup(scene.task.id)
    scene.node.tree.create(name, task_limits(scene.task.definition)).close()


async def _remove_cgroup(scene: Scene) -> None:
    containers = [c.name for c in scene.task.definition.container_definitions]
    await _remove(scene.node.tree.find(names.task_cgroup(scene.task.id)), containers)


async def _remove(cgroup: Cgroup | None, containers: Sequence[str] = ()) -> None:
    if cgroup is None:
        return
    with contextlib.closing(cgroup):
        if not cgroup.populated():
            return cgroup.remove_empty(containers)
        cgroup.kill()
        await cgroup.wait_empty(_KILL_TIMEOUT_S)
        cgroup.remove(containers)


# network -----------------------------------------------------------------------------------


async def _attach_network(scene: Scene) -> None:
    scene.slot = scene.slot or await _slot_again(scene)
    scene.interface = await scene.node.interfaces.attach(scene.task.id, scene.slot.netns_fd)


async def _slot_again(scene: Scene) -> Slot:
    """For a restart in place, when no container was left that an agent could find running.

    With pidMode task the pause has held the task's namespaces. Otherwise they went with the last
    container, and others with the same ids take their place.
    """
    node, task = scene.node, scene.task
    keeper = await pause.find(node, task.id) if task.definition.pid_mode == "task" else None
    if keeper is not None:
        with contextlib.closing(keeper):
            if (held := keeper.namespaces()) is not None:
                return Slot(*held, task.id_base)
    (slot,) = await slots.make([task.id_base])
    return slot


async def _detach_network(scene: Scene) -> None:
    await scene.node.interfaces.detach(scene.task.id)
    if scene.slot is not None:
        scene.slot.close()
        scene.slot = None


# images ------------------------------------------------------------------------------------


async def _pull_images(scene: Scene) -> None:
    definitions = scene.task.definition.container_definitions
    if len(definitions) == 1:
        await _pull(scene, definitions[0])
    else:
        async with trio.open_nursery() as nursery:
            for definition in definitions:
                nursery.start_soon(_pull, scene, definition)
    assert scene.storage is not None  # its step came first
    images = [made.image for made in scene.containers.values()]
    storages.count_images(scene.storage, scene.node.images, images)


async def _pull(scene: Scene, definition: ContainerDefinition) -> None:
    task = scene.task
    image = await _ensure(scene, definition)
    arguments(definition, image.config)  # nothing to run is told before anything else is made
    limits = choose_limits(definition.ulimits, scene.node.host_limits())
    scene.containers[definition.name] = ContainerScene(image=image, limits=limits)
    scene.node.log.debug("image ready", task=task.id, image=image.digest)


async def _ensure(scene: Scene, definition: ContainerDefinition) -> Image:
    wanted = reference.parse(definition.image)
    try:
        return await scene.node.images.ensure(
            wanted, pull=scene.task.pull, platform=scene.task.platform, progress=scene.progress
        )
    except SandboxError as error:
        text = pull_failure_text(error, wanted, is_asked=scene.task.pull != "never")
        raise TaskFailed(text, container=definition.name) from error


# pids --------------------------------------------------------------------------------------


async def _share_pids(scene: Scene) -> None:
    if scene.task.definition.pid_mode == "task" and scene.pidns is None:
        assert scene.slot is not None  # the network step came first
        scene.pause = await pause.enter(scene.node, scene.task.id, scene.slot)
        scene.pidns = pause.open_namespace(scene.pause)


async def _end_pids(scene: Scene) -> None:
    if scene.pidns is not None:
        os.close(scene.pidns)
        scene.pidns = None
    if scene.task.definition.pid_mode == "task":
        keeper, scene.pause = scene.pause, None
        await pause.leave(scene.node, scene.task.id, keeper)


# roots -------------------------------------------------------------------------------------


async def _make_roots(scene: Scene) -> None:
    for definition in scene.task.definition.container_definitions:
        await make_root(scene, definition)


async def make_root(scene: Scene, definition: ContainerDefinition) -> None:
    """The container's cgroup and root file system; also before it is started once more."""
    made = scene.containers[definition.name]
    made.cgroup = made.cgroup or scene.node.tree.create(
        names.container_cgroup(scene.task.id, definition.name), container_limits(definition)
    )
    assert scene.slot and scene.storage, "their steps came first"
    root = await scene.node.roots.prepare(
        made.image,
        scene.storage.directory(definition.name),
        scene.slot.userns_fd,
        scene.task.id_base,
        again=scene.storage.again,
    )
    made.root, made.layers = root.mount_fd, root.layers
    if definition.depends_on:
        made.release_layers()  # it may wait for long, with as many descriptors as layers
    made.user = _identity(scene, definition, made.image, root)
    for mount in definition.mount_points:
        await _fill_volume(scene, mount, root.mount_fd)


def _identity(
    scene: Scene, definition: ContainerDefinition, image: Image, root: Rootfs
) -> Identity:
    wanted = definition.user if definition.user is not None else image.config.user
    try:
        user = scene.node.roots.user(image, root, wanted)
    except ImageError as error:
        raise TaskFailed(f"CannotStartContainerError: {error}") from None
    return Identity(uid=user.uid, gid=user.gid, groups=user.groups, home=user.home)


async def _fill_volume(scene: Scene, mount: MountPoint, root: int) -> None:
    assert scene.storage is not None
    volume = scene.storage.volume(mount.source_volume)
    try:
        await scene.node.roots.populate_volume(
            root, mount.container_path, volume, scene.task.id_base
        )
    except ImageError as error:
        raise TaskFailed(f"CannotCreateVolumeError: {error}") from None


async def remove_cgroup(scene: Scene, container: str) -> None:
    """Kill what a container left, and let its cgroup go before it is started once more.

    Since Linux 6.14 a process that is cloned from elsewhere into a cgroup that was ever killed is
    killed at once: the kernel compares the kill counters of two different cgroups.
    """
    made = scene.containers.get(container)
    if made is not None and made.cgroup is not None:
        made.cgroup.close()
        made.cgroup = None
    await _remove(scene.node.tree.find(names.container_cgroup(scene.task.id, container)))


async def _drop_roots(scene: Scene) -> None:
    for made in scene.containers.values():
        made.forget()


STORAGE = (Step("storage", _attach_storage, _release_storage),)
NETWORK = (Step("network", _attach_network, _detach_network),)
CONNECT = (
    Step("directory", _make_directory, _nothing),
    *STORAGE,
    Step("cgroup", _make_cgroup, _remove_cgroup),
    *NETWORK,
)
"""Fargate's order: a task is connected before its images are pulled."""

PULL = (Step("images", _pull_images, _nothing),)
PIDS = (Step("pids", _share_pids, _end_pids),)
ROOTS = (Step("roots", _make_roots, _drop_roots),)
EVERYTHING = CONNECT + PULL + PIDS + ROOTS
