"""Pulling an image of several layers until it can be used, beside three other engines.

Every pull begins with an empty directory on the same disk and ends when the command that was asked
for it has ended; agents and daemons run already. The file system is synchronised before each, and
what the pull before has made is deleted before that; the page cache is left as it is, so all of
them read from a registry whose files are in memory.

The engines live here alone: own directories, own sockets, no network of their own, and what they
mount or put into /run goes with their mount namespace.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sandbox import sync
from scripts.benchmarks.agents import SANDBOX, running_agent, wait_until_there
from scripts.benchmarks.figures import Figure, Section

Pull = Callable[[], None]
Engine = Callable[[Path, str], AbstractContextManager[Pull]]
OURS = "Sandbox, `sandbox image pull`"


def pull(directory: Path, image: str, rounds: int) -> Section:
    times: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        for name, engine in ENGINES.items():
            place = directory / "pull"
            place.mkdir()
            try:
                with engine(place, image) as fetch:
                    os.sync()
                    began = time.perf_counter()
                    fetch()
                    times[name].append(time.perf_counter() - began)
            finally:
                shutil.rmtree(place)
    medians = {name: statistics.median(each) for name, each in times.items()}
    fastest = min((name for name in ENGINES if "Sandbox" not in name), key=medians.__getitem__)
    ratio = medians[OURS] / medians[fastest]
    return Section(
        "Pull",
        f"The image `many` (7 layers, 16 000 entries, 220 MB unpacked) from a registry on loopback "
        f"until it can be used. {rounds} rounds in turns; each pull into an empty directory on the "
        "same file system, after a `sync`; agents and daemons run already; the page cache is not "
        "dropped for anybody. Only Sandbox has the unpacked files on disk when it says that it is "
        "done.",
        ("", "median s", "min s", "max s"),
        [seconds(name, each) for name, each in times.items()],
        [Figure(f"pull to ready, of {fastest}'s median", ratio, "x", "at most", 1.0)],
    )


def seconds(name: str, times: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{v:.2f}" for v in (statistics.median(times), min(times), max(times))))


# ---------------------------------------------------------------------- ours


@contextmanager
def sandbox_command(place: Path, image: str) -> Iterator[Pull]:
    with running_agent(place / "state") as agent:
        yield command([SANDBOX, "image", "pull", image], agent.environment)


@contextmanager
def sandbox_api(place: Path, image: str) -> Iterator[Pull]:
    """Embedded in this process."""
    with sync.open_sandbox(state_dir=place / "state") as sb:

        def fetch() -> None:
            sb.pull(image)

        yield fetch


# ---------------------------------------------------------------------- the others

SHELL = 'for each in /run /dev/shm; do mount -t tmpfs none "$each"; done; exec "$@"'
ALONE = ["unshare", "--mount", "sh", "-ec", SHELL, "sh"]


@contextmanager
def podman(place: Path, image: str) -> Iterator[Pull]:
    options = [f"--root={place}/root", f"--runroot={place}/run", f"--tmpdir={place}/tmp"]
    options += ["--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--events-backend=none"]
    arguments = ["podman", *options, "pull", "--quiet", "--tls-verify=false", image]
    yield command([*ALONE, *arguments])


@contextmanager
def docker(place: Path, image: str) -> Iterator[Pull]:
    socket, config = place / "docker.sock", place / "config.json"
    config.write_text("{}")  # not the one of the host
    options = [f"--host=unix://{socket}", f"--data-root={place}/data", f"--exec-root={place}/exec"]
    options += [f"--pidfile={place}/pid", f"--config-file={config}", "--storage-driver=overlay2"]
    options += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"]
    with daemon(["dockerd", *options], socket, place / "log"):
        yield command(["/usr/bin/docker", f"--host=unix://{socket}", "pull", "--quiet", image])


@contextmanager
def ctr(place: Path, image: str) -> Iterator[Pull]:
    socket, config = place / "containerd.sock", place / "config.toml"
    config.write_text(
        f'version = 2\nroot = "{place}/root"\nstate = "{place}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{socket}"\n[ttrpc]\naddress = "{socket}.ttrpc"\n'
    )
    with daemon(["containerd", "--config", str(config)], socket, place / "log"):
        options = ["--snapshotter=overlayfs", "--plain-http"]
        yield command(["ctr", f"--address={socket}", "images", "pull", *options, image])


ENGINES: dict[str, Engine] = {
    OURS: sandbox_command,
    "Sandbox, Python API": sandbox_api,
    "`podman pull`": podman,
    "`docker pull`": docker,
    "`ctr images pull`": ctr,
}


@contextmanager
def daemon(arguments: Sequence[str], socket: Path, log: Path) -> Iterator[None]:
    """Ended by its pid, or with us."""
    private = [*ALONE, "setpriv", "--pdeathsig", "TERM"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*private, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until_there(socket, process)
        yield
    finally:
        process.terminate()
        process.wait()


def command(arguments: Sequence[str], environment: dict[str, str] | None = None) -> Pull:
    def run() -> None:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"bench: {arguments[0]} failed:\n{done.stdout}{done.stderr}")

    return run
