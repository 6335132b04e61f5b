"""A client's own descriptors: pipes and terminals between it and a program, through the keeper."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.errors import ClientException, InvalidParameterException, TaskFailed
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import ContainerDefinition, LinuxParameters, Status
from tests.kernel.conftest import definition, finish, until
from tests.kernel.tasks import (
    Collected,
    container,
    execute,
    heard,
    killed,
    reached,
    started,
    stopped,
    written,
)

BIG = 20 << 20


async def run(agent: Agent, streams: Streams, *containers: ContainerDefinition) -> str:
    """A task whose first container has the client's descriptors; its id."""
    request = RunRequest(definition=definition(*containers))
    name = containers[0].name
    return (await agent.tasks.run(request, streams={name: streams})).id


def app(image: str, script: str, **members: Any) -> ContainerDefinition:
    return container(image, "app", script, **({"interactive": True} | members))


class Fed:
    """The writing end of a pipe that becomes somebody's stdin."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        self._stream = trio.lowlevel.FdStream(writer)

    def give(self) -> int:
        return self._reader

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def client(
    *, terminal: tuple[int, int] | None = None
) -> AsyncIterator[tuple[Streams, Fed, Collected, Collected]]:
    """Three pipes: their other ends as Streams, and ours."""
    with trio.fail_after(40):
        async with trio.open_nursery() as nursery:
            fed, out, err = Fed(), Collected(nursery), Collected(nursery)
            rows, columns = terminal or (24, 80)
            yield (
                Streams(
                    stdin=fed.give(),
                    stdout=out.give(),
                    stderr=err.give(),
                    terminal_rows=rows,
                    terminal_cols=columns,
                ),
                fed,
                out,
                err,
            )
            await fed.close()


def random_bytes(size: int) -> bytes:
    return os.urandom(1 << 20) * (size >> 20)


# Pipes ---------------------------------------------------------------------------------------


@pytest.mark.guest
async def test_the_streams_are_the_clients_and_the_log_has_what_was_written(
    agent: Agent, tiny: str
) -> None:
    async with client() as (streams, fed, out, err):
        task = await run(agent, streams, app(tiny, "read line; echo got $line; echo no >&2; cat"))
        await fed.write(b"one\n")
        await until(lambda: out.text == "got one\n")
        await fed.write(b"two\n")
        await until(lambda: out.text == "got one\ntwo\n")
        await fed.close()
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 0
    assert (out.text, err.text) == ("got one\ntwo\n", "no\n")
    assert (outcome.stdout, outcome.stderr) == (out.text, err.text)


async def test_twenty_megabytes_pass_both_ways_byte_for_byte(agent: Agent, tiny: str) -> None:
    data = random_bytes(BIG)
    async with client() as (streams, fed, out, err):
        task = await run(agent, streams, app(tiny, "cat; md5sum /dev/null >&2"))
        await fed.write(data)
        await fed.close()
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 0
    assert hashlib.sha256(out.data).digest() == hashlib.sha256(data).digest()
    assert err.text.endswith("/dev/null\n")
    log = b"".join([r.data async for r in agent.tasks.logs(task) if r.stream == "stdout"])
    assert log == data


async def test_an_execs_streams_are_byte_for_byte_too(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny, "exec sleep 1000"))
    data = random_bytes(BIG)
    async with client() as (streams, fed, out, _), trio.open_nursery() as nursery:
        request = ExecRequest(command=("cat",))
        nursery.start_soon(lambda: agent.tasks.exec(task, request, streams=streams))
        await fed.write(data)
        await fed.close()
    assert hashlib.sha256(out.data).digest() == hashlib.sha256(data).digest()
    await killed(agent, task)


async def test_without_a_client_stdin_is_empty_or_stays_open_as_asked(
    agent: Agent, tiny: str
) -> None:
    script = "cat; echo end; exec sleep 1000"
    task = await started(
        agent,
        container(tiny, "closed", script),
        container(tiny, "open", script, interactive=True),
    )
    await heard(agent, task, "end\n", "closed")
    await trio.sleep(0.2)
    assert await written(agent, task, "open") == ""
    await killed(agent, task)


async def test_an_end_of_input_is_seen_by_the_program(agent: Agent, tiny: str) -> None:
    async with client() as (streams, fed, out, _):
        await fed.close()
        task = await run(agent, streams, app(tiny, "cat; echo end"))
        await finish(agent, task)
    assert out.text == "end\n"


async def test_a_program_that_closes_its_input_lets_the_client_know(
    agent: Agent, tiny: str
) -> None:
    async with client() as (streams, fed, _, _):
        task = await run(agent, streams, app(tiny, "exec <&-; echo closed; exec sleep 1000"))
        await heard(agent, task, "closed")
        with pytest.raises(trio.BrokenResourceError):
            await fed.write(random_bytes(1 << 20))
        await killed(agent, task)


async def test_one_descriptor_may_serve_both_outputs(agent: Agent, tiny: str) -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            out = Collected(nursery)
            fd = out.give()
            streams = Streams(stdout=fd, stderr=fd)
            task = await run(agent, streams, app(tiny, "echo one; sleep 0.1; echo two >&2"))
            await finish(agent, task)
    assert out.text == "one\ntwo\n"


async def test_each_container_has_its_own_client(agent: Agent, tiny: str) -> None:
    async with client() as (one, fed, out, _), client() as (other, other_fed, other_out, _):
        request = RunRequest(
            definition=definition(
                container(tiny, "one", "cat; sleep 1", interactive=True),
                container(tiny, "other", "cat", interactive=True),
            )
        )
        task = await agent.tasks.run(request, streams={"one": one, "other": other})
        await fed.write(b"to one")
        await other_fed.write(b"to other")
        await until(lambda: out.text == "to one" and other_out.text == "to other")
        await fed.close()
        await other_fed.close()
        await finish(agent, task.id)


# Slow, and gone ------------------------------------------------------------------------------


async def test_a_slow_reader_slows_the_program(agent: Agent, tiny: str) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    count = 1 << 20
    script = f"yes 1234567 | head -c {count}; echo done >&2"
    task = await run(agent, Streams(stdout=writer), app(tiny, script))
    await heard(agent, task, "1234567")
    await trio.sleep(0.5)
    log = await written(agent, task)
    assert "done" not in log
    assert len(log) < 300_000  # what pipes and one chunk hold
    received = await read_all(reader)
    assert received == b"1234567\n" * (count // 8)
    with trio.fail_after(10):
        assert (await finish(agent, task)).stderr == "done\n"


async def read_all(fd: int) -> bytes:
    parts = []
    async with trio.lowlevel.FdStream(fd) as stream:
        async for part in stream:
            parts.append(bytes(part))
    return b"".join(parts)


@pytest.mark.guest
@pytest.mark.parametrize(("init", "code"), [(False, 1), (True, 141)], ids=["pid 1", "init"])
async def test_a_program_ends_when_its_output_has_no_reader_any_more(
    agent: Agent, tiny: str, init: bool, code: int
) -> None:
    """`sandbox run IMAGE yes | head`. The kernel spares every pid 1 the signal, not the error."""
    reader, writer = os.pipe()
    parameters = LinuxParameters(init_process_enabled=init)
    wanted = app(tiny, "exec yes", linux_parameters=parameters)
    task = await run(agent, Streams(stdout=writer), wanted)
    await trio.lowlevel.wait_readable(reader)
    assert os.read(reader, 4) == b"y\ny\n"
    os.close(reader)
    with trio.fail_after(10):
        assert (await finish(agent, task)).container.exit_code == code


@pytest.mark.guest
async def test_a_command_ends_when_its_output_has_no_reader_any_more(
    agent: Agent, tiny: str
) -> None:
    task = await started(agent, app(tiny, "exec sleep 1000"))
    for stream in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        request = ExecRequest(command=("sh", "-c", f"exec yes >/dev/{stream}"))
        with trio.fail_after(10):
            code = await agent.tasks.exec(task, request, streams=Streams(**{stream: writer}))
        assert code == 141
    await killed(agent, task)


async def test_one_outputs_reader_that_is_gone_costs_the_program_nothing_else(
    agent: Agent, tiny: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    fed = Fed()
    script = "sleep 0.3; yes 1234567 | head -c 1000000; cat >&2; yes 1 | head -c 1000000 >&2"
    task = await run(agent, Streams(stdin=fed.give(), stdout=writer), app(tiny, script))
    await fed.write(b"to stderr\n")
    await fed.close()
    with trio.fail_after(20):
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 0
    assert "to stderr\n" in outcome.stderr
    assert outcome.stderr.endswith("1\n" * 500_000)


FULL = "No space left on device: output was lost"


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.guest
@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "terminal"])
async def test_output_that_a_full_disk_refuses_is_no_silent_loss(
    agent: Agent, tiny: str, tty: bool
) -> None:
    wanted = app(tiny, "echo one; echo two >&2", pseudo_terminal=tty)
    task = await run(agent, Streams(stdout=full(), stderr=full()), wanted)
    with trio.fail_after(20):
        lost = (await finish(agent, task)).container.lost_output
    assert lost == ((f"terminal: {FULL}",) if tty else (f"stdout: {FULL}", f"stderr: {FULL}"))


@pytest.mark.guest
async def test_output_that_a_full_disk_refuses_fails_a_command(agent: Agent, tiny: str) -> None:
    task = await started(agent, app(tiny, "exec sleep 1000"))
    for words in (("echo", "x"), ("yes",)):
        with pytest.raises(TaskFailed, match=f"^stdout: {FULL}$") as caught, trio.fail_after(20):
            await agent.tasks.exec(task, ExecRequest(command=words), streams=Streams(stdout=full()))
        assert caught.value.exit_code == 125
    await killed(agent, task)


async def test_a_loss_of_output_is_told_by_an_agent_that_was_not_there(
    state_dir: Path, tmp_path: Path, tiny: str
) -> None:
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        wanted = app(tiny, "echo up; sleep 0.5; echo down")
        task = await run(agent, Streams(stdout=full()), wanted)
        await heard(agent, task, "up")
    await trio.sleep(1)
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        with trio.fail_after(20):
            assert (await finish(agent, task)).container.lost_output == (f"stdout: {FULL}",)


async def test_output_that_nobody_reads_waits_for_its_reader_until_the_task_is_stopped(
    agent: Agent, tiny: str
) -> None:
    pipes = [os.pipe() for _ in range(2)]
    tasks = [
        await run(agent, Streams(stdout=writer), app(tiny, "yes | head -c 100000"))
        for _, writer in pipes
    ]
    for task in tasks:
        await reached(agent, task, lambda view: view.known.last_status is Status.DEPROVISIONING)
    await trio.sleep(0.3)
    assert agent.tasks.describe(tasks[0]).known.last_status is Status.DEPROVISIONING
    received = await read_all(pipes[0][0])
    assert len(received) == 100_000
    with trio.fail_after(10):
        assert (await finish(agent, tasks[0])).container.exit_code == 0
    outcome = await stopped(agent, tasks[1])
    assert outcome.container.exit_code == 0
    assert len(outcome.stdout) == 100_000  # a keeper that is not waited for loses some
    os.close(pipes[1][0])


async def test_descriptors_of_a_refused_task_are_closed(agent: Agent, tiny: str) -> None:
    reader, writer = os.pipe()
    request = RunRequest(definition=definition(app(tiny, "true"), cpu="3"))
    with pytest.raises(ClientException):
        await agent.tasks.run(request, streams={"app": Streams(stdout=writer)})
    assert await read_all(reader) == b""


def end_of_a_pipe(index: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - index])
    return ends[index]


@pytest.mark.parametrize(
    ("role", "wrong"),
    [
        ("stdin", lambda: end_of_a_pipe(1)),
        ("stdout", lambda: end_of_a_pipe(0)),
        ("stderr", lambda: os.open("/", os.O_PATH)),
        ("files", lambda: os.open("/dev/null", os.O_WRONLY)),
    ],
    ids=["stdin", "stdout", "stderr", "files"],
)
async def test_a_descriptor_that_is_open_for_something_else_is_refused(
    agent: Agent, tiny: str, role: str, wrong: Callable[[], int]
) -> None:
    """A pipe's reading end as stdout is never ready to be written: its program would never end."""
    way = "writing" if role in ("stdout", "stderr") else "reading"
    said = f"^{role}: the descriptor is not open for {way}$"
    task = await started(agent, app(tiny, "exec sleep 1000"))
    reader, writer = os.pipe()
    other = "stderr" if role == "stdout" else "stdout"
    with pytest.raises(InvalidParameterException, match=said):
        await run(agent, Streams(**{role: wrong(), other: writer}), app(tiny, "true"))
    with pytest.raises(InvalidParameterException, match=said):
        request = ExecRequest(command=("true",))
        await agent.tasks.exec(task, request, streams=Streams(**{role: wrong()}))
    assert [view.id for view in agent.tasks.list()] == [task]
    assert await read_all(reader) == b"", "it is closed"
    await killed(agent, task)


