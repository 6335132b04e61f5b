"""Images as the store keeps them and as listings show them."""

from __future__ import annotations

import signal

import msgspec

from sandbox.model.task import Record


class ImageConfig(Record, frozen=True, kw_only=True):
    """What the image says about how to run it. `stop_signal` is the kernel's number."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    user: str = ""
    working_dir: str = ""
    stop_signal: int = int(signal.SIGTERM)
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class Image(Record, frozen=True, kw_only=True):
    """An image that is stored here and ready to run."""

    reference: str
    """The normalised name it was asked for by."""
    digest: str
    """The manifest's digest."""
    platform: str
    config: ImageConfig
    diff_ids: tuple[str, ...]
    """Digests of the uncompressed layers, lowest first: their names in the layer store."""
    size_bytes: int
    """Layers and configuration as they were transferred, mostly compressed."""
    created: str | None = None
    config_digest: str
    layers: tuple[str, ...] = ()
    """Digests of the layers as transferred, in the order of `diff_ids`."""


class ImageSummary(Record, frozen=True, kw_only=True):
    """One line of a listing; `name` is None for an image whose name moved on."""

    name: str | None
    digest: str
    platform: str
    size_bytes: int
    created: str | None = None
    in_use: bool = False


class Pruned(Record, frozen=True, kw_only=True):
    """What `prune` removed: manifest digests, diff_ids, and their size as they were pulled."""

    images: tuple[str, ...]
    layers: tuple[str, ...]
    size_bytes: int
