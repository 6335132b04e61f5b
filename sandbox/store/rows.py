"""Where tasks are kept: two rows each, one for each writer.

task/<id>/desired   TaskDesired   control writes it
task/<id>/known     TaskKnown     the task's supervisor writes it
"""

from __future__ import annotations

from typing import Final

from sandbox.model.task import ContainerKnown, Status, TaskDesired, TaskKnown
from sandbox.store.base import Store, Versioned

TASKS: Final = "task/"


def desired_key(task: str) -> str:
    return f"{TASKS}{task}/desired"


def known_key(task: str) -> str:
    return f"{TASKS}{task}/known"


def task_ids(store: Store) -> list[str]:
    """Of every task that is kept, STOPPED ones too."""
    keys = (key.split("/") for key in store.keys(TASKS))
    return [task for _, task, row in keys if row == "desired"]


def desired(store: Store, task: str) -> Versioned[TaskDesired] | None:
    return store.get(desired_key(task), TaskDesired)


def known(store: Store, task: str) -> TaskKnown | None:
    """None until the supervisor wrote for the first time."""
    row = store.get(known_key(task), TaskKnown)
    return row.value if row else None


def has_stopped(store: Store, task: str) -> bool:
    row = known(store, task)
    return row is not None and row.last_status is Status.STOPPED


def not_yet_known(row: TaskDesired) -> TaskKnown:
    """What is known of a task before anything was done for it: PROVISIONING."""
    containers = tuple(ContainerKnown(name=c.name) for c in row.definition.container_definitions)
    return TaskKnown(id=row.id, containers=containers)
