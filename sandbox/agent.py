"""The composition root: everything is built here, and only here does everything know of each other.

Start: the lock of the state directory, who we are, the store, the cgroup tree, id ranges, slots,
images, then the supervisors, which take over what an earlier agent left; last the control socket.
Leaving is cancelling: containers run on under their keepers, the next agent finds them.

The instance id is random and stored with the state directory's device, inode and the machine's id.
A copied or restored directory differs in them: it gets a new id, so that it never sweeps what the
original made, and the tasks it remembers are recorded as lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import trio

from sandbox.api import local
from sandbox.api.local import Presence
from sandbox.control import floor, owners, retention
from sandbox.control.capacity import Capacity
from sandbox.control.images import Images
from sandbox.control.tasks import Tasks
from sandbox.errors import AgentRunning, ConfigError, KernelError
from sandbox.images.credentials import Credentials, DockerConfig
from sandbox.images.image_store import ImageStore
from sandbox.images.layers import LayerStore
from sandbox.images.registry import RegistryClient
from sandbox.images.rootfs import RootfsStore
from sandbox.kernel import filesystems, oom
from sandbox.kernel.cgroups import CgroupTree
from sandbox.kernel.filesystems import FilesystemPool
from sandbox.kernel.idranges import CLAIMS, IdRanges
from sandbox.kernel.processes import is_zombie, start_time
from sandbox.kernel.slots import SlotPool
from sandbox.model import fargate, names
from sandbox.model.fargate import Era
from sandbox.model.names import Place
from sandbox.model.task import Status, StopCode
from sandbox.network.eni import Interfaces
from sandbox.runtime.node import Failpoints, Node
from sandbox.runtime.supervisors import Supervisors
from sandbox.store import rows
from sandbox.store.sqlite import SqliteStore

_BIN: Final = Path(__file__).resolve().parent / "_bin"
_CAP_SYS_RESOURCE: Final = 24
_LAST_CHILD_S: Final = 5
LOST_REASON: Final = "the state directory was copied or restored: the task ran elsewhere"


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Factor = Annotated[float, msgspec.Meta(gt=0)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/etc/sandbox/agent.toml, or the keyword arguments of `open_sandbox`: docs/guide/agent.md."""

    account_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{12}\Z")] = "123456789012"
    region: Annotated[str, msgspec.Meta(pattern=r"\A[a-z]+(-[a-z0-9]+)+\Z")] = "us-east-1"
    era: Literal["current", "2017"] = "current"
    """Whose rules a task definition is held to: Fargate's of today, or those of its launch."""
    max_tasks: _Count = 2000
    host_free_memory_mib: _Count | None = None
    host_free_storage_mib: _Count | None = None
    memory_overcommit: _Factor | None = None
    cpu_overcommit: _Factor | None = None
    storage_overcommit: _Factor | None = None
    """How much of the host all tasks together may be promised: 1.0 is all of it once."""
    warm_slots: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 16
    """How many user and network namespaces are kept ready."""
    warm_storage: Annotated[int, msgspec.Meta(ge=0, le=256)] = 4
    """How many file systems for tasks are kept ready."""
    insecure_registries: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    """Hosts that may be spoken to over plain http; loopback always may."""
    docker_config: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """A `config.json` as `docker login` writes it, read anew for each pull."""
    keep_blobs: bool = False
    """Keep layers also as they were transferred, to push images on unchanged."""
    stopped_tasks_kept_s: _Count = 3600
    stopped_tasks_kept: _Count = 1000


