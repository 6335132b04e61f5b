"""What a program of the task tries with what it has: root of its own world and a shell.

Nothing here would harm the host if it worked.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.agent import Agent
from sandbox.model.task import KernelCapabilities, LinuxParameters
from tests.kernel.tasks import container, of, started, stopped, to_the_end

pytestmark = pytest.mark.guest

WITH_PTRACE = LinuxParameters(capabilities=KernelCapabilities(add=("SYS_PTRACE",)))


async def answers(agent: Agent, image: str, *commands: str, user: str = "root") -> list[str]:
    """What each of the commands prints, errors included."""
    script = "; ".join(f"({command}) 2>&1 | tr '\\n' ' '; echo" for command in commands)
    wanted = container(image, "app", script, user=user, linux_parameters=WITH_PTRACE)
    return [line.strip() for line in (await to_the_end(agent, wanted)).stdout.splitlines()]


async def test_fifos_can_be_made(agent: Agent, probe_image: str) -> None:
    assert await answers(agent, probe_image, "mknod /tmp/fifo p && ls /tmp") == ["fifo"]


async def test_the_nodes_of_the_host_cannot_be_changed_by_way_of_ours(
    agent: Agent, probe_image: str
) -> None:
    before = os.stat("/dev/null")
    told = await answers(
        agent,
        probe_image,
        "chmod 666 /dev/null",
        "touch -d @0 /dev/null",
        "rm /dev/null",
        "mv /tmp /dev/null",
    )
    assert all(told), "one of them worked"
    assert os.stat("/dev/null").st_mtime == before.st_mtime


async def test_no_path_leads_to_the_host(agent: Agent, probe_image: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    secret, up = f"{tmp_path}/secret", "../" * 40
    ways = [
        secret,
        f"/{up}{secret}",
        f"/proc/1/root{secret}",
        f"/proc/1/cwd/{up}{secret}",
        f"/proc/self/root/{up}{secret}",
        f"/proc/self/fd/0/{up}{secret}",
        f"/proc/thread-self/root{secret}",
    ]
    told = await answers(agent, probe_image, *(f"cat {way}" for way in ways))
    assert len(told) == len(ways)
    assert all("No such file" in line or "Not a directory" in line for line in told)


async def test_a_chroot_is_left_for_the_tasks_own_root_at_most(
    agent: Agent, probe_image: str
) -> None:
    escape = "mkdir -p /jail/bin; cp /bin/busybox /jail/bin/sh; chroot /jail sh -c 'cd /..; echo *'"
    assert await answers(agent, probe_image, escape) == ["bin"]


async def test_only_the_containers_own_processes_are_seen(agent: Agent, probe_image: str) -> None:
    (pids,) = await answers(agent, probe_image, "echo /proc/[0-9]*")
    assert len(pids.split()) <= 4
    assert "/proc/1" in pids.split()


async def test_a_signal_to_everybody_reaches_no_other_task(agent: Agent, probe_image: str) -> None:
    other = await started(agent, container(probe_image, "app", "sleep 1000"))
    await to_the_end(agent, container(probe_image, "app", "kill -9 -1"))
    assert of(agent.tasks.describe(other), "app").last_status == "RUNNING"
    await stopped(agent, other)


async def test_what_only_roots_of_hosts_may_is_refused_to_roots_of_tasks(
    agent: Agent, probe_image: str
) -> None:
    told = await answers(
        agent,
        probe_image,
        "mount -t tmpfs none /tmp",
        "umount /proc",
        "mount -o remount,rw /sys",
        "hostname other",
        "dmesg",
        "echo 1 > /sys/fs/cgroup/cgroup.procs",
        "ip link add type dummy",
        "ip link set lo down",
        "nice -n -5 true",
        "unshare -m true",
        "losetup -f",
    )
    assert len(told) == 11
    assert all(told), f"one of them worked: {told}"
