"""One path after the other under an agent where something fails, and what came of it, seen from
outside: what the agent holds, how the task ended, and the task beside it that must not notice.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from sandbox.model.task import StopCode
from scripts import make_image
from tests.crash import paths
from tests.crash.conftest import Driver, Site
from tests.crash.faults import WALKS
from tests.crash.test_agents import take_cgroups_away
from tests.leaks import cgroup_roots

MOST_AGENTS = 3
"""That one after the other may fail to put right what went wrong once."""

T = TypeVar("T")

ALL = os.environ.get("SANDBOX_FAULTS") == "all"
"""Every cell of a matrix; else some, evenly spread, the same ones each time."""


def chosen(cells: Sequence[T], many: int) -> Sequence[T]:
    if ALL or len(cells) <= many:
        return cells
    return [cells[n * len(cells) // many] for n in range(many)]


@contextmanager
def traced(pid: int, *options: str) -> Iterator[None]:
    """All threads of the process; what it starts is let go when that executes its program."""
    command = ["strace", "-f", "-q", "-b", "execve", "-p", str(pid), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            assert tracer.poll() is None, "strace could not attach"
            time.sleep(0.001)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it detaches
        tracer.wait(20)


# What there is, seen from outside ------------------------------------------------------------


@dataclass(frozen=True)
class Holdings:
    """Of a live agent: counted by kind where names are of one task."""

    descriptors: Counter[str]
    children: Counter[str]
    cgroups: int
    claims: int
    mounts: int
    files: frozenset[str]

    def gained(self, before: Holdings) -> list[str]:
        more: list[str] = []
        for kind in ("descriptors", "children"):
            counts: Counter[str] = getattr(self, kind) - getattr(before, kind)
            more += [f"{n} {kind}: {name}" for name, n in counts.items()]
        for kind in ("cgroups", "claims", "mounts"):
            if (n := getattr(self, kind) - getattr(before, kind)) > 0:
                more.append(f"{n} {kind}")
        return more + [f"file {name}" for name in sorted(self.files - before.files)]


def holdings(site: Site, pid: int) -> Holdings:
    return Holdings(
        descriptors=Counter(descriptors(pid)),
        children=Counter(f"{c.name()} {c.status()}" for c in psutil.Process(pid).children()),
        cgroups=sum(len(list(os.walk(r / f"sandbox-{site.instance}"))) for r in cgroup_roots()),
        claims=len(site.claims()),
        mounts=Path(f"/proc/{pid}/mountinfo").read_text().count("\n"),
        files=frozenset(files(site.state)),
    )


def at_rest(site: Site, pid: int) -> Holdings:
    """Once it makes nothing ready any more."""
    now = holdings(site, pid)
    while True:
        time.sleep(0.1)
        if (before := now) == (now := holdings(site, pid)):
            return before


def descriptors(pid: int) -> Iterator[str]:
    """But for those of storage that is kept ready, of which there may be more or less: the file,
    and the mount, which is a "/"."""
    names: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            names[os.readlink(entry.path).removesuffix(" (deleted)")] += 1
    ready = [name for name in names.elements() if re.search(r"/storage/\d+\.ext4$", name)]
    names -= Counter(ready) + Counter({"/": len(ready)})
    yield from (re.sub(r"\d+", "N", name) for name in names.elements())


def files(state: Path) -> Iterator[str]:
    """But for those of tasks that run, and those that SQLite and a full disk have come and go."""
    for entry in (*state.iterdir(), *(state / "tasks").iterdir(), *(state / "images").rglob(".*")):
        if not entry.name.startswith(("store.db", "reserve")):
            yield str(entry.relative_to(state))


def gained(site: Site, pid: int, before: Holdings) -> list[str]:
    """What is still more after a moment: some things end, or are made again, behind an answer."""
    deadline = time.monotonic() + 3
    while True:
        try:
            more = holdings(site, pid).gained(before)
        except (OSError, psutil.NoSuchProcess):  # something ended while it was looked at
            more = ["the agent"]
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.02)


# The judge -----------------------------------------------------------------------------------

CAUSE = re.compile(
    r"(ResourceInitializationError|CannotStartContainerError|CannotPullContainerError"
    r"|CannotCreateVolumeError|ContainerRuntimeError)\S*: \S[^\n]*"
)


@dataclass(kw_only=True)
class Told:
    """What came of one walk."""

    went: Mapping[str, Any] = field(default_factory=dict)
    settled: Mapping[str, Any] = field(default_factory=dict)
    lost: str | None = None
    """Why the agent ended."""
    ended: int | None = None
    is_cut: bool = False
    """The end of the logs may be lost."""
    is_killed: bool = False
    """A container may have been killed."""

    def is_untroubled(self, path: paths.Path) -> bool:
        return not self.went and self.settled.get("stop_code", path.stop_code) == path.stop_code


def judged(path: paths.Path, told: Told) -> list[str]:
    """What is wrong. Pure."""
    wrong = []
    if "raised" in told.went:
        wrong.append(f"a request raised {told.went['raised']}")
    for text in filter(None, (told.went.get("refused"), told.lost)):
        if "\n" in text or len(text) < 10:
            wrong.append(f"told {text!r}")
    if told.ended is not None and told.lost is None:
        wrong.append(f"the agent ended with {told.ended}")
    settled = told.settled
    if settled.get("second") != 42:
        wrong.append(f"a second task ended with {settled.get('second')}")
    if "status" in settled:
        wrong += judged_task(path, settled, told)
    return wrong


def judged_task(path: paths.Path, settled: Mapping[str, Any], told: Told) -> list[str]:
    if settled["status"] != "STOPPED":
        return [f"the task is {settled['status']}"]
    containers: Mapping[str, tuple[str, int | None, str | None]] = settled["containers"]
    running = [f"{name} is {c[0]}" for name, c in containers.items() if c[0] != "STOPPED"]
    code, reason = settled["stop_code"], settled["reason"] or ""
    reasons = [reason, *(c[2] or "" for c in containers.values())]
    if code == StopCode.TASK_FAILED_TO_START or not path.starts:
        says = any(CAUSE.fullmatch(text) for text in reasons)
        return running + ([] if says else [f"no cause is told: {reasons}"])
    if any(CAUSE.fullmatch(text) for text in reasons):
        return running  # a container could not be started (again), and it says why
    codes = {name: c[1] for name, c in containers.items()}
    wrong = [
        f"{name} ended with {codes[name]}, not {code}"
        for name, code in path.exit_codes.items()
        if codes[name] not in ((code, 137) if told.is_killed else (code,))
    ]
    wrong += [
        f"{name} wrote {log!r}"
        for name, text in path.stdout.items()
        for log in [settled["logs"][name]]
        if not (text.startswith(log) if told.is_cut else log == text)
    ]
    if code != path.stop_code:
        wrong.append(f"stopped by {code} ({reason})")
    return running + wrong


# Walking -------------------------------------------------------------------------------------


class Walker:
    """One agent after the other over a task that stays."""

    def __init__(self, driver: Driver, site: Site, image: str) -> None:
        self.may_stay = False
        """What cannot be undone while it fails is undone by the next agent."""
        self.kills = False
        """A container may be killed before its program runs, and has then ended with 137."""
        self.loses_output = False
        """What fails may take output away, as on a full disk."""
        self._driver = driver
        self._request = {"verb": "serve", "image": image, **site.place}
        self._site = site
        self._image = image
        self._images = 0
        self.agents = 0
        self._before: Holdings | None = None
        self._rise()
        self._first = self._look()

    def _rise(self) -> None:
        self._driver.start(**self._request)
        said = self._driver.hear("ready", "ended")
        assert "ready" in said, said
        self.is_up, self.task = True, said["beside"]
        self.agents += 1
        now = at_rest(self._site, self.pid)
        if self._before is not None:  # what ends with an agent is its own, the rest is on the host
            now = replace(self._before, descriptors=now.descriptors, children=now.children)
        self._before = now

    @property
    def pid(self) -> int:
        return self._driver.pid

    def ask(self, answer: str, **asked: Any) -> dict[str, Any]:
        """What is said to it. An agent that ends instead is followed by another."""
        self._driver.tell(**asked)
        said = self._driver.hear(answer, "ended")
        if "ended" in said:
            self._rise()
        return said

    def walk(self, name: str, fault: AbstractContextManager[None] | None = None) -> list[str]:
        """What is wrong afterwards."""
        image = self._new_image() if name.startswith("pull") else self._image
        self.told = told = Told(is_cut=self.loses_output, is_killed=self.kills)
        with fault or nullcontext():
            self._driver.tell(go=name, image=image)
            self._note(told, self._driver.hear("went", "ended"))
            self.is_up = told.ended is None
        if told.ended is not None:
            self._rise()
        for _ in range(MOST_AGENTS):
            if told.settled:
                break
            self._note(told, self.ask("settled", settle=name))
        wrong = judged(WALKS[name], told)
        left = self._gained()
        if left and self.may_stay:  # on the host, until the next agent
            self.follow()
            left = self._gained()
        return wrong + [f"gained {what}" for what in left] + self._harm()

    def _new_image(self) -> str:
        """One layer that is there, and one that is not, with deletions."""
        self._images += 1

        def new(layer: make_image.LayerWriter) -> None:
            layer.whiteout("home/app")
            layer.opaque("var")
            layer.file("number", b"%d" % self._images)

        directory = self._site.run.with_name(f"image{self._images}")
        directory.mkdir()
        layout = make_image.Layout(directory)
        layers = [layout.layer(make_image.busybox), layout.layer(new)]
        layout.image("latest", layers, {"Env": [make_image.PATH], "Cmd": ["/bin/sh"]})
        return f"oci:{directory}:latest"

    def _gained(self) -> list[str]:
        assert self._before is not None
        return gained(self._site, self.pid, self._before)

    def enter(
        self, script: str, fault: AbstractContextManager[None]
    ) -> tuple[int | str, list[str]]:
        """An exec in the task beside; how it ended, and what is wrong afterwards."""
        with fault:
            code: int | str = self.ask("executed", exec=script)["executed"]
        wrong = [f"gained {what}" for what in self._gained()]
        return code, wrong + self._harm()

    def _note(self, told: Told, said: Mapping[str, Any]) -> None:
        told.went = said.get("went", told.went)
        told.settled = said.get("settled", told.settled)
        told.lost = said.get("lost", told.lost)
        told.ended = said.get("ended", told.ended)

    def _look(self) -> dict[str, Any]:
        seen: dict[str, Any] = self.ask("seen", look=True)["seen"]
        return seen

    def _harm(self) -> list[str]:
        """To the task beside; and it still writes."""
        seen = self._look()
        deadline = time.monotonic() + 5
        while (now := self._look())["lines"] == seen["lines"] and time.monotonic() < deadline:
            time.sleep(0.02)
        wrong = []
        if now["lines"] == seen["lines"]:
            wrong.append("the task beside writes no more")
        lines = [int(line) for line in now["lines"]]
        if lines != sorted(set(lines)) or not (self.loses_output or lines[-1] == len(lines) - 1):
            wrong.append("the task beside has lost output")
        if (now["status"], now["pid"]) != ("RUNNING", self._first["pid"]):
            wrong.append(f"the task beside is {now['status']}, pid {now['pid']}")
        return wrong

    def follow(self) -> None:
        """Another agent takes over."""
        self._driver.signal(signal.SIGKILL)
        self._rise()

    async def end(self) -> list[str]:
        """What is wrong with the task beside, and what is left when all is forgotten."""
        code = self.ask("stopped", stop=self.task)["stopped"]
        self._driver.tell()
        self._driver.hear("ended")
        wrong = [] if code == 3 else [f"the task beside ended with {code}"]
        async with self._site.agent() as agent:
            for view in agent.tasks.list():
                await agent.tasks.remove(view.id)
        return wrong + [f"left behind: {what}" for what in await self._site.remains()]

    def close(self) -> None:
        """What a failed test left running would run on."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        take_cgroups_away(self._site)
        for keeper in self._site.keepers():
            keeper.kill()
        for claim in self._site.claims():
            claim.unlink(missing_ok=True)
