"""A task's ephemeral storage: bounded, told truly, the image counted, and no harm to the host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox.agent import Agent, open_agent
from sandbox.control.floor import Disk
from sandbox.errors import ClientException, InvalidParameterException
from sandbox.kernel import loop
from sandbox.model import fargate
from sandbox.model.request import RunRequest
from sandbox.model.task import (
    ContainerDefinition,
    EphemeralStorage,
    MountPoint,
    RestartPolicy,
    StopCode,
    TaskStorage,
    Volume,
)
from tests.kernel.conftest import definition, end_all, finish, until
from tests.kernel.tasks import begin, container, execute, heard, killed, started, to_the_end

pytestmark = pytest.mark.guest

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
VOLUMES = (Volume(name="data"),)
MOUNTED = (MountPoint(source_volume="data", container_path="/data"),)
DF = "df -k / /data | sed 1d | awk '{print $2, $3, $4}'"
WAITS = "echo ready; while [ ! -e /done ]; do sleep 0.05; done"


def sizes(text: str) -> list[tuple[int, ...]]:
    """Size, used and available in bytes, of each line of df."""
    return [tuple(int(word) * KIB for word in line.split()) for line in text.splitlines()]


def with_data(image: str, script: str, **members: Any) -> ContainerDefinition:
    return container(image, "app", script, mount_points=MOUNTED, **members)


async def test_df_tells_the_limit_to_layers_and_volumes_alike(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(agent, with_data(tiny, DF), volumes=VOLUMES)
    root, data = sizes(outcome.stdout)
    assert root == data
    size, used, available = root
    assert 20 * GIB <= size <= 20 * GIB * 1.001
    assert size - used - available < 32 * MIB


async def test_stats_say_what_df_says(agent: Agent, tiny: str) -> None:
    script = f"dd if=/dev/zero of=/data/file bs=1M count=40 2>/dev/null; {DF}; {WAITS}"
    task = await started(agent, with_data(tiny, script), volumes=VOLUMES)
    (size, used, _), _ = sizes((await heard(agent, task, "ready")).removesuffix("ready\n"))
    found = (await agent.tasks.stats(task)).storage
    assert found is not None
    assert found.reserved_bytes == size
    assert used - MIB <= found.utilized_bytes <= used + MIB
    await killed(agent, task)


async def test_the_image_counts_once_for_all_containers(agent: Agent, tiny: str) -> None:
    one = sizes((await to_the_end(agent, with_data(tiny, DF), volumes=VOLUMES)).stdout)
    image = agent.images.inspect(tiny)
    content = agent.node.images.unpacked_bytes([image])
    assert content > MIB
    assert content <= one[0][1] <= content + MIB
    two = await to_the_end(
        agent,
        with_data(tiny, DF),
        container(tiny, "other", "true", essential=False),
        volumes=VOLUMES,
    )
    assert sizes(two.stdout)[0][1] <= content + MIB


async def test_beyond_the_limit_is_enospc_and_a_sibling_is_not_disturbed(
    agent: Agent, tiny: str
) -> None:
    sibling = await started(agent, container(tiny, "app", f"{WAITS}; echo fine > /f; cat /f"))
    outcome = await to_the_end(
        agent,
        with_data(
            tiny,
            "fallocate -l 15G /big; fallocate -l 6G /data/more || echo full;"
            f" rm /big; fallocate -l 6G /data/more && echo room; {DF}",
        ),
        volumes=VOLUMES,
    )
    assert "No space left on device" in outcome.stderr
    assert outcome.stdout.splitlines()[:2] == ["full", "room"]
    assert sizes("\n".join(outcome.stdout.splitlines()[2:]))[0][1] >= 6 * GIB
    await execute(agent, sibling, "touch", "/done")
    assert (await finish(agent, sibling)).stdout.endswith("fine\n")


@pytest.mark.parametrize("gib", [21, 200])
async def test_a_definition_may_ask_for_more(agent: Agent, tiny: str, gib: int) -> None:
    outcome = await to_the_end(
        agent,
        with_data(tiny, DF),
        volumes=VOLUMES,
        ephemeral_storage=EphemeralStorage(size_in_gib=gib),
    )
    assert gib * GIB <= sizes(outcome.stdout)[0][0] <= gib * GIB * 1.001


async def test_up_to_platform_1_3_volumes_have_4_gb_and_all_else_10(
    agent: Agent, tiny: str
) -> None:
    wanted = definition(with_data(tiny, DF), volumes=VOLUMES)
    view = await agent.tasks.run(RunRequest(definition=wanted, platform_version="1.3.0"))
    root, data = sizes((await finish(agent, view.id)).stdout)
    assert 10 * GIB <= root[0] <= 10 * GIB * 1.001
    assert 4 * GIB <= data[0] <= 4 * GIB * 1.001
    image = agent.images.inspect(tiny)
    counted = agent.node.images.unpacked_bytes([image]) + image.size_bytes
    assert counted <= root[1] <= counted + MIB


async def test_an_image_that_does_not_fit_stops_the_task_with_a_reason(
    agent: Agent, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of 1 GiB, of which no real one is so small, and an image that says to be larger."""
    monkeypatch.setattr(fargate, "STORAGE", TaskStorage(size_gib=1))
    await agent.images.pull(tiny)
    diff_id = agent.images.inspect(tiny).diff_ids[0]
    layer = agent.state_dir / "images/layers" / diff_id.replace(":", "/")
    layer.with_suffix(".sizes").write_text(f"{2 * GIB} 1\n")
    outcome = await to_the_end(agent, container(tiny, "app", "true"))
    assert outcome.view.known.stop_code is StopCode.TASK_FAILED_TO_START
    reason = outcome.view.known.stopped_reason or ""
    assert reason.startswith("CannotPullContainerError: the images have 2147483648 bytes")
    assert reason.endswith("no space left on device")


