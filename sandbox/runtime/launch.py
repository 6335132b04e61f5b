"""One start of one container: from what the steps made to a running keeper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition
from sandbox.runtime import archive
from sandbox.runtime import keeper as keepers
from sandbox.runtime.container import (
    MOUNTED,
    WRITTEN,
    Place,
    VolumeMount,
    compile_container,
    working_directory,
)
from sandbox.runtime.keeper import Keeper
from sandbox.runtime.steps import Scene


async def start(
    scene: Scene, definition: ContainerDefinition, attempt: int, streams: Streams | None
) -> Keeper:
    """Raises StartFailed, KernelError, and InvalidParameterException for files of the client's that
    cannot be placed. The container's root is used up, whatever happens."""
    made, node = scene.containers[definition.name], scene.node
    with ExitStack() as lent, ExitStack() as released:
        root, *layers = made.take_root()  # steps.make_root comes before every start
        lent.callback(os.close, root)
        for fd in layers:
            released.callback(os.close, fd)
        volumes = _volumes(scene, definition, lent)
        if streams is not None and streams.files is not None:
            place = working_directory(definition, made.image.config)
            covered = _covered(volumes)
            await archive.place(root, place, streams.files, scene.task.id_base, covered)
        program = compile_container(
            definition,
            made.image.config,
            _place(scene, definition, root, layers, volumes),
            user=made.user,
            limits=made.limits,
            streams=streams,
        )
        directory = scene.container_dir(definition.name) / f"run.{attempt}"

        def spawned() -> None:
            released.close()  # the keeper has them too: who closes last has to wait
            node.failpoints.reach("keeper.spawned")

        return await keepers.start(
            program, binary=node.keeper, status_dir=directory, spawned=spawned
        )


def _place(
    scene: Scene,
    definition: ContainerDefinition,
    root: int,
    layers: Sequence[int],
    volumes: tuple[VolumeMount, ...],
) -> Place:
    cgroup = scene.containers[definition.name].cgroup
    assert cgroup and scene.slot and scene.interface, "the steps come before every start"
    return Place(
        userns=scene.slot.userns_fd,
        netns=scene.slot.netns_fd,
        pidns=scene.pidns,
        id_base=scene.task.id_base,
        cgroup=cgroup.directory_fd,
        tasks_files=cgroup.tasks_fds,
        root=root,
        layers=tuple(layers),
        volumes=volumes,
        hostname=scene.interface.hostname,
        hosts=scene.interface.hosts,
        resolv_conf=scene.interface.resolv_conf,
        region=scene.node.place.region,
        is_durable=scene.task.owner is None,  # it does not outlive its owner, nor a power cut
    )


def _covered(volumes: tuple[VolumeMount, ...]) -> list[str]:
    """The paths at which the image's root will not be seen."""
    written = (f"/{name}" for name in WRITTEN if not name.endswith("/"))
    paths = (os.path.normpath(volume.path).replace("//", "/", 1) for volume in volumes)
    return [*paths, *MOUNTED, *written]


def _volumes(
    scene: Scene, definition: ContainerDefinition, lent: ExitStack
) -> tuple[VolumeMount, ...]:
    """Its own mount points, then those of the containers that it takes volumes from."""
    wanted = {m.container_path: (m.source_volume, m.read_only) for m in definition.mount_points}
    for origin in definition.volumes_from:
        for mount in scene.definition(origin.source_container).mount_points:
            read_only = mount.read_only or origin.read_only
            wanted.setdefault(mount.container_path, (mount.source_volume, read_only))
    assert scene.storage is not None, "the steps come before every start"
    opened = []
    for path, (volume, read_only) in wanted.items():
        copy = scene.storage.mount_volume(volume)
        lent.callback(os.close, copy)
        opened.append(VolumeMount(descriptor=copy, path=path, read_only=read_only))
    return tuple(opened)
