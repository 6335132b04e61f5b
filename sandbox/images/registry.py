"""Registries over HTTP: OCI's distribution protocol, which is Docker's registry v2.

The only module that imports httpx, and of it only the transport: what a client adds (cookies, proxy
variables, redirects, netrc) is what must not happen here by itself.

- Plain http only for loopback hosts and those configured insecure. Redirects and token realms are
  followed by hand: http(s) only, no step down from https (to this machine's own services neither),
  no user information in the URL, never to a link-local or metadata address: as such in no notation
  a resolver knows, and by a name no further than a connection, whose peer is looked at.
- A 401 answered by the registry itself is met once: with a bearer token from the realm it names, or
  with basic authentication. Authorization goes only to the origin that asked for it.
- What may pass by itself (resets, time-outs, 408, 429, 5xx) is tried again with back-off, obeying
  Retry-After up to a minute. A blob goes on by Range where it broke off; a registry that sends it
  from the start again has its first part skipped. Whoever hashes the pieces finds out the rest.
- Every body has a bound, every wait a time-out, every transfer a total one.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
)
from http import HTTPStatus
from typing import Any, TypeVar

import httpcore
import httpx
import msgspec
import trio

from sandbox.errors import ImageNotFound, RegistryError
from sandbox.images import answers, documents
from sandbox.images.blobs import CHUNK_BYTES, Send
from sandbox.images.credentials import Credentials
from sandbox.images.documents import Descriptor
from sandbox.images.failures import TransferError
from sandbox.images.reference import Reference, hostname, is_loopback
from sandbox.images.sources import Document

_ACCEPT = ", ".join(documents.MANIFEST_TYPES + documents.INDEX_TYPES)
_MAX_REDIRECTS = 10
_MAX_TOKEN_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 1 << 16
_MAX_RETRY_AFTER_S = 60.0
_MAX_CONNECTIONS = 16
"""To one origin."""
_MAX_ORIGINS = 32
"""To which connections are kept when they are idle."""
_READ_BYTES = 1 << 18
"""httpcore asks for 64 KiB at a time; the round through h11 costs more than the bytes."""
_PROGRESS_BYTES = 1 << 20
"""A try that brought this much was not in vain: the count of failures starts again."""
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",  # AWS
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # Azure
        "192.0.0.192/32",  # Oracle
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

T = TypeVar("T")


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `stall` is the longest silence, `total` the longest transfer of one blob."""

    connect: float = 10.0
    stall: float = 30.0
    document: float = 120.0
    total: float = 3600.0


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often a step is tried again, and the first pause, which doubles each time."""

    document: int = 2
    blob: int = 5
    pause_s: float = 0.5


class RegistryClient:
    """Connections to all registries; an async context manager."""

    def __init__(
        self,
        *,
        insecure: Collection[str] = (),
        timeouts: Timeouts = Timeouts(),  # noqa: B008  (frozen)
        retries: Retries = Retries(),  # noqa: B008
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.timeouts = timeouts
        self.retries = retries
        self._insecure = frozenset(insecure)
        self._ssl_context = ssl_context
        self._transports: dict[tuple[str, str, int], _Transport] = {}
        """One for each origin, the one used last at the end: a slow one keeps nobody waiting."""

    async def __aenter__(self) -> RegistryClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            await transport.aclose()

    def source(
        self, reference: Reference, credentials: Credentials | None = None
    ) -> RegistrySource:
        """The image `reference`; asks nothing of the network yet."""
        return RegistrySource(self, reference, credentials)

    def may_be_plain(self, host: str) -> bool:
        """Whether `host[:port]` may be spoken to without TLS."""
        return is_loopback(host) or self.is_insecure(host)

    def is_insecure(self, host: str) -> bool:
        """Whether the operator said that `host[:port]` has no TLS."""
        return bool({host, hostname(host)} & self._insecure)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """One request, one answer, with time-outs; the caller closes the answer."""
        transport = await self._transport(_origin(request.url))
        timeouts = self.timeouts
        request.extensions["timeout"] = {
            "connect": timeouts.connect,
            "read": timeouts.stall,
            "write": timeouts.stall,
            "pool": timeouts.total,
        }
        return await transport.handle_async_request(request)

    async def _transport(self, origin: tuple[str, str, int]) -> _Transport:
        transport = self._transports.pop(origin, None)
        if transport is None:
            # At the first pull: the certificates of the system take 20 ms to load.
            self._ssl_context = self._ssl_context or ssl.create_default_context()
            transport = _Transport(self._ssl_context)
        self._transports[origin] = transport
        for other in list(self._transports)[:-_MAX_ORIGINS]:
            if self._transports[other].is_idle():
                await self._transports.pop(other).aclose()
        return transport


class RegistrySource:
    """One repository of one registry, for one user."""

    def __init__(
        self, client: RegistryClient, reference: Reference, credentials: Credentials | None
    ) -> None:
        self._client = client
        self._reference = reference
        self._credentials = credentials
        self._authorization: str | None = None
        self._login = trio.Lock()
        self._scheme = "http" if client.may_be_plain(reference.host) else "https"
        with self._addressing():
            self._base = httpx.URL(f"{self._scheme}://{reference.host}/v2/{reference.path}/")
            self._origin = _origin(self._base)

    @property
    def origin(self) -> Hashable:
        return (self._reference.host, self._credentials)

    async def root(self) -> Document:
        return await self._document(self._reference.target)

    async def document(self, descriptor: Descriptor) -> Document:
        return await self._document(descriptor.digest)

    async def copy(self, descriptor: Descriptor, send: Send) -> None:
        transfer = _Transfer(self, descriptor, send)
        try:
            with self._deadline(self._client.timeouts.total):
                await self._retrying(transfer.run, self._client.retries.blob, lambda: transfer.done)
        except RegistryError as error:
            message = f"blob {descriptor.short}: {error.message}"
            raise TransferError(error.reference, message, error.status) from error

    # One step with its retries ---------------------------------------------------------------

    async def _document(self, target: str) -> Document:
        async def fetch() -> Document:
            async with self.get(f"manifests/{target}", {"Accept": _ACCEPT}) as response:
                if response.status_code == HTTPStatus.NOT_FOUND:
                    raise ImageNotFound(f"{self._reference}: not found")
                await self.refuse_unless(response, 200)
                body = await self._bounded(response, documents.MAX_MANIFEST_BYTES)
                return Document(body=body, content_type=response.headers.get("content-type", ""))

        with self._deadline(self._client.timeouts.document):
            return await self._retrying(fetch, self._client.retries.document)

    async def _retrying(
        self, attempt: Callable[[], Awaitable[T]], retries: int, progress: Callable[[], int] = int
    ) -> T:
        failures, reached = 0, 0
        while True:
            try:
                return await attempt()
            except _Transient as transient:
                if progress() >= reached + _PROGRESS_BYTES:
                    failures, reached = 0, progress()
                failures += 1
                if failures > retries or transient.retry_after > _MAX_RETRY_AFTER_S:
                    raise transient.error from transient
                pause = self._client.retries.pause_s * 2 ** (failures - 1)
                await trio.sleep(max(pause, transient.retry_after))

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            raise self.error(f"not complete after {seconds:g} s") from None

    # Requests ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def get(self, path: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The answer to GET `path`, after redirects and, once, after authentication.

        Whatever may pass by itself is raised as _Transient, also from within the block.
        """
        try:
            with self._addressing():
                response = await self._answer(path, headers)
            try:
                yield response
            finally:
                await response.aclose()
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise self.error(_told(error)) from error
        except httpx.TransportError as error:
            raise _Transient(self.error(_told(error))) from error

    async def _answer(self, path: str, headers: dict[str, str]) -> httpx.Response:
        url = httpx.URL(self.url(path))
        shown = self._authorization
        response = await self._follow(url, headers, shown)
        if response.status_code == HTTPStatus.UNAUTHORIZED and self._is_ours(response):
            challenges = response.headers.get_list("www-authenticate")
            await response.aclose()
            await self._authenticate(challenges, shown)
            response = await self._follow(url, headers, self._authorization)
        return response

    @contextlib.contextmanager
    def _addressing(self) -> Iterator[None]:
        """Some addresses of strangers are none; each library on the way says so in its own way."""
        try:
            yield
        except (httpx.InvalidURL, UnicodeError) as error:
            raise self.error(f"unusable address: {_told(error)}") from error

    async def _follow(
        self, url: httpx.URL, headers: dict[str, str], authorization: str | None
    ) -> httpx.Response:
        origin = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            sent = dict(headers)
            if authorization is not None and _origin(url) == origin:
                sent["Authorization"] = authorization
            response = await self._send(httpx.Request("GET", url, headers=sent))
            location = response.headers.get("location")
            if response.status_code not in _REDIRECTS or location is None:
                return response
            await response.aclose()
            url = self.allowed(url.join(location), "redirect")
        raise self.error(f"more than {_MAX_REDIRECTS} redirects")

    async def _send(self, request: httpx.Request) -> httpx.Response:
        request.headers["User-Agent"] = "sandbox"
        request.headers["Accept-Encoding"] = "identity"
        response = await self._client.send(request)
        response.request = request
        return response

    def url(self, path: str) -> str:
        """Where `path` of this repository is."""
        return str(self._base.join(path))

    def allowed(self, address: httpx.URL | str, what: str) -> httpx.URL:
        """`address`, when a stranger may send us there."""
        url = httpx.URL(address)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise self.error(f"{what} to an address that is not plainly http(s)")
        if url.scheme == "http" and not self._may_be_plain(url):
            raise self.error(f"{what} from https to http ({url.host})")
        return url

    def _may_be_plain(self, url: httpx.URL) -> bool:
        return self._scheme == "http" or self._client.is_insecure(url.netloc.decode("ascii"))

    def _is_ours(self, response: httpx.Response) -> bool:
        return _origin(response.request.url) == self._origin

    # Authentication ----------------------------------------------------------------------------

    async def _authenticate(self, challenges: Iterable[str], shown: str | None) -> None:
        """Get the authorization that the registry asks for, unless a sibling already did."""
        async with self._login:
            if self._authorization != shown:
                return
            schemes = answers.challenges(challenges)
            if "bearer" in schemes:
                self._authorization = f"Bearer {await self._token(schemes['bearer'])}"
            elif "basic" in schemes and self._credentials is not None and shown is None:
                self._authorization = _basic(self._credentials)

    async def _token(self, challenge: dict[str, str]) -> str:
        realm = self.allowed(challenge.get("realm", ""), "token realm")
        scope = challenge.get("scope") or f"repository:{self._reference.path}:pull"
        query = {"service": challenge.get("service", ""), "scope": scope}
        credentials = self._credentials
        if credentials is not None and credentials.identity_token:
            grant = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token}
            form = {**query, **grant, "client_id": "sandbox"}
            response = await self._send(httpx.Request("POST", realm, data=form))
        else:
            basic = _basic(credentials) if credentials is not None else None
            response = await self._follow(realm.copy_merge_params(query), {}, basic)
        try:
            await self.refuse_unless(response, 200)
            body = await self._bounded(response, _MAX_TOKEN_BYTES)
        finally:
            await response.aclose()
        token = answers.token(body)
        if token is None:
            raise self.error("the answer of the token realm holds no token")
        return token

    # Answers -----------------------------------------------------------------------------------

    async def refuse_unless(self, response: httpx.Response, *good: int) -> None:
        """Raise what an unwanted status means: _Transient, or a RegistryError with the status."""
        status = response.status_code
        if status in good:
            return
        message = answers.refusal(status, await _beginning(response))
        if status in _TRANSIENT:
            pause = answers.retry_after(response.headers.get("retry-after", ""), time.time())
            raise _Transient(self.error(message, status), pause)
        raise self.error(message, status)

    async def _bounded(self, response: httpx.Response, limit: int) -> bytes:
        body = bytearray()
        async with _pieces(response) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    raise self.error(f"answer is larger than {limit} bytes")
        return bytes(body)

    def error(self, message: str, status: int | None = None) -> RegistryError:
        error = RegistryError(str(self._reference), message, status)
        error.scheme = self._scheme
        return error