def read_config(settings: Mapping[str, Any]) -> Config:
    """ConfigError, with the key first, for what is no setting or no value for it."""
    try:
        return msgspec.convert(dict(settings), Config)
    except msgspec.ValidationError as error:
        what, _, where = f"{error}".partition(" - at `$.")
        key = f"{where.removesuffix('`')}: " if where else ""
        raise ConfigError(f"configuration: {key}{what[:1].lower()}{what[1:]}") from None


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The file `instance` of a state directory."""

    instance: str
    device: int
    inode: int
    machine: str

    def is_of(self, other: Identity) -> bool:
        mine = (self.device, self.inode, self.machine)
        return mine == (other.device, other.inode, other.machine)


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
        stack.enter_context(_hold(state_dir))
        identity, kept = _identify(state_dir)
        store = SqliteStore.open(state_dir / "store.db", reserve=state_dir / "reserve")
        stack.push_async_callback(_close_store, store)
        if kept is None:
            _check_nothing_runs(state_dir, store)
        failpoints = Failpoints(os.environ.get("SANDBOX_FAILPOINT", ""))
        if kept not in (None, identity):  # it is a copy
            await _record_as_lost(store)
        failpoints.reach("identity.do")
        _keep(identity, state_dir)
        failpoints.reach("identity.done")
        tree = CgroupTree.open(identity.instance)
        stack.callback(_leave_tree, tree)
        node = await stack.enter_async_context(
            _node(state_dir, identity, config, store, tree, failpoints, resident=resident)
        )
        _log_start(node)
        agent = Agent(node, Supervisors(node), config, Presence(resident=resident))
        listener = local.listen(_made(run_dir) / "agent.sock")
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
    _made(state_dir / "tasks")
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


def _made(directory: Path) -> Path:
    with _usable(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None


@contextlib.contextmanager
def _hold(state_dir: Path) -> Iterator[None]:
    """The lock of one agent a state directory; the kernel lets it go when we die.

    It is on the directory itself: a file in it could be taken away, and the next agent would lock
    another one of that name. The file is for agents that know no other lock, and tells commands
    that this is a state directory.
    """
    if os.geteuid() != 0:
        raise ConfigError("sandbox needs root: namespaces, cgroups and mounts are made directly")
    with contextlib.ExitStack() as held:
        file = state_dir / "lock"
        _lock(held, _made(state_dir), os.O_RDONLY | os.O_DIRECTORY, file)
        fd = _lock(held, file, os.O_RDWR | os.O_CREAT, file)
        with _usable(file):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
        yield


def _lock(held: contextlib.ExitStack, path: Path, flags: int, file: Path) -> int:
    with _usable(path):
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    held.callback(os.close, fd)
    deadline = time.monotonic() + _LAST_CHILD_S
    while not _locked(fd):
        if not _has_died(file) or time.monotonic() > deadline:
            raise AgentRunning(
                f"another agent holds {file.parent}: wait for its tasks, with which it leaves if a"
                " command started it; stop it if it is a resident one; or name another --state-dir"
            )
        time.sleep(0.005)
    return fd


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_died(file: Path) -> bool:
    """Of the agent that the lock's file names: one that was killed while it started a program holds
    its locks a moment longer, by the child that has not executed anything yet."""
    try:
        pid, started = map(int, file.read_text().split())
    except (OSError, ValueError):
        return False
    return start_time(pid) != started or is_zombie(pid)


def _identify(state_dir: Path) -> tuple[Identity, Identity | None]:
    """Who this directory's agent is, and what was written down: another one's in a copy.

    Written down (`_keep`) only after the tasks of a copy were recorded as lost: if we die before
    that, it is still seen to be a copy.
    """
    status = state_dir.stat()
    here = Identity(
        instance=names.instance_id(secrets.token_bytes(2)),
        device=status.st_dev,
        inode=status.st_ino,
        machine=_machine_id(),
    )
    path = state_dir / "instance"
    try:
        with _usable(path):
            kept = msgspec.json.decode(path.read_bytes(), type=Identity) if path.exists() else None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}: remove the file if no task of it runs") from None
    if kept is not None and kept.is_of(here):
        return kept, kept
    return here, kept


def _check_nothing_runs(state_dir: Path, store: SqliteStore) -> None:
    """Whose it would be, in a directory that does not say who its agent is. No claim outlives a
    reboot, nor does what runs."""
    if any((CLAIMS / f"{first}").exists() for first in _ranges_in_use(store)):
        raise ConfigError(
            f"{state_dir}/instance is missing, but tasks of it run: restore it, or choose another"
            " state directory"
        )


def _keep(identity: Identity, state_dir: Path) -> None:
    path, text = state_dir / "instance", msgspec.json.encode(identity)
    if path.exists() and path.read_bytes() == text:
        return
    fresh = path.with_suffix(".new")
    with _usable(path):
        with fresh.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def _machine_id() -> str:
    """machine-id(5); hosts without one are told apart by device and inode alone."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


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
