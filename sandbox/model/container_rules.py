"""What Fargate demands of one container definition. Pure; `model.fargate` asks for all of them.

Each rule is a generator over one aspect and yields every breach it finds, so a list of all of them
costs no more than the first. Values that a request can make large are bounded by the 64 KiB that
`model.fargate` checks before it comes here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import msgspec

from sandbox.model.names import is_name
from sandbox.model.refusals import Incompatibility, Text, shown
from sandbox.model.task import (
    ContainerDefinition,
    HealthCheck,
    HostVolume,
    LinuxParameters,
    PortMapping,
    Volume,
)

MIN_MEMORY_MIB = 6
"""What the developer guide calls the least that a container can be given."""
MAX_NOFILE = 1_048_576
UNLIMITED = -1
"""As a ulimit's value."""
ULIMITS = frozenset(
    [
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ]
)
CAPABILITIES = frozenset(
    [
        "ALL",
        "AUDIT_CONTROL",
        "AUDIT_READ",
        "AUDIT_WRITE",
        "BLOCK_SUSPEND",
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "IPC_LOCK",
        "IPC_OWNER",
        "KILL",
        "LEASE",
        "LINUX_IMMUTABLE",
        "MAC_ADMIN",
        "MAC_OVERRIDE",
        "MKNOD",
        "NET_ADMIN",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_RAW",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_CHROOT",
        "SYS_MODULE",
        "SYS_NICE",
        "SYS_PACCT",
        "SYS_PTRACE",
        "SYS_RAWIO",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "SYSLOG",
        "WAKE_ALARM",
    ]
)
"""ECS's own list; newer ones of the kernel are not in it."""

NOT_ON_FARGATE: Mapping[type[msgspec.Struct], tuple[str, ...]] = {
    ContainerDefinition: (
        *("privileged", "hostname", "links", "extra_hosts", "dns_servers", "dns_search_domains"),
        *("disable_networking", "docker_security_options", "resource_requirements"),
    ),
    LinuxParameters: ("devices", "tmpfs", "shared_memory_size", "max_swap", "swappiness"),
    Volume: ("docker_volume_configuration",),
    HostVolume: ("source_path",),
}
NOT_BUILT: Mapping[type[msgspec.Struct], tuple[str, ...]] = {
    ContainerDefinition: (
        *("secrets", "environment_files", "log_configuration", "repository_credentials"),
        *("firelens_configuration", "credential_specs"),
    ),
    Volume: ("efs_volume_configuration", "configured_at_launch"),
}

_PORT_RANGE = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
# A dot in a name (an interface's) would be a slash in this form; no way leads out of /proc/sys.
_SYSTEM_CONTROL = re.compile(
    r"(?:net(?:\.[A-Za-z0-9_-]+)+|fs\.mqueue\.[a-z_]+"
    r"|kernel\.(?:msgmax|msgmnb|msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced))"
)
_USER = re.compile(r"[^\s:\0]+(?::[^\s:\0]+)?")


@dataclass(frozen=True)
class Surroundings:
    """What a container's rules look at outside of it. `task_memory` is None when it is invalid."""

    containers: Mapping[str, ContainerDefinition]
    volumes: frozenset[str]
    task_memory: int | None
    is_1_4: bool
    is_2017: bool


def breaches(container: ContainerDefinition, around: Surroundings) -> Iterator[Incompatibility]:
    """`where` is relative to the container."""
    yield from _texts(container)
    yield from _members(container, container)
    yield from _sizes(container, around)
    yield from _ports(container)
    yield from _dependencies(container, around)
    yield from _times(container)
    yield from _health(container)
    yield from _restarts(container, around)
    yield from _mounts(container, around)
    yield from _ulimits(container)
    yield from _system_controls(container, around)
    yield from _linux_parameters(container, around)


def given(
    record: msgspec.Struct, table: Mapping[type[msgspec.Struct], tuple[str, ...]]
) -> list[str]:
    """The members of this kind that the record has, in ECS's spelling; empty is as if left out."""
    # Not `structs.fields`: it evaluates every annotation anew, a millisecond for a container.
    wire = dict(zip(record.__struct_fields__, record.__struct_encode_fields__, strict=True))
    values = ((name, getattr(record, name)) for name in table.get(type(record), ()))
    return [
        wire[name] for name, value in values if value not in (None, (), "") and value is not False
    ]


