"""What images and registries bring: any bytes give a value or an ImageError, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox.errors import ConfigError, ImageError, KernelError, ReferenceInvalid, RegistryError
from sandbox.images import answers, documents, reference, unpacking
from sandbox.images.archives import ArchiveSource, LayoutSource
from sandbox.images.credentials import Credentials, DockerConfig
from sandbox.images.documents import LAYER_TYPES, Index, Manifest, Platform
from sandbox.images.layer_stream import PIECE_BYTES, decoder
from sandbox.images.reference import ArchiveReference, LayoutReference, Reference
from sandbox.images.registry import RegistryClient
from sandbox.images.root_archive import describe_root
from sandbox.images.users import resolve_user
from sandbox.model.image import ImageConfig
from tests.fuzz.hostile_bytes import changed_json, hostile

D = "sha256:" + "ab" * 32
AMD64 = Platform(os="linux", architecture="amd64")
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": documents.MANIFEST_TYPES[0],
    "config": {"mediaType": documents.CONFIG_TYPES[0], "digest": D, "size": 10},
    "layers": [{"mediaType": documents.GZIP_LAYER, "digest": D, "size": 20, "urls": ["file:///x"]}],
    "annotations": {"a": "b"},
}
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "manifests": [
        {
            "mediaType": documents.MANIFEST_TYPES[0],
            "digest": D,
            "size": 9,
            "platform": {"os": "linux", "architecture": "arm", "variant": "v7"},
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
        }
    ],
}
CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2020-01-01T00:00:00Z",
    "rootfs": {"type": "layers", "diff_ids": [D]},
    "config": {
        "User": "1:1",
        "Env": ["A=b", "C"],
        "Entrypoint": ["/x"],
        "Cmd": None,
        "Volumes": {"/v": {}},
        "ExposedPorts": {"80/tcp": {}},
        "WorkingDir": "/",
        "StopSignal": "SIGRTMIN+3",
        "Labels": {"a": "b"},
    },
}
NAMES = [
    b"busybox",
    b"me/tool:1.0",
    b"localhost:5000/a/b@" + D.encode(),
    b"[::1]:5000/x:y",
    b"oci:/dir/x:tag",
    b"docker-archive:/file.tar",
    b"xn--a.b:65536/c",
]


# Names ---------------------------------------------------------------------------------------


@given(hostile(NAMES))
def test_a_name_is_refused_or_means_the_same_when_it_is_written_out(data: bytes) -> None:
    try:
        found = reference.parse(os.fsdecode(data))
    except ReferenceInvalid as error:
        assert len(str(error)) < 1000
        return
    if isinstance(found, Reference):
        assert str(reference.parse(str(found))) == str(found)
        assert str(found).isascii() and str(found).isprintable() and " " not in str(found)
        assert found.digest is None or reference.DIGEST.fullmatch(found.digest)


@given(hostile(NAMES))
def test_a_name_leads_to_one_place_of_one_registry_or_nowhere(data: bytes) -> None:
    async def place(name: Reference) -> str:
        async with RegistryClient() as client:
            return client.source(name).url(f"manifests/{name.target}")

    try:
        name = reference.parse_name(data.decode("latin-1"))
        url = trio.run(place, name)
    except (ReferenceInvalid, RegistryError):
        return
    assert url.partition("://")[2].partition("/")[2] == f"v2/{name.path}/manifests/{name.target}"


@given(hostile([D.encode(), D.upper().encode(), b"sha512:" + b"0" * 128]))
@example(D.encode() + b"\n")
def test_a_digest_is_64_lower_case_digits_of_sha256_and_nothing_else(data: bytes) -> None:
    text = data.decode("latin-1")
    digits = set("0123456789abcdef")
    good = len(text) == 71 and text.startswith("sha256:") and set(text[7:]) <= digits
    assert bool(reference.DIGEST.fullmatch(text)) is good


# Documents -----------------------------------------------------------------------------------


SAID = ["", *documents.MANIFEST_TYPES, "text/plain"]


@given(hostile([], [MANIFEST, INDEX]), st.sampled_from(SAID))
def test_a_document_is_a_manifest_or_an_index_or_refused(data: bytes, said: str) -> None:
    try:
        found = documents.parse_document(data, content_type=said)
    except ImageError as error:
        assert str(error).isprintable()
        return
    if isinstance(found, Manifest):
        assert all(layer.media_type in LAYER_TYPES for layer in found.layers)
        described = (found.config, *found.layers)
    else:
        assert isinstance(found, Index) and said not in documents.MANIFEST_TYPES
        described = found.manifests
    assert all(reference.DIGEST.fullmatch(each.digest) and each.size >= 0 for each in described)


@given(hostile([], [CONFIG]))
def test_a_configuration_is_what_a_task_can_use_or_refused(data: bytes) -> None:
    manifest = documents.parse_document(_json(MANIFEST))
    assert isinstance(manifest, Manifest)
    try:
        found = documents.parse_config(data, manifest, AMD64)
    except ImageError as error:
        assert str(error).isprintable()
        return
    config = found.config
    texts = [*config.entrypoint, *config.cmd, config.user, config.working_dir, *config.volumes]
    assert not any("\0" in text for text in texts + [f"{a}={b}" for a, b in config.env])
    assert 1 <= config.stop_signal <= 64
    assert len(found.diff_ids) == 1


def _json(value: object) -> bytes:

    return json.dumps(value).encode()


# Registries ----------------------------------------------------------------------------------


CHALLENGES = [b'Bearer realm="https://a/t",service="s",scope="x:y:pull"', b"Basic a=b"]


@given(st.lists(hostile(CHALLENGES)))
def test_a_challenge_is_understood_as_far_as_it_is_one(headers: list[bytes]) -> None:
    for scheme, parameters in answers.challenges(h.decode("latin-1") for h in headers).items():
        assert scheme == scheme.lower() != ""
        assert all(isinstance(value, str) for value in parameters.values())


@given(hostile([], [{"token": "a", "access_token": "b", "expires_in": 300}]))
def test_a_token_is_fit_for_a_header_or_none(data: bytes) -> None:
    found = answers.token(data)
    assert found is None or (found.isascii() and found.isprintable() and " " not in found and found)


REFUSAL = {"errors": [{"code": "DENIED", "message": "no\x1b[2J"}] * 4}


@given(st.integers(100, 999), hostile([], [REFUSAL]))
def test_a_refusal_is_one_printable_line_of_bounded_length(status: int, data: bytes) -> None:
    line = answers.refusal(status, data)
    assert line.startswith(str(status)) and line.isprintable() and len(line) < 400


@given(hostile([b"120", b"Thu, 01 Jan 2099 00:00:00 GMT", b"Thu, 01 Jan 1970 00:00:00 -9999"]))
def test_a_pause_is_a_number_of_seconds_that_is_not_negative(data: bytes) -> None:
    assert answers.retry_after(data.decode("latin-1"), 1e9) >= 0


LOGINS: dict[str, Any] = {
    "auths": {
        "https://index.docker.io/v1/": {"auth": "bWU6c2VjcmV0"},
        "h:5000": {"username": "a", "password": "b", "identitytoken": "c"},
    },
    "credHelpers": {"x": "y"},
    "credsStore": "z",
}


@given(hostile([], [LOGINS]))
@example('{"auths":{"docker.io":{"auth":"\u0663"}}}'.encode())
def test_dockers_configuration_gives_credentials_or_says_what_is_wrong(data: bytes) -> None:
    with file_of(data) as path:
        try:
            config = DockerConfig.load(path)
            found = [config.for_host(host) for host in ("docker.io", "h:5000", "x", "")]
        except ConfigError:
            return
    assert all(one is None or isinstance(one, Credentials) for one in found)


# Archives ------------------------------------------------------------------------------------


@contextmanager
def file_of(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(data)
        yield path


def tar_of(files: dict[str, bytes], **kinds: tuple[bytes, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, (kind, target) in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return out.getvalue()


INNER = tar_of({"a" * 120: b"b"})
LISTING = [{"Config": "c.json", "RepoTags": ["x:y"], "Layers": ["l/layer.tar"]}]
SAVED = tar_of({"manifest.json": _json(LISTING), "c.json": _json(CONFIG), "l/layer.tar": INNER})
LINKED = tar_of(
    {"manifest.json": _json(LISTING), "c.json": _json(CONFIG), "x": INNER},
    **{"l/layer.tar": (tarfile.SYMTYPE, "../x"), "circle": (tarfile.SYMTYPE, "circle")},
)


@given(hostile([SAVED, LINKED]))
def test_a_saved_image_gives_a_manifest_or_is_refused(data: bytes) -> None:
    with file_of(data) as path:
        source = ArchiveSource(ArchiveReference(file=path))
        try:
            document = trio.run(source.root)
        except ImageError:
            return
    assert isinstance(documents.parse_document(document.body), Manifest)


@given(changed_json([LISTING]), changed_json([CONFIG]))
def test_a_saved_image_with_another_table_of_contents_is_read_or_refused(
    listing: bytes, config: bytes
) -> None:
    saved = tar_of({"manifest.json": listing, "c.json": config, "l/layer.tar": INNER})
    with file_of(saved) as path:
        try:
            trio.run(ArchiveSource(ArchiveReference(file=path)).root)
        except ImageError:
            return


@given(hostile([], [INDEX]), st.sampled_from([None, "latest"]))
def test_a_layout_gives_an_index_or_is_refused(data: bytes, tag: str | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "oci-layout").write_text("{}")
        (Path(directory) / "index.json").write_bytes(data)
        source = LayoutSource(LayoutReference(directory=Path(directory), tag=tag))
        try:
            document = trio.run(source.root)
        except ImageError:
            return
    assert isinstance(documents.parse_document(document.body), Index)


COMPRESSED = [
    INNER,
    gzip.compress(INNER, mtime=0) * 2,
    zstandard.compress(INNER) * 2,
    zstandard.ZstdCompressor(write_checksum=True).compress(INNER),
]


@pytest.mark.parametrize("media_type", LAYER_TYPES[:3])
@given(hostile(COMPRESSED), st.integers(1, 700))
def test_a_layer_is_decompressed_in_bounded_pieces_or_refused(
    media_type: str, data: bytes, size: int
) -> None:
    stream = io.BytesIO(data)
    try:
        for piece in decoder(media_type)(lambda: stream.read(size)):
            assert len(piece) <= PIECE_BYTES + 64
    except ImageError:
        return


@given(st.binary(max_size=5000), st.sampled_from([gzip.compress, zstandard.compress]), st.data())
def test_a_layer_cut_off_anywhere_is_not_a_whole_one(
    content: bytes, compress: Any, data: st.DataObject
) -> None:
    packed = compress(content)
    kind = decoder(LAYER_TYPES[1] if packed[:2] == b"\x1f\x8b" else LAYER_TYPES[2])
    whole = io.BytesIO(packed)
    assert b"".join(kind(lambda: whole.read(100))) == content
    part = io.BytesIO(packed[: data.draw(st.integers(1, len(packed) - 1))])
    with pytest.raises(ImageError):
        list(kind(lambda: part.read(100)))


@given(hostile(COMPRESSED))
def test_a_root_archive_is_described_or_refused(data: bytes) -> None:
    with file_of(data) as path:
        try:
            trio.run(describe_root, path, ImageConfig(), AMD64)
        except ImageError:
            return


# Inside of an image --------------------------------------------------------------------------

PASSWD = b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"
GROUP = b"root:x:0:\nwheel:x:10:app,root\napp:x:1001:\n"
SPECS = [b"app", b"1000", b"app:wheel", b"0:0", b"1000:wheel", b""]


@given(hostile([PASSWD]), hostile([GROUP]), hostile(SPECS))
@example(PASSWD, GROUP, "٣".encode())
@example(PASSWD, GROUP, b"4294967296")
@example(PASSWD, GROUP, b"-1")
def test_a_user_is_one_of_the_tasks_ids_and_a_number_is_itself(
    passwd: bytes, group: bytes, spec: bytes
) -> None:
    text = spec.decode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory() as directory:
        etc = Path(directory) / "etc"
        etc.mkdir()
        (etc / "passwd").write_bytes(passwd)
        (etc / "group").write_bytes(group)
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            user = resolve_user(root, text)
        except ImageError:
            return
        finally:
            os.close(root)
    assert all(0 <= number < 65536 for number in (user.uid, user.gid, *user.groups))
    name = text.partition(":")[0]
    if name.isascii() and name.isdecimal():
        assert user.uid == int(name)


REPORTS = [b"Wa/b\0Oc\0Dd\0K12 345\0", b"Ea/b: open: No space left on device\0", b"K0 0\0"]


@given(hostile(REPORTS))
@example(b"K" + b"9" * 5000 + b" 1\0")
def test_what_the_unpacker_reports_is_understood_or_refused(report: bytes) -> None:
    try:
        found = unpacking._parse(report)
    except (ImageError, KernelError) as error:
        assert str(error).isprintable()
        return
    assert found.entries >= 0 and found.size_bytes >= 0
