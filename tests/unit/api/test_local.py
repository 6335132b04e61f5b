"""The control socket, over a real socket, with control's `Tasks` in memory."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.api import local
from sandbox.client.remote import AsyncLink
from sandbox.errors import AgentRunning, ConfigError, InvalidParameterException, NotFound
from sandbox.model.observed import ExecRequest
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import ContainerDefinition, Status, TaskDefinition
from sandbox.varlink import calls, frames
from tests.unit.client.agents import FakeAgent, serving


def request(*command: str) -> RunRequest:
    container = ContainerDefinition(name="main", image="tiny", command=command)
    return RunRequest(
        definition=TaskDefinition(
            family="run", cpu="256", memory="512", container_definitions=(container,)
        )
    )


def path(directory: Path) -> str:
    return str(directory / "run" / "agent.sock")


@asynccontextmanager
async def raw(directory: Path) -> AsyncGenerator[trio.SocketStream]:
    stream = await trio.open_unix_socket(path(directory))
    async with stream:
        yield stream


async def ask(stream: trio.SocketStream, message: dict[str, Any]) -> dict[str, Any]:
    await stream.send_all(json.dumps(message).encode() + b"\0")
    data = b""
    while not data.endswith(b"\0"):
        data += await stream.receive_some(65536)
    reply: dict[str, Any] = json.loads(data[:-1])
    return reply


async def settled(condition: Any) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.01)


async def test_any_varlink_client_can_ask_who_answers(tmp_path: Path) -> None:
    async with serving(tmp_path), raw(tmp_path) as stream:
        info = await ask(stream, {"method": "org.varlink.service.GetInfo"})
        assert info["parameters"]["interfaces"] == ["org.varlink.service", "io.sandbox"]
        wanted = {"interface": "io.sandbox"}
        method = "org.varlink.service.GetInterfaceDescription"
        described = await ask(stream, {"method": method, "parameters": wanted})
        assert described["parameters"]["description"].count("interface io.sandbox\n") == 1


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"method": "io.sandbox.Nonsense"}, "org.varlink.service.MethodNotFound"),
        ({"method": "io.sandbox.ListTasks"}, "org.varlink.service.ExpectedMore"),
        ({"method": "io.sandbox.StopTask"}, "org.varlink.service.InvalidParameter"),
        ({"method": 7}, "org.varlink.service.InvalidParameter"),
        (
            {"method": "io.sandbox.StopTask", "parameters": {"task": 1}},
            "org.varlink.service.InvalidParameter",
        ),
        ({"method": "io.sandbox.StopTask", "parameters": {"task": "x"}}, "io.sandbox.NotFound"),
    ],
)
async def test_a_wrong_call_gets_its_error_and_the_connection_goes_on(
    tmp_path: Path, message: dict[str, Any], error: str
) -> None:
    async with serving(tmp_path), raw(tmp_path) as stream:
        assert (await ask(stream, message))["error"] == error
        again = await ask(stream, {"method": "io.sandbox.GetAgent"})
        assert again["parameters"]["instance"] == "beef"


@pytest.mark.parametrize(
    "body",
    [
        b'{"method":"\xff"}',
        b'{"method":"io.sandbox.StopTask","parameters":{"task":"\xff"}}',
        b'{"method":"io.sandbox.StopTask","parameters":' + b"[" * 10_000,
        b'{"method":' + b"[" * 10_000,
    ],
)
async def test_a_call_that_cannot_be_read_gets_its_error_and_keeps_no_descriptor(
    tmp_path: Path, body: bytes
) -> None:
    async with serving(tmp_path), raw(tmp_path) as stream:
        ours, theirs = socket.socketpair()
        with ours:
            await stream.socket.sendmsg([body + b"\0"], frames.rights([theirs.fileno()]))
            theirs.close()
            with trio.fail_after(5):
                reply = await stream.receive_some(65536)
            assert b"org.varlink.service.InvalidParameter" in reply
            ours.settimeout(5)
            assert await trio.to_thread.run_sync(ours.recv, 1) == b"", "the agent has it open"
        info = await ask(stream, {"method": "org.varlink.service.GetInfo"})
        assert "parameters" in info


async def test_a_client_that_calls_ahead_without_bound_is_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, raw(tmp_path) as stream:
        view = await agent.tasks.run(request("sleep"))
        await stream.send_all(
            json.dumps(
                {"method": "io.sandbox.WatchTask", "parameters": {"task": view.id}, "more": True}
            ).encode()
            + b"\0"
        )
        await stream.send_all(b'{"method": "io.sandbox.GetAgent"}\0' * 200)
        with trio.fail_after(5):
            while await stream.receive_some(65536):
                pass


async def test_only_root_reaches_the_socket(tmp_path: Path) -> None:
    async with serving(tmp_path):
        assert stat.S_IMODE(os.stat(path(tmp_path)).st_mode) == 0o600


async def test_a_socket_of_a_dead_agent_is_replaced_and_one_of_a_live_agent_is_not(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path):
        with pytest.raises(AgentRunning):
            local.listen(tmp_path / "run" / "agent.sock")
    assert (tmp_path / "run" / "agent.sock").exists(), "nobody removed it: the agent is dead"
    async with serving(tmp_path), raw(tmp_path) as stream:
        assert "parameters" in await ask(stream, {"method": "io.sandbox.GetAgent"})


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").write_text("mine")
    with pytest.raises(ConfigError):
        local.listen(tmp_path / "agent.sock")
    assert (tmp_path / "agent.sock").read_text() == "mine"


async def test_paths_longer_than_a_socket_address_work(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    async with serving(deep), AsyncLink.open(path(deep)) as link:
        await link.send(calls.GetAgent())
        assert (await link.receive(calls.GetAgent()))[0].instance == "beef"


async def test_a_program_writes_to_the_callers_own_descriptor(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, AsyncLink.open(path(tmp_path)) as link:
        read, write = os.pipe()
        call = calls.RunTask(
            request=request("echo", "hello"), owned=True, streams={"main": Streams(stdout=0)}
        )
        await link.send(call, [write])
        os.close(write)
        statuses = []
        continues = True
        while continues:
            reply, continues = await link.receive(call)
            if reply.task is not None:
                statuses.append(reply.task.known.last_status)
        assert statuses == sorted(statuses)
        assert statuses[-1] is Status.STOPPED, statuses
        assert os.read(read, 100) == b"hello\n"
        assert os.read(read, 100) == b"", "the agent kept no copy of the descriptor"
        os.close(read)
        assert agent.tasks.requests == [call.request]


@pytest.mark.parametrize(
    "streams", [Streams(stdout=1), Streams(stdout=0, stderr=0), Streams(stdin=-1)]
)
async def test_a_descriptor_that_the_call_does_not_carry_is_refused(
    tmp_path: Path, streams: Streams
) -> None:
    async with serving(tmp_path) as agent, AsyncLink.open(path(tmp_path)) as link:
        read, write = os.pipe()
        call = calls.RunTask(request=request("true"), owned=True, streams={"main": streams})
        await link.send(call, [write])
        os.close(write)
        with pytest.raises(InvalidParameterException):
            await link.receive(call)
        assert os.read(read, 1) == b"" and not agent.tasks.all
        os.close(read)


async def begin(directory: Path, link: AsyncLink, *, owned: bool) -> str:
    call = calls.RunTask(request=request("sleep"), owned=owned)
    await link.send(call)
    while True:
        reply, _ = await link.receive(call)
        if reply.task is not None and reply.task.known.last_status is Status.RUNNING:
            return reply.task.id


async def test_the_loss_of_a_client_stops_the_task_that_it_owns(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        async with AsyncLink.open(path(tmp_path)) as link:
            task = await begin(tmp_path, link, owned=True)
        await settled(lambda: stopped(agent, task))
        assert agent.tasks.describe(task).desired.stopped_reason == local.OWNER_GONE
        assert agent.tasks.owners[task].endswith(f":{os.getpid()}")


async def test_the_loss_of_a_client_leaves_a_task_that_it_does_not_own(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        async with AsyncLink.open(path(tmp_path)) as link:
            task = await begin(tmp_path, link, owned=False)
        await settled(lambda: agent.presence._holds == 0)
        assert agent.tasks.describe(task).desired.desired_status == "RUNNING"
        assert agent.tasks.owners[task] is None


async def test_a_leaving_agent_does_not_stop_what_its_clients_own(tmp_path: Path) -> None:
    async with trio.open_nursery() as clients:
        async with serving(tmp_path) as agent:

            async def hold(*, task_status: trio.TaskStatus[str]) -> None:
                async with AsyncLink.open(path(tmp_path)) as link:
                    task_status.started(await begin(tmp_path, link, owned=True))
                    await trio.sleep_forever()

            task = await clients.start(hold)
        clients.cancel_scope.cancel()
    assert agent.tasks.describe(task).desired.desired_status == "RUNNING"


async def test_a_second_client_can_take_an_owned_task_over(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        view = await agent.tasks.run(request("sleep"))
        async with AsyncLink.open(path(tmp_path)) as link:
            call = calls.WatchTask(task=view.id[:8], owned=True)
            await link.send(call)
            assert (await link.receive(call))[0].task.id == view.id
        await settled(lambda: stopped(agent, view.id))


async def test_an_agent_that_leaves_with_its_clients_takes_no_detached_task(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, resident=False), AsyncLink.open(path(tmp_path)) as link:
        call = calls.RunTask(request=request("sleep"))
        await link.send(call)
        with pytest.raises(ConfigError, match="start `sandbox agent`"):
            await link.receive(call)


async def test_an_agent_is_idle_once_clients_and_their_orphaned_tasks_are_gone(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, resident=False) as agent:
        async with AsyncLink.open(path(tmp_path)) as link:
            task = await begin(tmp_path, link, owned=True)
        with trio.fail_after(5):
            await agent.presence.idle(first_within_s=0)
        assert stopped(agent, task)


async def test_an_agent_that_nobody_calls_is_idle_after_its_patience(
    autojump_clock: trio.testing.MockClock,
) -> None:
    presence = local.Presence(resident=False)
    await presence.idle(first_within_s=5)
    assert trio.current_time() == pytest.approx(5)


async def test_an_agent_lingers_for_the_client_that_comes_just_after_the_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    presence = local.Presence(resident=False)

    async def clients() -> None:
        for _ in range(3):
            with presence.hold():
                await trio.sleep(1)
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(clients)
        await presence.idle(first_within_s=5, linger_s=0.2)
        assert trio.current_time() == pytest.approx(3.4)


async def test_the_loss_of_a_client_kills_its_exec_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent:
        view = await agent.tasks.run(request("sleep"))
        async with AsyncLink.open(path(tmp_path)) as link:
            call = calls.ExecTask(task=view.id, request=ExecRequest(command=("sleep",)))
            await link.send(call)
            assert (await link.receive(call))[0].exec_id == "e1"
        await settled(lambda: agent.tasks.execs_killed == [view.id])
        assert not stopped(agent, view.id)


async def test_long_logs_come_in_few_replies_and_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as agent, AsyncLink.open(path(tmp_path)) as link:
        view = await agent.tasks.run(request("sleep"))
        call = calls.ReadLogs(task=view.id)
        await link.send(call)
        replies, continues = [], True
        while continues:
            reply, continues = await link.receive(call)
            replies.append(reply)
        records = [record for reply in replies for record in reply.records]
        assert [record.at_ns for record in records] == list(range(1000))
        assert records[7].data == b"\x1b[31m\xff7\n"
        assert len(replies) < 200


async def test_an_error_inside_a_stream_is_the_answer(tmp_path: Path) -> None:
    async with serving(tmp_path), AsyncLink.open(path(tmp_path)) as link:
        call = calls.ReadLogs(task="nobody")
        await link.send(call)
        with pytest.raises(NotFound):
            await link.receive(call)


async def test_a_user_that_is_not_root_is_turned_away_by_its_credentials(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    async with serving(tmp_path):
        os.chmod(path(tmp_path), 0o666)
        for directory in [tmp_path, *tmp_path.parents][:-2]:
            assert directory.stat().st_uid == 0

        def stranger() -> bytes:
            endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            endpoint.settimeout(5)
            with endpoint:
                pid = os.fork()
                if pid == 0:
                    os.seteuid(65534)
                    os._exit(endpoint.connect_ex(f"/proc/self/fd/{directory_fd}/agent.sock"))
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                try:
                    endpoint.sendall(b'{"method": "io.sandbox.GetAgent"}\0')
                    return endpoint.recv(100)
                except (BrokenPipeError, ConnectionResetError):
                    return b""

        directory_fd = os.open(tmp_path / "run", os.O_RDONLY)
        try:
            os.chmod(tmp_path / "run", 0o755)
            assert await trio.to_thread.run_sync(stranger) == b""
        finally:
            os.close(directory_fd)


def stopped(agent: FakeAgent, task: str) -> bool:
    status: Status = agent.tasks.describe(task).known.last_status
    return status is Status.STOPPED
