"""Unpacked layers by diff_id: <root>/sha256/<hex>, each the lower directory of overlay mounts.

    <root>/                      0700, as is sha256/: nobody but root reaches a set-uid file in it
      sha256/<hex>/              a layer, complete and on disk; its root is the tar's
      sha256/<hex>.sizes         "BYTES ENTRIES"
      sha256/.<hex>.<random>/    being made or being removed; rubbish after a crash

A layer's name is the digest of its uncompressed tar, so what is shared between images is shared
here, and ids are those of the archive: tasks see them shifted through idmapped mounts.

A layer appears by one rename after everything was right: the unpacker refused nothing, the whole
stream up to the last byte of padding hashed to the diff_id, the compressed stream ended properly,
whiteouts are in place, and all of it was flushed (the unpacker calls syncfs before it reports
success). On any failure, and on cancellation, nothing of it is left.

This class hides the form of a layer from everybody else but for `path`: where the kernel can mount
an EROFS image from a file, a layer may become one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from sandbox.errors import ImageError
from sandbox.images.blobs import CHUNK_BYTES, reported
from sandbox.images.flights import Flights, Report
from sandbox.images.layer_stream import Decode, Read, decoder
from sandbox.images.unpacking import (
    OPAQUE_XATTR,
    LayerLimits,
    Unpacked,
    Unpacker,
    apply_whiteouts,
)
from sandbox.kernel.trees import remove_tree

__all__ = ["LayerLimits", "LayerStore"]

_DIFF_ID = re.compile(r"sha256:([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


class LayerStore:
    """`id_base` is the first of 65536 host ids that belong to nobody else: the unpacker's."""

    def __init__(
        self,
        root: Path,
        *,
        unpacker: Path,
        id_base: int,
        limits: LayerLimits | None = None,
    ) -> None:
        self._layers = root / "sha256"
        with reported("mkdir", root):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._layers.mkdir(mode=0o700, exist_ok=True)
        self._unpacker = Unpacker(unpacker, id_base, limits or LayerLimits())
        self._flights = Flights()
        self._in_work: set[Path] = set()
        self._opaque: dict[str, bool] = {}
        self._known_sizes: dict[str, tuple[int, int]] = {}
        """Of layers that were looked at: it is part of their content, which the name stands for."""

    def path(self, diff_id: str) -> Path:
        """Where the layer is, or would be."""
        return self._layers / _hex(diff_id)

    def has(self, diff_id: str) -> bool:
        return self.path(diff_id).is_dir()

    def sizes(self, diff_id: str) -> tuple[int, int]:
        """Bytes of file content and number of entries of a layer that is here."""
        if (known := self._known_sizes.get(diff_id)) is None:
            path = self._sizes(diff_id)
            with reported("read", path):
                size_bytes, entries = path.read_text().split()
            known = self._known_sizes[diff_id] = int(size_bytes), int(entries)
        return known

    def is_opaque(self, diff_id: str) -> bool:
        """The layer hides all layers below it (`.wh..wh..opq` in its root).

        Overlayfs does not look for the mark on the root of a layer: a mount must begin here.
        """
        if (known := self._opaque.get(diff_id)) is None:
            try:
                known = os.getxattr(self.path(diff_id), OPAQUE_XATTR) == b"y"
            except OSError as error:
                if error.errno != errno.ENODATA:
                    return False
                known = False
            self._opaque[diff_id] = known
        return known

    def ids(self) -> list[str]:
        with reported("scandir", self._layers):
            return [f"sha256:{n}" for n in sorted(os.listdir(self._layers)) if _HEX.fullmatch(n)]

    async def add(
        self,
        chunks: AsyncIterator[bytes] | Path,
        *,
        media_type: str,
        diff_id: str,
        progress: Report | None = None,
    ) -> Path:
        """Unpack the layer unless it is here; side by side for one diff_id, it is done once.

        `chunks` is the layer as transferred, compressed as `media_type` says. Its own errors pass
        through. `progress` hears the bytes of the tar so far. Raises ImageError for what is wrong
        with the layer and KernelError for what is wrong with this host.
        """
        decode = decoder(media_type)
        final = self.path(diff_id)

        async def work(report: Report) -> None:
            if self.has(diff_id):
                return
            try:
                async with _reading(chunks) as read:
                    await self._make(read, decode, diff_id, report)
            except ImageError as error:
                raise ImageError(f"layer {diff_id}: {error}") from error

        # Nobody shares a failure: every caller has chunks of its own.
        await self._flights.run(diff_id, work, origin=object(), report=progress)
        return final

    def remove(self, diff_id: str) -> None:
        """Forget the layer at once, then delete it. No mount may use it."""
        doomed = self._temporary(diff_id)
        with reported("rename", self.path(diff_id)):
            try:
                self.path(diff_id).rename(doomed)
            except FileNotFoundError:
                return
            self._sizes(diff_id).unlink(missing_ok=True)
            remove_tree(doomed)

    def sweep(self) -> None:
        """Delete what a crash has left; what is being unpacked now stays."""
        with reported("scandir", self._layers):
            for path in list(self._layers.iterdir()):
                if path.name.startswith(".") and path not in self._in_work:
                    remove_tree(path)
                elif path.suffix == ".sizes" and not path.with_suffix("").exists():
                    path.unlink()

    async def _make(self, read: Read, decode: Decode, diff_id: str, report: Report) -> None:
        partial = self._temporary(diff_id)
        with reported("mkdir", partial):
            partial.mkdir(mode=0o700)
        self._in_work.add(partial)
        try:
            unpacked = await self._unpacker.unpack(read, decode, partial, diff_id, report)
            await trio.to_thread.run_sync(self._publish, partial, diff_id, unpacked)
        except BaseException:
            with trio.CancelScope(shield=True), reported("rmdir", partial):
                await trio.to_thread.run_sync(remove_tree, partial)
            raise
        finally:
            self._in_work.discard(partial)

    def _publish(self, partial: Path, diff_id: str, unpacked: Unpacked) -> None:
        apply_whiteouts(partial, unpacked)
        sizes = self._sizes(diff_id)
        with reported("rename", self.path(diff_id)):
            with sizes.open("w") as file:
                file.write(f"{unpacked.size_bytes} {unpacked.entries}\n")
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path(diff_id))
            directory = os.open(self._layers, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _sizes(self, diff_id: str) -> Path:
        return self._layers / f"{_hex(diff_id)}.sizes"

    def _temporary(self, diff_id: str) -> Path:
        return self._layers / f".{_hex(diff_id)}.{os.urandom(4).hex()}"


def _hex(diff_id: str) -> str:
    match = _DIFF_ID.fullmatch(diff_id)
    if match is None:
        raise ImageError(f"not a sha256 digest: {diff_id[:80]!r}")
    return match[1]


@contextlib.asynccontextmanager
async def _reading(chunks: AsyncIterator[bytes] | Path) -> AsyncIterator[Read]:
    """How the feeder's thread gets the next chunk; it ends there when the caller is cancelled."""
    if isinstance(chunks, Path):
        with reported("open", chunks), chunks.open("rb", buffering=0) as file:

            def read_file() -> bytes:
                trio.from_thread.check_cancelled()
                with reported("read", chunks):
                    return file.read(CHUNK_BYTES)

            yield read_file
    else:

        async def next_chunk() -> bytes:
            async for chunk in chunks:
                if chunk:
                    return chunk
            return b""

        yield lambda: trio.from_thread.run(next_chunk)
