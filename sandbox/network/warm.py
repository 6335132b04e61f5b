"""Interfaces that are ready before there is a task for them.

A slot (`kernel.slots`) and the links of an interface are made together and handed out together; the
interface's id is minted with them, so that the names of its links are functions of ids from the
start. `join` then makes it the interface of a record: two sends, and its namespace is held by the
slot's descriptors alone.

    take(vpc)   from the VPC's pool, or made now        join(ready, record, subnet)
    leave(record)   addresses go at once; the links go with the task's namespace, which is seen to

There is a pool for each VPC that has ever been asked for an interface, and for those that are told
to be `kept_warm`; `serve` refills behind the request. Nothing is taken down link by link: a slot is
closed, and the kernel does the rest in the background. What a killed agent had ready goes with its
descriptors.

All acts on the kernel are on one KernelThread, as each may wait for its lock on links.
"""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import trio

from sandbox.errors import KernelError, SandboxError
from sandbox.kernel.slots import Slot, SlotPool
from sandbox.kernel.thread import KernelThread
from sandbox.model import names
from sandbox.model.vpc import NetworkInterface, Subnet
from sandbox.network import eni, routers
from sandbox.network.eni import Pair
from sandbox.network.fabric import Fabric
from sandbox.network.routers import Router

_RETRY_S = (1.0, 30.0)
"""A refill that failed is tried again after the first, doubling up to the second."""

_GONE_WITHIN_S = 10.0
"""A namespace is taken down in the background; 1000 of them took a third of a second."""

_LOOK_AGAIN_S = 0.05
_POOLS_MAX = 64
_MINTED_MAX = 4
"""Ids tried, if links of that name are there: eight random digits are seldom another's."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A slot with an interface that has no address yet. Its owner joins or discards it."""

    network_interface_id: str
    vpc_id: str
    slot: Slot
    pair: Pair

    @property
    def mac_address(self) -> str:
        return names.mac_address(self.network_interface_id)


