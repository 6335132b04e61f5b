"""Root of the host does to a live task, or to what its agent keeps, what nobody should.

A task goes on as long as there is something of it that can, and ends with a cause that says what is
known. Whatever was done to it, another task runs beside it unharmed, the next one starts, and
nothing is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.errors import AgentRunning
from sandbox.kernel.idranges import CLAIMS
from sandbox.model.request import RunRequest
from sandbox.model.task import KeeperIdentity, MountPoint, Status, StopCode, Volume
from sandbox.runtime import containers
from scripts.make_image import PATH, LayerWriter, Layout, busybox
from tests.crash.conftest import SETTINGS, Site
from tests.crash.paths import UNTIL_TOLD, app, log_of, task, until_running, wait
from tests.crash.test_agents import LOST, begin, end, stopped
from tests.crash.test_tasks import second_task
from tests.leaks import cgroup_roots
from tests.sibling import unharmed

GOES_S = 10
NAMESPACES = {"mount": "mnt", "net": "net"}


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A task with one container and a volume, at the places where root of the host finds it."""

    agent: Agent
    id: str

    @property
    def keeper(self) -> KeeperIdentity:
        keeper = self.agent.tasks.describe(self.id).known.containers[0].keeper
        assert keeper is not None
        return keeper

    @property
    def directory(self) -> Path:
        return self.agent.state_dir / "tasks" / self.id

    def tell(self, process: str, *numbers: int) -> None:
        pid = {"keeper": self.keeper.pid, "container": self.keeper.init_pid}[process]
        for number in numbers:
            os.kill(pid, number)

    def take(self, path: str) -> None:
        shutil.rmtree(self.directory / path)

    def take_stored(self, path: str) -> None:
        """By a path that only the agent has."""
        supervisor = self.agent.supervisors.get(self.id)
        assert supervisor is not None and supervisor.scene.storage is not None
        shutil.rmtree(supervisor.scene.storage.layers.path / path)

    def take_work(self) -> None:
        """The writable layer's own, which overlayfs has open."""
        supervisor = self.agent.supervisors.get(self.id)
        assert supervisor is not None and supervisor.scene.storage is not None
        found = list((supervisor.scene.storage.layers.path / "app").glob("work*"))
        assert found
        for work in found:
            shutil.rmtree(work)

    def take_storage(self) -> None:
        (self.directory / "storage.ext4").unlink()

    def take_log(self) -> None:
        segments = list((self.directory / "app/run.0/log").iterdir())
        assert segments
        for segment in segments:
            segment.unlink()

    def take_claim(self) -> None:
        (CLAIMS / str(self.agent.tasks.describe(self.id).desired.id_base)).unlink()

    def take_cgroups(self) -> None:
        """In the order in which the kernel lets them go: its processes, then version 2 last."""
        tops = [
            top
            for root in cgroup_roots()
            if (top := root / f"sandbox-{self.agent.instance}/task-{self.id}").exists()
        ]
        (unified,) = (top for top in tops if (top / "cgroup.kill").exists())
        (unified / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + GOES_S
        while any(top.exists() for top in tops) and time.monotonic() < deadline:
            for top in [*(top for top in tops if top != unified), unified]:
                for directory, _, _ in os.walk(top, topdown=False):
                    with suppress(OSError):  # somebody is in it still, or its agent was faster
                        os.rmdir(directory)

    def enter(self, namespace: str, *command: str) -> None:
        file = f"/proc/{self.keeper.init_pid}/ns/{NAMESPACES[namespace]}"
        subprocess.run(
            ["nsenter", f"--{namespace}={file}", *command], check=True, capture_output=True
        )

    def unmount(self) -> None:
        for place in ("/shared", "/dev/shm", "/proc"):
            self.enter("mount", "/bin/busybox", "umount", "-l", place)


@dataclass(frozen=True, kw_only=True)
class Deed:
    do: Callable[[Victim], None]
    exit_code: int | None = 3
    reason: str | None = None
    goes_on: bool = True
    """Until its user stops it."""


STOPPED, CONTINUED, KILLED = signal.SIGSTOP, signal.SIGCONT, signal.SIGKILL

DEEDS: Mapping[str, Deed] = {
    "its first process is stopped": Deed(do=lambda v: v.tell("container", STOPPED), exit_code=137),
    "its first process is stopped and continued": Deed(
        do=lambda v: v.tell("container", STOPPED, CONTINUED)
    ),
    "its first process is killed": Deed(
        do=lambda v: v.tell("container", KILLED), exit_code=137, goes_on=False
    ),
    "its keeper is stopped": Deed(
        do=lambda v: v.tell("keeper", STOPPED), exit_code=None, reason=LOST
    ),
    "its keeper is stopped and continued": Deed(do=lambda v: v.tell("keeper", STOPPED, CONTINUED)),
    "its keeper is killed": Deed(
        do=lambda v: v.tell("keeper", KILLED), exit_code=None, reason=LOST, goes_on=False
    ),
    "its cgroups are taken away": Deed(do=Victim.take_cgroups, exit_code=137, goes_on=False),
    "its directory is taken away": Deed(do=lambda v: v.take(".")),
    "its storage is taken away": Deed(do=Victim.take_storage),
    "its writable layer is taken away": Deed(do=lambda v: v.take_stored("app/upper")),
    "its work directory is taken away": Deed(do=Victim.take_work),
    "its status directory is taken away": Deed(do=lambda v: v.take("app/run.0")),
    "its log is taken away": Deed(do=Victim.take_log),
    "its volume is taken away": Deed(do=lambda v: v.take_stored("volumes/shared")),
    "its id range is given away": Deed(do=Victim.take_claim),
    "its file systems are unmounted": Deed(do=Victim.unmount),
    "its loopback interface is taken down": Deed(
        do=lambda v: v.enter("net", "ip", "link", "set", "lo", "down")
    ),
    "its sysctls are changed": Deed(
        do=lambda v: v.enter("net", "sysctl", "-q", "net.ipv4.ip_forward=1")
    ),
}


async def victim(agent: Agent, image: str) -> Victim:
    shared = (MountPoint(source_volume="shared", container_path="/shared"),)
    container = app(image, UNTIL_TOLD, mount_points=shared)
    wanted = task(container, volumes=(Volume(name="shared"),))
    view = await agent.tasks.run(RunRequest(definition=wanted))
    await until_running(agent, view.id)
    with trio.fail_after(20):
        while "ready" not in await log_of(agent, view.id, "app"):
            await trio.sleep(0.01)
    return Victim(agent=agent, id=view.id)


@pytest.mark.parametrize("deed", DEEDS)
async def test_whatever_root_does_to_a_task_it_ends_rightly_and_alone(
    deed: str, site: Site, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_TELLS_S", 1.0)
    done = DEEDS[deed]
    async with site.agent() as agent, unharmed(agent, image):
        one = await victim(agent, image)
        await trio.to_thread.run_sync(done.do, one)
        assert await second_task(agent, image) == []
        if done.goes_on:
            assert agent.tasks.describe(one.id).known.last_status is Status.RUNNING
            await agent.tasks.stop(one.id)
        known = (await stopped(agent, one.id)).known
        container = known.containers[0]
        assert (container.exit_code, container.reason) == (done.exit_code, done.reason)
        assert known.stop_code is (
            StopCode.USER_INITIATED if done.goes_on else StopCode.ESSENTIAL_CONTAINER_EXITED
        )
        await agent.tasks.remove(one.id)
        assert await second_task(agent, image) == []
    assert await site.remains() == []


# What an agent keeps -----------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["agent.sock", "."])
async def test_an_agent_whose_socket_is_taken_away_keeps_its_tasks_and_the_next_has_one(
    gone: str, site: Site, image: str
) -> None:
    async with site.agent() as agent:
        view = await begin(agent, image)
        if gone == ".":
            shutil.rmtree(site.run)
        else:
            (site.run / gone).unlink()
        assert await second_task(agent, image) == []
        assert agent.tasks.describe(view.id).known.last_status is Status.RUNNING
    async with site.agent() as agent:
        assert (site.run / "agent.sock").is_socket()
        await end(agent, view.id)
    assert await site.remains() == []


async def test_without_its_lock_file_a_state_directory_still_has_one_agent(
    site: Site, image: str, tmp_path: Path
) -> None:
    async with site.agent() as agent:
        view = await begin(agent, image)
        (site.state / "lock").unlink()
        with pytest.raises(AgentRunning):
            async with open_agent(site.state, tmp_path / "other", SETTINGS):
                pass
        assert agent.tasks.describe(view.id).known.last_status is Status.RUNNING
        await end(agent, view.id)
    assert await site.remains() == []


async def test_an_id_range_that_was_given_away_is_claimed_again_by_the_next_agent(
    site: Site, image: str
) -> None:
    async with site.agent() as agent:
        one = await victim(agent, image)
        one.take_claim()
    async with site.agent() as agent:
        base = agent.tasks.describe(one.id).desired.id_base
        assert CLAIMS / str(base) in site.claims()
        await end(agent, one.id)
    assert await site.remains() == []


@pytest.fixture
def other_image(tmp_path: Path) -> str:
    """With a layer of its own, so that nobody else loses by its loss."""

    def layer(writer: LayerWriter) -> None:
        busybox(writer)
        writer.file("other", b"")

    layout = Layout(tmp_path / "other")
    layout.image("latest", [layout.layer(layer)], {"Env": [PATH], "Cmd": ["sh"]})
    return f"oci:{tmp_path / 'other'}:latest"


@pytest.mark.parametrize("gone", ["layers", "blobs"])
async def test_an_image_that_was_taken_away_is_pulled_again(
    gone: str, site: Site, image: str, other_image: str
) -> None:
    async with site.agent() as agent, unharmed(agent, image):
        before = set((site.state / "images" / gone / "sha256").iterdir())
        one = await victim(agent, other_image)
        for path in set((site.state / "images" / gone / "sha256").iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert await second_task(agent, other_image) == []
        await agent.tasks.stop(one.id)
        assert (await stopped(agent, one.id)).known.stop_code is StopCode.USER_INITIATED
        await agent.tasks.remove(one.id)
    assert await site.remains() == []


async def test_without_its_keeper_an_agent_starts_nothing_says_why_and_keeps_what_runs(
    site: Site, image: str, tmp_path: Path
) -> None:
    async with site.agent() as agent:
        kept = agent.node.keeper
        agent.node.keeper = Path(shutil.copy(kept, tmp_path / "keeper"))
        async with unharmed(agent, image):
            one = await victim(agent, image)
            agent.node.keeper.unlink()
            failed = await agent.tasks.run(RunRequest(definition=task(app(image, "true"))))
            with trio.fail_after(20):
                await wait(agent, failed.id)
            known = agent.tasks.describe(failed.id).known
            assert known.stop_code is StopCode.TASK_FAILED_TO_START
            assert f"{tmp_path}/keeper: No such file or directory" in (
                known.containers[0].reason or known.stopped_reason or ""
            )
            await agent.tasks.remove(failed.id)
            shutil.copy(kept, agent.node.keeper)  # for what the sibling is asked
            await end(agent, one.id)
        assert await second_task(agent, image) == []
    assert await site.remains() == []


async def test_what_others_have_put_beside_ours_is_left_alone(site: Site, image: str) -> None:
    async with site.agent() as agent:
        view = await begin(agent, image)
    tops = [t for root in cgroup_roots() if (t := root / f"sandbox-{site.instance}").exists()]
    other = "0000" if site.instance != "0000" else "1111"
    within = [top / "theirs" for top in tops]
    beside = [top.with_name(f"sandbox-{other}") for top in tops]
    files = [
        site.state / "theirs",
        site.state / "tasks/theirs",
        site.state / f"tasks/{view.id}.old",
        site.state / "images/theirs",
        site.state / "images/layers/theirs",
        site.state / "images/layers/sha256/theirs",
        CLAIMS / "theirs",
    ]
    with ExitStack() as undo:
        for path in (*within, *beside, *files):
            path.mkdir()
            undo.callback(path.rmdir)
        theirs = undo.enter_context(subprocess.Popen(["sleep", "1000"]))
        undo.callback(theirs.kill)
        for path in within:
            (path / "cgroup.procs").write_text(str(theirs.pid))
        (site.state / "tasks/README").touch()
        undo.callback((site.state / "tasks/README").unlink)
        async with site.agent() as agent:
            await end(agent, view.id)
            assert await second_task(agent, image) == []
            await agent.images.prune(unused=True)
        async with site.agent() as agent:
            assert await second_task(agent, image) == []
        assert theirs.poll() is None
    async with site.agent():
        pass
    assert await site.remains() == []
