"""The power fails at any moment: the state directory as it is on the disk then.

It is on an ext4 whose disk is a file. The agent is frozen and that file copied: what is in it is
what was written through to the disk by then, so what nobody has synced may be missing, and the
journal is as it is. Copied twice and equal, it was of one moment. Each copy is mounted later, on
the same loop device, as after a reboot, where an agent finds it.

Not modelled: a disk that forgets or reorders what it has told to be written before a flush.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.task import Status, StopCode
from tests.crash.conftest import Driver, Site
from tests.crash.paths import wait
from tests.crash.test_tasks import second_task

MOMENTS = 8
DISK_BYTES = 48 << 20

Acknowledged = Mapping[str, frozenset[str]]
"""Of each task: "run", and "stop"."""


@contextmanager
def loop_device(disk: Path) -> Iterator[str]:
    command = ["losetup", "--find", "--show", str(disk)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def attached(device: str, disk: Path) -> Iterator[None]:
    """The disk on that device: for an agent the directory is the same only then."""
    deadline = time.monotonic() + 10
    while subprocess.run(["losetup", device, disk], capture_output=True).returncode != 0:
        assert time.monotonic() < deadline, f"{device} stays busy"  # it was let go a moment ago
        time.sleep(0.05)
    try:
        yield
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(device: str, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", device, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def copied(disk: Path, to: Path) -> None:
    """Of one moment; the kernel writes something now and then, also for a frozen agent."""
    for _ in range(20):
        copies = [to, to.with_suffix(".again")]
        for copy in copies:
            subprocess.run(["cp", "--sparse=always", disk, copy], check=True)
        if subprocess.run(["cmp", "--quiet", *copies]).returncode == 0:
            copies[1].unlink()
            return
    pytest.fail("the disk was never quiet")


def moments(driver: Driver, disk: Path, directory: Path) -> Iterator[tuple[Path, Acknowledged]]:
    """Copies of the disk under a working agent, with what was acknowledged before."""
    acknowledged: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    delays = random.Random(7)
    for moment in range(MOMENTS):
        time.sleep(delays.uniform(0.02, 0.4))
        copy = directory / f"moment{moment}"
        with frozen(driver.pid):
            for fact in driver.heard():
                acknowledged[fact["task"]] |= {fact["acknowledged"]}
            copied(disk, copy)
        yield copy, dict(acknowledged)


async def forgotten(agent: Agent) -> None:
    for view in agent.tasks.list():
        await agent.tasks.remove(view.id)


async def lost(agent: Agent, acknowledged: Acknowledged) -> list[str]:
    """What was acknowledged and is not so. A task that was run has ended with the power."""
    wrong = []
    views = {view.id: view for view in agent.tasks.list()}
    for id, what in acknowledged.items():
        if id not in views:
            wrong.append(f"{id} is not known")
            continue
        await wait(agent, id)
        view = agent.tasks.describe(id)
        if view.known.last_status is not Status.STOPPED or view.known.stop_code is None:
            wrong.append(f"{id} is {view.known.last_status.name}, {view.known.stop_code}")
        if "stop" in what and view.desired.stop_code is not StopCode.USER_INITIATED:
            wrong.append(f"{id} is not wanted stopped")
    return wrong


async def test_after_a_power_cut_at_any_moment_all_that_was_acknowledged_is_there(
    driver: Driver, image: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    place, wrong = tmp_path / "disk", []
    site = Site(place / "state", tmp_path / "run")
    with loop_device(disk) as device, mounted(device, place):
        driver.start(verb="churn", image=image, **site.place)
        driver.hear("ready")
        cuts = list(moments(driver, disk, tmp_path))
        driver.signal(signal.SIGKILL)
        async with site.agent() as agent:
            for view in agent.tasks.list():
                await agent.tasks.stop(view.id)
                await wait(agent, view.id)
            await forgotten(agent)
        assert await site.remains() == []
        instance = site.instance
    assert sum(len(acknowledged) for _, acknowledged in cuts) > MOMENTS
    for copy, acknowledged in cuts:
        with attached(device, copy), mounted(device, place):
            async with site.agent() as agent:
                with trio.fail_after(30):
                    found = await lost(agent, acknowledged)
                    found += await second_task(agent, image)
                await forgotten(agent)
            found += [f"left behind: {what}" for what in await site.remains()]
            if acknowledged and site.instance != instance:
                found.append("it is taken for another directory")
        wrong += [f"{copy.name}: {what}" for what in found]
    assert not wrong, "\n".join(wrong)
