"""The VPCs of this agent as kernel objects: one router namespace each, its uplink, and what the
host's own rules get once for all of them.

    open(vpc)      namespace, packet filter, sysctls, addresses, uplink        idempotent
    attach_gateway / detach_gateway      the default route                     idempotent
    route_blocks / withdraw_blocks       the host's routes to public blocks    idempotent
    delete(vpc)    uplink and pin go; the rest goes with the namespace         idempotent
    sweep(vpcs)    at start: what no VPC of these owns                         idempotent

The namespaces and all in them outlive the agent, and a new one opens them again: whatever `open`
finds, half made or whole, becomes as it should be. All names are functions of the instance id and
the VPC's id and number, so nothing has to be remembered to be undone.

Everything here may wait for the kernel's lock on links and routes, so it runs on one KernelThread,
in order. That thread is in the host's network namespace when it is given, and in the mount
namespace in which the pins shall be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from sandbox.errors import NetworkError
from sandbox.kernel import netns
from sandbox.kernel.rtnetlink import Rtnetlink
from sandbox.kernel.thread import KernelThread
from sandbox.model import names
from sandbox.model.vpc import Vpc
from sandbox.network import routers, uplinks
from sandbox.network.footprint import HostRules
from sandbox.network.routers import Router

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Fabric:
    """Close it with `aclose`; what it made stays. The thread stays its owner's."""

    def __init__(
        self, run_dir: Path, instance: str, public_pool: IPv4Network, thread: KernelThread
    ) -> None:
        self.instance = instance
        self.thread = thread
        self.host_rules = HostRules(instance, public_pool, run_dir / "forwarding.json")
        self._directory = run_dir / "vpc"
        self._transit = uplinks.transit(public_pool)
        self._host: Rtnetlink | None = None
        self._routers: dict[str, Router] = {}

    def router(self, vpc_id: str) -> Router:
        """Of a VPC that is open."""
        try:
            return self._routers[vpc_id]
        except KeyError:
            raise NetworkError(f"{vpc_id} has no router here") from None

    async def open(self, vpc: Vpc, prepare: Callable[[], None]) -> Router:
        """The VPC's router with its uplink; also after the VPC's record has changed.

        `prepare` loads the VPC's packet filter: it runs inside the namespace, before there is a
        link, again each time. If it fails nothing is reachable, and the next `open` goes on.
        """
        return await self.thread.run(self._open, vpc, prepare)

    async def inside(self, vpc_id: str, fn: Callable[[*Args], Result], *args: *Args) -> Result:
        """`fn(*args)` in the VPC's namespace: for rules, sets and sockets of it."""
        return await self.thread.run(self._inside, self.router(vpc_id), lambda: fn(*args))

    async def attach_gateway(self, vpc_id: str) -> None:
        """The VPC has an internet gateway: what has no other route leaves by the uplink."""
        await self.thread.run(uplinks.attach_gateway, self.router(vpc_id), self._transit)

    async def detach_gateway(self, vpc_id: str) -> None:
        await self.thread.run(uplinks.detach_gateway, self.router(vpc_id))

    async def route_blocks(self, vpc_id: str, blocks: Sequence[IPv4Network]) -> None:
        """The host reaches these public addresses in this VPC."""
        name = self._uplink(self.router(vpc_id).vpc)
        await self.thread.run(
            lambda: uplinks.route_blocks(self._home(), name, blocks, self._transit)
        )

    async def withdraw_blocks(self, vpc_id: str, blocks: Sequence[IPv4Network]) -> None:
        name = self._uplink(self.router(vpc_id).vpc)
        await self.thread.run(lambda: uplinks.withdraw_blocks(self._home(), name, blocks))

    async def delete(self, vpc: Vpc) -> None:
        """Also one that was never opened, or only half made. Tasks that are still in it are cut
        off from the host; the namespace itself goes with the last of them."""
        await self.thread.run(self._delete, vpc)

    async def sweep(self, known: Iterable[Vpc]) -> list[str]:
        """Remove routers and uplinks that no VPC of `known` has, and say which those were.

        Only in our run directory, and only links with our instance id. Call it before `open`.
        """
        return await self.thread.run(self._sweep, list(known))

    async def remove_all(self) -> None:
        """Every VPC and the host's rules: nothing of this agent's network is left."""
        await self.sweep(())
        await self.thread.run(self.host_rules.remove)

    async def aclose(self) -> None:
        """Let go; what was made stays for the next agent."""
        await self.thread.run(self._close)

    # On the thread ----------------------------------------------------------------------------

    def _open(self, vpc: Vpc, prepare: Callable[[], None]) -> Router:
        router = self._routers.get(vpc.vpc_id)
        if router is None:
            router = routers.open_router(self._directory, vpc, prepare)
            self._routers[vpc.vpc_id] = router
        else:
            router.vpc = vpc
            routers.furnish(router, prepare)
        uplinks.create_uplink(self._home(), router, self._uplink(vpc), self._transit)
        return router

    def _inside(self, router: Router, fn: Callable[[], Result]) -> Result:
        with netns.within(router.netns_fd):
            return fn()

    def _delete(self, vpc: Vpc) -> None:
        uplinks.delete_uplink(self._home(), self._uplink(vpc))
        self._forget(vpc.vpc_id)
        routers.delete_router(self._directory, vpc.vpc_id)

    def _sweep(self, known: list[Vpc]) -> list[str]:
        ids = {vpc.vpc_id for vpc in known}
        links = {self._uplink(vpc) for vpc in known}
        swept = []
        for name in routers.link_names():
            if names.is_link(self.instance, name) and name not in links:
                uplinks.delete_uplink(self._home(), name)
                swept.append(name)
        for vpc_id in routers.pinned_routers(self._directory):
            if vpc_id not in ids:
                self._forget(vpc_id)
                routers.delete_router(self._directory, vpc_id)
                swept.append(vpc_id)
        return swept

    def _forget(self, vpc_id: str) -> None:
        router = self._routers.pop(vpc_id, None)
        if router is not None:
            router.close()

    def _close(self) -> None:
        for vpc_id in list(self._routers):
            self._forget(vpc_id)
        if self._host is not None:
            self._host.close()
            self._host = None

    def _home(self) -> Rtnetlink:
        if self._host is None:
            self._host = Rtnetlink()
        return self._host

    def _uplink(self, vpc: Vpc) -> str:
        return names.uplink(self.instance, vpc.number)
