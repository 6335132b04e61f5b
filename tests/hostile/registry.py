"""A registry that may do anything, and words to write down what: tables are made of them.

It has one image, and is an honest registry but for what its behaviour answers instead. Beside it
is another origin, for redirects and token realms, which answers as a test says.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from scripts.make_image import LayerWriter, Layout
from tests.kernel.pulling import Shelf
from tests.unit.images.http_server import (
    Answer,
    Asked,
    End,
    Handler,
    Pause,
    Server,
    Step,
    head,
    reply,
    serving,
)

Part = Literal["tag", "digest", "config", "layer", "token"]
Say = Callable[["Scene", Asked], Answer | None]
"""An answer, or None for what an honest registry would say."""

NOISE = random.Random(1).randbytes(300_000)
TREE = {"srv/hello": b"hello", "srv/noise": NOISE}
"""What the image's only layer makes."""

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


class Image:
    """A layout of one small image; made once, for all scenes."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)
        layer = self.layout.layer(_write)
        self.digest = self.layout.image("latest", [layer], {"Cmd": ["/bin/true"]})
        self.layer_digest, self.diff_id = layer.digest, layer.diff_id
        self.manifest = self._read(self.digest)
        (self.config_digest,) = {p.name for p in self.layout.directory.glob("blobs/sha256/*")} - {
            digest.removeprefix("sha256:") for digest in (self.digest, self.layer_digest)
        }
        self.config = self._read(self.config_digest)
        self.layer = self._read(self.layer_digest)

    def _read(self, digest: str) -> bytes:
        return (self.layout.directory / "blobs/sha256" / digest[-64:]).read_bytes()


def _write(layer: LayerWriter) -> None:
    layer.directory("srv")
    for name, content in TREE.items():
        layer.file(name, content)


class Scene:
    """The image on a registry that behaves as told, and the other origin."""

    def __init__(self, image: Image, registry: Server, elsewhere: Server, say: Say) -> None:
        self.image = image
        self.registry = registry
        self.elsewhere = elsewhere
        self.shelf = Shelf(registry, image.layout, before=lambda asked: say(self, asked))
        elsewhere.handle = lambda _: reply("200 OK", image.layer)

    def part(self, asked: Asked) -> Part:
        if asked.path.startswith("/token"):
            return "token"
        if "/blobs/" in asked.path:
            return "config" if self.image.config_digest in asked.path else "layer"
        return "digest" if "/manifests/sha256:" in asked.path else "tag"

    def count(self, part: Part) -> int:
        return sum(self.part(asked) == part for asked in self.registry.asked)

    def fill(self, text: str) -> str:
        """`text` with what is different from run to run put in."""
        image = self.image
        return text.format(
            name=self.shelf.name,
            host=self.registry.host,
            elsewhere=self.elsewhere.host,
            digest=image.digest,
            diff_id=image.diff_id,
            layer=image.layer_digest[7:19],
            layer_digest=image.layer_digest,
            config=image.config_digest[:12],
            config_size=len(image.config),
            manifest_size=len(image.manifest),
            less=len(image.layer) - 1,
            size=len(image.layer),
        )


@asynccontextmanager
async def playing(image: Image, say: Say, elsewhere: Handler | None = None) -> AsyncIterator[Scene]:
    async with serving() as registry, serving() as other:
        scene = Scene(image, registry, other, say)
        if elsewhere is not None:
            other.handle = elsewhere
        yield scene


# Behaviours ----------------------------------------------------------------------------------


def honest(scene: Scene, asked: Asked) -> None:
    return None


def on(part: Part, *answers: Answer | Say | None) -> Say:
    """The first request for `part` gets the first answer, and so on; the last one stays."""

    def say(scene: Scene, asked: Asked) -> Answer | None:
        if scene.part(asked) != part:
            return None
        answer = answers[min(scene.count(part), len(answers)) - 1]
        return answer(scene, asked) if callable(answer) else answer

    return say


def each(*says: Say) -> Say:
    """The first of them that has something to say."""

    def say(scene: Scene, asked: Asked) -> Answer | None:
        return next((answer for one in says if (answer := one(scene, asked)) is not None), None)

    return say


def redirect(location: str, status: str = "307 Temporary Redirect") -> Say:
    return lambda scene, _: reply(status, Location=scene.fill(location))


def guarded(challenge: str, needed: str = "Bearer good") -> Say:
    """Everything but the realm wants an Authorization."""

    def say(scene: Scene, asked: Asked) -> Answer | None:
        if scene.part(asked) == "token" or asked.headers.get("authorization") == needed:
            return None
        return reply("401 Unauthorized", WWW_Authenticate=scene.fill(challenge))

    return say


REALM = 'Bearer realm="http://{host}/token",service="shelf"'


def token(answer: Answer | Say, *more: Answer | Say) -> Say:
    """The registry wants a bearer token, and its realm answers so."""
    return each(guarded(REALM), on("token", answer, *more))


def layer(how: Callable[[bytes], bytes], length: int | None = None) -> Say:
    """The whole layer as `how` changes it, whatever was asked for; or `length` is said of it."""
    return lambda scene, _: reply("200 OK", how(scene.image.layer), length=length)


def cut(at: int, end: Step = End.RESET) -> Say:
    """The layer from its beginning, but after `at` bytes of it the answer ends."""

    def say(scene: Scene, _: Asked) -> Answer:
        content = scene.image.layer
        return [reply("200 OK", content[:at], length=len(content)), end]

    return say


def dripping(content: bytes, pieces: int, seconds: float) -> list[Step]:
    """An answer of `content`, evenly over the time."""
    size = -(-len(content) // pieces)
    steps: list[Step] = [head("200 OK", Content_Length=str(len(content)))]
    for start in range(0, len(content), size):
        steps += [content[start : start + size], Pause(seconds / pieces)]
    return steps


def part_of_layer(content_range: str, start: int = 0, status: str = "206 Partial Content") -> Say:
    """What a request with Range gets: the layer from `start`, under that Content-Range."""
    return lambda scene, _: reply(
        status, scene.image.layer[start:], Content_Range=scene.fill(content_range)
    )
