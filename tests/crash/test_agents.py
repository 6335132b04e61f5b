"""What else may happen to an agent, to what it keeps on disk and to what works for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio

from sandbox.agent import LOST_REASON, Agent, open_agent
from sandbox.control.owners import OWNER_GONE
from sandbox.errors import AgentRunning, ConfigError, StoreError
from sandbox.kernel.idranges import CLAIMS
from sandbox.kernel.processes import start_time
from sandbox.model import names
from sandbox.model.request import RunRequest, Streams
from sandbox.model.task import Status, StopCode, TaskView
from sandbox.store import rows
from tests.conftest import ROOT
from tests.crash.conftest import SETTINGS, Driver, Site
from tests.crash.paths import UNTIL_TOLD, app, log_of, task, until_running, wait
from tests.crash.test_tasks import recovered, second_task
from tests.leaks import cgroup_roots

LOST = "ContainerRuntimeError: the keeper was killed, how it ended is unknown"
MANY = 100_000


async def begin(agent: Agent, image: str, script: str = UNTIL_TOLD) -> TaskView:
    view = await agent.tasks.run(RunRequest(definition=task(app(image, script))))
    await until_running(agent, view.id)
    return agent.tasks.describe(view.id)


async def stopped(agent: Agent, task: str) -> TaskView:
    with trio.fail_after(20):
        await wait(agent, task)
    return agent.tasks.describe(task)


async def end(agent: Agent, task: str) -> None:
    await agent.tasks.stop(task)
    await stopped(agent, task)
    await agent.tasks.remove(task)


def processes(agent: Agent, task: str) -> list[int]:
    cgroup = agent.node.tree.find(names.task_cgroup(task))
    assert cgroup is not None
    return cgroup.pids()


def is_running(pid: int) -> bool:
    """A zombie has ended, even where the host's first process never reaps."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def left_by(driver: Driver, site: Site, image: str, script: str = UNTIL_TOLD, **more: int) -> str:
    """The task of an agent that was killed while it ran."""
    driver.start(verb="hold", image=image, script=script, **site.place, **more)
    id: str = driver.hear("ready")["task"]
    assert driver.signal(signal.SIGKILL)["ended"] == -9
    return id


@asynccontextmanager
async def tended(
    site: Site, driver: Driver, image: str, after: str
) -> AsyncIterator[tuple[Agent, str]]:
    """A task on the agent that began it, or on one that found it."""
    if after == "found":
        id = left_by(driver, site, image, "sleep 1000 & " + UNTIL_TOLD)
        async with site.agent() as agent:
            yield agent, id
    else:
        async with site.agent() as agent:
            yield agent, (await begin(agent, image, "sleep 1000 & " + UNTIL_TOLD)).id


# Somebody kills what works for the agent ---------------------------------------------------


@pytest.mark.parametrize("after", ["begun", "found"])
async def test_a_task_whose_keeper_is_killed_is_stopped_with_all_its_processes(
    after: str, driver: Driver, site: Site, image: str
) -> None:
    async with tended(site, driver, image, after) as (agent, id):
        with trio.fail_after(10):
            while len(alive := processes(agent, id)) < 2:  # a shell that runs may not have forked
                await trio.sleep(0.01)
        keeper = agent.tasks.describe(id).known.containers[0].keeper
        assert keeper is not None
        os.kill(keeper.pid, signal.SIGKILL)
        known = (await stopped(agent, id)).known
        assert known.containers[0].reason == LOST
        assert known.containers[0].exit_code is None
        assert known.stop_code is StopCode.ESSENTIAL_CONTAINER_EXITED
        assert not [pid for pid in alive if is_running(pid)]
        await agent.tasks.remove(id)
    assert await site.remains() == []


@pytest.mark.parametrize("after", ["begun", "found"])
async def test_a_container_whose_first_process_is_killed_has_ended_with_137(
    after: str, driver: Driver, site: Site, image: str
) -> None:
    async with tended(site, driver, image, after) as (agent, id):
        keeper = agent.tasks.describe(id).known.containers[0].keeper
        assert keeper is not None
        os.kill(keeper.init_pid, signal.SIGKILL)
        known = (await stopped(agent, id)).known
        assert (known.containers[0].exit_code, known.containers[0].reason) == (137, None)
        await agent.tasks.remove(id)
    assert await site.remains() == []


