"""What people do with an agent: launch, look, enter, copy, stop, forget; and go away meanwhile.

Each user has a random number generator of its own, so that what it does depends on the seed and on
nothing that the others do. An agent that is away is waited for, as a program of its users would.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections import Counter as Tally
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

import trio

from sandbox.client.api import Task
from sandbox.client.remote import Remote
from sandbox.errors import (
    AgentUnavailable,
    ClientException,
    ConfigError,
    ImageError,
    InvalidParameterException,
    NotFound,
    SandboxError,
)
from sandbox.model.request import RunRequest
from sandbox.model.task import Status, TaskView
from scripts.soaking import plans
from scripts.soaking.daemon import LEAVES_S, SANDBOX, Daemon
from scripts.soaking.oracle import Oracle, Story, counted
from scripts.soaking.plans import Counter, Plan

T = TypeVar("T")

PATIENCE_S = 180.0
"""A task that has not stopped after so long will not."""
OURS = (1, 125)
"""Exit statuses of a command that failed by itself."""


@dataclass(kw_only=True)
class World:
    seed: int
    daemon: Daemon
    oracle: Oracle
    remote: Remote
    images: tuple[str, ...]
    """The first is drawn most often."""
    did: Tally[str] = field(default_factory=Tally)
    is_over: bool = False
    may_begin: trio.Event = field(default_factory=trio.Event)
    """Not set while all shall come to rest."""
    busy: set[str] = field(default_factory=set)
    """Who does something now."""

    async def insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """An answer, whatever happens to the agent meanwhile."""
        while True:
            await self.daemon.ready()
            with suppress(AgentUnavailable):
                return await ask()
            await trio.sleep(0.02)

    async def ready(self) -> int:
        """Wait for an agent that answers; how many have ended until then."""
        await self.daemon.ready()
        return self.oracle.agents

    async def turn(self, name: str) -> bool:
        """Wait until that one may begin; False when it is over."""
        await self.may_begin.wait()
        if not self.is_over:
            self.busy.add(name)
        return not self.is_over

    async def tasks(self) -> list[TaskView]:
        expected = self.oracle.expected()
        views = await self.insist(self.remote.tasks)
        self.oracle.listed(views, expected)
        return views


class User:
    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._random = Random(f"{world.seed}/{name}")
        self._count = 0

    async def live(self, act: Callable[[User], Awaitable[None]]) -> None:
        """Do it again and again until it is over; not while the world rests."""
        while await self._world.turn(self._name):
            try:
                with trio.fail_after(PATIENCE_S):
                    await act(self)
            except trio.TooSlowError:
                self._world.oracle.wrong(f"{self._name} waited {PATIENCE_S:g} s for its task")
            except SandboxError as error:
                self._world.oracle.wrong(f"{self._name} was answered {error!r}")
            finally:
                self._world.busy.discard(self._name)

    # One task -------------------------------------------------------------------------------

    async def one_task(self) -> None:
        way = self._random.choices((self._detached, self._attached, self._abandoned), (10, 2, 1))
        await way[0]()

    async def patient_task(self) -> None:
        """One that its restart policy starts again: that takes ECS's minute."""
        await self._detached(plans.restarted(self._random), interferes=False)

    async def _detached(self, plan: Plan | None = None, *, interferes: bool = True) -> None:
        plan = plan or plans.draw(self._random)
        story = await self._launch(plan)
        if story is None:
            return
        if plan.is_endless:
            if await self._see(story, Status.RUNNING):
                for _ in range(self._random.randrange(4)):
                    await self._random.choice(DEEDS)(self, story)
            await self._random.choice((User._stop, User._stop, User._kill))(self, story)
        elif interferes and self._random.random() < 0.2:
            await trio.sleep(self._random.uniform(0, 1))
            await self._stop(story)
        elif interferes and self._random.random() < 0.2:
            await self._follow(story)
        await self._see_end(story)

    async def _launch(self, plan: Plan) -> Story | None:
        """The task; None if it was to be forgotten at its end and an agent died meanwhile."""
        world, family, agents = self._world, self._next_name(), self._world.oracle.agents
        image = world.images[0] if self._random.random() < 0.9 else world.images[-1]
        request = RunRequest(definition=plan.definition(family, image), remove=plan.remove)
        world.did["launches"] += 1
        while True:
            await world.daemon.ready()
            try:
                view = await world.remote.run(request, owned=False, streams={}, progress=None)
                break
            except ConfigError:  # a command came first, and its agent keeps nothing: it leaves soon
                await trio.sleep(LEAVES_S)
            except AgentUnavailable:
                if (found := await self._find(family)) is not None:
                    view = found
                    break
                if plan.remove:
                    return None
        story = Story(plan=plan, family=family, agents=agents, view=view)
        world.oracle.acknowledged(story)
        return story

    async def _find(self, family: str) -> TaskView | None:
        """What became of a request that was not answered: nothing, or one task."""
        views = await self._world.tasks()
        found = [view for view in views if view.desired.definition.family == family]
        if len(found) > 1:
            self._world.oracle.wrong(f"{family} was asked for once and is there {len(found)} times")
        return found[0] if found else None

    async def _see(self, story: Story, status: Status) -> bool:
        """Wait until the task is that far; False when it is further by then, or gone."""
        world = self._world

        async def look() -> None:
            before = None
            async with aclosing(world.remote.watch(story.id)) as views:  # type: ignore[type-var]
                async for view in views:
                    world.oracle.saw(view, before)
                    before = view
                    if view.known.last_status >= status:
                        return
            raise NotFound("it was removed as soon as it had stopped")

        try:
            await world.insist(look)
        except NotFound:
            return False
        return story.view.known.last_status is status

    async def _see_end(self, story: Story) -> None:
        world = self._world
        try:
            if not await self._see(story, Status.STOPPED):
                return world.oracle.gone(story)
            logs = {c.name: await self._log(story, c.name) for c in story.plan.counters}
        except NotFound:
            return world.oracle.gone(story)
        world.oracle.ended(story, logs)
        world.did["judged"] += 1
        if self._random.random() < 0.8:
            await self._remove(story)

    async def _log(self, story: Story, container: str) -> bytes:
        async def read() -> bytes:
            records = self._world.remote.logs(story.id, container=container)
            async with aclosing(records):  # type: ignore[type-var]
                return b"".join([record.data async for record in records])

        return await self._world.insist(read)

    async def _remove(self, story: Story) -> None:
        story.is_removed = True
        with suppress(NotFound):  # the agent died before it could answer
            await self._world.insist(lambda: self._world.remote.remove(story.id))
        self._world.did["removes"] += 1
        self._world.oracle.gone(story)

    def _next_name(self) -> str:
        self._count += 1
        return f"{self._name}-{self._count}"

    # To the end of it -----------------------------------------------------------------------

    async def _stop(self, story: Story) -> None:
        story.is_stopped = True
        self._world.did["stops"] += 1
        with suppress(NotFound):
            await self._world.insist(lambda: self._world.remote.stop(story.id))

    async def _kill(self, story: Story) -> None:
        story.killed.add(story.plan.counters[0].name)
        self._world.did["kills"] += 1
        with suppress(InvalidParameterException, NotFound):  # it has ended
            await self._world.insist(lambda: self._world.remote.kill(story.id, signal.SIGKILL))

    # Meanwhile ------------------------------------------------------------------------------

    async def _execute(self, story: Story) -> None:
        word, code = f"{self._random.random()}", self._random.randrange(90)
        agents = await self._world.ready()
        self._world.did["execs"] += 1
        task = Task(self._world.remote, story.view)
        try:
            done = await task.exec(["sh", "-c", f"echo {word}; exit {code}"])
        except SandboxError as error:
            return await self._excuse("exec", story, agents, error)
        said = (done.exit_code, done.stdout.decode())
        if said != (code, f"{word}\n") and not story.is_disturbed:
            self._world.oracle.wrong(f"exec gave {said}, not {(code, word)}", story)

    async def _copy(self, story: Story) -> None:
        """A file in and out again."""
        content = self._random.randbytes(self._random.randrange(300_000))
        agents = await self._world.ready()
        self._world.did["copies"] += 1
        task = Task(self._world.remote, story.view)
        with tempfile.TemporaryDirectory() as directory:
            there, back = Path(directory, "there"), Path(directory, "back")
            there.write_bytes(content)
            try:
                await task.put(there, "/tmp/file")
                await task.get("/tmp/file", back)
            except SandboxError as error:
                return await self._excuse("cp", story, agents, error)
            if back.read_bytes() != content:
                self._world.oracle.wrong("a file came back as another one", story)

    async def _excuse(self, what: str, story: Story, agents: int, error: SandboxError) -> None:
        """An agent that dies takes what was asked of it along; a task that is disturbed ends."""
        if await self._world.ready() == agents and not story.is_disturbed:
            self._world.oracle.wrong(f"{what}: {error!r}", story)

    async def _follow(self, story: Story) -> None:
        """`sandbox logs -f`, killed at any moment."""
        self._world.did["followers"] += 1
        command = [SANDBOX, "logs", "-f", story.id]
        with tempfile.TemporaryFile() as out:
            with self._popen(command, out.fileno()) as follower:
                await trio.sleep(self._random.uniform(0, 1))
                follower.kill()
            out.seek(0)
            log = out.read()
        if len(story.plan.counters) == 1 and counted(log) is None:
            self._world.oracle.wrong(f"logs -f wrote {log[-200:]!r}", story)

    def _popen(self, command: list[str], out: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self._world.daemon.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )

    async def _measure(self, story: Story) -> None:
        agents = await self._world.ready()
        try:
            stats = await self._world.remote.stats(story.id)
        except SandboxError as error:
            return await self._excuse("stats", story, agents, error)
        if not stats.total.pids and not story.is_disturbed:
            self._world.oracle.wrong("it runs without a process", story)

    async def _idle(self, story: Story) -> None:
        await trio.sleep(self._random.uniform(0, 1.5))

    # `sandbox run`, and its end ------------------------------------------------------------------

    def _run_command(self, family: str, counter: Counter, *options: str) -> list[str]:
        image = self._world.images[0]
        words = ["--name", family, "--entrypoint", "sh", image, "-c", counter.script]
        return [SANDBOX, "run", *options, *words]

    async def _attached(self) -> None:
        """To its end: the command's output and exit status are the program's."""
        counter = Counter(lines=self._random.randint(0, 50), code=plans.code(self._random))
        world, agents = self._world, await self._world.ready()
        world.did["attached"] += 1
        done = await trio.run_process(
            self._run_command(self._next_name(), counter, "--rm"),
            env=world.daemon.environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        lines = [counter.lines] if counter.lines else []
        is_right = done.returncode == counter.code and counted(done.stdout) == lines
        is_excused = done.returncode in OURS and await world.ready() > agents
        if counted(done.stdout) is None or not (is_right or is_excused):
            what = (done.returncode, done.stdout[-100:], done.stderr[-500:])
            world.oracle.wrong(f"`sandbox run` of {counter.lines} lines gave {what}")

    async def _abandoned(self) -> None:
        """Killed while its task runs: the task must not outlive it."""
        counter = Counter(name=(family := self._next_name()), told=plans.code(self._random))
        world, agents = self._world, await self._world.ready()
        world.did["owners killed"] += 1
        with tempfile.TemporaryFile() as out:
            command = self._run_command(family, counter, "--stop-timeout", "10")
            with self._popen(command, out.fileno()) as owner:
                with trio.move_on_after(self._random.uniform(0.5, 5)):
                    while not out.seek(0, 2) and owner.poll() is None:
                        await trio.sleep(0.02)
                owner.kill()
        view = await self._find(family)
        if view is None:
            return  # it was killed before it could ask, or its agent was
        plan = Plan(kind="owned", counters=(counter,))
        story = Story(plan=plan, family=family, agents=agents, view=view, is_stopped=True)
        world.oracle.acknowledged(story)
        await self._see_end(story)

    # Housekeeping ---------------------------------------------------------------------------

    async def keep_house(self) -> None:
        await self._random.choice(CHORES)(self)
        await trio.sleep(self._random.uniform(0, 4))

    async def _pull(self) -> None:
        image = self._random.choice(self._world.images)
        self._world.did["pulls"] += 1
        with suppress(AgentUnavailable):
            await self._world.remote.pull(image, pull="always", platform=None, progress=None)

    async def _remove_image(self) -> None:
        self._world.did["images removed"] += 1
        with suppress(AgentUnavailable, ClientException, ImageError):  # in use, or not there
            await self._world.remote.remove_image(self._random.choice(self._world.images))

    async def _prune(self) -> None:
        self._world.did["prunes"] += 1
        words = self._random.choice((["prune"], ["image", "prune", "--all"]))
        with self._world.oracle.pruning():
            await trio.run_process(
                [SANDBOX, *words],
                env=self._world.daemon.environment,
                capture_stdout=True,
                capture_stderr=True,
                check=False,  # the agent may die meanwhile
            )

    async def _look(self) -> None:
        await self._world.tasks()


DEEDS = (User._execute, User._execute, User._copy, User._follow, User._measure, User._idle)
CHORES = (User._pull, User._pull, User._remove_image, User._prune, User._look)
