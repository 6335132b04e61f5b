"""A task's volumes: shared, read-only, taken over, filled from the image, gone with the task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.agent import Agent
from sandbox.model.task import ContainerDependency, MountPoint, StopCode, Volume, VolumeFrom
from scripts.make_image import LayerWriter
from tests.kernel.probe_image import Images
from tests.kernel.tasks import container, execute, heard, killed, of, started, to_the_end

pytestmark = pytest.mark.guest

DATA = (Volume(name="data"),)


def at(path: str, volume: str = "data", *, read_only: bool = False) -> tuple[MountPoint, ...]:
    return (MountPoint(source_volume=volume, container_path=path, read_only=read_only),)


def content(layer: LayerWriter) -> None:
    layer.directory("seed", 0o750)
    layer.file("seed/mine", b"of app\n", 0o640, uid=1000, gid=2000)
    layer.file("seed/run", b"#!/bin/sh\n", 0o755)
    layer.symlink("seed/link", "mine")
    layer.directory("seed/deep")
    layer.file("seed/deep/file", b"deep\n")


async def test_containers_share_a_volume_and_one_may_only_read(agent: Agent, tiny: str) -> None:
    after = (ContainerDependency(container_name="writer", condition="SUCCESS"),)
    outcome = await to_the_end(
        agent,
        container(
            tiny, "writer", "echo hello > /out/file", essential=False, mount_points=at("/out")
        ),
        container(
            tiny,
            "reader",
            "cat /in/file; touch /in/more; echo $?; grep ' /in ' /proc/mounts | cut -d' ' -f4",
            depends_on=after,
            mount_points=at("/in", read_only=True),
        ),
        volumes=DATA,
    )
    assert outcome.stderr == "touch: /in/more: Read-only file system\n"
    said, code, options = outcome.stdout.splitlines()
    assert (said, code) == ("hello", "1")
    assert {"ro", "nodev"} <= {*options.split(",")}


async def test_a_task_cannot_make_a_read_only_mount_writable(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        container(
            tiny,
            "app",
            "mount -o remount,rw /in || umount /in || echo kept",
            mount_points=at("/in", read_only=True),
        ),
        volumes=DATA,
    )
    assert outcome.stdout == "kept\n"


async def test_volumes_from_takes_mounts_at_the_same_places(agent: Agent, tiny: str) -> None:
    task = await started(
        agent,
        container(
            tiny, "taker", "exec sleep 1000", volumes_from=(VolumeFrom(source_container="giver"),)
        ),
        container(
            tiny,
            "looker",
            "exec sleep 1000",
            volumes_from=(VolumeFrom(source_container="giver", read_only=True),),
        ),
        container(
            tiny,
            "giver",
            "exec sleep 1000",
            mount_points=(*at("/a"), *at("/b", "other", read_only=True)),
        ),
        volumes=(*DATA, Volume(name="other")),
    )
    assert (await execute(agent, task, "touch", "/a/1", container="giver"))[0] == 0
    assert (await execute(agent, task, "touch", "/a/2", container="taker"))[0] == 0
    assert (await execute(agent, task, "touch", "/b/3", container="taker"))[0] == 1
    assert (await execute(agent, task, "touch", "/a/4", container="looker"))[0] == 1
    assert (await execute(agent, task, "ls", "/a", container="looker"))[1] == "1\n2\n"
    await killed(agent, task)


async def test_an_empty_volume_starts_with_what_the_image_has_there(
    agent: Agent, images: Images
) -> None:
    image = images.make("seeded", content)
    look = "cd /seed && stat -c '%n %u %g %a' . mine run deep/file && readlink link && cat mine"
    outcome = await to_the_end(
        agent,
        container(image, "app", look, mount_points=at("/seed")),
        volumes=DATA,
    )
    assert outcome.stdout.splitlines() == [
        ". 0 0 750",
        "mine 1000 2000 640",
        "run 0 0 755",
        "deep/file 0 0 644",
        "mine",
        "of app",
    ]


async def test_the_image_itself_is_not_changed_by_what_is_written_to_the_copy(
    agent: Agent, images: Images
) -> None:
    image = images.make("seeded", content)
    first = await to_the_end(
        agent,
        container(
            image, "app", "echo changed > /seed/mine; rm /seed/run", mount_points=at("/seed")
        ),
        volumes=DATA,
    )
    assert first.container.exit_code == 0
    second = await to_the_end(agent, container(image, "app", "cat /seed/mine; ls /seed"))
    assert second.stdout == "of app\ndeep\nlink\nmine\nrun\n"


async def test_it_belongs_to_the_tasks_root_where_the_image_has_nothing(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "stat -c '%u %g %a' /new/place", mount_points=at("/new/place")),
        volumes=DATA,
    )
    assert outcome.stdout == "0 0 755\n"


async def test_one_volume_may_lie_within_another(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        container(
            tiny,
            "app",
            "touch /a/b/inner /a/outer; ls /a /a/b",
            mount_points=(*at("/a/b", "inner"), *at("/a", "outer")),
        ),
        volumes=(Volume(name="inner"), Volume(name="outer")),
    )
    assert outcome.stderr == ""
    assert outcome.stdout.split() == ["/a:", "b", "outer", "/a/b:", "inner"]


async def test_on_the_host_it_has_the_tasks_ids_and_it_dies_with_the_task(
    agent: Agent, state_dir: Path, tiny: str
) -> None:
    script = "echo x > /v/mine; chown 1000 /v/mine; echo ready; exec sleep 1000"
    task = await started(agent, container(tiny, "app", script, mount_points=at("/v")), volumes=DATA)
    await heard(agent, task, "ready")
    supervisor = agent.supervisors.get(task)
    assert supervisor is not None and supervisor.scene.storage is not None
    file = supervisor.scene.storage.volume("data") / "mine"
    assert file.stat().st_uid == agent.tasks.describe(task).desired.id_base + 1000
    await killed(agent, task)
    assert not file.exists()
    left = {path.name for path in (state_dir / "tasks" / task).rglob("*")}
    assert left.isdisjoint({"volumes", "data", "mine", "upper", "work", "storage.ext4"})
    assert "log" in left


async def test_no_device_and_no_set_uid_of_the_host_works_in_it(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        container(
            tiny, "app", "mknod /v/null c 1 3; mkfifo /v/fifo && echo fifo", mount_points=at("/v")
        ),
        volumes=DATA,
    )
    assert "Operation not permitted" in outcome.stderr
    assert outcome.stdout == "fifo\n"


async def test_an_image_that_has_a_file_where_the_volume_goes_fails_the_task_by_name(
    agent: Agent, tiny: str
) -> None:
    outcome = await to_the_end(
        agent, container(tiny, "app", "true", mount_points=at("/etc/passwd")), volumes=DATA
    )
    known = outcome.view.known
    assert known.stop_code is StopCode.TASK_FAILED_TO_START
    assert "/etc/passwd" in (known.stopped_reason or "")
    assert of(outcome.view, "app").exit_code is None


async def test_a_link_in_the_image_does_not_lead_a_volume_out_of_it(
    agent: Agent, images: Images, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "secret").touch()

    def trap(layer: LayerWriter) -> None:
        layer.symlink("v", f"../../../../../..{victim}")

    outcome = await to_the_end(
        agent,
        container(images.make("trap", trap), "app", "touch /v/made", mount_points=at("/v")),
        volumes=DATA,
    )
    assert (
        outcome.container.reason == "CannotStartContainerError: bind v: No such file or directory"
    )
    assert os.listdir(victim) == ["secret"]
