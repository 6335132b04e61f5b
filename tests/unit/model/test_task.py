"""What is stored and sent is what was asked for."""

from __future__ import annotations

import msgspec
import pytest

from sandbox.model.task import (
    ContainerDefinition,
    StopCode,
    TaskDefinition,
    TaskDesired,
    TaskKnown,
    TaskView,
    effective_desire,
)


@pytest.mark.parametrize("entry_point", [None, (), ("a",)])
def test_an_empty_entry_point_is_not_the_same_as_none(entry_point: tuple[str, ...] | None) -> None:
    definition = ContainerDefinition(name="a", image="b", entry_point=entry_point)
    stored = msgspec.json.encode(definition)
    assert msgspec.json.decode(stored, type=ContainerDefinition).entry_point == entry_point


def test_a_task_that_goes_down_by_itself_is_wanted_stopped() -> None:
    definition = TaskDefinition(family="f", cpu="256", memory="512", container_definitions=())
    desired = TaskDesired(
        id="1", cluster="c", group="g", definition=definition, created_at=0, id_base=0
    )
    runs = TaskView(desired=desired, known=TaskKnown(id="1"), arn="a")
    assert effective_desire(runs) == "RUNNING"
    code = StopCode.ESSENTIAL_CONTAINER_EXITED
    ended = msgspec.structs.replace(runs, known=TaskKnown(id="1", stop_code=code))
    assert effective_desire(ended) == "STOPPED"
