"""The composition root: everything is built here, and only here does everything know of each other.

Start: the lock of the state directory, who we are, the store, the cgroup tree, id ranges, slots,
images, then the supervisors, which take over what an earlier agent left; last the control socket.
Leaving is cancelling: containers run on under their keepers, the next agent finds them.

In a copied or restored state directory the agent is another one, and the tasks that the directory
remembers are recorded as lost.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from sandbox.agent.config import Config, read_config
from sandbox.agent.state_directory import Identity, hold, identify, keep, made
from sandbox.api import local
from sandbox.api.local import Presence
from sandbox.control import floor, owners, retention
from sandbox.control.capacity import Capacity
from sandbox.control.images import Images
from sandbox.control.tasks import Tasks
from sandbox.errors import ConfigError, KernelError
from sandbox.images.credentials import Credentials, DockerConfig
from sandbox.images.image_store import ImageStore
from sandbox.images.layers import LayerStore
from sandbox.images.registry import RegistryClient
from sandbox.images.rootfs import RootfsStore
from sandbox.kernel import filesystems, oom
from sandbox.kernel.cgroups import CgroupTree
from sandbox.kernel.filesystems import FilesystemPool
from sandbox.kernel.idranges import CLAIMS, IdRanges
from sandbox.kernel.slots import SlotPool
from sandbox.model import fargate
from sandbox.model.fargate import Era
from sandbox.model.names import Place
from sandbox.model.task import Status, StopCode
from sandbox.network.eni import Interfaces
from sandbox.runtime.node import Failpoints, Node
from sandbox.runtime.supervisors import Supervisors
from sandbox.store import rows
from sandbox.store.sqlite import SqliteStore

_BIN: Final = Path(__file__).resolve().parents[1] / "_bin"
_CAP_SYS_RESOURCE: Final = 24
LOST_REASON: Final = "the state directory was copied or restored: the task ran elsewhere"


class Agent:
    """A running agent; `open_agent` makes it."""

    def __init__(
        self, node: Node, supervisors: Supervisors, config: Config, presence: Presence
    ) -> None:
        self.node = node
        self.instance = node.instance
        self.state_dir = node.state_dir
        self.presence = presence
        self.supervisors = supervisors
        self.config = config
        self.tasks = Tasks(node, supervisors, _capacity(config), era=_era(config))
        self.images = Images(node.images, node.store)

    def reload(self, settings: Mapping[str, Any]) -> None:
        """Take over what a running agent can change: its limits, its era and retention."""
        self.config = read_config(settings)
        self.tasks.capacity = _capacity(self.config)
        self.tasks.era = _era(self.config)


def _era(config: Config) -> Era | None:
    return None if config.era == "current" else config.era


def _capacity(config: Config) -> Capacity:
    return Capacity(
        max_tasks=config.max_tasks,
        host_free_memory_mib=config.host_free_memory_mib,
        host_free_storage_mib=config.host_free_storage_mib,
        memory_overcommit=config.memory_overcommit,
        cpu_overcommit=config.cpu_overcommit,
        storage_overcommit=config.storage_overcommit,
    )


@contextlib.asynccontextmanager
async def open_agent(
    state_dir: Path,
    run_dir: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    resident: bool = False,
) -> AsyncGenerator[Agent]:
    """An agent in the caller's trio loop, serving its control socket, until the block is left.

    Raises AgentRunning when another one holds the state directory, ConfigError when the host or a
    setting is not usable. A `resident` agent may be given tasks that outlive their clients.
    """
    config = read_config(settings or {})
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(hold(state_dir))
        identity, kept = identify(state_dir)
        store = SqliteStore.open(state_dir / "store.db", reserve=state_dir / "reserve")
        stack.push_async_callback(_close_store, store)
        if kept is None:
            _check_nothing_runs(state_dir, store)
        failpoints = Failpoints(os.environ.get("SANDBOX_FAILPOINT", ""))
        if kept not in (None, identity):  # it is a copy
            await _record_as_lost(store)
        failpoints.reach("identity.do")
        keep(identity, state_dir)
        failpoints.reach("identity.done")
        tree = CgroupTree.open(identity.instance)
        stack.callback(_leave_tree, tree)
        node = await stack.enter_async_context(
            _node(state_dir, identity, config, store, tree, failpoints, resident=resident)
        )
        _log_start(node)
        agent = Agent(node, Supervisors(node), config, Presence(resident=resident))
        listener = local.listen(made(run_dir) / "agent.sock")
        stack.callback(_unlink, run_dir / "agent.sock")
        async with trio.open_nursery() as nursery:
            if node.filesystems is not None:
                nursery.start_soon(node.filesystems.serve)
            nursery.start_soon(store.until_broken)
            await nursery.start(node.slots.serve)
            await nursery.start(agent.supervisors.serve)
            nursery.start_soon(owners.serve, node.store, agent.tasks.stop)
            nursery.start_soon(retention.serve, node.store, agent.tasks, lambda: agent.config)
            nursery.start_soon(
                floor.serve,
                state_dir,
                lambda: agent.config.host_free_storage_mib,
                agent.supervisors.footprints,
                agent.tasks.evict,
            )
            await nursery.start(local.serve, agent, listener)
            try:
                yield agent
            finally:
                nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _node(
    state_dir: Path,
    identity: Identity,
    config: Config,
    store: SqliteStore,
    tree: CgroupTree,
    failpoints: Failpoints,
    *,
    resident: bool,
) -> AsyncIterator[Node]:
    made(state_dir / "tasks")
    ranges = IdRanges(identity.instance, state_dir)
    ranges.recover(_ranges_in_use(store))
    unpacker_ids = ranges.claim()
    layers = LayerStore(
        state_dir / "images" / "layers", unpacker=_BIN / "unpack", id_base=unpacker_ids
    )
    layers.sweep()
    # One that may leave with its first task makes no more than that needs.
    storage = _storage(
        state_dir / "storage", config.warm_storage if resident else min(config.warm_storage, 1)
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ranges.close)
        stack.callback(ranges.release, unpacker_ids)
        registry = RegistryClient(insecure=config.insecure_registries)
        await stack.enter_async_context(registry)
        images = ImageStore(
            state_dir / "images",
            store,
            layers,
            registry,
            keep_blobs=config.keep_blobs,
            logins=_logins(config),
        )
        images.sweep()
        yield Node(
            state_dir=state_dir,
            instance=identity.instance,
            place=Place(config.account_id, config.region),
            store=store,
            tree=tree,
            slots=SlotPool(config.warm_slots, ranges.claim_many, ranges.release),
            ranges=ranges,
            images=images,
            roots=RootfsStore(layers),
            filesystems=storage,
            interfaces=Interfaces(),
            keeper=_BIN / "keeper",
            may_raise_limits=_has_capability(_CAP_SYS_RESOURCE),
            failpoints=failpoints,
        )


def _storage(directory: Path, reserve: int) -> FilesystemPool | None:
    """None, and tasks' storage without a bound, on a host that has not what it takes."""
    if filesystems.lacking() is not None:
        return None
    pool = FilesystemPool(directory, fargate.STORAGE.size_gib << 30, reserve)
    pool.sweep()
    return pool