async def test_a_descriptor_that_is_not_open_is_refused(agent: Agent, tiny: str) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(InvalidParameterException, match="stdout: Bad file descriptor"):
        await run(agent, Streams(stdout=writer), app(tiny, "true"))
    os.close(reader)


async def test_descriptors_of_a_task_that_never_starts_are_closed(agent: Agent, tiny: str) -> None:
    reader, writer = os.pipe()
    absent = app(tiny.replace("tiny", "absent"), "true")
    task = await run(agent, Streams(stdout=writer), absent)
    with trio.fail_after(10):
        assert await read_all(reader) == b""
        await finish(agent, task)


# Terminals -----------------------------------------------------------------------------------


def terminal(image: str, script: str, **members: Any) -> ContainerDefinition:
    return app(image, script, pseudo_terminal=True, **members)


@pytest.mark.guest
@pytest.mark.parametrize("init", [False, True])
async def test_a_terminal_controls_its_program(agent: Agent, tiny: str, init: bool) -> None:
    parameters = LinuxParameters(init_process_enabled=init)
    script = "tty; stty size; echo $TERM; trap 'echo int' INT; read a; echo got $a; exec cat"
    async with client(terminal=(33, 101)) as (streams, fed, out, err):
        task = await run(agent, streams, terminal(tiny, script, linux_parameters=parameters))
        await until(lambda: "xterm" in out.text)
        assert out.text == "/dev/pts/0\r\n33 101\r\nxterm\r\n"
        await fed.write(b"typed\n")
        await until(lambda: "got typed" in out.text)
        await fed.write(b"\x04")
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 0
    assert out.text.endswith("typed\r\ngot typed\r\n")
    assert err.text == ""
    assert outcome.stdout == out.text


