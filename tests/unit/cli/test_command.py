"""The command itself, as a process, against an agent in memory."""

from __future__ import annotations

import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from tests.unit.client.agents import FakeAgent, serving

ROOT = Path(__file__).parents[3]


def command(directory: Path, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "sandbox.cli", "--state-dir", str(directory), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


async def sandbox(
    directory: Path, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(20):
        return await trio.run_process(
            command(directory, arguments),
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=environment(),
        )


async def running(agent: FakeAgent) -> str:
    with trio.fail_after(10):
        while True:
            for view in agent.tasks.list():
                if view.known.last_status.name == "RUNNING":
                    await trio.sleep(0.2)  # until the command knows it too
                    return str(view.id)
            await trio.sleep(0.01)


async def test_stdout_and_stderr_stay_apart_and_the_status_is_the_programs(tmp_path: Path) -> None:
    async with serving(tmp_path):
        out = await sandbox(tmp_path, "run", "tiny", "echo", "a  b")
        assert (out.stdout, out.stderr, out.returncode) == (b"a  b\n", b"", 0)
        err = await sandbox(tmp_path, "run", "tiny", "warn", "x")
        assert (err.stdout, err.stderr, err.returncode) == (b"", b"x\n", 0)
        assert (await sandbox(tmp_path, "run", "tiny", "exit", "7")).returncode == 7


async def test_options_of_the_program_are_the_programs(tmp_path: Path) -> None:
    async with serving(tmp_path):
        out = await sandbox(tmp_path, "run", "--cpu", "512", "tiny", "echo", "-d", "--json")
        assert out.stdout == b"-d --json\n"


async def test_stdin_is_the_programs_only_when_asked_for(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    async with serving(tmp_path):
        assert (await sandbox(tmp_path, "run", "-i", "tiny", "cat", stdin=data)).stdout == data
        assert (await sandbox(tmp_path, "run", "tiny", "cat", stdin=data)).stdout == b""


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["run", "--cpu", "7", "tiny"], 125, "No Fargate configuration exists for given values."),
        (["run", "tiny", "unstartable", "CannotPull: no", "0"], 125, "CannotPull: no"),
        (["run", "tiny", "unstartable", "no such file", "127"], 127, "no such file"),
        (["run", "tiny", "unstartable", "not executable", "126"], 126, "not executable"),
        (["run", "-v", "/etc:/etc", "tiny"], 125, "sandbox cp"),
        (["run", "-p", "80:80", "tiny"], 125, "--public-ip"),
        (["run", "--subnet", "s", "tiny"], 125, "--subnet"),
        (["run", "--nonsense", "tiny"], 125, "--nonsense"),
        (["run"], 125, "IMAGE"),
        (["run", "-d", "-t", "tiny"], 125, "-d excludes"),
        (["run", "--timeout", "soon", "tiny"], 125, "not a duration"),
        (["run", "tiny", "oom"], 137, "OutOfMemoryError: Container killed due to memory usage"),
        (["run", "tiny", "overflow"], 125, "sandbox: stdout: No space left on device"),
        (["exec", "nobody", "true"], 125, "no task nobody"),
        (["inspect", "nobody"], 1, "no task nobody"),
        (["stop", "nobody"], 1, "sandbox: no task nobody"),
        (["ps", "--nonsense"], 2, "'--nonsense' (see 'sandbox ps --help')"),
        (["--nonsense"], 2, "'--nonsense' (see 'sandbox --help')"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["image", "nonsense"], 2, "(see 'sandbox image --help')"),
        (["completion", "nonsense"], 2, "'bash', 'zsh', 'fish'"),
        (["run", "--env-file", "/nonexistent", "tiny"], 125, "No such file"),
        (["image", "import", "--tag", "x", "/nonexistent"], 2, "does not exist"),
        (["cp", "a", "b"], 1, "TASK:PATH"),
    ],
)
async def test_a_failure_is_one_line_and_its_status(
    tmp_path: Path, arguments: list[str], status: int, line: str
) -> None:
    async with serving(tmp_path):
        failed = await sandbox(tmp_path, *arguments)
        assert failed.returncode == status
        (said,) = failed.stderr.decode().splitlines()
        assert said.startswith("sandbox: ") and line in said
        assert failed.stdout == b""


