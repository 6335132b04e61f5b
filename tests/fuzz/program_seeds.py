"""Programs to start fuzzing from: those that tasks are made of, and one of each kind of record.

python -m tests.fuzz.program_seeds DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from sandbox.images.documents import ImageConfig
from sandbox.kernel.program import RECORDS, Field, Program
from sandbox.model.task import ContainerDefinition, LinuxParameters
from sandbox.runtime.container import (
    Identity,
    LimitChoice,
    Place,
    VolumeMount,
    compile_container,
    compile_exec,
)

LIMITS: Final = LimitChoice(limits=((7, 1024, 1024),), lowered=())
PLACE: Final = Place(
    userns=0,
    netns=0,
    pidns=None,
    id_base=1 << 20,
    cgroup=0,
    tasks_files=(0, 0),
    root=0,
    layers=(0, 0),
    volumes=(VolumeMount(descriptor=0, path="/data", read_only=True),),
    hostname="0123456789ab",
    hosts="127.0.0.1 localhost\n",
    resolv_conf="",
    region="us-east-1",
    is_durable=True,
)
FIELDS: Final[dict[str, Field]] = {"u": 1, "U": 2, "s": "text", "b": b"\0\1\2\3", "l": ["a=b", ""]}


def container() -> Program:
    definition = ContainerDefinition(
        name="app",
        image="image",
        command=("sh", "-c", "true"),
        pseudo_terminal=True,
        linux_parameters=LinuxParameters(init_process_enabled=True),
    )
    user = Identity(uid=1000, gid=1000, groups=(1, 2))
    return compile_container(definition, ImageConfig(), PLACE, user=user, limits=LIMITS)


def command() -> Program:
    return compile_exec(
        pidfd=0,
        cgroup=0,
        tasks_files=(0,),
        id_base=1 << 20,
        definition=ContainerDefinition(name="app", image="image"),
        words=["id"],
        variables={"PATH": "/bin"},
        user=Identity(),
        working_directory="/",
        limits=LIMITS,
        terminal=False,
        streams=None,
    )


def each_record() -> Program:
    program = Program()
    for name, (_, shape) in RECORDS.items():  # EXEC is the last of the table as of every program
        program.add(name, *(FIELDS[kind] for kind in shape))
    return program


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for make in (container, command, each_record):
        (directory / make.__name__).write_bytes(make().encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
