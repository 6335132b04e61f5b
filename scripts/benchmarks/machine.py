"""Where a run was made, with what."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

from scripts.benchmarks.figures import table

PACKAGES = (
    "crun",
    "podman",
    "docker.io",
    "containerd",
    "docker-registry",
    "tar",
    "libarchive-tools",
)


def load() -> str:
    """Of the machine, over the last one, five and fifteen minutes."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def described(load_before: str) -> str:
    rows = [
        ("date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
        ("commit", commit()),
        ("processors", f"{os.cpu_count()} of {cpu_model()}"),
        ("memory", f"{field('/proc/meminfo', 'MemTotal') / (1 << 20):.1f} GiB"),
        ("kernel", platform.release()),
        ("system", release()),
        ("file system", "ext4 as `mkfs.ext4` makes it, on a loop device"),
        ("Python", platform.python_version()),
        *((package, version(package)) for package in PACKAGES),
        ("load before the run", load_before),
    ]
    return table(("", ""), rows)


def commit() -> str:
    dirty = output("git", "status", "--porcelain", "--", "sandbox", "native")
    return output("git", "rev-parse", "--short", "HEAD") + (" and changes" if dirty else "")


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def field(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def release() -> str:
    return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")


def version(package: str) -> str:
    return output("dpkg-query", "--show", "--showformat=${Version}", package)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