@pytest.mark.parametrize(
    ("line", "status", "named"),
    [
        (r"run tiny echo $BAD", 125, r"'[COMMAND]...': 'a\xff' is not UTF-8"),
        (r"run --name $BAD tiny", 125, r"'--name': 'a\xff' is not UTF-8"),
        (r"run -e A=$BAD tiny", 125, r"'A=a\xff' is not UTF-8"),
        (r"run -e BAD tiny", 125, r"environment 'BAD=a\xff': not UTF-8"),
        (r"run --env-file /bin/sh tiny", 125, r"--env-file /bin/sh: not UTF-8"),
        (r"exec task echo $BAD", 125, r"'a\xff' is not UTF-8"),
        (r"inspect $BAD", 2, r"'TASKS...': 'a\xff' is not UTF-8"),
        (r"logs $BAD", 2, r"'TASK': 'a\xff' is not UTF-8"),
        (r"image rm $BAD", 2, r"'IMAGE...': 'a\xff' is not UTF-8"),
        (r"image import --tag x $DIR", 2, r"/d\xff' is not UTF-8"),
        (r"run oci:x", 125, r"/d\xff/x' is not UTF-8"),
        (r"cp task:/$BAD x", 1, r"'/a\xff' is not UTF-8"),
        (r"ps --state-dir /tmp/$BAD", 1, r"state directory '/tmp/a\xff': its name is not UTF-8"),
        (r"ps --run-dir $BAD", 1, r"/d\xff/a\xff': its name is not UTF-8"),
    ],
)
async def test_what_is_not_utf_8_is_refused_and_named(
    tmp_path: Path, line: str, status: int, named: str
) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    directory.mkdir()
    async with serving(tmp_path):
        begin = rf"BAD=$(printf 'a\377'); export BAD; cd {tmp_path}/d*; DIR=$PWD; "
        refused = await by_shell(tmp_path, begin + "$SANDBOX " + line)
        (said,) = refused.stderr.decode().splitlines()
        assert said.startswith("sandbox: ") and named in said
        assert refused.returncode == status


async def test_files_of_this_host_have_any_name(tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"a\xff")
    name.write_bytes(b"content")
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        done = await sandbox(tmp_path, "cp", str(name), f"{task}:/d/")
        assert done.returncode == 0, done.stderr
        with tarfile.open(tmp_path / "d.tar") as archive:
            assert archive.getnames() == [name.name]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
async def test_signals_reach_the_program(tmp_path: Path, number: int) -> None:
    async with serving(tmp_path) as agent:
        process = await trio.lowlevel.open_process(
            command(tmp_path, ["run", "tiny", "sleep"]), env=environment()
        )
        task = await running(agent)
        process.send_signal(number)
        with trio.fail_after(10):
            assert await process.wait() == 128 + number
        assert agent.tasks.all[task].signals == [number]


async def test_a_killed_command_leaves_no_task(tmp_path: Path) -> None:
    async with serving(tmp_path, resident=False) as agent:
        process = await trio.lowlevel.open_process(
            command(tmp_path, ["run", "tiny", "sleep"]), env=environment()
        )
        task = await running(agent)
        process.kill()
        await process.wait()
        with trio.fail_after(10):
            await agent.presence.idle(first_within_s=0)
        assert agent.tasks.describe(task).known.last_status.name == "STOPPED"


async def test_a_task_beyond_its_time_is_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        late = await sandbox(tmp_path, "run", "--timeout", "0.3s", "tiny", "sleep")
        assert late.returncode == 124
        (view,) = agent.tasks.list()
        assert view.desired.stopped_reason == "Timed out after 0.3 seconds"


async def test_a_detached_task_needs_an_agent_that_stays(tmp_path: Path) -> None:
    async with serving(tmp_path, resident=False):
        refused = await sandbox(tmp_path, "run", "-d", "tiny", "sleep")
        assert refused.returncode == 125 and b"`sandbox agent`" in refused.stderr
    async with serving(tmp_path) as agent:
        detached = await sandbox(tmp_path, "run", "-d", "tiny", "sleep")
        assert detached.returncode == 0
        assert agent.tasks.describe(detached.stdout.decode().strip()).known.started_at is not None


async def test_json_is_all_of_stdout(tmp_path: Path) -> None:
    async with serving(tmp_path):
        out = await sandbox(tmp_path, "run", "--json", "--name", "web", "tiny", "echo", "hello")
        described = json.loads(out.stdout)
        assert out.stderr == b"hello\n"
        assert described["lastStatus"] == "STOPPED"
        assert described["containers"][0]["exitCode"] == 0
        assert described["taskArn"].endswith(described["taskId"])
        listed = json.loads((await sandbox(tmp_path, "ps", "-a", "--json")).stdout)
        inspected = json.loads((await sandbox(tmp_path, "inspect", described["taskId"])).stdout)
        assert listed == inspected == [described]


