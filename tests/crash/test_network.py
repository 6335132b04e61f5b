"""An agent that is killed while it makes a VPC and an interface leaves nothing that a sweep misses.

The host is a namespace that plays it; what a sweep must find there is compared with what was there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.kernel import netns
from sandbox.kernel.netfilter import BACKENDS, Iptables
from sandbox.kernel.slots import SlotPool
from sandbox.network import routers
from sandbox.network.fabric import Fabric
from sandbox.network.warm import WarmInterfaces
from tests.crash.network_driver import POOL, VPC
from tests.kernel.namespaces import Host, playing_host

INSTANCE = "c4a5"
LAST = 200
"""More than there are steps: a run that ends by itself ends the test of all of them."""


@pytest.fixture
def host() -> Iterator[Host]:
    with playing_host() as host:
        yield host


def killed_before(step: int, run_dir: Path, host: Host) -> str:
    """What it was about to do; a killed process is reaped."""
    command = [sys.executable, "-m", "tests.crash.network_driver"]
    command += [str(step), str(run_dir), str(host.space.fd), INSTANCE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[host.space.fd]) as process:
        assert process.stdout is not None
        said = process.stdout.readline().decode().strip()
        process.kill()
    assert said, "the driver failed"
    return said


def of_the_host(host: Host, run_dir: Path) -> dict[str, Any]:
    return {
        "links": host.space.links(),
        "routes": host.space.ip("route"),
        "neighbours": [n for n in host.space.ip("neighbour") if n["dev"] != "eth0"],
        "forwarding": host.space.call(netns.read_sysctl, "net/ipv4/conf/eth0/forwarding"),
        "rules": [
            line
            for backend in BACKENDS
            for lines in host.thread.call(Iptables(backend, "/dev/null").saved).values()
            for line in lines
            if "SB-" in line
        ],
        "pins": os.listdir(run_dir / "vpc") if (run_dir / "vpc").exists() else [],
        "memory": (run_dir / "forwarding.json").exists(),
    }


async def test_a_kill_between_any_two_steps_leaves_nothing_that_the_next_agent_does_not_sweep(
    host: Host, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    before = of_the_host(host, run_dir)
    seen = []
    for step in range(LAST):
        seen.append(killed_before(step, run_dir, host))
        later = Fabric(run_dir, INSTANCE, POOL, host.thread)
        later.host_rules.lock_file = str(tmp_path / "lock")
        await later.remove_all()
        await later.aclose()
        with trio.fail_after(10):  # a namespace goes in the background, and its links with it
            while (left := of_the_host(host, run_dir)) != before:
                await trio.sleep(0.02)
        assert left == before, f"killed when it {seen[-1]}"
        if seen[-1] == "all done":
            break
    assert seen[-1] == "all done"
    assert len(seen) > 40


async def test_the_next_agent_goes_on_from_wherever_the_last_one_was_killed(
    host: Host, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for step in range(0, LAST, 7):
        said = killed_before(step, run_dir, host)
        later = Fabric(run_dir, INSTANCE, POOL, host.thread)
        later.host_rules.lock_file = str(tmp_path / "lock")
        await later.open(VPC, lambda: None)
        await later.attach_gateway(VPC.vpc_id)
        slots = SlotPool(0, lambda count: [], lambda first: None)
        warm = WarmInterfaces(later, slots, lambda first: None, host.thread, 0)
        await warm.sweep(VPC.vpc_id, [])
        links = set(await later.inside(VPC.vpc_id, routers.link_names))
        assert links == {"lo", "up0"}, f"killed when it {said}"
        await later.remove_all()
        await later.aclose()
        if said == "all done":
            return
