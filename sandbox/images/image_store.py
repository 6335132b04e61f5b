"""The images of this machine: names, manifests, blobs, layers.

    image/name/<normalised name>   Name    the manifest that the name stands for
    image/manifest/<digest>        Image   what is needed to run it
    <root>/blobs/sha256/<hex>      manifests and configurations as they came, byte for byte
    layers                         unpacked directories by diff_id (`images.layers`)

A pull asks for the tag once and goes on by digest. Each layer is unpacked while it arrives: the
download, the hash of what came, decompression and unpacking run at the same time, several layers at
once, so that a pull takes as long as its slowest part and not the sum. A layer counts only if both
its digest and its diff_id were right, and an image is written down only when all of it is there; so
whatever a crash leaves is either whole or unnamed, and `sweep` and `prune` find the latter. What an
image that is refused has brought goes at once.

The compressed layers are not kept: nothing here reads them again, and they would double what an
image takes. `keep_blobs` keeps them, for pushing an image on as it came. (An image pulled without
them cannot be pushed until it was pulled again.)

Sharing: two tasks that want one layer download it once (`images.flights`). What is being pulled is
held against `prune`; what `ensure` returned is held for another minute, until its caller has
written down that it uses it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakValueDictionary

import msgspec
import trio

from sandbox.errors import ImageError, ImageNotFound, ReferenceInvalid
from sandbox.images import documents, root_archive, sources
from sandbox.images.archives import ArchiveSource, LayoutSource
from sandbox.images.blobs import BlobStore, checking
from sandbox.images.credentials import Credentials
from sandbox.images.documents import Descriptor, Image, ImageConfig, Platform
from sandbox.images.flights import Flights, Report, together
from sandbox.images.layers import LayerStore
from sandbox.images.reference import (
    DIGEST,
    AnyReference,
    ArchiveReference,
    LayoutReference,
    Reference,
    parse,
    parse_name,
)
from sandbox.images.sources import Resolved, Source
from sandbox.model.image import Pruned as Pruned
from sandbox.model.task import Record
from sandbox.store.base import Store

if TYPE_CHECKING:  # httpx takes 0.2 s to import, and a launch from the store needs no registry
    from sandbox.images.registry import RegistryClient

Pull = Literal["missing", "always", "never"]
Progress = Callable[[str, int, int | None], None]
"""What (twelve digits of a layer), bytes done, bytes in all."""

_NAMES, _MANIFESTS = "image/name/", "image/manifest/"
_PARALLEL_LAYERS = 3
"""Of one origin: a slow one keeps nobody else waiting."""
_QUEUED_CHUNKS = 8
_HANDOVER_S = 60.0
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})")


class Name(Record, frozen=True, kw_only=True):
    """What a name stands for. `resolved` is the index's digest where the tag led to an index."""

    manifest: str
    resolved: str


class _Found(msgspec.Struct, frozen=True):
    """What a name led to: the image as it will be once its layers are here."""

    image: Image
    resolved: Resolved
    config: bytes


