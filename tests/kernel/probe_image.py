"""An image with busybox and the probe, and what the probe says in tasks of all kinds.

The image is an OCI layout, so no registry is needed. `collect` runs the probe once in each way in
which a program gets into a task; the tests then only read its reports.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.make_image import PATH, LayerWriter, Layout, busybox

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "sandbox/_bin/probe"

Report = dict[str, Any]
Write = Callable[[LayerWriter], None]


def probe(layer: LayerWriter) -> None:
    """As /probe, and as /probe-set-uid, which anybody runs as root."""
    layer.file("probe", PROBE.read_bytes(), 0o755)
    layer.file("probe-set-uid", PROBE.read_bytes(), 0o4755)


@dataclass
class Images:
    """Makes images in one OCI layout; busybox and the probe are the first layers of each."""

    directory: Path
    _layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self._layout = Layout(self.directory)

    @functools.cached_property
    def _base(self) -> list[Any]:
        return [self._layout.layer(busybox), self._layout.layer(probe)]

    def make(self, tag: str, *more: Write, **config: Any) -> str:
        """An image of that name with further layers; `config` as in an image configuration."""
        layers = [*self._base, *(self._layout.layer(write) for write in more)]
        self._layout.image(tag, layers, {"Env": [PATH], "Cmd": ["/probe"], **config})
        return f"oci:{self.directory}:{tag}"


def report(text: str) -> Report:
    """The first JSON object of a program's output."""
    found: Report = json.JSONDecoder().raw_decode(text)[0]
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> set[str]:
    """The places, as a/b/c, at which two reports are not the same."""
    found = set()
    for key in one.keys() | other.keys():
        here, mine, yours = f"{path}/{key}".lstrip("/"), one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(yours, dict):
            found |= differences(mine, yours, here)
        elif mine != yours:
            found.add(here)
    return found
