"""Which container of a task may move now, and what ends the task. Pure: facts in, verdicts out.

A container waits for those that its dependsOn names, each on a condition:

    START     it has started, and may have ended since
    COMPLETE  it has ended, with any code
    SUCCESS   it has ended with 0
    HEALTHY   it runs and its health check says so; looked at when starting, never again

and for those whose volumes it takes by volumesFrom to have started: ECS's agent turns that into a
dependency too. Stopping goes the other way: a container is told to stop when nothing that waited
for it runs any more. `model.fargate` refuses cycles, so there is always one that may move.

A startTimeout is the awaited container's: so long after its own start may the others wait for more
than START. What can never start fails the task.

Every function is total over the facts: it may be asked at any moment, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import TypeAlias

from sandbox.model.fargate import waits_for
from sandbox.model.task import (
    ContainerDefinition,
    ContainerDependency,
    Health,
    RestartPolicy,
    StopCode,
    TaskDefinition,
)

ESSENTIAL_EXITED = "Essential container in task exited"
FAILED_TO_START = "Task failed to start"
"""Both are ECS's texts."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one container."""

    started: bool = False
    """Its program has run at least once."""
    ended: bool = False
    """For good: it ended, or failed to start, and is not to be started again."""
    exit_code: int | None = None
    health: Health = Health.UNKNOWN
    reason: str | None = None
    """Why it failed to start."""
    age_s: float = 0.0
    """How long ago it started; startTimeout is measured with it."""


@dataclass(frozen=True)
class Ready:
    """Start it."""


@dataclass(frozen=True)
class Waiting:
    on: tuple[str, ...]
    """The containers that keep it waiting; never empty."""


@dataclass(frozen=True)
class Never:
    reason: str
    """A stoppedReason for the task."""


Verdict: TypeAlias = Ready | Waiting | Never


@dataclass(frozen=True)
class EndCause:
    code: StopCode
    reason: str


def may_start(definition: TaskDefinition, name: str, facts: Mapping[str, Facts]) -> Verdict:
    """For a container that was not started yet."""
    container = _container(definition, name)
    waiting: dict[str, None] = {}
    for dependency in container.depends_on:
        awaited = _container(definition, dependency.container_name)
        match _condition(dependency, awaited, facts[awaited.name]):
            case str(failure):
                return Never(f"{FAILED_TO_START}: container '{name}' {failure}")
            case False:
                waiting[awaited.name] = None
            case True:
                pass
    for source in container.volumes_from:
        fact = facts[source.source_container]
        if fact.ended and not fact.started:
            failure = f"takes volumes from '{source.source_container}', which did not start"
            return Never(f"{FAILED_TO_START}: container '{name}' {failure}")
        if not fact.started:
            waiting[source.source_container] = None
    return Waiting(tuple(waiting)) if waiting else Ready()


def _condition(
    dependency: ContainerDependency, awaited: ContainerDefinition, fact: Facts
) -> bool | str:
    """Whether the condition holds now, or why it never will."""
    needs, condition = f"needs '{awaited.name}' to", dependency.condition
    if fact.ended and not fact.started:
        return f"{needs} {condition}, but it did not start"
    if condition == "START":
        return fact.started
    if condition == "COMPLETE" and fact.ended:
        return True
    if condition == "SUCCESS" and fact.ended:
        return fact.exit_code == 0 or f"{needs} end with 0, but it ended with {fact.exit_code}"
    if condition == "HEALTHY" and fact.ended:
        return f"{needs} be HEALTHY, but it has ended"
    if condition == "HEALTHY" and fact.started and fact.health is Health.HEALTHY:
        return True
    limit = awaited.start_timeout
    if fact.started and limit is not None and fact.age_s >= limit:
        return f"{needs} be {condition}, but its startTimeout of {limit} s is over"
    return False


def start_order(definition: TaskDefinition) -> tuple[str, ...]:
    """An order in which nobody comes before those it waits for; else that of the definition."""
    containers = definition.container_definitions
    places = {container.name: place for place, container in enumerate(containers)}
    sorter = TopologicalSorter({c.name: waits_for(c) for c in containers})
    sorter.prepare()
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=places.__getitem__)
        order += ready
        sorter.done(*ready)
    return tuple(order)


def may_stop(definition: TaskDefinition, name: str, facts: Mapping[str, Facts]) -> bool:
    """Nothing that waited for this container runs any more."""
    return not any(_is_live(facts[dependant]) for dependant in _dependants(definition, name))


def is_running(definition: TaskDefinition, facts: Mapping[str, Facts]) -> bool:
    """Every container has got as far as it will by itself: it started, or is over already."""
    return all(
        facts[container.name].started or facts[container.name].ended
        for container in definition.container_definitions
    )


def end_of_task(definition: TaskDefinition, facts: Mapping[str, Facts]) -> EndCause | None:
    """Why the task must stop now; the end of a container that is not essential is no cause."""
    for container in definition.container_definitions:
        fact = facts[container.name]
        if container.essential and fact.ended:
            if fact.started:
                return EndCause(StopCode.ESSENTIAL_CONTAINER_EXITED, ESSENTIAL_EXITED)
            return EndCause(StopCode.TASK_FAILED_TO_START, fact.reason or FAILED_TO_START)
    return None


def task_health(definition: TaskDefinition, healths: Mapping[str, Health]) -> Health:
    """The worst of the essential containers; one without a health check is UNKNOWN."""
    essential = {
        healths[container.name]
        for container in definition.container_definitions
        if container.essential
    }
    for health in (Health.UNHEALTHY, Health.UNKNOWN):
        if health in essential:
            return health
    return Health.HEALTHY


def should_restart(
    policy: RestartPolicy | None, *, exit_code: int | None, ran_s: float, stopping: bool
) -> bool:
    """Whether a container that ended is started again in place.

    Not when it ended sooner than restartAttemptPeriod, and not when it never started.
    """
    return (
        policy is not None
        and policy.enabled
        and not stopping
        and exit_code is not None
        and exit_code not in policy.ignored_exit_codes
        and ran_s >= policy.restart_attempt_period
    )


def _container(definition: TaskDefinition, name: str) -> ContainerDefinition:
    return next(c for c in definition.container_definitions if c.name == name)


def _dependants(definition: TaskDefinition, name: str) -> Iterator[str]:
    for container in definition.container_definitions:
        if name in waits_for(container):
            yield container.name


def _is_live(fact: Facts) -> bool:
    return fact.started and not fact.ended
