"""A task's interface, and what its containers are told about the network.

The namespace itself comes from the warm pool with the task's slot. As long as there is no VPC, a
task has `lo` and nothing else: nothing reaches it and it reaches nothing, its containers talk over
localhost. The door is the one through which interfaces will come: attach before the pull (Fargate's
order: connectivity first), detach when the last container has ended.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What every container of the task is given to read."""

    hostname: str
    hosts: str
    """/etc/hosts"""
    resolv_conf: str
    private_ip: str | None = None


class Interfaces:
    """All interfaces of this agent, by task."""

    async def attach(self, task: str, netns_fd: int) -> Interface:
        """Idempotent: attaching again gives what is there."""
        hostname = task[:12]
        hosts = f"127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost ip6-loopback\n"
        return Interface(hostname=hostname, hosts=hosts, resolv_conf="# no resolver: only lo\n")

    async def detach(self, task: str) -> None:
        """Idempotent. The namespace goes with its last descriptor; there is no link to delete."""