class _Transfer:
    """One blob on its way; remembers across tries how far it came."""

    def __init__(self, source: RegistrySource, descriptor: Descriptor, send: Send) -> None:
        self._source = source
        self._descriptor = descriptor
        self._send = send
        self.done = 0

    async def run(self) -> None:
        """One try, from where the last one ended."""
        blob, size = self._descriptor, self._descriptor.size
        if self.done == size:
            return  # the connection broke behind the last byte, and no range begins there
        headers = {"Range": f"bytes={self.done}-"} if self.done else {}
        async with self._source.get(f"blobs/{blob.digest}", headers) as response:
            await self._source.refuse_unless(response, 200, 206)
            position = self._position(response)
            async with _pieces(response) as pieces:
                await self._take_all(pieces, position)
        if self.done < size:
            raise _Transient(self._source.error(f"ended after {self.done} of {size} bytes"))

    async def _take_all(self, pieces: AsyncIterator[bytes], position: int) -> None:
        """In chunks, as each costs whoever takes it a thread; at a break also what is in hand."""
        held = bytearray()
        try:
            async for piece in pieces:
                held += piece
                while len(held) >= CHUNK_BYTES:
                    position = await self._take(bytes(held[:CHUNK_BYTES]), position)
                    del held[:CHUNK_BYTES]
        except httpx.TransportError:
            await self._take(bytes(held), position)
            raise
        await self._take(bytes(held), position)

    async def _take(self, piece: bytes, position: int) -> int:
        """Send on what is new of a piece that lies at `position`; returns where it ends."""
        end = position + len(piece)
        if end > self._descriptor.size:
            raise self._source.error(f"longer than its {self._descriptor.size} bytes")
        fresh = piece[max(0, self.done - position) :]
        if fresh:
            await self._send(fresh)
            self.done += len(fresh)
        return end

    def _position(self, response: httpx.Response) -> int:
        """Where in the blob this answer begins."""
        if response.status_code == HTTPStatus.OK:
            return 0
        content_range = response.headers.get("content-range", "")
        if not self.done or not content_range.startswith(f"bytes {self.done}-"):
            raise self._source.error(f"unexpected Content-Range {content_range[:80]!r}")
        return self.done


