"""What another implementation makes of an image: `skopeo copy`, then `umoci unpack`.

It reads hostile bytes as root, so it gets a mount namespace in which nothing but its own directory
can be written, a network namespace of its own, and limits.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SHELL = 'mount --bind "$1" "$1"; mount -o remount,bind,ro /; ulimit -f 4096; shift; exec "$@"'
TIMED_OUT = 124
"""The exit status of timeout(1)."""
ALONE = ["timeout", "20", "unshare", "--mount", "--net", "sh", "-ec", SHELL, "sh"]


class UmociRefused(Exception):
    """One of the two programs did not want it."""


def unpack(layout: Path, place: Path) -> Path:
    """A bundle of `latest` of the layout, in the empty directory `place`."""
    (place / "home").mkdir()
    copy = ["skopeo", "--insecure-policy", "--tmpdir", str(place), "copy", "--quiet"]
    _run(place, [*copy, f"oci:{layout}:latest", f"oci:{place}/copy:latest"])
    _run(place, ["umoci", "unpack", "--image", f"{place}/copy:latest", str(place / "bundle")])
    return place / "bundle"


def _run(place: Path, command: Sequence[str]) -> None:
    own = {"_CONTAINERS_ROOTLESS_UID": "1", "XDG_DATA_HOME": str(place / "home")}
    done = subprocess.run(
        [*ALONE, str(place), *command], env=os.environ | own, capture_output=True, text=True
    )
    if done.returncode == TIMED_OUT:
        raise TimeoutError(" ".join(command))
    if done.returncode != 0:
        raise UmociRefused(done.stderr.strip().splitlines()[-1] if done.stderr else "")
