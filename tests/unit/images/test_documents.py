from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import ImageError
from sandbox.images import documents
from sandbox.images.documents import (
    CONFIG_TYPES,
    GZIP_LAYER,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Index,
    Manifest,
    Platform,
    choose,
    parse_config,
    parse_document,
    parse_platform,
    parse_signal,
)

D = ["sha256:" + f"{n:02x}" * 32 for n in range(8)]
AMD64 = Platform(os="linux", architecture="amd64")


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPES[0],
        "config": {"mediaType": CONFIG_TYPES[0], "digest": D[0], "size": 10},
        "layers": [{"mediaType": GZIP_LAYER, "digest": D[1], "size": 20}],
        **changes,
    }


def index(*platforms: str | None) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for n, name in enumerate(platforms):
        entry: dict[str, Any] = {"mediaType": MANIFEST_TYPES[0], "digest": D[n], "size": 9}
        if name is not None:
            parts = [*name.split("/"), ""]
            entry["platform"] = {"os": parts[0], "architecture": parts[1], "variant": parts[2]}
        entries.append(entry)
    return {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": entries}


def parse(document: object, **said: str) -> Manifest | Index:
    return parse_document(json.dumps(document).encode(), **said)


def config(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [D[3]]},
        **changes,
    }
    return json.dumps(document).encode()


def settings(**values: Any) -> documents.ImageConfig:
    one = parse(manifest())
    assert isinstance(one, Manifest)
    return parse_config(config(config=values), one, AMD64).config


# Documents


def test_a_manifest_gives_its_configuration_and_layers_in_order() -> None:
    layers = [{"mediaType": GZIP_LAYER, "digest": d, "size": 1} for d in (D[2], D[1])]
    parsed = parse(manifest(layers=layers))
    assert isinstance(parsed, Manifest)
    assert [layer.digest for layer in parsed.layers] == [D[2], D[1]]


@pytest.mark.parametrize("types", [MANIFEST_TYPES, INDEX_TYPES])
def test_both_vocabularies_are_understood(types: tuple[str, str]) -> None:
    for media_type in types:
        body = manifest() if types is MANIFEST_TYPES else index("linux/amd64")
        body["mediaType"] = media_type
        kind = Manifest if types is MANIFEST_TYPES else Index
        assert isinstance(parse(body, content_type=f"{media_type}; charset=utf-8"), kind)


def test_a_manifest_without_a_media_type_is_known_by_what_it_holds() -> None:
    body = manifest()
    del body["mediaType"]
    assert isinstance(parse(body, content_type="text/plain"), Manifest)


