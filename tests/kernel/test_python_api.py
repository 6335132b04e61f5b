"""The Python API over a real agent: the same embedded and through the control socket."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.agent import Agent
from sandbox.client.api import Sandbox
from sandbox.client.embedded import Embedded
from sandbox.errors import ClientException, ConfigError, InvalidParameterException, TaskFailed
from tests.conftest import ROOT
from tests.kernel.probe_image import Images
from tests.kernel.tasks import STAYS, tree_with_tool


@pytest.fixture(params=["embedded", "socket"])
async def sb(
    request: pytest.FixtureRequest, agent: Agent, tmp_path: Path
) -> AsyncIterator[Sandbox]:
    if request.param == "embedded":
        yield Sandbox(Embedded(agent), on_exit="stop")
    else:
        async with sandbox.connect(tmp_path / "run" / "agent.sock") as connected:
            yield connected


async def test_files_are_there_before_the_program_starts(
    sb: Sandbox, probe_image: str, tmp_path: Path
) -> None:
    tree = tree_with_tool(tmp_path)
    large = bytes(range(256)) * 4096
    done = await sb.run(
        probe_image,
        ["sh", "-c", "cat main; /opt/tree/below/tool; wc -c < large; cat"],
        input=b"and its input\n",
        files={"main": b"a\0b\n", "large": large, "/opt/tree": tree},
        working_directory="/srv/work",
    )
    expected = b"a\0b\nfrom the host\n1048576\nand its input\n"
    assert (done.stdout, done.stderr, done.exit_code) == (expected, b"", 0)
    assert not await sb.tasks()


async def test_an_empty_entry_point_puts_the_images_away(sb: Sandbox, images: Images) -> None:
    image = images.make("fails", Entrypoint=["false"])
    assert (await sb.run(image, ["echo", "mine"])).exit_code == 1
    assert (await sb.run(image, ["echo", "mine"], entry_point=[])).stdout == b"mine\n"


async def test_containers_of_one_pid_namespace_see_each_other(
    sb: Sandbox, probe_image: str
) -> None:
    look = "until ps -o args | grep -q '[s]leep 98765'; do sleep 0.05; done"
    task = await sb.run_task(
        containers=[
            {"name": "looks", "image": probe_image, "command": ["sh", "-c", look]},
            {
                **{"name": "lives", "image": probe_image, "essential": False},
                "command": ["sleep", "98765"],
            },
        ],
        pid_mode="task",
    )
    assert await task.wait() == 0


async def test_what_cannot_be_is_refused_before_there_is_a_task(
    sb: Sandbox, probe_image: str
) -> None:
    wanted: dict[str, Any] = {"name": "app", "image": probe_image}
    with pytest.raises(ClientException, match="'app': privileged is not supported on Fargate"):
        await sb.run_task(containers=[{**wanted, "privileged": True}])
    with pytest.raises(ClientException, match="'app': secrets is not implemented yet"):
        await sb.run_task(containers=[{**wanted, "secrets": [{"name": "A", "valueFrom": "a"}]}])
    with pytest.raises(InvalidParameterException, match=r"containers\[0\] has no member 'comand'"):
        await sb.run_task(containers=[{**wanted, "comand": ["true"]}])
    with pytest.raises(InvalidParameterException, match="invalid platform 'foo'"):
        await sb.run_task(image=probe_image, platform="foo")
    with pytest.raises(sandbox.SandboxError, match="invalid platform 'foo'"):
        await sb.pull(probe_image, platform="foo")
    assert not await sb.tasks()


async def test_what_goes_wrong_with_a_task_is_an_error_of_ours_that_says_why(
    sb: Sandbox, probe_image: str, tmp_path: Path
) -> None:
    task = await sb.run_task(image=probe_image, command=["sh", "-c", STAYS])
    await task.wait_running()
    with pytest.raises(InvalidParameterException, match="signal 9999 is none, they are 1 to 64"):
        await task.kill(9999)
    with pytest.raises(InvalidParameterException, match="command contains a NUL byte"):
        await task.exec(["a\0b"])
    with pytest.raises(ConfigError, match="no/dir: No such file or directory"):
        await task.get("/bin", tmp_path / "no" / "dir" / "x")
    with pytest.raises(InvalidParameterException, match="/nothing: No such file or directory"):
        await task.get("/nothing", tmp_path / "x")
    with pytest.raises(ConfigError, match="/nonexistent"):
        await task.put("/nonexistent", "/srv")
    with pytest.raises(InvalidParameterException, match="/no/dir: No such file or directory"):
        await task.put(tmp_path, "/no/dir/x")
    await task.exec(["mkfifo", "/bin/fifo"])
    assert await task.get("/bin", tmp_path / "bin") == 1
    await task.stop()


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("/volume/deep/file", "/volume"),
        ("/volume", "/volume"),
        ("file", "/volume"),
        ("/proc/x", "/proc"),
        ("//proc/x", "/proc"),
        ("/sys/x", "/sys"),
        ("/dev/shm/x", "/dev"),
        ("/etc/hosts", "/etc/hosts"),
    ],
)
async def test_a_file_that_the_program_would_not_see_is_refused(
    agent: Agent, probe_image: str, name: str, over: str
) -> None:
    embedded = Sandbox(Embedded(agent), on_exit="stop")
    with pytest.raises(TaskFailed) as refused:
        await embedded.run(
            probe_image,
            ["true"],
            files={name: b""},
            volumes=["v:/volume"],
            working_directory="/volume/work",
        )
    where = name.replace("//", "/") if name.startswith("/") else f"/volume/work/{name}"
    assert refused.value.cause == (
        f"CannotStartContainerError: {where}: the container has something else at {over}"
    )


CANCELLED = """
import sys, trio, sandbox

async def main(image, state, run):
    with trio.CancelScope() as scope:
        async with sandbox.open_sandbox(state_dir=state, run_dir=run, warm_slots=1) as sb:
            task = await sb.run_task(image=image, command=["sleep", "1000"], stop_timeout=2)
            await task.wait_running()
            scope.cancel()
            await trio.sleep_forever()
    print(task.status)

trio.run(main, *sys.argv[1:])
"""


def test_cancelling_what_embeds_an_agent_stops_its_tasks(
    probe_image: str, state_dir: Path, tmp_path: Path
) -> None:
    """A process of its own: one that waits in a shield for ever could not be ended from inside."""
    command = [sys.executable, "-c", CANCELLED, probe_image, str(state_dir), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("STOPPED\n", 0)
