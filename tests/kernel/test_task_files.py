"""Files that a program finds when it starts: `sb.run(files=...)`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.agent import Agent
from sandbox.client.api import Sandbox
from sandbox.client.embedded import Embedded
from sandbox.errors import ConfigError, TaskFailed
from tests.kernel.tasks import STAYS, tree_with_tool


@pytest.fixture
def sb(agent: Agent) -> Sandbox:
    return Sandbox(Embedded(agent), on_exit="stop")


async def test_contents_and_host_files_are_there_before_it_starts(
    sb: Sandbox, tiny: str, tmp_path: Path
) -> None:
    tree = tree_with_tool(tmp_path)
    done = await sb.run(
        tiny,
        ["sh", "-c", "cat main; /opt/tree/below/tool; stat -c '%u %a' main /opt/tree/below/tool"],
        files={"main": b"a\0b\n", "/opt/tree": tree},
        working_directory="/srv/work",
    )
    assert (done.stdout, done.stderr) == (b"a\0b\nfrom the host\n0 644\n0 755\n", b"")


async def test_a_read_only_root_has_them_too(sb: Sandbox, tiny: str) -> None:
    done = await sb.run(tiny, ["cat", "/in"], files={"in": b"given"}, read_only=True)
    assert done.stdout == b"given"


async def test_no_name_leads_out_of_the_root(sb: Sandbox, tiny: str, tmp_path: Path) -> None:
    done = await sb.run(tiny, ["cat", "/out"], files={"../../../../out": b"inside"})
    assert done.stdout == b"inside"
    assert not Path("/out").exists()


async def test_a_file_that_cannot_be_placed_stops_the_task_and_says_which(
    sb: Sandbox, tiny: str
) -> None:
    with pytest.raises(TaskFailed, match=r"CannotStartContainerError: /etc/passwd/x: "):
        await sb.run(tiny, ["true"], files={"/etc/passwd/x": b""})
    assert not await sb.tasks()


async def test_a_host_file_that_is_not_there_is_named(sb: Sandbox, tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"/no/such/file: No such file"):
        await sb.run(tiny, ["true"], files={"x": "/no/such/file"})


async def test_a_whole_root_comes_out_without_what_is_mounted_in_it(
    sb: Sandbox, tiny: str, tmp_path: Path
) -> None:
    task = await sb.run_task(
        image=tiny, command=["sh", "-c", f"echo mine > /mine; {STAYS}"], volumes=["v:/volume"]
    )
    await task.wait_running()
    await task.exec(["sh", "-c", "while ! test -s /mine; do :; done; echo hidden > /volume/file"])
    await task.get("/", tmp_path / "root")
    root = tmp_path / "root"
    assert (root / "mine").read_text() == "mine\n"
    assert (root / "bin" / "sh").exists()
    for mounted in ("proc", "sys", "dev", "volume"):
        assert not os.path.lexists(root / mounted), mounted
    await task.get("/volume", tmp_path)
    assert (tmp_path / "volume" / "file").read_text() == "hidden\n"
    await task.stop()
