"""The guest of scripts/vm is what it claims to be, and its kernel enforces what we build on.

These facts hold for a hierarchy with v2 alone. On a host of another kind they are skipped: the
guest is where they are sure to run.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IN_GUEST

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = {"cpu", "io", "memory", "pids"}


def controllers_below_root() -> set[str]:
    file = ROOT / "cgroup.subtree_control"
    return set(file.read_text().split()) if file.exists() else set()


pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(
        not IN_GUEST and not controllers_below_root() >= CONTROLLERS,
        reason="this host has no cgroup v2 with cpu, io, memory and pids; scripts/test vm runs it",
    ),
]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    directory = ROOT / f"sandbox-test-{os.getpid()}"
    directory.mkdir()
    yield directory
    (directory / "cgroup.kill").write_text("1")
    for _ in range(200):
        try:
            directory.rmdir()
            return
        except OSError as error:
            assert error.errno == errno.EBUSY
            time.sleep(0.02)
    pytest.fail(f"{directory} stays busy")


def python_in(cgroup: Path, code: str) -> subprocess.Popen[str]:
    """Start Python which enters the cgroup before its first own instruction."""
    enter = f"open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0')\n"
    return subprocess.Popen(
        [sys.executable, "-SEc", enter + code], stdout=subprocess.PIPE, text=True
    )


def counters(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in file.read_text().splitlines())
    return {name: int(value) for name, value in pairs}


@pytest.mark.skipif(not IN_GUEST, reason="only the guest promises to be without v1")
def test_the_guest_has_cgroup_v2_alone_with_every_controller_we_use() -> None:
    mounted = [line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()]
    assert mounted.count("cgroup2") == 1
    assert "cgroup" not in mounted
    assert Path("/proc/self/cgroup").read_text() == "0::/\n"
    assert controllers_below_root() >= CONTROLLERS


@pytest.mark.skipif(not IN_GUEST, reason="only the guest promises a disk")
def test_the_guest_keeps_files_of_tests_where_layers_can_be_id_mapped(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounted = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert {f[f.index("-") + 1] for f in mounted if f[2] == number} == {"ext4"}


def test_memory_max_kills_and_counts_the_kill(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(str(32 << 20))
    with python_in(cgroup, "kept = []\nwhile True: kept.append(bytearray(1 << 20))") as process:
        assert process.wait(60) == -9
    events = counters(cgroup / "memory.events")
    assert events["oom_kill"] == 1
    assert events["max"] >= 1
    assert int((cgroup / "memory.peak").read_text()) <= 32 << 20


def test_memory_below_the_limit_is_left_alone(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text(str(64 << 20))
    with python_in(cgroup, "bytearray(20 << 20)") as process:
        assert process.wait(60) == 0
    assert counters(cgroup / "memory.events")["oom_kill"] == 0


def test_cpu_max_throttles_to_the_asked_share(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("20000 100000")
    spin = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    started = time.monotonic()
    with python_in(cgroup, spin) as process:
        assert process.wait(120) == 0
    wall_s = time.monotonic() - started
    stat = counters(cgroup / "cpu.stat")
    assert stat["nr_throttled"] >= 10
    # A burst may end a period early, so a tenth of slack above; how much less a busy machine
    # gives says nothing about the limit.
    assert stat["usage_usec"] / 1e6 / wall_s < 0.22


def test_pids_max_refuses_the_next_process(cgroup: Path) -> None:
    (cgroup / "pids.max").write_text("3")
    forks = """
import os, time
try:
    for _ in range(9):
        if os.fork() == 0:
            time.sleep(60)
except OSError as error:
    print(error.errno, flush=True)
    time.sleep(60)
"""
    with python_in(cgroup, forks) as process:
        assert process.stdout
        assert int(process.stdout.readline()) == errno.EAGAIN
        assert int((cgroup / "pids.current").read_text()) == 3
        (cgroup / "cgroup.kill").write_text("1")
        assert process.wait(60) == -9
