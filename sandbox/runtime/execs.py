"""Commands in a running container: exec and health checks.

A second keeper with a program that joins the container: cgroup first, then all of its namespaces by
the pidfd of its first process in one setns, then the same filter, capabilities and ids as that one
had. Nothing of the agent enters the task; the keeper's child is not dumpable until its exec, so a
process that lies in wait can neither trace it nor open what it holds.
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

from sandbox.errors import InvalidParameterException, KernelError, TaskFailed
from sandbox.images.documents import ImageConfig
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

    async def start(
        self, request: ExecRequest, streams: Streams | None, status_dir: Path
    ) -> Keeper:
        """Raises TaskFailed with a shell's exit code when the command cannot be started."""
        pidfd = self._keeper.init_pidfd
        cgroup = self.node.tree.find(names.container_cgroup(self._task, self._definition.name))
        if pidfd is None or cgroup is None:
            raise InvalidParameterException(f"container {self._definition.name} is not running")
        try:
            user = self._identity(request)
            variables = container_environment(
                self._definition, self._config, self._hostname, self.node.place.region, user.home
            )
            definition_limits = choose_limits(
                self._definition.ulimits, may_raise=self.node.may_raise_limits
            )
            program = compile_exec(
                pidfd=pidfd,
                cgroup=cgroup.directory_fd,
                tasks_files=cgroup.tasks_fds,
                id_base=self._id_base,
                definition=self._definition,
                words=request.command,
                variables=variables | request.environment,
                user=user,
                working_directory=self._directory(request),
                limits=definition_limits,
                terminal=request.terminal,
                streams=streams,
            )
            return await keepers.start(program, binary=self.node.keeper, status_dir=status_dir)
        except StartFailed as error:
            if not error.is_exec and await self._keeper.ends_within(_ENDING_S):
                raise InvalidParameterException(
                    f"container {self._definition.name} is not running"
                ) from None
            raise _refused(error, request.command[0]) from None
        finally:
            cgroup.close()

    def _directory(self, request: ExecRequest) -> str:
        own = self._definition.working_directory or self._config.working_dir
        return request.working_directory or own or "/"

    def _identity(self, request: ExecRequest) -> Identity:
        own = self._definition.user if self._definition.user is not None else self._config.user
        pid = self._keeper.identity.init_pid
        try:
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise InvalidParameterException(
                f"container {self._definition.name} is not running"
            ) from None
        try:
            wanted = request.user if request.user is not None else own
            user = self.node.roots.resolve_user(root, wanted)
        finally:
            os.close(root)
        return Identity(uid=user.uid, gid=user.gid, groups=user.groups, home=user.home)

    def exec_dir(self) -> tuple[str, Path]:
        """A new id and the status directory for it."""
        exec_id = secrets.token_hex(8)
        directory = self.node.container_dir(self._task, self._definition.name)
        return exec_id, directory / f"exec.{exec_id}"


async def run(
    target: Target,
    request: ExecRequest,
    streams: Streams,
    running: dict[str, Keeper],
    started: Callable[[str], None] | None = None,
) -> int:
    """The exit code. `running` has the exec's keeper while it runs, by the exec's id."""
    exec_id, status_dir = target.exec_dir()
    reach = target.node.failpoints.reach
    try:
        reach("exec.do")
        keeper = await target.start(request, streams, status_dir)
        reach("exec.done")
        running[exec_id] = keeper
        if started is not None:
            started(exec_id)
        try:
            end = await keeper.wait()
            await keeper.wait_gone()
        finally:
            del running[exec_id]
            reach("exec.undo")
            await leave(keeper)
            reach("exec.undone")
        return end.exit_code if isinstance(end, Ended) else 137
    finally:
        await discard(status_dir)


async def leave(keeper: Keeper) -> None:
    """Cancelled or ended: nothing of it stays."""
    with trio.CancelScope(shield=True):
        keeper.signal(signal.SIGKILL)
        await keeper.see_out()
        keeper.close()


async def end_all(container_dir: Path) -> None:
    """After an agent that died: nobody waits for its execs any more."""
    fences: list[int] = []
    for status_dir in list(container_dir.glob("exec.*")):
        found = await keepers.find(status_dir, fences)
        if isinstance(found, Keeper):
            await leave(found)
        await discard(status_dir)
    for fence in fences:  # a keeper that comes late finds no place for its lock
        os.close(fence)


async def discard(status_dir: Path) -> None:
    with trio.CancelScope(shield=True), contextlib.suppress(OSError):
        await trio.to_thread.run_sync(shutil.rmtree, status_dir, True)


def _refused(error: StartFailed, command: str) -> TaskFailed | KernelError:
    if not error.is_exec:
        return KernelError(error.call, error.subject, error.errno)
    if error.errno == 2:
        return TaskFailed(f'exec: "{command}": executable file not found in $PATH', 127)
    return TaskFailed(f'exec: "{command}": {os.strerror(error.errno)}', 126)
