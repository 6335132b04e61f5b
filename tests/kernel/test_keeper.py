"""The keeper alone: what it accepts, what it tells, and what it outlives.

Its programs here make namespaces and nothing else: no root of their own, no user namespace, no
filter. What a container is made of is tested through tasks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import EAGAIN, EBADMSG, EPERM
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel.program import (
    NO_FD,
    ON_FULL_DROP_NEW,
    ON_FULL_DROP_OLDEST,
    ON_FULL_WAIT,
    Field,
    Program,
)
from sandbox.runtime import keeper as keepers
from sandbox.runtime.keeper import Ended, Failed, Keeper, Lost, StartFailed
from sandbox.runtime.logs import Tail
from tests.conftest import ROOT
from tests.kernel.conftest import until

pytestmark = pytest.mark.guest

BINARY = ROOT / "sandbox/_bin/keeper"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
MIB = 1 << 20


def shell(
    script: str,
    *records: tuple[str, *tuple[Field, ...]],
    segments: int = 32,
    on_full: int = ON_FULL_DROP_OLDEST,
    stdout: int | None = None,
    program: Program | None = None,
) -> Program:
    program = program or Program()
    program.add("LOG", segments, on_full)
    program.add("STDIO", 0, NO_FD, NO_FD if stdout is None else program.fd(stdout), NO_FD, 0, 0)
    for name, *fields in records:
        program.add(name, *fields)
    program.add("EXEC", PATH, ["sh", "-c", script], [f"PATH={PATH}"], about="sh")
    return program


async def start(program: Program, status_dir: Path) -> Keeper:
    return await keepers.start(program, binary=BINARY, status_dir=status_dir)


async def to_its_end(program: Program, status_dir: Path) -> Ended | Failed | Lost:
    keeper = await start(program, status_dir)
    with trio.fail_after(20):
        end = await keeper.wait()
        await keeper.wait_gone()
    keeper.close()
    return end


async def find(status_dir: Path) -> Keeper | Ended | Failed | Lost:
    fences: list[int] = []
    try:
        return await keepers.find(status_dir, fences)
    finally:
        for fd in fences:
            os.close(fd)


def output(status_dir: Path, stream: str = "stdout") -> bytes:
    return b"".join(r.data for r in Tail(status_dir, "").read() if r.stream == stream)


@pytest.fixture
def status_dir(tmp_path: Path) -> Path:
    return tmp_path / "status"


# What it accepts ---------------------------------------------------------------------------


class Unsealed(Program):
    """Handed over as something that others can still change, or as anything at all."""

    def __init__(self, open_file: Callable[[], int], content: bytes | None = None) -> None:
        super().__init__()
        self._open_file = open_file
        self._content = content

    def seal(self) -> int:
        fd = self._open_file()
        os.write(fd, self.encode() if self._content is None else self._content)
        return fd


class Rubbish(Program):
    def encode(self) -> bytes:
        return super().encode() + b"more"


@pytest.mark.parametrize("kind", ["memfd", "file"])
async def test_a_program_that_is_not_sealed_is_refused(
    status_dir: Path, tmp_path: Path, kind: str
) -> None:
    def memfd() -> int:
        return os.memfd_create("program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def file() -> int:
        return os.open(tmp_path / "program", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    open_file = {"memfd": memfd, "file": file}[kind]
    with pytest.raises(StartFailed, match="keeper start: Operation not permitted") as caught:
        await start(shell("true", program=Unsealed(open_file)), status_dir)
    assert (caught.value.errno, caught.value.is_exec) == (EPERM, False)


async def test_a_program_that_is_not_whole_is_refused(status_dir: Path) -> None:
    with pytest.raises(StartFailed) as caught:
        await start(shell("true", program=Rubbish()), status_dir)
    assert (caught.value.call, caught.value.errno) == ("keeper", EBADMSG)


async def test_it_is_started_by_no_hand() -> None:
    done = subprocess.run([BINARY], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr == "keeper: started by sandbox's agent, not by hand\n"


# What it tells -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (("HOSTNAME", "n" * 65), ("hostname", "n" * 65, "Invalid argument")),
        (("RLIMIT", 99, 1, 1), ("rlimit", "", "Invalid argument")),
        (("USERNS", 0), ("userns", "", "Invalid argument")),
        (("NETNS", 0), ("netns", "", "Invalid argument")),
        (("TASKS", 999), ("tasks", "", "Bad file descriptor")),
        (("MOUNT", 0, "no-such-fs", "tmp", []), ("mount", "no-such-fs tmp", "No such device")),
        (("SECCOMP", b"12345678"), ("seccomp", "", "Invalid argument")),
        (("USER", 1, 1, b"123"), ("user", "", "Invalid argument")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
async def test_a_failing_record_is_told_by_call_subject_and_errno(
    status_dir: Path, record: tuple[str, *tuple[Field, ...]], told: tuple[str, str, str]
) -> None:
    with pytest.raises(StartFailed) as caught:
        await start(shell("echo ran", record), status_dir)
    error = caught.value
    assert (error.call, error.subject, os.strerror(error.errno)) == told
    assert not error.is_exec
    assert output(status_dir) == b""
    assert isinstance(await find(status_dir), Failed)


async def test_a_program_that_is_not_there_is_the_images_fault(status_dir: Path) -> None:
    program = Program()
    program.add("LOG", 1, ON_FULL_WAIT)
    program.add("STDIO", 0, NO_FD, NO_FD, NO_FD, 0, 0)
    program.add("EXEC", PATH, ["no-such-program"], [], about="no-such-program")
    with pytest.raises(StartFailed, match="exec no-such-program: No such file") as caught:
        await start(program, status_dir)
    assert caught.value.is_exec


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -6 $$", 134)]
)
async def test_it_tells_how_the_program_ended_and_so_does_its_file(
    status_dir: Path, script: str, code: int
) -> None:
    # As pid 1 a shell is spared its own signals: only its child can be killed so.
    end = await to_its_end(shell(f"sh -c '{script}'; exit $?"), status_dir)
    found = await find(status_dir)
    assert isinstance(end, Ended)
    assert isinstance(found, Ended)
    assert end.exit_code == found.exit_code == code


async def test_stdout_and_stderr_come_apart_and_in_order_of_time(status_dir: Path) -> None:
    await to_its_end(shell("for i in 1 2 3; do echo out$i; echo err$i >&2; done"), status_dir)
    assert output(status_dir) == b"out1\nout2\nout3\n"
    assert output(status_dir, "stderr") == b"err1\nerr2\nerr3\n"
    stamps = [record.at_ns for record in Tail(status_dir, "").read()]
    assert stamps == sorted(stamps)


# What it outlives --------------------------------------------------------------------------

STARTER = """
import os, sys, trio
from pathlib import Path
from tests.kernel.test_keeper import shell, start
trio.run(start, shell(sys.argv[2]), Path(sys.argv[1]))
print("started", flush=True)
os.read(0, 1)
"""


async def test_it_survives_its_starters_death_and_is_found_again(status_dir: Path) -> None:
    script = "echo before; while [ ! -e go ]; do sleep 0.02; done; echo after; exit 7"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(status_dir), f"cd {status_dir.parent}; {script}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with starter:
        assert starter.stdout
        assert starter.stdout.readline() == b"started\n"
        starter.kill()
    keeper = await find(status_dir)
    assert isinstance(keeper, Keeper)
    (status_dir.parent / "go").touch()
    with trio.fail_after(20):
        end = await keeper.wait()
        await keeper.wait_gone()
    keeper.close()
    assert isinstance(end, Ended)
    assert end.exit_code == 7
    assert output(status_dir) == b"before\nafter\n"


async def test_a_container_whose_keeper_was_killed_is_lost(status_dir: Path) -> None:
    keeper = await start(shell("exec sleep 1000"), status_dir)
    keeper.kill()
    with trio.fail_after(20):
        assert isinstance(await keeper.wait(), Lost)
        await keeper.wait_gone()
    assert isinstance(await find(status_dir), Lost)
    assert keeper.signal(signal.SIGKILL), "its container runs on: nobody ends it but its cgroup"
    keeper.close()


async def test_a_log_that_a_killed_keeper_left_can_be_read(status_dir: Path) -> None:
    keeper = await start(shell("yes"), status_dir)
    await until(lambda: (status_dir / "log/2").exists())
    keeper.kill()
    await keeper.wait_gone()
    keeper.signal(signal.SIGKILL)
    keeper.close()
    told = output(status_dir)
    assert len(told) > MIB // 2
    assert set(told[: len(told) // 2 * 2].split(b"\n")) <= {b"y", b""}


async def test_a_second_keeper_on_one_status_directory_is_refused(status_dir: Path) -> None:
    keeper = await start(shell("sleep 0.3"), status_dir)
    second = shell("echo second").seal()
    directory = os.open(status_dir, os.O_RDONLY | os.O_DIRECTORY)
    ours, theirs = os.pipe()
    child = keepers._spawn(BINARY, [second, directory, theirs])
    for fd in (second, directory, theirs):
        os.close(fd)
    with open(ours, "rb") as report:
        kind, _, error, *_ = keepers._REPORT.unpack(report.read())
    os.waitpid(child.pid, 0)
    assert (kind, error) == (keepers._FAILED, EAGAIN)
    assert keepers.read_exit(status_dir) is None, "the first one's directory was written to"
    with trio.fail_after(20):
        end = await keeper.wait()
        await keeper.wait_gone()
    keeper.close()
    assert isinstance(end, Ended)
    assert output(status_dir) == b""


async def test_a_status_directory_is_made_by_its_keepers_starter(status_dir: Path) -> None:
    status_dir.mkdir()
    with pytest.raises(KernelError, match="File exists"):
        await start(shell("true"), status_dir)


# Clients -----------------------------------------------------------------------------------


async def test_sigterm_makes_it_forget_a_client_that_does_not_read(status_dir: Path) -> None:
    ours, theirs = os.pipe()
    script = "head -c 300000 /dev/zero | tr '\\0' x; echo done >&2; exit 3"
    keeper = await start(shell(script, stdout=theirs), status_dir)
    os.close(theirs)
    await trio.sleep(0.2)
    assert output(status_dir, "stderr") == b"", "a slow client slows the program, as a pipe does"
    keeper.detach()
    with trio.fail_after(20):
        end = await keeper.wait()
        await keeper.wait_gone()
    keeper.close()
    with open(ours, "rb") as client:
        assert client.read().strip(b"x") == b""  # and its end: nobody else holds the pipe
    assert isinstance(end, Ended)
    assert end.exit_code == 3
    assert output(status_dir) == b"x" * 300000


async def test_a_client_that_has_gone_breaks_the_programs_own_pipe(status_dir: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    script = "echo one; sleep 0.2; sh -c 'echo two'; echo $? >&2; exit 4"
    end = await to_its_end(shell(script, stdout=theirs), status_dir)
    os.close(theirs)
    assert isinstance(end, Ended)
    assert end.exit_code == 4
    assert output(status_dir) == b"one\n", "what nobody can get is not written"
    assert output(status_dir, "stderr") == b"141\n"


@pytest.mark.parametrize("more", ["", "sleep 0.2; echo two; "], ids=["at its end", "while it runs"])
async def test_output_that_a_client_refuses_is_told_beside_the_end(
    status_dir: Path, more: str
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    end = await to_its_end(shell(f"echo one; {more}exit 4", stdout=full), status_dir)
    os.close(full)
    assert keepers.read_losses(status_dir) == ("stdout: No space left on device: output was lost",)
    assert isinstance(end, Ended)
    assert await find(status_dir) == end
    assert end.exit_code == 4
    assert output(status_dir) == b"one\n"


async def test_no_loss_is_told_of_a_client_that_took_all_or_went_away(status_dir: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    await to_its_end(shell("echo one", stdout=theirs), status_dir)
    os.close(theirs)
    assert keepers.read_losses(status_dir) == ()


# The log -----------------------------------------------------------------------------------


def segments(status_dir: Path) -> dict[int, int]:
    return {int(file.name): file.stat().st_size for file in status_dir.glob("log/*")}


LINE = 64


def numbered(mib: int) -> str:
    """A line of shell that writes that many MiB, each line with its number in it."""
    return f"seq -f %0{LINE - 1}.0f {mib * MIB // LINE}"


async def test_who_writes_nothing_leaves_no_log(status_dir: Path) -> None:
    await to_its_end(shell("true"), status_dir)
    assert sorted(file.name for file in status_dir.iterdir()) == ["exit", "pid"]


async def test_forty_mebibytes_leave_the_newest_thirty_two_segments(status_dir: Path) -> None:
    end = await to_its_end(shell(numbered(40)), status_dir)
    assert isinstance(end, Ended)
    assert end.exit_code == 0
    sizes = segments(status_dir)
    assert len(sizes) <= 32
    assert max(sizes.values()) <= MIB
    told = output(status_dir)
    assert 30 * MIB < len(told) <= 32 * MIB
    numbers = list(map(int, told.split()[1:]))  # the first may be cut
    last = 40 * MIB // LINE
    assert numbers == list(range(last - len(numbers) + 1, last + 1))


async def test_what_is_dropped_is_counted(status_dir: Path) -> None:
    await to_its_end(shell(numbered(4), segments=2, on_full=ON_FULL_DROP_NEW), status_dir)
    assert sorted(segments(status_dir)) == [1, 2]
    kept = len(output(status_dir))
    dropped = re.findall(rb"dropped (\d+) bytes", output(status_dir, "keeper"))
    assert MIB < kept < 2 * MIB
    assert kept + sum(map(int, dropped)) == 4 * MIB


async def gone(keeper: Keeper) -> bool:
    with trio.move_on_after(0.01):
        await keeper.wait_gone()
        return True
    return False


async def test_a_program_waits_for_room_and_goes_on_when_there_is_some(status_dir: Path) -> None:
    program = shell(numbered(4), segments=2, on_full=ON_FULL_WAIT)
    keeper = await start(program, status_dir)
    tail, told = Tail(status_dir, ""), b""
    await until(lambda: len(segments(status_dir)) == 2)
    await trio.sleep(0.3)
    assert keepers.read_exit(status_dir) is None
    assert sorted(segments(status_dir)) == [1, 2]
    with trio.fail_after(20):
        # What is in the pipe when the program ends waits for room as well.
        while not await gone(keeper):
            complete = sorted(segments(status_dir))[:-1]
            told += b"".join(record.data for record in tail.read())
            for number in complete:
                (status_dir / "log" / str(number)).unlink()
    keeper.close()
    told += b"".join(record.data for record in tail.read())
    assert list(map(int, told.split())) == list(range(1, 4 * MIB // LINE + 1))