def port_range(mapping: PortMapping) -> range:
    """The ports that it stands for; empty when it is no valid mapping."""
    first = last = mapping.container_port or 0
    if mapping.container_port_range is not None:
        parts = _PORT_RANGE.fullmatch(mapping.container_port_range)
        first, last = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    return range(first, last + 1) if 1 <= first <= last <= 65535 else range(0)


def has_health(check: HealthCheck | None) -> bool:
    return check is not None and check.command[:1] != ("NONE",)


def _breach(
    container: ContainerDefinition, where: str, text: Text, **values: object
) -> Incompatibility:
    name = container.name if is_name(container.name) else "?"
    return Incompatibility(where, text.format(container=name, **values))


def _range(
    container: ContainerDefinition, member: str, value: int | None, low: int, high: int
) -> Iterator[Incompatibility]:
    if value is not None and not low <= value <= high:
        yield _breach(container, member, Text.RANGE, member=member, value=value, low=low, high=high)


def _texts(container: ContainerDefinition) -> Iterator[Incompatibility]:
    if not is_name(container.name):
        yield Incompatibility("name", Text.NAME_INVALID.format(name=shown(container.name)))
    if not container.image.strip():
        yield Incompatibility("image", Text.IMAGE_MISSING)
    for member, values in _kernel_texts(container):
        if any("\0" in value for value in values):
            yield _breach(container, member, Text.NUL, member=member)
    for index, pair in enumerate(container.environment):
        if not pair.name or "=" in pair.name:
            where = f"environment[{index}].name"
            yield _breach(container, where, Text.ENVIRONMENT_NAME, name=shown(pair.name))
    directory = container.working_directory
    if directory is not None and not directory.startswith("/"):
        yield _relative(container, "workingDirectory", directory)
    if container.user is not None and _USER.fullmatch(container.user) is None:
        yield _breach(container, "user", Text.USER_INVALID, user=shown(container.user))


def _members(
    container: ContainerDefinition, record: msgspec.Struct, path: str = ""
) -> Iterator[Incompatibility]:
    """What there is on Amazon EC2 alone, and what there is not here."""
    for name in given(record, NOT_ON_FARGATE):
        yield _breach(container, path + name, Text.NOT_ON_FARGATE, member=path + name)
    for name in given(record, NOT_BUILT):
        yield _breach(container, path + name, Text.NOT_BUILT, member=path + name)


