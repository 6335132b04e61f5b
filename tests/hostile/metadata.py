"""Registries by names that lead to metadata addresses, on a host that has these addresses.

Prints for each what became of the pull, and what whoever listens there has seen of it.
"""

from __future__ import annotations

import trio
import trio.testing

from sandbox.errors import RegistryError
from sandbox.images.reference import parse_name
from sandbox.images.registry import RegistryClient, Retries


async def ask(name: str, address: str) -> None:
    connections, seen = 0, bytearray()

    async def listen(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        async for piece in stream:
            seen.extend(piece)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=address)
        nursery.start_soon(trio.serve_listeners, listen, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with RegistryClient(insecure=[name], retries=Retries(document=0)) as client:
            try:
                await client.source(parse_name(f"{name}:{port}/x")).root()
            except RegistryError as error:
                await trio.testing.wait_all_tasks_blocked()
                print(f"{error.message}: {connections} connections, {len(seen)} bytes")
        nursery.cancel_scope.cancel()


async def main() -> None:
    await ask("four.test", "169.254.169.254")
    await ask("six.test", "fd00:ec2::254")


if __name__ == "__main__":
    trio.run(main)