async def test_a_task_sees_nothing_of_the_one_before_it(agent: Agent, tiny: str) -> None:
    assert agent.node.filesystems is not None
    for _ in range(3):
        outcome = await to_the_end(
            agent,
            with_data(
                tiny, "ls -A /data; ls /secret; echo of mine > /data/x; echo > /secret; sync"
            ),
            volumes=VOLUMES,
        )
        assert outcome.stdout == ""
        assert "No such file" in outcome.stderr
        for _, ready in agent.node.filesystems._ready:
            assert [entry.name for entry in ready.path.iterdir()] == ["lost+found"]


@pytest.mark.usefixtures("any_period")
async def test_a_restart_in_place_keeps_what_was_written(agent: Agent, tiny: str) -> None:
    policy = RestartPolicy(enabled=True, restart_attempt_period=0)
    script = "echo again >> /data/starts; echo again >> /starts; cat /starts /data/starts; sleep .1"
    task = await started(agent, with_data(tiny, script, restart_policy=policy), volumes=VOLUMES)
    await heard(agent, task, "again\nagain\nagain\nagain\n")
    await killed(agent, task)


async def test_nothing_of_a_stopped_task_is_left_on_the_disk(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        with_data(tiny, "dd if=/dev/zero of=/data/big bs=1M count=40 2>/dev/null"),
        volumes=VOLUMES,
    )
    directory = agent.node.task_dir(outcome.view.id)
    assert sorted(entry.name for entry in directory.iterdir()) == ["app"]


# A host that cannot ---------------------------------------------------------------------------


@pytest.fixture
async def unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    """An agent of a host without loop devices."""
    monkeypatch.setattr(loop, "CONTROL", "/dev/no-such-control")
    async with open_agent(tmp_path / "state", tmp_path / "run", {"warm_slots": 1}) as agent:
        yield agent
        await end_all(agent)


async def test_without_loop_devices_a_task_runs_and_has_no_limit_of_its_own(
    unlimited: Agent, tiny: str
) -> None:
    script = f"echo kept > /data/x; echo ready; {WAITS}"
    task = await started(unlimited, with_data(tiny, script), volumes=VOLUMES)
    await heard(unlimited, task, "ready")
    assert (await unlimited.tasks.stats(task)).storage is None
    assert (await execute(unlimited, task, "cat", "/data/x"))[1] == "kept\n"
    await killed(unlimited, task)
    assert not (unlimited.node.task_dir(task) / "volumes").exists()


async def test_without_loop_devices_a_size_that_was_asked_for_is_refused(
    unlimited: Agent, tiny: str
) -> None:
    with pytest.raises(ClientException, match="`sandbox doctor` says what it lacks"):
        await begin(
            unlimited,
            container(tiny, "app", "true"),
            ephemeral_storage=EphemeralStorage(size_in_gib=30),
        )


# The floor ------------------------------------------------------------------------------------


@contextmanager
def disk(tmp_path: Path, size_bytes: int) -> Iterator[Path]:
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent on a disk of 400 MiB of which 200 are to stay free."""
    settings = {"warm_slots": 1, "warm_storage": 1, "host_free_storage_mib": 200}
    with disk(tmp_path, 400 * MIB) as place:
        async with open_agent(place / "state", tmp_path / "run", settings) as agent:
            yield agent
            await end_all(agent)


async def test_the_task_that_takes_most_is_stopped_before_the_hosts_disk_is_full(
    small: Agent, tiny: str
) -> None:
    sibling = await started(small, container(tiny, "app", f"{WAITS}; echo fine"))
    script = "i=0; while dd if=/dev/zero of=/data/$i bs=1M count=4; do i=$((i+1)); sleep 0.02; done"
    greedy = await begin(small, with_data(tiny, script), volumes=VOLUMES)
    view = (await finish(small, greedy)).view
    assert view.known.stop_code is StopCode.INFRASTRUCTURE_HEALTH
    reason = view.known.stopped_reason or ""
    assert reason.startswith("The host's disk is almost full: ")
    assert "200 MiB are to stay free" in reason
    await until(lambda: Disk.of(small.state_dir).free_bytes > 200 * MIB)
    await execute(small, sibling, "touch", "/done")
    assert (await finish(small, sibling)).stdout.endswith("fine\n")


async def test_below_the_floor_no_task_is_taken(small: Agent, tiny: str) -> None:
    with (small.state_dir / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 220 * MIB)
    with pytest.raises(InvalidParameterException, match="Capacity is unavailable"):
        await begin(small, container(tiny, "app", "true"))
    (small.state_dir / "filler").unlink()
    await to_the_end(small, container(tiny, "app", "true"))
