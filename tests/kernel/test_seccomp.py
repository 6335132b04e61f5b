"""What the kernel makes of the filters: the probe and ordinary programs run under them, as root.

Outside a task root has every capability, so an EPERM can only be the filter's; the same probe
without a filter shows that it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from errno import EAFNOSUPPORT, EBADF, EINVAL, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest

from sandbox.kernel.seccomp import filter as seccomp_filter
from sandbox.model.protections import REFUSED, SYSTEM_CALLS

pytestmark = pytest.mark.guest

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "sandbox/_bin/probe"
UNDER_FILTER = Path(__file__).with_name("under_filter.c")

# Host-wide switches can take these away before the filter or its absence shows.
SWITCHED = {"bpf", "io_uring_setup", "userfaultfd", "perf_event_open", "kexec_load"}

DENIED = tuple(
    place[-1]
    for row in SYSTEM_CALLS
    if row.demand is REFUSED
    for place in row.places
    if place[:2] == ("system_calls", "native")
)
"""What the table of protections demands to be refused, with those that SYS_PTRACE allows."""
OF_X86 = tuple(
    place[-1]
    for row in SYSTEM_CALLS
    if row.demand is REFUSED
    for place in row.maybe
    if place[-1] not in DENIED
)
"""The same for calls that some machine or ABI does not have."""
PTRACE_ONLY = ("kcmp", "pidfd_getfd", "process_madvise")
FAMILIES = (15, 29, 30, 31, 38, 40, 44)
"""key, can, tipc, bluetooth, alg, vsock, xdp"""

Answers = dict[str, dict[str, int]]
"""For each ABI, the errno of each attempt."""


class Filter:
    """A filter in a file, and the program that runs others under it."""

    def __init__(self, runner: Path, blob: Path) -> None:
        self.runner = runner
        self.blob = blob

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.runner, self.blob, *command],
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )

    def probe(self) -> dict[str, Any]:
        done = self.run(PROBE)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """One that other users may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="seccomp-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def runner(directory: Path) -> Path:
    subprocess.run([ROOT / "scripts/native", "probe", "seccomp"], check=True)
    program = directory / "under_filter"
    compiler = shutil.which("gcc") or "cc"
    subprocess.run(
        [compiler, "-static", "-O2", "-Wall", "-Werror", "-o", program, UNDER_FILTER], check=True
    )
    return program


def write(directory: Path, name: str, blob: bytes) -> Path:
    path = directory / name
    path.write_bytes(blob)
    return path


@pytest.fixture(scope="module")
def default(runner: Path, directory: Path) -> Filter:
    return Filter(runner, write(directory, "default", seccomp_filter(ptrace=False)))


@pytest.fixture(scope="module")
def with_ptrace(runner: Path, directory: Path) -> Filter:
    return Filter(runner, write(directory, "ptrace", seccomp_filter(ptrace=True)))


@pytest.fixture(scope="module")
def held(default: Filter) -> Answers:
    answers: Answers = default.probe()["system_calls"]
    return answers


@pytest.fixture(scope="module")
def free(runner: Path) -> Answers:
    done = subprocess.run([PROBE], capture_output=True, text=True, timeout=60, check=True)
    answers: Answers = json.loads(done.stdout)["system_calls"]
    return answers


@pytest.fixture(params=["native", "i386"])
def abi(request: pytest.FixtureRequest, free: Answers) -> str:
    name: str = request.param
    if free.get(name, {}).get("getpid") != 0:
        pytest.skip(f"no {name} system calls on this kernel")
    return name


def wrong(answers: dict[str, int], labels: Sequence[str], expected: int) -> dict[str, int]:
    """What did not answer as expected; what the ABI does not have is left out."""
    return {
        label: answers[label] for label in labels if label in answers and answers[label] != expected
    }


def test_what_the_policy_denies_answers_eperm(abi: str, held: Answers) -> None:
    assert wrong(held[abi], DENIED + OF_X86, EPERM) == {}


def test_without_the_filter_none_of_it_would(abi: str, free: Answers) -> None:
    attempts = set(DENIED + OF_X86) - SWITCHED
    assert {a for a in attempts if free[abi].get(a) == EPERM} == set()


def test_everything_denied_is_attempted_in_both_abis(free: Answers, held: Answers) -> None:
    assert held["native"].keys() >= set(DENIED)
    if "i386" in held:
        only_64_bit = {"kexec_file_load"}
        assert held["i386"].keys() >= set(DENIED + OF_X86) - only_64_bit


def test_clone3_and_newer_calls_do_not_exist_so_that_libc_falls_back(
    abi: str, held: Answers, free: Answers
) -> None:
    assert held[abi]["clone3"] == ENOSYS != free[abi]["clone3"]
    assert held[abi]["newer than all"] == ENOSYS