class _Transient(Exception):
    """`error`, but trying again may help, not before `retry_after` seconds."""

    def __init__(self, error: RegistryError, retry_after: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


# Connections -------------------------------------------------------------------------------


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over sockets that look where they are connected to."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(verify=ssl_context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=_MAX_CONNECTIONS,
            keepalive_expiry=15.0,
            network_backend=_Backend(),
        )

    def is_idle(self) -> bool:
        return all(each.is_idle() or each.is_closed() for each in self._pool.connections)


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self) -> None:
        self._trio = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        if (address := _address(host)) is not None:
            _refuse_forbidden(host, address)
        stream = await self._trio.connect_tcp(host, port, timeout, local_address, socket_options)
        try:
            _refuse_forbidden(host, stream.get_extra_info("server_addr")[0])
        except httpcore.UnsupportedProtocol:
            await stream.aclose()
            raise
        return _Stream(stream)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A stream that reads in larger pieces."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max(max_bytes, _READ_BYTES), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _refuse_forbidden(host: str, address: str) -> None:
    if is_forbidden(address):
        raise httpcore.UnsupportedProtocol(f"{host} is {address}, where registries do not live")


def _address(host: str) -> str | None:
    """What a resolver reads `host` as without asking anybody: inet_aton(3) knows four notations."""
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return str(found[0][4][0])


