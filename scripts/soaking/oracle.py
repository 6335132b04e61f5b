"""What must be true, judged by what users asked for and were answered, never by the agent's state.

A `Story` is one task as its user knows it. The oracle is told everything that is seen of a task and
everything that is done to it, and says what is wrong; what it says once is a failed soak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from sandbox.model.task import ContainerKnown, Status, StopCode, TaskView
from scripts.soaking.plans import Counter, Plan

RESTARTED = "ResourceInitializationError: the agent was restarted"
LOST = "ContainerRuntimeError: the keeper was killed, how it ended is unknown"
KILLED = 137
TERMINATED = 143
EARLY_S = 5.0
"""A container that is told to end so soon after its start may not have its handler yet."""


@dataclass(kw_only=True)
class Story:
    """A task that was acknowledged, and what its user and others did to it."""

    plan: Plan
    family: str
    agents: int
    """How many agents had ended when it was asked for."""
    view: TaskView
    is_stopped: bool = False
    killed: set[str] = field(default_factory=set)
    """Containers whose first process was sent SIGKILL."""
    orphaned: set[str] = field(default_factory=set)
    """Containers whose keeper was sent SIGKILL."""
    is_prunable: bool = False
    """Somebody pruned since it was asked for."""
    is_removed: bool = False
    """Its removal was asked for: it may be there, or not."""

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def is_disturbed(self) -> bool:
        return bool(self.is_stopped or self.killed or self.orphaned)

    @property
    def may_be_gone(self) -> bool:
        may_have_stopped = (
            not self.plan.is_endless
            or self.is_disturbed
            or self.view.known.last_status < Status.RUNNING
        )
        return self.is_removed or self.plan.remove or (self.is_prunable and may_have_stopped)


class Oracle:
    def __init__(self) -> None:
        self.stories: dict[str, Story] = {}
        self.violations: list[str] = []
        self.agents = 0
        """How many have ended."""
        self.is_pruning = False

    def wrong(self, what: str, story: Story | None = None) -> None:
        of = f"{story.plan.kind} {story.id} ({story.family}): " if story else ""
        self.violations.append(f"{of}{what}")

    def acknowledged(self, story: Story) -> None:
        story.is_prunable = self.is_pruning
        self.stories[story.id] = story

    def gone(self, story: Story) -> None:
        if not story.may_be_gone:
            self.wrong("was acknowledged and is not there", story)
        self.stories.pop(story.id, None)

    @contextmanager
    def pruning(self) -> Iterator[None]:
        self.is_pruning = True
        for story in self.stories.values():
            story.is_prunable = True
        try:
            yield
        finally:
            self.is_pruning = False

    def saw(self, view: TaskView, before: TaskView | None = None) -> None:
        """`before` is what the same connection has told last; others may be behind or ahead."""
        story = self.stories.get(view.id)
        if story is None:
            return
        is_newer = view.known.version > story.view.known.version
        wrong = moved_back(before, view) if before is not None else []
        wrong += moved_back(story.view, view) if is_newer else []
        for what in dict.fromkeys(wrong):
            self.wrong(what, story)
        if view.known.version >= story.view.known.version:
            story.view = view

    def expected(self) -> set[str]:
        """Tasks that must be there now."""
        return {id for id, story in self.stories.items() if not story.may_be_gone}

    def listed(self, views: Sequence[TaskView], expected: Iterable[str]) -> None:
        """`expected` are those of before the listing was asked for."""
        there = {view.id for view in views}
        for id in self.expected() & set(expected) - there:
            self.wrong("was acknowledged and is not there", self.stories[id])
        for view in views:
            self.saw(view)
        for what in shared_ids(views):
            self.wrong(what)

    def ended(self, story: Story, logs: Mapping[str, bytes]) -> None:
        for what in judged(story, self.agents, logs):
            self.wrong(what, story)


# Decisions ---------------------------------------------------------------------------------


def moved_back(before: TaskView, after: TaskView) -> list[str]:
    wrong = []
    if after.known.last_status < before.known.last_status:
        wrong.append(f"{before.known.last_status.name} became {after.known.last_status.name}")
    if before.known.stop_code not in (None, after.known.stop_code):
        wrong.append(f"stop code {before.known.stop_code} became {after.known.stop_code}")
    if (before.desired.desired_status, after.desired.desired_status) == ("STOPPED", "RUNNING"):
        wrong.append("was wanted STOPPED and is wanted RUNNING")
    return wrong


def shared_ids(views: Iterable[TaskView]) -> list[str]:
    live = [view for view in views if view.known.last_status is not Status.STOPPED]
    by_base = sorted((view.desired.id_base, view.id) for view in live)
    return [
        f"{one} and {other} both have the ids from {base}"
        for (base, one), (same, other) in pairwise(by_base)
        if base == same
    ]


def judged(story: Story, agents: int, logs: Mapping[str, bytes]) -> list[str]:
    """What is wrong with a task that has STOPPED."""
    known = story.view.known
    by_name = {container.name: container for container in known.containers}
    wrong = judged_cause(story, agents)
    for counter in story.plan.counters:
        found = by_name[counter.name]
        wrong += [
            f"{counter.name}: {what}"
            for what in judged_container(story, counter, found, logs[counter.name])
        ]
    return wrong


def judged_cause(story: Story, agents: int) -> list[str]:
    known, plan = story.view.known, story.plan
    said = f"stopped by {known.stop_code}: {known.stopped_reason}"
    if known.stop_code is StopCode.TASK_FAILED_TO_START:
        if plan.fails is not None and plan.fails in (known.stopped_reason or ""):
            return []
        undone = agents > story.agents and known.stopped_reason == RESTARTED
        return [] if undone else [said]
    if plan.fails is not None and not story.is_stopped:
        return [f"should not have started, but was {said}"]
    if known.stop_code is StopCode.USER_INITIATED:
        return [] if story.is_stopped else [f"nobody stopped it, but it was {said}"]
    if known.stop_code is not StopCode.ESSENTIAL_CONTAINER_EXITED:
        return [said]
    if plan.is_endless and not (story.killed or story.orphaned):
        return [f"it does not end by itself, but was {said}"]
    return []


def judged_container(
    story: Story, counter: Counter, found: ContainerKnown, log: bytes
) -> list[str]:
    starts = counted(log)
    wrong = [] if starts is not None else [f"its log is not 1, 2, 3 ...: {log[-200:]!r}"]
    if starts and counter.name not in story.killed | story.orphaned and not log.endswith(b"\n"):
        wrong.append(f"its last line is cut off: {log[-20:]!r}")
    if starts and len(starts) > found.attempt + 1:
        wrong.append(f"its log has {len(starts)} starts, it says {found.attempt + 1}")
    if found.last_status == "RUNNING":
        wrong.append("is RUNNING in a stopped task")
    if not is_right_end(story, counter, found, starts or []):
        wrong.append(
            f"ended with {found.exit_code} ({found.reason}) after {starts} of {counter.lines} lines"
        )
    return wrong


def is_right_end(
    story: Story, counter: Counter, found: ContainerKnown, starts: Sequence[int]
) -> bool:
    known = story.view.known
    if found.exit_code is None:
        return (
            story.plan.fails is not None
            or (counter.name in story.orphaned and found.reason == LOST)
            or (found.started_at is None and may_end_before_its_turn(story, counter))
        )
    is_whole = counter.lines is not None and (starts[-1] if starts else 0) == counter.lines
    if found.exit_code == counter.code and is_whole:
        return True
    if found.exit_code == KILLED and counter.name in story.killed:
        return True
    if not may_end_before_its_turn(story, counter):
        return False
    told_at = known.stopping_at or found.started_at or 0.0
    is_early = told_at - (found.started_at or told_at) < EARLY_S
    return found.exit_code == counter.told or (found.exit_code in (KILLED, TERMINATED) and is_early)


def may_end_before_its_turn(story: Story, counter: Counter) -> bool:
    """Somebody stopped the task, or it has another reason to end than this container."""
    others = [each for each in story.plan.essential if each.name != counter.name]
    return bool(
        story.is_stopped
        or others
        or story.view.known.stop_code is StopCode.TASK_FAILED_TO_START
        or (story.killed | story.orphaned) - {counter.name}
    )


def counted(log: bytes) -> list[int] | None:
    """How far each start has counted; None if it did not count 1, 2, 3 ..."""
    starts: list[int] = []
    *lines, rest = log.split(b"\n")
    for line in lines:
        if line == b"1":
            starts.append(1)
        elif starts and line == b"%d" % (starts[-1] + 1):
            starts[-1] += 1
        else:
            return None
    follows = b"%d" % (starts[-1] + 1 if starts else 1)
    return starts if follows.startswith(rest) else None
