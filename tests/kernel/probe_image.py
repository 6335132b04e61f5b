"""Images with busybox and the probe, as OCI layouts: no registry is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.cli.deep import PROBE
from scripts.make_image import PATH, LayerWriter, Layout, busybox

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