def _logins(config: Config) -> Callable[[str], Credentials | None] | None:
    if config.docker_config is None:
        return None
    path = Path(config.docker_config)
    return lambda domain: DockerConfig.load(path).for_host(domain)


def _ranges_in_use(store: SqliteStore) -> set[int]:
    used = set()
    for task in rows.task_ids(store):
        row = rows.desired(store, task)
        if row and not rows.has_stopped(store, task):
            used.add(row.value.id_base)
    return used


def _check_nothing_runs(state_dir: Path, store: SqliteStore) -> None:
    """Whose it would be, in a directory that does not say who its agent is. No claim outlives a
    reboot, nor does what runs."""
    if any((CLAIMS / f"{first}").exists() for first in _ranges_in_use(store)):
        raise ConfigError(
            f"{state_dir}/instance is missing, but tasks of it run: restore it, or choose another"
            " state directory"
        )


async def _record_as_lost(store: SqliteStore) -> None:
    for task in rows.task_ids(store):
        row = rows.desired(store, task)
        if row is None:
            continue
        known = rows.known(store, task) or rows.not_yet_known(row.value)
        if known.last_status is Status.STOPPED:
            continue
        lost = msgspec.structs.replace(
            known,
            last_status=Status.STOPPED,
            version=known.version + 1,
            raised_event=True,
            stop_code=StopCode.INFRASTRUCTURE_HEALTH,
            stopped_reason=LOST_REASON,
            stopped_at=time.time(),
        )
        await store.txn({rows.known_key(task): lost})


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def protect_from_oom() -> str | None:
    """Let the kernel take a task's memory before this process; else why it would not.

    For a process that is an agent and nothing else. Keepers inherit it, their containers do not.
    """
    try:
        oom.lower()
    except KernelError as error:
        return f"{error}"
    return None


def _log_start(node: Node) -> None:
    """What an operator wants to know of this host later, when something is odd."""
    tree = node.tree
    if tree.enabled:
        place = tree.form.rpartition(": ")[2].rpartition("/")[0]
        node.log.info("controllers enabled", controllers=tree.enabled, cgroup=place)
    degraded = list(tree.degraded)
    if node.filesystems is None:
        degraded.append(f"tasks' storage has no limit: {filesystems.lacking()}")
    if not node.may_raise_limits:
        degraded.append("no CAP_SYS_RESOURCE: tasks' limits end at the agent's own")
    node.log.info(
        "agent starts",
        instance=node.instance,
        state_dir=f"{node.state_dir}",
        cgroup=tree.form,
        degraded=degraded,
    )


def _leave_tree(tree: CgroupTree) -> None:
    """An empty tree goes, one with tasks that run on stays."""
    with contextlib.suppress(KernelError):
        tree.remove()
    tree.close()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


async def _close_store(store: SqliteStore) -> None:
    with trio.CancelScope(shield=True):
        await store.aclose()
