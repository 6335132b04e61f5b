"""Order of start and stop: single verdicts, then any acyclic task played through at random."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sandbox.model import fargate
from sandbox.model.task import Health, RestartPolicy, StopCode, TaskDefinition
from sandbox.runtime import ordering
from sandbox.runtime.ordering import EndCause, Facts, Never, Ready, Waiting

NOTHING = Facts()
RUNS = Facts(started=True)
HEALTHY = Facts(started=True, health=Health.HEALTHY)
UNHEALTHY = Facts(started=True, health=Health.UNHEALTHY)
SUCCEEDED = Facts(started=True, ended=True, exit_code=0)
FAILED = Facts(started=True, ended=True, exit_code=3)
NEVER_RAN = Facts(ended=True, exit_code=127, reason="CannotStartContainerError: no such file")


def define(*containers: dict[str, Any]) -> TaskDefinition:
    wire = {"family": "f", "cpu": "256", "memory": "512"}
    return msgspec.convert({**wire, "containerDefinitions": containers}, TaskDefinition)


def container(name: str, **members: Any) -> dict[str, Any]:
    return {"name": name, "image": "busybox", **members}


def awaiting(condition: str, **members: Any) -> TaskDefinition:
    """`app` depends on `db` by `condition`."""
    dependency = {"containerName": "db", "condition": condition}
    return define(container("app", dependsOn=[dependency]), container("db", **members))


@pytest.mark.parametrize(
    ("condition", "holds", "waits", "never"),
    [
        ("START", [RUNS, UNHEALTHY, SUCCEEDED, FAILED], [NOTHING], [NEVER_RAN]),
        ("COMPLETE", [SUCCEEDED, FAILED], [NOTHING, RUNS, HEALTHY], [NEVER_RAN]),
        ("SUCCESS", [SUCCEEDED], [NOTHING, RUNS, HEALTHY], [FAILED, NEVER_RAN]),
        ("HEALTHY", [HEALTHY], [NOTHING, RUNS, UNHEALTHY], [SUCCEEDED, FAILED, NEVER_RAN]),
    ],
)
def test_a_container_starts_when_the_condition_holds(
    condition: str, holds: list[Facts], waits: list[Facts], never: list[Facts]
) -> None:
    definition = awaiting(condition)

    def verdict(fact: Facts) -> ordering.Verdict:
        return ordering.may_start(definition, "app", {"app": NOTHING, "db": fact})

    assert [verdict(fact) for fact in holds] == [Ready()] * len(holds)
    assert [verdict(fact) for fact in waits] == [Waiting(("db",))] * len(waits)
    assert all(isinstance(verdict(fact), Never) for fact in never)


def test_a_reason_names_both_containers_and_what_happened() -> None:
    facts = {"app": NOTHING, "db": FAILED}
    assert ordering.may_start(awaiting("SUCCESS"), "app", facts) == Never(
        "Task failed to start: container 'app' needs 'db' to end with 0, but it ended with 3"
    )


@pytest.mark.parametrize("condition", ["COMPLETE", "SUCCESS", "HEALTHY"])
def test_the_start_timeout_of_the_awaited_container_ends_the_wait(condition: str) -> None:
    definition = awaiting(condition, startTimeout=30)
    in_time, late = Facts(started=True, age_s=29.9), Facts(started=True, age_s=30)
    assert ordering.may_start(definition, "app", {"app": NOTHING, "db": in_time}) == Waiting(
        ("db",)
    )
    assert ordering.may_start(definition, "app", {"app": NOTHING, "db": late}) == Never(
        f"Task failed to start: container 'app' needs 'db' to be {condition}, but its startTimeout "
        "of 30 s is over"
    )


def test_a_condition_that_holds_is_not_undone_by_the_start_timeout() -> None:
    late = Facts(started=True, health=Health.HEALTHY, age_s=99)
    definition = awaiting("HEALTHY", startTimeout=30)
    assert ordering.may_start(definition, "app", {"app": NOTHING, "db": late}) == Ready()


def test_volumes_come_from_a_container_that_has_started() -> None:
    definition = define(container("app", volumesFrom=[{"sourceContainer": "db"}]), container("db"))
    for fact, verdict in ((NOTHING, Waiting(("db",))), (RUNS, Ready()), (SUCCEEDED, Ready())):
        assert ordering.may_start(definition, "app", {"app": NOTHING, "db": fact}) == verdict
    assert isinstance(
        ordering.may_start(definition, "app", {"app": NOTHING, "db": NEVER_RAN}), Never
    )


def test_the_start_order_keeps_the_definitions_where_nothing_else_decides() -> None:
    definition = define(
        container("a", dependsOn=[{"containerName": "c", "condition": "START"}]),
        container("b"),
        container("c"),
        container("d", volumesFrom=[{"sourceContainer": "a"}]),
    )
    assert ordering.start_order(definition) == ("b", "c", "a", "d")


def test_what_others_waited_for_stops_after_them() -> None:
    definition = awaiting("START")
    assert ordering.may_stop(definition, "app", {"app": RUNS, "db": RUNS})
    assert not ordering.may_stop(definition, "db", {"app": RUNS, "db": RUNS})
    assert ordering.may_stop(definition, "db", {"app": FAILED, "db": RUNS})
    assert ordering.may_stop(definition, "db", {"app": NOTHING, "db": RUNS})


# The task as a whole


def test_a_task_runs_when_every_container_has_started_or_is_over() -> None:
    definition = define(container("a"), container("b", essential=False))
    assert not ordering.is_running(definition, {"a": RUNS, "b": NOTHING})
    assert ordering.is_running(definition, {"a": RUNS, "b": RUNS})
    assert ordering.is_running(definition, {"a": RUNS, "b": SUCCEEDED})
    assert ordering.is_running(definition, {"a": RUNS, "b": NEVER_RAN})


@pytest.mark.parametrize("ended", [SUCCEEDED, FAILED])
def test_the_end_of_an_essential_container_ends_the_task(ended: Facts) -> None:
    definition = define(container("a"), container("b", essential=False))
    assert ordering.end_of_task(definition, {"a": ended, "b": RUNS}) == EndCause(
        StopCode.ESSENTIAL_CONTAINER_EXITED, "Essential container in task exited"
    )
    assert ordering.end_of_task(definition, {"a": RUNS, "b": ended}) is None


def test_an_essential_container_that_cannot_start_fails_the_task_with_its_reason() -> None:
    definition = define(container("a"), container("b", essential=False))
    assert ordering.end_of_task(definition, {"a": NEVER_RAN, "b": RUNS}) == EndCause(
        StopCode.TASK_FAILED_TO_START, "CannotStartContainerError: no such file"
    )
    assert ordering.end_of_task(definition, {"a": Facts(ended=True), "b": RUNS}) == EndCause(
        StopCode.TASK_FAILED_TO_START, "Task failed to start"
    )
    assert ordering.end_of_task(definition, {"a": RUNS, "b": NEVER_RAN}) is None


@pytest.mark.parametrize(
    ("first", "second", "task"),
    [
        ("HEALTHY", "HEALTHY", "HEALTHY"),
        ("HEALTHY", "UNKNOWN", "UNKNOWN"),
        ("UNKNOWN", "UNHEALTHY", "UNHEALTHY"),
        ("UNHEALTHY", "HEALTHY", "UNHEALTHY"),
    ],
)
def test_a_task_is_as_healthy_as_the_worst_essential_container(
    first: str, second: str, task: str
) -> None:
    definition = define(container("a"), container("b"), container("c", essential=False))
    healths = {"a": Health(first), "b": Health(second), "c": Health.UNHEALTHY}
    assert ordering.task_health(definition, healths) is Health(task)


def test_a_restart_needs_a_policy_a_code_that_counts_and_a_run_that_was_long_enough() -> None:
    policy = RestartPolicy(enabled=True, ignored_exit_codes=(0, 42), restart_attempt_period=60)
    off = RestartPolicy(enabled=False)

    def restarts(policy: RestartPolicy | None, code: int | None, ran_s: float) -> bool:
        return ordering.should_restart(policy, exit_code=code, ran_s=ran_s, stopping=False)

    assert restarts(policy, 1, 60)
    assert restarts(policy, 137, 1e6)
    assert not restarts(policy, 1, 59.9)
    assert not restarts(policy, 42, 60)
    assert not restarts(policy, None, 60)
    assert not restarts(off, 1, 1e6)
    assert not restarts(None, 1, 1e6)
    assert not ordering.should_restart(policy, exit_code=1, ran_s=60, stopping=True)


# Any task


@st.composite
def tasks(draw: st.DrawFn) -> TaskDefinition:
    """A task that Fargate accepts: arrows go from later to earlier names, the order is shuffled."""
    count = draw(st.integers(1, 6))
    names = [f"c{n}" for n in range(count)]
    essential = {n: draw(st.booleans()) for n in names[:-1]} | {names[-1]: True}
    containers = []
    for place, name in enumerate(names):
        earlier = st.sets(st.sampled_from(names[:place]), max_size=3) if place else st.just(set())
        depends_on = []
        for other in sorted(draw(earlier)):
            conditions = ["START", "HEALTHY"]
            if not essential[other]:
                conditions += ["COMPLETE", "SUCCESS"]
            condition = draw(st.sampled_from(conditions))
            depends_on.append({"containerName": other, "condition": condition})
        containers.append(
            container(
                name,
                essential=essential[name],
                dependsOn=depends_on,
                volumesFrom=[{"sourceContainer": other} for other in sorted(draw(earlier))],
                healthCheck={"command": ["CMD", "true"]},
            )
        )
    definition = define(*draw(st.permutations(containers)))
    assert fargate.check(definition) == []
    return definition


@given(tasks())
def test_the_start_order_of_any_task_has_everybody_after_those_it_waits_for(
    definition: TaskDefinition,
) -> None:
    order = ordering.start_order(definition)
    assert sorted(order) == sorted(c.name for c in definition.container_definitions)
    for one in definition.container_definitions:
        for other in fargate.waits_for(one):
            assert order.index(other) < order.index(one.name)


class AnyTask(RuleBasedStateMachine):
    """Start what may start, end what runs, turn health; then stop, in whatever order is allowed."""

    @initialize(definition=tasks())
    def begin(self, definition: TaskDefinition) -> None:
        self.definition = definition
        self.containers = {c.name: c for c in definition.container_definitions}
        self.facts = dict.fromkeys(self.containers, Facts())

    def live(self) -> list[str]:
        return [name for name, fact in self.facts.items() if fact.started and not fact.ended]

    def verdicts(self) -> dict[str, ordering.Verdict]:
        return {
            name: ordering.may_start(self.definition, name, self.facts)
            for name, fact in self.facts.items()
            if not fact.started and not fact.ended
        }

    def ready(self) -> list[str]:
        return [name for name, verdict in self.verdicts().items() if verdict == Ready()]

    def live_dependants(self, name: str) -> list[str]:
        return [n for n in self.live() if name in fargate.waits_for(self.containers[n])]

    @precondition(lambda self: self.ready())
    @rule(data=st.data(), starts=st.sampled_from([True, True, True, False]))
    def start(self, data: st.DataObject, starts: bool) -> None:
        name = data.draw(st.sampled_from(self.ready()))
        self.facts[name] = RUNS if starts else NEVER_RAN

    @precondition(lambda self: self.live())
    @rule(data=st.data(), health=st.sampled_from(Health))
    def turn_health(self, data: st.DataObject, health: Health) -> None:
        name = data.draw(st.sampled_from(self.live()))
        self.facts[name] = Facts(started=True, health=health)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), code=st.sampled_from([0, 0, 1]))
    def end(self, data: st.DataObject, code: int) -> None:
        name = data.draw(st.sampled_from(self.live()))
        self.facts[name] = Facts(started=True, ended=True, exit_code=code)

    @precondition(lambda self: not self.live() and not self.ready())
    @rule()
    def play_again(self) -> None:
        self.facts = dict.fromkeys(self.containers, Facts())

    @invariant()
    def what_is_ready_has_all_that_it_waits_for(self) -> None:
        for name, verdict in self.verdicts().items():
            container = self.containers[name]
            held = [
                self.holds(dependency.condition, self.facts[dependency.container_name])
                for dependency in container.depends_on
            ] + [self.facts[source.source_container].started for source in container.volumes_from]
            assert (verdict == Ready()) is all(held)

    def holds(self, condition: str, fact: Facts) -> bool:
        runs = fact.started and not fact.ended
        return {
            "START": fact.started,
            "COMPLETE": fact.started and fact.ended,
            "SUCCESS": fact.started and fact.ended and fact.exit_code == 0,
            "HEALTHY": runs and fact.health is Health.HEALTHY,
        }[condition]

    @invariant()
    def who_waits_waits_for_somebody_that_can_still_move(self) -> None:
        for name, verdict in self.verdicts().items():
            if isinstance(verdict, Waiting):
                assert verdict.on
                assert set(verdict.on) <= fargate.waits_for(self.containers[name])
                assert not any(self.facts[other].ended for other in verdict.on)

    @invariant()
    def the_task_is_never_stuck(self) -> None:
        verdicts = self.verdicts()
        if verdicts and not self.live():
            assert any(not isinstance(verdict, Waiting) for verdict in verdicts.values())

    @invariant()
    def only_what_nobody_alive_waited_for_may_stop(self) -> None:
        for name in self.live():
            may_stop = ordering.may_stop(self.definition, name, self.facts)
            assert may_stop is not bool(self.live_dependants(name))

    @invariant()
    def the_task_runs_when_nobody_waits(self) -> None:
        assert ordering.is_running(self.definition, self.facts) is not bool(self.verdicts())

    @invariant()
    def the_task_ends_with_its_essential_containers(self) -> None:
        ended = any(self.containers[n].essential and f.ended for n, f in self.facts.items())
        assert (ordering.end_of_task(self.definition, self.facts) is not None) is ended

    def teardown(self) -> None:
        """Wherever it is, the task can be stopped, everybody after those that waited."""
        while live := self.live():
            allowed = [n for n in live if ordering.may_stop(self.definition, n, self.facts)]
            assert allowed
            for name in allowed:
                self.facts[name] = FAILED


TestAnyTask = AnyTask.TestCase
TestAnyTask.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
