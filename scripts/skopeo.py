"""`skopeo copy` as tests and scripts/registry use it."""

from __future__ import annotations

import os
import subprocess
import tempfile


def copy(source: str, target: str, *options: str) -> None:
    """Root's skopeo would remember where it saw which blob, in one file for the whole machine.

    A guest reads that file while the host writes it, and then skopeo ends with a panic; and what it
    remembers are registries that are long gone. So it is told, as podman tells it, that it does not
    run for root, and is given a home that goes away.
    """
    plain = ["--dest-tls-verify=false"] if target.startswith("docker://") else []
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", *plain, *options, source, target]
    with tempfile.TemporaryDirectory(prefix="sandbox-skopeo-") as home:
        own = {"_CONTAINERS_ROOTLESS_UID": "1", "XDG_DATA_HOME": home}
        subprocess.run(command, env=os.environ | own, check=True)
