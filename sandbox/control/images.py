"""What can be wanted of images: pull, list, inspect, remove, import, prune.

Thin verbs over `images.image_store` for every face. The one decision made here: an image that a
task uses is never removed. A task that is not STOPPED uses what its containers run, and, as long as
they do not run yet, what their names stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox.errors import ClientException, ImageError
from sandbox.images.credentials import Credentials
from sandbox.images.documents import parse_signal
from sandbox.images.image_store import ImageStore, Progress, Pull
from sandbox.model.image import Image, ImageConfig, ImageSummary, Pruned
from sandbox.model.task import Status
from sandbox.store import rows
from sandbox.store.base import Store


class Images:
    """Built by `sandbox.agent`; holds no state but the store's."""

    def __init__(self, images: ImageStore, store: Store) -> None:
        self._images = images
        self._store = store

    async def pull(
        self,
        reference: str,
        *,
        pull: Pull = "always",
        platform: str | None = None,
        credentials: Credentials | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Get the image; `always` asks the registry what the name stands for now."""
        return await self._images.ensure(
            reference, pull=pull, platform=platform, credentials=credentials, progress=progress
        )

    def list(self) -> list[ImageSummary]:
        """By name; images without one come last."""
        in_use = self._in_use()
        return [
            ImageSummary(
                name=name,
                digest=image.digest,
                platform=image.platform,
                size_bytes=image.size_bytes,
                created=image.created,
                in_use=image.digest in in_use,
            )
            for name, image in self._images.list()
        ]

    def inspect(self, name: str) -> Image:
        """By name, digest or the beginning of one; ImageNotFound."""
        return self._images.find(name)

    async def remove(self, name: str) -> None:
        """Forget a name, and with its last name the image; ClientException while a task uses it."""
        image = self._images.find(name)
        in_use = self._in_use()
        try:
            await self._images.remove(name, in_use)
        except ImageError:
            if image.digest not in in_use:
                raise
            task = in_use[image.digest]
            raise ClientException(f"image {name} is in use by task {task}") from None

    async def import_(
        self,
        tree: Path,
        tag: str,
        *,
        entrypoint: Sequence[str] = (),
        cmd: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        user: str = "",
        working_dir: str = "",
        stop_signal: str = "",
        labels: Mapping[str, str] | None = None,
        platform: str | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Make an image of a root file system: a directory, or a tar (plain, gzip or zstd)."""
        config = ImageConfig(
            entrypoint=tuple(entrypoint),
            cmd=tuple(cmd),
            env=tuple((env or {}).items()),
            user=user,
            working_dir=working_dir,
            stop_signal=parse_signal(stop_signal),
            labels=dict(labels or {}),
        )
        return await self._images.import_(
            tree, tag, config=config, platform=platform, progress=progress
        )

    async def prune(self, *, unused: bool = False) -> Pruned:
        """Remove images without a name, with `unused` all that no task uses, and all leftovers."""
        return await self._images.prune(self._in_use().keys(), unused=unused)

    def _in_use(self) -> dict[str, str]:
        """Digests of images that tasks use, each with one of these tasks."""
        used: dict[str, str] = {}
        for task in rows.task_ids(self._store):
            desired, known = rows.desired(self._store, task), rows.known(self._store, task)
            if desired is None or (known and known.last_status is Status.STOPPED):
                continue
            running = {c.name: c.image_digest for c in known.containers} if known else {}
            for definition in desired.value.definition.container_definitions:
                digest = running.get(definition.name) or self._digest_of(definition.image)
                if digest is not None:
                    used.setdefault(digest, task)
        return used

    def _digest_of(self, name: str) -> str | None:
        try:
            return self._images.find(name).digest
        except ImageError:
            return None
