"""A task as people and scripts see it: ECS's Task object where ECS has the member."""

from __future__ import annotations

from typing import Any

import msgspec

from sandbox.model.task import ContainerDefinition, ContainerKnown, TaskView, effective_desire

INTERNAL = {
    *("id", "idBase", "owner", "keeper", "desiredStatus", "lastStatus", "containers", "storage"),
}
"""Members that are how the agent works, or that are set below in another form."""


def shape(view: TaskView) -> dict[str, Any]:
    """JSON-ready; statuses are names, times seconds since the epoch as in ECS's JSON."""
    desired = _public(msgspec.to_builtins(view.desired))
    known = _public(msgspec.to_builtins(view.known))
    defined = {each.name: each for each in view.desired.definition.container_definitions}
    return {
        "taskArn": view.arn,
        "taskId": view.id,
        "lastStatus": view.known.last_status.name,
        "desiredStatus": effective_desire(view),
        "healthStatus": view.known.health.value,
        **desired,
        **_storage(view),
        **known,
        "containers": [
            _container(container, defined.get(container.name))
            for container in view.known.containers
        ],
    }


def _storage(view: TaskView) -> dict[str, Any]:
    """Up to platform version 1.3.0 no task had a size of storage to tell."""
    storage = view.desired.storage
    if storage.volumes_gib is not None:
        return {}
    return {"ephemeralStorage": {"sizeInGiB": storage.size_gib}}


def _container(known: ContainerKnown, defined: ContainerDefinition | None) -> dict[str, Any]:
    return {
        "name": known.name,
        "image": defined.image if defined else None,
        "lastStatus": known.last_status,
        "healthStatus": known.health.value,
        **_public(msgspec.to_builtins(known)),
    }


def _public(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in INTERNAL | {"health"}}


def main_container(view: TaskView) -> ContainerKnown | None:
    """The first essential container: its exit code is the task's."""
    for defined in view.desired.definition.container_definitions:
        if defined.essential:
            return next((each for each in view.known.containers if each.name == defined.name), None)
    return None
