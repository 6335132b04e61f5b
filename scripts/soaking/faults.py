"""What happens to the agent and to what works for it: signals from outside, at any moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from random import Random

import trio

from sandbox.errors import NotFound
from sandbox.kernel.processes import open_process
from sandbox.model.task import ContainerKnown, KeeperIdentity, Status
from scripts.soaking.oracle import Story
from scripts.soaking.users import World

NAME = "faults"


class Faults:
    def __init__(self, world: World) -> None:
        self._world = world
        self._random = Random(f"{world.seed}/faults")

    async def serve(self) -> None:
        while await self._world.turn(NAME):
            (fault,) = self._random.choices(list(FAULTS), list(FAULTS.values()))
            await fault(self)
            self._world.busy.discard(NAME)
            await trio.sleep(self._random.uniform(0.2, 4))

    # The agent ------------------------------------------------------------------------------

    async def _kill_agent(self) -> None:
        await self._replace_agent(signal.SIGKILL)

    async def _end_agent(self) -> None:
        await self._replace_agent(signal.SIGTERM)

    async def _kill_agent_again(self) -> None:
        """In its recovery, or soon after."""
        await self._replace_agent(signal.SIGKILL, wait=False)
        await trio.sleep(self._random.uniform(0, 1.5))
        await self._replace_agent(signal.SIGKILL)

    async def _replace_agent(self, number: signal.Signals, *, wait: bool = True) -> None:
        """SIGKILL at any moment; a signal that is handled, when there is somebody to handle it."""
        world = self._world
        if number is not signal.SIGKILL:
            await world.daemon.ready()
        world.did[f"agents ended by {number.name}"] += 1
        status = await world.daemon.end(number)
        if number is signal.SIGTERM and status != 0:
            world.oracle.wrong(f"the agent ended with {status} on SIGTERM")
        await trio.sleep(self._random.choice((0, self._random.uniform(0, 1))))
        world.daemon.start()
        if wait:
            await world.daemon.ready()
            await world.tasks()

    async def _reload(self) -> None:
        await self._world.daemon.ready()
        self._world.did["reloads"] += 1
        self._world.daemon.signal(signal.SIGHUP)

    # What works for it ----------------------------------------------------------------------

    async def _kill_keeper(self) -> None:
        if (victim := await self._victim()) is not None:
            story, container, keeper = victim
            story.orphaned.add(container.name)
            if send(keeper.pid, keeper.start_time, signal.SIGKILL):
                self._world.did["keepers killed"] += 1

    async def _kill_container(self) -> None:
        if (victim := await self._victim()) is not None:
            story, container, keeper = victim
            story.killed.add(container.name)
            if send(keeper.init_pid, keeper.init_start_time, signal.SIGKILL):
                self._world.did["containers killed"] += 1

    async def _pause_keeper(self) -> None:
        """Its container writes on until the pipe is full; nothing is lost."""
        if (victim := await self._victim()) is not None:
            _, _, keeper = victim
            if send(keeper.pid, keeper.start_time, signal.SIGSTOP):
                self._world.did["keepers paused"] += 1
                await trio.sleep(self._random.uniform(0, 1))
                send(keeper.pid, keeper.start_time, signal.SIGCONT)

    async def _victim(self) -> tuple[Story, ContainerKnown, KeeperIdentity] | None:
        world = self._world
        running = [s for s in world.oracle.stories.values() if is_running(s)]
        if not running:
            return None
        story = self._random.choice(running)
        try:
            view = await world.insist(lambda: world.remote.describe(story.id))
        except NotFound:
            return None
        alive = [c for c in view.known.containers if c.last_status == "RUNNING" and c.keeper]
        if not alive:
            return None
        container = self._random.choice(alive)
        assert container.keeper is not None
        return story, container, container.keeper


FAULTS: Mapping[Callable[[Faults], Awaitable[None]], int] = {
    Faults._kill_agent: 4,
    Faults._kill_agent_again: 2,
    Faults._end_agent: 2,
    Faults._reload: 1,
    Faults._kill_keeper: 3,
    Faults._kill_container: 2,
    Faults._pause_keeper: 2,
}
"""And how often each happens."""


def is_running(story: Story) -> bool:
    return story.view.known.last_status is Status.RUNNING


def send(pid: int, started: int, number: signal.Signals) -> bool:
    """To that process and none that has its number now."""
    process = open_process(pid, started)
    if process is None:
        return False
    try:
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(process)
    return True
