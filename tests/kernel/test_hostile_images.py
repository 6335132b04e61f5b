"""Images that lie in wait for whoever sets them up: links, FIFOs and sizes that nobody expects.

A container's root is set up by root of the host. Whatever an image has at the places that are then
mounted on, written, read or entered: nothing outside of the container's root may be touched,
nothing may wait for ever, and the task runs as ordered or says what is wrong.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.agent import Agent
from sandbox.model.task import MountPoint, Volume
from scripts.make_image import LayerWriter
from tests.kernel.conftest import Outcome
from tests.kernel.probe_image import Images, Write
from tests.kernel.tasks import container, to_the_end

pytestmark = pytest.mark.guest

Attempt = Callable[..., Awaitable[Outcome]]

# Nothing is mounted over these before the first of them is looked at, so all of them count.
MOUNTED_ON = ("proc", "sys", "dev")
WRITTEN = ("etc/hosts", "etc/resolv.conf", "etc/hostname")


def outward(outside: Path) -> list[str]:
    """Where links lead out, by name, upwards, and by procfs's own links past all names."""
    up = "/".join([".."] * 20)
    names = [f"{outside}/directory", f"{up}{outside}/directory", f"{outside}/file"]
    return [*names, "/proc/self/root", "/proc/self/fd/6"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host that hostile links lead to; it must stay as it is."""
    directory = tmp_path / "outside"
    (directory / "directory").mkdir(parents=True)
    (directory / "file").write_text("app:x:7:7::/:/bin/sh\n")
    before = state(directory)
    yield directory
    assert state(directory) == before


def state(directory: Path) -> list[tuple[str, int, int, int]]:
    everything = [directory, *sorted(directory.rglob("*"))]
    about = [(path, path.lstat()) for path in everything]
    return [(str(path), s.st_ino, s.st_mode, s.st_mtime_ns) for path, s in about]


def link(path: str, target: str) -> Write:
    return lambda layer: layer.symlink(path, target)


def fifo(path: str) -> Write:
    def write(layer: LayerWriter) -> None:
        layer._add(tarfile.FIFOTYPE, path, 0o666)

    return write


def file(path: str, data: bytes) -> Write:
    return lambda layer: layer.file(path, data)


def directory(path: str) -> Write:
    return lambda layer: layer.directory(path)


@pytest.fixture
def attempt(agent: Agent, images: Images, request: pytest.FixtureRequest) -> Attempt:
    """Run a line of shell in an image with one more layer for each `more`, to its end."""
    name = re.sub(r"\W+", "-", request.node.name)[:100]
    tags = (f"{name}-{n}" for n in itertools.count())

    async def attempt(script: str, *more: Write, volumes: Any = (), **members: Any) -> Outcome:
        config = members.pop("config", {})
        wanted = container(images.make(next(tags), *more, **config), "app", script, **members)
        return await to_the_end(agent, wanted, volumes=volumes)

    return attempt


def refusal(outcome: Outcome) -> str:
    """Why the task did not start; it must not have run."""
    assert outcome.view.known.started_at is None
    assert (outcome.stdout, outcome.stderr) == ("", "")
    return outcome.view.known.stopped_reason or ""


# What is mounted on -------------------------------------------------------------------------


@pytest.mark.parametrize("place", MOUNTED_ON)
async def test_no_mount_follows_a_link_out_of_the_image(
    attempt: Attempt, outside: Path, place: str
) -> None:
    for target in outward(outside):
        reason = refusal(await attempt("echo ran", link(place, target)))
        assert re.fullmatch(
            rf"CannotStartContainerError: mount \w+ {place}: (No such file|Too many levels).*",
            reason,
        )


@pytest.mark.parametrize("place", MOUNTED_ON)
async def test_what_is_no_directory_is_not_mounted_on(attempt: Attempt, place: str) -> None:
    for instead in (fifo(place), file(place, b"")):
        assert refusal(await attempt("echo ran", instead)).endswith(f"{place}: Not a directory")


async def test_a_link_inside_the_image_only_moves_the_mount(attempt: Attempt) -> None:
    moved = [directory("there"), link("proc", "/there")]
    script = "head -c 8 /proc/version; wc -c < /there/timer_list; echo 1 > /there/sys/kernel/panic"
    outcome = await attempt(script, *moved)
    assert outcome.stdout == "Linux ve0\n"
    assert outcome.stderr


async def test_nothing_of_the_image_serves_to_mask_with(attempt: Attempt) -> None:
    fake = [file("dev/null", b"not empty"), file("proc/timer_list", b"not empty")]
    outcome = await attempt("cat /proc/timer_list /proc/keys /dev/null", *fake)
    assert (outcome.stdout, outcome.stderr, outcome.container.exit_code) == ("", "", 0)


# What is written ----------------------------------------------------------------------------


async def test_our_files_replace_links_and_are_not_written_through_them(
    attempt: Attempt, outside: Path
) -> None:
    for target in outward(outside):
        links = [link(path, target) for path in WRITTEN]
        outcome = await attempt("cd /etc; stat -c %F-%a hosts resolv.conf; cat hostname", *links)
        assert outcome.stdout == f"regular file-644\nregular file-644\n{outcome.view.id[:12]}\n"


async def test_our_files_replace_fifos(attempt: Attempt) -> None:
    outcome = await attempt("cat /etc/hostname", *map(fifo, WRITTEN))
    assert outcome.stdout == f"{outcome.view.id[:12]}\n"


async def test_a_directory_in_place_of_our_file_is_named(attempt: Attempt) -> None:
    for path in WRITTEN:
        reason = refusal(await attempt("echo ran", directory(path)))
        assert reason == f"CannotStartContainerError: file {path}: Is a directory"


async def test_our_files_follow_no_directory_out_of_the_image(
    attempt: Attempt, outside: Path
) -> None:
    for target in outward(outside):
        reason = refusal(await attempt("echo ran", link("etc", target)))
        assert reason.startswith("CannotStartContainerError: file etc/hostname: ")


# What is entered ----------------------------------------------------------------------------


async def test_no_working_directory_leads_out_by_a_descriptor_of_the_keeper(
    agent: Agent, probe_image: str
) -> None:
    """The descriptors that a start holds are few and low; some are directories of the host."""
    root_of_the_image = (await to_the_end(agent, container(probe_image, "app", "ls /"))).stdout
    refused = []
    for number in range(32):
        wanted = container(
            probe_image, "app", "pwd; ls", working_directory=f"/proc/self/fd/{number}"
        )
        outcome = await to_the_end(agent, wanted)
        if outcome.view.known.started_at is None:
            refused.append(refusal(outcome))
        else:
            assert outcome.stdout == f"/\n{root_of_the_image}"
    assert len(refused) >= 30
    assert (
        "CannotStartContainerError: workdir /proc/self/fd/6: No such file or directory" in refused
    )


async def test_a_way_up_ends_at_the_root_of_the_container(attempt: Attempt) -> None:
    for path in ("/proc/self/root/../..", "/../../..", "/proc/1/cwd"):
        outcome = await attempt("pwd; ls probe", working_directory=path)
        assert outcome.stdout == "/\nprobe\n"


async def test_a_missing_working_directory_of_two_thousand_names_is_made(attempt: Attempt) -> None:
    outcome = await attempt("pwd | wc -c", config={"WorkingDir": "/a" * 2000})
    assert outcome.stdout == "4001\n"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "Not a directory"),
        ("/loop", "Too many levels of symbolic links"),
        ("/" + "a" * 300, "File name too long"),
        ("/a" * 2100, "File name too long"),
    ],
    ids=["file", "loop", "long name", "long path"],
)
async def test_a_working_directory_that_cannot_be_is_named(
    attempt: Attempt, path: str, reason: str
) -> None:
    outcome = await attempt("echo ran", link("loop", "loop"), config={"WorkingDir": path})
    assert refusal(outcome) == f"CannotStartContainerError: workdir {path}: {reason}"


# What is read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passwd", "reason"),
    [
        (fifo("etc/passwd"), "/etc/passwd of the image cannot be read: .*: Invalid argument"),
        (directory("etc/passwd"), "/etc/passwd of the image cannot be read: .*: Invalid argument"),
        (file("etc/passwd", b"x" * (2 << 20)), "/etc/passwd .* cannot be read: .*: File too large"),
        (link("etc/passwd", "passwd"), "/etc/passwd of the image cannot be read: .*: Too many .*"),
        (link("etc/passwd", "/dev/zero"), "unable to find user 'app': .*"),
        (file("etc/passwd", b"app:x:-1:0::/:\n"), "unable to find user 'app': .*"),
        (file("etc/passwd", "app:x:\u0660:0::/:\n".encode()), "unable to find user 'app': .*"),
        (file("etc/passwd", b"app:x:4294967296:0::/:\n"), "user 'app': id 4294967296 is beyond .*"),
    ],
    ids=["fifo", "directory", "huge", "loop", "device", "negative", "other digits", "2^32"],
)
async def test_no_passwd_makes_a_user_of_nothing(
    attempt: Attempt, passwd: Write, reason: str
) -> None:
    outcome = await attempt("id -u", passwd, user="app")
    assert re.fullmatch(rf"\w+Error: {reason}", refusal(outcome))


async def test_a_passwd_outside_of_the_image_is_not_read(attempt: Attempt, outside: Path) -> None:
    outcome = await attempt("id -u", link("etc/passwd", f"{outside}/file"), user="app")
    assert "unable to find user 'app'" in refusal(outcome)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (["A=" + "x" * (5 << 20)], "execve arguments and environment: Argument list too long"),
        (["A=" + "x" * (1 << 20)], 'exec: "sh": argument list too long'),
    ],
    ids=["more than a program holds", "more than the kernel takes"],
)
async def test_an_environment_beyond_the_kernels_limit_is_told(
    attempt: Attempt, env: list[str], reason: str
) -> None:
    assert refusal(await attempt("echo ran", config={"Env": env})).endswith(reason)


# Volumes ------------------------------------------------------------------------------------


def at(path: str) -> dict[str, Any]:
    """Members of a definition with an empty volume there."""
    point = MountPoint(source_volume="v", container_path=path)
    return {"volumes": (Volume(name="v"),), "mount_points": (point,)}


async def test_no_volume_follows_a_link_out_of_the_image(attempt: Attempt, outside: Path) -> None:
    for target in outward(outside):
        assert refusal(await attempt("echo x > /data/x", link("data", target), **at("/data")))


async def test_a_volume_follows_a_link_inside_the_image(attempt: Attempt) -> None:
    more = [directory("there"), link("data", "../../there")]
    outcome = await attempt("echo x > /data/x; cat /there/x", *more, **at("/data"))
    assert outcome.stdout == "x\n"


async def test_a_volume_wants_a_directory(attempt: Attempt) -> None:
    for instead in (fifo("data"), file("data", b"")):
        assert "no directory there" in refusal(await attempt("echo ran", instead, **at("/data")))


async def test_a_volume_over_a_protected_place_uncovers_nothing(attempt: Attempt) -> None:
    for path in ("/proc/sys", "/sys/fs", "/dev/pts"):
        outcome = await attempt(f"ls -A {path}; echo x > {path}/x && cat {path}/x", **at(path))
        assert outcome.stdout == "x\n"


async def test_a_path_of_a_volume_ends_at_the_root_of_the_container(
    attempt: Attempt, outside: Path
) -> None:
    outcome = await attempt("echo x > /inside/x; cat /inside/x", **at("/../../inside"))
    assert outcome.stdout == "x\n"
