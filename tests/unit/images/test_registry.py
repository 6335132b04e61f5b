"""The registry client against a server that does everything wrong, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from sandbox.errors import ImageError, ImageNotFound, RegistryError
from sandbox.images.credentials import Credentials
from sandbox.images.documents import MAX_MANIFEST_BYTES, Descriptor, NoSuchPlatform
from sandbox.images.failures import TransferError, pull_failure_text
from sandbox.images.reference import Reference, parse_name
from sandbox.images.registry import (
    RegistryClient,
    RegistrySource,
    Retries,
    Timeouts,
    is_forbidden,
)
from tests.unit.images.http_server import (
    Answer,
    Asked,
    Names,
    Server,
    make_certificate,
    reply,
    serving,
    speaking_tls,
)

BLOB = bytes(range(256)) * 40_000  # 10 MB
LAYER = Descriptor(digest="sha256:" + hashlib.sha256(BLOB).hexdigest(), size=len(BLOB))
FAST = Retries(document=2, blob=5, pause_s=0.001)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one


@pytest.fixture
async def client() -> AsyncIterator[RegistryClient]:
    timeouts = Timeouts(connect=2, stall=0.3, document=5, total=5)
    async with RegistryClient(retries=FAST, timeouts=timeouts) as one:
        yield one


def named(server: Server) -> Reference:
    return parse_name(f"{server.host}/some/image:tag")


def of(client: RegistryClient, server: Server, user: Credentials | None = None) -> RegistrySource:
    return client.source(named(server), user)


async def fetched(source: RegistrySource) -> bytes:
    body = bytearray()

    async def send(chunk: bytes) -> None:
        body.extend(chunk)

    await source.copy(LAYER, send)
    return bytes(body)


# Manifests


async def test_a_manifest_is_asked_for_by_tag_and_then_by_digest(
    server: Server, client: RegistryClient
) -> None:
    server.handle = lambda _: reply("200 OK", b"{}", Content_Type="a/b")
    source = of(client, server)
    document = await source.root()
    await source.document(LAYER)
    assert (document.body, document.content_type) == (b"{}", "a/b")
    assert server.paths() == [
        "/v2/some/image/manifests/tag",
        f"/v2/some/image/manifests/{LAYER.digest}",
    ]
    assert "oci.image.index" in server.asked[0].headers["accept"]


async def test_an_unknown_image_is_not_found(server: Server, client: RegistryClient) -> None:
    with pytest.raises(ImageNotFound) as raised:
        await of(client, server).root()
    assert pull_failure_text(raised.value, named(server)) == (
        "CannotPullContainerError: pull image manifest has been retried 1 time(s): "
        f"failed to resolve ref {server.host}/some/image:tag: not found"
    )


async def test_a_refusal_carries_the_status_and_what_the_server_wrote(
    server: Server, client: RegistryClient
) -> None:
    errors = {"errors": [{"code": "DENIED", "message": "not\nfor \x1byou"}]}
    server.handle = lambda _: reply("403 Forbidden", json.dumps(errors).encode())
    with pytest.raises(RegistryError) as raised:
        await of(client, server).root()
    assert raised.value.status == 403
    assert str(raised.value).endswith("403 Forbidden - Server message: denied: not for  you")
    assert pull_failure_text(raised.value, named(server)).endswith(
        "unexpected status from HEAD request to "
        f"http://{server.host}/v2/some/image/manifests/tag: 403 Forbidden"
    )


async def test_a_manifest_without_end_is_cut_off(server: Server, client: RegistryClient) -> None:
    server.handle = lambda _: reply("200 OK", b"x" * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(RegistryError, match="larger than"):
        await of(client, server).root()
    assert len(server.asked) == 1


async def test_a_registry_that_is_not_there_is_told_with_the_systems_words(
    client: RegistryClient,
) -> None:
    reference = parse_name("127.0.0.1:1/x")
    with pytest.raises(RegistryError) as raised:
        await client.source(reference).root()
    assert str(raised.value) == "127.0.0.1:1/x:latest: connection refused"
    assert 'failed to do request: Head "http://127.0.0.1:1/v2/x/manifests/latest"' in (
        pull_failure_text(raised.value, reference)
    )


async def test_a_failure_names_the_scheme_that_was_spoken() -> None:
    reference = parse_name("0.0.0.0:1/x")
    for insecure, scheme in (((), "https"), (("0.0.0.0",), "http")):
        async with RegistryClient(insecure=insecure, retries=FAST) as client:
            with pytest.raises(RegistryError) as raised:
                await client.source(reference).root()
        assert f'Head "{scheme}://0.0.0.0:1/v2/x/manifests/latest"' in (
            pull_failure_text(raised.value, reference)
        )


@pytest.mark.parametrize(
    "host",
    [
        "[::::]",
        "256.1.1.1",
        "localhost:99999",
        "localhost:999999999999999999999999",
        "localhost:" + "9" * 900,
        "xn--a.example",
        "a" * 64 + ".example",
    ],
)
async def test_a_registry_that_can_be_nowhere_is_a_registry_error(
    client: RegistryClient, host: str
) -> None:
    with pytest.raises(RegistryError) as raised:
        await client.source(parse_name(f"{host}/x")).root()
    assert raised.value.message.startswith("unusable address: ")


async def test_silence_ends_in_a_time_out(client: RegistryClient) -> None:
    async def silent(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, silent, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(RegistryError, match="no answer: time-out"):
            await client.source(parse_name(f"127.0.0.1:{port}/x")).root()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("status", ["500 Oops", "503 Busy", "429 Too Many Requests"])
async def test_what_may_pass_is_tried_again(
    server: Server, client: RegistryClient, status: str
) -> None:
    def handle(_: Asked) -> Answer:
        return reply(status) if len(server.asked) < 3 else reply("200 OK", b"{}")

    server.handle = handle
    assert (await of(client, server).root()).body == b"{}"
    assert len(server.asked) == 3


async def test_trying_again_has_an_end(server: Server, client: RegistryClient) -> None:
    server.handle = lambda _: reply("502 Bad Gateway")
    with pytest.raises(RegistryError, match="502 Bad Gateway"):
        await of(client, server).root()
    assert len(server.asked) == 1 + FAST.document


async def test_retry_after_is_obeyed(server: Server, client: RegistryClient) -> None:
    times: list[float] = []

    def handle(_: Asked) -> Answer:
        times.append(trio.current_time())
        if len(times) == 1:
            return reply("429 Too Many Requests", Retry_After="1")
        return reply("200 OK", b"{}")

    server.handle = handle
    await of(client, server).root()
    assert times[1] - times[0] >= 1


async def test_an_hour_is_not_waited_for(server: Server, client: RegistryClient) -> None:
    server.handle = lambda _: reply("429 Too Many Requests", Retry_After="3600")
    with pytest.raises(RegistryError, match="429"):
        await of(client, server).root()
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 999 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000,
    ],
)
async def test_an_answer_that_is_not_http_is_an_error(
    server: Server, client: RegistryClient, answer: bytes
) -> None:
    server.handle = lambda _: answer
    with pytest.raises(RegistryError):
        await of(client, server).root()


# Blobs


async def test_a_blob_that_breaks_off_goes_on_by_range(
    server: Server, client: RegistryClient
) -> None:
    def handle(asked: Asked) -> Answer:
        start = int(asked.headers.get("range", "bytes=0-")[6:-1])
        end = min(start + 3_000_000, len(BLOB))
        status = "206 Partial Content" if start else "200 OK"
        span = f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"
        return reply(status, BLOB[start:end], length=len(BLOB) - start, Content_Range=span)

    server.handle = handle
    assert await fetched(of(client, server)) == BLOB
    assert len(server.asked) >= 4
    assert "range" not in server.asked[0].headers


async def test_no_byte_that_came_is_asked_for_again(server: Server, client: RegistryClient) -> None:
    """However early a connection breaks; and behind the last byte there is nothing to ask for."""

    def handle(asked: Asked) -> Answer:
        start = int(asked.headers.get("range", "bytes=0-")[6:-1])
        end = min(start + 3_333_333, len(BLOB))
        status = "206 Partial Content" if start else "200 OK"
        span = f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"
        return reply(status, BLOB[start:end], length=len(BLOB) - start + 9, Content_Range=span)

    server.handle = handle
    assert await fetched(of(client, server)) == BLOB
    starts = [asked.headers.get("range") for asked in server.asked]
    assert starts == [None, *(f"bytes={n * 3_333_333}-" for n in (1, 2, 3))]


async def test_a_server_without_ranges_begins_again_and_nothing_is_sent_twice(
    server: Server, client: RegistryClient
) -> None:
    def handle(_: Asked) -> Answer:
        end = len(server.asked) * 4_000_000
        return reply("200 OK", BLOB[:end], length=len(BLOB))

    server.handle = handle
    assert await fetched(of(client, server)) == BLOB


@pytest.mark.parametrize("span", ["bytes 5-9/10", "", "bytes 0-1/2"])
async def test_another_part_than_the_one_asked_for_is_refused(
    server: Server, client: RegistryClient, span: str
) -> None:
    def handle(asked: Asked) -> Answer:
        if "range" in asked.headers:
            return reply("206 Partial Content", b"x", Content_Range=span)
        return reply("200 OK", BLOB[:3_000_000], length=len(BLOB))

    server.handle = handle
    with pytest.raises(TransferError, match="Content-Range"):
        await fetched(of(client, server))


async def test_bytes_beyond_the_size_stop_the_transfer(
    server: Server, client: RegistryClient
) -> None:
    server.handle = lambda _: reply("200 OK", BLOB + b"more")
    with pytest.raises(TransferError, match="longer than its"):
        await fetched(of(client, server))


async def test_a_trickle_of_resets_has_an_end(server: Server, client: RegistryClient) -> None:
    server.handle = lambda _: reply("200 OK", b"x", length=len(BLOB))
    with pytest.raises(TransferError) as raised:
        await fetched(of(client, server))
    assert len(server.asked) == 1 + FAST.blob
    assert pull_failure_text(raised.value, named(server)).startswith(
        "CannotPullContainerError: ref pull has been retried 5 time(s): failed to copy: "
        f"httpReadSeeker: failed open: {named(server)}: blob {LAYER.short}: "
    )


async def test_a_missing_blob_is_a_transfer_error(server: Server, client: RegistryClient) -> None:
    with pytest.raises(TransferError, match="404 Not Found"):
        await fetched(of(client, server))
    assert len(server.asked) == 1


async def test_the_whole_transfer_has_a_time_out(server: Server) -> None:
    async with RegistryClient(retries=FAST, timeouts=Timeouts(total=0.2)) as client:
        server.handle = lambda _: reply("503 Busy", Retry_After="10")
        with pytest.raises(TransferError, match="not complete after"):
            await fetched(of(client, server))


# Redirects


async def test_a_redirect_to_another_origin_is_followed_without_authorization(
    server: Server, client: RegistryClient
) -> None:
    async with serving() as storage:
        storage.handle = lambda _: reply("200 OK", BLOB)

        def handle(asked: Asked) -> Answer:
            if "authorization" not in asked.headers:
                return reply("401 Unauthorized", WWW_Authenticate='Basic realm="r"')
            return reply("307 Temporary Redirect", Location=f"http://{storage.host}/here?sig=1")

        server.handle = handle
        user = Credentials(username="me", password="secret")
        assert await fetched(of(client, server, user)) == BLOB
        assert storage.paths() == ["/here?sig=1"]
        assert "authorization" not in storage.asked[0].headers


async def test_redirects_in_a_circle_have_an_end(server: Server, client: RegistryClient) -> None:
    server.handle = lambda asked: reply("302 Found", Location=asked.path)
    with pytest.raises(RegistryError, match="more than 10 redirects"):
        await of(client, server).root()
    assert len(server.asked) == 11


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://x/",
        "http://user:pass@127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]/",
        "http://",
        "http://[::1",
        "//169.254.170.2/v2/credentials",
        "http://127.0.0.1:999999999999999999999999/",
        "http://127.0.0.1:123456/",
        "http://xn--a.example/",
        f"http://{'a' * 64}.example/",
        "http://256.1.1.1/",
        "http://0251.0376.0251.0376/",
        "http://\u0661\u06f2.1.1.1/",
        "http://a\x00b/",
    ],
)
async def test_no_redirect_leads_to_files_or_metadata(location: str) -> None:
    async with serving() as server:
        timeouts = Timeouts(connect=0.2, stall=0.2)
        async with RegistryClient(retries=Retries(document=0), timeouts=timeouts) as client:
            server.handle = lambda _: reply("302 Found", Location=location)
            with pytest.raises(RegistryError):
                await of(client, server).root()


@pytest.mark.parametrize(
    ("address", "forbidden"),
    [
        ("169.254.169.254", True),
        ("169.254.170.2", True),
        ("::ffff:169.254.169.254", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("100.100.100.200", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("52.1.2.3", False),
        ("fd00::1", False),
    ],
)
def test_metadata_addresses_are_known_in_every_notation(address: str, forbidden: bool) -> None:
    assert is_forbidden(address) is forbidden


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",
        "0xa9fea9fe",
        "0251.0xfe.43518",
        "169.254.43518",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:aa02]",
        "[64:ff9b::a9fe:a9fe]",
        "[fe80::1]",
        "[fd00:ec2::254]",
    ],
)
async def test_nothing_is_sent_to_a_forbidden_address_in_any_notation(
    client: RegistryClient, host: str
) -> None:
    """No connection either: where there is none to be had, its time-out would be the answer."""
    async with serving() as server:
        server.handle = lambda _: reply("302 Found", Location=f"http://{host}/latest/meta-data/")
        with pytest.raises(RegistryError, match="where registries do not live"):
            await of(client, server).root()
        assert len(server.asked) == 1


async def test_a_connection_that_ends_at_a_forbidden_address_is_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a name resolves to: the connected peer is what is looked at."""
    monkeypatch.setattr("sandbox.images.registry.is_forbidden", lambda peer: peer == "127.0.0.1")
    trio.socket.set_custom_hostname_resolver(Names())
    async with RegistryClient(insecure=["registry.test"], retries=FAST) as client:
        with pytest.raises(RegistryError, match=r"registry\.test is 127\.0\.0\.1, where"):
            await client.source(parse_name(f"registry.test:{server.port}/x")).root()
    assert server.asked == []


