"""`sandbox doctor --deep`: real tasks on this host, and what they say of themselves.

An agent of its own, in a state directory of its own beside the configured one, is embedded here: a
running agent is not asked and does not notice. The image is the probe and a table of users. The
probe runs by every way in which a program gets into a task; `sandbox.model.protections` says what
it has to report. Nothing is left of it, whatever happens meanwhile.

The agent is imported at the top, so `doctor` imports this module late.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from sandbox.agent import Agent
from sandbox.client.api import Sandbox, Task
from sandbox.client.embedded import Embedded, host, log_to_stderr
from sandbox.client.nursery import open_nursery, unwrapped
from sandbox.client.place import Place
from sandbox.errors import ConfigError, SandboxError
from sandbox.model.judgement import Host
from sandbox.model.observed import ExecRequest
from sandbox.model.protections import WAYS
from sandbox.model.request import Streams
from sandbox.model.task import (
    ContainerDefinition,
    HealthCheck,
    KernelCapabilities,
    KeyValuePair,
    LinuxParameters,
)

PROBE: Final = Path(__file__).resolve().parents[1] / "_bin" / "probe"
PATIENCE_S: Final = 120.0
"""All ways together take some seconds; a health check has to wait for its interval of five."""

CAP_SYS_RESOURCE: Final = 24
CONTAINER: Final = "probe"

Report = dict[str, Any]
Tell = Callable[[str], None]

BY_ITSELF: Final[dict[str, dict[str, Any]]] = {
    "other user": {"user": "app"},
    "set-uid program": {"user": "app", "command": ("/probe-set-uid",)},
    "read-only root": {"readonly_root_filesystem": True},
    "with SYS_PTRACE": {
        "linux_parameters": LinuxParameters(capabilities=KernelCapabilities(add=("SYS_PTRACE",)))
    },
    "without NET_RAW": {
        "linux_parameters": LinuxParameters(capabilities=KernelCapabilities(drop=("NET_RAW",)))
    },
    "init": {"linux_parameters": LinuxParameters(init_process_enabled=True)},
    "terminal": {"pseudo_terminal": True},
    "variables": {"environment": (KeyValuePair(name="ASKED_FOR", value="yes"),)},
}
"""Ways in of a first process: name -> what its container's definition has besides the probe."""

ENTERING: Final = {
    "exec": ExecRequest(command=("/probe",)),
    "exec as other user": ExecRequest(command=("/probe",), user="app"),
    "exec in a terminal": ExecRequest(command=("/probe",), terminal=True),
}

USERS: Final = {
    "etc/passwd": b"root:x:0:0::/root:/probe\napp:x:1000:1000::/home/app:/probe\n",
    "etc/group": b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
}


def image_archive(file: Path, probe: Path = PROBE) -> None:
    """A tar with the probe, as /probe and set-uid, and two users."""
    with tarfile.open(file, "w") as archive:
        for path in ("dev", "etc", "home", "home/app", "proc", "root", "sys"):
            _add(archive, path, tarfile.DIRTYPE, 0o755)
        _add(archive, "tmp", tarfile.DIRTYPE, 0o1777)
        for path, text in USERS.items():
            _add(archive, path, tarfile.REGTYPE, 0o644, text)
        for path, mode in (("probe", 0o755), ("probe-set-uid", 0o4755)):
            _add(archive, path, tarfile.REGTYPE, mode, probe.read_bytes())


def _add(archive: tarfile.TarFile, path: str, kind: bytes, mode: int, content: bytes = b"") -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.size = kind, mode, len(content)
    archive.addfile(entry, io.BytesIO(content))