async def test_ps_shows_what_runs_and_with_all_what_ran(tmp_path: Path) -> None:
    async with serving(tmp_path):
        await sandbox(tmp_path, "run", "tiny", "exit", "3")
        await sandbox(tmp_path, "run", "-d", "--name", "web", "tiny", "sleep")
        header, *lines = (await sandbox(tmp_path, "ps")).stdout.decode().splitlines()
        assert header.split()[:4] == ["TASK", "NAME", "IMAGE", "STATUS"]
        assert [line.split()[1:4] for line in lines] == [["web", "tiny", "RUNNING"]]
        everything = (await sandbox(tmp_path, "ps", "--all")).stdout.decode().splitlines()
        assert "3" in everything[1].split() and everything[1].endswith("in task exited")


async def test_stop_rm_and_prune_end_and_forget(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        first = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        assert (await sandbox(tmp_path, "rm", first)).returncode == 1
        stopped = await sandbox(tmp_path, "stop", "--reason", "enough", first[:12])
        assert stopped.returncode == 0
        assert agent.tasks.describe(first).desired.stopped_reason == "enough"
        assert (await sandbox(tmp_path, "rm", first)).returncode == 0
        await sandbox(tmp_path, "run", "tiny")
        await sandbox(tmp_path, "run", "-d", "tiny", "sleep")
        pruned = json.loads((await sandbox(tmp_path, "prune", "--json")).stdout)
        assert len(pruned["removed"]) == 1
        (left,) = agent.tasks.list()
        assert (await sandbox(tmp_path, "rm", "-f", left.id)).returncode == 0
        assert not agent.tasks.all


async def test_exec_is_a_unix_program_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        assert (await sandbox(tmp_path, "exec", task, "echo", "-x")).stdout == b"-x\n"
        assert (await sandbox(tmp_path, "exec", task, "exit", "9")).returncode == 9
        missing = await sandbox(tmp_path, "exec", task, "missing")
        assert missing.returncode == 127 and b"not found" in missing.stderr
        process = await trio.lowlevel.open_process(
            command(tmp_path, ["exec", task, "sleep"]), env=environment()
        )
        with trio.fail_after(10):
            while agent.tasks.execs[-1].command != ("sleep",):
                await trio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        with trio.fail_after(5):
            while agent.tasks.execs_killed != [task]:
                await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "container", "command"),
    [
        (["TASK", "--container", "side", "echo", "-c", "x"], "side", ["echo", "-c", "x"]),
        (["-c", "side", "TASK", "echo", "--", "x"], "side", ["echo", "--", "x"]),
        (["-i", "TASK", "-e", "A=b", "-cside", "echo", "TASK"], "side", ["echo", "TASK"]),
        (["TASK", "--", "echo", "-c"], None, ["echo", "-c"]),
        (["TASK", "-c", "side", "--", "-c", "x"], "side", ["-c", "x"]),
        (["-c", "side", "--", "TASK", "-c", "x"], "side", ["-c", "x"]),
        (["TASK", "echo"], None, ["echo"]),
    ],
)
async def test_options_of_exec_stand_on_both_sides_of_the_task(
    tmp_path: Path, words: list[str], container: str | None, command: list[str]
) -> None:
    async with serving(tmp_path) as agent:
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        done = await sandbox(tmp_path, "exec", *[w.replace("TASK", task[:8]) for w in words])
        assert (done.returncode, done.stderr) == (0, b"")
        (asked,) = agent.tasks.execs
        wanted = tuple(word.replace("TASK", task[:8]) for word in command)
        assert (asked.container, asked.command) == (container, wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing argument 'TASK'"),
        (["task"], "Missing argument 'COMMAND...'"),
        (["-i", "task", "-c", "side"], "Missing argument 'COMMAND...'"),
        (["task", "-x", "echo"], "-x"),
        (["task", "-c"], "-c"),
    ],
)
async def test_what_exec_lacks_is_told(tmp_path: Path, words: list[str], said: str) -> None:
    failed = await sandbox(tmp_path, "exec", *words)
    assert failed.returncode == 125 and said in failed.stderr.decode()


