"""pidMode task: pid 1 of the pid namespace that the containers of a task share.

It is our own static init with no program to start: it reaps what is orphaned to it, in an empty
read-only root, without a capability. Its keeper holds it while an agent is away; its cgroup and
its status directory have names that no container can have. When it ends, the kernel kills all
that is left in its namespace, so it is the last to go.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Final

import trio

from sandbox.errors import KernelError
from sandbox.kernel import mounts
from sandbox.kernel.cgroups import Limits
from sandbox.kernel.processes import start_time
from sandbox.kernel.slots import Slot
from sandbox.model import names
from sandbox.runtime import keeper as keepers
from sandbox.runtime.container import compile_pause
from sandbox.runtime.keeper import Keeper
from sandbox.runtime.node import Node

_ROOT_BYTES: Final = 4096


async def enter(node: Node, task: str, slot: Slot) -> Keeper:
    """Make the task's pid namespace, or find the one that an earlier agent made."""
    return await find(node, task) or await _start(node, task, slot)


async def find(node: Node, task: str) -> Keeper | None:
    """That of an earlier agent. What is there without a living keeper goes."""
    status_dir, fences = _status_dir(node, task), list[int]()
    found = await keepers.find(status_dir, fences)
    if isinstance(found, Keeper):
        return found
    await trio.to_thread.run_sync(shutil.rmtree, status_dir, True)
    for fence in fences:  # one that was spawned and comes now finds no place for its lock
        os.close(fence)
    return None


async def _start(node: Node, task: str, slot: Slot) -> Keeper:
    with contextlib.ExitStack() as opened:
        root = mounts.tmpfs(_ROOT_BYTES, 0o555, slot.id_base, slot.id_base)
        opened.callback(os.close, root)
        cgroup = node.tree.create(names.pause_cgroup(task), Limits())
        opened.callback(cgroup.close)
        program = compile_pause(
            userns=slot.userns_fd,
            netns=slot.netns_fd,
            id_base=slot.id_base,
            cgroup=cgroup.directory_fd,
            tasks_files=cgroup.tasks_fds,
            root=root,
        )
        status_dir = _status_dir(node, task)
        return await keepers.start(
            program,
            binary=node.keeper,
            status_dir=status_dir,
            spawned=lambda: node.failpoints.reach("pids.spawned"),
        )


def open_namespace(keeper: Keeper) -> int:
    """The pid namespace that this keeper's init is pid 1 of; the caller closes it."""
    pid = keeper.identity.init_pid
    try:
        fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError("open", f"/proc/{pid}/ns/pid", error.errno or errno.EIO) from None
    if start_time(pid) == keeper.identity.init_start_time:
        return fd
    os.close(fd)
    raise KernelError("open", f"/proc/{pid}/ns/pid", errno.ESRCH)


async def leave(node: Node, task: str, keeper: Keeper | None) -> None:
    """Kill it, with everything that is left in its namespace. `keeper` None: it is looked for."""
    cgroup = node.tree.find(names.pause_cgroup(task))
    if cgroup is not None:
        with contextlib.closing(cgroup):
            cgroup.kill()
    keeper = keeper or await find(node, task)
    if keeper is not None:
        with contextlib.closing(keeper):
            await keeper.see_out()
        await trio.to_thread.run_sync(shutil.rmtree, _status_dir(node, task), True)


def _status_dir(node: Node, task: str) -> Path:
    return node.task_dir(task) / names.pause_directory()