async def test_the_keys_of_a_terminal_are_signals(agent: Agent, tiny: str) -> None:
    script = "trap 'echo int; exit 3' INT; echo up; while :; do sleep 0.05; done"
    async with client() as (streams, fed, out, _):
        task = await run(agent, streams, terminal(tiny, script))
        await until(lambda: "up" in out.text)
        await fed.write(b"\x03")
        assert (await finish(agent, task)).container.exit_code == 3
    assert "int" in out.text


async def test_a_terminal_hears_of_its_new_size(agent: Agent, tiny: str) -> None:
    script = "trap 'stty size' WINCH; echo up; while :; do sleep 0.05; done"
    async with client() as (streams, _, out, _):
        task = await run(agent, streams, terminal(tiny, script))
        await until(lambda: "up" in out.text)
        await agent.tasks.resize(task, 55, 155)
        await until(lambda: "55 155" in out.text)
        await killed(agent, task)
    with pytest.raises(InvalidParameterException):
        await agent.tasks.resize(task, 1, 1)


async def test_a_terminal_without_a_client_works_and_is_logged(agent: Agent, tiny: str) -> None:
    task = await started(agent, terminal(tiny, "tty; stty size; exec sleep 1000"))
    assert await heard(agent, task, "24 80\r\n") == "/dev/pts/0\r\n24 80\r\n"
    _, out, _ = await execute(agent, task, "readlink", "/proc/1/fd/0")
    assert out == "/dev/pts/0\n"
    await killed(agent, task)


async def test_a_terminal_outlives_its_client(agent: Agent, tiny: str) -> None:
    async with client() as (streams, fed, out, _):
        task = await run(agent, streams, terminal(tiny, "echo up; sleep 0.5; echo still; exit 4"))
        await until(lambda: "up" in out.text)
        await fed.close()
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 4
    assert out.text == "up\r\nstill\r\n"


async def test_much_through_a_terminal_arrives_whole(agent: Agent, tiny: str) -> None:
    script = "stty -opost; yes 1234567 | head -c 1000000"
    async with client() as (streams, _, out, _):
        task = await run(agent, streams, terminal(tiny, script))
        outcome = await finish(agent, task)
    assert outcome.container.exit_code == 0
    assert out.data == b"1234567\n" * 125_000
