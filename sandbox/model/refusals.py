"""Every text with which a task definition is refused, in one table.

The first group is ECS's, byte for byte, with its full stops. For the others no wording of ECS is
known to us; they are ours, and are replaced here when one is learned.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox.errors import ClientException


class Text(enum.StrEnum):
    # ECS's
    CPU_MISSING = "Fargate requires that 'cpu' be defined at the task level."
    MEMORY_MISSING = "Fargate requires that 'memory' be defined at the task level."
    CPU_INVALID = (
        "Invalid 'cpu' setting for task. For more information, see the Troubleshooting section of "
        "the Amazon ECS Developer Guide."
    )
    CPU_INVALID_2017 = "Invalid 'cpu' setting for task."
    NO_SUCH_SIZE = (
        "No Fargate configuration exists for given values: {cpu} CPU, {memory} memory. See the "
        "Amazon ECS documentation for the valid values."
    )
    NO_SUCH_SIZE_2017 = "No Fargate configuration exists for given values."
    IMAGE_MISSING = "Container.image should not be null or empty."
    PORTS_DIFFER = (
        "When networkMode=awsvpc, the host ports and container ports in port mappings must match."
    )
    PORT_INVALID = "Invalid 'containerPort' setting for container '{container}'."
    PORT_TWICE = "{protocol} host port '{port}' is mapped multiple times in task."
    MEMORY_ABOVE_TASK = (
        "The 'memory' setting for container '{container}' is greater than for the task."
    )

    # Ours: the task
    MALFORMED = "the task definition is malformed: {how}"
    TOO_LARGE = "the task definition has {size} bytes of JSON, {limit} are allowed"
    FAMILY_INVALID = "family {name} is not 1 to 255 letters, digits, hyphens and underscores"
    MEMORY_INVALID = "Invalid 'memory' setting for task: {value} is neither MiB nor GB"
    SIZE_NEEDS_1_4 = "{cpu} CPU needs Fargate platform version 1.4.0"
    PID_MODE_HOST = "pidMode host is not supported on Fargate"
    PID_MODE_NEEDS_1_4 = "pidMode needs Fargate platform version 1.4.0"
    CONTAINER_COUNT = "a task has 1 to 10 containers, not {count}"
    NONE_ESSENTIAL = "no container of the task is essential"
    NAME_TWICE = "two containers have the name {name}"
    CPU_SUM = "the containers ask for {sum} CPU units, the task has {task}"
    RESERVATION_SUM = "the containers reserve {sum} MiB of memory, the task has {task}"
    CYCLE = "containers wait for each other: {cycle}"
    STORAGE_SIZE = "ephemeralStorage.sizeInGiB is {value}, allowed is 21 to 200"
    STORAGE_UNLIMITED = (
        "ephemeralStorage cannot be limited on this host: `sandbox doctor` says what it lacks"
    )
    STORAGE_NEEDS_1_4 = "ephemeralStorage needs Fargate platform version 1.4.0"
    VOLUME_NAME_INVALID = "volume {name} is not 1 to 255 letters, digits, hyphens and underscores"
    VOLUME_NOT_ON_FARGATE = "volume {name}: {member} is not supported on Fargate"
    VOLUME_NOT_BUILT = "volume {name}: {member} is not implemented yet"
    VOLUME_TWICE = "two volumes have the name {name}"

    # Ours: one container
    NOT_ON_FARGATE = "container '{container}': {member} is not supported on Fargate"
    NOT_BUILT = "container '{container}': {member} is not implemented yet"
    NAME_INVALID = "container {name} is not 1 to 255 letters, digits, hyphens and underscores"
    RANGE = "container '{container}': {member} is {value}, allowed is {low} to {high}"
    NUL = "container '{container}': {member} contains a NUL byte"
    EMPTY = "container '{container}': {member} is empty"
    CPU_NEGATIVE = "container '{container}': cpu is {value}"
    MEMORY_TOO_SMALL = "container '{container}': {member} is {value} MiB, the least is {low}"
    PORT_RANGE_INVALID = (
        "container '{container}': {range} is not a range of ports such as 8000-8010"
    )
    PORT_AND_RANGE = (
        "container '{container}': with containerPortRange there is no containerPort and no hostPort"
    )
    MEMORY_BELOW_RESERVATION = (
        "container '{container}': memory ({memory}) is not above memoryReservation ({reservation})"
    )
    ENVIRONMENT_NAME = "container '{container}': {name} cannot name an environment variable"
    PATH_RELATIVE = "container '{container}': {member} {path} is not an absolute path"
    USER_INVALID = "container '{container}': user {user} is not user, uid, user:group or uid:gid"
    MOUNT_ON_ROOT = "container '{container}': nothing can be mounted on /"
    MOUNT_TWICE = "container '{container}': two volumes are mounted on {path}"
    VOLUME_UNKNOWN = "container '{container}': the task has no volume {name}"
    VOLUMES_FROM_UNKNOWN = "container '{container}': volumesFrom names {name}, which is not there"
    VOLUMES_FROM_SELF = "container '{container}': volumesFrom names the container itself"
    DEPENDENCY_UNKNOWN = "container '{container}': dependsOn names {name}, which is not there"
    DEPENDENCY_SELF = "container '{container}': dependsOn names the container itself"
    DEPENDENCY_TWICE = "container '{container}': dependsOn names {name} twice"
    DEPENDENCY_ESSENTIAL = (
        "container '{container}': {condition} cannot be awaited of {name}, which is essential"
    )
    DEPENDENCY_NO_HEALTH = (
        "container '{container}': HEALTHY cannot be awaited of {name}, which has no healthCheck"
    )
    HEALTH_COMMAND = (
        "container '{container}': healthCheck.command is not CMD with a program, CMD-SHELL with "
        "one line, or NONE"
    )
    IGNORED_CODES = "container '{container}': restartPolicy ignores {count} exit codes, at most 50"
    RESTART_NEEDS_1_4 = (
        "container '{container}': restartPolicy needs Fargate platform version 1.4.0"
    )
    ULIMIT_UNKNOWN = "container '{container}': there is no ulimit {name}"
    ULIMIT_TWICE = "container '{container}': ulimit {name} is set twice"
    ULIMIT_SOFT_ABOVE_HARD = "container '{container}': ulimit {name} has soft above hard"
    SYSTEM_CONTROL_REFUSED = "container '{container}': Fargate does not let {name} be set"
    SYSTEM_CONTROL_TWICE = "container '{container}': {name} is set twice"
    SYSTEM_CONTROL_NEEDS_1_4 = (
        "container '{container}': systemControls need Fargate platform version 1.4.0"
    )
    CAPABILITY_UNKNOWN = "container '{container}': there is no capability {name}"
    CAPABILITY_REFUSED = (
        "container '{container}': Fargate adds no capability but SYS_PTRACE: {name}"
    )
    CAPABILITY_NEEDS_1_4 = (
        "container '{container}': SYS_PTRACE needs Fargate platform version 1.4.0"
    )
    LINUX_PARAMETERS_2017 = "container '{container}': Fargate of 2017 has no linuxParameters"


@dataclass(frozen=True)
class Incompatibility:
    """One thing that Fargate refuses; `where` is a path such as containerDefinitions[0].cpu."""

    where: str
    text: str


class Incompatible(ClientException):
    """ECS tells the first reason only, and so does `str(error)`; `all` has every one."""

    def __init__(self, found: Sequence[Incompatibility]) -> None:
        super().__init__(found[0].text)
        self.all = tuple(found)


def shown(text: str) -> str:
    """Somebody's text within ours: quoted, printable, short."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
