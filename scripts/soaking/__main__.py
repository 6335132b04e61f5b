"""See scripts/soak, which starts this with a registry behind $TINY and $MANY."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from sandbox.client.remote import Remote
from sandbox.errors import NotFound
from sandbox.model.task import Status
from scripts.soaking.daemon import WARM_SLOTS, Daemon
from scripts.soaking.faults import Faults
from scripts.soaking.host import ids_of_tasks, mixed_up
from scripts.soaking.oracle import Oracle
from scripts.soaking.users import PATIENCE_S, User, World
from tests import leaks

USERS = 5
PATIENT = "patient"
"""Its tasks take a minute: nobody waits for them."""
WATCH_S = 0.5
REST_S = 30.0
"""So often everybody pauses, and what is there is counted."""
SETTLES_S = 10.0
"""The kernel takes cgroups and namespaces down later than it is asked to."""
DESCRIPTORS_OF_A_TASK = 24
KEEPERS_OF_A_TASK = 4
SLACK = 4 * WARM_SLOTS + 8
"""In descriptors of an agent at rest: its pool of namespaces is not always equally full."""
CLEARS_S = 120.0
HANGS_S = 3 * PATIENCE_S + CLEARS_S


class Report(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    seconds: float
    did: dict[str, int]
    rss_mib: int
    """The most that an agent had."""
    leaks: list[str]
    violations: list[str]

    @property
    def is_good(self) -> bool:
        return not self.leaks and not self.violations

    def line(self) -> str:
        did = ", ".join(f"{count} {what}" for what, count in sorted(self.did.items()))
        return (
            f"soak: seed {self.seed}, {self.seconds:.0f} s: {did}; an agent had at most "
            f"{self.rss_mib} MiB; {len(self.leaks)} leaks, {len(self.violations)} violations"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak")
    parser.add_argument("minutes", nargs="?", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--json", action="store_true", help="the report on stdout as JSON")
    options = parser.parse_args()
    # A thread in a system call, which no cancellation reaches, would hold this up for ever.
    faulthandler.dump_traceback_later(options.minutes * 60 + HANGS_S, exit=True)
    before = leaks.snapshot()
    directory = Path(tempfile.mkdtemp(prefix="sandbox-soak-"))
    try:
        soak = Soak(options.seed, options.minutes * 60, directory)
        trio.run(soak.run)
        left = settled(lambda: leaks.leaked(before) + leaks.of(soak.daemon.state))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report = soak.report(left)
    for what in report.leaks:
        print(f"soak: left behind: {what}", file=sys.stderr)
    if options.json:
        print(json.dumps(msgspec.to_builtins(report)))
    else:
        print(report.line())
    return 0 if report.is_good else 1


def settled(look: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + SETTLES_S
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


class Soak:
    def __init__(self, seed: int, seconds: float, directory: Path) -> None:
        self.oracle = Oracle()
        self.daemon = Daemon(directory, self._agent_ended)
        self._seed = seed
        self._seconds = seconds
        self._began = time.monotonic()
        self._told = 0
        self._usual = 0
        """Descriptors of an agent that has nothing to do."""
        self.did: Counter[str] = Counter()

    def report(self, left: list[str]) -> Report:
        return Report(
            seed=self._seed,
            seconds=time.monotonic() - self._began,
            did=dict(self.did),
            rss_mib=self.daemon.peak_rss_mib,
            leaks=left,
            violations=self.oracle.violations,
        )

    def _agent_ended(self) -> None:
        self.oracle.agents += 1

    async def run(self) -> None:
        self.daemon.start()
        async with trio.open_nursery() as nursery:
            images = (os.environ["TINY"], os.environ["MANY"])
            remote = Remote(str(self.daemon.socket), nursery)
            world = World(
                seed=self._seed,
                daemon=self.daemon,
                oracle=self.oracle,
                remote=remote,
                images=images,
                did=self.did,
            )
            nursery.start_soon(self._until_told, world)
            nursery.start_soon(self._watch, world)
            nursery.start_soon(self.daemon.attend)
            try:
                await self._warm_up(world)
                await self._soak(world)
            finally:
                with trio.CancelScope(shield=True):
                    await self._clear(world)
            nursery.cancel_scope.cancel()
        for what in (*self.daemon.unasked, *self.daemon.complaints()):
            self.oracle.wrong(what)
        self._tell("")

    async def _until_told(self, world: World) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                world.is_over = True

    async def _warm_up(self, world: World) -> None:
        """What is made once is there from now on, and an idle agent has what it has."""
        await world.insist(lambda: pull_all(world.remote, world.images))
        await trio.sleep(1)
        self._usual = self.daemon.descriptors()

    async def _soak(self, world: World) -> None:
        users = {f"user{number}": User.one_task for number in range(USERS)}
        users |= {PATIENT: User.patient_task, "housekeeper": User.keep_house}
        with trio.move_on_after(self._seconds + 2 * PATIENCE_S) as bounds:
            async with trio.open_nursery() as nursery:
                world.may_begin.set()
                for name, act in users.items():
                    nursery.start_soon(User(world, name).live, act)
                nursery.start_soon(Faults(world).serve)
                await self._rest_at_times(world)
        if bounds.cancelled_caught:
            self.oracle.wrong(f"no end in sight: {sorted(world.busy)} are busy")

    async def _rest_at_times(self, world: World) -> None:
        end = trio.current_time() + self._seconds
        while not world.is_over and trio.current_time() < end:
            with trio.move_on_at(min(end, trio.current_time() + REST_S)):
                while not world.is_over:
                    await trio.sleep(0.1)
            world.may_begin = trio.Event()
            while world.busy - {PATIENT}:
                await trio.sleep(0.05)
            await self._look(world)
            self.did["rests"] += 1
            world.is_over |= trio.current_time() >= end
            world.may_begin.set()

    async def _look(self, world: World) -> None:
        """Everybody rests, so all that is there belongs to a task that is there."""
        views = await world.tasks()
        live = {view.id for view in views if view.known.last_status is not Status.STOPPED}
        for task in live - self.oracle.stories.keys():
            self.oracle.wrong(f"task {task} runs for nobody")
        with trio.move_on_after(SETTLES_S):
            while self._odd(live, {view.id for view in views}):
                await trio.sleep(0.1)
        for what in self._odd(live, {view.id for view in views}):
            self.oracle.wrong(f"at rest, {what}")

    def _odd(self, live: set[str], known: set[str]) -> list[str]:
        state = self.daemon.state
        cgroups = ids_of_tasks(leaks.instance(state)).keys() - live
        directories = {path.name for path in (state / "tasks").iterdir()} - known
        odd = [f"there is a cgroup of task {task}" for task in cgroups]
        odd += [f"there is a directory of task {task}" for task in directories]
        odd += [f"there is a mount {mount}" for mount in leaks.mounts() if str(state) in mount]
        counts = {
            "descriptors": (self.daemon.descriptors(), self._usual + SLACK, DESCRIPTORS_OF_A_TASK),
            "keepers": (len(leaks.keepers(state)), 0, KEEPERS_OF_A_TASK),
            "id ranges": (len(leaks.claims(state)), 3 * WARM_SLOTS + 1, 1),
        }
        return odd + [
            f"there are {count} {what} for {len(live)} tasks"
            for what, (count, base, each) in counts.items()
            if count > base + each * len(live)
        ]

    async def _watch(self, world: World) -> None:
        """All the time: what no task may do to another, and an agent that ends by itself."""
        before: set[str] = set()
        while True:
            await trio.sleep(WATCH_S)
            if (self.daemon.state / "instance").exists():
                # Twice: one may end, and another take its ids, while this is looked at.
                now = mixed_up(ids_of_tasks(leaks.instance(self.daemon.state)))
                for what in now & before:
                    self.oracle.wrong(what)
                before = now
            self._tell(f"{self.did['launches']} launches, {self.oracle.agents} agents ended")

    async def _clear(self, world: World) -> None:
        """Stop and forget everything, and end the agent."""
        self.daemon.start()
        with trio.move_on_after(CLEARS_S):
            for view in await world.insist(world.remote.tasks):
                await self._forget(world, view.id)
        if await self.daemon.end(signal.SIGTERM) != 0:
            self.oracle.wrong("the last agent did not end in order")

    async def _forget(self, world: World, task: str) -> None:
        async def forget() -> None:
            await world.remote.stop(task)
            async for _ in world.remote.watch(task):
                pass  # the last one is STOPPED
            await world.remote.remove(task)

        with suppress(NotFound):
            await world.insist(forget)

    def _tell(self, what: str) -> None:
        """How far it is, on a terminal; and every violation as it is found, anywhere."""
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        for violation in self.oracle.violations[self._told :]:
            print(f"{clear}soak: {violation}", file=sys.stderr)
        self._told = len(self.oracle.violations)
        if clear:
            passed = time.monotonic() - self._began
            line = f"soak: {passed:.0f} of {self._seconds:.0f} s, {what}" if what else ""
            print(f"{clear}{line}", end="", file=sys.stderr, flush=True)


async def pull_all(remote: Remote, images: Iterable[str]) -> None:
    for image in images:
        await remote.pull(image, pull="missing", platform=None, progress=None)


if __name__ == "__main__":
    sys.exit(main())
