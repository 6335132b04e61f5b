"""What tasks the soak runs: drawn from a seed, and known to the last line and exit code.

Every container counts: it writes 1, 2, 3 ..., a line each, so that a lost or repeated line shows.
One with a number of `lines` ends by itself with `code`; one without counts until it is told to end,
and then ends with `told`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sandbox.model.task import (
    ContainerDefinition,
    ContainerDependency,
    HealthCheck,
    LinuxParameters,
    MountPoint,
    RestartPolicy,
    TaskDefinition,
    Volume,
)

STOP_TIMEOUT_S = 10
RESTARTS_AFTER_S = 60
"""The least that ECS takes for restartAttemptPeriod."""


@dataclass(frozen=True, kw_only=True)
class Counter:
    """A container."""

    name: str = "app"
    lines: int | None = None
    pause_s: float = 0.05
    code: int = 0
    told: int = 0
    first: str = ""
    """A command before it counts; the container ends with 99 if that fails."""
    runs_before: int = 0
    """How often its restart policy starts it again; each run but the last is long enough for it."""
    members: Mapping[str, Any] = field(default_factory=dict)

    @property
    def script(self) -> str:
        limit = "1000000" if self.lines is None else str(self.lines)
        pause = f"sleep {self.pause_s:g}" if self.pause_s else ":"
        first = f"{self.first} || exit 99" if self.first else ":"
        again = ":"
        if self.runs_before:
            is_last = f"[ $r -ge {self.runs_before} ]"
            again = (
                "r=$(cat /runs 2>/dev/null || echo 0); echo $((r+1)) >/runs; "
                f"{is_last} || {{ sleep {RESTARTS_AFTER_S + 2} & wait $!; exit 1; }}"
            )
        return (
            f"trap 'exit {self.told}' TERM; {first}; n=0\n"
            f"while [ $n -lt {limit} ]; do n=$((n+1)); echo $n; {pause}; done\n"
            f"{again}\nexit {self.code}"
        )

    def definition(self, image: str) -> ContainerDefinition:
        return ContainerDefinition(
            name=self.name,
            image=image,
            entry_point=("sh", "-c"),
            command=(self.script,),
            stop_timeout=STOP_TIMEOUT_S,
            **self.members,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    kind: str
    counters: tuple[Counter, ...]
    members: Mapping[str, Any] = field(default_factory=dict)
    """Of the task definition."""
    remove: bool = False
    fails: str | None = None
    """It never starts, and this is in the reason."""

    @property
    def is_endless(self) -> bool:
        """Somebody has to stop it."""
        return all(counter.lines is None for counter in self.essential) and self.fails is None

    @property
    def essential(self) -> list[Counter]:
        return [c for c in self.counters if c.members.get("essential", True)]

    def definition(self, family: str, image: str) -> TaskDefinition:
        return TaskDefinition(
            family=family,
            cpu="256",
            memory="512",
            container_definitions=tuple(c.definition(image) for c in self.counters),
            **self.members,
        )


# The kinds ---------------------------------------------------------------------------------


def code(random: Random) -> int:
    return random.randrange(90)  # 99, and 128 and more, mean something


def short(random: Random) -> Plan:
    init = LinuxParameters(init_process_enabled=random.random() < 0.5)
    counter = Counter(
        lines=random.randint(0, 30),
        pause_s=0.02,
        code=code(random),
        members={"linux_parameters": init},
    )
    return Plan(kind="short", counters=(counter,))


def flood(random: Random) -> Plan:
    counter = Counter(lines=random.randint(5_000, 50_000), pause_s=0, code=code(random))
    return Plan(kind="flood", counters=(counter,))


def forgotten(random: Random) -> Plan:
    counter = Counter(lines=random.randint(0, 10), code=code(random))
    return Plan(kind="forgotten", counters=(counter,), remove=True)


def stays(random: Random) -> Plan:
    return Plan(kind="stays", counters=(Counter(told=code(random)),))


def checked(random: Random) -> Plan:
    check = HealthCheck(command=("CMD-SHELL", "test -d /proc/1"), interval=5, timeout=5)
    counter = Counter(told=code(random), members={"health_check": check})
    return Plan(kind="checked", counters=(counter,))


def several(random: Random) -> Plan:
    """One after the other over a volume, with a third beside the second."""
    shared = (MountPoint(source_volume="shared", container_path="/shared"),)
    after = (ContainerDependency(container_name="first", condition="SUCCESS"),)
    first = Counter(
        name="first",
        lines=random.randint(0, 5),
        first="echo hello >/shared/word",
        members={"essential": False, "mount_points": shared},
    )
    beside = Counter(
        name="beside", told=code(random), members={"essential": False, "depends_on": after}
    )
    app = Counter(
        lines=random.randint(1, 20),
        code=code(random),
        first="[ $(cat /shared/word) = hello ]",
        members={"depends_on": after, "mount_points": shared},
    )
    return Plan(
        kind="several",
        counters=(first, beside, app),
        members={"volumes": (Volume(name="shared"),)},
    )


def one_pid_namespace(random: Random) -> Plan:
    app = Counter(lines=random.randint(1, 20), code=code(random))
    beside = Counter(name="beside", told=code(random), members={"essential": False})
    return Plan(kind="pidMode", counters=(app, beside), members={"pid_mode": "task"})


def restarted(random: Random) -> Plan:
    policy = RestartPolicy(
        enabled=True, restart_attempt_period=RESTARTS_AFTER_S, ignored_exit_codes=(0,)
    )
    counter = Counter(
        lines=random.randint(1, 10),
        told=code(random),
        runs_before=1,
        members={"restart_policy": policy},
    )
    return Plan(kind="restarted", counters=(counter,))


def no_program(_: Random) -> Plan:
    counter = Counter(lines=0, members={"working_directory": "/etc/passwd/none"})
    return Plan(kind="no such directory", counters=(counter,), fails="CannotStartContainerError")


KINDS: Mapping[Callable[[Random], Plan], int] = {
    short: 24,
    flood: 4,
    forgotten: 8,
    stays: 30,
    checked: 4,
    several: 12,
    one_pid_namespace: 8,
    no_program: 4,
}
"""And how often each is drawn; `restarted`, which takes a minute, has a user of its own."""


def draw(random: Random) -> Plan:
    (kind,) = random.choices(list(KINDS), weights=list(KINDS.values()))
    return kind(random)