async def test_https_does_not_step_down_to_http() -> None:
    async with RegistryClient(insecure=["plain.example"]) as client:
        secure = client.source(parse_name("registry.example/x"))
        assert secure.url("manifests/latest") == "https://registry.example/v2/x/manifests/latest"
        for host in ("registry.example", "127.0.0.1:8080", "localhost", "[::1]:80"):
            with pytest.raises(RegistryError, match="from https to http"):
                secure.allowed(f"http://{host}/x", "redirect")
        assert secure.allowed("http://plain.example:5000/x", "redirect").port == 5000
        assert str(secure.allowed("https://cdn.example/x", "redirect")) == "https://cdn.example/x"
        plain = client.source(parse_name("plain.example:5000/x"))
        assert plain.url("a/b").startswith("http://plain.example:5000/")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(
    ("is_trusted", "name"), [(True, "registry"), (False, "registry"), (True, "x")]
)
async def test_every_other_registry_speaks_tls_with_a_certificate_of_its_name(
    certificate: Path, is_trusted: bool, name: str
) -> None:
    theirs = ssl.create_default_context(cafile=str(certificate) if is_trusted else None)
    trio.socket.set_custom_hostname_resolver(Names())
    async with (
        serving(speaking_tls(certificate)) as server,
        RegistryClient(ssl_context=theirs, retries=FAST) as client,
    ):
        server.handle = lambda _: reply("200 OK", b"{}")
        source = client.source(parse_name(f"{name}.test:{server.port}/x"))
        if is_trusted and name == "registry":
            assert (await source.root()).body == b"{}"
        else:
            with pytest.raises(RegistryError, match="certificate verify failed"):
                await source.root()
            assert server.asked == []