async def test_a_keeper_that_was_killed_while_there_was_no_agent_is_missed_by_the_next(
    driver: Driver, site: Site, image: str
) -> None:
    id = left_by(driver, site, image)
    for keeper in site.keepers():
        keeper.kill()
    async with site.agent() as agent:
        known = (await stopped(agent, id)).known
        assert known.containers[0].reason == LOST
        await agent.tasks.remove(id)
    assert await site.remains() == []


async def test_a_client_that_does_not_read_keeps_a_task_from_its_end_only_until_it_is_stopped(
    site: Site, image: str
) -> None:
    unread, written = os.pipe()
    try:
        async with site.agent() as agent:
            wanted = RunRequest(definition=task(app(image, "head -c 100000 /dev/zero; exit 8")))
            streams = {"app": Streams(stdout=written)}
            view = await agent.tasks.run(wanted, streams=streams)
            with trio.fail_after(10):
                while agent.tasks.describe(view.id).known.last_status < Status.DEPROVISIONING:
                    await trio.sleep(0.01)
            await trio.sleep(0.2)
            assert agent.tasks.describe(view.id).known.last_status is Status.DEPROVISIONING
            await agent.tasks.stop(view.id)
            known = (await stopped(agent, view.id)).known
            assert known.stop_code is StopCode.ESSENTIAL_CONTAINER_EXITED
            assert known.containers[0].exit_code == 8
            assert len(await log_of(agent, view.id, "app")) == 100_000
            await agent.tasks.remove(view.id)
        assert await site.remains() == []
    finally:
        os.close(unread)


# Agents come and go ------------------------------------------------------------------------


async def test_no_line_of_a_flood_is_lost_when_the_agent_is_killed(
    driver: Driver, site: Site, image: str
) -> None:
    count = f"n=0; while [ $n -lt {MANY} ]; do n=$((n+1)); echo $n; done; exit 5"
    id = left_by(driver, site, image, count)
    async with site.agent() as agent:
        assert (await stopped(agent, id)).known.containers[0].exit_code == 5
        lines = (await log_of(agent, id, "app")).split()
        assert lines == [str(n) for n in range(1, MANY + 1)]
        await agent.tasks.remove(id)


async def test_a_task_outlives_twenty_agents(driver: Driver, site: Site, image: str) -> None:
    count = "trap 'exit 6' TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"
    id = left_by(driver, site, image, count)
    for _ in range(20):
        driver.start(verb="hold", **site.place)
        driver.hear("ready")
        driver.signal(signal.SIGKILL)
    async with site.agent() as agent:
        assert agent.tasks.describe(id).known.last_status is Status.RUNNING
        await agent.tasks.stop(id)
        known = (await stopped(agent, id)).known
        assert (known.stop_code, known.containers[0].exit_code) == (StopCode.USER_INITIATED, 6)
        numbers = [int(n) for n in (await log_of(agent, id, "app")).split()]
        assert numbers == list(range(1, len(numbers) + 1))
        await agent.tasks.remove(id)
    assert await site.remains() == []


