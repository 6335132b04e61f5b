"""Pulls from a registry that does everything wrong: what becomes of each, and that nothing is left.

The front door is the image store, the end the text that a task stops with; everything between is
real: sockets, the unpacker in its jail, files. Only patience is short, by the client's settings.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import ssl
import subprocess
import sys
import tempfile
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sandbox.errors import RegistryError, SandboxError
from sandbox.images.credentials import Credentials
from sandbox.images.documents import MAX_MANIFEST_BYTES
from sandbox.images.failures import pull_failure_text
from sandbox.images.reference import parse_name
from sandbox.images.registry import RegistryClient, Retries, Timeouts
from tests.conftest import ROOT
from tests.hostile.registry import (
    INDEX_TYPE,
    MANIFEST_TYPE,
    REALM,
    TREE,
    Image,
    Part,
    Say,
    Scene,
    cut,
    dripping,
    each,
    guarded,
    honest,
    layer,
    on,
    part_of_layer,
    playing,
    redirect,
    token,
)
from tests.kernel.pulling import World, open_world
from tests.unit.images.http_server import (
    Answer,
    Asked,
    End,
    Endless,
    Handler,
    Names,
    Pause,
    Step,
    head,
    make_certificate,
    reply,
    serving,
    speaking_tls,
)

HASTE = Timeouts(connect=1, stall=0.5, document=1.5, total=2.0)
RETRIES = Retries(document=1, blob=2, pause_s=0.01)
LOGIN = Credentials(username="me", password="secret")
SENT_AT_MOST = 16 << 20
"""Of an endless body: the bound, and what the kernel takes for us in its buffers."""

PULLED = ""
RESOLVE = (
    "CannotPullContainerError: pull image manifest has been retried 1 time(s): "
    "failed to resolve ref {name}: "
)
ASKED = RESOLVE + 'failed to do request: Head "http://{host}/v2/shelf/manifests/latest": '
STATUS = (
    RESOLVE + "unexpected status from HEAD request to http://{host}/v2/shelf/manifests/latest: "
)
DENIED = RESOLVE + (
    "pull access denied, repository does not exist or may require authorization: "
    "server message: insufficient_scope: authorization failed"
)
COPY = (
    "CannotPullContainerError: ref pull has been retried 5 time(s): "
    "failed to copy: httpReadSeeker: failed open: {name}: "
)
LAYER = COPY + "blob {layer}: "
CONFIG = COPY + "blob {config}: "
ERROR = "CannotPullContainerError: {name}: "


@dataclass(frozen=True)
class Case:
    """What the registry does, and what the task is told; with "..." at its end, how that begins."""

    say: Say
    outcome: str
    elsewhere: Handler | None = None
    requests: int | None = None
    """To the registry, when that is the point."""
    with_tag: str = ":latest"


def json_reply(value: object, media_type: str = MANIFEST_TYPE) -> bytes:
    return reply("200 OK", json.dumps(value).encode(), Content_Type=media_type)


def errors(status: str, message: str) -> bytes:
    body = json.dumps({"errors": [{"code": "DENIED", "message": message}]})
    return reply(status, body.encode())


def trickle(first: bytes, piece: bytes) -> list[Step]:
    """Never so slow that it would be silence."""
    return [first, *(step for _ in range(99) for step in (piece, Pause(0.1)))]


def busy(retry_after: str, status: str = "503 Service Unavailable") -> bytes:
    return reply(status, Retry_After=retry_after)


def manifest(**changes: Any) -> Say:
    """The image's manifest with other members."""
    return lambda scene, _: json_reply({**json.loads(scene.image.manifest), **changes})


def unauthorized(scene: Scene, asked: Asked) -> Answer:
    return reply("401 Unauthorized", WWW_Authenticate=scene.fill(REALM))


def chunked(*chunks: bytes) -> bytes:
    return head("200 OK", Transfer_Encoding="chunked") + b"".join(chunks)


def other_stamp(content: bytes) -> bytes:
    """The same gzip member but for the time in its head, which nothing reads."""
    return content[:4] + b"\1\2\3\4" + content[8:]


def index_of(*digests_and_sizes: tuple[str, int]) -> dict[str, Any]:
    entries = [
        {"mediaType": MANIFEST_TYPE, "digest": digest, "size": size}
        for digest, size in digests_and_sizes
    ]
    return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}


def by_index(*sizes: int) -> Say:
    """The tag is an index with the image's manifest, of the sizes it may be said to have."""

    def say(scene: Scene, _: Asked) -> Answer:
        entries = [(scene.image.digest, size or len(scene.image.manifest)) for size in sizes]
        return json_reply(index_of(*entries), INDEX_TYPE)

    return say


def nested(depth: int) -> Say:
    """Indexes in indexes; at the bottom the image's manifest."""

    def say(scene: Scene, asked: Asked) -> Answer | None:
        documents = [scene.image.manifest]
        for _ in range(depth):
            below = documents[-1]
            document = index_of((digest_of(below), len(below)))
            if len(documents) > 1:
                document["manifests"][0]["mediaType"] = INDEX_TYPE
            documents.append(json.dumps(document).encode())
        wanted = {"tag": documents[-1]} | {digest_of(document): document for document in documents}
        key = "tag" if scene.part(asked) == "tag" else asked.path.rpartition("/")[2]
        return reply("200 OK", wanted[key]) if key in wanted else None

    return say


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


