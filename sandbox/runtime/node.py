"""What every supervisor works with: this host's stores, pools and trees, built by the agent."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import structlog
import trio

from sandbox.images.image_store import ImageStore
from sandbox.images.rootfs import RootfsStore
from sandbox.kernel.cgroups import CgroupTree
from sandbox.kernel.filesystems import FilesystemPool
from sandbox.kernel.idranges import IdRanges
from sandbox.kernel.rlimits import HostLimits
from sandbox.kernel.slots import SlotPool
from sandbox.model import names
from sandbox.model.names import Place
from sandbox.network.eni import Interfaces
from sandbox.store.base import Store


class Failpoints:
    """Names of moments at which the agent kills itself: the crash matrix chooses one.

    Every deed passes one before and one after it; a second passing of `x` is called `x#2`.
    `wanted` (SANDBOX_FAILPOINT) is empty outside of tests, and then nothing is remembered.
    """

    def __init__(self, wanted: str = "") -> None:
        self._wanted = wanted
        self._times: Counter[str] = Counter()
        self.passed: list[str] = []

    def reach(self, name: str) -> None:
        if not self._wanted:
            return
        self._times[name] += 1
        point = name if self._times[name] == 1 else f"{name}#{self._times[name]}"
        self.passed.append(point)
        if point == self._wanted:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(kw_only=True)
class Node:
    state_dir: Path
    instance: str
    place: Place
    store: Store
    tree: CgroupTree
    slots: SlotPool
    ranges: IdRanges
    images: ImageStore
    roots: RootfsStore
    filesystems: FilesystemPool | None
    """None on a host that cannot limit storage."""
    interfaces: Interfaces
    keeper: Path
    may_raise_limits: bool
    failpoints: Failpoints = field(default_factory=Failpoints)
    log: structlog.BoundLogger = field(default_factory=structlog.get_logger)
    lane: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(8))
    """How many tasks are being started at once; the others wait their turn."""

    def host_limits(self) -> HostLimits:
        """Read anew: a program that embeds the agent may change its own."""
        return HostLimits.read(may_raise=self.may_raise_limits)

    @cached_property
    def tasks_dir(self) -> Path:
        return self.state_dir / "tasks"

    def task_dir(self, task: str) -> Path:
        return self.tasks_dir / task

    def container_dir(self, task: str, container: str) -> Path:
        return self.task_dir(task) / names.container_directory(container)
