"""From what a caller gives for a task to a request: pure, the same for command line and Python.

The spelling is Docker's where Docker has the option, the meaning is Fargate's: a volume is a volume
of the task and dies with it, a port is declared and not published. Sizes are passed on as they are
given ("1 vCPU", "0.5GB"): control knows Fargate's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, cast

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


class Options(NamedTuple):
    """A task of one container."""

    image: str
    command: Sequence[str] = ()
    cpu: str = "256"
    memory: str = "512"
    name: str | None = None
    environment: Mapping[str, str] = {}
    user: str | None = None
    working_directory: str | None = None
    entry_point: Sequence[str] | None = None
    read_only: bool = False
    init: bool = False
    volumes: Sequence[str] = ()
    ulimits: Sequence[str] = ()
    stop_timeout: int | None = None
    ports: Sequence[str] = ()
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    platform_version: str = "LATEST"
    remove: bool = False
    interactive: bool = False
    terminal: bool = False


def single(options: Options) -> RunRequest:
    """The request for a task of one container; InvalidParameterException says what is wrong."""
    mounts = [volume(text) for text in options.volumes]
    container = ContainerDefinition(
        name=options.name or CONTAINER,
        image=anchored(options.image),
        command=tuple(options.command) or None,
        entry_point=None if options.entry_point is None else tuple(options.entry_point),
        environment=tuple(
            KeyValuePair(name=name, value=value) for name, value in options.environment.items()
        ),
        user=options.user,
        working_directory=options.working_directory,
        readonly_root_filesystem=options.read_only,
        linux_parameters=LinuxParameters(init_process_enabled=options.init),
        ulimits=tuple(ulimit(text) for text in options.ulimits),
        stop_timeout=options.stop_timeout,
        mount_points=tuple(mounts),
        port_mappings=tuple(port(text) for text in options.ports),
        interactive=options.interactive,
        pseudo_terminal=options.terminal,
    )
    names = dict.fromkeys(mount.source_volume for mount in mounts)
    return RunRequest(
        definition=TaskDefinition(
            family=options.name or FAMILY,
            cpu=options.cpu,
            memory=options.memory,
            container_definitions=(container,),
            volumes=tuple(Volume(name=name) for name in names),
        ),
        pull=options.pull,
        platform=options.platform,
        platform_version=options.platform_version,
        remove=options.remove,
    )


def volume(text: str) -> MountPoint:
    """NAME:/path[:ro]"""
    source, _, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if source.startswith(("/", ".", "~")):
        raise InvalidParameterException(
            f"volume {text}: host directories are not mounted, `sandbox cp` copies them into the task"
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