class Prober:
    """Runs the probe on an agent. What it starts has ended when its block is left."""

    def __init__(self, agent: Agent, image: str) -> None:
        self._agent = agent
        self._image = image
        self._sandbox = Sandbox(Embedded(agent), on_exit="stop")

    @classmethod
    @asynccontextmanager
    async def on(cls, agent: Agent, scratch: Path) -> AsyncIterator[Prober]:
        archive = scratch / "probe.tar"
        await trio.to_thread.run_sync(image_archive, archive)
        image = await agent.images.import_(archive, "sandbox/probe", cmd=("/probe",))
        archive.unlink()
        prober = cls(agent, image.reference)
        try:
            yield prober
        finally:
            with trio.CancelScope(shield=True):  # bounded by the stop timeout below
                await prober._sandbox.close()

    async def collect(self, tell: Tell) -> dict[str, Report]:
        """The report of each way in."""
        reports: dict[str, Report] = {}
        async with open_nursery() as nursery:
            nursery.start_soon(self._check_health, reports, tell)  # most of it is waiting
            for way, members in BY_ITSELF.items():
                reports[way] = await self._to_its_end(await self._start(**members))
                tell(way)
            async with self.staying() as task:
                reports["first process"] = await self.first_report(task)
                tell("first process")
                for way, request in ENTERING.items():
                    reports[way] = await self._enter(task, request)
                    tell(way)
        return reports

    async def _check_health(self, reports: dict[str, Report], tell: Tell) -> None:
        check = HealthCheck(command=("CMD", "/probe", "-o", "/report"), interval=5)
        task = await self._start(command=("/probe", "-w", "/report"), health_check=check)
        reports["health check"] = await self._to_its_end(task)
        tell("health check")

    async def _start(self, **members: Any) -> Task:
        given: dict[str, Any] = {"name": CONTAINER, "image": self._image, "stop_timeout": 2}
        return await self._sandbox.run_task(containers=(ContainerDefinition(**given | members),))

    async def _to_its_end(self, task: Task) -> Report:
        status = await task.wait()
        task.raise_failure()
        written = b"".join([record.data async for record in task.logs()])
        if status != 0:
            raise SandboxError(f"the probe ended with {status}: {_last_line(written)}")
        return parsed(written)

    @asynccontextmanager
    async def staying(self) -> AsyncIterator[Task]:
        """A task whose first process reports, and stays until the block is left."""
        task = await self._start(command=("/probe", "-s"))
        await task.wait_running()
        yield task
        with suppress(SandboxError):
            await task.kill(signal.SIGKILL)
        await task.wait()

    async def first_report(self, task: Task) -> Report:
        written = b""
        async for record in task.logs(follow=True):
            written += record.data
            if written.endswith(b"}\n"):
                break
        return parsed(written)

    async def _enter(self, task: Task, request: ExecRequest) -> Report:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        written = bytearray()

        async def read() -> None:
            async with trio.lowlevel.FdStream(ours) as stream:
                async for data in stream:
                    written.extend(data)

        async with open_nursery() as nursery:
            nursery.start_soon(read)
            await self._agent.tasks.exec(task.id, request, streams=Streams(stdout=theirs))
        return parsed(bytes(written))


def parsed(written: bytes) -> Report:
    """The first JSON object of what the probe wrote."""
    try:
        report: Report = json.JSONDecoder().raw_decode(written.decode())[0]
    except ValueError as error:
        raise SandboxError(f"the probe's report cannot be read: {error}") from None
    return report


def _last_line(written: bytes) -> str:
    return (written.decode(errors="replace").splitlines() or ["it wrote nothing"])[-1]


def this_host(status: str = "/proc/self/status") -> Host:
    lines = (line.split() for line in Path(status).read_text().splitlines())
    effective = next(int(line[1], 16) for line in lines if line[0] == "CapEff:")
    namespaces = {entry.name: os.readlink(entry) for entry in Path("/proc/self/ns").iterdir()}
    return Host(namespaces, bool(effective >> CAP_SYS_RESOURCE & 1))


# For the command ---------------------------------------------------------------------------


def examine(state_dir: Path, tell: Tell) -> dict[str, Report]:
    """The reports of real tasks on this host, by way in; SandboxError where none can run.

    `tell` is told each way that is done.
    """
    if not PROBE.exists():
        raise ConfigError(f"{PROBE}: the probe is not there: build it with scripts/native")
    log_to_stderr()
    with unwrapped(), _scratch(state_dir) as (state, run):
        return trio.run(_examine, state, run, tell)


async def _examine(state: Path, run: Path, tell: Tell) -> dict[str, Report]:
    async with open_nursery() as nursery:
        await nursery.start(_leave_on_signals)
        with trio.move_on_after(PATIENCE_S):
            async with (
                host(Place(f"{state}", f"{run}"), {"warm_slots": 2}) as agent,
                Prober.on(agent, state) as prober,
            ):
                reports = await prober.collect(tell)
            nursery.cancel_scope.cancel()
            return reports
        raise SandboxError(f"tasks on this host take more than {PATIENCE_S:g} seconds to say this")


async def _leave_on_signals(task_status: trio.TaskStatus[None]) -> None:
    """A terminal that goes away, or kill(1), ends the tasks first."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            raise SandboxError(f"ended by {signal.Signals(number).name}")


@contextmanager
def _scratch(state_dir: Path) -> Iterator[tuple[Path, Path]]:
    """A state directory on the file system of the configured one, which is what tasks get.

    The run directory is elsewhere: the path of a socket is bounded (unix(7)).
    """
    near = state_dir.absolute()
    existing = next(path for path in (near, *near.parents) if path.is_dir())
    with ExitStack() as stack:
        made = []
        for directory, prefix in ((existing, ".doctor-"), (None, "sandbox-doctor-")):
            made.append(Path(tempfile.mkdtemp(prefix=prefix, dir=directory)))
            stack.callback(shutil.rmtree, made[-1])
        yield made[0], made[1]


def grouped(failed: Mapping[str, list[Any]]) -> list[tuple[Any, list[str]]]:
    """Equal findings of several ways in as one, with the ways."""
    ways: dict[Any, list[str]] = {}
    for way in WAYS:
        for finding in failed.get(way, ()):
            ways.setdefault(finding, []).append(way)
    return list(ways.items())
