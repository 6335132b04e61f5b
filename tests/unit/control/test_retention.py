"""Which stopped tasks are forgotten, also when the host's clock was set meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from sandbox.control.retention import Ages, expired
from sandbox.model.task import (
    ContainerDefinition,
    Status,
    TaskDefinition,
    TaskDesired,
    TaskView,
)
from sandbox.store import rows

DAY_S = 86400.0


class Clocks:
    """The one that people set, and the one that only passes."""

    def __init__(self) -> None:
        self.wall, self.passed = 1e9, 100.0
        self.ages = Ages(lambda: self.wall, lambda: self.passed)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds


def view(
    id: str, status: Status, stopped_at: float | None = None, *, remove: bool = False
) -> TaskView:
    definition = TaskDefinition(
        family="test",
        cpu="256",
        memory="512",
        container_definitions=(ContainerDefinition(name="app", image="image"),),
    )
    desired = TaskDesired(
        id=id,
        cluster="default",
        group="",
        definition=definition,
        created_at=0,
        id_base=0,
        platform_version="1.4.0",
        remove=remove,
    )
    known = msgspec.structs.replace(
        rows.not_yet_known(desired), last_status=status, stopped_at=stopped_at
    )
    return TaskView(desired=desired, known=known, arn="")


def stopped(id: str, at: float) -> TaskView:
    return view(id, Status.STOPPED, at)


def test_a_task_is_forgotten_an_hour_after_it_stopped() -> None:
    clocks = Clocks()
    views = [stopped("old", clocks.wall - 3601), stopped("new", clocks.wall - 3599)]
    assert expired(views, clocks.ages.of, 3600, 100) == ["old"]
    clocks.pass_by(2)
    assert set(expired(views, clocks.ages.of, 3600, 100)) == {"old", "new"}


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_is_set_makes_no_task_older_or_younger(jump_s: float) -> None:
    clocks = Clocks()
    before = stopped("before", clocks.wall)
    assert expired([before], clocks.ages.of, 3600, 100) == []
    clocks.wall += jump_s
    views = [before, stopped("after", clocks.wall)]
    clocks.pass_by(10)
    assert expired(views, clocks.ages.of, 3600, 100) == []
    clocks.pass_by(3591)
    assert set(expired(views, clocks.ages.of, 3600, 100)) == {"before", "after"}


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_beyond_a_number_those_go_that_stopped_first_whatever_the_clock_said(
    jump_s: float,
) -> None:
    clocks = Clocks()
    first = stopped("first", clocks.wall)
    clocks.ages.of(first.known)
    clocks.pass_by(1)
    clocks.wall += jump_s
    views = [first, stopped("second", clocks.wall)]
    assert expired(views, clocks.ages.of, 3600, 1) == ["first"]


def test_what_runs_stays_and_what_was_run_to_be_removed_goes_at_once() -> None:
    clocks = Clocks()
    runs = view("runs", Status.RUNNING)
    removed = view("removed", Status.STOPPED, clocks.wall, remove=True)
    assert expired([runs, removed], clocks.ages.of, 3600, 100) == ["removed"]
