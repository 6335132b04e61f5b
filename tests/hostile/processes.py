"""Images that are hostile in what they say of how to run them: users, directories, environments.

Each is busybox with a passwd of root and app (1000:1000), a group extra (2000) of app's, and what
the case puts over it. What is accepted runs, and says who it is, where, and with what environment.
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.make_image import LayerWriter, busybox
from tests.hostile.cases import SAME, Refused, Umoci, accepts, not_asked, refuses, unlike, worded
from tests.hostile.images import OUTSIDE, Image, Layer, layer
from tests.hostile.layers import layers_of_numbers
from tests.kernel.archives import file, header, symlink

SCRIPT = r"""
/bin/busybox grep -E '^(Uid|Gid|Groups):' /proc/self/status
pwd
/bin/busybox tr '\n\000' '\\\n' </proc/self/environ
"""
COMMAND = ["/bin/busybox", "sh", "-c", SCRIPT]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class Process:
    """What it is, as it says itself. `env` is what an image can change."""

    uid: int = 0
    gid: int = 0
    groups: frozenset[int] = frozenset()
    """The supplementary ones."""
    cwd: str = "/"
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    image: Image
    outcome: Process | Refused
    umoci: Umoci = SAME
    """Of the bundle that it makes: it runs nothing."""


@functools.cache
def base() -> Layer:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        busybox(LayerWriter(archive))
    return Layer(archive=content.getvalue())


def image(over: tuple[bytes, ...], config: Mapping[str, Any]) -> Image:
    return Image(layers=(layer(*over),), config={"Cmd": COMMAND, **config})


def runs(process: Process, *over: bytes, umoci: Umoci = SAME, **config: Any) -> Run:
    return Run(image=image(over, config), outcome=process, umoci=umoci)


def fails(text: str, *over: bytes, umoci: Umoci = SAME, **config: Any) -> Run:
    return Run(image=image(over, config), outcome=Refused(worded(text)), umoci=umoci)


# Users --------------------------------------------------------------------------------------

APP = Process(uid=1000, gid=1000, groups=frozenset({2000}), env={"HOME": "/home/app"})
SIGNS = accepts("makes it root: strconv.Atoi takes a sign")
ANY_ID = accepts("knows no range of ids")
WITHOUT = (file(b"etc/.wh.passwd"), file(b"etc/.wh.group"))


def user(uid: int, gid: int, *more: int) -> Process:
    return Process(uid=uid, gid=gid, groups=frozenset(more))


def nobody(spec: str, *over: bytes, umoci: Umoci = SAME) -> Run:
    name = spec.partition(":")[0]
    text = f"...unable to find user {name!r}: no matching entries in passwd file"
    return fails(text, *over, umoci=umoci, User=spec)


def no_group(spec: str, *over: bytes) -> Run:
    name = spec.partition(":")[2]
    text = f"...unable to find group {name!r}: no matching entries in group file"
    return fails(text, *over, User=spec)


def beyond(spec: str, number: int, *over: bytes, umoci: Umoci = ANY_ID) -> Run:
    text = f"...user {spec!r}: id {number} is beyond a task's 65536 ids"
    return fails(text, *over, umoci=umoci, User=spec)


def passwd(content: str) -> bytes:
    return file(b"etc/passwd", content.encode())


USERS = {
    "nobody said": runs(Process()),
    "a name": runs(APP, User="app"),
    "a number that has a name": runs(APP, User="1000"),
    "a number that has none": runs(user(4242, 0), User="4242"),
    "a number with zeros before it": runs(APP, User="0001000"),
    "a number and a group's name": runs(user(7, 2000), User="7:extra"),
    "a name and a number": runs(user(1000, 8), User="app:8"),
    "the highest": runs(user(65535, 65535), User="65535:65535"),
    "a number without any file": runs(user(1000, 0), *WITHOUT, User="1000"),
    "a number that names another in passwd": runs(
        user(1000, 0), passwd("1000:x:0:0::/:/bin/sh\n"), User="1000"
    ),
    "the first of two": runs(
        user(5, 6, 2000), passwd("app:x:5:6::/:\napp:x:0:0::/:\n"), User="app"
    ),
    "a passwd of DOS": runs(user(5, 6, 2000), passwd("app:x:5:6::/:\r\n"), User="app"),
    "a passwd without an end": runs(user(5, 6, 2000), passwd("app:x:5:6"), User="app"),
    "-1": nobody("-1"),
    "-0": nobody("-0", umoci=SIGNS),
    "+0": nobody("+0", umoci=SIGNS),
    "0x0": nobody("0x0"),
    "1e3": nobody("1e3"),
    "a blank before": nobody(" 1000"),
    "a blank behind": nobody("1000 "),
    "a line behind": nobody("app\n"),
    "other digits": nobody("\u0661"),
    "wide digits": nobody("\uff10"),
    "65536": beyond("65536", 65536),
    "2^31": beyond("2147483648", 1 << 31, umoci=SAME),
    "2^32": beyond("4294967296", 1 << 32, umoci=SAME),
    "2^64": nobody("18446744073709551616"),
    "root without a passwd": nobody("root", *WITHOUT),
    "app without a passwd": nobody("app", *WITHOUT),
    "app with an empty passwd": nobody("app", passwd("")),
    "app with a negative id": nobody(
        "app", passwd("app:x:-1:0::/:\n"), umoci=accepts("lets it become 4294967295")
    ),
    "app with no id": nobody(
        "app", passwd("app:x:::::\n"), umoci=accepts("makes it root: what is no number counts as 0")
    ),
    "app with an id in other digits": nobody(
        "app",
        passwd("app:x:\u0661:0::/:\n"),
        umoci=accepts("makes it root: what is no number counts as 0"),
    ),
    "app with half a line": nobody(
        "app", passwd("app:x:5\n"), umoci=accepts("gives it the group 0")
    ),
    "app with the id 2^32": beyond("app", 1 << 32, passwd("app:x:4294967296:0::/:\n")),
    "app with the group 2^32": beyond("app", 1 << 32, passwd("app:x:5:4294967296::/:\n")),
    "a group that is not there": no_group("app:wheel"),
    "a group -1": no_group("7:-1"),
    "a group in other digits": no_group("7:\u0661"),
    "a group without a file": no_group("app:extra", *WITHOUT, passwd("app:x:5:6::/:\n")),
    "a group 65536": beyond("7:65536", 65536),
    "one more group than there are ids": beyond(
        "app", 70_000, file(b"etc/group", b"extra:x:70000:app\n")
    ),
    "a thousand groups": runs(
        Process(uid=1000, gid=1000, groups=frozenset(range(3000, 4000))),
        file(b"etc/group", b"".join(b"g%d:x:%d:app\n" % (n, n) for n in range(3000, 4000))),
        User="app",
    ),
    "a passwd in the host": nobody(
        "app",
        symlink(b"etc/passwd", bytes(OUTSIDE) + b"/file"),
        umoci=accepts("makes it root: it follows the link and reads the host's file"),
    ),
}

ONLY_RUN = not_asked("shows only when it runs")

# Directories --------------------------------------------------------------------------------


def cwd(path: str) -> Process:
    return Process(cwd=path)


def no_cwd(path: str, answer: str, *over: bytes) -> Run:
    text = f"CannotStartContainerError: workdir {path}: {answer}"
    return fails(text, *over, umoci=ONLY_RUN, WorkingDir=path)


DIRECTORIES = {
    "none": runs(cwd("/"), WorkingDir=""),
    "one that is there": runs(cwd("/home/app"), WorkingDir="/home/app"),
    "one that is not": runs(cwd("/a/b/c"), WorkingDir="/a//b/./c/"),
    "upwards": runs(cwd("/tmp"), WorkingDir="/../../tmp"),
    "a link inside": runs(cwd("/tmp"), symlink(b"w", b"/tmp"), WorkingDir="/w"),
    "a link inside by a way up": runs(cwd("/tmp"), symlink(b"w", b"../../../tmp"), WorkingDir="/w"),
    "a link out": no_cwd("/w", "...", symlink(b"w", bytes(OUTSIDE) + b"/directory")),
    "below a link out": no_cwd("/w/x", "...", symlink(b"w", bytes(OUTSIDE) + b"/directory")),
    "a link to itself": no_cwd("/w", "Too many levels of symbolic links", symlink(b"w", b"w")),
    "a file": no_cwd("/etc/passwd", "Not a directory"),
    "a FIFO": no_cwd("/w", "Not a directory", header(b"w", b"6")),
}

# Environments -------------------------------------------------------------------------------


def env(**variables: str) -> Process:
    return Process(env=variables)


ENVIRONMENTS = {
    "none": runs(env(PATH=PATH, HOME="/root")),
    "the last of two": runs(env(A="2"), Env=["A=1", "A=2"]),
    "a value with =": runs(env(A="b=c"), Env=["A=b=c"]),
    "no =": runs(env(B="1"), Env=["A", "B=1"], umoci=refuses("does not take such an entry")),
    "no name": runs(env(B="1"), Env=["=A", "B=1"], umoci=refuses("does not take such an entry")),
    "a value of lines": runs(env(A="1\nB=2"), Env=["A=1\nB=2"]),
    "a value that is not ASCII": runs(env(A="\u00e9\U0001f40d"), Env=["A=\u00e9\U0001f40d"]),
    "a PATH of its own": runs(env(PATH="/x"), Env=["PATH=/x"]),
    "what only we say": runs(
        env(AWS_EXECUTION_ENV="AWS_ECS_FARGATE"),
        Env=["AWS_EXECUTION_ENV=elsewhere"],
        umoci=unlike("knows nothing of ECS"),
    ),
}

# Commands -----------------------------------------------------------------------------------

NOTHING = "CannotCreateContainerError: no command specified for container 'app'"

COMMANDS = {
    "an entry point and its words": runs(Process(), Entrypoint=COMMAND[:2], Cmd=COMMAND[2:]),
    "nothing to run": fails(NOTHING, umoci=ONLY_RUN, Cmd=None),
    "an empty list": fails(NOTHING, umoci=ONLY_RUN, Cmd=[], Entrypoint=[]),
    "a word of nothing": fails("CannotStartContainerError: ...", umoci=ONLY_RUN, Cmd=[""]),
    "what is not there": fails("CannotStartContainerError: ...", umoci=ONLY_RUN, Cmd=["/no/such"]),
    "a directory": fails("CannotStartContainerError: ...", umoci=ONLY_RUN, Cmd=["/bin"]),
}

LAYERS = {
    "130 more": Run(
        image=Image(layers=layers_of_numbers(130), config={"Cmd": COMMAND}),
        outcome=Process(),
        umoci=not_asked("takes three seconds"),
    ),
}

CASES: dict[str, Run] = {
    f"{subject}: {name}": run
    for subject, of in {
        "user": USERS,
        "working directory": DIRECTORIES,
        "environment": ENVIRONMENTS,
        "command": COMMANDS,
        "layers": LAYERS,
    }.items()
    for name, run in of.items()
}
