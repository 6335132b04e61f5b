"""From the options of `sandbox run` to a request: pure, so that every rule here can be tested.

The spelling is Docker's where Docker has the option, the meaning is Fargate's: a volume is a volume
of the task and dies with it, a port is declared and not published. Sizes are passed on as they are
typed ("1 vCPU", "0.5GB"): control knows Fargate's table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """The options as typed; `environment` is already merged from -e and --env-file."""

    image: str
    command: Sequence[str] = ()
    cpu: str = "256"
    memory: str = "512"
    name: str | None = None
    environment: Mapping[str, str] = {}
    user: str | None = None
    working_directory: str | None = None
    entry_point: str | None = None
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


def request(options: Options) -> RunRequest:
    """What to ask of the agent; InvalidParameterException names the option that is wrong."""
    mounts = [volume(text) for text in options.volumes]
    container = ContainerDefinition(
        name=options.name or CONTAINER,
        image=anchored(options.image),
        command=tuple(options.command) or None,
        entry_point=entry_point(options.entry_point),
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


def entry_point(text: str | None) -> tuple[str, ...] | None:
    """One program, as in Docker; the empty string drops the image's entry point."""
    if text is None:
        return None
    return (text,) if text else ()


def volume(text: str) -> MountPoint:
    """NAME:/path[:ro]"""
    source, _, rest = text.partition(":")
    path, _, mode = rest.partition(":")
    if source.startswith(("/", ".", "~")):
        raise InvalidParameterException(
            f"-v {text}: host directories are not mounted, `sandbox cp` copies them into the task"
        )
    if not source or not path.startswith("/") or mode not in ("", "ro", "rw"):
        raise InvalidParameterException(f"-v {text}: expected NAME:/path or NAME:/path:ro")
    return MountPoint(source_volume=source, container_path=path, read_only=mode == "ro")


def port(text: str) -> PortMapping:
    """PORT[/tcp|/udp]: what the program listens on."""
    number, _, protocol = text.partition("/")
    if ":" in number:
        raise InvalidParameterException(
            f"-p {text}: a task has its own address, no port of the host is published; "
            "use -p PORT, and --public-ip to reach it from outside"
        )
    if not number.isascii() or not number.isdigit() or protocol not in ("", "tcp", "udp"):
        raise InvalidParameterException(f"-p {text}: expected PORT or PORT/udp")
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
            f"--ulimit {text}: expected NAME=SOFT or NAME=SOFT:HARD"
        ) from None


def environment(
    given: Iterable[str], file_lines: Iterable[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """NAME=VALUE, or NAME to pass on our own; -e wins over files, and the last one wins."""
    merged: dict[str, str] = {}
    lines = (line.lstrip() for line in file_lines)
    for entry in (*(line for line in lines if line and not line.startswith("#")), *given):
        name, equals, value = entry.partition("=")
        if not name or "\0" in entry:
            raise InvalidParameterException(f"-e {entry!r}: expected NAME=VALUE or NAME")
        if equals:
            merged[name] = value
        elif name in environ:
            merged[name] = environ[name]
    return merged


def refuse_network(subnet: str | None, security_groups: Sequence[str], public_ip: bool) -> None:
    """Network options are refused until there is a network: silence would be a lie."""
    given = [
        name
        for name, value in (
            ("--subnet", subnet),
            ("--security-group", security_groups),
            ("--public-ip", public_ip),
        )
        if value
    ]
    if given:
        raise InvalidParameterException(
            f"{', '.join(given)}: tasks have only their loopback interface in this version"
        )


def duration(text: str) -> float:
    """Seconds: 90, 90s, 15m, 2h, 1d, 0.5s."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidParameterException(f"{text!r} is not a duration: 90, 90s, 15m, 2h, 1d")
    return seconds
