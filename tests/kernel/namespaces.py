"""Throw-away network namespaces for tests of the network: one that plays the host, and packets.

No test touches the links, rules or sysctls of the machine: what Sandbox does to "the host" it does
to a namespace with a small network of its own, `Host`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, TypeVar

from sandbox.kernel import native, netns, rtnetlink
from sandbox.kernel.rtnetlink import LOOPBACK_INDEX, Rtnetlink, VethEnd
from sandbox.kernel.thread import KernelThread

Answer = TypeVar("Answer")

SOON_S = 0.3
"""For what shall not come."""


class Space:
    """A namespace, a route socket of it, and a thread that may enter it."""

    def __init__(self, thread: KernelThread, fd: int | None = None) -> None:
        self.thread = thread
        self.fd = thread.call(netns.create) if fd is None else os.dup(fd)
        self.route = self.call(Rtnetlink)
        if fd is None:
            self.call(netns.write_sysctl, "net/ipv6/conf/default/addr_gen_mode", "1")
        self.route.send([rtnetlink.link_up(LOOPBACK_INDEX)])

    def call(self, fn: Callable[..., Answer], *args: Any) -> Answer:
        def run() -> Answer:
            with netns.within(self.fd):
                return fn(*args)

        return self.thread.call(run)

    def run(self, *command: str, text: str | None = None) -> str:
        """What a program prints that runs inside."""
        return self.call(
            lambda: (
                subprocess.run(
                    command, capture_output=True, check=True, text=True, input=text
                ).stdout
            )
        )

    def ip(self, *words: str) -> Any:
        """What `ip -j` says inside."""
        return json.loads(self.run("ip", "-j", *words) or "[]")

    def index(self, name: str) -> int:
        found = self.route.index(name)
        assert found is not None
        return found

    def links(self) -> set[str]:
        return {name for _, name in self.call(socket.if_nameindex)}

    def close(self) -> None:
        self.route.close()
        os.close(self.fd)


class Host:
    """A host with a router of its own, behind which there is an internet of two addresses.

    host  eth0 192.168.77.2/24 ──── lan 192.168.77.1, 203.0.113.1 (lo), 10.9.9.9 (lo)
    """

    INTERNET = "203.0.113.1"
    PRIVATE = "10.9.9.9"
    ADDRESS = "192.168.77.2"

    def __init__(self, thread: KernelThread, outside: KernelThread) -> None:
        """`thread` has entered a namespace that was made for it."""
        self.thread = thread
        here = thread.call(netns.here)
        self.space = Space(outside, here)
        os.close(here)
        self.lan = Space(outside)
        near, far = VethEnd("eth0", "02:00:00:00:77:02"), VethEnd("lan0", "02:00:00:00:77:01")
        self.space.route.send([rtnetlink.veth(near, far, far_netns_fd=self.lan.fd, mtu=1500)])
        lan0, eth0 = self.lan.index("lan0"), self.space.index("eth0")
        self.lan.route.send(
            [
                rtnetlink.link_up(lan0),
                rtnetlink.address(lan0, ip_interface("192.168.77.1/24")),
                rtnetlink.link_route(ip_network("192.168.77.0/24"), lan0),
                rtnetlink.address(LOOPBACK_INDEX, ip_interface(self.INTERNET)),
                rtnetlink.address(LOOPBACK_INDEX, ip_interface(self.PRIVATE)),
            ]
        )
        self.space.route.send(
            [
                rtnetlink.address(eth0, ip_interface("192.168.77.2/24")),
                rtnetlink.link_route(ip_network("192.168.77.0/24"), eth0),
                rtnetlink.gateway_route(ip_network("0.0.0.0/0"), ip_address("192.168.77.1"), eth0),
            ]
        )

    def close(self) -> None:
        self.space.close()
        self.lan.close()


@contextmanager
def playing_host() -> Iterator[Host]:
    with KernelThread("host") as thread, KernelThread("outside") as outside:
        thread.call(native.unshare, native.CLONE_NEWNET)
        host = Host(thread, outside)
        try:
            yield host
        finally:
            host.close()


# Packets ---------------------------------------------------------------------------------------


def pings(here: Space, address: str, source: str | None = None) -> bool:
    """Whether an echo request is answered; the kernel of the other side does that."""
    is_ipv4 = ":" not in address
    family = socket.AF_INET if is_ipv4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if is_ipv4 else socket.IPPROTO_ICMPV6
    request, reply = (8, 0) if is_ipv4 else (128, 129)

    def ping() -> bool:
        with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
            raw.settimeout(SOON_S)
            if source is not None:
                raw.bind((source, 0))
            head = struct.pack("!BBHHH", request, 0, 0, 0x5B, 1)
            if is_ipv4:
                head = struct.pack("!BBHHH", request, 0, _checksum(head), 0x5B, 1)
            try:
                raw.sendto(head, (address, 0))
                while True:
                    data, sender = raw.recvfrom(2048)
                    kind = data[20] if is_ipv4 else data[0]
                    if kind == reply and sender[0] == address:
                        return True
            except OSError:
                return False

    return here.call(ping)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@contextmanager
def listening(here: Space, address: str = "", port: int = 8000) -> Iterator[socket.socket]:
    def opened() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family)

    with here.call(opened) as server:
        server.settimeout(5)
        yield server


def connects(here: Space, address: str, port: int = 8000) -> bool:
    """Whether a TCP connection comes about. Needs no one to accept it."""

    def connect() -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(SOON_S)
            return client.connect_ex((address, port)) == 0

    return here.call(connect)


@contextmanager
def catching(here: Space, port: int = 9000, address: str = "") -> Iterator[socket.socket]:
    """A UDP socket that says within SOON_S if nothing came."""

    def opened() -> socket.socket:
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.settimeout(SOON_S)
        receiver.bind((address, port))
        return receiver

    with here.call(opened) as receiver:
        yield receiver


def forge(here: Space, source: str, destination: str, port: int = 9000) -> None:
    """Send a UDP datagram with any source address, by a raw socket that must open."""
    body = b"forged"
    udp = struct.pack("!HHHH", 40000, port, 8 + len(body), 0) + body
    head = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0),
        ip_address(source).packed,
        ip_address(destination).packed,
    )

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            assert raw.sendto(head + udp, (destination, 0)) == len(head + udp)

    here.call(send)
