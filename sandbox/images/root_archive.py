"""A root file system as the one layer of a new image (`sandbox image import`).

A directory is packed by GNU tar: the host's own tree, read by the host's own root, with ids, links,
sparse files, capabilities and user attributes. An archive is taken as it is. Either is then a layer
like a stranger's and goes through the same jailed unpacker.

A layer needs its diff_id before it is unpacked, so the content is read once for the hash and once
to unpack: an import reads a local file, and twice from the page cache is cheap.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO

import msgspec
import trio

from sandbox.errors import ImageError
from sandbox.images import documents
from sandbox.images.archives import copy_range, layer_type, opened, write_manifest
from sandbox.images.blobs import CHUNK_BYTES, Send, digest_of, reported
from sandbox.images.documents import Descriptor, ImageConfig, Platform
from sandbox.images.layer_stream import decoder
from sandbox.images.sources import Document

_TAR = (
    "tar",
    "--create",
    "--format=pax",
    "--pax-option=delete=atime,delete=ctime",
    "--sort=name",
    "--numeric-owner",
    "--one-file-system",
    "--sparse",
    "--xattrs",
    "--xattrs-include=user.*",
    "--xattrs-include=security.capability",
    "--directory",
)


class RootSource:
    """An image of one layer, the file `archive`; made by `describe_root`."""

    def __init__(self, archive: Path, layer: Descriptor, config: bytes) -> None:
        self._archive = archive
        self._config = config
        media_type = documents.CONFIG_TYPES[0]
        self._descriptor = Descriptor(
            media_type=media_type, digest=digest_of(config), size=len(config)
        )
        self._manifest = write_manifest(self._descriptor, [layer])

    @property
    def origin(self) -> Hashable:
        return self._archive

    async def root(self) -> Document:
        return Document(body=self._manifest)

    async def document(self, descriptor: Descriptor) -> Document:
        raise ImageError(f"{self._archive}: holds no {descriptor.digest}")

    async def copy(self, descriptor: Descriptor, send: Send) -> None:
        if descriptor.digest == self._descriptor.digest:
            await send(self._config)
            return
        with opened(self._archive) as fd:
            await copy_range(fd, 0, descriptor.size, send)


async def describe_root(archive: Path, config: ImageConfig, platform: Platform) -> RootSource:
    """The image whose root file system is the tar `archive`, plain, gzip or zstd."""
    layer, diff_id = await trio.to_thread.run_sync(_describe, archive)
    return RootSource(archive, layer, _write_config(config, diff_id, platform))


def _write_config(config: ImageConfig, diff_id: str, platform: Platform) -> bytes:
    """The configuration file. Without a time: equal content makes an equal image."""
    settings: dict[str, object] = {
        "Entrypoint": config.entrypoint or None,
        "Cmd": config.cmd or None,
        "Env": [f"{name}={value}" for name, value in config.env],
        "User": config.user,
        "WorkingDir": config.working_dir,
        "StopSignal": str(config.stop_signal),
        "Volumes": {path: {} for path in config.volumes},
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "Labels": config.labels,
    }
    return msgspec.json.encode(
        {
            "architecture": platform.architecture,
            "os": platform.os,
            "variant": platform.variant,
            "config": {name: value for name, value in settings.items() if value},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created_by": "sandbox image import"}],
        }
    )


async def pack(directory: Path, archive: BinaryIO) -> None:
    """Write the tree below `directory` to `archive` as a tar; sockets are left out."""
    # The C locale: a name is bytes, and tar's messages are ours to quote.
    environment = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        done = await trio.run_process(
            [*_TAR, str(directory.absolute()), "."],
            stdout=archive,
            capture_stderr=True,
            check=False,
            env=environment,
        )
    except OSError as error:
        raise ImageError(f"{directory}: tar cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[:1] or ["failed"]
        raise ImageError(f"{directory}: {said[0][:300]}")


def _describe(archive: Path) -> tuple[Descriptor, str]:
    """The archive as a layer: its descriptor and its diff_id. Reads all of it."""
    media_type = layer_type(archive)
    with reported("read", archive):
        size, packed, plain = 0, hashlib.sha256(), hashlib.sha256()
        with archive.open("rb") as file:

            def read() -> bytes:
                nonlocal size
                chunk = file.read(CHUNK_BYTES)
                packed.update(chunk)
                size += len(chunk)
                return chunk

            for piece in decoder(media_type)(read):
                plain.update(piece)
    digest = f"sha256:{packed.hexdigest()}"
    diff_id = f"sha256:{plain.hexdigest()}"
    return Descriptor(media_type=media_type, digest=digest, size=size), diff_id
