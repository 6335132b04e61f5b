"""Commands in a running container: exec and health checks.

A second keeper with a program that joins the container: cgroup first, then all of its namespaces by
the pidfd of its first process in one setns, then the same filter, capabilities and ids as that one
had. Nothing of the agent enters the task; the keeper's child is not dumpable until its exec, so a
process that lies in wait can neither trace it nor open what it holds.

Each command has a cgroup below the container's, which limits nothing: one that is cancelled, and a
health check in any case, ends with everything that it has started.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from sandbox.errors import InvalidParameterException, KernelError, SandboxError, TaskFailed
from sandbox.images.documents import ImageConfig
from sandbox.kernel.cgroups import Cgroup, Members
from sandbox.kernel.program import Program
from sandbox.model import names
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition
from sandbox.runtime import keeper as keepers
from sandbox.runtime.container import (
    Identity,
    choose_limits,
    compile_exec,
    container_environment,
)
from sandbox.runtime.keeper import Ended, Keeper, StartFailed
from sandbox.runtime.node import Node

_KILL_TIMEOUT_S: Final = 10.0
_ENDING_S: Final = 0.1
"""A container that is killed takes an exec that joins it along, in any order."""


class Target:
    """A running container, as an exec sees it."""

    def __init__(
        self,
        node: Node,
        task: str,
        id_base: int,
        definition: ContainerDefinition,
        config: ImageConfig,
        keeper: Keeper,
        hostname: str,
    ) -> None:
        self.node = node
        self._task = task
        self._id_base = id_base
        self._definition = definition
        self._config = config
        self._keeper = keeper
        self._hostname = hostname

    async def start(self, request: ExecRequest, streams: Streams) -> Command:
        """Raises TaskFailed with a shell's exit code when the command cannot be started."""
        cgroup = self.node.tree.find(names.container_cgroup(self._task, self._definition.name))
        if cgroup is None:
            raise self._not_running()
        name = _name(secrets.token_hex(8))
        status_dir = self.node.container_dir(self._task, self._definition.name) / name
        nest = cgroup.find_nest(name)
        try:
            cgroup.nest(name)
            program = self._compile(request, streams, cgroup, nest)
            keeper = await keepers.start(program, binary=self.node.keeper, status_dir=status_dir)
            return Command(keeper, nest)
        except BaseException as error:
            with contextlib.suppress(KernelError):
                await _kill(nest)  # it may have run, and not be held
            await _discard(status_dir, nest)
            if isinstance(error, StartFailed):
                raise await self._refused(error, request.command[0]) from None
            raise
        finally:
            cgroup.close()
            nest.close()

    def _compile(
        self, request: ExecRequest, streams: Streams, cgroup: Cgroup, nest: Members
    ) -> Program:
        pidfd = self._keeper.init_pidfd
        if pidfd is None:
            raise self._not_running()
        user = self._identity(request)
        variables = container_environment(
            self._definition, self._config, self._hostname, self.node.place.region, user.home
        )
        return compile_exec(
            pidfd=pidfd,
            cgroup=nest.directory_fd,
            tasks_files=cgroup.tasks_fds,
            id_base=self._id_base,
            definition=self._definition,
            words=request.command,
            variables=variables | request.environment,
            user=user,
            working_directory=self._directory(request),
            limits=choose_limits(self._definition.ulimits, self.node.host_limits()),
            terminal=request.terminal,
            streams=streams,
        )

    async def _refused(self, error: StartFailed, command: str) -> SandboxError:
        if not error.is_exec:
            if await self._keeper.ends_within(_ENDING_S):
                return self._not_running()
            if error.call == "workdir":
                text = f'exec: working directory "{error.subject}": {os.strerror(error.errno)}'
                return TaskFailed(text, 126)
            return KernelError(error.call, error.subject, error.errno)
        if error.errno == 2:
            return TaskFailed(f'exec: "{command}": executable file not found in $PATH', 127)
        return TaskFailed(f'exec: "{command}": {os.strerror(error.errno)}', 126)

    def _not_running(self) -> InvalidParameterException:
        return InvalidParameterException(f"container {self._definition.name} is not running")

    def _directory(self, request: ExecRequest) -> str:
        own = self._definition.working_directory or self._config.working_dir
        return request.working_directory or own or "/"

    def _identity(self, request: ExecRequest) -> Identity:
        own = self._definition.user if self._definition.user is not None else self._config.user
        pid = self._keeper.identity.init_pid
        try:
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise self._not_running() from None
        try:
            wanted = request.user if request.user is not None else own
            user = self.node.roots.resolve_user(root, wanted)
        finally:
            os.close(root)
        return Identity(uid=user.uid, gid=user.gid, groups=user.groups, home=user.home)


class Command:
    """A command that was started in a container."""

    def __init__(self, keeper: Keeper, cgroup: Members) -> None:
        self.id = _id(keeper.status_dir)
        self.keeper = keeper
        self._cgroup = cgroup

    async def leave(self, *, kill: bool) -> None:
        """Let go of it; `kill` ends it before, and everything that it has started."""
        with trio.CancelScope(shield=True):
            if kill:
                await _kill(self._cgroup)
            await self.keeper.see_out()
            self.keeper.close()
            await _discard(self.keeper.status_dir, self._cgroup)


async def run(
    target: Target,
    request: ExecRequest,
    streams: Streams,
    running: dict[str, Keeper],
    started: Callable[[str], None] | None = None,
) -> int:
    """The exit code. `running` has the exec's keeper while it runs, by the exec's id.

    What the command leaves running in the background runs on, unless this is cancelled.
    TaskFailed with code 125 when the client's descriptors did not take all output.
    """
    reach = target.node.failpoints.reach
    reach("exec.do")
    command = await target.start(request, streams)
    reach("exec.done")
    running[command.id] = command.keeper
    if started is not None:
        started(command.id)
    end = None
    losses: tuple[str, ...] = ()
    try:
        end = await command.keeper.wait()
        await command.keeper.wait_gone()
        losses = keepers.read_losses(command.keeper.status_dir)
    finally:
        del running[command.id]
        reach("exec.undo")
        await command.leave(kill=end is None)
        reach("exec.undone")
    if losses:
        raise TaskFailed("; ".join(losses), 125)
    return end.exit_code if isinstance(end, Ended) else 137


async def end_all(container_dir: Path, cgroup: Cgroup | None) -> None:
    """After an agent that died: nobody waits for its execs any more."""
    fences: list[int] = []
    for status_dir in list(container_dir.glob("exec.*")):
        nest = cgroup.find_nest(status_dir.name) if cgroup else None
        found = await keepers.find(status_dir, fences)
        if isinstance(found, Keeper):
            found.signal(signal.SIGKILL)
            if nest is not None:
                nest.kill()
            await found.see_out()
            found.close()
        await _discard(status_dir, nest)
    for fence in fences:  # a keeper that comes late finds no place for its lock
        os.close(fence)


async def _kill(cgroup: Members) -> None:
    with trio.CancelScope(shield=True):
        cgroup.kill()
        await cgroup.wait_empty(_KILL_TIMEOUT_S)


async def _discard(status_dir: Path, cgroup: Members | None) -> None:
    with trio.CancelScope(shield=True):
        if cgroup is not None:
            with contextlib.closing(cgroup), contextlib.suppress(KernelError):
                if not cgroup.populated():
                    cgroup.remove()
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(shutil.rmtree, status_dir, True)


def _name(exec_id: str) -> str:
    """Of an exec's status directory and of its cgroup; a container's files have no such name."""
    return f"exec.{exec_id}"


def _id(status_dir: Path) -> str:
    return status_dir.name.partition(".")[2]
