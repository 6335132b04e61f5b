"""From what a caller gives for a task to a request: pure, the same for command line and Python.

The spelling is Docker's where Docker has the option, the meaning is Fargate's: a volume is a volume
of the task and dies with it, a port is declared and not published. Sizes are passed on as they are
given ("1 vCPU", "0.5GB"): control knows Fargate's table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

import msgspec
from msgspec import inspect

from sandbox.client.place import anchored
from sandbox.errors import InvalidParameterException
from sandbox.model.request import RunRequest
from sandbox.model.task import (
    ContainerDefinition,
    EphemeralStorage,
    KeyValuePair,
    LinuxParameters,
    MountPoint,
    PortMapping,
    Record,
    TaskDefinition,
    Ulimit,
    Volume,
)

CONTAINER = "main"
"""The name of the one container, unless --name names it."""

FAMILY = "run"

Pull = Literal["missing", "always", "never"]

R = TypeVar("R", bound=Record)


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
    volumes: Sequence[str | Volume | Mapping[str, Any]]
    """NAME:/path[:ro], or with `containers` the task's volumes: names, or as ECS has them."""
    ulimits: Sequence[str]
    """NAME=SOFT[:HARD]"""
    ports: Sequence[str | int]
    """PORT[/udp]"""
    stop_timeout: int | None
    interactive: bool
    terminal: bool
    pull: Pull
    platform: str | None
    platform_version: str
    ephemeral_storage: int | None
    """GiB, 21 to 200; a task has 20 unless more is asked for."""
    pid_mode: Literal["task"] | None
    """"task": the containers share one pid namespace."""
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

NETWORK = {"subnet", "security_groups", "assign_public_ip"}
"""Refused until there is a network: silence would be a lie."""

SEQUENCES = ("command", "entry_point", "volumes", "ulimits", "ports", "containers")


def task_request(**wanted: Unpack[TaskOptions]) -> RunRequest:
    """What to ask of the agent; InvalidParameterException says which option is wrong.

    TypeError, as a function has it, for an option that there is not and for a string in place of
    several.
    """
    _check_names(wanted)
    for name in SEQUENCES:
        check_sequence(name, wanted.get(name))
    check_pull(wanted.get("pull", "missing"))
    containers = wanted.get("containers") or ()
    if bool(containers) == ("image" in wanted):
        raise InvalidParameterException("a task needs either an image or containers")
    if containers:
        if misplaced := ONE_CONTAINER & wanted.keys():
            raise InvalidParameterException(f"{', '.join(sorted(misplaced))}: say it per container")
        definitions = tuple(
            _definition(each, f"containers[{index}]") for index, each in enumerate(containers)
        )
        volumes = [
            Volume(name=each) if isinstance(each, str) else _record(Volume, each, f"volumes[{i}]")
            for i, each in enumerate(wanted.get("volumes") or ())
        ]
    else:
        definitions = (_single(wanted),)
        mounted = dict.fromkeys(mount.source_volume for mount in definitions[0].mount_points)
        volumes = [Volume(name=name) for name in mounted]
    return RunRequest(
        definition=TaskDefinition(
            family=wanted.get("name", FAMILY),
            cpu=str(wanted.get("cpu", "256")),
            memory=str(wanted.get("memory", "512")),
            container_definitions=definitions,
            volumes=tuple(volumes),
            pid_mode=wanted.get("pid_mode"),
            ephemeral_storage=_storage(wanted.get("ephemeral_storage")),
        ),
        pull=wanted.get("pull", "missing"),
        platform=wanted.get("platform"),
        platform_version=wanted.get("platform_version", "LATEST"),
        remove=wanted.get("remove", False),
    )


def check_sequence(name: str, given: object) -> None:
    """A string is a sequence of its letters, which nobody means."""
    if isinstance(given, str | bytes):
        raise TypeError(f"{name} is a sequence of strings, not one: [{given!r}]")


def check_pull(pull: str) -> None:
    if pull not in get_args(Pull):
        raise InvalidParameterException(f"pull {pull!r} is none of {', '.join(get_args(Pull))}")


def refuse_network(options: Mapping[str, object]) -> None:
    """Whichever of these network options is set; they are named as the caller knows them."""
    given = [name for name, value in options.items() if value]
    if given:
        raise InvalidParameterException(
            f"{', '.join(given)}: tasks have only their loopback interface in this version"
        )


def _check_names(wanted: Mapping[str, object]) -> None:
    refuse_network({name: wanted[name] for name in sorted(NETWORK & wanted.keys())})
    known = TaskOptions.__optional_keys__ | NETWORK
    for name in wanted:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}{_meant(name, known)}")


def _meant(name: str, known: Iterable[str]) -> str:
    import difflib  # late: the command line seldom needs it

    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _storage(size_gib: int | None) -> EphemeralStorage | None:
    return None if size_gib is None else EphemeralStorage(size_in_gib=size_gib)


def _single(wanted: TaskOptions) -> ContainerDefinition:
    image, environment = wanted["image"], wanted.get("environment") or {}
    if not isinstance(image, str):
        raise TypeError(f"image is a string, not {image!r}")
    if not isinstance(environment, Mapping):
        raise TypeError(f"environment is a mapping of strings, not {environment!r}")
    entry_point = wanted.get("entry_point")
    return ContainerDefinition(
        name=wanted.get("name", CONTAINER),
        image=anchored(image),
        command=tuple(wanted.get("command") or ()) or None,
        entry_point=None if entry_point is None else tuple(entry_point),
        environment=tuple(
            KeyValuePair(name=name, value=value) for name, value in environment.items()
        ),
        user=wanted.get("user"),
        working_directory=wanted.get("working_directory"),
        readonly_root_filesystem=wanted.get("read_only", False),
        linux_parameters=LinuxParameters(init_process_enabled=wanted.get("init", False)),
        ulimits=tuple(ulimit(str(text)) for text in wanted.get("ulimits") or ()),
        stop_timeout=wanted.get("stop_timeout"),
        mount_points=tuple(volume(str(text)) for text in wanted.get("volumes") or ()),
        port_mappings=tuple(port(str(text)) for text in wanted.get("ports") or ()),
        interactive=wanted.get("interactive", False),
        pseudo_terminal=wanted.get("terminal", False),
    )


def _definition(given: ContainerDefinition | Mapping[str, Any], path: str) -> ContainerDefinition:
    definition = _record(ContainerDefinition, given, path)
    return msgspec.structs.replace(definition, image=anchored(definition.image))


def _record(kind: type[R], given: R | Mapping[str, Any], path: str) -> R:
    """Every member is one that the record has: a typing error is told, not ignored."""
    if isinstance(given, kind):
        return given
    for unknown in _unknown(inspect.type_info(kind), given, path):
        raise InvalidParameterException(unknown)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise InvalidParameterException(f"{path}: {error}") from None


def _unknown(kind: inspect.Type, given: object, path: str) -> Iterator[str]:
    match kind:
        case inspect.StructType(fields=fields) if isinstance(given, Mapping):
            types = {field.encode_name: field.type for field in fields}
            for name, value in given.items():
                if name not in types:
                    yield f"{path} has no member {name!r}{_meant(str(name), types)}"
                else:
                    yield from _unknown(types[name], value, f"{path}.{name}")
        case inspect.VarTupleType(item_type=item) if isinstance(given, list | tuple):
            for index, value in enumerate(given):
                yield from _unknown(item, value, f"{path}[{index}]")
        case inspect.UnionType(types=kinds):
            for each in kinds:
                yield from _unknown(each, given, path)


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