class ImageStore:
    """One a state directory. Its methods may run side by side."""

    def __init__(
        self,
        root: Path,
        store: Store,
        layers: LayerStore,
        registry: RegistryClient,
        *,
        keep_blobs: bool = False,
        logins: Callable[[str], Credentials | None] | None = None,
    ) -> None:
        """`logins` knows the credentials for a registry when a pull brings none of its own."""
        self._store = store
        self._layers = layers
        self._registry = registry
        self._blobs = BlobStore(root / "blobs")
        self._keep_blobs = keep_blobs
        self._logins = logins
        self._flights = Flights()
        self._held: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._handed_over: dict[str, float] = {}
        self._lanes: WeakValueDictionary[Hashable, trio.CapacityLimiter] = WeakValueDictionary()

    # Reading ---------------------------------------------------------------------------------

    def find(self, name: str) -> Image:
        """The stored image of that name, digest, or beginning of a digest; ImageNotFound."""
        if DIGEST.fullmatch(name):  # what supervisors ask; no image named "sha256" comes first
            image = self._image(name, name)
        else:
            image = self._by_name(name) or self._by_digest(name)
        if image is None:
            raise ImageNotFound(f"{name}: no such image here")
        return image

    def list(self) -> list[tuple[str | None, Image]]:
        """Every name with its image, by name; images without a name come last, with None."""
        images = {image.digest: image for image in self._images()}
        named: list[tuple[str | None, Image]] = []
        unnamed = dict(images)
        for name, target in self._names().items():
            if target.manifest in images:
                named.append((name, images[target.manifest]))
                unnamed.pop(target.manifest, None)
        return named + [(None, image) for image in unnamed.values()]

    # Getting ---------------------------------------------------------------------------------

    async def ensure(
        self,
        reference: str | AnyReference,
        *,
        pull: Pull = "missing",
        platform: str | None = None,
        credentials: Credentials | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """The image, complete and ready to run, pulled if `pull` says so.

        An image in a local file or directory is looked at every time: it costs little, and what
        is there now is what is meant. Cancelling leaves what is complete. Raises ImageNotFound,
        ImageError, RegistryError, KernelError.
        """
        name = parse(reference) if isinstance(reference, str) else reference
        wanted = documents.parse_platform(platform) if platform else documents.host_platform()
        is_local = not isinstance(name, Reference)
        image = None if pull == "always" else self._ready(name, wanted)
        if image is None and pull == "never":
            raise ImageNotFound(f"{name} is not stored here, and must not be pulled")
        if image is None or (is_local and pull == "missing"):
            image = await self._pull(name, wanted, credentials, progress)
        self._handed_over[image.digest] = trio.current_time() + _HANDOVER_S
        return image

    async def _pull(
        self,
        name: AnyReference,
        wanted: Platform,
        credentials: Credentials | None,
        progress: Progress | None,
    ) -> Image:
        source = self._source(name, credentials)

        async def look(_: Report) -> _Found:
            return await self._look(source, name, wanted)

        key = f"image {name} {wanted}"
        found = await self._flights.run(key, look, origin=source.origin)
        await self._fetch(source, found, progress)
        return found.image

    def _source(self, name: AnyReference, credentials: Credentials | None) -> Source:
        match name:
            case LayoutReference():
                return LayoutSource(name)
            case ArchiveReference():
                return ArchiveSource(name)
            case Reference():
                if credentials is None and self._logins is not None:
                    credentials = self._logins(name.domain)
                return self._registry.source(name, credentials)

    async def _look(self, source: Source, name: AnyReference, wanted: Platform) -> _Found:
        """What the name stands for, with its configuration; layers are another matter."""
        digest = name.digest if isinstance(name, Reference) else None
        resolved = await sources.resolve(source, wanted, digest)
        manifest = resolved.manifest
        if self._blobs.has(manifest.config.digest):
            body = self._blobs.read(manifest.config)
        else:
            body = await sources.read_small(source, manifest.config)
        configuration = documents.parse_config(body, manifest, wanted)
        image = Image(
            reference=str(name),
            digest=resolved.digest,
            platform=str(configuration.platform),
            config=configuration.config,
            diff_ids=configuration.diff_ids,
            size_bytes=manifest.config.size + sum(layer.size for layer in manifest.layers),
            created=configuration.created,
            config_digest=manifest.config.digest,
            layers=tuple(layer.digest for layer in manifest.layers),
        )
        return _Found(image, resolved, body)

    async def _fetch(self, source: Source, found: _Found, progress: Progress | None) -> None:
        """Bring what is missing of the image, then write it down.

        Of an image that is refused nothing stays: its other layers would lie here until a prune,
        for nobody. After a transfer that broke off they stay, for the next try.
        """
        image, resolved = found.image, found.resolved

        async def keep(_: Report) -> None:
            await self._blobs.write(found.config)
            await self._blobs.write(resolved.body)

        try:
            with self._holding(image):
                await self._fetch_layers(source, found, progress)
                await self._flights.run(image.digest, keep)
                await self._write(image, resolved.root_digest)
        except ImageError:
            await self._collect(image.diff_ids)
            raise

    async def _fetch_layers(self, source: Source, found: _Found, progress: Progress | None) -> None:
        # The largest first: what is started last should not be what takes longest.
        unique = dict(zip(found.image.diff_ids, found.resolved.manifest.layers, strict=True))
        largest_first = sorted(unique.items(), key=lambda item: -item[1].size)

        def job(diff_id: str, layer: Descriptor) -> Callable[[], Awaitable[None]]:
            async def fetch() -> None:
                report = _reporting(progress, layer)
                await self._fetch_layer(source, diff_id, layer, report)

            return fetch

        await together(*(job(diff_id, layer) for diff_id, layer in largest_first))

    async def _fetch_layer(
        self, source: Source, diff_id: str, layer: Descriptor, report: Report
    ) -> None:
        async def work(tell: Report) -> None:
            if not self._layers.has(diff_id):
                lane = self._lanes.get(source.origin) or trio.CapacityLimiter(_PARALLEL_LAYERS)
                self._lanes[source.origin] = lane
                async with lane:
                    await self._unpack(source, diff_id, layer, tell)

        # More than once only if the flight that was joined was one that removed the layer.
        while not self._layers.has(diff_id) or diff_id in self._flights:
            await self._flights.run(diff_id, work, origin=source.origin, report=report)
        report(layer.size, layer.size)

    async def _unpack(
        self, source: Source, diff_id: str, layer: Descriptor, report: Report
    ) -> None:
        """Bring one layer: a feeder and the unpacker, side by side over a short queue.

        The queue is closed only once the content was found to be right (and left open when the
        feeder fails), so the unpacker never takes a broken-off transfer for a whole one.
        """
        media_type, kept = layer.media_type, self._blobs.path(layer.digest)
        if self._blobs.has(layer.digest):
            await self._layers.add(kept, media_type=media_type, diff_id=diff_id)
            return
        feed, chunks = trio.open_memory_channel[bytes](_QUEUED_CHUNKS)
        receiving = self._blobs.writing if self._keep_blobs else checking

        async def bring() -> None:
            done = 0
            async with receiving(layer) as take:

                async def send(chunk: bytes) -> None:
                    nonlocal done
                    await take(chunk)
                    done += len(chunk)
                    report(done, layer.size)
                    await feed.send(chunk)

                await source.copy(layer, send)
            feed.close()

        async def unpack() -> None:
            await self._layers.add(chunks, media_type=media_type, diff_id=diff_id)

        await together(bring, unpack)

    async def import_(
        self,
        tree: Path,
        name: str,
        *,
        config: ImageConfig | None = None,
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Make an image of a root file system: a directory, or a tar (plain, gzip or zstd)."""
        reference = parse_name(name)
        if reference.digest is not None:
            raise ImageError(f"{name}: an import is named by a tag, its digest follows from it")
        wanted = documents.parse_platform(platform) if platform else documents.host_platform()
        with contextlib.ExitStack() as stack:
            archive = tree
            if tree.is_dir():
                archive, file = stack.enter_context(self._blobs.temporary())
                await root_archive.pack(tree, file)
            source = await root_archive.describe_root(archive, config or ImageConfig(), wanted)
            found = await self._look(source, reference, wanted)
            await self._fetch(source, found, progress)
            return found.image

    # Removing --------------------------------------------------------------------------------

    def unpacked_bytes(self, images: Collection[Image]) -> int:
        """Content of the files of all their layers, each layer once."""
        layers = {diff_id for image in images for diff_id in image.diff_ids}
        return sum(self._layers.sizes(diff_id)[0] for diff_id in layers)

    def sweep(self) -> None:
        """Remove what a crash left half-written; once, before anything else is asked."""
        self._blobs.sweep()

    async def remove(self, name: str, in_use: Collection[str] = ()) -> None:
        """Forget a name; with its last name, or by digest, the image and what only it needs.

        ImageError, and nothing changed, when that image is in `in_use` (manifest digests) or is
        being pulled.
        """
        named = self._by_name(name)
        image = named or self.find(name)
        names = [key for key, target in self._names().items() if target.manifest == image.digest]
        if named is not None and len(names) > 1:
            await self._store.txn({}, delete=[_NAMES + named.reference])
            return
        if image.digest in in_use or self._is_held(image.digest):
            raise ImageError(f"{name}: the image is in use")
        await self._forget([image.digest], names)
        await self._collect(self._layers.ids())

    async def prune(self, in_use: Collection[str], *, unused: bool = False) -> Pruned:
        """Remove images without a name, with `unused` all images, but none of `in_use`.

        Also removes every layer and blob that no image needs, whatever left them.
        """
        named = {target.manifest for target in self._names().values()}
        doomed = [
            image
            for image in self._images()
            if image.digest not in in_use
            and not self._is_held(image.digest)
            and (unused or image.digest not in named)
        ]
        digests = {image.digest for image in doomed}
        names = [name for name, target in self._names().items() if target.manifest in digests]
        await self._forget(digests, names)
        return Pruned(
            images=tuple(sorted(digests)),
            layers=await self._collect(self._layers.ids()),
            size_bytes=sum(image.size_bytes for image in doomed),
        )

    async def _forget(self, digests: Collection[str], names: Collection[str]) -> None:
        """Delete the rows. Meanwhile the images count as gone: nobody is handed one any more."""
        if not digests:
            return
        self._leaving.update(digests)
        try:
            keys = [_MANIFESTS + digest for digest in digests] + [_NAMES + name for name in names]
            await self._store.txn({}, delete=keys)
        finally:
            self._leaving.difference_update(digests)

    async def _collect(self, diff_ids: Collection[str]) -> tuple[str, ...]:
        """Remove those of these layers, and blobs, that no row needs; returns the former."""
        removed = []
        for diff_id in diff_ids:

            async def work(_: Report, diff_id: str = diff_id) -> None:
                # Asked again here: while this waited, a pull may have come to need it.
                if diff_id not in self._needed():
                    await trio.to_thread.run_sync(self._layers.remove, diff_id)
                    removed.append(diff_id)

            if diff_id not in self._needed():
                await self._flights.run(diff_id, work)
        for digest in self._blobs.digests() - self._needed():
            self._blobs.remove(digest)
        return tuple(removed)

    def _needed(self) -> set[str]:
        """Digests of everything that an image here, or one being pulled, consists of."""
        needed = {digest for digest, count in self._held.items() if count}
        for image in self._images():
            needed.update(_parts(image))
        return needed

    def _is_held(self, digest: str) -> bool:
        return self._held[digest] > 0 or self._handed_over.get(digest, 0) > trio.current_time()

    @contextlib.contextmanager
    def _holding(self, image: Image) -> Iterator[None]:
        """Nothing of `image` is removed meanwhile."""
        parts = Counter(set(_parts(image)))
        self._held.update(parts)
        try:
            yield
        finally:
            self._held.subtract(parts)
            self._held += Counter()  # drops what has come to zero

    # Rows ------------------------------------------------------------------------------------

    def _ready(self, name: AnyReference, wanted: Platform) -> Image | None:
        """The stored image that `name` stands for, if it is complete and fits."""
        image = self._named(name)
        if image is None or not documents.matches(documents.parse_platform(image.platform), wanted):
            return None
        return image if all(self._layers.has(diff_id) for diff_id in image.diff_ids) else None

    def _by_name(self, text: str) -> Image | None:
        try:
            return self._named(parse(text))
        except ReferenceInvalid:
            return None

    def _by_digest(self, text: str) -> Image | None:
        match = _ID.fullmatch(text)
        begin = f"sha256:{match[1]}" if match else text
        found = [image for image in self._images() if match and image.digest.startswith(begin)]
        if len(found) > 1:
            raise ImageError(f"{text}: {len(found)} images have a digest that begins so")
        return found[0] if found else None

    def _named(self, name: AnyReference) -> Image | None:
        row = self._store.get(_NAMES + str(name), Name)
        if row is not None:
            return self._image(row.value.manifest, str(name))
        if isinstance(name, Reference) and name.digest is not None:
            return self._image(name.digest, str(name))
        return None

    def _image(self, digest: str, reference: str) -> Image | None:
        row = self._store.get(_MANIFESTS + digest, Image)
        if row is None or digest in self._leaving:
            return None
        return msgspec.structs.replace(row.value, reference=reference)

    def _images(self) -> Sequence[Image]:
        rows = self._store.list(_MANIFESTS, Image)
        return [row.value for row in rows if row.value.digest not in self._leaving]

    def _names(self) -> dict[str, Name]:
        rows = self._store.list(_NAMES, Name)
        return {row.key.removeprefix(_NAMES): row.value for row in rows}

    async def _write(self, image: Image, resolved: str) -> None:
        """Let the image's reference stand for it."""
        name = Name(manifest=image.digest, resolved=resolved)
        keys = (_NAMES + image.reference, _MANIFESTS + image.digest)
        known = self._store.get(keys[0], Name)
        if known is None or known.value != name or self._image(image.digest, "") is None:
            await self._store.txn({keys[0]: name, keys[1]: image})


def _parts(image: Image) -> tuple[str, ...]:
    return (image.digest, image.config_digest, *image.layers, *image.diff_ids)


def _reporting(progress: Progress | None, layer: Descriptor) -> Report:
    def report(done: int, total: int | None) -> None:
        if progress is not None:
            progress(layer.short, done, total)

    return report
