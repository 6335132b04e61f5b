"""A process that makes the network of an agent, step by step, and is killed between two of them.

    python -m tests.crash.network_driver STEP RUN_DIR HOST_NETNS_FD INSTANCE

It says how many steps it has made before it stops at number STEP and waits to be killed. Then
whatever is left has to be found by `Fabric.sweep` of the next agent, which remembers nothing.
Steps are the calls that change the kernel: what is between them cannot be killed apart.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import trio

from sandbox.kernel import native, netns
from sandbox.kernel.netfilter import Iptables
from sandbox.kernel.rtnetlink import Rtnetlink
from sandbox.kernel.slots import SlotPool
from sandbox.kernel.thread import KernelThread
from sandbox.model.vpc import NetworkInterface, Subnet, Vpc
from sandbox.network.fabric import Fabric
from sandbox.network.warm import WarmInterfaces

POOL = IPv4Network("198.18.0.0/15")
VPC = Vpc(vpc_id="vpc-c4a54", cidr_block="10.0.0.0/16", number=3, created_at=0)
SUBNET = Subnet(
    subnet_id="subnet-1",
    vpc_id=VPC.vpc_id,
    cidr_block="10.0.0.0/20",
    availability_zone="us-east-1a",
    network_acl_id="acl-1",
    network_acl_association_id="aclassoc-1",
    created_at=0,
)
FIRST_IDS = 0x7FD00000


class Steps:
    """Counts what changes the kernel, and stops before the one that was asked for."""

    def __init__(self, stop_at: int) -> None:
        self.made = 0
        self.stop_at = stop_at

    def watch(self, where: Any, name: str) -> None:
        original = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reach(f"{name}")
            return original(*args, **kwargs)

        setattr(where, name, counted)

    def reach(self, name: str) -> None:
        if self.made == self.stop_at:
            os.write(1, f"stopped before {name}\n".encode())
            signal.pause()
        self.made += 1


async def make_all(run_dir: Path, instance: str, host: KernelThread) -> None:
    fabric = Fabric(run_dir, instance, POOL, host)
    fabric.host_rules.lock_file = str(run_dir.parent / "lock")
    ids = iter(range(FIRST_IDS, FIRST_IDS + (8 << 16), 1 << 16))
    release: Callable[[int], None] = lambda first: None  # noqa: E731
    slots = SlotPool(0, lambda count: [next(ids) for _ in range(count)], release)
    warm = WarmInterfaces(fabric, slots, release, KernelThread("interfaces"), 1)
    await fabric.open(VPC, lambda: None)
    await fabric.attach_gateway(VPC.vpc_id)
    await fabric.route_blocks(VPC.vpc_id, [IPv4Network("198.18.16.0/20")])
    await host.run(fabric.host_rules.install)
    ready = await warm.take(VPC.vpc_id)
    interface = NetworkInterface(
        network_interface_id=ready.network_interface_id,
        vpc_id=VPC.vpc_id,
        subnet_id=SUBNET.subnet_id,
        availability_zone="us-east-1a",
        private_ip="10.0.0.10",
        mac_address=ready.mac_address,
        group_ids=("sg-1",),
        attachment_id="a",
        task="t",
        bandwidth_mbit=100,
        created_at=0,
    )
    await warm.join(ready, interface, SUBNET)
    await warm.leave(interface)
    await fabric.delete(VPC)


def main() -> None:
    stop_at, run_dir, host_fd, instance = sys.argv[1:]
    steps = Steps(int(stop_at))
    for where, name in (
        (netns, "create"),
        (netns, "write_sysctl"),
        (netns, "pin"),
        (netns, "unpin"),
        (native, "mount"),
        (native, "umount2"),
        (Rtnetlink, "send"),
        (Iptables, "load"),
    ):
        steps.watch(where, name)
    with KernelThread("host") as host:
        host.call(native.setns, int(host_fd), native.CLONE_NEWNET)
        trio.run(make_all, Path(run_dir), instance, host)
    os.write(1, b"all done\n")


if __name__ == "__main__":
    main()
