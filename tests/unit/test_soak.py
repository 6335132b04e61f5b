"""What scripts/soak takes for wrong: it must see what a broken agent would do."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from sandbox.model.task import ContainerKnown, Status, StopCode, TaskDesired, TaskKnown, TaskView
from scripts.soaking.host import mixed_up
from scripts.soaking.oracle import (
    LOST,
    RESTARTED,
    Oracle,
    Story,
    counted,
    judged,
    moved_back,
    shared_ids,
)
from scripts.soaking.plans import KINDS, Counter, Plan

EXITED = StopCode.ESSENTIAL_CONTAINER_EXITED
COUNTS = Plan(kind="short", counters=(Counter(lines=3, code=7, told=8),))
STAYS = Plan(kind="stays", counters=(Counter(told=8),))


def view(id: str = "one", base: int = 1, **known: Any) -> TaskView:
    definition = COUNTS.definition("family", "image")
    desired = TaskDesired(
        id=id, cluster="c", group="g", definition=definition, created_at=0.0, id_base=base
    )
    return TaskView(desired=desired, known=TaskKnown(id=id, **known), arn="arn")


def story(plan: Plan, code: int | None, cause: StopCode = EXITED, **more: Any) -> Story:
    given = {"reason": None, "stopped_reason": None, "agents": 0} | more
    container = ContainerKnown(
        name="app",
        last_status="STOPPED",
        started_at=1.0,
        exit_code=code,
        reason=given.pop("reason"),
    )
    stopped = view(
        last_status=Status.STOPPED,
        stop_code=cause,
        stopping_at=100.0,
        stopped_reason=given.pop("stopped_reason"),
        containers=(container,),
    )
    return Story(plan=plan, family="family", view=stopped, **given)


@pytest.mark.parametrize(
    ("log", "starts"),
    [
        (b"", []),
        (b"1\n2\n3\n", [3]),
        (b"1\n2\n1\n2\n3\n", [2, 3]),
        (b"1\n2\n3", [2]),
        (b"1\n3\n", None),
        (b"2\n", None),
        (b"1\n1\n2\n2\n", None),
        (b"1\n2\nx", None),
    ],
)
def test_a_line_that_is_lost_or_repeated_is_seen(log: bytes, starts: list[int] | None) -> None:
    assert counted(log) == starts


RIGHT = {
    "its own end": (story(COUNTS, 7), b"1\n2\n3\n"),
    "told": (story(STAYS, 8, StopCode.USER_INITIATED, is_stopped=True), b"1\n"),
    "killed": (story(STAYS, 137, killed={"app"}), b"1\n"),
    "orphaned": (story(STAYS, None, orphaned={"app"}, reason=LOST), b"1\n2"),
    "undone": (
        story(COUNTS, 8, StopCode.TASK_FAILED_TO_START, stopped_reason=RESTARTED),
        b"1\n",
    ),
}


@pytest.mark.parametrize("end", RIGHT)
def test_what_was_done_to_a_task_explains_its_end(end: str) -> None:
    told, log = RIGHT[end]
    assert judged(told, 1, {"app": log}) == []


WRONG = {
    "another code": (story(COUNTS, 0), b"1\n2\n3\n"),
    "a line is missing": (story(COUNTS, 7), b"1\n2\n"),
    "a line is cut off": (story(STAYS, 8, StopCode.USER_INITIATED, is_stopped=True), b"1\n2"),
    "nobody killed it": (story(STAYS, 137), b"1\n"),
    "nobody stopped it": (story(STAYS, 8, StopCode.USER_INITIATED), b"1\n"),
    "its keeper was left alone": (story(COUNTS, None, reason=LOST), b"1\n"),
    "killed long after it was told": (
        story(STAYS, 137, StopCode.USER_INITIATED, is_stopped=True),
        b"1\n",
    ),
    "started once too often": (story(COUNTS, 7), b"1\n1\n2\n3\n"),
    "undone, though no agent had ended": (
        story(COUNTS, 8, StopCode.TASK_FAILED_TO_START, stopped_reason=RESTARTED, agents=1),
        b"1\n",
    ),
}


@pytest.mark.parametrize("end", WRONG)
def test_what_nothing_explains_is_wrong(end: str) -> None:
    told, log = WRONG[end]
    assert judged(told, 1, {"app": log}) != []


def test_a_status_does_not_go_back_and_a_cause_stays() -> None:
    running, pending = (view(last_status=s) for s in (Status.RUNNING, Status.PENDING))
    assert moved_back(pending, running) == []
    assert moved_back(running, pending) != []
    assert moved_back(view(stop_code=EXITED), view(stop_code=StopCode.USER_INITIATED)) != []


def test_two_live_tasks_share_no_ids() -> None:
    gone = view("gone", last_status=Status.STOPPED)
    assert shared_ids([view("one", 1), view("two", 2), gone]) == []
    assert shared_ids([view("one", 1), view("two", 1)]) != []
    assert mixed_up({"one": {65536}, "two": {131072}, "three": set()}) == set()
    assert len(mixed_up({"one": {65536}, "two": {65536}})) == 1
    assert len(mixed_up({"one": {65536, 131072}})) == 1


def test_a_task_that_was_acknowledged_is_missed() -> None:
    oracle = Oracle()
    told = Story(plan=STAYS, family="family", agents=0, view=view(last_status=Status.RUNNING))
    oracle.acknowledged(told)
    oracle.listed([told.view], oracle.expected())
    with oracle.pruning():  # takes stopped ones alone
        oracle.listed([], oracle.expected())
    assert len(oracle.violations) == 1
    told.is_removed = True
    oracle.listed([], oracle.expected())
    assert len(oracle.violations) == 1


def test_a_seed_draws_the_same_again() -> None:
    for kind in KINDS:
        one, other = (kind(Random(7)).definition("family", "image") for _ in range(2))
        assert one == other