def _kernel_texts(container: ContainerDefinition) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What ends in a system call, where a NUL byte would end the text."""
    check = container.health_check
    yield "image", (container.image,)
    yield "entryPoint", container.entry_point or ()
    yield "command", container.command or ()
    yield (
        "environment",
        tuple(chain.from_iterable((e.name, e.value) for e in container.environment)),
    )
    yield "workingDirectory", (container.working_directory or "",)
    yield "healthCheck.command", check.command if check is not None else ()
    yield "mountPoints", tuple(mount.container_path for mount in container.mount_points)
    yield "systemControls", tuple(control.value for control in container.system_controls)


def _relative(container: ContainerDefinition, member: str, path: str) -> Incompatibility:
    return _breach(container, member, Text.PATH_RELATIVE, member=member, path=shown(path))


def _sizes(container: ContainerDefinition, around: Surroundings) -> Iterator[Incompatibility]:
    if container.cpu < 0:
        yield _breach(container, "cpu", Text.CPU_NEGATIVE, value=container.cpu)
    memory, reservation = container.memory, container.memory_reservation
    for member, value in (("memory", memory), ("memoryReservation", reservation)):
        if value is not None and value < MIN_MEMORY_MIB:
            yield _breach(
                container,
                member,
                Text.MEMORY_TOO_SMALL,
                member=member,
                value=value,
                low=MIN_MEMORY_MIB,
            )
    if memory is None:
        return
    if around.task_memory is not None and memory > around.task_memory:
        yield _breach(container, "memory", Text.MEMORY_ABOVE_TASK)
    if reservation is not None and memory <= reservation:
        yield _breach(
            container,
            "memory",
            Text.MEMORY_BELOW_RESERVATION,
            memory=memory,
            reservation=reservation,
        )


def _ports(container: ContainerDefinition) -> Iterator[Incompatibility]:
    for index, mapping in enumerate(container.port_mappings):
        where = f"portMappings[{index}]"
        if (given_range := mapping.container_port_range) is not None:
            if not port_range(mapping):
                member, text = f"{where}.containerPortRange", Text.PORT_RANGE_INVALID
                yield _breach(container, member, text, range=shown(given_range))
            if (mapping.container_port, mapping.host_port) != (None, None):
                yield _breach(container, where, Text.PORT_AND_RANGE)
            continue
        if not port_range(mapping):
            yield _breach(container, f"{where}.containerPort", Text.PORT_INVALID)
        if mapping.host_port not in (None, mapping.container_port):
            yield Incompatibility(f"{where}.hostPort", Text.PORTS_DIFFER)


def _dependencies(
    container: ContainerDefinition, around: Surroundings
) -> Iterator[Incompatibility]:
    seen: set[str] = set()
    for index, dependency in enumerate(container.depends_on):
        where, name = f"dependsOn[{index}]", dependency.container_name
        other = around.containers.get(name)
        if name in seen:
            yield _breach(container, where, Text.DEPENDENCY_TWICE, name=shown(name))
        seen.add(name)
        if name == container.name:
            yield _breach(container, where, Text.DEPENDENCY_SELF)
        elif other is None:
            yield _breach(container, where, Text.DEPENDENCY_UNKNOWN, name=shown(name))
        elif dependency.condition in ("COMPLETE", "SUCCESS") and other.essential:
            yield _breach(
                container,
                where,
                Text.DEPENDENCY_ESSENTIAL,
                name=shown(name),
                condition=dependency.condition,
            )
        elif dependency.condition == "HEALTHY" and not has_health(other.health_check):
            yield _breach(container, where, Text.DEPENDENCY_NO_HEALTH, name=shown(name))


def _times(container: ContainerDefinition) -> Iterator[Incompatibility]:
    yield from _range(container, "startTimeout", container.start_timeout, 2, 120)
    yield from _range(container, "stopTimeout", container.stop_timeout, 2, 120)


def _health(container: ContainerDefinition) -> Iterator[Incompatibility]:
    check = container.health_check
    if check is None:
        return
    match check.command:
        case ("NONE",) | ("CMD", str(), *_) | ("CMD-SHELL", str()):
            pass
        case _:
            yield _breach(container, "healthCheck.command", Text.HEALTH_COMMAND)
    yield from _range(container, "healthCheck.interval", check.interval, 5, 300)
    yield from _range(container, "healthCheck.timeout", check.timeout, 2, 60)
    yield from _range(container, "healthCheck.retries", check.retries, 1, 10)
    yield from _range(container, "healthCheck.startPeriod", check.start_period, 0, 300)


def _restarts(container: ContainerDefinition, around: Surroundings) -> Iterator[Incompatibility]:
    policy = container.restart_policy
    if policy is None:
        return
    if policy.enabled and not around.is_1_4:
        yield _breach(container, "restartPolicy", Text.RESTART_NEEDS_1_4)
    codes = policy.ignored_exit_codes
    if len(codes) > 50:
        where = "restartPolicy.ignoredExitCodes"
        yield _breach(container, where, Text.IGNORED_CODES, count=len(codes))
    for index, code in enumerate(codes[:50]):
        yield from _range(container, f"restartPolicy.ignoredExitCodes[{index}]", code, 0, 255)
    period = policy.restart_attempt_period
    yield from _range(container, "restartPolicy.restartAttemptPeriod", period, 60, 1800)


def _mounts(container: ContainerDefinition, around: Surroundings) -> Iterator[Incompatibility]:
    paths: set[str] = set()
    for index, mount in enumerate(container.mount_points):
        where = f"mountPoints[{index}]"
        path = posixpath.normpath(mount.container_path)
        if mount.source_volume not in around.volumes:
            name = shown(mount.source_volume)
            yield _breach(container, f"{where}.sourceVolume", Text.VOLUME_UNKNOWN, name=name)
        if not path.startswith("/"):
            yield _relative(container, f"{where}.containerPath", mount.container_path)
        elif not path.strip("/"):
            yield _breach(container, f"{where}.containerPath", Text.MOUNT_ON_ROOT)
        elif path in paths:
            shown_path = shown(mount.container_path)
            yield _breach(container, f"{where}.containerPath", Text.MOUNT_TWICE, path=shown_path)
        paths.add(path)
    for index, source in enumerate(container.volumes_from):
        where, name = f"volumesFrom[{index}].sourceContainer", source.source_container
        if name == container.name:
            yield _breach(container, where, Text.VOLUMES_FROM_SELF)
        elif name not in around.containers:
            yield _breach(container, where, Text.VOLUMES_FROM_UNKNOWN, name=shown(name))


def _ulimits(container: ContainerDefinition) -> Iterator[Incompatibility]:
    seen: set[str] = set()
    for index, limit in enumerate(container.ulimits):
        where, name = f"ulimits[{index}]", limit.name
        if name not in ULIMITS:
            yield _breach(container, f"{where}.name", Text.ULIMIT_UNKNOWN, name=shown(name))
            continue
        if name in seen:
            yield _breach(container, f"{where}.name", Text.ULIMIT_TWICE, name=name)
        seen.add(name)
        low, high = (0, MAX_NOFILE) if name == "nofile" else (UNLIMITED, 2**63 - 1)
        yield from _range(container, f"{where}.softLimit", limit.soft_limit, low, high)
        yield from _range(container, f"{where}.hardLimit", limit.hard_limit, low, high)
        if limit.hard_limit != UNLIMITED and not (0 <= limit.soft_limit <= limit.hard_limit):
            yield _breach(container, where, Text.ULIMIT_SOFT_ABOVE_HARD, name=name)


def _system_controls(
    container: ContainerDefinition, around: Surroundings
) -> Iterator[Incompatibility]:
    if container.system_controls and not around.is_1_4:
        yield _breach(container, "systemControls", Text.SYSTEM_CONTROL_NEEDS_1_4)
    seen: set[str] = set()
    for index, control in enumerate(container.system_controls):
        where, name = f"systemControls[{index}]", control.namespace
        if _SYSTEM_CONTROL.fullmatch(name) is None:
            breach = Text.SYSTEM_CONTROL_REFUSED
            yield _breach(container, f"{where}.namespace", breach, name=shown(name))
        elif name in seen:
            yield _breach(container, f"{where}.namespace", Text.SYSTEM_CONTROL_TWICE, name=name)
        seen.add(name)
        if not control.value.strip():
            member = f"{where}.value"
            yield _breach(container, member, Text.EMPTY, member=member)


def _linux_parameters(
    container: ContainerDefinition, around: Surroundings
) -> Iterator[Incompatibility]:
    parameters = container.linux_parameters
    where = "linuxParameters"
    if around.is_2017 and parameters != type(parameters)():
        yield _breach(container, where, Text.LINUX_PARAMETERS_2017)
        return
    yield from _members(container, parameters, f"{where}.")
    for index, name in enumerate(parameters.capabilities.drop):
        if name not in CAPABILITIES:
            member = f"{where}.capabilities.drop[{index}]"
            yield _breach(container, member, Text.CAPABILITY_UNKNOWN, name=shown(name))
    for index, name in enumerate(parameters.capabilities.add):
        member = f"{where}.capabilities.add[{index}]"
        if name not in CAPABILITIES:
            yield _breach(container, member, Text.CAPABILITY_UNKNOWN, name=shown(name))
        elif name != "SYS_PTRACE":
            yield _breach(container, member, Text.CAPABILITY_REFUSED, name=name)
        elif not around.is_1_4:
            yield _breach(container, member, Text.CAPABILITY_NEEDS_1_4)
