"""The containers of one task: started, attended to, entered, started again, stopped.

What may happen is decided elsewhere (`ordering`, the supervisor); here it happens, and what came of
it goes into the task's record. A container is a keeper, a cgroup and a status directory for each
start; its writable layer and its log directories outlive a restart in place.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from sandbox.errors import InvalidParameterException, KernelError, SandboxError
from sandbox.images.documents import Image, ImageConfig
from sandbox.kernel.processes import age
from sandbox.kernel.slots import Slot
from sandbox.model import names
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition
from sandbox.runtime import execs, health, launch, ordering, recovery, steps
from sandbox.runtime.container import choose_limits
from sandbox.runtime.keeper import Ended, Failed, Keeper, Lost, StartFailed, read_losses
from sandbox.runtime.node import Node
from sandbox.runtime.record import Record
from sandbox.runtime.recovery import Found
from sandbox.runtime.steps import ContainerScene, Scene

DEFAULT_STOP_TIMEOUT_S: Final = 30
_PAUSE_S: Final = 0.01
_TELLS_S = 30.0
"""A killed process leaves when its last system call lets it; then its keeper tells."""
_OOM_REASON: Final = "OutOfMemoryError: Container killed due to memory usage"
_LOST_REASON: Final = "ContainerRuntimeError: the keeper was killed, how it ended is unknown"


class Containers:
    """Lives in the supervisor's nursery; `changed` wakes the supervisor."""

    def __init__(
        self,
        node: Node,
        scene: Scene,
        record: Record,
        streams: dict[str, Streams],
        changed: Callable[[], None],
    ) -> None:
        self._node = node
        self._scene = scene
        self._record = record
        self._streams = streams
        self._changed = changed
        self._keepers: dict[str, Keeper] = {}
        self._starting: set[str] = set()
        self._fences: list[int] = []
        """Locks that keep keepers of before from starting late."""
        self._unread: set[str] = set()
        """Started here for no client: nothing can be refused."""
        self._execs: dict[str, Keeper] = {}
        self.may_restart = True
        self._is_hurried = False
        self._patience: set[trio.CancelScope] = set()
        """Of those who wait for clients that do not read."""
        self._is_forgotten = False
        self.nursery: trio.Nursery | None = None

    # Starting -------------------------------------------------------------------------------

    async def start(self, definition: ContainerDefinition) -> None:
        """Start it; a failure goes into the record, like an end."""
        self._starting.add(definition.name)
        try:
            await self._start(definition)
        finally:
            self._starting.discard(definition.name)

    async def _start(self, definition: ContainerDefinition) -> None:
        name = definition.name
        self._node.failpoints.reach("keeper.do")
        made = self._scene.containers[name]
        attempt = self._record.container(name).attempt
        streams = self._streams.pop(name, None)
        if streams is None and attempt == 0:  # only a first start has clients
            self._unread.add(name)
        try:
            keeper = await launch.start(self._scene, definition, attempt, streams)
        except StartFailed as error:
            self.kill(name)  # it may have run, and not be held
            self._note_failure(name, *start_failure(error))
            return
        except InvalidParameterException as error:
            self._note_failure(name, f"CannotStartContainerError: {error}", None)
            return
        finally:
            close_streams(streams)
            if made.cgroup is not None:
                made.cgroup.close()  # it opens again what it is asked for; nobody may ask for long
        self._node.failpoints.reach("keeper.done")
        self._record.note(
            name,
            last_status="RUNNING",
            keeper=keeper.identity,
            started_at=keeper.started_at,
            lowered=made.limits.lowered,
        )
        self._attend_to(name, keeper)

    def _note_failure(self, name: str, reason: str, code: int | None) -> None:
        self._record.note(
            name, last_status="STOPPED", reason=reason, exit_code=code, finished_at=time.time()
        )
        self._changed()

    async def find(self) -> None:
        """After an agent that died: attend to what runs, learn how the rest ended.

        In this order: one that is started again needs the namespaces of those that run.
        """
        ended: list[tuple[str, Found]] = []
        for name in [c.name for c in self._record.known.containers]:
            found = await self._look(name)
            if found is None:
                if self._record.container(name).last_status == "RUNNING":
                    await self._after_end(name, Lost(), None)  # its directory was taken away
            elif isinstance(found.outcome, Keeper):
                self._take_over(name, found.outcome, found)
            else:
                ended.append((name, found))
        for name, found in ended:
            await self._hear_of_end(name, found)

    async def _look(self, name: str) -> Found | None:
        task = self._record.known.id
        directory = self._node.container_dir(task, name)
        cgroup = self._node.tree.find(names.container_cgroup(task, name))
        try:
            return await recovery.look(directory, cgroup, self._fences)
        finally:
            if cgroup is not None:
                cgroup.close()

    def _take_over(self, name: str, keeper: Keeper, found: Found) -> None:
        if self._scene.slot is None and (held := keeper.namespaces()) is not None:
            self._scene.slot = Slot(*held, self._scene.task.id_base)
        known = self._record.container(name)
        if known.last_status == "STOPPED" and known.attempt == found.attempt:
            self._keepers[name] = keeper  # only for clients that still read
            return
        self._note_start(name, found)
        self._record.note(
            name, last_status="RUNNING", keeper=keeper.identity, exit_code=None, reason=None
        )
        self._attend_to(name, keeper)

    async def _hear_of_end(self, name: str, found: Found) -> None:
        assert not isinstance(found.outcome, Keeper)
        known = self._record.container(name)
        is_known = known.last_status == "STOPPED" and known.attempt == found.attempt
        self._note_start(name, found)
        if not is_known or self._shall_restart(name, found.outcome, None):
            await self._after_end(name, found.outcome, None)

    def _note_start(self, name: str, found: Found) -> None:
        """Unless the record has it: a start is written down only after the fact."""
        known = self._record.container(name)
        is_known = known.attempt == found.attempt and known.started_at is not None
        if not is_known and not isinstance(found.outcome, Failed):
            self._record.note(name, started_at=found.began_at)
        self._record.note(name, attempt=found.newest)

    def _attend_to(self, name: str, keeper: Keeper) -> None:
        assert self.nursery is not None
        self._keepers[name] = keeper
        self.nursery.start_soon(self._attend, name, keeper)

    # Ending ---------------------------------------------------------------------------------

    async def _attend(self, name: str, keeper: Keeper) -> None:
        """One start of a container: its health while it runs, its end, then perhaps another."""
        check = self._scene.definition(name).health_check
        if check is None:
            end = await keeper.wait()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(health.watch, check, self._target(name), self._hear(name))
                end = await keeper.wait()
                nursery.cancel_scope.cancel()
        await self._after_end(name, end, keeper)
        self._record.save()
        self._changed()

    def _hear(self, name: str) -> Callable[[health.Verdict], Awaitable[None]]:
        async def hear(verdict: health.Verdict) -> None:
            before = self._record.container(name)
            moved = verdict.health != before.health
            self._record.note(
                name,
                health=verdict.health,
                health_since=time.time() if moved else before.health_since,
                health_output=verdict.output,
            )
            healths = {c.name: c.health for c in self._record.known.containers}
            overall = ordering.task_health(self._scene.task.definition, healths)
            self._record.save(health=overall)
            self._changed()

        return hear

    async def _after_end(
        self, name: str, end: Ended | Failed | Lost, keeper: Keeper | None
    ) -> None:
        again = self._shall_restart(name, end, keeper)
        if again:
            self._record.restarting.add(name)
        self._record_end(name, end)
        if isinstance(end, Lost) or self._scene.task.definition.pid_mode == "task":
            self.kill(name)  # no pid namespace of its own ended with its first process
        if again:
            await self._restart(name, keeper)
            self._record.restarting.discard(name)

    def _record_end(self, name: str, end: Ended | Failed | Lost) -> None:
        finished_at = time.time() if isinstance(end, Lost) else end.at
        match end:
            case Ended():
                reason = _OOM_REASON if self._was_oom_killed(name) else None
                code: int | None = end.exit_code
            case Failed():
                reason, code = f"CannotStartContainerError: {os.strerror(end.errno)}", None
            case Lost():
                reason, code = _LOST_REASON, None
        self._record.note(
            name, last_status="STOPPED", exit_code=code, reason=reason, finished_at=finished_at
        )
        if self._scene.definition(name).essential:
            first = self._record.known.execution_stopped_at
            self._record.change(execution_stopped_at=first or finished_at)

    def _was_oom_killed(self, name: str) -> bool:
        """By the kernel's counter, whatever the exit code says; read before the cgroup goes.

        It counts from this start: every one has a cgroup of its own.
        """
        cgroup = self._node.tree.find(names.container_cgroup(self._record.known.id, name))
        if cgroup is None:
            return False
        with contextlib.closing(cgroup), contextlib.suppress(KernelError):
            return cgroup.oom_kills() > 0
        return False

    # Again, in place ------------------------------------------------------------------------

    def _shall_restart(self, name: str, end: Ended | Failed | Lost, keeper: Keeper | None) -> bool:
        return isinstance(end, Ended) and ordering.should_restart(
            self._scene.definition(name).restart_policy,
            exit_code=end.exit_code,
            ran_s=self._ran_s(name, end, keeper),
            stopping=self._record.is_stopping or not self.may_restart,
        )

    def _ran_s(self, name: str, end: Ended, keeper: Keeper | None) -> float:
        """What ends under our eyes is measured by a clock that nobody sets. An end that was found
        is older: only the two times that the keeper wrote down tell."""
        known = self._record.container(name)
        if keeper is not None and known.keeper is not None:
            return age(known.keeper.init_start_time)
        return end.at - (known.started_at or end.at)

    async def _restart(self, name: str, keeper: Keeper | None) -> None:
        """The same writable layer, a new program, its log beside that of the start before."""
        if keeper is not None:
            await self._see_out(keeper)
            del self._keepers[name]
            keeper.close()
        definition, known = self._scene.definition(name), self._record.container(name)
        self._node.failpoints.reach("restart.do")
        try:
            await steps.remove_cgroup(self._scene, name)
            await self._set_again(definition)
        except SandboxError as error:
            self._record.note(name, reason=f"CannotStartContainerError: {error}")
            return
        if self._record.is_stopping or not self.may_restart:
            return
        self._record.note(
            name,
            last_status="PENDING",
            attempt=known.attempt + 1,
            exit_code=None,
            finished_at=None,
            reason=None,
        )
        await self.start(definition)
        self._record.save()
        self._node.failpoints.reach("restart.done")

    async def _set_again(self, definition: ContainerDefinition) -> None:
        """The container's scene: an agent that did not make the task finds its parts first."""
        if definition.name not in self._scene.containers:
            limits = choose_limits(definition.ulimits, self._node.host_limits())
            image = self._stored_image(definition.name)
            self._scene.containers[definition.name] = ContainerScene(image=image, limits=limits)
        if self._scene.interface is None:
            await steps.perform(self._scene, steps.STORAGE + steps.NETWORK + steps.PIDS)
        await steps.make_root(self._scene, definition)

    # Stopping -------------------------------------------------------------------------------

    async def stop(self, name: str) -> None:
        """The image's stop signal, then after stopTimeout everything is killed."""
        while name in self._record.restarting:
            await trio.sleep(_PAUSE_S)
        self._node.failpoints.reach("signal.do")
        keeper = self._keepers.get(name)
        if keeper is not None and keeper.signal(self._config(name).stop_signal):
            self._node.failpoints.reach("signal.done")
            await trio.sleep(self._scene.definition(name).stop_timeout or DEFAULT_STOP_TIMEOUT_S)
        self.kill(name)
        await trio.sleep(_TELLS_S)  # cancelled when no container of the task lives any more
        if keeper is not None and name in self._record.live():
            keeper.kill()  # stopped from outside, it would keep the task from its end for ever

    def kill(self, name: str) -> None:
        """Everything in the container's cgroup, at once."""
        cgroup = self._node.tree.find(names.container_cgroup(self._record.known.id, name))
        if cgroup is not None:
            with contextlib.closing(cgroup):
                cgroup.kill()

    def kill_all(self) -> None:
        for known in self._record.known.containers:
            self.kill(known.name)

    async def leave(self) -> None:
        """See the keepers out."""
        self._node.failpoints.reach("leave.do")
        for keeper in self._keepers.values():
            await self._see_out(keeper)
        for known in self._record.known.containers:
            if known.name not in self._unread:
                self._note_losses(known.name)
        self._node.failpoints.reach("leave.done")

    def _note_losses(self, name: str) -> None:
        """What its clients refused; only a first start has any."""
        directory = self._node.container_dir(self._record.known.id, name) / "run.0"
        if losses := read_losses(directory):
            self._record.note(name, lost_output=losses)

    async def _see_out(self, keeper: Keeper) -> None:
        """Clients may take their time to read what is left, until the task is wanted stopped."""
        if not self._is_hurried:
            with trio.CancelScope() as scope:
                self._patience.add(scope)
                try:
                    await keeper.wait_gone()
                finally:
                    self._patience.discard(scope)
        await keeper.see_out()

    def hurry(self) -> None:
        """The task is wanted stopped: start nothing again, wait for nobody who does not read."""
        self.may_restart = False
        self._is_hurried = True
        for scope in self._patience:
            scope.cancel()

    def forget(self) -> None:
        """Close what this agent holds of them; they run on."""
        self._is_forgotten = True
        for keeper in self._keepers.values():
            keeper.close()
        for fence in self._fences:
            os.close(fence)
        self._fences.clear()
        self._keepers.clear()
        for streams in self._streams.values():
            close_streams(streams)
        self._streams.clear()

    # What is asked of live containers -------------------------------------------------------

    async def _keeper(self, container: str | None) -> tuple[str, Keeper]:
        """Of the named container, else of the first essential one; it must be running.

        One that may run with no keeper known is waited for. Between its end and its next start a
        container is not running, whatever the task is called: a signal is not for the next start.
        """
        definitions = self._scene.task.definition.container_definitions
        name = container or next((d.name for d in definitions if d.essential), definitions[0].name)
        while (keeper := self._keepers.get(name)) is None:
            if self._is_forgotten or not self._may_run(name):
                raise InvalidParameterException(f"container {name} is not running")
            await trio.sleep(_PAUSE_S)
        return name, keeper

    def _may_run(self, name: str) -> bool:
        """With no keeper known: a program writes before its start is heard of here, and after an
        agent that died what runs is found one by one."""
        known = self._record.known.containers
        return name in self._starting or any(
            c.name == name and c.last_status == "RUNNING" for c in known
        )

    async def signal(self, number: int, container: str | None) -> None:
        """To the container's first process. One that has just ended is no error."""
        _, keeper = await self._keeper(container)
        keeper.signal(number)

    async def exec(
        self, request: ExecRequest, streams: Streams, started: Callable[[str], None] | None
    ) -> int:
        name, _ = await self._keeper(request.container)
        return await execs.run(self._target(name), request, streams, self._execs, started)

    async def resize(
        self, rows: int, cols: int, container: str | None, exec_id: str | None
    ) -> None:
        if exec_id is None:
            _, keeper = await self._keeper(container)
        elif exec_id in self._execs:
            keeper = self._execs[exec_id]
        else:
            raise InvalidParameterException(f"no exec {exec_id} is running")
        keeper.resize(rows, cols)

    @contextlib.asynccontextmanager
    async def root(self, container: str | None) -> AsyncIterator[tuple[int, int]]:
        """The container's root as a descriptor, and the first id of its range."""
        _, keeper = await self._keeper(container)
        fd = keeper.open_root()
        try:
            yield fd, self._scene.task.id_base
        finally:
            os.close(fd)

    def _config(self, name: str) -> ImageConfig:
        """Its defaults for one that an earlier agent started and did not come to write down."""
        if made := self._scene.containers.get(name):
            return made.image.config
        is_known = self._record.container(name).image_digest is not None
        return self._stored_image(name).config if is_known else ImageConfig()

    def _stored_image(self, name: str) -> Image:
        return self._node.images.find(self._record.container(name).image_digest or "")

    def _target(self, name: str) -> execs.Target:
        task, interface = self._scene.task, self._scene.interface
        return execs.Target(
            self._node,
            task.id,
            task.id_base,
            self._scene.definition(name),
            self._config(name),
            self._keepers[name],
            interface.hostname if interface else task.id[:12],
        )


def close_streams(streams: Streams | None) -> None:
    if streams is None:
        return
    for fd in set(streams.descriptors):
        with contextlib.suppress(OSError):  # a client may name one that is not open
            os.close(fd)


def start_failure(error: StartFailed) -> tuple[str, int | None]:
    """ECS's text for a container that could not be started, and a shell's exit code for it."""
    if not error.is_exec:
        return f"CannotStartContainerError: {error}", None
    program = f'CannotStartContainerError: exec: "{error.subject}"'
    match error.errno:
        case 2:
            return f"{program}: executable file not found in $PATH", 127
        case 13:
            return f"{program}: permission denied", 126
        case _:
            return f"{program}: {os.strerror(error.errno).lower()}", 126