def test_the_32_bit_socket_multiplexer_does_not_exist(held: Answers, free: Answers) -> None:
    if free.get("i386", {}).get("getpid") != 0:
        pytest.skip("no i386 system calls on this kernel")
    assert held["i386"]["socketcall"] == ENOSYS != free["i386"]["socketcall"]
    assert held["i386"]["socket inet"] == 0


def test_x32_does_not_exist(held: Answers) -> None:
    if "x32" not in held:
        pytest.skip("x32 belongs to x86_64")
    assert set(held["x32"].values()) == {ENOSYS}


def test_threads_and_processes_can_be_cloned(abi: str, held: Answers) -> None:
    assert held[abi]["clone"] == EINVAL  # the kernel's own word on flags that fit nothing


def test_exotic_socket_families_are_not_supported(abi: str, held: Answers, free: Answers) -> None:
    attempts = [*(f"socket family {family}" for family in FAMILIES), "socketpair alg"]
    assert wrong(held[abi], attempts, EAFNOSUPPORT) == {}
    assert not {free[abi][attempt] for attempt in attempts} & {EAFNOSUPPORT, EPERM}


def test_common_socket_families_work(abi: str, held: Answers, free: Answers) -> None:
    common = ["socket unix", "socket inet", "socket netlink"]
    assert wrong(held[abi], common, 0) == {}
    assert held[abi]["socketpair unix"] == free[abi]["socketpair unix"]


def test_other_ioctls_reach_the_kernel(abi: str, held: Answers) -> None:
    assert held[abi]["ioctl TCGETS"] == EBADF


def test_common_personalities_work(abi: str, held: Answers) -> None:
    assert wrong(held[abi], ["personality tell", "personality linux32"], 0) == {}


def test_what_is_allowed_answers_as_without_the_filter(
    abi: str, held: Answers, free: Answers
) -> None:
    for label in ("ptrace", "process_vm_readv", "chroot", "mknodat", "openat", "seccomp", "getpid"):
        assert held[abi].get(label) == free[abi].get(label)


def test_ptrace_adds_what_reaches_into_other_processes(
    abi: str, with_ptrace: Filter, held: Answers, free: Answers
) -> None:
    traced: dict[str, int] = with_ptrace.probe()["system_calls"][abi]
    changed = {label for label in traced if traced[label] != held[abi][label]}
    assert changed == set(PTRACE_ONLY)
    assert {label: free[abi][label] for label in changed} == {c: traced[c] for c in changed}


def test_the_filter_is_loaded_without_no_new_privs(default: Filter) -> None:
    status = default.probe()["status"]
    assert (status["Seccomp"], status["Seccomp_filters"], status["NoNewPrivs"]) == ("2", "1", "0")


def test_set_uid_programs_work_under_it(default: Filter, directory: Path) -> None:
    program = directory / "id"
    shutil.copy(shutil.which("id") or "/usr/bin/id", program)
    program.chmod(0o4755)
    if os.statvfs(directory).f_flag & os.ST_NOSUID:
        pytest.skip(f"{directory} is mounted nosuid")
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert default.run(*drop, program, "-ru").stdout == "65534\n"
    assert default.run(*drop, program, "-u").stdout == "0\n"


def test_a_shell_runs_pipelines_under_it(default: Filter) -> None:
    script = 'for i in 1 2 3; do echo $i; done | sort -r | tr -d "\\n"; sleep 0.01 & wait'
    shell = shutil.which("busybox")
    done = default.run(*([shell, "sh"] if shell else ["sh"]), "-c", script)
    assert (done.stdout, done.stderr, done.returncode) == ("321", "", 0)


def test_python_runs_threads_processes_and_sockets_under_it(default: Filter) -> None:
    program = """
import asyncio, multiprocessing, os, socket, subprocess, threading
def double(n): return n * 2
async def main():
    server = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0)
    r, w = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await r.read() == b''
    w.close()
threads = [threading.Thread(target=os.getpid) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
asyncio.run(main())
assert multiprocessing.get_context('fork').Pool(2).map(double, [1, 2]) == [2, 4]
assert socket.if_nameindex()
print(subprocess.check_output(['uname'], text=True), end='')
os._exit(0)
"""
    done = default.run(sys.executable, "-c", program)
    assert (done.stdout, done.stderr, done.returncode) == ("Linux\n", "", 0)


@pytest.mark.skipif(shutil.which("perl") is None, reason="no perl here")
def test_perl_forks_and_waits_under_it(default: Filter) -> None:
    program = "my $p = fork; exit 3 unless $p; waitpid $p, 0; print $? >> 8, `echo hi`"
    done = default.run("perl", "-e", program)
    assert (done.stdout, done.stderr) == ("3hi\n", "")


def test_a_compiler_runs_under_it(default: Filter, directory: Path) -> None:
    source = directory / "hello.c"
    source.write_text("int main(void) { return 7; }")
    done = default.run("gcc", "-o", directory / "hello", source)
    assert (done.returncode, done.stderr) == (0, "")
    assert default.run(directory / "hello").returncode == 7