HOLDS = """
import os, sys, time
from pathlib import Path
from sandbox.agent.state_directory import hold
with hold(Path(sys.argv[1])):
    if not os.fork():
        time.sleep(0.5)  # a child that has not executed its program yet
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


async def test_the_last_child_of_a_killed_agent_does_not_keep_the_next_one_out(
    site: Site,
) -> None:
    command = [sys.executable, "-c", HOLDS, str(site.state)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
        holder.wait()
        async with site.agent():
            pass
    assert await site.remains() == []


async def test_a_second_agent_on_a_state_directory_refuses_and_disturbs_nothing(
    driver: Driver, site: Site, image: str, tmp_path: Path
) -> None:
    async with site.agent() as agent:
        view = await begin(agent, image)
        with pytest.raises(AgentRunning):
            async with open_agent(site.state, tmp_path / "other", SETTINGS):
                pass
        said = driver.ask(verb="hold", state=str(site.state), run=str(tmp_path / "other"))
        assert said["ended"] != 0 and "ready" not in said
        assert agent.tasks.describe(view.id).known.last_status is Status.RUNNING
        await end(agent, view.id)


async def test_the_socket_of_a_killed_agent_is_replaced(driver: Driver, site: Site) -> None:
    driver.start(verb="hold", **site.place)
    driver.hear("ready")
    driver.signal(signal.SIGKILL)
    path = str(site.run / "agent.sock")
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(path) != 0
    async with site.agent():
        with socket.socket(socket.AF_UNIX) as client:
            assert client.connect_ex(path) == 0


async def test_sigterm_ends_the_daemon_and_leaves_its_tasks_running(site: Site, image: str) -> None:
    places = ["--state-dir", str(site.state), "--run-dir", str(site.run)]
    command = [sys.executable, "-m", "sandbox.cli"]
    daemon = subprocess.Popen([*command, "agent", *places], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(10):
            while not (site.run / "agent.sock").exists():
                await trio.sleep(0.02)
        run = [*command, "run", "-d", *places, image, "sh", "-c", UNTIL_TOLD]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        id = done.stdout.strip()
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
    async with site.agent() as agent:
        view = agent.tasks.describe(id)
        assert view.known.last_status is Status.RUNNING
        await end(agent, view.id)
    assert await site.remains() == []


async def test_sighup_with_a_broken_configuration_changes_nothing_and_says_so(
    site: Site, tmp_path: Path
) -> None:
    config, manager = tmp_path / "agent.toml", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(20)
    config.write_text("max_tasks = 7\n")
    environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    daemon = sandbox(site, "agent", "--config", str(config), env=environ)
    with manager:
        try:
            assert manager.recv(100) == b"READY=1"
            for broken in (b"max_tasks = \n", b"max_tasks = 'many'\n", b"\xff = 1\n"):
                config.write_bytes(broken)
                daemon.send_signal(signal.SIGHUP)
                assert [manager.recv(100), manager.recv(100)] == [b"RELOADING=1", b"READY=1"]
            assert outcome(sandbox(site, "ps"))[0] == 0
        finally:
            daemon.send_signal(signal.SIGTERM)
            code, _, said = outcome(daemon)
    assert code == 0
    logged = [msgspec.json.decode(line) for line in said.splitlines()]
    refused = [line["error"] for line in logged if "the old one holds" in line["event"]]
    assert len(refused) == 3 and all("configuration" in r or str(config) in r for r in refused)


# Commands without a resident agent -----------------------------------------------------------


def sandbox(site: Site, *words: str, **more: Any) -> subprocess.Popen[str]:
    """The command itself, on this site."""
    place = ["--state-dir", str(site.state), "--run-dir", str(site.run)]
    command = [sys.executable, "-m", "sandbox.cli", *place, *words]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **{**streams, **more})


def outcome(command: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = command.communicate(timeout=60)
    return command.returncode, stdout, stderr


async def test_commands_at_once_share_an_agent_and_none_finds_it_leaving(
    site: Site, image: str
) -> None:
    run = ("run", "--rm", image, "echo", "done")
    for _ in range(3):
        many = [sandbox(site, *run) for _ in range(8)]
        assert [outcome(each) for each in many] == [(0, "done\n", "")] * 8
        # One after the other, each meets an agent that is about to leave, or has just left.
        for pause_s in (0, 0.2, 0.3):
            time.sleep(pause_s)
            assert outcome(sandbox(site, *run)) == (0, "done\n", "")
    assert await site.remains() == []


async def test_a_daemon_follows_an_ephemeral_agent_that_lingers(site: Site, image: str) -> None:
    assert outcome(sandbox(site, "run", "--rm", image, "true")) == (0, "", "")
    daemon = sandbox(site, "agent")
    try:
        for _ in range(3):  # until the ephemeral one is gone for sure
            assert outcome(sandbox(site, "ps"))[0] == 0
            time.sleep(0.3)
        assert daemon.poll() is None
        code, _, said = outcome(sandbox(site, "agent"))
        assert code == 1 and "stop it if it is a resident one" in said
    finally:
        daemon.send_signal(signal.SIGTERM)
        outcome(daemon)


# Owners ------------------------------------------------------------------------------------


async def test_a_task_does_not_outlive_the_process_that_embedded_its_agent(
    driver: Driver, site: Site, image: str
) -> None:
    id = left_by(driver, site, image, owner=0)
    async with site.agent() as agent:
        known = (await stopped(agent, id)).known
        assert (known.stop_code, known.stopped_reason) == (StopCode.USER_INITIATED, OWNER_GONE)
        assert known.containers[0].exit_code == 3  # it was asked to end
        await agent.tasks.remove(id)
    assert await site.remains() == []


async def test_a_task_whose_owner_outlives_the_agent_stops_when_its_owner_ends(
    driver: Driver, site: Site, image: str
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as owner:
        id = left_by(driver, site, image, owner=owner.pid)
        async with site.agent() as agent:
            await trio.sleep(0.3)
            assert agent.tasks.describe(id).known.last_status is Status.RUNNING
            owner.kill()
            owner.wait()
            assert (await stopped(agent, id)).known.stopped_reason == OWNER_GONE


async def test_another_process_with_the_pid_of_an_owner_owns_nothing(
    driver: Driver, site: Site, image: str
) -> None:
    id = left_by(driver, site, image, owner=os.getpid())
    (row,) = (await site.rows()).values()
    boot, pid, started = (row.desired.owner or "").split(":")
    assert (int(pid), int(started)) == (os.getpid(), start_time(os.getpid()))
    older = msgspec.structs.replace(row.desired, owner=f"{boot}:{pid}:{int(started) - 1}")
    await site.write({rows.desired_key(id): older})
    async with site.agent() as agent:
        assert (await stopped(agent, id)).known.stopped_reason == OWNER_GONE


# The state directory -----------------------------------------------------------------------


@pytest.mark.parametrize("failpoint", [None, "identity.do", "identity.done"])
async def test_a_copied_state_directory_gets_another_identity_and_sweeps_nothing(
    failpoint: str | None, driver: Driver, site: Site, image: str, tmp_path: Path
) -> None:
    copy = Site(tmp_path / "copy", tmp_path / "copy-run")
    async with site.agent() as agent:
        view = await begin(agent, image)
        first = min(processes(agent, view.id))
        # Not shutil.copytree, which writes out 20 GiB of holes for the storage of each task.
        subprocess.run(["cp", "-a", site.state, copy.state], check=True)
        if failpoint is not None:
            assert driver.ask(verb="hold", failpoint=failpoint, **copy.place)["ended"] == -9
        async with copy.agent() as other:
            assert copy.instance != site.instance
            known = other.tasks.describe(view.id).known
            assert known.stop_code is StopCode.INFRASTRUCTURE_HEALTH
            assert known.stopped_reason == LOST_REASON
            await other.tasks.remove(view.id)
            assert await second_task(other, image) == []
        assert await copy.remains() == []
        assert min(processes(agent, view.id)) == first
        await end(agent, view.id)
    assert await site.remains() == []


async def test_nothing_runs_after_a_reboot_and_the_store_says_so(
    driver: Driver, site: Site, image: str
) -> None:
    id = left_by(driver, site, image)
    killed = site.keepers()
    for keeper in killed:
        keeper.kill()
    for directory in own_cgroups(site):
        (directory / "cgroup.kill").write_text("1") if (
            directory / "cgroup.kill"
        ).exists() else None
    psutil.wait_procs(killed)
    take_cgroups_away(site)
    for claim in site.claims():
        claim.unlink()
    async with site.agent() as agent:
        known = (await stopped(agent, id)).known
        assert known.containers[0].reason == LOST
        await agent.tasks.remove(id)
        assert await second_task(agent, image) == []
    assert await site.remains() == []


@pytest.mark.parametrize("after", ["begun", "found"])
async def test_a_task_whose_directory_was_taken_away_can_still_be_stopped(
    after: str, driver: Driver, site: Site, image: str
) -> None:
    if after == "found":
        id = left_by(driver, site, image)
        shutil.rmtree(site.state / "tasks" / id)
    async with site.agent() as agent:
        if after == "begun":
            id = (await begin(agent, image)).id
            shutil.rmtree(site.state / "tasks" / id)
        await agent.tasks.stop(id)
        assert (await stopped(agent, id)).known.last_status is Status.STOPPED
        await agent.tasks.remove(id)
        assert await second_task(agent, image) == []
    assert await site.remains() == []


@pytest.mark.parametrize("after", ["begun", "found"])
async def test_a_task_whose_cgroups_were_taken_away_has_ended(
    after: str, driver: Driver, site: Site, image: str
) -> None:
    if after == "found":
        id = left_by(driver, site, image)
        take_cgroups_away(site)
    async with site.agent() as agent:
        if after == "begun":
            id = (await begin(agent, image)).id
            await trio.to_thread.run_sync(take_cgroups_away, site)
        assert (await stopped(agent, id)).known.containers[0].exit_code == 137
        await agent.tasks.remove(id)
    assert await site.remains() == []


def own_cgroups(site: Site) -> Iterator[Path]:
    """Version 2 last, deepest first."""
    tops = {root / f"sandbox-{site.instance}" for root in cgroup_roots()}
    for top in sorted((t for t in tops if t.exists()), key=lambda t: (t / "cgroup.kill").exists()):
        for directory, _, _ in os.walk(top, topdown=False):
            yield Path(directory)


def take_cgroups_away(site: Site) -> None:
    for root in cgroup_roots():
        if (kill := root / f"sandbox-{site.instance}" / "cgroup.kill").exists():
            kill.write_text("1")
    for directory in own_cgroups(site):
        if not directory.name.startswith("sandbox-"):
            deadline = time.monotonic() + 5
            while directory.exists() and time.monotonic() < deadline:
                try:
                    directory.rmdir()
                except OSError:
                    time.sleep(0.01)


async def test_a_pull_killed_at_any_moment_is_pulled_again(
    driver: Driver, tmp_path: Path, image: str
) -> None:
    from tests.crash.paths import PATHS

    name = "run to its exit"
    for trial in range(10):
        site = Site(tmp_path / f"state{trial}", tmp_path / f"run{trial}")
        driver.start(verb="run", path=name, image=image, **site.place)
        await trio.sleep(0.02 * trial)
        driver.signal(signal.SIGKILL)
        assert await recovered(site, PATHS[name], image) == []


async def test_how_a_container_ended_is_known_also_of_a_task_that_was_not_yet_running(
    driver: Driver, site: Site, image: str
) -> None:
    """Its task is undone all the same: see ADR 1."""
    driver.ask(
        verb="run", path="run to its exit", image=image, failpoint="keeper.done", **site.place
    )
    with trio.fail_after(20):
        while not list(site.state.glob("tasks/*/app/run.0/exit")):
            await trio.sleep(0.02)
    async with site.agent() as agent:
        (id,) = (view.id for view in agent.tasks.list())
        known = (await stopped(agent, id)).known
        assert known.stop_code is StopCode.TASK_FAILED_TO_START
        assert known.containers[0].exit_code == 7
        assert "line 49\nend\n" in await log_of(agent, id, "app")
        await agent.tasks.remove(id)
    assert await site.remains() == []


async def test_what_cannot_be_undone_is_tried_again_then_kept_apart(site: Site, image: str) -> None:
    """A mount in the way: the task ends all the same, and its ids are given to nobody."""
    async with site.agent() as agent:
        view = await begin(agent, image)
        storage = site.state / "tasks" / view.id / "storage.ext4"
        subprocess.run(["mount", "--bind", storage, storage], check=True)
        try:
            await agent.tasks.stop(view.id)
            known = (await stopped(agent, view.id)).known
            assert known.stop_code is StopCode.USER_INITIATED
            assert known.containers[0].exit_code == 3
            assert (CLAIMS / str(view.desired.id_base)).exists()
            assert await second_task(agent, image) == []
        finally:
            subprocess.run(["umount", storage], check=True)
        await agent.tasks.remove(view.id)
    async with site.agent():
        pass
    assert await site.remains() == []


async def test_stopped_tasks_beyond_those_kept_are_forgotten_by_the_next_agent(
    site: Site, image: str
) -> None:
    async with site.agent() as agent:
        tasks = []
        for _ in range(3):
            tasks.append((await begin(agent, image, "true")).id)
            await stopped(agent, tasks[-1])
        assert {view.id for view in agent.tasks.list()} == set(tasks)
    async with site.agent(stopped_tasks_kept=1) as agent:
        with trio.fail_after(5):
            while len(agent.tasks.list()) > 1:  # each after its directory
                await trio.sleep(0.01)
        assert [view.id for view in agent.tasks.list()] == tasks[-1:]
        assert os.listdir(site.state / "tasks") == tasks[-1:]
        await agent.tasks.remove(tasks[-1])
    assert await site.remains() == []


# A full disk -------------------------------------------------------------------------------


@contextmanager
def small_disk(tmp_path: Path, *options: str) -> Iterator[Path]:
    """ext4, because a task's layers are id-mapped."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", *options, image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> Path:
    """To the last block."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


async def test_a_full_disk_loses_neither_an_exit_code_nor_the_way_back(
    driver: Driver, tmp_path: Path, image: str
) -> None:
    with small_disk(tmp_path) as disk:
        site = Site(disk / "state", tmp_path / "run")
        id = left_by(driver, site, image, "sleep 0.5; echo written; exit 9")
        filler = fill(disk)
        await trio.sleep(1)
        filler.unlink()
        async with site.agent() as agent:
            known = (await stopped(agent, id)).known
            assert known.containers[0].exit_code == 9
            await agent.tasks.remove(id)
            assert await second_task(agent, image) == []
        assert await site.remains() == []


async def test_an_agent_that_cannot_write_its_store_ends_and_its_task_goes_on(
    driver: Driver, tmp_path: Path, image: str
) -> None:
    with small_disk(tmp_path) as disk:
        site = Site(disk / "state", tmp_path / "run")
        driver.start(verb="hold", image=image, script="sleep 0.5; exit 9", **site.place)
        id = driver.hear("ready")["task"]
        (site.state / "reserve").unlink()
        filler = fill(disk)
        assert driver.hear("ended")["ended"] == 1
        filler.unlink()
        async with site.agent() as agent:
            known = (await stopped(agent, id)).known
            assert known.containers[0].exit_code == 9
            await agent.tasks.remove(id)
        assert await site.remains() == []


async def test_on_a_full_disk_tasks_can_be_looked_at_and_forgotten(
    driver: Driver, tmp_path: Path, image: str
) -> None:
    with small_disk(tmp_path) as disk:
        site = Site(disk / "state", tmp_path / "run")
        reserve = site.state / "reserve"
        async with site.agent() as agent:
            ids = [(await begin(agent, image, "exit 7")).id for _ in range(2)]
            for id in ids:
                await stopped(agent, id)
            assert reserve.stat().st_blocks * 512 >= 1 << 20
            filler = fill(disk)
            await agent.tasks.remove(ids.pop())
        assert not reserve.exists()
        filler.unlink()
        async with site.agent():
            assert reserve.exists(), "there is room again"

        filler = fill(disk)
        async with site.agent() as agent:
            assert [view.id for view in agent.tasks.list()] == ids
            await agent.tasks.remove(ids.pop())
        filler.unlink()
        assert await site.remains() == []


async def test_an_agent_without_any_room_says_so_and_what_to_do(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        site = Site(disk / "state", tmp_path / "run")
        async with site.agent():
            pass
        (site.state / "reserve").unlink()
        fill(disk)
        with pytest.raises(StoreError) as full:
            async with site.agent():
                pass
        assert str(full.value).startswith(
            f"no space left on the disk of {site.state}/store.db: free"
        )
        with pytest.raises(ConfigError, match="No space left on device"):
            async with Site(disk / "other", tmp_path / "run").agent():
                pass
