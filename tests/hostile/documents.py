"""Images whose manifest, index or configuration is hostile, and content that is not what they say.

Where the two doors of the image store tell a refusal in their own words, it is two cases.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from sandbox.images.documents import (
    CONFIG_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    TAR_LAYER,
)
from scripts.make_image import ARCHITECTURE
from tests.hostile.cases import (
    BOTH,
    SAME,
    Accepted,
    Case,
    Doors,
    Umoci,
    accepts,
    not_asked,
    numbered,
    refused,
    refuses,
)
from tests.hostile.images import (
    CONFIG,
    INDEX,
    MANIFEST,
    Document,
    Image,
    Json,
    Parts,
    document,
    layer,
)
from tests.hostile.trees import ROOT, f
from tests.kernel.archives import file

REGISTRY: Doors = ("registry",)
LAYOUT: Doors = ("layout",)
Root = Callable[[Parts], Document]

ONE = (layer(file(b"a", b"x")),)
TREE = Accepted({**ROOT, b"a": f(b"x")})
HERE = {"os": "linux", "architecture": ARCHITECTURE}
ELSEWHERE = {"os": "linux", "architecture": "s390x"}
DOCKER_MANIFEST, DOCKER_INDEX = MANIFEST_TYPES[1], INDEX_TYPES[1]
NO_DIGEST = "manifest is not acceptable: ...digest`"
NO_SIZE = "manifest is not acceptable: ...size`"
LENIENT = accepts("does not look at it")


def bad(text: str, root: Root, umoci: Umoci = SAME, doors: Doors = BOTH, **about: Any) -> Case:
    return refused(text, Image(layers=ONE, root=root, **about), umoci, doors)


def fine(root: Root, umoci: Umoci = SAME, doors: Doors = BOTH, **about: Any) -> Case:
    image = Image(layers=ONE, root=root, **about)
    return Case(image=image, outcome=TREE, umoci=umoci, doors=doors)


def manifest(media_type: str = MANIFEST, **changes: Any) -> Root:
    return lambda parts: document(parts.manifest(**changes), media_type)


def raw(content: bytes) -> Root:
    return lambda parts: (MANIFEST, content)


def of_layer(**members: Any) -> Root:
    """The manifest, with these members of the descriptor of its only layer."""
    return lambda parts: document(parts.manifest(layers=[parts.layers[0] | members]))


def of_config(**members: Any) -> Root:
    def root(parts: Parts) -> Document:
        described = parts.json(parts.configuration, CONFIG)
        return document(parts.manifest(config=described | members))

    return root


# One document, one meaning ------------------------------------------------------------------

AT_ONCE = "document is a manifest and an index at the same time"

MEANINGS = {
    "a manifest and an index": bad(
        AT_ONCE, lambda parts: document(parts.manifest() | parts.index(mediaType=None))
    ),
    "a manifest with an index of nothing": bad(AT_ONCE, manifest(manifests=[])),
    "an index with layers": bad(AT_ONCE, lambda parts: document(parts.index(layers=[]), INDEX)),
    "an index with a configuration": bad(
        AT_ONCE,
        lambda parts: document(parts.index(config=parts.json({}, CONFIG)), INDEX),
    ),
    "of two types": bad(
        f"document is announced as {DOCKER_MANIFEST} and as {MANIFEST}",
        manifest(mediaType=DOCKER_MANIFEST),
    ),
    "a manifest that calls itself an index": bad(
        f"document is a manifest, but its own mediaType says '{INDEX}'", manifest(mediaType=INDEX)
    ),
    "a manifest that the registry calls an index": bad(
        f"document is a manifest, but Content-Type says '{INDEX}'",
        manifest(mediaType=None),
        doors=REGISTRY,
        content_type=INDEX,
    ),
    "a manifest that the layout calls an index": bad(
        f"document is a manifest, but the descriptor says '{INDEX}'",
        manifest(INDEX, mediaType=None),
        doors=LAYOUT,
    ),
    "an index that calls itself a manifest": bad(
        f"document is an index, but its own mediaType says '{MANIFEST}'",
        lambda parts: document(parts.index(mediaType=MANIFEST), INDEX),
    ),
    "a manifest of a generic type": fine(
        manifest(mediaType=None), doors=REGISTRY, content_type="application/json"
    ),
    "a manifest of no type": fine(manifest(mediaType=None), doors=REGISTRY, content_type=""),
    "with parameters of its type": fine(
        manifest(), doors=REGISTRY, content_type=f"{MANIFEST}; charset=utf-8"
    ),
    "in Docker's words": fine(
        lambda parts: document(
            parts.manifest(
                mediaType=DOCKER_MANIFEST,
                config=parts.json(parts.configuration, CONFIG_TYPES[1]),
                layers=[
                    parts.layers[0] | {"mediaType": "application/vnd.docker.image.rootfs.diff.tar"}
                ],
            ),
            DOCKER_MANIFEST,
        ),
        umoci=refuses("skopeo looks for OCI's types in a layout"),
    ),
    "schema 1": bad(
        "manifest has Docker's schema 1, which is too old: push the image again",
        lambda parts: document({"schemaVersion": 1, "fsLayers": [], "history": []}),
    ),
    "neither": bad("document is neither a manifest nor an index", raw(b'{"schemaVersion":2}')),
    "no layers": bad("document is neither a manifest nor an index", manifest(layers=None), LENIENT),
    "a list": bad("manifest is not acceptable: ...", raw(b"[]")),
    "no JSON": bad("manifest is not acceptable: ...", raw(b"\xff\xfe{\0}\0")),
    "two values": bad("manifest is not acceptable: ...", raw(b"{}{}")),
    "nested without end": bad("manifest is not acceptable: ...", raw(b'{"x":' * 100_000)),
    "of 4 MiB and a byte, from a registry": bad(
        "...: answer is larger than 4194304 bytes", raw(b" " * ((4 << 20) + 1)), doors=REGISTRY
    ),
    "of 4 MiB and a byte, in a layout": bad(
        "manifest is larger than 4194304 bytes", raw(b" " * ((4 << 20) + 1)), doors=LAYOUT
    ),
}

# Descriptors --------------------------------------------------------------------------------

FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


def unknown_layer(media_type: str, umoci: Umoci = SAME) -> Case:
    text = f"layer ... has unknown type {media_type!r}"
    return bad(text, of_layer(mediaType=media_type), umoci)


def with_urls(parts: Parts) -> Document:
    return of_layer(urls=[f"http://{parts.host}/foreign"])(parts)


def only_urls(parts: Parts) -> Document:
    root = with_urls(parts)
    del parts.blobs[parts.layers[0]["digest"]]
    return root


DESCRIPTORS = {
    "a layer of an unknown type": unknown_layer("application/x-tar"),
    "a foreign layer": unknown_layer(FOREIGN),
    "a layer that may not be distributed": unknown_layer(
        "application/vnd.oci.image.layer.nondistributable.v1.tar", LENIENT
    ),
    "an encrypted layer": unknown_layer(f"{TAR_LAYER}+encrypted"),
    "a layer of a type in capitals": unknown_layer(TAR_LAYER.upper()),
    "a layer of no type": unknown_layer(""),
    "a layer with addresses": fine(
        with_urls, umoci=refuses("skopeo does not copy a layer that has addresses")
    ),
    "a layer that is only elsewhere, from a registry": bad(
        "...: blob ...: ...", only_urls, doors=REGISTRY
    ),
    "a layer that is only elsewhere, in a layout": bad(
        "...: no such file", only_urls, doors=LAYOUT
    ),
    "a digest in capitals": bad(NO_DIGEST, of_layer(digest="sha256:" + "A" * 64)),
    "a digest that is a path": bad(NO_DIGEST, of_layer(digest="sha256:../../../../etc/passwd")),
    "a digest that is a path of the right length": bad(
        NO_DIGEST, of_layer(digest="sha256:../" + "a" * 61)
    ),
    "a digest that ends in a line": bad(NO_DIGEST, of_layer(digest="sha256:" + "a" * 64 + "\n")),
    "a digest of another length": bad(NO_DIGEST, of_layer(digest="sha256:" + "a" * 63)),
    "a digest of another algorithm": bad(NO_DIGEST, of_layer(digest="sha512:" + "a" * 128)),
    "a digest of no algorithm": bad(NO_DIGEST, of_layer(digest="a" * 64)),
    "no digest": bad("manifest is not acceptable: ...digest`...", of_layer(digest=None)),
    "a negative size": bad(NO_SIZE, of_layer(size=-1), umoci=LENIENT),
    "a size beyond all disks": bad(NO_SIZE, of_layer(size=1 << 62), umoci=LENIENT),
    "a size of 90 bits": bad("manifest is not acceptable: ...", of_layer(size=1 << 90)),
    "half a byte": bad(NO_SIZE, of_layer(size=10240.5)),
    "a size in words": bad(NO_SIZE, of_layer(size="10240")),
    "501 layers": bad(
        "image has 501 layers, more than 500",
        lambda parts: document(parts.manifest(layers=parts.layers * 501)),
        umoci=not_asked("takes half a minute"),
    ),
    "a configuration of an unknown type": bad(
        "not a container image: its configuration is 'application/vnd.cncf.helm.config.v1+json'",
        of_config(mediaType="application/vnd.cncf.helm.config.v1+json"),
    ),
    "a configuration of 8 MiB and a byte": bad(
        "configuration is larger than 8388608 bytes", of_config(size=(8 << 20) + 1)
    ),
}

# Content that is not what was promised ------------------------------------------------------


def spoiled(text: str, how: Callable[[bytes], bytes], doors: Doors = BOTH) -> Case:
    """The layer arrives otherwise."""
    (good,) = ONE
    return refused(text, Image(layers=(dataclasses.replace(good, spoil=how),)), doors=doors)


def config_spoiled(how: Callable[[bytes], bytes]) -> Root:
    def root(parts: Parts) -> Document:
        made = document(parts.manifest())
        digest = json.loads(made[1])["config"]["digest"]
        parts.blobs[digest] = how(parts.blobs[digest])
        return made

    return root


CONTENT = {
    "a layer with another byte": spoiled(
        "... has ...", lambda content: content[:600] + b"!" + content[601:]
    ),
    "a longer layer, from a registry": spoiled(
        "...: blob ...: longer than its 2048 bytes", lambda c: c + b"x", REGISTRY
    ),
    "a longer layer, in a layout": spoiled(
        "content of sha256:... is longer than its 2048 bytes", lambda c: c + b"x", LAYOUT
    ),
    "a shorter layer, from a registry": spoiled(
        "...: blob ...: ended after 2047 of 2048 bytes", lambda c: c[:-1], REGISTRY
    ),
    "a shorter layer, in a layout": spoiled(
        "content of sha256:... has 2047 bytes instead of 2048", lambda c: c[:-1], LAYOUT
    ),
    "a layer of nothing, in a layout": spoiled(
        "content of sha256:... has 0 bytes instead of 2048", lambda c: b"", LAYOUT
    ),
    "a layer longer than its size says, from a registry": bad(
        "...: blob ...: longer than its 2047 bytes", of_layer(size=2047), doors=REGISTRY
    ),
    "a layer longer than its size says, in a layout": bad(
        "content of sha256:... is longer than its 2047 bytes",
        of_layer(size=2047),
        doors=LAYOUT,
        umoci=LENIENT,
    ),
    "a configuration with another byte": bad(
        "content of sha256:... has digest sha256:...",
        config_spoiled(lambda c: c.replace(b"linux", b"Linux")),
    ),
    "a longer configuration, from a registry": bad(
        "...: blob ...: longer than its ... bytes",
        config_spoiled(lambda c: c + b" "),
        doors=REGISTRY,
    ),
    "a longer configuration, in a layout": bad(
        "content of sha256:... is longer than its ... bytes",
        config_spoiled(lambda c: c + b" "),
        doors=LAYOUT,
    ),
}

# Indexes ------------------------------------------------------------------------------------


def entry(parts: Parts, platform: Json | None = None, **changes: Any) -> Json:
    described = parts.json(parts.manifest(), MANIFEST)
    return described | ({"platform": platform} if platform else {}) | changes


def index(*platforms: Json | None, **changes: Any) -> Root:
    """An index of the image for each of these, with changed members of each entry."""

    def root(parts: Parts) -> Document:
        entries = [entry(parts, platform, **changes) for platform in platforms]
        return document(parts.index(*entries), INDEX)

    return root


def nested(depth: int) -> Root:
    def root(parts: Parts) -> Document:
        inner = entry(parts, HERE)
        for _ in range(depth - 1):
            inner = parts.json(parts.index(inner), INDEX)
        return document(parts.index(inner), INDEX)

    return root


def entry_spoiled(how: Callable[[bytes], bytes]) -> Root:
    def root(parts: Parts) -> Document:
        described = entry(parts, HERE)
        parts.blobs[described["digest"]] = how(parts.blobs[described["digest"]])
        return document(parts.index(described), INDEX)

    return root


def attested(parts: Parts) -> Document:
    """As BuildKit makes it: an image, and what is known of how it was built."""
    unknown = {"os": "unknown", "architecture": "unknown"}
    attestation = parts.json({}, MANIFEST) | {"platform": unknown}
    other = parts.json({}, "application/vnd.example+json")
    return document(parts.index(other, attestation, entry(parts, HERE)), INDEX)


NO_PLATFORM = f"image Manifest does not contain descriptor matching platform 'linux/{ARCHITECTURE}'"

INDEXES = {
    "for this platform and others": fine(index(ELSEWHERE, HERE)),
    "in Docker's words": fine(
        lambda parts: document(
            parts.index(entry(parts, HERE), mediaType=DOCKER_INDEX), DOCKER_INDEX
        ),
        umoci=refuses("skopeo looks for OCI's types in a layout"),
    ),
    "with what is no image": fine(attested),
    "in an index": fine(nested(2), refuses("follows one index")),
    "nested five deep": bad("indexes are nested more than 4 deep", nested(5)),
    "for other platforms": bad(NO_PLATFORM, index(ELSEWHERE)),
    "of nothing": bad(NO_PLATFORM, index()),
    "of what is no image": bad(
        NO_PLATFORM, index(HERE, mediaType="application/vnd.example+json"), umoci=LENIENT
    ),
    "of 10001 entries": bad(
        "image has 10001 manifests, more than 10000",
        lambda parts: document(parts.index(*[entry(parts, HERE)] * 10_001), INDEX),
        LENIENT,
    ),
    "that calls a manifest an index": bad(
        f"document is a manifest, but ... says '{INDEX}'",
        index(HERE, mediaType=INDEX),
        umoci=LENIENT,
    ),
    "that calls a manifest by another's type": bad(
        f"document is announced as {DOCKER_MANIFEST} and as {MANIFEST}",
        index(HERE, mediaType=DOCKER_MANIFEST),
        LENIENT,
    ),
    "with an entry of another digest": bad(
        "content of sha256:... has digest sha256:...",
        entry_spoiled(
            lambda content: content.replace(b'"schemaVersion": 2', b'"schemaVersion":2 ')
        ),
    ),
    "with an entry that is longer, from a registry": bad(
        "content of sha256:... is longer than its ... bytes",
        entry_spoiled(lambda content: content + b" "),
        doors=REGISTRY,
    ),
    "with an entry that is longer, in a layout": bad(
        "... is larger than ... bytes", entry_spoiled(lambda content: content + b" "), doors=LAYOUT
    ),
    "with an entry that says to be shorter, from a registry": bad(
        "content of sha256:... is longer than its 9 bytes", index(HERE, size=9), doors=REGISTRY
    ),
    "with an entry that says to be shorter, in a layout": bad(
        "... is larger than 9 bytes", index(HERE, size=9), doors=LAYOUT, umoci=LENIENT
    ),
    "with an entry of 4 MiB and a byte": bad(
        "manifest is larger than 4194304 bytes", index(HERE, size=(4 << 20) + 1), umoci=LENIENT
    ),
    "with an entry of a digest that is a path": bad(
        "manifest is not acceptable: ...digest`", index(HERE, digest="sha256:" + "../" * 21 + "x")
    ),
    "with an entry that is nowhere, from a registry": bad(
        "...: not found", index(HERE, digest="sha256:" + "0" * 64), doors=REGISTRY
    ),
    "with an entry that is nowhere, in a layout": bad(
        "...: no such file", index(HERE, digest="sha256:" + "0" * 64), doors=LAYOUT
    ),
}

# Configurations -----------------------------------------------------------------------------

DIFF_ID = "sha256:" + "a" * 64
NOT_ACCEPTABLE = "image configuration is not acceptable: ..."
IMAGE_ONLY = accepts("unpacks; it would be for a runtime to say")


def configured(**changes: Any) -> Root:
    """With these members of the configuration."""

    def root(parts: Parts) -> Document:
        parts.configuration |= changes
        return document(parts.manifest())

    return root


def rootfs(**members: Any) -> Root:
    def root(parts: Parts) -> Document:
        parts.configuration["rootfs"] |= members
        return document(parts.manifest())

    return root


def raw_config(content: bytes) -> Root:
    return lambda parts: document(parts.manifest(config=parts.blob(content, CONFIG)))


def settings(text: str, umoci: Umoci = IMAGE_ONLY, **members: Any) -> Case:
    """Refused for what it says of how to run it."""
    return refused(text, Image(layers=ONE, config=members), umoci)


CONFIGURATIONS = {
    "no JSON": bad(NOT_ACCEPTABLE, raw_config(b"{")),
    "of nothing": bad(NOT_ACCEPTABLE, raw_config(b"{}")),
    "nested without end": bad(NOT_ACCEPTABLE, raw_config(b'{"x":' * 100_000)),
    "for another processor": bad(
        f"image is for platform 'linux/s390x', not linux/{ARCHITECTURE}",
        configured(architecture="s390x"),
        LENIENT,
    ),
    "for another system": bad(
        f"image is for platform 'windows/{ARCHITECTURE}', not linux/{ARCHITECTURE}",
        configured(os="windows"),
    ),
    "for a newer variant": bad(
        f"image is for platform 'linux/{ARCHITECTURE}/v9', not linux/{ARCHITECTURE}",
        configured(variant="v9"),
        LENIENT,
    ),
    "for no platform": bad(
        f"image is for platform '', not linux/{ARCHITECTURE}",
        configured(os="", architecture=""),
    ),
    "for another platform than its index says": bad(
        f"image is for platform 'linux/s390x', not linux/{ARCHITECTURE}",
        lambda parts: (configured(architecture="s390x")(parts), index(HERE)(parts))[1],
        LENIENT,
    ),
    "with fewer diff_ids than layers": bad(
        "image has 1 layers, but its configuration 0 diff_ids", rootfs(diff_ids=[])
    ),
    "with more diff_ids than layers": bad(
        "image has 1 layers, but its configuration 2 diff_ids", rootfs(diff_ids=[DIFF_ID] * 2)
    ),
    "with a diff_id that is a path": bad(
        NOT_ACCEPTABLE, rootfs(diff_ids=["sha256:../" + "a" * 61])
    ),
    "with a diff_id of another algorithm": bad(NOT_ACCEPTABLE, rootfs(diff_ids=["md5:1"])),
    "with a rootfs of another type": bad(
        "image configuration has a rootfs of type 'disks'", rootfs(type="disks")
    ),
    "that says nothing of how to run it": fine(configured(config=None)),
    "Entrypoint in one text": settings(NOT_ACCEPTABLE, Entrypoint="/bin/sh", umoci=SAME),
    "Entrypoint with a number": settings(NOT_ACCEPTABLE, Entrypoint=["/bin/sh", 1], umoci=SAME),
    "Entrypoint with a NUL": settings(
        "Entrypoint of the image contains a NUL byte", Entrypoint=["a\0"]
    ),
    "Cmd in one text": settings(NOT_ACCEPTABLE, Cmd="true", umoci=SAME),
    "Cmd with a NUL": settings("Cmd of the image contains a NUL byte", Cmd=["a\0b"]),
    "Cmd of 10001 words": settings("image has 10001 Cmd, more than 10000", Cmd=["a"] * 10_001),
    "Env with a NUL": settings("Env of the image contains a NUL byte", Env=["A=a\0B=b"]),
    "Env as a map": settings(NOT_ACCEPTABLE, Env={"A": "b"}, umoci=SAME),
    "Env with half a character": bad(
        NOT_ACCEPTABLE,
        lambda parts: raw_config(
            json.dumps(parts.configuration | {"config": {"Env": ["A=\ud800"]}}).encode()
        )(parts),
        IMAGE_ONLY,
    ),
    "Env in another encoding": bad(
        NOT_ACCEPTABLE,
        lambda parts: raw_config(
            json.dumps(parts.configuration | {"config": {"Env": ["A=@"]}})
            .encode()
            .replace(b"@", b"\xff")
        )(parts),
        IMAGE_ONLY,
    ),
    "WorkingDir that is not absolute": settings(
        "WorkingDir of the image: '../etc' is not an absolute path", WorkingDir="../etc"
    ),
    "WorkingDir with a NUL": settings(
        "WorkingDir of the image contains a NUL byte", WorkingDir="/a\0"
    ),
    "User with a NUL": settings("User of the image contains a NUL byte", User="0\0", umoci=SAME),
    "User as a number": settings(NOT_ACCEPTABLE, User=0, umoci=SAME),
    "StopSignal that is none": settings(
        "StopSignal of the image: 'SIGNOTHING' is not a signal", StopSignal="SIGNOTHING"
    ),
    "StopSignal 0": settings("StopSignal of the image: '0' is not a signal", StopSignal="0"),
    "StopSignal 65": settings("StopSignal of the image: '65' is not a signal", StopSignal="65"),
    "StopSignal in other digits": settings(
        "StopSignal of the image: '\u0661\u0665' is not a signal", StopSignal="\u0661\u0665"
    ),
    "Volumes that are not absolute": settings(
        "Volumes of the image: '../data' is not an absolute path", Volumes={"../data": {}}
    ),
    "Labels that are no texts": settings(NOT_ACCEPTABLE, Labels={"a": 1}, umoci=SAME),
}

CASES: dict[str, Case] = numbered(
    {
        "documents": MEANINGS,
        "descriptors": DESCRIPTORS,
        "content": CONTENT,
        "indexes": INDEXES,
        "configurations": CONFIGURATIONS,
    }
)