@pytest.mark.parametrize(
    ("document", "said", "message"),
    [
        ({**manifest(), **index()}, {}, "at the same time"),
        ({**index(), "layers": []}, {}, "at the same time"),
        (manifest(), {"content_type": INDEX_TYPES[0]}, "Content-Type"),
        (manifest(), {"expected": INDEX_TYPES[0]}, "the descriptor"),
        (manifest(), {"expected": MANIFEST_TYPES[1]}, "announced as"),
        (manifest(mediaType=INDEX_TYPES[0]), {}, "its own mediaType"),
        (index("linux/amd64"), {"content_type": MANIFEST_TYPES[1]}, "Content-Type"),
        ({"schemaVersion": 1, "fsLayers": []}, {}, "schema 1"),
        ({}, {}, "neither"),
        ([], {}, "not acceptable"),
        (manifest(layers=[{"mediaType": "x/y", "digest": D[0], "size": 1}]), {}, "unknown type"),
        (manifest(layers=[{"mediaType": GZIP_LAYER, "digest": D[0], "size": -1}]), {}, "size"),
        (manifest(layers=[{"mediaType": GZIP_LAYER, "digest": "../x", "size": 1}]), {}, "digest"),
        (
            manifest(layers=[{"mediaType": GZIP_LAYER, "digest": D[0] + "\n", "size": 1}]),
            {},
            "digest",
        ),
        (manifest(config={"mediaType": "a/b", "digest": D[0], "size": 1}), {}, "not a container"),
        (
            manifest(config={"mediaType": CONFIG_TYPES[0], "digest": D[0], "size": 9 << 20}),
            {},
            "configuration is larger",
        ),
        (
            manifest(layers=[{"mediaType": GZIP_LAYER, "digest": D[0], "size": 1}] * 501),
            {},
            "501 layers",
        ),
    ],
)
def test_a_document_that_is_not_one_thing_is_refused(
    document: object, said: dict[str, str], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        parse(document, **said)


def test_foreign_layers_are_an_unknown_type() -> None:
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    layer = {"mediaType": foreign, "digest": D[0], "size": 1, "urls": ["http://x/"]}
    with pytest.raises(ImageError, match="unknown type"):
        parse(manifest(layers=[layer]))


def test_a_document_beyond_the_bound_is_not_even_parsed() -> None:
    with pytest.raises(ImageError, match="larger"):
        parse_document(b"[" * (documents.MAX_MANIFEST_BYTES + 1))


def test_nesting_without_end_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(ImageError, match="not acceptable"):
        parse_document(b'{"x":' + b"[" * 1_000_000)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_document_or_refused(body: bytes) -> None:
    with pytest.raises(ImageError):
        parse_document(body)


# Platforms


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", 1),
        (["windows/amd64", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm64/v8"], "linux/arm64", 0),
        (["linux/arm64"], "linux/arm64/v8", 0),
        (["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v7", 1),
        (["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6", 1),
        ([None, "linux/amd64"], "linux/amd64", 1),
        ([None], "linux/amd64", 0),
        (["unknown/unknown", "linux/amd64"], "linux/amd64", 1),
    ],
)
def test_the_best_entry_for_a_platform_is_chosen(
    offered: list[str | None], wanted: str, chosen: int
) -> None:
    parsed = parse(index(*offered))
    assert isinstance(parsed, Index)
    assert choose(parsed, parse_platform(wanted)).digest == D[chosen]


@pytest.mark.parametrize("offered", [[], ["linux/arm64"], ["linux/amd64/v3"]])
def test_a_platform_that_is_not_offered_is_named(offered: list[str | None]) -> None:
    parsed = parse(index(*offered))
    assert isinstance(parsed, Index)
    with pytest.raises(ImageError, match="matching platform 'linux/amd64'"):
        choose(parsed, AMD64)


@pytest.mark.parametrize("text", ["linux", "Linux/amd64", "linux/amd64/v1/x", "linux/", "a b/c"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="os/arch"):
        parse_platform(text)


# Configurations


def test_a_configuration_says_how_to_run() -> None:
    read = settings(
        User="nobody",
        Env=["PATH=/bin", "A=1=2", "NOTHING", "A=3", "=x"],
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["true"],
        WorkingDir="/srv",
        StopSignal="SIGQUIT",
        Volumes={"/data": {}},
        ExposedPorts={"80/tcp": {}},
        Labels={"a": "b"},
    )
    assert read.env == (("PATH", "/bin"), ("A", "3"))
    assert (read.entrypoint, read.cmd) == (("/bin/sh", "-c"), ("true",))
    assert (read.user, read.working_dir, read.stop_signal) == ("nobody", "/srv", 3)
    assert (read.volumes, read.exposed_ports) == (("/data",), ("80/tcp",))
    assert read.labels == {"a": "b"}


def test_nulls_are_absent() -> None:
    members = ("User", "Env", "Entrypoint", "Cmd", "Volumes", "Labels", "StopSignal")
    assert settings(**dict.fromkeys(members)) == documents.ImageConfig()


@pytest.mark.parametrize(
    "values",
    [
        {"Cmd": "true"},
        {"Entrypoint": "/bin/sh"},
        {"Cmd": ["a\0b"]},
        {"Env": ["A=\0"]},
        {"Env": [1]},
        {"WorkingDir": "srv"},
        {"WorkingDir": "/a\0"},
        {"User": "a\0"},
        {"Volumes": {"data": {}}},
        {"StopSignal": "SIGNOTHING"},
        {"StopSignal": "0"},
        {"StopSignal": "65"},
        {"StopSignal": "\u0661"},
    ],
)
def test_settings_that_cannot_be_run_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ImageError):
        settings(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "arm64"}, "is for platform 'linux/arm64', not linux/amd64"),
        ({"os": "windows"}, "windows"),
        ({"rootfs": {"type": "layers", "diff_ids": []}}, "1 layers, but its configuration 0"),
        ({"rootfs": {"type": "layers", "diff_ids": ["md5:1"]}}, "diff_ids"),
        ({"rootfs": {"type": "disks", "diff_ids": [D[1]]}}, "type 'disks'"),
    ],
)
def test_a_configuration_of_another_image_is_refused(changes: dict[str, Any], message: str) -> None:
    one = parse(manifest())
    assert isinstance(one, Manifest)
    with pytest.raises(ImageError, match=message):
        parse_config(config(**changes), one, AMD64)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 15),
        ("SIGTERM", 15),
        ("term", 15),
        ("9", 9),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-1", 63),
        ("64", 64),
    ],
)
def test_a_signal_has_a_name_or_a_number(text: str, number: int) -> None:
    assert parse_signal(text) == number


def test_a_descriptor_is_shown_in_twelve_digits() -> None:
    assert Descriptor(digest=D[1], size=1).short == "01" * 6