async def test_a_task_may_share_its_pid_namespace(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        assert (await sandbox(tmp_path, "run", "--pid", "task", "tiny")).returncode == 0
        assert agent.tasks.requests[-1].definition.pid_mode == "task"
        assert (await sandbox(tmp_path, "run", "tiny")).returncode == 0
        assert agent.tasks.requests[-1].definition.pid_mode is None
        refused = await sandbox(tmp_path, "run", "--pid", "host", "tiny")
        assert refused.returncode == 125 and b"--pid" in refused.stderr


@pytest.mark.parametrize(
    "line",
    [
        *("ps", "inspect x", "logs x", "events", "stats", "stop x", "rm x", "prune", "cp x:/y z"),
        *("image ls", "image inspect x", "image rm x", "image prune"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root is served")
@pytest.mark.parametrize("is_there", [False, True])
async def test_where_no_agent_was_nothing_is_read_and_nothing_made(
    tmp_path: Path, line: str, is_there: bool
) -> None:
    place = tmp_path / "mistyped"
    if is_there:
        place.mkdir()
    failed = await sandbox(place, *line.split())
    assert failed.returncode == 1 and failed.stdout == b""
    (said,) = failed.stderr.decode().splitlines()
    assert said == f"sandbox: {place}: no agent has kept its state there, nothing was run"
    assert place.exists() == is_there and (not is_there or not list(place.iterdir()))


@pytest.mark.parametrize("line", ["ps --json", "ps -a --json", "image ls --json"])
async def test_on_a_new_host_a_list_is_empty_and_nothing_made(tmp_path: Path, line: str) -> None:
    place = tmp_path / "default"
    script = f"import sandbox.client.place as p; p.STATE_DIR = p.RUN_DIR = {str(place)!r}\n"
    script += f"import sys; sys.argv[1:] = {line.split()!r}\n"
    script += "import sandbox.cli; sandbox.cli.main()"
    done = await trio.run_process(
        [sys.executable, "-c", script], capture_stdout=True, check=True, env=environment()
    )
    assert json.loads(done.stdout) == [] and not place.exists()


async def test_logs_are_raw_in_a_pipe_and_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        raw = await sandbox(tmp_path, "logs", "--tail", "2", task)
        assert raw.stdout == b"\x1b[31m\xff0\n\x1b[31m\xff1\n"
        line = " ".join([*command(tmp_path, ["logs", "--tail", "100000", task]), "| head -n 1"])
        piped = await trio.run_process(
            ["sh", "-c", line], capture_stdout=True, capture_stderr=True, env=environment()
        )
        assert piped.stdout == b"\x1b[31m\xff0\n" and piped.stderr == b""


async def by_shell(directory: Path, line: str) -> subprocess.CompletedProcess[bytes]:
    """A line of sh in which $SANDBOX is the command."""
    with trio.fail_after(20):
        return await trio.run_process(
            ["sh", "-c", line],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**environment(), "SANDBOX": " ".join(command(directory, []))},
        )


async def test_closed_streams_are_empty_and_never_somebody_elses(tmp_path: Path) -> None:
    async with serving(tmp_path):
        for line in (
            "$SANDBOX ps >&-",
            "$SANDBOX ps >&- 2>&- <&-",
            "$SANDBOX run tiny echo x >&-",
            "$SANDBOX run tiny echo x >&- 2>&- <&-",
            "$SANDBOX run -i tiny cat <&-",
            "$SANDBOX run tiny warn x 2>&-",
            "$SANDBOX image --help >&-",
        ):
            done = await by_shell(tmp_path, line)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), line


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("ps", 1),
        ("ps --json", 1),
        ("ps --help", 1),
        ("--version", 1),
        ("completion bash", 1),
        ("logs --tail 1 $TASK", 1),
        ("logs --tail 100000 $TASK", 1),
        ("run -d tiny sleep", 125),
        ("run --json tiny true", 125),
    ],
)
async def test_output_that_cannot_be_written_is_a_failure_in_one_line(
    tmp_path: Path, arguments: str, status: int
) -> None:
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        full = await by_shell(tmp_path, f"TASK={task}; $SANDBOX {arguments} >/dev/full")
        assert full.stderr == b"sandbox: stdout: No space left on device\n"
        assert full.returncode == status


async def test_on_a_terminal_escapes_are_shown_and_not_sent(tmp_path: Path) -> None:
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        shown = await on_terminal(command(tmp_path, ["logs", "--tail", "1", task]))
        assert shown == b"^[[31m\\xff0\r\n"


async def on_terminal(arguments: list[str]) -> bytes:
    def work() -> bytes:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            arguments, stdin=follower, stdout=follower, stderr=follower, env=environment()
        )
        os.close(follower)
        shown = b""
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # EIO: the last writer is gone
                break
            shown += chunk
        os.close(leader)
        assert process.wait() == 0
        return shown

    with trio.fail_after(20):
        return await trio.to_thread.run_sync(work)


