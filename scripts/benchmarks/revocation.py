"""What it takes to cut the flows of a rule that goes, in a network namespace that goes with this.

Of twice as many connections, half have the group's index in their marks, and all of these lose the
rule that admitted them: list them, judge each, delete it. Beside it, where they are installed, the
ways without a judge: `conntrack -D` with the same mark, and one message that flushes the mark.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sandbox.kernel import native
from sandbox.kernel.conntrack import Conntrack
from sandbox.kernel.flows import Flow
from sandbox.kernel.netfilter import Iptables
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.thread import KernelThread
from sandbox.model.vpc import (
    Network,
    NetworkInterface,
    SecurityGroup,
    SecurityGroupRule,
    Vpc,
)
from sandbox.network.revocation import Judge, Revoked, revoke
from scripts.benchmarks.figures import Figure, Section
from scripts.benchmarks.sets import FLOWS, MARK, MARK_MASK, make_flows, marking, row, seconds

INDEX = MARK >> 16
REVOKE = f"{FLOWS} connections: list, judge, delete (all are cut)"
KEEP = f"{FLOWS} connections: list, judge (another rule admits them)"
JUDGE = f"{FLOWS} connections: judge"
FLUSH = f"{FLOWS} connections: flush by mark, without a judge"
CONNTRACK = f"{FLOWS} connections: `conntrack -D --mark`, without a judge"

Times = Mapping[str, Sequence[float]]


def revocation(directory: Path, quick: bool) -> Section:
    directory.mkdir(parents=True)
    with KernelThread("revocation") as thread:
        thread.call(native.unshare, native.CLONE_NEWNET)
        times = thread.call(measured, str(directory / "lock"), 2 if quick else 7)
    return Section(
        "Revocation",
        f"A rule goes that admitted {FLOWS} of {2 * FLOWS} tracked connections.",
        ("", "median", "min", "max"),
        [row(name, each, 1e3, "ms") for name, each in times.items() if each],
        figures(times),
    )


def figures(times: Times) -> list[Figure]:
    cut = statistics.median(times[REVOKE])
    found = [Figure("a connection cut, all told", cut / FLOWS * 1e6, "us", "at most", 120)]
    if times[CONNTRACK]:
        peer = statistics.median(times[CONNTRACK])
        found.append(Figure("revocation, of `conntrack -D`'s", cut / peer, "x", "at most", 4))
    return found


def measured(lock_file: str, rounds: int) -> Times:
    with Netlink() as netlink:
        netlink.set_loopback_up()
    Iptables.detect(lock_file).load(marking())
    times: dict[str, list[float]] = {name: [] for name in (REVOKE, KEEP, JUDGE, FLUSH, CONNTRACK)}
    before, narrower, none = vpc(7000, 7001), vpc(7001), vpc()
    with Conntrack() as conntrack:
        for _ in range(rounds):
            make_flows()
            times[KEEP].append(timed(conntrack, before, narrower, Revoked(FLOWS, 0, 0)))
            flows = list(conntrack.flows(MARK, MARK_MASK))
            times[JUDGE].append(seconds(partial(judge_all, Judge(before, none), flows)))
            times[REVOKE].append(timed(conntrack, before, none, Revoked(FLOWS, FLOWS, 0)))
            make_flows()
            times[FLUSH].append(seconds(partial(conntrack.flush_mark, MARK, MARK_MASK)))
            if shutil.which("conntrack"):
                make_flows()
                times[CONNTRACK].append(seconds(forked))
    return times


def judge_all(judge: Judge, flows: list[Flow]) -> None:
    for flow in flows:
        judge.mark(flow)


def timed(conntrack: Conntrack, before: Network, after: Network, expected: Revoked) -> float:
    found: list[Revoked] = []
    took = seconds(lambda: found.append(revoke(conntrack, before, after)))
    if found != [expected]:
        raise RuntimeError(f"{found[0]}, not {expected}")
    return took


def forked() -> None:
    mark = f"{MARK:#x}/{MARK_MASK:#x}"
    subprocess.run(["conntrack", "-D", "--mark", mark], capture_output=True, check=True)


def vpc(*ports: int) -> Network:
    """The loopback as the address of an interface whose one group allows UDP to these ports."""
    rules = (
        SecurityGroupRule(
            security_group_rule_id=f"sgr-{port}",
            is_egress=True,
            ip_protocol="udp",
            from_port=port,
            to_port=port,
            cidr_ipv4="127.0.0.0/8",
        )
        for port in ports
    )
    group = SecurityGroup(
        group_id="sg-1",
        vpc_id="vpc-1",
        group_name="one",
        description="one",
        index=INDEX,
        rules=tuple(rules),
        created_at=0.0,
    )
    interface = NetworkInterface(
        network_interface_id="eni-1",
        vpc_id="vpc-1",
        subnet_id="subnet-1",
        availability_zone="a",
        private_ip="127.0.0.1",
        mac_address="02:00:00:00:00:01",
        group_ids=("sg-1",),
        attachment_id="attach-1",
        task="task",
        created_at=0.0,
    )
    one = Vpc(
        vpc_id="vpc-1", cidr_block="10.0.0.0/16", number=1, revocation="immediate", created_at=0.0
    )
    return Network(vpc=one, groups={"sg-1": group}, interfaces={"eni-1": interface})
