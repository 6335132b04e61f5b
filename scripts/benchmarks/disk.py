"""A disk of the run's own, as Debian would make it: ext4 with its journal, on a loop device.

What is on the host's disk, and what was deleted there a moment ago, would be part of the figures
otherwise. Measured: an ext4 without a journal steps over every inode that was deleted in the last
minutes when it makes a new one; the fourth pull in a row took five times as long as the first, and
each of a thousand launches in a row longer than the one before.
The mount is seen by this process and its children alone, and goes with the last of them.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE_BYTES = 16 << 30
"""Of a sparse file."""


@contextmanager
def own_disk() -> Iterator[Path]:
    """Needs a mount namespace of its own (scripts/bench makes one)."""
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-", dir="/var/tmp") as scratch:
        device, top = Path(scratch, "disk"), Path(scratch, "top")
        with device.open("xb") as file:
            os.truncate(file.fileno(), SIZE_BYTES)
        top.mkdir()
        run("mkfs.ext4", "-q", device)
        run("mount", "-o", "loop", device, top)
        try:
            yield top
        finally:
            run("umount", top)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