NOT_PLAINLY = " to an address that is not plainly http(s)"
REDIRECTS: dict[str, Case] = {
    "to another origin": Case(on("layer", redirect("http://{elsewhere}/there?sig=1")), PULLED),
    "to another origin, after a login": Case(
        each(
            guarded('Basic realm="shelf"', "Basic bWU6c2VjcmV0"),
            on("layer", redirect("http://{elsewhere}/there")),
        ),
        PULLED,
    ),
    "to another origin, which asks for a login": Case(
        on("tag", redirect("http://{elsewhere}/there")),
        DENIED,
        elsewhere=lambda _: reply("401 Unauthorized", WWW_Authenticate='Basic realm="give"'),
    ),
    "to another origin, which names a realm": Case(
        on("tag", redirect("http://{elsewhere}/there")),
        DENIED,
        elsewhere=lambda asked: reply(
            "401 Unauthorized",
            WWW_Authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"',
        ),
    ),
    "without a scheme": Case(
        on("layer", redirect("//{host}/v2/shelf/blobs/{layer_digest}"), None), PULLED
    ),
    "to a file": Case(
        on("tag", redirect("file:///etc/passwd")),
        ASKED + "redirect" + NOT_PLAINLY,
    ),
    "of a blob to a file": Case(
        on("layer", redirect("file:///etc/shadow")),
        LAYER + "redirect" + NOT_PLAINLY,
    ),
    "to ftp": Case(
        on("tag", redirect("ftp://{elsewhere}/x")),
        ASKED + "redirect" + NOT_PLAINLY,
    ),
    "to data": Case(
        on("tag", redirect("data:application/json,0")),
        ASKED + "redirect" + NOT_PLAINLY,
    ),
    "with a login in it": Case(
        on("tag", redirect("http://you:me@{elsewhere}/x")),
        ASKED + "redirect" + NOT_PLAINLY,
    ),
    "without a host": Case(on("tag", redirect("http:///x")), ASKED + "more than 10 redirects"),
    "to half an address": Case(
        on("tag", redirect("http://[::1")), ASKED + "unusable address: Invalid port: ':1'"
    ),
    "to a port that is none": Case(
        on("tag", redirect("http://127.0.0.1:70000/")),
        ASKED + "unusable address: there is no port 70000",
    ),
    "to a name that is none": Case(
        on("tag", redirect(f"http://{'a' * 64}.test/")),
        ASKED + "unusable address: encoding with 'idna' codec failed...",
    ),
    "to punycode that is none": Case(
        on("tag", redirect("http://xn--a.test/")),
        ASKED + "unusable address: Codepoint U+0080 at position 1 of '\\x80' not allowed",
    ),
    "to 70 kB": Case(
        on("tag", redirect("http://{elsewhere}/" + "x" * 70_000)),
        ASKED + "unusable address: URL too long",
    ),
    "to an address with a NUL": Case(
        on("tag", redirect("http://{elsewhere}/\0\x1b[2J")),
        ASKED + "illegal header line: bytearray(b'Location: http://{elsewhere}/\\x00\\x1b[2J')",
    ),
    "to a port where nobody listens": Case(
        on("tag", redirect("http://127.0.0.1:1/")), ASKED + "connection refused"
    ),
    "in a circle": Case(
        on("tag", redirect("http://{host}/v2/shelf/manifests/latest")),
        ASKED + "more than 10 redirects",
        requests=11,
    ),
    "ten times": Case(
        on("tag", *[redirect("http://{host}/v2/shelf/manifests/latest")] * 10, None), PULLED
    ),
    "eleven times": Case(
        on("tag", *[redirect("http://{host}/v2/shelf/manifests/latest")] * 11, None),
        ASKED + "more than 10 redirects",
    ),
    "in a circle of two origins": Case(
        on("tag", redirect("http://{elsewhere}/x")),
        ASKED + "more than 10 redirects",
        elsewhere=lambda asked: reply(
            "302 Found", Location=f"http://{asked.headers['host']}/{asked.path}"
        ),
    ),
    "without a place": Case(on("tag", reply("302 Found")), STATUS + "302 Found"),
    "as a choice": Case(
        on("tag", redirect("http://{elsewhere}/", status="300 Multiple Choices")),
        STATUS + "300 Multiple Choices",
    ),
    "as not modified": Case(
        on("tag", redirect("http://{elsewhere}/", status="304 Not Modified")),
        STATUS + "304 Not Modified",
    ),
}
"""The registry redirects ..."""

NOWHERE = ", where registries do not live"
FORBIDDEN: dict[str, str] = {
    "http://169.254.169.254/latest/meta-data/": "169.254.169.254 is 169.254.169.254",
    "http://169.254.170.2/v2/credentials": "169.254.170.2 is 169.254.170.2",
    "http://2852039166/": "2852039166 is 169.254.169.254",
    "http://0xa9fea9fe/": "0xa9fea9fe is 169.254.169.254",
    "http://025177524776/": "025177524776 is 169.254.169.254",
    "http://0251.0xfe.43518/": "0251.0xfe.43518 is 169.254.169.254",
    "http://169.254.43518:80/": "169.254.43518 is 169.254.169.254",
    "http://[::ffff:169.254.169.254]/": "::ffff:169.254.169.254 is ::ffff:169.254.169.254",
    "http://[::ffff:a9fe:a9fe]/": "::ffff:a9fe:a9fe is ::ffff:169.254.169.254",
    "http://[64:ff9b::a9fe:a9fe]/": "64:ff9b::a9fe:a9fe is 64:ff9b::a9fe:a9fe",
    "http://[fe80::1]/": "fe80::1 is fe80::1",
    "http://[fd00:ec2::254]/": "fd00:ec2::254 is fd00:ec2::254",
    "http://100.100.100.200/": "100.100.100.200 is 100.100.100.200",
    "https://169.254.169.254/": "169.254.169.254 is 169.254.169.254",
}

