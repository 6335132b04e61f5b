"""A tiny HTTP server on loopback that answers whatever a test says, right or wrong."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import trio


class Asked:
    """One request as the server saw it."""

    def __init__(self, head: bytes, body: bytes = b"") -> None:
        line, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = line.split(" ")
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        self.body = body


class Pause(NamedTuple):
    """Nothing for so long; then the answer goes on."""

    seconds: float


class Endless(NamedTuple):
    """The piece again and again, as long as somebody reads."""

    piece: bytes


class End(Enum):
    """How an answer ends that does not end well."""

    RESET = "the connection is reset, not closed"
    SILENCE = "the connection stays open, and nothing comes any more"


Step = bytes | Pause | Endless | End
Answer = bytes | Sequence[Step]
Handler = Callable[[Asked], Answer]


def reply(status: str, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    said = len(body) if length is None else length
    return head(status, Content_Length=str(said), **headers) + body


def head(status: str, **headers: str) -> bytes:
    """All of an answer but its body; says nothing of a length by itself."""
    lines = [f"HTTP/1.1 {status}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


class Server:
    """Answers each request with what `handle` says, then closes; `asked` is what came."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.connections = 0
        self.sent = 0
        """Bytes of answers, those in the kernel's buffers too."""
        self.handle: Handler = lambda _: reply("404 Not Found")
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        with suppress(trio.BrokenResourceError):
            await self._serve(stream)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                chunk = bytes(await stream.receive_some())
                if not chunk:
                    return
                data += chunk
            head, _, body = data.partition(b"\r\n\r\n")
            asked = Asked(head, body)
            while len(asked.body) < int(asked.headers.get("content-length", 0)):
                asked.body += await stream.receive_some()
            self.asked.append(asked)
            answer = self.handle(asked)
            for step in [answer] if isinstance(answer, bytes) else answer:
                await self._take(step, stream)

    async def _take(self, step: Step, stream: trio.abc.Stream) -> None:
        match step:
            case bytes():
                await stream.send_all(step)
                self.sent += len(step)
            case Pause(seconds):
                await trio.sleep(seconds)
            case Endless(piece):
                while True:
                    await self._take(piece, stream)
            case End.SILENCE:
                await trio.sleep_forever()
            case End.RESET:
                assert isinstance(stream, trio.SocketStream)
                # A close without lingering is a reset: socket(7).
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()

    async def serve(stream: trio.SocketStream) -> None:
        await server.serve(trio.SSLStream(stream, tls, server_side=True) if tls else stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield server
        nursery.cancel_scope.cancel()


class Names(trio.abc.HostnameResolver):
    """Every name is this machine."""

    async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", int(port)))]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise NotImplementedError


def make_certificate(directory: Path) -> Path:
    """A key with its self-signed certificate for registry.test, in one file."""
    file = directory / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    options = ["-subj", "/CN=registry.test", "-addext", "subjectAltName=DNS:registry.test"]
    outputs = ["-keyout", str(file), "-out", f"{file}.crt"]
    subprocess.run([*command.split(), *options, *outputs], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


def speaking_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context