# Authentication


def challenge(server: Server, **parameters: str) -> str:
    given = {"realm": f"http://{server.host}/token", "service": "the registry", **parameters}
    return "Bearer " + ",".join(f'{name}="{value}"' for name, value in given.items())


async def test_a_token_is_fetched_once_and_used_from_then_on(
    server: Server, client: RegistryClient
) -> None:
    def handle(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            return reply("200 OK", b'{"token": "t0k"}')
        if asked.headers.get("authorization") != "Bearer t0k":
            return reply("401 Unauthorized", WWW_Authenticate=challenge(server))
        return reply("200 OK", BLOB if "blobs" in asked.path else b"{}")

    server.handle = handle
    user = Credentials(username="me", password="p:w")
    source = of(client, server, user)
    await source.root()
    assert await fetched(source) == BLOB
    tokens = [asked for asked in server.asked if asked.path.startswith("/token")]
    assert [asked.path for asked in tokens] == [
        "/token?service=the+registry&scope=repository%3Asome%2Fimage%3Apull"
    ]
    basic = base64.b64encode(b"me:p:w").decode()
    assert tokens[0].headers["authorization"] == f"Basic {basic}"


async def test_a_token_that_expired_is_replaced(server: Server, client: RegistryClient) -> None:
    issued: list[str] = []

    def handle(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            issued.append(f"t{len(issued)}")
            return reply("200 OK", json.dumps({"access_token": issued[-1]}).encode())
        if (len(issued) < 2 and "blobs" in asked.path) or "authorization" not in asked.headers:
            return reply("401 Unauthorized", WWW_Authenticate=challenge(server))
        return reply("200 OK", BLOB if "blobs" in asked.path else b"{}")

    server.handle = handle
    source = of(client, server)
    await source.root()
    assert await fetched(source) == BLOB
    assert issued == ["t0", "t1"]


async def test_an_identity_token_is_exchanged(server: Server, client: RegistryClient) -> None:
    def handle(asked: Asked) -> Answer:
        if asked.path == "/token":
            return reply("200 OK", b'{"access_token": "fresh"}')
        if asked.headers.get("authorization") != "Bearer fresh":
            return reply("401 Unauthorized", WWW_Authenticate=challenge(server))
        return reply("200 OK", b"{}")

    server.handle = handle
    await of(client, server, Credentials(identity_token="kept/secret")).root()
    exchange = next(asked for asked in server.asked if asked.path == "/token")
    assert exchange.method == "POST"
    assert b"refresh_token=kept%2Fsecret" in exchange.body
    assert b"grant_type=refresh_token" in exchange.body


async def test_without_credentials_a_basic_challenge_is_a_refusal(
    server: Server, client: RegistryClient
) -> None:
    server.handle = lambda _: reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
    with pytest.raises(RegistryError) as raised:
        await of(client, server).root()
    assert raised.value.status == 401
    assert "pull access denied" in pull_failure_text(raised.value, named(server))


async def test_a_wrong_password_is_tried_once(server: Server, client: RegistryClient) -> None:
    server.handle = lambda _: reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
    with pytest.raises(RegistryError, match="401"):
        await of(client, server, Credentials(username="a", password="b")).root()
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "realm", ["file:///etc/passwd", "ftp://x/", "", "http://169.254.169.254/", "http://[", "\\"]
)
async def test_a_realm_that_is_no_web_address_is_refused(server: Server, realm: str) -> None:
    timeouts = Timeouts(connect=0.2, stall=0.2)
    async with RegistryClient(retries=Retries(document=0), timeouts=timeouts) as client:
        said = challenge(server, realm=realm)
        server.handle = lambda _: reply("401 Unauthorized", WWW_Authenticate=said)
        with pytest.raises(RegistryError):
            await of(client, server).root()
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token": 3}',
        b'{"token": "a\\r\\nX: y"}',
        b"[" * 100_000,
        b"x" * 2_000_000,
    ],
)
async def test_a_token_answer_that_is_none_is_refused(
    server: Server, client: RegistryClient, answer: bytes
) -> None:
    def handle(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            return reply("200 OK", answer)
        return reply("401 Unauthorized", WWW_Authenticate=challenge(server))

    server.handle = handle
    with pytest.raises(RegistryError):
        await of(client, server).root()


async def test_a_challenge_from_a_redirect_target_gets_nothing(
    server: Server, client: RegistryClient
) -> None:
    async with serving() as storage:
        said = challenge(storage)
        storage.handle = lambda _: reply("401 Unauthorized", WWW_Authenticate=said)
        server.handle = lambda _: reply("302 Found", Location=f"http://{storage.host}/x")
        with pytest.raises(RegistryError, match="401"):
            await of(client, server, Credentials(username="a", password="b")).root()
        assert storage.paths() == ["/x"]


def test_texts_for_other_failures_are_ecss() -> None:
    reference = parse_name("busybox")
    platform = NoSuchPlatform("image Manifest does not contain descriptor matching platform 'a/b'")
    assert pull_failure_text(platform, reference) == (
        "CannotPullContainerError: image Manifest does not contain descriptor matching "
        "platform 'a/b'"
    )
    assert pull_failure_text(ImageError("manifest is odd"), reference) == (
        "CannotPullContainerError: docker.io/library/busybox:latest: manifest is odd"
    )
    odd = RegistryError("x", "799", 799)
    assert pull_failure_text(odd, reference).endswith("/manifests/latest: 799")
    long = RegistryError("x", "y" * 5000)
    assert len(pull_failure_text(long, reference)) == 1024