TOO_LONG = "not complete after 1.5 s"
PACE: dict[str, Case] = {
    "drips a layer": Case(
        on("layer", lambda scene, _: dripping(scene.image.layer, 8, 0.8)), PULLED
    ),
    "drips a manifest, head and all": Case(
        on(
            "tag",
            lambda scene, _: [
                step
                for byte in (reply("200 OK", b"")[:9], reply("200 OK", scene.image.manifest)[9:])
                for step in (byte, Pause(0.1))
            ],
        ),
        PULLED,
    ),
    "drips a layer without end": Case(
        on("layer", lambda scene, _: dripping(scene.image.layer, 100, 10)),
        LAYER + "not complete after 2 s",
    ),
    "drips a manifest without end": Case(
        on("tag", lambda scene, _: dripping(scene.image.manifest, 100, 10)),
        ASKED + TOO_LONG,
    ),
    "drips an error without end": Case(
        on("tag", trickle(head("403 Forbidden"), b"x")),
        ASKED + TOO_LONG,
    ),
    "drips a token without end": Case(token(trickle(head("200 OK"), b" ")), ASKED + TOO_LONG),
    "falls silent before it answers": Case(
        on("tag", [End.SILENCE]), ASKED + "no answer: time-out", requests=2
    ),
    "falls silent in a head": Case(
        on("tag", [b"HTTP/1.1 200 OK\r\nContent-", End.SILENCE]), ASKED + "no answer: time-out"
    ),
    "falls silent in a manifest": Case(
        on("tag", [head("200 OK", Content_Length="99") + b"{", End.SILENCE]),
        ASKED + "no answer: time-out",
    ),
    "falls silent in a layer": Case(
        on("layer", cut(70_000, End.SILENCE)), LAYER + "no answer: time-out", requests=5
    ),
    "falls silent in a layer once": Case(on("layer", cut(70_000, End.SILENCE), None), PULLED),
    "falls silent in a token": Case(
        token([head("200 OK") + b"{", End.SILENCE]), ASKED + "no answer: time-out"
    ),
    "continues for ever": Case(
        on("tag", [Endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 99)]),
        ASKED + TOO_LONG,
    ),
}
"""The registry ..."""

OFFSETS = (0, 1, 9, 511, 65_536, 150_000)
RESETS: dict[str, Case] = {
    **{
        f"after {at} bytes of a layer, and goes on by range": Case(
            on("layer", cut(at), None), PULLED
        )
        for at in OFFSETS
    },
    **{
        f"after {at} bytes of a layer, and begins again": Case(
            on("layer", cut(at), layer(bytes)), PULLED
        )
        for at in OFFSETS
    },
    "at once": Case(on("tag", [End.RESET]), ASKED + "connection reset by peer", requests=2),
    "at once, once": Case(on("tag", [End.RESET], None), PULLED),
    "in a head": Case(on("tag", [b"HTTP/1.1 200", End.RESET]), ASKED + "connection reset by peer"),
    "in the head of a layer, once": Case(on("layer", [b"HTTP/1.1 200", End.RESET], None), PULLED),
    "in a manifest": Case(
        on("tag", [head("200 OK", Content_Length="99") + b"{", End.RESET]),
        ASKED + "connection reset by peer",
    ),
    "in a manifest, once": Case(
        on("tag", [head("200 OK", Content_Length="99") + b"{", End.RESET], None), PULLED
    ),
    "in a token, once": Case(
        token([head("200 OK") + b"{", End.RESET], reply("200 OK", b'{"token": "good"}')), PULLED
    ),
    "in a layer each time": Case(
        on("layer", cut(1000)), LAYER + "connection reset by peer", requests=5
    ),
    "in a layer, and gives another range": Case(
        on("layer", cut(1000, Pause(0)), part_of_layer("bytes 0-{size}/{size}")),
        LAYER + "unexpected Content-Range 'bytes 0-{size}/{size}'",
    ),
    "in a layer, and gives no range": Case(
        on("layer", cut(1000, Pause(0)), part_of_layer("")), LAYER + "unexpected Content-Range ''"
    ),
    "in a layer, and gives a range of nonsense": Case(
        on("layer", cut(1000, Pause(0)), part_of_layer("bytes \x1b[2J" + "9" * 300)),
        LAYER + "unexpected Content-Range 'bytes \\x1b[2J" + "9" * 70 + "'",
    ),
    "in a layer, and calls the rest another range of the same start": Case(
        on("layer", cut(1000, Pause(0)), part_of_layer("bytes 1000-1001/5", 1000)), PULLED
    ),
    "in a layer, and has no such range any more": Case(
        on("layer", cut(1000), reply("416 Range Not Satisfiable", Content_Range="bytes */10")),
        LAYER + "416 Requested Range Not Satisfiable",
    ),
    "in a layer of which the beginning was wrong": Case(
        on(
            "layer",
            lambda scene, _: [
                reply("200 OK", other_stamp(scene.image.layer)[:1000], length=9999),
                Pause(0),
            ],
            None,
        ),
        ERROR + "content of {layer_digest} has digest sha256:...",
    ),
    "in a layer, and goes on with more than the rest": Case(
        on("layer", cut(1000, Pause(0)), part_of_layer("bytes 1000-{size}/{size}", 999)),
        LAYER + "longer than its {size} bytes",
    ),
    "after the last byte of a layer": Case(
        on(
            "layer",
            layer(bytes, length=999_999),
            reply("416 Range Not Satisfiable", Content_Range="bytes */{size}"),
        ),
        PULLED,
    ),
}
"""The registry resets ..."""

