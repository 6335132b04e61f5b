"""What one container of a task is made of, as a program for its keeper. Pure.

The order of the records is the order of isolation: cgroup and user namespace on the way in; file
systems while the host's unmasked /proc and /sys can still be seen (the kernel refuses a user
namespace new ones otherwise); the root turned; then limits, filter, capabilities, ids, the program.
Docker's defaults are Fargate's where AWS says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

from sandbox.errors import TaskFailed
from sandbox.images.documents import ImageConfig
from sandbox.kernel import capabilities, native, rlimits, seccomp
from sandbox.kernel.program import (
    NO_FD,
    ON_FULL_DROP_OLDEST,
    STDIO_KEEP_STDIN,
    STDIO_TERMINAL,
    Program,
    groups,
)
from sandbox.kernel.rlimits import HostLimits
from sandbox.model.request import Streams
from sandbox.model.task import ContainerDefinition, Ulimit

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_NOFILE: Final = 65535
"""Fargate's soft and hard limit of open files."""
LOG_SEGMENTS: Final = 32
WRITTEN: Final = ("etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/")
"""What is written into a container's root before it starts: its own files of the network."""
MOUNTED: Final = ("/proc", "/sys", "/dev")
"""Where every container has file systems of its own."""

_NOSUID, _NODEV, _NOEXEC, _RDONLY = (
    native.MOUNT_ATTR_NOSUID,
    native.MOUNT_ATTR_NODEV,
    native.MOUNT_ATTR_NOEXEC,
    native.MOUNT_ATTR_RDONLY,
)
_QUIET: Final = _NOSUID | _NODEV | _NOEXEC
_DEVICES: Final = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
_DEV_LINKS: Final = (
    ("/proc/self/fd", "dev/fd"),
    ("/proc/self/fd/0", "dev/stdin"),
    ("/proc/self/fd/1", "dev/stdout"),
    ("/proc/self/fd/2", "dev/stderr"),
    ("pts/ptmx", "dev/ptmx"),
)
_PROCESSORS: Final = os.sysconf("SC_NPROCESSORS_CONF")
# What Docker's engine hides: they tell of the host or of others, or are a way to harm them.
_MASKED: Final = (
    "proc/acpi",
    "proc/asound",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
    "sys/firmware",
    "sys/devices/virtual/powercap",
    *(f"sys/devices/system/cpu/cpu{n}/thermal_throttle" for n in range(_PROCESSORS)),
)
_READ_ONLY: Final = ("proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who runs the program, in the task's own ids."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """`descriptor` is a detached mount of the volume's directory."""

    descriptor: int
    path: str
    read_only: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the agent made for this start; all numbers are its own descriptors."""

    userns: int
    netns: int
    pidns: int | None
    id_base: int
    cgroup: int
    tasks_files: tuple[int, ...]
    root: int
    layers: tuple[int, ...]
    volumes: tuple[VolumeMount, ...] = ()
    hostname: str
    hosts: str
    resolv_conf: str
    region: str
    is_durable: bool
    """How it ended and what it wrote must outlive a power cut."""


@dataclass(frozen=True, kw_only=True)
class LimitChoice:
    """The resource limits of a container, and what of them is less than Fargate would give."""

    limits: tuple[tuple[int, int, int], ...]
    lowered: tuple[str, ...]


def arguments(definition: ContainerDefinition, config: ImageConfig) -> list[str]:
    """Docker's rule: an entry point of the definition also puts the image's command away.

    An empty one puts the image's entry point away, and its command only for one of its own.
    """
    entry_point, command = definition.entry_point, definition.command or ()
    if not entry_point and not command:
        command = config.cmd
    words = [*(config.entrypoint if entry_point is None else entry_point), *command]
    if not words:
        raise TaskFailed(
            f"CannotCreateContainerError: no command specified for container '{definition.name}'",
            127,
        )
    return words


def working_directory(definition: ContainerDefinition, config: ImageConfig) -> str:
    return definition.working_directory or config.working_dir or "/"


def container_environment(
    definition: ContainerDefinition,
    config: ImageConfig,
    hostname: str,
    region: str,
    home: str,
) -> dict[str, str]:
    """Later ones win: defaults, the image's, what a task may know of itself, the definition's."""
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, "HOME": home}
    if definition.pseudo_terminal:
        variables["TERM"] = "xterm"
    variables |= dict(config.env)
    variables |= {
        "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE",
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
    }
    return variables | {pair.name: pair.value for pair in definition.environment}


def choose_limits(ulimits: Sequence[Ulimit], host: HostLimits) -> LimitChoice:
    """What was asked for; else Fargate's default of open files and the kernel's of all others.

    Where no hard limit can go above the agent's own, a default is lowered and named; TaskFailed for
    a value that was asked for.
    """
    chosen = host.defaults() | {"nofile": (DEFAULT_NOFILE, DEFAULT_NOFILE)}
    lowered = []
    for name, (soft, hard) in chosen.items():
        if not host.may_raise and hard > host.hard[name]:
            given = host.hard[name]
            chosen[name] = (min(soft, given), given)
            lowered.append((name, f"{name} is {given}, not {_shown(hard)}: the host's hard limit"))
    for ulimit in ulimits:
        name, ceiling = ulimit.name, host.hard[ulimit.name]
        soft, hard = rlimits.known(ulimit.soft_limit), rlimits.known(ulimit.hard_limit)
        if hard > ceiling and not host.may_raise:
            raise TaskFailed(
                f"CannotStartContainerError: ulimit {name} {ulimit.hard_limit} is above "
                f"this host's hard limit {ceiling}, and the agent lacks CAP_SYS_RESOURCE"
            )
        chosen[name] = (soft, hard)
    asked = {ulimit.name for ulimit in ulimits}
    return LimitChoice(
        limits=tuple((rlimits.NUMBERS[name], *pair) for name, pair in chosen.items()),
        lowered=tuple(text for name, text in lowered if name not in asked),
    )


def _shown(value: int) -> str:
    return "unlimited" if value == rlimits.INFINITY else str(value)


def compile_container(
    definition: ContainerDefinition,
    config: ImageConfig,
    place: Place,
    *,
    user: Identity,
    limits: LimitChoice,
    streams: Streams | None = None,
) -> Program:
    program = Program()
    terminal, interactive = definition.pseudo_terminal, definition.interactive
    _streams(program, terminal, interactive, place.id_base, user, streams)
    if definition.linux_parameters.init_process_enabled:
        program.add("INIT")
    if place.is_durable:
        program.add("SYNC")
    _enter_cgroup(program, place.cgroup, place.tasks_files)
    program.add("USERNS", program.fd(place.userns))
    program.add("NETNS", program.fd(place.netns))
    if place.pidns is not None:
        program.add("PIDNS", program.fd(place.pidns))
    _file_systems(program, definition, place)
    if definition.pseudo_terminal:
        rows, columns = (streams.terminal_rows, streams.terminal_cols) if streams else (24, 80)
        program.add("TERMINAL", rows, columns)
    program.add("WORKDIR", working_directory(definition, config))
    _confine(program, definition, user, limits)
    words = arguments(definition, config)
    variables = container_environment(definition, config, place.hostname, place.region, user.home)
    _exec(program, words, variables)
    return program


def compile_exec(
    *,
    pidfd: int,
    cgroup: int,
    tasks_files: tuple[int, ...],
    id_base: int,
    definition: ContainerDefinition,
    words: Sequence[str],
    variables: Mapping[str, str],
    user: Identity,
    working_directory: str,
    limits: LimitChoice,
    terminal: bool,
    streams: Streams | None,
) -> Program:
    """A second program in a running container: the same rules as for the first, nothing mounted."""
    program = Program()
    _streams(program, terminal, False, id_base, user, streams)
    _enter_cgroup(program, cgroup, tasks_files)
    program.add("JOIN", program.fd(pidfd), about="the container's namespaces")
    if terminal:
        rows, columns = (streams.terminal_rows, streams.terminal_cols) if streams else (24, 80)
        program.add("TERMINAL", rows, columns)
    program.add("WORKDIR", working_directory)
    _confine(program, definition, user, limits)
    _exec(program, words, variables)
    return program


def compile_pause(
    *, userns: int, netns: int, id_base: int, cgroup: int, tasks_files: tuple[int, ...], root: int
) -> Program:
    """pid 1 of a pid namespace that the containers of a task share: our init and nothing else."""
    program = Program()
    _streams(program, False, False, id_base, Identity(), None)
    program.add("INIT")
    _enter_cgroup(program, cgroup, tasks_files)
    program.add("USERNS", program.fd(userns))
    program.add("NETNS", program.fd(netns))
    program.add("ROOT", program.fd(root), about="an empty root")
    program.add("PIVOT", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    program.add("WORKDIR", "/")
    program.add("SECCOMP", seccomp.filter(ptrace=False), about="")
    program.add("CAPABILITIES", 0)
    program.add("USER", 0, 0, groups(()))
    _exec(program, [], {})
    return program


def _streams(
    program: Program,
    terminal: bool,
    interactive: bool,
    id_base: int,
    user: Identity,
    streams: Streams | None,
) -> None:
    program.add("LOG", LOG_SEGMENTS, ON_FULL_DROP_OLDEST)
    flags = (STDIO_TERMINAL if terminal else 0) | (STDIO_KEEP_STDIN if interactive else 0)
    given = (streams.stdin, streams.stdout, streams.stderr) if streams else (None, None, None)
    clients = [NO_FD if fd is None else program.fd(fd) for fd in given]
    program.add("STDIO", flags, *clients, id_base + user.uid, id_base + user.gid)


def _enter_cgroup(program: Program, cgroup: int, tasks_files: tuple[int, ...]) -> None:
    program.add("CGROUP", program.fd(cgroup))
    for file in tasks_files:
        program.add("TASKS", program.fd(file))
    program.add("OOM_SCORE", 0)


def _file_systems(program: Program, definition: ContainerDefinition, place: Place) -> None:
    program.add("ROOT", program.fd(place.root), about="the root file system")
    for layer in place.layers:
        program.add("RELEASE", program.fd(layer))
    program.add("MOUNT", _QUIET, "proc", "proc", [])
    for control in definition.system_controls:
        program.add("SYSCTL", control.namespace.replace(".", "/"), control.value)
    program.extend(_same_for_all())
    _volumes(program, place)
    program.add("FILE", 0o644, "etc/hostname", f"{place.hostname}\n".encode())
    program.add("FILE", 0o644, "etc/hosts", place.hosts.encode())
    program.add("FILE", 0o644, "etc/resolv.conf", place.resolv_conf.encode())
    program.add("HOSTNAME", place.hostname)
    program.add("PIVOT", _RDONLY if definition.readonly_root_filesystem else 0)


@cache
def _same_for_all() -> Program:
    """What every container has, compiled once: two thirds of its records."""
    program = Program()
    program.add("MOUNT", _NOSUID | _NOEXEC, "tmpfs", "dev", ["mode=0755", "size=65536k"])
    pts = ["newinstance", "gid=5", "mode=0620", "ptmxmode=0666"]
    program.add("MOUNT", _NOSUID | _NOEXEC, "devpts", "dev/pts", pts)
    program.add("MOUNT", _QUIET, "tmpfs", "dev/shm", ["mode=1777", "size=65536k"])
    program.add("MOUNT", _QUIET, "mqueue", "dev/mqueue", [])
    for name, major, minor in _DEVICES:
        program.add("DEVICE", major, minor, name)
    for target, path in _DEV_LINKS:
        program.add("SYMLINK", target, path)
    program.add("MOUNT", _QUIET | _RDONLY, "sysfs", "sys", [])
    program.add("MOUNT", _QUIET | _RDONLY, "cgroup2", "sys/fs/cgroup", [])
    for path in _MASKED:
        program.add("MASK", path)
    for path in _READ_ONLY:
        program.add("READONLY", path)
    return program


def _volumes(program: Program, place: Place) -> None:
    # Shorter paths first: a volume below another one's path must land on top of it.
    for volume in sorted(place.volumes, key=lambda v: v.path.count("/")):
        attributes = _NODEV | (_RDONLY if volume.read_only else 0)
        program.add("BIND", program.fd(volume.descriptor), attributes, volume.path.lstrip("/"))


def _confine(
    program: Program, definition: ContainerDefinition, user: Identity, limits: LimitChoice
) -> None:
    asked = definition.linux_parameters.capabilities
    program.extend(_limited(limits))
    program.add("SECCOMP", seccomp.filter(ptrace="SYS_PTRACE" in asked.add), about="")
    program.add("CAPABILITIES", capabilities.effective_set(asked.add, asked.drop))
    program.add("USER", user.uid, user.gid, groups(user.groups), about=f"{user.uid}:{user.gid}")


@lru_cache(maxsize=64)
def _limited(limits: LimitChoice) -> Program:
    """Most containers have the same."""
    program = Program()
    for number, soft, hard in limits.limits:
        program.add("RLIMIT", number, soft, hard, about=f"limit {number} {soft} {hard}")
    return program


def _exec(program: Program, words: Sequence[str], variables: Mapping[str, str]) -> None:
    pairs = [f"{name}={value}" for name, value in variables.items()]
    path = variables.get("PATH", DEFAULT_PATH)
    program.add("EXEC", path, list(words), pairs, about=words[0] if words else "")
