"""What every test finds: a real registry, and a check that it left nothing behind.

Tests in tests/kernel and tests/crash need root and are checked for leaks: what Sandbox makes on a
host is compared before and after each of them. The kernel takes some things down later than the
call that asked for it returns (namespaces, cgroups), so a leak is what is still there after a
while. The comparison is of the whole host: two runs of these tests at once see each other.

A test marked `guest` runs a second time in the guest of scripts/vm.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import structlog
from hypothesis import HealthCheck, settings

# A machine may be slow, busy, or emulated: no test is about time.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")

ROOT = Path(__file__).parents[1]
LEFT_AFTER_S = 5.0

IN_GUEST = "SANDBOX_GUEST" in os.environ
"""Of scripts/vm, where fork and exec take 16 times as long."""

OURS = re.compile(r"sandbox|sb[0-9a-f]{4}")
"""Every name that Sandbox gives a kernel object begins so (instance ids are 4 hex digits)."""

TASKS_UNIT = "/system.slice/sandbox-tasks.service"
"""Where trees stand on a machine that scripts/provision prepared."""


# The checks that every implementation of a protocol must pass assert as tests do.
pytest.register_assert_rewrite("tests.suites")


def touches_the_host(item: pytest.Item) -> bool:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    return folder in ("kernel", "crash")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if touches_the_host(item) and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(autouse=True, scope="session")
def plain_tracebacks() -> None:
    """structlog's default has all local variables: writing one holds up an agent for seconds."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
    )


# ---------------------------------------------------------------------- leaks


def snapshot() -> dict[str, set[str]]:
    """Everything that Sandbox could leave on a host, as names a person can look up."""
    return {
        "link": links(),
        "mount": mounts(),
        "cgroup": cgroups(),
        "process": processes(),
        "descriptor": descriptors(),
        "network namespace": names_in("/run/netns"),
        "loop device": loop_devices(),
    }


def names_in(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def links() -> set[str]:
    return {name for name in names_in("/sys/class/net") if OURS.match(name)}


def mounts() -> set[str]:
    # Not the mount ids: a namespace that is left and entered again gets new ones.
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {f"{field[4]} ({field[3]} of {field[field.index('-') + 1]})" for field in fields}


def cgroups() -> set[str]:
    """Directories of ours in any hierarchy, and everything below them."""
    found = set()
    for top in cgroup_roots():
        for first in top.iterdir():
            if OURS.match(first.name) and first.is_dir():
                found |= {directory for directory, _, _ in os.walk(first)}
    return found


def cgroup_roots() -> list[Path]:
    """Mount points of all hierarchies and, under them, the places of this process and of tasks."""
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tops = [Path(f[4]) for f in fields if f[f.index("-") + 1] in ("cgroup", "cgroup2")]
    own = {line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    places = {top / path.lstrip("/") for top in tops for path in own | {"/", TASKS_UNIT}}
    return sorted(place for place in places if place.is_dir())


def processes() -> set[str]:
    """Children of this process at any depth, and keepers, which outlive their parents."""
    mine = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if Path(process.exe()).name.startswith(("keeper", "unpack")):
                mine.add(process)
        except psutil.Error:
            continue  # gone, or a thread of the kernel
    return {name for process in mine if (name := describe(process))}


def describe(process: psutil.Process) -> str | None:
    try:
        return f"{process.pid} {process.name()}"  # not its state, which changes
    except psutil.Error:
        return None


def descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the descriptor that listed the directory
    return found


def loop_devices() -> set[str]:
    return {
        f"/dev/{device.name} ({file.read_text().strip()})"
        for device in Path("/sys/block").glob("loop*")
        if (file := device / "loop/backing_file").exists()
    }


def leaked(before: dict[str, set[str]]) -> list[str]:
    after = snapshot()
    return [f"{kind} {name}" for kind in after for name in sorted(after[kind] - before[kind])]


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Fail the test that left something on the host, with the names of what it left."""
    before = snapshot()
    yield
    gc.collect()
    deadline = time.monotonic() + LEFT_AFTER_S
    while (left := leaked(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    checked = touches_the_host(request.node) and not request.node.get_closest_marker("only_reads")
    with leaving_nothing() if checked else nullcontext():
        yield


# ---------------------------------------------------------------------- a registry


@dataclass(frozen=True)
class Registry:
    address: str
    images: Mapping[str, str]
    """Full references of what is in it: `tiny` and `many` (scripts/make_image.py)."""


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    """Debian's docker-registry on a loopback port, with two images pushed by skopeo."""
    for program in ("docker-registry", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: scripts/setup --tests")
    server = subprocess.Popen(
        [ROOT / "scripts/registry", "--print"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin and server.stdout
    with server:
        variables = dict(server.stdout.readline().strip().partition("=")[::2] for _ in range(3))
        assert variables.keys() == {"REGISTRY", "TINY", "MANY"}, "scripts/registry failed"
        yield Registry(variables["REGISTRY"], {n: variables[n.upper()] for n in ("tiny", "many")})
        server.stdin.close()
