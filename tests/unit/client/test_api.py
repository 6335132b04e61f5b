"""The Python API over a real socket, with control's `Tasks` in memory behind it."""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

import sandbox
import sandbox.sync
from sandbox.client.api import Task
from sandbox.client.remote import Remote
from sandbox.client.request import task_request
from sandbox.client.shape import shape
from sandbox.errors import (
    AgentUnavailable,
    ConfigError,
    InvalidParameterException,
    NotFound,
    TaskFailed,
)
from sandbox.model.task import ContainerDefinition
from tests.unit.client.agents import serving


def path(directory: Path) -> Path:
    return directory / "run" / "agent.sock"


async def test_a_program_is_run_to_its_end_with_its_output_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        done = await sb.run("tiny", ["echo", "hello"], cpu=512, memory="1 GB")
        assert (done.stdout, done.stderr, done.exit_code) == (b"hello\n", b"", 0)
        assert not done.oom and not done.timed_out and not done.truncated
        assert not agent.tasks.all, "the task is forgotten"
        definition = agent.tasks.requests[0].definition
        assert (definition.cpu, definition.memory) == ("512", "1 GB")


async def test_input_reaches_the_program_whole(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        assert (await sb.run("tiny", ["cat"], input=data)).stdout == data


async def test_output_beyond_the_bound_is_dropped_and_said(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        done = await sb.run("tiny", ["cat"], input=b"x" * 300_000, max_output_bytes=1000)
        assert (done.stdout, done.truncated) == (b"x" * 1000, True)


async def test_a_program_beyond_its_time_is_killed(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        with trio.fail_after(10):
            done = await sb.run("tiny", ["sleep"], timeout_s=0.1)
        assert done.timed_out and done.exit_code == 128 + signal.SIGKILL


async def test_no_time_at_all_is_not_endless_time(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        with trio.fail_after(10):
            assert (await sb.run("tiny", ["sleep"], timeout_s=0)).timed_out
            task = await sb.run_task(image="tiny", command=["sleep"])
            assert (await task.exec(["sleep"], timeout_s=0)).timed_out


@pytest.mark.parametrize("timeout_s", [-1, float("nan")])
async def test_a_time_that_is_none_is_refused_before_anything_runs(
    tmp_path: Path, timeout_s: float
) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        with pytest.raises(InvalidParameterException, match="timeout_s is"):
            await sb.run("tiny", ["sleep"], timeout_s=timeout_s)
        assert not agent.tasks.requests


async def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        with pytest.raises(TypeError, match="command is a sequence of strings"):
            await sb.run("tiny", "echo hi")
        with pytest.raises(TypeError, match="unexpected keyword argument 'files'"):
            await sb.run_task(image="tiny", files={"a": b""})  # type: ignore[call-arg]
        with pytest.raises(InvalidParameterException, match="loopback"):
            await sb.run("tiny", security_groups=["sg-1"])  # type: ignore[call-arg]
        with pytest.raises(InvalidParameterException, match="pull 'foo' is none of"):
            await sb.pull("tiny", pull="foo")  # type: ignore[arg-type]
        assert not agent.tasks.requests
        task = await sb.run_task(image="tiny", command=["sleep"])
        with pytest.raises(TypeError, match="command is a sequence of strings"):
            await task.exec("echo hi")
        with pytest.raises(InvalidParameterException, match="since is nan, not a time"):
            task.logs(since=float("nan"))


async def test_cancelling_a_run_kills_its_program(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        with trio.move_on_after(0.2):
            await sb.run("tiny", ["sleep"])
        assert not agent.tasks.all
        assert len(agent.tasks.requests) == 1


async def test_an_oom_kill_is_told_apart(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        done = await sb.run("tiny", ["oom"])
        assert done.oom and done.exit_code == 137


async def test_a_program_that_cannot_start_raises_what_the_task_says(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        with pytest.raises(TaskFailed, match="no such file") as raised:
            await sb.run("tiny", ["unstartable", "no such file", "127"])
        assert raised.value.exit_code == 127


async def test_a_refused_request_raises_its_own_class_and_nothing_is_held(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        with pytest.raises(InvalidParameterException, match="No Fargate configuration"):
            await sb.run("tiny", cpu=7)
        assert not agent.tasks.all
        with pytest.raises(NotFound):
            await sb.task("nobody")


async def test_leaving_stops_what_was_started_and_only_that(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        async with sandbox.connect(path(tmp_path), on_exit="leave") as sb:
            left = await sb.run_task(image="tiny", command=["sleep"])
            await left.wait_running()
        async with sandbox.connect(path(tmp_path)) as sb:
            stopped = await sb.run_task(image="tiny", command=["sleep"])
            await stopped.wait_running()
            assert (stopped.status, stopped.exit_code) == ("RUNNING", None)
        assert (stopped.status, stopped.exit_code) == ("STOPPED", 143)
        assert agent.tasks.describe(left.id).known.last_status.name == "RUNNING"


async def test_an_exception_in_the_block_comes_out_as_it_is(tmp_path: Path) -> None:
    async with serving(tmp_path):
        with pytest.raises(ZeroDivisionError):
            async with sandbox.connect(path(tmp_path)):
                raise ZeroDivisionError


async def test_containers_are_given_as_ecs_has_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        other = ContainerDefinition(name="b", image="tiny", essential=False)
        mapping = {"name": "a", "image": "tiny", "portMappings": [{"containerPort": 80}]}
        task = await sb.run_task(containers=[mapping, other], volumes=["data"], name="pair")
        await task.wait()
        definition = agent.tasks.requests[0].definition
        assert definition.family == "pair"
        assert definition.container_definitions[0].port_mappings[0].container_port == 80
        assert definition.container_definitions[1] == other
        assert [volume.name for volume in definition.volumes] == ["data"]
        with pytest.raises(InvalidParameterException, match="containerPort"):
            await sb.run_task(
                containers=[
                    {"name": "a", "image": "t", "portMappings": [{"containerPort": "http"}]}
                ]
            )
        with pytest.raises(InvalidParameterException, match="user: say it per container"):
            await sb.run_task(containers=[other], user="1000")


async def test_a_task_that_ended_by_itself_is_shown_as_wanted_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        task = await sb.run_task(image="tiny", command=["exit", "3"])
        await task.wait()
        shown = shape(task.view)
        assert (shown["lastStatus"], shown["desiredStatus"]) == ("STOPPED", "STOPPED")


async def test_exec_gives_its_output_and_its_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, sandbox.connect(path(tmp_path)) as sb:
        task = await sb.run_task(image="tiny", command=["sleep"])
        done = await task.exec(["echo", "inside"])
        assert (done.stdout, done.exit_code) == (b"inside\n", 0)
        assert (await task.exec(["exit", "3"])).exit_code == 3
        late = await task.exec(["sleep"], timeout_s=0.1)
        assert late.timed_out and late.exit_code is None
        with trio.fail_after(5):
            while not agent.tasks.execs_killed:
                await trio.sleep(0.01)
        with pytest.raises(TaskFailed, match="not found"):
            await task.exec(["missing"])


async def test_files_go_in_and_come_out(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content")
    async with serving(tmp_path), sandbox.connect(path(tmp_path)) as sb:
        task = await sb.run_task(image="tiny", command=["sleep"])
        await task.put(tmp_path / "tree", "/srv")
        archive = tmp_path.with_suffix(".tar")  # the fake keeps what was put into "/"
        with tarfile.open(archive) as put:
            assert put.getnames() == ["srv", "srv/file"]
        await task.get("/", tmp_path / "back")
        assert (tmp_path / "back" / "file").read_bytes() == b"content"
        with pytest.raises(ConfigError, match="/nonexistent"):
            await task.put("/nonexistent", "/srv")
        with pytest.raises(ConfigError, match="no/dir: No such file"):
            await task.get("/", tmp_path / "no" / "dir" / "x")
        archive.write_bytes(b"nonsense" * 200)
        with pytest.raises(InvalidParameterException, match="proper archive"):
            await task.get("/", tmp_path / "more")


async def test_no_agent_at_the_socket_is_said(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="no agent answers at"):
        async with sandbox.connect(tmp_path / "agent.sock"):
            pass


async def test_the_loss_of_the_agent_is_said(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def agent(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
            with trio.CancelScope() as life:
                async with serving(tmp_path):
                    task_status.started(life)
                    await trio.sleep_forever()

        life = await nursery.start(agent)
        async with sandbox.connect(path(tmp_path)) as sb:
            task = await sb.run_task(image="tiny", command=["sleep"])
            await task.wait_running()
            trio.lowlevel.current_trio_token().run_sync_soon(life.cancel)
            with pytest.raises(AgentUnavailable, match="is gone"):
                await task.wait()


@pytest.mark.parametrize("verb", ["exec", "put", "get"])
async def test_what_is_asked_of_an_agent_that_has_gone_ends_and_holds_nothing(
    verb: str, tmp_path: Path
) -> None:
    """More than a pipe takes is to be copied: nobody will ever read it."""
    (tmp_path / "file").write_bytes(bytes(300_000))
    async with trio.open_nursery() as nursery:
        remote = Remote(str(path(tmp_path)), nursery)
        async with serving(tmp_path):
            view = await remote.run(
                task_request(image="tiny", command=["true"]), owned=False, streams={}, progress=None
            )
        task = Task(remote, view)
        asks: dict[str, Callable[[], Awaitable[object]]] = {
            "exec": lambda: task.exec(["true"]),
            "put": lambda: task.put(tmp_path / "file", "/file"),
            "get": lambda: task.get("/file", tmp_path / "copy"),
        }
        before = len(os.listdir("/proc/self/fd"))
        with trio.fail_after(10), pytest.raises(AgentUnavailable):
            await asks[verb]()
        assert len(os.listdir("/proc/self/fd")) == before


async def test_the_same_verbs_without_async(tmp_path: Path) -> None:
    def program() -> None:
        with sandbox.sync.connect(path(tmp_path)) as sb:
            assert sb.run("tiny", ["echo", "hi"]).stdout == b"hi\n"
            task = sb.run_task(image="tiny", command=["sleep"])
            task.wait_running()
            assert [each.id for each in sb.tasks()] == [task.id]
            assert [record.at_ns for record in task.logs(tail=100)] == list(range(100))
            for record in task.logs(follow=True):
                assert record.at_ns == 0
                break
            assert task.exec(["echo", "in"]).stdout == b"in\n"
            with pytest.raises(NotFound):
                sb.task("nobody")
        assert task.status == "STOPPED"
        with pytest.raises(AgentUnavailable), sandbox.sync.connect(tmp_path / "none"):
            pass

    async with serving(tmp_path):
        await trio.to_thread.run_sync(program)
