"""An image store with everything real, and a registry on loopback that serves a layout."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.images.image_store import ImageStore
from sandbox.images.layers import LayerLimits, LayerStore
from sandbox.images.registry import RegistryClient, Retries, Timeouts
from sandbox.store.sqlite import SqliteStore
from scripts.make_image import Layout
from tests.conftest import ROOT
from tests.unit.images.http_server import Answer, Asked, Server, reply

ID_BASE = 1 << 30


@dataclass
class World:
    """An image store and what it is made of."""

    images: ImageStore
    layers: LayerStore
    store: SqliteStore
    root: Path

    def left(self) -> list[str]:
        """All that lies in the image store's directory, names of digests shortened."""
        found = [p for p in self.root.rglob("*") if len(p.relative_to(self.root).parts) == 3]
        return sorted(f"{p.parent.parent.name}/{p.name[:8]}" for p in found)


@asynccontextmanager
async def open_world(
    directory: Path,
    limits: LayerLimits | None = None,
    *,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  (frozen)
    retries: Retries = Retries(pause_s=0.01),  # noqa: B008
) -> AsyncIterator[World]:
    """Everything of it lies in `directory`, which may have been another one's."""
    subprocess.run([ROOT / "scripts/native", "unpack"], check=True)
    root, unpacker = directory / "state", ROOT / "sandbox/_bin/unpack"
    root.mkdir(exist_ok=True)
    store = SqliteStore.open(directory / "store.db")
    layers = LayerStore(root / "layers", unpacker=unpacker, id_base=ID_BASE, limits=limits)
    try:
        async with RegistryClient(timeouts=timeouts, retries=retries) as registry:
            yield World(ImageStore(root, store, layers, registry), layers, store, root)
    finally:
        await store.aclose()


@dataclass
class Shelf:
    """Serves an OCI layout as a registry does; `before` may answer a request instead."""

    server: Server
    layout: Layout
    before: Callable[[Asked], Answer | None] = lambda asked: None
    blobs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.handle = self.handle

    @property
    def name(self) -> str:
        return f"{self.server.host}/shelf:latest"

    def handle(self, asked: Asked) -> Answer:
        if (answer := self.before(asked)) is not None:
            return answer
        _, _, kind, target = asked.path.strip("/").split("/")
        if kind == "manifests" and not target.startswith("sha256:"):
            index = json.loads((self.layout.directory / "index.json").read_text())
            target = index["manifests"][-1]["digest"]
        if kind == "blobs":
            self.blobs.append(target)
        content = self.read(target)
        start = int(asked.headers.get("range", "bytes=0-")[6:-1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status = "206 Partial Content" if start else "200 OK"
        return reply(status, content[start:], Content_Range=span)

    def read(self, digest: str) -> bytes:
        return (self.layout.directory / "blobs/sha256" / digest[7:]).read_bytes()
