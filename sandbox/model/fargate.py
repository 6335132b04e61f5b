"""What Fargate accepts of a task definition, and what it makes of it. Pure.

`check` finds every breach, `accept` raises the first in ECS's words (with all of them in `.all`)
and gives back the definition as ECS would return it. The rules of one container are in
`model.container_rules`, the texts in `model.refusals`.

Two things select the rules. The platform version: 1.4.0 (2020) brought pidMode, SYS_PTRACE,
systemControls, in-place restarts, one ephemeral storage for everything and later the sizes of 8
and 16 vCPU. And the era: "2017" is
Fargate as it was launched, with the first five rows of sizes, half the definition's size and no
linuxParameters.

Nothing else bounds environment and commands: they are within the definition's JSON, whose size is
checked first, so that everything after it works on little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal

import msgspec

from sandbox.errors import ClientException, InvalidParameterException
from sandbox.model.container_rules import (
    NOT_BUILT,
    NOT_ON_FARGATE,
    Surroundings,
    breaches,
    given,
    port_range,
)
from sandbox.model.names import is_name
from sandbox.model.refusals import Incompatibility, Incompatible, Text, shown
from sandbox.model.task import ContainerDefinition, TaskDefinition, TaskStorage

LATEST = "1.4.0"
PLATFORM_VERSIONS = ("1.3.0", "1.4.0")
MAX_CONTAINERS = 10
MAX_BYTES = 64 * 1024
MAX_BYTES_2017 = 32 * 1024
STORAGE_GIB = range(21, 200 + 1)
"""What ephemeralStorage may ask for."""
STORAGE = TaskStorage(size_gib=20)
STORAGE_2017 = TaskStorage(size_gib=10, volumes_gib=4)
"""Up to platform 1.3.0: layers here, all volumes together there."""

SIZES_2017: Mapping[int, tuple[int, ...]] = {
    256: (512, 1024, 2048),
    512: tuple(range(1024, 4096 + 1, 1024)),
    1024: tuple(range(2048, 8192 + 1, 1024)),
    2048: tuple(range(4096, 16384 + 1, 1024)),
    4096: tuple(range(8192, 30720 + 1, 1024)),
}
"""Memory in MiB that may go with cpu in units of 1/1024 vCPU: 50 pairs."""
SIZES: Mapping[int, tuple[int, ...]] = {
    **SIZES_2017,
    8192: tuple(range(16384, 61440 + 1, 4096)),
    16384: tuple(range(32768, 122880 + 1, 8192)),
}
"""The 74 pairs of today, Linux platform 1.4.0."""

_UNITS = re.compile(r"[0-9]{1,9}")
_AMOUNT = re.compile(r"([0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,9}) ?(vcpu|gb)", re.IGNORECASE)

Era = Literal["2017"]


def resolve_platform_version(text: str) -> str:
    """The number behind `text`, which may be LATEST."""
    if text == "LATEST":
        return LATEST
    if text not in PLATFORM_VERSIONS:
        known = ", ".join(PLATFORM_VERSIONS)
        raise InvalidParameterException(
            f"platform version {shown(text)} is none of LATEST, {known}"
        )
    return text


def sizes(platform_version: str = LATEST, era: Era | None = None) -> Mapping[int, tuple[int, ...]]:
    """The memory sizes for each cpu size."""
    return SIZES if _is_1_4(platform_version, era) else SIZES_2017


def storage(
    definition: TaskDefinition, platform_version: str = LATEST, era: Era | None = None
) -> TaskStorage:
    """The ephemeral storage of a task of an accepted definition."""
    if not _is_1_4(platform_version, era):
        return STORAGE_2017
    asked = definition.ephemeral_storage
    return TaskStorage(size_gib=asked.size_in_gib) if asked else STORAGE


def normalise_cpu(text: str) -> str:
    """ "1 vCPU" and "1024" are "1024"; ClientException for what is no amount of cpu."""
    units = _amount(text, "vcpu")
    if units is None:
        raise ClientException(Text.CPU_INVALID)
    return str(units)


def normalise_memory(text: str) -> str:
    """ "0.5GB" and "512" are "512"; ClientException for what is no amount of memory."""
    mebibytes = _amount(text, "gb")
    if mebibytes is None:
        raise ClientException(Text.MEMORY_INVALID.format(value=shown(text)))
    return str(mebibytes)


def accept(
    definition: TaskDefinition, platform_version: str = LATEST, era: Era | None = None
) -> TaskDefinition:
    """The definition with its sizes normalised and every hostPort filled in.

    Raises Incompatible, a ClientException with the first breach as its text.
    """
    found = check(definition, platform_version, era)
    if found:
        raise Incompatible(found)
    return msgspec.structs.replace(
        definition,
        cpu=normalise_cpu(definition.cpu),
        memory=normalise_memory(definition.memory),
        container_definitions=tuple(
            msgspec.structs.replace(
                container,
                port_mappings=tuple(
                    msgspec.structs.replace(mapping, host_port=mapping.container_port)
                    for mapping in container.port_mappings
                ),
            )
            for container in definition.container_definitions
        ),
    )


def check(
    definition: TaskDefinition, platform_version: str = LATEST, era: Era | None = None
) -> list[Incompatibility]:
    """Everything that Fargate would refuse; the first is what ECS would name.

    Raises InvalidParameterException for a platform version that there is not.
    """
    malformed = _form(definition, era)
    if malformed is not None:
        return [malformed]
    return list(_breaches(definition, platform_version, era))


def waits_for(container: ContainerDefinition) -> frozenset[str]:
    """The containers that come before this one: those it depends on or takes volumes from."""
    return frozenset(
        [dependency.container_name for dependency in container.depends_on]
        + [source.source_container for source in container.volumes_from]
    )


def _is_1_4(platform_version: str, era: Era | None) -> bool:
    return resolve_platform_version(platform_version) == LATEST and era is None


def _amount(text: str, unit: str) -> int | None:
    """A whole number, or a decimal one with its unit, which is 1024 of the small units."""
    if _UNITS.fullmatch(text):
        return int(text)
    parts = _AMOUNT.fullmatch(text)
    if parts is None or parts[2].lower() != unit:
        return None
    amount = Fraction(parts[1]) * 1024
    return int(amount) if amount.denominator == 1 else None


def _form(definition: TaskDefinition, era: Era | None) -> Incompatibility | None:
    """Size and types: Python code may have put anything into the members."""
    try:
        encoded = msgspec.json.encode(definition)
        limit = MAX_BYTES_2017 if era == "2017" else MAX_BYTES
        if len(encoded) > limit:
            return Incompatibility("", Text.TOO_LARGE.format(size=len(encoded), limit=limit))
        msgspec.json.decode(encoded, type=TaskDefinition)
    except (msgspec.MsgspecError, UnicodeError, TypeError) as error:
        return Incompatibility("", Text.MALFORMED.format(how=error))
    return None


def _breaches(
    definition: TaskDefinition, platform_version: str, era: Era | None
) -> Iterator[Incompatibility]:
    containers = definition.container_definitions
    if not is_name(definition.family):
        yield Incompatibility("family", Text.FAMILY_INVALID.format(name=shown(definition.family)))
    yield from _size(definition, platform_version, era)
    if definition.pid_mode == "host":
        yield Incompatibility("pidMode", Text.PID_MODE_HOST)
    elif definition.pid_mode is not None and not _is_1_4(platform_version, era):
        yield Incompatibility("pidMode", Text.PID_MODE_NEEDS_1_4)
    yield from _storage(definition, platform_version, era)
    yield from _volumes(definition)
    yield from _together(containers)
    around = Surroundings(
        containers={container.name: container for container in containers},
        volumes=frozenset(volume.name for volume in definition.volumes),
        task_memory=_amount(definition.memory, "gb"),
        is_1_4=_is_1_4(platform_version, era),
        is_2017=era == "2017",
    )
    for index, container in enumerate(containers):
        for breach in breaches(container, around):
            where = f"containerDefinitions[{index}].{breach.where}"
            yield Incompatibility(where, breach.text)
    yield from _sums(definition)
    yield from _ports_once(containers)
    yield from _cycle(containers)


def _size(
    definition: TaskDefinition, platform_version: str, era: Era | None
) -> Iterator[Incompatibility]:
    cpu, memory = _amount(definition.cpu, "vcpu"), _amount(definition.memory, "gb")
    if not definition.cpu:
        yield Incompatibility("cpu", Text.CPU_MISSING)
    elif cpu not in SIZES:
        yield Incompatibility("cpu", Text.CPU_INVALID_2017 if era == "2017" else Text.CPU_INVALID)
    if not definition.memory:
        yield Incompatibility("memory", Text.MEMORY_MISSING)
    elif memory is None:
        text = Text.MEMORY_INVALID.format(value=shown(definition.memory))
        yield Incompatibility("memory", text)
    if cpu is None or cpu not in SIZES or memory is None:
        return
    if memory not in sizes(platform_version, era).get(cpu, ()):
        if era == "2017":
            yield Incompatibility("cpu", Text.NO_SUCH_SIZE_2017)
        elif memory in SIZES[cpu]:
            yield Incompatibility("cpu", Text.SIZE_NEEDS_1_4.format(cpu=cpu))
        else:
            yield Incompatibility("cpu", Text.NO_SUCH_SIZE.format(cpu=cpu, memory=memory))


def _storage(
    definition: TaskDefinition, platform_version: str, era: Era | None
) -> Iterator[Incompatibility]:
    asked = definition.ephemeral_storage
    if asked is None:
        return
    if not _is_1_4(platform_version, era):
        yield Incompatibility("ephemeralStorage", Text.STORAGE_NEEDS_1_4)
    elif asked.size_in_gib not in STORAGE_GIB:
        text = Text.STORAGE_SIZE.format(value=asked.size_in_gib)
        yield Incompatibility("ephemeralStorage.sizeInGiB", text)


def _volumes(definition: TaskDefinition) -> Iterator[Incompatibility]:
    seen: set[str] = set()
    for index, volume in enumerate(definition.volumes):
        where, name = f"volumes[{index}].name", volume.name
        if not is_name(name):
            yield Incompatibility(where, Text.VOLUME_NAME_INVALID.format(name=shown(name)))
        elif name in seen:
            yield Incompatibility(where, Text.VOLUME_TWICE.format(name=shown(name)))
        seen.add(name)
        outside = (
            [f"host.{each}" for each in given(volume.host, NOT_ON_FARGATE)] if volume.host else []
        )
        for member in outside + given(volume, NOT_ON_FARGATE):
            text = Text.VOLUME_NOT_ON_FARGATE.format(name=shown(name), member=member)
            yield Incompatibility(f"volumes[{index}].{member}", text)
        for member in given(volume, NOT_BUILT):
            text = Text.VOLUME_NOT_BUILT.format(name=shown(name), member=member)
            yield Incompatibility(f"volumes[{index}].{member}", text)


def _together(containers: tuple[ContainerDefinition, ...]) -> Iterator[Incompatibility]:
    if not 1 <= len(containers) <= MAX_CONTAINERS:
        text = Text.CONTAINER_COUNT.format(count=len(containers))
        yield Incompatibility("containerDefinitions", text)
    if containers and not any(container.essential for container in containers):
        yield Incompatibility("containerDefinitions", Text.NONE_ESSENTIAL)
    seen: set[str] = set()
    for index, container in enumerate(containers):
        if container.name in seen:
            where = f"containerDefinitions[{index}].name"
            yield Incompatibility(where, Text.NAME_TWICE.format(name=shown(container.name)))
        seen.add(container.name)


def _sums(definition: TaskDefinition) -> Iterator[Incompatibility]:
    cpu, memory = _amount(definition.cpu, "vcpu"), _amount(definition.memory, "gb")
    containers = definition.container_definitions
    cpu_sum = sum(max(container.cpu, 0) for container in containers)
    if cpu is not None and cpu_sum > cpu:
        yield Incompatibility("cpu", Text.CPU_SUM.format(sum=cpu_sum, task=cpu))
    reserved = sum(max(container.memory_reservation or 0, 0) for container in containers)
    if memory is not None and reserved > memory:
        yield Incompatibility("memory", Text.RESERVATION_SUM.format(sum=reserved, task=memory))


def _ports_once(containers: tuple[ContainerDefinition, ...]) -> Iterator[Incompatibility]:
    seen: set[tuple[str, int]] = set()
    for index, container in enumerate(containers):
        for number, mapping in enumerate(container.port_mappings):
            ports = [(mapping.protocol, port) for port in port_range(mapping)]
            twice = next((port for protocol, port in ports if (protocol, port) in seen), None)
            if twice is not None:
                where = f"containerDefinitions[{index}].portMappings[{number}]"
                text = Text.PORT_TWICE.format(protocol=mapping.protocol.upper(), port=twice)
                yield Incompatibility(where, text)
            seen.update(ports)


def _cycle(containers: tuple[ContainerDefinition, ...]) -> Iterator[Incompatibility]:
    """One cycle through dependsOn and volumesFrom; a container that names itself is told apart."""
    names = {container.name for container in containers}
    graph = {c.name: (waits_for(c) & names) - {c.name} for c in containers}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # graphlib tells it from the awaited to the waiting.
        around = list(reversed(error.args[1]))
        text = ", ".join(f"{one} for {other}" for one, other in pairwise(map(shown, around)))
        yield Incompatibility("containerDefinitions", Text.CYCLE.format(cycle=text))
