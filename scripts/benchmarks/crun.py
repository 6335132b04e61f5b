"""crun with the same image, started and awaited from a mount namespace where it is willing to run.

    python -m scripts.benchmarks.crun BUNDLE     answers "COUNT WIDTH" lines with seconds

crun refuses a host that has cgroup v2 beside v1, unless it cannot see the v2 mount. So this runs in
a private mount namespace without it. The namespace is made once, before anything is timed: its cost
is in no figure. What is timed here is posix_spawn to the end of the last wait.

crun keeps its state in memory: /run has a tmpfs in that namespace, as Debian has one everywhere.
The bundle is what `crun spec` writes, with another command and no terminal; it has a read-only root
and no seccomp by itself, and its rlimits are taken out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = ["/bin/true"]


def make_bundle(bundle: Path, layout: Path) -> None:
    """A bundle for an OCI layout of one layer."""
    root = bundle / "rootfs"
    root.mkdir(parents=True)
    blobs = layout / "blobs"

    def read(digest: str) -> bytes:
        return (blobs / digest.replace(":", "/")).read_bytes()

    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(read(index["manifests"][0]["digest"]))
    for layer in manifest["layers"]:
        archive = blobs / layer["digest"].replace(":", "/")
        subprocess.run(["tar", "-xzf", archive, "-C", root], check=True)
    subprocess.run(["crun", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_bytes())
    config["process"].update(args=COMMAND, terminal=False)
    del config["process"]["rlimits"]
    assert config["root"]["readonly"] and "seccomp" not in config["linux"]
    (bundle / "config.json").write_text(json.dumps(config))


class Crun:
    """The process in that namespace; its calls block."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, count: int, width: int = 1) -> float:
        """Seconds for `count` containers, `width` at a time, all of which must succeed."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(f"{count} {width}\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit("bench: crun failed")
        return float(answer)


@contextmanager
def serving(bundle: Path) -> Iterator[Crun]:
    server = subprocess.Popen(
        [
            *("unshare", "--mount", sys.executable, "-m", "scripts.benchmarks.crun", bundle),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:  # its end is the end of its input
        yield Crun(server)


# ---------------------------------------------------------------------- in the namespace


def main(bundle: str) -> None:
    for mount in hybrid_mounts(Path("/proc/self/mountinfo").read_text()):
        subprocess.run(["umount", mount], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    number = 0
    for line in sys.stdin:
        count, width = map(int, line.split())
        names = [f"sandbox-bench-{os.getpid()}-{number + each}" for each in range(count)]
        number += count
        print(run_all(bundle, names, width), flush=True)


def hybrid_mounts(mountinfo: str) -> list[str]:
    """Where cgroup v2 is mounted on a host that has v1 too."""
    fields = [line.split() for line in mountinfo.splitlines()]
    mounts = [(f[f.index("-") + 1], f[4]) for f in fields]
    if not any(kind == "cgroup" for kind, _ in mounts):
        return []
    return [where for kind, where in mounts if kind == "cgroup2"]


def run_all(bundle: str, names: list[str], width: int) -> float:
    began = time.perf_counter()
    running = 0
    for name in names:
        if running == width:
            reap()
            running -= 1
        arguments = ["crun", "run", "--bundle", bundle, name]
        os.posix_spawn("/usr/bin/crun", arguments, os.environ)
        running += 1
    for _ in range(running):
        reap()
    return time.perf_counter() - began


def reap() -> None:
    if os.wait()[1]:
        raise SystemExit("bench: a container of crun's failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
