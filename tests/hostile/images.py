"""An image as a hostile author, registry or network delivers it: every byte of it can be said.

A case of the corpus is an `Image` with its outcome. What an image does not say is as it should be,
so a case shows only what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.images.documents import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    TAR_LAYER,
)
from scripts.make_image import ARCHITECTURE, Layout
from tests.kernel import archives

Json = dict[str, Any]
Document = tuple[str, bytes]
"""Media type, and the bytes."""
OUTSIDE = Path(f"/run/sandbox-outside-{os.getpid()}")
"""A directory of the host that hostile names lead to; it must stay as it is."""
MANIFEST, INDEX, CONFIG = MANIFEST_TYPES[0], INDEX_TYPES[0], CONFIG_TYPES[0]


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer: its archive, how that is packed, and what of it arrives."""

    archive: bytes
    pack: Callable[[bytes], bytes] = bytes
    spoil: Callable[[bytes], bytes] = bytes
    """What becomes of it on the way: its digest and size are those before."""
    media_type: str = TAR_LAYER
    diff_id: str = ""
    says: Json = field(default_factory=dict)
    """Members of its descriptor."""

    @property
    def content(self) -> bytes:
        return self.pack(self.archive)


class Parts:
    """The content of one image, as it lies in a layout or a registry."""

    def __init__(self, image: Image, host: str) -> None:
        self.host = host
        """Of the registry that is asked for it."""
        self.blobs: dict[str, bytes] = {}
        self.layers = [self._layer(layer) for layer in image.layers]
        self.diff_ids = [layer.diff_id or digest_of(layer.archive) for layer in image.layers]
        self.configuration: dict[str, Any] = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": dict(image.config),
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
        }
        media_type, self.root = image.root(self)
        self.content_type = media_type if image.content_type is None else image.content_type
        self.described = self.blob(self.root, media_type) | image.entry

    def _layer(self, layer: Layer) -> dict[str, Any]:
        described = self.blob(layer.content, layer.media_type)
        self.blobs[str(described["digest"])] = layer.spoil(layer.content)
        return described | layer.says

    def blob(self, content: bytes, media_type: str) -> dict[str, Any]:
        """Store it; its descriptor."""
        digest = digest_of(content)
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def json(self, value: Json, media_type: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), media_type)

    def manifest(self, **changes: Any) -> dict[str, Any]:
        """The image's manifest; a member that is changed to None is left out."""
        members = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": self.layers, **changes}
        if "config" not in members:
            members["config"] = self.json(self.configuration, CONFIG)
        return without_none(members)

    def index(self, *entries: Json, **changes: Any) -> dict[str, Any]:
        members = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries, **changes}
        return without_none(members)

    def write(self, directory: Path) -> Layout:
        """As an OCI layout with one tag, `latest`."""
        layout = Layout(directory)
        for digest, content in self.blobs.items():
            (directory / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(content)
        named = {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
        (directory / "index.json").write_text(json.dumps(self.index(self.described | named)))
        return layout


def without_none(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def plain_manifest(parts: Parts) -> Document:
    return document(parts.manifest())


def document(value: Json, media_type: str = MANIFEST) -> Document:
    return media_type, json.dumps(value).encode()


@dataclass(frozen=True, kw_only=True)
class Image:
    """What is wrong with an image."""

    layers: Sequence[Layer] = ()
    config: Json = field(default_factory=dict)
    root: Callable[[Parts], Document] = plain_manifest
    """What its name stands for: a manifest, an index, or what claims to be one."""
    entry: Json = field(default_factory=dict)
    """Members of the descriptor that leads to it, in a layout."""
    content_type: str | None = None
    """What a registry says that it is, if not its media type."""


def layer(*members: bytes, **about: Any) -> Layer:
    """An archive of these members, which ends as it should."""
    return Layer(archive=archives.archive(*members), **about)
