from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sandbox.errors import ReferenceInvalid
from sandbox.images.reference import (
    ArchiveReference,
    LayoutReference,
    Reference,
    is_loopback,
    parse,
    parse_name,
)

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("me/tool", "docker.io/me/tool:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:y", "localhost:5000/x:y"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("quay.io/org/app__x-y.z", "quay.io/org/app__x-y.z:latest"),
        ("Registry/x", "Registry/x:latest"),
        ("host:5000", "docker.io/library/host:5000"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        ("a---b/c", "docker.io/a---b/c:latest"),
    ],
)
def test_a_name_is_normalised_as_docker_does(text: str, normal: str) -> None:
    assert str(parse(text)) == normal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-busybox",
        "busybox:",
        "busybox:-x",
        "busy box",
        "busybox\n",
        "busybox@",
        "a//b",
        "a/../b",
        "host:port/x",
        "http://host/x",
        "user@host/x",
        "a___b",
        "a..b/c/d",
        "a" * 64,
        "busybox:" + "t" * 129,
        "busybox@sha256:" + "F" * 64,
        "busybox@sha256:" + "f" * 63,
        "busybox@sha512:" + "f" * 128,
        "busybox@md5:" + "f" * 32,
        "x/" + "y" * 256,
        "z" * 5000,
        "caf\u00e9",
        "oci:",
        "oci:dir:bad tag",
        "docker-archive:",
    ],
)
def test_what_is_no_name_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ReferenceInvalid) as raised:
        parse(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_upper_case_is_named_as_the_reason() -> None:
    with pytest.raises(ReferenceInvalid, match="must be lower case"):
        parse("docker.io/library/BusyBox:LATEST")


def test_a_tag_may_have_capitals() -> None:
    assert str(parse("busybox:RC1")) == "docker.io/library/busybox:RC1"


def test_a_digest_is_what_is_asked_for_when_there_is_also_a_tag() -> None:
    reference = parse_name(f"busybox:1@{DIGEST}")
    assert (reference.tag, reference.digest, reference.target) == ("1", DIGEST, DIGEST)


def test_docker_hub_answers_at_another_host_than_its_name() -> None:
    assert parse_name("busybox").host == "registry-1.docker.io"
    assert parse_name("quay.io/x").host == "quay.io"


@pytest.mark.parametrize(
    ("text", "directory", "tag"),
    [
        ("oci:dir", "dir", None),
        ("oci:dir:tag", "dir", "tag"),
        ("oci:/a/b:c/d", "/a/b:c/d", None),
        ("oci:/a/b:c/d:e", "/a/b:c/d", "e"),
        ("oci:/a/b:c:d", "/a/b:c", "d"),
    ],
)
def test_a_layout_splits_at_the_last_colon_after_the_last_slash(
    text: str, directory: str, tag: str | None
) -> None:
    assert parse(text) == LayoutReference(directory=Path(directory), tag=tag)


def test_an_archive_is_a_path_with_whatever_is_in_it() -> None:
    assert parse("docker-archive:/a b:c.tar") == ArchiveReference(file=Path("/a b:c.tar"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.9.9.9:80", True),
        ("[::1]:5000", True),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com", False),
        ("10.0.0.1:5000", False),
        ("registry-1.docker.io", False),
    ],
)
def test_only_this_machine_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


segments = st.from_regex(r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+){0,2}", fullmatch=True).filter(
    lambda s: len(s) < 60 and not re.fullmatch("[a-f0-9]{64}", s)
)
tags = st.from_regex(re.compile(r"\w[\w.-]{0,127}", re.ASCII), fullmatch=True)


@given(
    st.sampled_from(["", "localhost/", "h.example/", "127.0.0.1:5000/"]),
    st.lists(segments, min_size=1, max_size=3),
    st.none() | tags,
    st.sampled_from(["", f"@{DIGEST}"]),
)
def test_a_normalised_name_stays_as_it_is(
    domain: str, path: list[str], tag: str | None, digest: str
) -> None:
    assume(domain or len(path) == 1 or "." not in path[0])  # with a dot it would be a domain
    text = domain + "/".join(path) + (f":{tag}" if tag else "") + digest
    reference = parse_name(text)
    assert str(parse_name(str(reference))) == str(reference)
    assert reference.path.endswith("/".join(path[1:]))
    if tag:
        assert reference.tag == tag


@given(st.text(max_size=80))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = parse(text)
    except ReferenceInvalid:
        return
    if isinstance(reference, Reference):
        assert re.fullmatch(r"[\w.:/@\[\]-]+", str(reference), re.ASCII)
        assert ".." not in reference.path.split("/")