LENGTHS: dict[str, Case] = {
    "says too little of a layer": Case(
        on("layer", layer(bytes, length=1000)),
        LAYER + "ended after 1000 of {size} bytes",
    ),
    "says too much of a manifest": Case(
        on("tag", lambda scene, _: reply("200 OK", scene.image.manifest, length=9999)),
        ASKED + "peer closed connection without sending complete message body "
        "(received {manifest_size} bytes, expected 9999)",
    ),
    "says too little of a manifest": Case(
        on("tag", lambda scene, _: reply("200 OK", scene.image.manifest, length=50)),
        ERROR + "manifest is not acceptable: Input data was truncated",
    ),
    "says nothing of a layer": Case(
        on("layer", lambda scene, _: head("200 OK") + scene.image.layer), PULLED
    ),
    "says nothing of a layer, and gives half": Case(
        on("layer", lambda scene, _: head("200 OK") + scene.image.layer[:1000]),
        LAYER + "ended after 1000 of {size} bytes",
    ),
    "has nothing": Case(
        on("tag", reply("200 OK")), ERROR + "manifest is not acceptable: Input data was truncated"
    ),
    "has no content": Case(on("tag", head("204 No Content")), STATUS + "204 No Content"),
    "says less than nothing": Case(
        on("tag", reply("200 OK", b"{}", length=-1)), ASKED + "bad Content-Length"
    ),
    "says two different lengths": Case(
        on("tag", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
        ASKED + "conflicting Content-Length headers",
    ),
    "says one length twice": Case(
        on(
            "layer",
            lambda scene, _: reply(
                "200 OK", scene.image.layer, content_length=str(len(scene.image.layer))
            ),
        ),
        PULLED,
    ),
    "says a length that is none": Case(
        on("tag", head("200 OK", Content_Length="0x10") + b"{}"), ASKED + "bad Content-Length"
    ),
    "says a length of 30 digits": Case(
        on("tag", head("200 OK", Content_Length="9" * 30) + b"{}"), ASKED + "bad Content-Length"
    ),
    "goes on after a layer": Case(
        on("layer", layer(lambda content: content + b"x")), LAYER + "longer than its {size} bytes"
    ),
    "lacks the end of a layer": Case(
        on("layer", layer(lambda content: content[:-1])),
        LAYER + "ended after {less} of {size} bytes",
    ),
}
"""The registry ..."""

ENDLESS = Endless(b" " * 65_536)
BOUNDS: dict[str, Case] = {
    "manifest": Case(
        on("tag", [head("200 OK"), ENDLESS]),
        ASKED + "answer is larger than 4194304 bytes",
        requests=1,
    ),
    "manifest by digest": Case(
        each(on("tag", by_index(0)), on("digest", [head("200 OK"), ENDLESS])),
        ASKED + "answer is larger than 4194304 bytes",
    ),
    "manifest of chunks": Case(
        on("tag", [chunked(), Endless(b"10000\r\n" + b" " * 65_536 + b"\r\n")]),
        ASKED + "answer is larger than 4194304 bytes",
    ),
    "configuration": Case(
        on("config", [head("200 OK"), ENDLESS]), CONFIG + "longer than its {config_size} bytes"
    ),
    "layer": Case(on("layer", [head("200 OK"), ENDLESS]), LAYER + "longer than its {size} bytes"),
    "token": Case(token([head("200 OK"), ENDLESS]), ASKED + "answer is larger than 1048576 bytes"),
    "refusal": Case(on("tag", [head("403 Forbidden"), ENDLESS]), STATUS + "403 Forbidden"),
    "refusal of a layer": Case(
        on("layer", [head("403 Forbidden"), ENDLESS]), LAYER + "403 Forbidden"
    ),
    "head": Case(
        on("tag", [b"HTTP/1.1 200 OK\r\n", Endless(b"A: b\r\n" * 1000)]),
        ASKED + "Receive buffer too long",
    ),
    "line of a head": Case(
        on("tag", [b"HTTP/1.1 200 OK\r\nA: ", ENDLESS]), ASKED + "Receive buffer too long"
    ),
    "status": Case(on("tag", [b"HTTP/1.1 200 ", ENDLESS]), ASKED + "Receive buffer too long"),
    "chunk extension": Case(
        on("tag", [chunked(b"1;"), ENDLESS]), ASKED + "Receive buffer too long"
    ),
    "trailer": Case(
        on("tag", [chunked(b"2\r\n{}\r\n0\r\n"), Endless(b"A: b\r\n" * 1000)]),
        ASKED + "Receive buffer too long",
    ),
}
"""Without end: a ..."""

FORM: dict[str, Case] = {
    "chunks": Case(
        on(
            "layer",
            lambda s, _: chunked(b"%x\r\n" % len(s.image.layer), s.image.layer, b"\r\n0\r\n\r\n"),
        ),
        PULLED,
    ),
    "chunks of no number": Case(
        on("tag", chunked(b"zz\r\n{}\r\n0\r\n\r\n")),
        ASKED + "illegal chunk header: bytearray(b'zz\\r\\n')",
    ),
    "chunks of a negative number": Case(
        on("tag", chunked(b"-2\r\n{}\r\n0\r\n\r\n")),
        ASKED + "illegal chunk header: bytearray(b'-2\\r\\n')",
    ),
    "chunks of a huge number": Case(
        on("tag", chunked(b"f" * 40 + b"\r\n{}")),
        ASKED
        + "illegal chunk header: bytearray(b'ffffffffffffffffffffffffffffffffffffffff\\r\\n')",
    ),
    "chunks without a last one": Case(
        on(
            "layer",
            lambda s, _: chunked(b"%x\r\n" % len(s.image.layer), s.image.layer, b"\r\n"),
            reply("416 Range Not Satisfiable"),
        ),
        PULLED,
    ),
    "chunks and a length": Case(
        on(
            "tag",
            head("200 OK", Content_Length="2", Transfer_Encoding="chunked")
            + b"2\r\n{}\r\n0\r\n\r\n",
        ),
        ERROR + "document is neither a manifest nor an index",
    ),
    "an unknown transfer encoding": Case(
        on("tag", head("200 OK", Transfer_Encoding="gzip") + b"{}"),
        ASKED + "Only Transfer-Encoding: chunked is supported",
    ),
    "no HTTP": Case(on("tag", b"\x15\x03\x01\x00\x02\x02\x46"), ASKED + "illegal request line"),
    "HTTP of another century": Case(
        on("tag", b"{}"), ASKED + "Server disconnected without sending a response."
    ),
    "HTTP 2": Case(
        on("tag", b"HTTP/2 200\r\n\r\n{}"), ASKED + "illegal status line: bytearray(b'HTTP/2 200')"
    ),
    "nothing": Case(on("tag", b""), ASKED + "Server disconnected without sending a response."),
    "an escape in a head": Case(
        on("tag", head("200 \x1b[2J", A="\x1b]0;x\x07\0") + b"{}"),
        ASKED + "illegal header line: bytearray(b'A: \\x1b]0;x\\x07\\x00')",
    ),
    "a folded head": Case(
        on("tag", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\n{}"),
        ERROR + "document is neither a manifest nor an index",
    ),
    "a gzipped manifest": Case(
        on(
            "tag",
            lambda s, _: reply("200 OK", gzip.compress(s.image.manifest), Content_Encoding="gzip"),
        ),
        ERROR + "manifest is not acceptable: JSON is malformed: invalid character (byte 0)",
    ),
    "a manifest said to be gzipped": Case(
        on("tag", lambda s, _: reply("200 OK", s.image.manifest, Content_Encoding="gzip")), PULLED
    ),
    "a layer said to be gzipped once more": Case(
        on("layer", lambda s, _: reply("200 OK", s.image.layer, Content_Encoding="gzip")), PULLED
    ),
    "a layer gzipped once more": Case(
        on(
            "layer",
            lambda s, _: reply("200 OK", gzip.compress(s.image.layer), Content_Encoding="gzip"),
        ),
        LAYER + "longer than its {size} bytes",
    ),
}
"""An answer is ..."""

GOOD = reply("200 OK", b'{"token": "good"}')
NO_TOKEN = ASKED + "the answer of the token realm holds no token"
TOKENS: dict[str, Case] = {
    "good": Case(token(GOOD), PULLED),
    "good, and expires in nonsense": Case(
        token(reply("200 OK", b'{"token": "good", "expires_in": "\\u0000", "issued_at": -1e999}')),
        PULLED,
    ),
    "good, by its other name": Case(token(reply("200 OK", b'{"access_token": "good"}')), PULLED),
    "not JSON": Case(
        token(reply("200 OK", b"token=good")),
        NO_TOKEN,
    ),
    "nothing": Case(token(reply("200 OK")), NO_TOKEN),
    "no content": Case(token(head("204 No Content")), STATUS + "204 No Content"),
    "an empty text": Case(
        token(reply("200 OK", b'{"token": ""}')),
        NO_TOKEN,
    ),
    "missing": Case(
        token(reply("200 OK", b'{"Token": "good"}')),
        NO_TOKEN,
    ),
    "a number": Case(
        token(reply("200 OK", b'{"token": 7}')),
        NO_TOKEN,
    ),
    "a list": Case(
        token(reply("200 OK", b'{"token": ["good"]}')),
        NO_TOKEN,
    ),
    "one level too deep": Case(
        token(reply("200 OK", b'{"token": ' + b"[" * 100_000)),
        NO_TOKEN,
    ),
    "two lines": Case(
        token(reply("200 OK", b'{"token": "good\\r\\nX-Evil: 1"}')),
        NO_TOKEN,
    ),
    "one with control characters": Case(
        token(reply("200 OK", b'{"token": "\\u001b[2Jgood"}')),
        NO_TOKEN,
    ),
    "one with a NUL": Case(
        token(reply("200 OK", b'{"token": "good\\u0000"}')),
        NO_TOKEN,
    ),
    "one with letters of elsewhere": Case(
        token(reply("200 OK", '{"token": "göod"}'.encode())),
        NO_TOKEN,
    ),
    "a MiB and a byte": Case(
        token(reply("200 OK", b'{"token": "good"}' + b" " * ((1 << 20) - 16))),
        ASKED + "answer is larger than 1048576 bytes",
    ),
    "a MiB": Case(token(reply("200 OK", b'{"token": "good"}' + b" " * ((1 << 20) - 17))), PULLED),
    "wrong, each time": Case(token(reply("200 OK", b'{"token": "bad"}')), DENIED, requests=3),
    "refused": Case(token(errors("403 Forbidden", "not\x1b[2J you")), STATUS + "403 Forbidden"),
    "refused for now": Case(token(reply("503 Service Unavailable"), GOOD), PULLED),
    "asking for a token": Case(token(unauthorized), DENIED),
    "a redirect to a file": Case(
        token(redirect("file:///etc/passwd")),
        ASKED + "redirect" + NOT_PLAINLY,
    ),
    "a redirect to metadata": Case(
        token(redirect("http://169.254.169.254/")),
        ASKED + "169.254.169.254 is 169.254.169.254" + NOWHERE,
    ),
    "a redirect elsewhere": Case(
        token(redirect("http://{elsewhere}/token")), PULLED, elsewhere=lambda _: GOOD
    ),
}
"""The token is ..."""

CHALLENGES: dict[str, tuple[str, str]] = {
    "a file": (
        'Bearer realm="file:///etc/passwd"',
        ASKED + "token realm" + NOT_PLAINLY,
    ),
    "metadata": (
        'Bearer realm="http://169.254.170.2/token"',
        ASKED + "169.254.170.2 is 169.254.170.2" + NOWHERE,
    ),
    "metadata in one number": (
        'Bearer realm="http://2852039166/token"',
        ASKED + "2852039166 is 169.254.169.254" + NOWHERE,
    ),
    "no address": (
        'Bearer realm="token"',
        ASKED + "token realm" + NOT_PLAINLY,
    ),
    "an address with a login": (
        'Bearer realm="http://a:b@{host}/token"',
        ASKED + "token realm" + NOT_PLAINLY,
    ),
    "missing": ("Bearer", ASKED + "token realm" + NOT_PLAINLY),
    "empty": ('Bearer realm=""', ASKED + "token realm" + NOT_PLAINLY),
    "60 kB": ('Bearer realm="http://{host}/token?' + "x" * 60_000 + '"', PULLED),
    "90 kB of commas": (
        "Bearer " + "," * 90_000,
        ASKED + "token realm" + NOT_PLAINLY,
    ),
    "said twice": ('Bearer realm="http://{host}/token",realm="file:///etc/passwd"', PULLED),
    "said in two challenges": (
        'Bearer realm="http://{host}/token", Bearer realm="file:///x"',
        PULLED,
    ),
    "said without an end": (
        'Bearer realm="http://{host}/token',
        ASKED + "token realm" + NOT_PLAINLY,
    ),
    "said with escapes": (r'Bearer realm="http://{host}\/token"', PULLED),
    "of an odd scope": (
        'Bearer realm="http://{host}/token",scope="x&service=\\"y\\" #%0d%0a"',
        PULLED,
    ),
    "of an unknown scheme": ("Negotiate abc=", DENIED),
    "not said": ("", DENIED),
}
"""The realm of the token is ..."""

STATUSES: dict[str, Case] = {
    **{
        f"{status}, then better": Case(on("tag", reply(status), None), PULLED)
        for status in (
            "408 Request Timeout",
            "429 Too Many Requests",
            "500 Internal Server Error",
            "502 Bad Gateway",
            "503 Service Unavailable",
            "504 Gateway Timeout",
        )
    },
    **{
        f"{status} for a layer, then better": Case(on("layer", reply(status), None), PULLED)
        for status in (
            "429 Too Many Requests",
            "500 Internal Server Error",
            "503 Service Unavailable",
        )
    },
    "500 each time": Case(
        on("tag", reply("500 Internal Server Error")),
        STATUS + "500 Internal Server Error",
        requests=2,
    ),
    "502 for a layer each time": Case(
        on("layer", reply("502 Bad Gateway")), LAYER + "502 Bad Gateway", requests=5
    ),
    "501": Case(
        on("tag", reply("501 Not Implemented")), STATUS + "501 Not Implemented", requests=1
    ),
    "a status that is none": Case(on("tag", reply("799 Odd")), STATUS + "799", requests=1),
    "503, to be asked again in a moment": Case(on("tag", busy("0"), None), PULLED),
    "503, to be asked again yesterday": Case(on("tag", busy("-86400"), None), PULLED),
    "503, to be asked again in 1970": Case(
        on("tag", busy("Thu, 01 Jan 1970 00:00:00 GMT"), None), PULLED
    ),
    "503, to be asked again soon": Case(on("tag", busy("soon \x7f"), None), PULLED),
    "503, to be asked again in an hour": Case(
        on("tag", busy("3600"), None), STATUS + "503 Service Unavailable", requests=1
    ),
    "429, to be asked again in 2099": Case(
        on("tag", busy("Thu, 01 Jan 2099 00:00:00 GMT", "429 Too Many Requests"), None),
        STATUS + "429 Too Many Requests",
        requests=1,
    ),
    "503, to be asked again in ages": Case(
        on("tag", busy("9" * 40), None), STATUS + "503 Service Unavailable", requests=1
    ),
    "503 for a layer, to be asked again in an hour": Case(
        on("layer", busy("3600"), None), LAYER + "503 Service Unavailable", requests=3
    ),
    "404": Case(on("tag", reply("404 Not Found")), RESOLVE + "not found", requests=1),
    "404 with a screenful": Case(
        on("tag", errors("404 Not Found", "\x1b[2J\x1b]0;x\x07" + "y" * 9999)),
        RESOLVE + "not found",
    ),
    "404 for the configuration": Case(
        on("config", errors("404 Not Found", "gone")),
        CONFIG + "404 Not Found - Server message: denied: gone",
    ),
    "404 for a layer, with a screenful": Case(
        on("layer", errors("404 Not Found", "\x1b[2J\r\n\u202e\u0085" + "y" * 9999)),
        LAYER + "404 Not Found - Server message: " + ("denied:  [2J    " + "y" * 9999)[:300],
    ),
    "403 with escapes": Case(
        on("tag", errors("403 Forbidden", "\x1b[31mno\x9b2J\r\n\0")), STATUS + "403 Forbidden"
    ),
    "403 with a page": Case(
        on("tag", reply("403 Forbidden", b"<html>\x1b[2J" * 9999)), STATUS + "403 Forbidden"
    ),
    "403 with half a letter": Case(
        on("layer", reply("403 Forbidden", b'{"errors": [{"message": "\\ud800\xff"}]}')),
        LAYER + "403 Forbidden",
    ),
    "403 with a nest": Case(
        on("layer", reply("403 Forbidden", b'{"errors":' + b"[" * 60_000)), LAYER + "403 Forbidden"
    ),
    "403 with a crowd": Case(
        on(
            "layer",
            reply(
                "403 Forbidden",
                json.dumps({"errors": [{"code": "A", "message": "b"}] * 999}).encode(),
            ),
        ),
        LAYER + "403 Forbidden - Server message: a: b, a: b, a: b",
    ),
    "401 for a layer each time": Case(
        on("layer", reply("401 Unauthorized")), LAYER + "401 Unauthorized"
    ),
    "418": Case(on("tag", reply("418 I'm a teapot")), STATUS + "418 I'm a Teapot"),
}
"""The answer is ..."""

FOREIGN_TYPE = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
CONTENT: dict[str, Case] = {
    "an honest image": Case(honest, PULLED, requests=3),
    "an honest image by index": Case(on("tag", by_index(0)), PULLED, requests=4),
    "another digest in the head": Case(
        on(
            "tag",
            lambda s, _: reply(
                "200 OK", s.image.manifest, Docker_Content_Digest="sha256:" + "0" * 64
            ),
        ),
        PULLED,
    ),
    "another manifest than the digest asked for": Case(
        on("digest", reply("200 OK", b"{}")),
        "CannotPullContainerError: {host}/shelf@{digest}: "
        f"manifest has digest {digest_of(b'{}')} instead of " + "{digest}",
        with_tag="@{digest}",
    ),
    "another manifest than the index says": Case(
        each(
            on("tag", by_index(0)),
            on("digest", lambda s, _: reply("200 OK", s.image.manifest[:-1] + b" ")),
        ),
        ERROR + "content of {digest} has digest sha256:...",
    ),
    "a longer manifest than the index says": Case(
        each(
            on("tag", by_index(0)),
            on("digest", lambda s, _: reply("200 OK", s.image.manifest + b" ")),
        ),
        ERROR + "content of {digest} is longer than its {manifest_size} bytes",
    ),
    "an index with a manifest of 5 MiB": Case(
        on("tag", by_index(5 << 20)), ERROR + "manifest is larger than 4194304 bytes"
    ),
    "a manifest said to be an index": Case(
        on("tag", lambda s, _: reply("200 OK", s.image.manifest, Content_Type=INDEX_TYPE)),
        ERROR
        + "document is a manifest, but Content-Type says 'application/vnd.oci.image.index.v1+json'",
    ),
    "an index said to be a manifest": Case(
        on("tag", lambda s, a: json_reply(index_of((s.image.digest, 9)), MANIFEST_TYPE)),
        ERROR + "document is an index, but Content-Type says " + repr(MANIFEST_TYPE),
    ),
    "a manifest of another vocabulary": Case(
        on(
            "tag",
            lambda s, _: reply(
                "200 OK",
                s.image.manifest,
                Content_Type="application/vnd.docker.distribution.manifest.v2+json",
            ),
        ),
        ERROR + "document is announced as application/vnd.docker.distribution.manifest.v2+json "
        f"and as {MANIFEST_TYPE}",
    ),
    "a type with escapes": Case(
        on(
            "tag",
            lambda s, _: reply(
                "200 OK", s.image.manifest, Content_Type="application/vnd.x\x7f\xe9+json"
            ),
        ),
        ERROR + "document is a manifest, but Content-Type says 'application/vnd.x\\x7fé+json'",
    ),
    "a manifest and an index in one": Case(
        on("tag", manifest(manifests=[])),
        ERROR + "document is a manifest and an index at the same time",
    ),
    "a manifest of schema 1": Case(
        on("tag", manifest(schemaVersion=1)),
        ERROR + "manifest has Docker's schema 1, which is too old: push the image again",
    ),
    "indexes four deep": Case(nested(3), PULLED),
    "indexes five deep": Case(nested(4), ERROR + "indexes are nested more than 4 deep"),
    "501 layers": Case(
        on(
            "tag",
            lambda s, a: manifest(layers=json.loads(s.image.manifest)["layers"] * 501)(s, a),
        ),
        ERROR + "image has 501 layers, more than 500",
    ),
    "a layer that lies elsewhere": Case(
        on(
            "tag",
            lambda s, a: manifest(
                layers=[
                    {
                        **json.loads(s.image.manifest)["layers"][0],
                        "mediaType": FOREIGN_TYPE,
                        "urls": [f"http://{s.elsewhere.host}/layer"],
                    }
                ]
            )(s, a),
        ),
        ERROR + "layer {layer} has unknown type " + repr(FOREIGN_TYPE),
    ),
    "a nest of lists": Case(
        on("tag", reply("200 OK", b"[" * 1_000_000)),
        ERROR + "manifest is not acceptable: Expected `object`, got `array`",
    ),
    "4 MiB and a byte": Case(
        on("tag", reply("200 OK", b" " * (MAX_MANIFEST_BYTES + 1))),
        ASKED + "answer is larger than 4194304 bytes",
    ),
    "another configuration": Case(
        on("config", lambda s, _: reply("200 OK", s.image.config[:-1] + b" ")),
        ERROR + "content of sha256:{config}...",
    ),
    "another layer": Case(
        on("layer", layer(other_stamp)), ERROR + "content of {layer_digest} has digest sha256:..."
    ),
    "nothing of a layer": Case(
        on("layer", reply("200 OK")), LAYER + "ended after 0 of {size} bytes"
    ),
    "a layer as its part": Case(
        on("layer", part_of_layer("bytes 0-{size}/{size}")),
        LAYER + "unexpected Content-Range 'bytes 0-{size}/{size}'",
    ),
}
"""The registry has ..."""

# Pulling -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("layout"))


def short_of_time(directory: Path) -> AbstractAsyncContextManager[World]:
    return open_world(directory, timeouts=HASTE, retries=RETRIES)


async def ensure(world: World, name: str) -> str:
    """Pull; what the task would be told."""
    reference = parse_name(name)
    try:
        await world.images.ensure(reference, credentials=LOGIN)
    except SandboxError as error:
        return pull_failure_text(error, reference)
    return PULLED


def tree(world: World, image: Image) -> dict[str, bytes]:
    directory = world.layers.path(image.diff_id)
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


async def remains(world: World) -> list[str]:
    """What is left of a pull that failed: nothing half, and what is whole goes with a prune."""
    left = [f"image {image.digest}" for _, image in world.images.list()]
    left += [f"layer {diff_id}" for diff_id in world.layers.ids()]
    left += [f"half {path}" for path in world.root.rglob(".*")]
    left += [f"temporary {path}" for path in (world.root / "blobs/tmp").iterdir()]
    await world.images.prune([])
    return left + world.left()


async def play(case: Case, image: Image, directory: Path) -> None:
    async with playing(image, case.say, case.elsewhere) as scene, short_of_time(directory) as world:
        name = scene.shelf.name.replace(":latest", scene.fill(case.with_tag))
        told = await ensure(world, name)
        found = tree(world, image)
        left = [] if told == PULLED else await remains(world)
    expected = scene.fill(case.outcome)
    if expected.endswith("..."):
        assert told.startswith(expected.removesuffix("..."))
    else:
        assert told == expected
    assert found == (TREE if told == PULLED else {})
    assert left == []
    assert told.isprintable() and len(told) <= 1024
    assert case.requests in (None, len(scene.registry.asked))
    assert max(scene.registry.sent, scene.elsewhere.sent) < SENT_AT_MOST
    assert not any("authorization" in asked.headers for asked in scene.elsewhere.asked)


def cases(table: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=list(table))


@cases(REDIRECTS)
async def test_a_redirect_leads_only_where_it_may(case: Case, image: Image, tmp_path: Path) -> None:
    await play(case, image, tmp_path)


@cases(
    {
        place: Case(on("tag", redirect(place)), ASKED + told + NOWHERE)
        for place, told in FORBIDDEN.items()
    }
)
async def test_no_redirect_leads_to_metadata_in_any_notation(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(PACE)
async def test_a_slow_registry_is_waited_for_and_a_silent_one_is_not(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(RESETS)
async def test_a_reset_is_met_by_going_on_where_the_registry_lets_us(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(LENGTHS)
async def test_no_wrong_length_gives_a_wrong_image(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(BOUNDS)
async def test_what_has_no_end_is_cut_off(case: Case, image: Image, tmp_path: Path) -> None:
    await play(case, image, tmp_path)


@cases(FORM)
async def test_an_answer_of_odd_form_is_understood_or_refused(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(TOKENS)
async def test_a_token_is_fit_for_a_header_or_refused(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(
    {
        title: Case(each(guarded(challenge), on("token", GOOD)), outcome)
        for title, (challenge, outcome) in CHALLENGES.items()
    }
)
async def test_a_challenge_leads_to_a_realm_or_to_a_refusal(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(STATUSES)
async def test_what_may_pass_is_tried_again_and_what_a_registry_writes_is_tamed(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


@cases(CONTENT)
async def test_content_is_what_its_digest_says_or_refused(
    case: Case, image: Image, tmp_path: Path
) -> None:
    await play(case, image, tmp_path)


# https ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/x", "http://plain.test:{port}/x"])
@pytest.mark.parametrize("as_realm", [False, True])
async def test_a_registry_on_https_leads_to_no_http(
    tmp_path: Path, target: str, as_realm: bool
) -> None:
    certificate = make_certificate(tmp_path)
    trio.socket.set_custom_hostname_resolver(Names())
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with (
        serving(speaking_tls(certificate)) as registry,
        serving() as plain,
        RegistryClient(ssl_context=trusting, timeouts=HASTE, retries=RETRIES) as client,
    ):
        place = target.format(port=plain.port)
        challenge = f'Bearer realm="{place}"'
        registry.handle = lambda _: (
            reply("401 Unauthorized", WWW_Authenticate=challenge)
            if as_realm
            else reply("307 Temporary Redirect", Location=place)
        )
        source = client.source(parse_name(f"registry.test:{registry.port}/x"), LOGIN)
        with pytest.raises(RegistryError, match=r"(redirect|token realm) from https to http"):
            await source.root()
    assert len(registry.asked) == 1
    assert plain.connections == 0


# Together, and cut short ---------------------------------------------------------------------


@pytest.mark.parametrize("leaver", [0, 2], ids=["who downloads", "who waits"])
async def test_whoever_leaves_a_pull_of_several_the_others_have_the_image(
    image: Image, tmp_path: Path, leaver: int
) -> None:
    """One blob is on its way once; only when its downloader leaves, another begins anew."""
    scopes = [trio.CancelScope() for _ in range(4)]
    told: list[str] = []

    async with (
        playing(image, on("layer", lambda s, _: dripping(s.image.layer, 8, 0.4))) as scene,
        short_of_time(tmp_path) as world,
    ):

        async def pull(scope: trio.CancelScope) -> None:
            with scope:
                told.append(await ensure(world, scene.shelf.name))

        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(pull, scope)
                await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(5):
                while scene.registry.sent < 100_000:
                    await trio.sleep(0.01)
            scopes[leaver].cancel()
        assert tree(world, image) == TREE
    assert told == [PULLED] * 3
    assert scene.count("layer") == (2 if leaver == 0 else 1)


@pytest.mark.parametrize(("part", "sent"), [("config", 0), ("layer", 0), ("layer", 200_000)])
async def test_a_pull_that_is_killed_leaves_nothing_half_and_can_be_made_again(
    image: Image, tmp_path: Path, part: Part, sent: int
) -> None:
    held = on(
        part, lambda s, _: [reply("200 OK", s.image.layer[:sent], length=9_999_999), End.SILENCE]
    )
    async with playing(image, held) as scene:
        command = [sys.executable, "-m", "tests.hostile.pull", str(tmp_path), scene.shelf.name]
        with subprocess.Popen(command, cwd=ROOT) as puller, trio.fail_after(20):
            while not scene.count(part) or scene.registry.sent < sent:
                await trio.sleep(0.01)
            await trio.sleep(0.1)  # it has what was sent, and is unpacking it
            puller.kill()
    assert puller.returncode == -signal.SIGKILL
    async with playing(image, honest) as scene, short_of_time(tmp_path) as world:
        world.images.sweep()
        world.layers.sweep()
        assert await remains(world) == []
        assert await ensure(world, scene.shelf.name) == PULLED
        assert tree(world, image) == TREE


# Names of metadata ---------------------------------------------------------------------------


def test_no_byte_goes_to_metadata_by_a_name_that_leads_there() -> None:
    """In a network of its own, where those addresses exist and answer."""
    script = (
        "mount --bind $0 /etc/hosts && ip link set lo up && ip address add 169.254.169.254 dev lo"
        " && ip address add fd00:ec2::254 dev lo nodad && exec $1 -m tests.hostile.metadata"
    )
    with tempfile.NamedTemporaryFile("w") as hosts:
        hosts.write("169.254.169.254 four.test\nfd00:ec2::254 six.test\n")
        hosts.flush()
        command = ["unshare", "--net", "--mount", "sh", "-c", script, hosts.name, sys.executable]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "four.test is 169.254.169.254, where registries do not live: 1 connections, 0 bytes",
        "six.test is fd00:ec2::254, where registries do not live: 1 connections, 0 bytes",
    ]