def is_forbidden(address: str) -> bool:
    """Whether `address` is link-local or answers with a cloud's metadata, in whatever notation."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return any(ip in network for network in _METADATA)


@contextlib.asynccontextmanager
async def _pieces(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body in pieces; the block may stop before its end.

    httpx's body is a generator in a generator in a generator. Left half-way they would be found by
    the garbage collector, who cannot await; so the connection is closed first and they run into it.
    """
    pieces = response.aiter_raw()
    try:
        yield pieces
    finally:
        await response.aclose()
        with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
            async for _ in pieces:
                pass


# Small things ------------------------------------------------------------------------------


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    port = url.port or (443 if url.scheme == "https" else 80)
    if port >= 1 << 16:  # or connect(2) would be told the rest of a division
        raise httpx.InvalidURL(f"there is no port {port}"[:80])
    return (url.scheme, url.host, port)


async def _beginning(response: httpx.Response) -> bytes:
    """As much of a refusal's body as may hold an explanation."""
    body = b""
    async with _pieces(response) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > _MAX_MESSAGE_BYTES:
                break
    return body


def _told(error: Exception) -> str:
    """A transport's exception in a few words; the operating system's own where there are some."""
    cause: BaseException | None = error
    while cause is not None:
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate verify failed: {cause.verify_message}"
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
            # A resolver's error has a negative number and its own text.
            text = os.strerror(cause.errno) if cause.errno > 0 else cause.strerror
            return (text or "no connection").lower()
        cause = cause.__cause__ or cause.__context__
    match error:
        case httpx.ConnectTimeout():
            return "no connection: time-out"
        case httpx.ReadTimeout():
            return "no answer: time-out"
        case _:
            return " ".join(str(error).split())[:200] or type(error).__name__