async def test_the_terminal_is_as_before_after_an_interactive_run(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    run = " ".join(command(tmp_path, ["run", "-it", "tiny", "true"]))
    async with serving(tmp_path) as agent:
        await on_terminal(["sh", "-c", f"stty -a > {before}; {run} && stty -a > {after}"])
        assert before.read_text() == after.read_text() != ""
        assert agent.tasks.requests[0].definition.container_definitions[0].pseudo_terminal


async def test_files_are_copied_both_ways(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        done = await sandbox(tmp_path, "cp", str(tmp_path / "file"), f"{task}:/d/name")
        assert done.returncode == 0, done.stderr
        with tarfile.open(tmp_path / "d.tar") as archive:
            assert archive.getnames() == ["name"]
        done = await sandbox(tmp_path, "cp", f"{task}:/d", str(tmp_path / "copy"))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "copy").read_bytes() == b"content"
        failed = await sandbox(tmp_path, "cp", "nobody:/d", str(tmp_path / "copy"))
        assert failed.returncode == 1 and b"no task nobody" in failed.stderr


async def test_a_copy_goes_into_a_directory_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "tmp").mkdir()
    async with serving(tmp_path):
        task = (await sandbox(tmp_path, "run", "-d", "tiny", "sleep")).stdout.decode().strip()
        done = await sandbox(tmp_path, "cp", str(tmp_path / "file"), f"{task}:/tmp")
        assert done.returncode == 0, done.stderr
        with tarfile.open(tmp_path / "tmp.tar") as archive:
            assert archive.getnames() == ["file"]


async def test_stats_and_events_have_a_table_and_json(tmp_path: Path) -> None:
    async with serving(tmp_path):
        await sandbox(tmp_path, "run", "-d", "tiny", "sleep")
        table = (await sandbox(tmp_path, "stats")).stdout.decode()
        assert "1.50s" in table and "1.0 MiB / 512.0 MiB" in table
        (stats,) = json.loads((await sandbox(tmp_path, "stats", "--json")).stdout)
        assert stats["containers"][0]["pids"] == 3
        events = (await sandbox(tmp_path, "events", "--json")).stdout.splitlines()
        assert [json.loads(event)["rev"] for event in events] == [1]


async def test_global_options_come_before_or_after_the_command(tmp_path: Path) -> None:
    async with serving(tmp_path):
        for arguments in (
            ["--state-dir", "/nonexistent", "ps", "--state-dir", str(tmp_path)],
            ["image", "--help", "--run-dir", str(tmp_path)],
        ):
            done = await trio.run_process(
                [sys.executable, "-m", "sandbox.cli", *arguments],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment(),
            )
            assert done.returncode == 0, done.stderr


async def test_an_agent_of_another_state_directory_is_not_taken_for_ours(tmp_path: Path) -> None:
    async with serving(tmp_path):
        other = ["ps", "--state-dir", "/nonexistent", "--run-dir", str(tmp_path / "run")]
        failed = await sandbox(tmp_path, *other)
        assert failed.returncode == 1
        assert b"keeps its state in" in failed.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_code_is_printed(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sandbox.cli", "completion", shell],
        capture_output=True,
        env=environment(),
        check=True,
    )
    assert b"_SANDBOX_COMPLETE" in done.stdout


def test_every_command_has_help() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "sandbox.cli", "--help"],
        capture_output=True,
        env=environment(),
        check=True,
    ).stdout.decode()
    names = "agent cp doctor events exec image inspect logs prune ps rm run stats stop"
    for name in names.split():
        assert f"\n  {name} " in listed


def test_the_command_starts_without_the_agents_libraries() -> None:
    heavy = ("trio", "httpx", "pyroute2", "sqlite3", "structlog", "rich", "sandbox.agent")
    script = (
        "import sys; sys.argv = ['sandbox', 'ps', '--state-dir', '/nonexistent/x']\n"
        "import sandbox.cli.tasks, sandbox.cli.run, sandbox.cli.root\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=environment(), check=True
    )
    assert done.stdout == b"[]\n"


async def test_starting_costs_little_more_than_the_interpreter_and_click(tmp_path: Path) -> None:
    """A ratio, since the machine may be busy."""

    def median_s(arguments: list[str]) -> float:
        times = []
        for _ in range(7):
            begun = time.perf_counter()
            subprocess.run(arguments, env=environment(), check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    async with serving(tmp_path):
        floor = [sys.executable, "-c", "import click, msgspec, socket, json"]
        base = await trio.to_thread.run_sync(median_s, floor)
        ps = await trio.to_thread.run_sync(median_s, command(tmp_path, ["ps"]))
        assert ps < 3 * base, (ps, base)
