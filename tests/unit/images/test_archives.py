from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.errors import ImageError
from sandbox.images import documents
from sandbox.images.archives import ArchiveSource, LayoutSource
from sandbox.images.documents import GZIP_LAYER, TAR_LAYER, Platform
from sandbox.images.reference import ArchiveReference, LayoutReference
from sandbox.images.sources import Resolved, read_small, resolve

LAYER = b"a layer" * 1000
AMD64 = Platform(os="linux", architecture="amd64")
Write = Callable[[tarfile.TarFile], None]


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def config(*layers: bytes) -> bytes:
    diff_ids = [sha256(layer) for layer in layers]
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": diff_ids}}
    return json.dumps(document).encode()


def file(name: str, content: bytes) -> Write:
    def write(archive: tarfile.TarFile) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))

    return write


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Write:
    def write(archive: tarfile.TarFile) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, target
        archive.addfile(entry)

    return write


def listing(*layers: str, config: str = "config.json") -> Write:
    return file("manifest.json", json.dumps([{"Config": config, "Layers": layers}]).encode())


def archive(tmp_path: Path, *entries: Write) -> ArchiveSource:
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w") as made:
        for entry in entries:
            entry(made)
    return ArchiveSource(ArchiveReference(file=path))


async def resolved(source: ArchiveSource) -> Resolved:
    return await resolve(source, AMD64)


async def test_an_archive_gets_the_same_manifest_each_time(tmp_path: Path) -> None:
    entries = [file("config.json", config(LAYER)), file("a/layer.tar", LAYER)]
    source = archive(tmp_path, *entries, listing("a/layer.tar"))
    first, second = await resolved(source), await resolved(source)
    assert first == second
    (layer,) = first.manifest.layers
    assert (layer.digest, layer.media_type) == (sha256(LAYER), TAR_LAYER)
    assert await read_small(source, layer) == LAYER
    body = await read_small(source, first.manifest.config)
    assert documents.parse_config(body, first.manifest, AMD64).diff_ids == (layer.digest,)


async def test_equal_layers_are_stored_as_links(tmp_path: Path) -> None:
    source = archive(
        tmp_path,
        file("config.json", config(LAYER, LAYER, LAYER)),
        file("a/layer.tar", LAYER),
        link("b/layer.tar", "../a/layer.tar"),
        link("c/layer.tar", "a/layer.tar", tarfile.LNKTYPE),
        listing("a/layer.tar", "b/layer.tar", "c/layer.tar"),
    )
    layers = (await resolved(source)).manifest.layers
    assert [layer.digest for layer in layers] == [sha256(LAYER)] * 3


async def test_a_compressed_layer_has_a_digest_of_its_own(tmp_path: Path) -> None:
    packed = gzip.compress(LAYER)
    entries = [file("config.json", config(LAYER)), file("blobs/sha256/x", packed)]
    source = archive(tmp_path, *entries, listing("blobs/sha256/x"))
    (layer,) = (await resolved(source)).manifest.layers
    assert (layer.digest, layer.media_type) == (sha256(packed), GZIP_LAYER)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "lacks 'manifest.json'"),
        ([file("manifest.json", b"[]")], "holds no image"),
        ([file("manifest.json", b"{}")], "manifest.json"),
        ([file("manifest.json", b"[" * 100_000)], "manifest.json"),
        ([file("manifest.json", b'["\xff"]')], "manifest.json"),
        ([listing()], "lacks 'config.json'"),
        ([file("config.json", b"{}"), listing()], "image configuration"),
        ([file("config.json", config(LAYER)), listing()], "0 layers, but 1 diff_ids"),
        ([file("config.json", config(LAYER)), listing("x")], "lacks 'x'"),
        (
            [file("config.json", config(LAYER)), link("x", "x"), listing("x")],
            "is a link to a link",
        ),
        (
            [file("config.json", config(LAYER)), link("x", "/etc/shadow"), listing("x")],
            "lacks 'x'",
        ),
        (
            [file("config.json", config(LAYER)), link("x", "", tarfile.FIFOTYPE), listing("x")],
            "not a regular file",
        ),
    ],
)
async def test_archives_that_hold_no_image_say_what_is_wrong(
    tmp_path: Path, entries: list[Write], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        await resolved(archive(tmp_path, *entries))


async def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2 << 30
    path = tmp_path / "image.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    with path.open("r+b") as sparse:
        sparse.truncate(3 << 30)
    with pytest.raises(ImageError, match="header of 2147483648 bytes"):
        await resolved(ArchiveSource(ArchiveReference(file=path)))


async def test_a_compressed_archive_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "image.tar.gz"
    path.write_bytes(gzip.compress(b"x"))
    with pytest.raises(ImageError, match="decompress it first"):
        await resolved(ArchiveSource(ArchiveReference(file=path)))


async def test_names_of_a_layout_are_told_in_one_printable_line(tmp_path: Path) -> None:
    tags = ["plain", "\x1b[31m\nred"]
    entry = {"mediaType": documents.MANIFEST_TYPES[0], "digest": sha256(b""), "size": 0}
    manifests = [
        {**entry, "annotations": {"org.opencontainers.image.ref.name": tag}} for tag in tags
    ]
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    index = {"schemaVersion": 2, "manifests": manifests}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ImageError) as caught:
        await LayoutSource(LayoutReference(directory=tmp_path)).root()
    assert str(caught.value).endswith(r"of '\x1b[31m\nred', 'plain'")
