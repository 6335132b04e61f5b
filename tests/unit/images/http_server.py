"""A tiny HTTP server on loopback that answers whatever a test says, right or wrong."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

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


Answer = bytes
Handler = Callable[[Asked], Answer]


def reply(status: str, body: bytes = b"", *, length: int | None = None, **headers: str) -> Answer:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


class Server:
    """Answers each request with what `handle` says, then closes; `asked` is what came."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.handle: Handler = lambda _: reply("404 Not Found")
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, stream: trio.abc.Stream) -> None:
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
            await stream.send_all(self.handle(asked))

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
