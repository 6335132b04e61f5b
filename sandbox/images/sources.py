"""Where images come from, seen alike: a registry, a layout directory, an archive file.

A source delivers bytes and promises nothing about them; `resolve` and the image store check every
digest. A tag is asked for once; from then on everything goes by digest.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import msgspec

from sandbox.errors import ImageError
from sandbox.images import documents
from sandbox.images.blobs import Check, Send, digest_of
from sandbox.images.documents import Descriptor, Index, Manifest, Platform


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest or index as it came, and what the bringer said that it is."""

    body: bytes
    content_type: str = ""


class Source(Protocol):
    """One image by name. All methods raise RegistryError or ImageError."""

    @property
    def origin(self) -> Hashable:
        """Sources of equal origin fail alike."""

    async def root(self) -> Document:
        """What the name stands for now; ImageNotFound when it stands for nothing."""

    async def document(self, descriptor: Descriptor) -> Document:
        """The manifest or index that an index points to."""

    async def copy(self, descriptor: Descriptor, send: Send) -> None:
        """Send the content piece by piece, each at most a MiB."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest that a name led to on one platform."""

    manifest: Manifest
    body: bytes
    digest: str
    root_digest: str
    """The digest that the tag stood for: the index's, when there was one."""


async def resolve(source: Source, wanted: Platform, digest: str | None = None) -> Resolved:
    """From the name to one manifest, through as many indexes as are allowed.

    `digest` is the one that was asked for, if it was: what comes must be that.
    """
    document = await source.root()
    root_digest = digest_of(document.body)
    if digest not in (None, root_digest):
        raise ImageError(f"manifest has digest {root_digest} instead of {digest}")
    expected = ""
    for _ in range(documents.MAX_INDEX_DEPTH):
        parsed = documents.parse_document(
            document.body, content_type=document.content_type, expected=expected
        )
        if isinstance(parsed, Manifest):
            return Resolved(
                manifest=parsed,
                body=document.body,
                digest=digest_of(document.body),
                root_digest=root_digest,
            )
        document, expected = await _entry(source, parsed, wanted)
    raise ImageError(f"indexes are nested more than {documents.MAX_INDEX_DEPTH} deep")


async def _entry(source: Source, index: Index, wanted: Platform) -> tuple[Document, str]:
    entry = documents.choose(index, wanted)
    if entry.size > documents.MAX_MANIFEST_BYTES:
        raise ImageError(f"manifest is larger than {documents.MAX_MANIFEST_BYTES} bytes")
    document = await source.document(entry)
    check = Check(entry)
    await check.update(document.body)
    check.finish()
    return document, entry.media_type


async def read_small(source: Source, descriptor: Descriptor) -> bytes:
    """A blob that fits in memory (a configuration), verified."""
    body = bytearray()
    check = Check(descriptor)

    async def send(chunk: bytes) -> None:
        await check.update(chunk)
        body.extend(chunk)

    await source.copy(descriptor, send)
    check.finish()
    return bytes(body)
