"""A real resolver on loopback that answers whatever a test says, right or wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Literal

import dns.message
import dns.rcode
import dns.rrset
import trio

from sandbox.network.answers import Message
from sandbox.network.resolv_conf import Server

Transport = Literal["udp", "tcp"]
Answers = Iterable[bytes]
"""What is sent for one query, in order: nothing is silence."""

Handler = Callable[[Message, Transport], Answers]


class Upstream:
    def __init__(self, port: int, handler: Handler) -> None:
        self.server = Server("127.0.0.1", port)
        self.handler = handler
        self.asked: list[tuple[str, Transport]] = []
        self.queries: list[Message] = []
        self.ports: list[int] = []
        self.gate = trio.Event()
        """Answers wait for it."""
        self.gate.set()

    def _answers(self, wire: bytes, transport: Transport) -> Answers:
        query = dns.message.from_wire(wire)
        self.queries.append(query)
        self.asked.append((query.question[0].to_text().split()[0], transport))
        return self.handler(query, transport)

    async def _datagrams(self, given: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        async def reply(answers: Answers, peer: tuple[str, int]) -> None:
            await self.gate.wait()
            for answer in answers:
                await given.sendto(answer, peer)

        while True:
            wire, peer = await given.recvfrom(65535)
            self.ports.append(peer[1])
            nursery.start_soon(reply, self._answers(wire, "udp"), peer)

    async def _stream(self, stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                if not (more := await stream.receive_some()):
                    return
                data += more
            for answer in self._answers(data[2:], "tcp"):
                await stream.send_all(len(answer).to_bytes(2, "big") + answer)


@asynccontextmanager
async def upstream(handler: Handler) -> AsyncIterator[Upstream]:
    """Answers as `handler` says, over UDP and TCP on one port."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as given:
        await given.bind(("127.0.0.1", 0))
        port = given.getsockname()[1]
        found = Upstream(port, handler)
        [listener] = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(found._datagrams, given, nursery)
            nursery.start_soon(trio.serve_listeners, found._stream, [listener])
            yield found
            nursery.cancel_scope.cancel()


def reply(query: Message, *records: str, rcode: str = "NOERROR", soa: int | None = None) -> Message:
    """An answer with records as text (`name ttl IN TYPE value`), and the SOA of a no."""
    response = dns.message.make_response(query, recursion_available=True)
    response.set_rcode(dns.rcode.from_text(rcode))
    for record in records:
        owner, ttl, _, kind, value = record.split(maxsplit=4)
        response.answer.append(dns.rrset.from_text(owner, int(ttl), "IN", kind, value))
    if soa is not None:
        name = query.question[0].name.parent()
        value = f"ns.example. host.example. 1 2 3 4 {soa}"
        response.authority.append(dns.rrset.from_text(name, 3600, "IN", "SOA", value))
    return response


def address(query: Message, _: Transport) -> Answers:
    """192.0.2.1 for every name, for five minutes."""
    return [reply(query, f"{query.question[0].name} 300 IN A 192.0.2.1").to_wire()]
