"""What every test finds: a real registry, and a check that it left nothing behind.

Tests in tests/kernel, tests/crash and tests/hostile need root and are checked for leaks: what
Sandbox makes on a host (tests/leaks.py) is compared before and after. The kernel takes some down
later than the call that asked for it returns (namespaces, cgroups), so a leak is what is still
there after a while. The comparison is of the whole host: two runs of these tests at once see each
other.

A test marked `guest` runs a second time in the guest of scripts/vm.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.leaks import leaked, snapshot

# A machine may be slow, busy, or emulated: no test is about time. Nor does one fail by chance; new
# inputs are looked for by `scripts/test fuzz`, which keeps those that failed and tries them first.
settings.register_profile(
    "any", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long",
    settings.get_profile("any"),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(Path(__file__).parents[1] / "build/fuzz/hypothesis"),
    max_examples=10_000,
    print_blob=True,
)
settings.load_profile("any")

ROOT = Path(__file__).parents[1]
LEFT_AFTER_S = 5.0

IN_GUEST = "SANDBOX_GUEST" in os.environ
"""Of scripts/vm, where fork and exec take 16 times as long."""

# The checks that every implementation of a protocol must pass assert as tests do.
pytest.register_assert_rewrite("tests.suites")


def touches_the_host(item: pytest.Item) -> bool:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    return folder in ("kernel", "crash", "hostile")


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
