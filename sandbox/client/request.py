"""From what a caller gives for a task to a request: pure, the same for command line and Python.

The spelling is Docker's where Docker has the option, the meaning is Fargate's: a volume is a volume
of the task and dies with it, a port is declared and not published. Sizes are passed on as they are
given ("1 vCPU", "0.5GB"): control knows Fargate's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, cast

import msgspec

from sandbox.client.place import anchored
from sandbox.errors import InvalidParameterException
from sandbox.model.request import RunRequest
from sandbox.model.task import (
    ContainerDefinition,
    KeyValuePair,
    LinuxParameters,
    MountPoint,
    PortMapping,
    TaskDefinition,
    Ulimit,
    Volume,
)

CONTAINER = "main"
"""The name of the one container, unless --name names it."""

FAMILY = "run"


class RunOptions(TypedDict, total=False):
    """What can be wanted of a task besides what it runs."""

    cpu: int | str
    """256 unless given; what Fargate knows, also "1 vCPU"."""
    memory: int | str
    """512 MiB unless given; also "2GB"."""
    name: str
    environment: Mapping[str, str]
    user: str | None
    working_directory: str | None
    entry_point: Sequence[str] | None
    read_only: bool
    init: bool
    volumes: Sequence[str]
    """NAME:/path[:ro], or with `containers` the names of the task's volumes."""
    ulimits: Sequence[str]
    """NAME=SOFT[:HARD]"""
    ports: Sequence[str]
    """PORT[/udp]"""
    stop_timeout: int | None
    interactive: bool
    terminal: bool
    pull: Literal["missing", "always", "never"]
    platform: str | None
    platform_version: str
    remove: bool


class TaskOptions(RunOptions, total=False):
    """All that can be wanted of a task: one container by `image`, or several by `containers`."""

    image: str
    command: Sequence[str]
    containers: Sequence[ContainerDefinition | Mapping[str, Any]]
    """As ECS has them: definitions, or mappings with ECS's member names."""


ONE_CONTAINER = {
    *("command", "environment", "user", "working_directory", "entry_point", "read_only", "init"),
    *("ulimits", "ports", "stop_timeout", "interactive", "terminal"),
}
"""Options that say something about the one container of `image`."""


def task_request(**wanted: Unpack[TaskOptions]) -> RunRequest:
    """What to ask of the agent; InvalidParameterException says which option is wrong."""
    containers = wanted.get("containers") or ()
    if bool(containers) == ("image" in wanted):
        raise InvalidParameterException("a task needs either an image or containers")
    if containers:
        if misplaced := ONE_CONTAINER & wanted.keys():
            raise InvalidParameterException(f"{', '.join(sorted(misplaced))}: say it per container")
        definitions = tuple(_definition(each) for each in containers)
        volumes = list(wanted.get("volumes", ()))
    else:
        definitions = (_single(wanted),)
        volumes = [mount.source_volume for mount in definitions[0].mount_points]
    return RunRequest(
        definition=TaskDefinition(
            family=wanted.get("name", FAMILY),
            cpu=str(wanted.get("cpu", "256")),
            memory=str(wanted.get("memory", "512")),
            container_definitions=definitions,
            volumes=tuple(Volume(name=name) for name in dict.fromkeys(volumes)),
        ),
        pull=wanted.get("pull", "missing"),
        platform=wanted.get("platform"),
        platform_version=wanted.get("platform_version", "LATEST"),
        remove=wanted.get("remove", False),
    )


def _single(wanted: TaskOptions) -> ContainerDefinition:
    entry_point = wanted.get("entry_point")
    return ContainerDefinition(
        name=wanted.get("name", CONTAINER),
        image=anchored(wanted["image"]),
        command=tuple(wanted.get("command", ())) or None,
        entry_point=None if entry_point is None else tuple(entry_point),
        environment=tuple(
            KeyValuePair(name=name, value=value)
            for name, value in wanted.get("environment", {}).items()
        ),
        user=wanted.get("user"),
        working_directory=wanted.get("working_directory"),
        readonly_root_filesystem=wanted.get("read_only", False),
        linux_parameters=LinuxParameters(init_process_enabled=wanted.get("init", False)),
        ulimits=tuple(ulimit(text) for text in wanted.get("ulimits", ())),
        stop_timeout=wanted.get("stop_timeout"),
        mount_points=tuple(volume(text) for text in wanted.get("volumes", ())),
        port_mappings=tuple(port(text) for text in wanted.get("ports", ())),
        interactive=wanted.get("interactive", False),
        pseudo_terminal=wanted.get("terminal", False),
    )


def _definition(given: ContainerDefinition | Mapping[str, Any]) -> ContainerDefinition:
    try:
        definition = (
            given
            if isinstance(given, ContainerDefinition)
            else msgspec.convert(given, ContainerDefinition)
        )
    except msgspec.ValidationError as error:
        raise InvalidParameterException(f"containers: {error}") from None
    return msgspec.structs.replace(definition, image=anchored(definition.image))


def volume(text: str) -> MountPoint:
    """NAME:/path[:ro]"""
    source, _, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if source.startswith(("/", ".", "~")):
        raise InvalidParameterException(
            f"volume {text}: host directories are not mounted, `sandbox cp` copies them in"
        )
    if not source or not path.startswith("/") or mode not in ("", "ro", "rw"):
        raise InvalidParameterException(f"volume {text}: expected NAME:/path or NAME:/path:ro")
    return MountPoint(source_volume=source, container_path=path, read_only=mode == "ro")


def port(text: str) -> PortMapping:
    """PORT[/tcp|/udp]: what the program listens on."""
    number, _, protocol = text.partition("/")
    if ":" in number:
        raise InvalidParameterException(
            f"port {text}: a task has its own address, no port of the host is published; "
            "declare PORT, and use --public-ip to reach it from outside"
        )
    if not number.isascii() or not number.isdigit() or protocol not in ("", "tcp", "udp"):
        raise InvalidParameterException(f"port {text}: expected PORT or PORT/udp")
    return PortMapping(
        container_port=int(number), protocol=cast(Literal["tcp", "udp"], protocol or "tcp")
    )


def ulimit(text: str) -> Ulimit:
    """NAME=SOFT[:HARD]"""
    name, _, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    try:
        return Ulimit(name=name, soft_limit=int(soft), hard_limit=int(hard or soft))
    except ValueError:
        raise InvalidParameterException(
            f"ulimit {text}: expected NAME=SOFT or NAME=SOFT:HARD"
        ) from None