class WarmInterfaces:
    """`size` interfaces ready for each VPC. `release` takes back the id range of an unused slot."""

    def __init__(
        self,
        fabric: Fabric,
        slots: SlotPool,
        release: Callable[[int], None],
        thread: KernelThread,
        size: int,
        *,
        random: Callable[[int], bytes] = os.urandom,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`report` is told of links that had to be deleted, in one line each."""
        self._fabric = fabric
        self._instance = fabric.instance
        self._slots = slots
        self._release = release
        self._thread = thread
        self._size = size
        self._random = random
        self._report = report
        self._pools: dict[str, deque[Ready]] = {}
        self._changed = trio.Event()
        self._making = trio.Lock()
        self._leaving: dict[str, tuple[Router, float]] = {}

    def ready(self, vpc_id: str) -> int:
        return len(self._pools[vpc_id]) if vpc_id in self._pools else 0

    def keep_warm(self, vpc_id: str) -> None:
        """From now on, also if nobody asks for an interface; the VPC must be open."""
        self._fabric.router(vpc_id)
        self._pool(vpc_id)
        self._changed.set()

    async def take(self, vpc_id: str) -> Ready:
        """An interface of the VPC; immediate when one is ready. Its id range stays claimed."""
        await trio.lowlevel.checkpoint()  # before the pop: a cancelled caller would lose it
        self._fabric.router(vpc_id)  # one that is not open gets no pool
        pool = self._pool(vpc_id)
        self._changed.set()
        if pool:
            return pool.popleft()
        return await self._make(vpc_id)

    async def join(self, ready: Ready, interface: NetworkInterface, subnet: Subnet) -> None:
        """Make it the interface of the record, whose id it has. Afterwards nothing of it is held
        here; if it fails, closing the slot undoes what was done.

        The VPC's sets must have its addresses before (`network` policy), or its first packets are
        dropped.
        """
        await self._thread.run(self._join, ready, interface, subnet)

    async def rejoin(self, interface: NetworkInterface, subnet: Subnet, netns_fd: int) -> None:
        """For a namespace that is held otherwise: of a task that an earlier agent started, or one
        that lost its own. Makes links if there are none; idempotent."""
        await self._thread.run(self._rejoin, interface, subnet, netns_fd)

    async def leave(self, interface: NetworkInterface) -> None:
        """Its addresses lead nowhere when this returns; its links go once the task's namespace is
        closed, which `serve` makes sure of. Idempotent."""
        router = self._fabric.router(interface.vpc_id)
        if await self._thread.run(eni.leave, router, self._instance, interface):
            name = names.link(self._instance, interface.network_interface_id)
            self._leaving[name] = (router, trio.current_time() + _GONE_WITHIN_S)
            self._changed.set()

    def discard(self, ready: Ready) -> None:
        """One that was taken and has not joined."""
        ready.pair.close()
        ready.slot.close()
        self._release(ready.slot.id_base)

    async def forget(self, vpc_id: str) -> None:
        """Keep none ready any more, and look after none that leaves. Before the VPC is deleted."""
        pool = self._pools.pop(vpc_id, deque())
        for name, (router, _) in list(self._leaving.items()):
            if router.vpc.vpc_id == vpc_id:
                del self._leaving[name]
        while pool:
            self.discard(pool.popleft())
        async with self._making:
            pass  # one that was being made found its pool gone, and is discarded

    async def sweep(self, vpc_id: str, known: Collection[str]) -> list[str]:
        """Delete links of the VPC that no interface of `known` ids has; say which. At start."""
        router = self._fabric.router(vpc_id)
        wanted = {names.link(self._instance, each) for each in known}
        present = await self._fabric.inside(vpc_id, routers.link_names)
        swept = []
        for name in present:
            if names.is_link(self._instance, name) and name not in wanted:
                await self._thread.run(eni.delete_link, router, name)
                swept.append(name)
        return swept

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Refill and look after those that leave until cancelled, then give back what is ready.

        A refill that fails is only tried again later: `take` on an empty pool makes its own, so
        whoever needs one gets the error itself.
        """
        delay = _RETRY_S[0]
        try:
            while True:
                self._changed = trio.Event()
                timeout = await self._look_after_leaving()
                try:
                    await self._refill()
                except SandboxError:
                    timeout, delay = min(timeout, delay), min(delay * 2, _RETRY_S[1])
                else:
                    delay = _RETRY_S[0]
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                with trio.move_on_after(timeout):
                    await self._changed.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Give back what is ready."""
        for pool in self._pools.values():
            while pool:
                self.discard(pool.popleft())

    # -----------------------------------------------------------------------------------------

    def _pool(self, vpc_id: str) -> deque[Ready]:
        """Those of the longest ago are given up beyond _POOLS_MAX: what is ready costs memory."""
        pool = self._pools.pop(vpc_id, deque())
        self._pools[vpc_id] = pool
        if len(self._pools) > _POOLS_MAX:
            oldest = self._pools.pop(next(iter(self._pools)))
            while oldest:
                self.discard(oldest.popleft())
        return pool

    async def _refill(self) -> None:
        """Of every VPC, whatever becomes of another's; the last failure is raised."""
        failure: SandboxError | None = None
        for vpc_id, pool in list(self._pools.items()):
            try:
                await self._fill(vpc_id, pool)
            except SandboxError as error:
                failure = error
        if failure is not None:
            raise failure

    async def _fill(self, vpc_id: str, pool: deque[Ready]) -> None:
        while self._pools.get(vpc_id) is pool and len(pool) < self._size:
            async with self._making:
                made = await self._make(vpc_id)
                if self._pools.get(vpc_id) is not pool:
                    self.discard(made)
                    return
                pool.append(made)

    async def _make(self, vpc_id: str) -> Ready:
        router = self._fabric.router(vpc_id)
        slot = await self._slots.take()
        try:
            network_interface_id, pair = await self._thread.run(self._pair, router, slot.netns_fd)
        except BaseException:
            slot.close()
            self._release(slot.id_base)
            raise
        return Ready(network_interface_id, vpc_id, slot, pair)

    async def _look_after_leaving(self) -> float:
        """How long until somebody has to look again."""
        for name, (router, deadline) in list(self._leaving.items()):
            if router.route.index(name) is None:
                del self._leaving[name]
            elif trio.current_time() > deadline:
                del self._leaving[name]
                await self._thread.run(eni.delete_link, router, name)
                self._report(f"{name} was still there {_GONE_WITHIN_S:.0f} s after its task")
        return _LOOK_AGAIN_S if self._leaving else math.inf

    # On the thread ----------------------------------------------------------------------------

    def _pair(self, router: Router, netns_fd: int) -> tuple[str, Pair]:
        for _ in range(_MINTED_MAX):
            minted = names.ec2_id("eni", self._random(9))
            if router.route.index(names.link(self._instance, minted)) is None:
                return minted, eni.make_pair(router, self._instance, minted, netns_fd)
        raise KernelError("RTM_NEWLINK", f"an interface in {router.vpc.vpc_id}", errno.EEXIST)

    def _join(self, ready: Ready, interface: NetworkInterface, subnet: Subnet) -> None:
        router = self._fabric.router(interface.vpc_id)
        with_limit = interface.bandwidth_mbit
        try:
            eni.join(router, ready.pair, interface, subnet)
            if with_limit is not None:
                eni.limit_bandwidth(router, ready.pair, ready.slot.netns_fd, with_limit)
        finally:
            ready.pair.close()

    def _rejoin(self, interface: NetworkInterface, subnet: Subnet, netns_fd: int) -> None:
        router = self._fabric.router(interface.vpc_id)
        eni_id = interface.network_interface_id
        pair = eni.make_pair(router, self._instance, eni_id, netns_fd)
        try:
            eni.join(router, pair, interface, subnet)
            if interface.bandwidth_mbit is not None:
                eni.limit_bandwidth(router, pair, netns_fd, interface.bandwidth_mbit)
        finally:
            pair.close()
