"""A VPC's resolver across a real link, asked by the programs that ask one in a task.

The sockets are opened in the router's namespace, the resolver runs in the test's own, and so does
the resolver that it forwards to: as with an agent and its host.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
import trio

from sandbox.kernel.netlink import LOOPBACK_INDEX, Netlink
from sandbox.model.vpc import RESOLVER, DhcpOptions
from sandbox.network.admission import Admission
from sandbox.network.answers import Message
from sandbox.network.dns import Resolver
from sandbox.network.forwarding import Forwarder
from sandbox.network.names import RecordSet, private_zone
from sandbox.network.resolv_conf import for_task
from tests.kernel.test_netlink import TASK, Namespace, connect, namespace
from tests.unit.network import vpcs
from tests.unit.network.upstream import Answers, Transport, reply, upstream

ADDRESS, NOBODYS, VPC_RESOLVER = "10.0.0.10", "10.0.0.99", "10.0.0.2"

WEB = private_zone(
    "prod.example",
    {
        "web.prod.example": [
            RecordSet("A", ("10.0.0.11", "10.0.0.12"), 10),
            RecordSet("AAAA", ("2001:db8::11",), 10),
            RecordSet("SRV", ("1 1 8080 a.web.prod.example.",), 10),
        ]
    },
)


def internet(query: Message, transport: Transport) -> Answers:
    """www.example.com is one address, many.example.com 300; nothing else exists."""
    name = str(query.question[0].name).lower()
    records = {"www.example.com.": 1, "many.example.com.": 300}.get(name, 0)
    found = [f"{name} 60 IN A 192.0.{n // 200}.{n % 200 + 1}" for n in range(records)]
    wanted = found if query.question[0].rdtype == 1 else []
    whole = reply(query, *wanted, rcode="NOERROR" if records else "NXDOMAIN", soa=60)
    wire = whole.to_wire(max_size=65535)
    if transport == "udp" and len(wire) > 1232:
        whole = reply(query)
        whole.flags |= 0x0200  # TC
        wire = whole.to_wire()
    yield wire


@dataclass(frozen=True)
class Task:
    """A namespace that is connected to the router's, and the resolver's file for it."""

    namespace: Namespace
    resolv_conf: Path

    async def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """In the task's network namespace, with a mount namespace and resolv.conf of its own."""
        mounted = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        whole = ["unshare", "--mount", "sh", "-c", mounted, str(self.resolv_conf), *command]
        with trio.fail_after(60):
            return await self.namespace.thread.run(self._run, whole)

    @staticmethod
    def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    async def dig(self, *words: str) -> str:
        if shutil.which("dig") is None:
            pytest.skip("dig is not installed: scripts/setup --tests")
        done = await self.run("dig", "+tries=1", "+time=5", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    async def addresses(self, name: str) -> list[str]:
        """What glibc's getaddrinfo finds, or its error."""
        program = (
            "import socket, sys\n"
            "try: found = socket.getaddrinfo(sys.argv[1], None, type=socket.SOCK_STREAM)\n"
            "except socket.gaierror as error: print(error.errno == socket.EAI_NONAME and 'NONAME'"
            " or error.errno == socket.EAI_AGAIN and 'AGAIN' or error)\n"
            "else: [print(one[4][0]) for one in found]\n"
        )
        done = await self.run(sys.executable, "-c", program, name)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())


@pytest.fixture
def router() -> Iterator[Namespace]:
    yield from namespace("router")


@pytest.fixture
async def task(router: Namespace, tmp_path: Path) -> AsyncIterator[Task]:
    for inside in namespace("task"):
        near, _ = connect(router, inside)
        router.thread.call(add_way, near.index, NOBODYS)
        inside.thread.call(add_address, TASK.name, f"{NOBODYS}/32")
        for address in (VPC_RESOLVER, RESOLVER):
            router.thread.call(add_address, None, f"{address}/32")
        resolv_conf = tmp_path / "resolv.conf"
        options = DhcpOptions(dhcp_options_id="default")
        resolv_conf.write_text(for_task(vpcs.vpc(), options, region="us-east-1"))
        datagrams = [router.thread.call(open_udp, a) for a in (VPC_RESOLVER, RESOLVER)]
        listeners = [router.thread.call(open_tcp, a) for a in (VPC_RESOLVER, RESOLVER)]
        zone = vpcs.zone({ADDRESS: "198.18.0.10"}, enable_dns_hostnames=True, private_zones=[WEB])
        async with upstream(internet) as other, trio.open_nursery() as nursery:
            admission = Admission()
            forwarder = Forwarder(lambda: [other.server], admission)
            resolver = Resolver(zone, forwarder, admission)
            nursery.start_soon(resolver.serve, datagrams, listeners)
            yield Task(inside, resolv_conf)
            nursery.cancel_scope.cancel()
        for given in (*datagrams, *listeners):
            given.close()


def add_address(link: str | None, address: str) -> None:
    with Netlink() as netlink:
        index = LOOPBACK_INDEX
        if link is not None:
            found = netlink.find(link)
            assert found is not None
            index = found.index
        netlink.add_address(index, ip_interface(address))


def add_way(link: int, address: str) -> None:
    with Netlink() as netlink:
        netlink.add_link_route(ip_network(address), link)
        netlink.set_neighbour(link, ip_address(address), TASK.mac)


def open_udp(address: str) -> socket.socket:
    given = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    given.bind((address, 53))
    return given


def open_tcp(address: str) -> socket.socket:
    return socket.create_server((address, 53))


# glibc ----------------------------------------------------------------------------------------


async def test_getaddrinfo_finds_names_of_the_vpc_of_services_and_of_others(task: Task) -> None:
    assert await task.addresses("ip-10-0-0-10.ec2.internal") == [ADDRESS]
    assert await task.addresses("web.prod.example") == ["10.0.0.11", "10.0.0.12", "2001:db8::11"]
    assert await task.addresses("www.example.com") == ["192.0.0.1"]
    assert await task.addresses("ec2-198-18-0-10.compute-1.amazonaws.com") == [ADDRESS]


async def test_a_name_without_a_domain_is_found_by_the_search_list(task: Task) -> None:
    assert await task.addresses("ip-10-0-3-4") == ["10.0.3.4"]


async def test_getaddrinfo_says_of_names_that_do_not_exist_that_they_do_not(task: Task) -> None:
    for name in ("ip-10-9-9-9.ec2.internal", "nobody.prod.example", "nobody.example.com", "redis"):
        assert await task.addresses(name) == ["NONAME"]


async def test_getaddrinfo_takes_a_large_answer_over_tcp(task: Task) -> None:
    assert len(await task.addresses("many.example.com")) == 300


async def test_getnameinfo_finds_the_name_of_an_address(task: Task) -> None:
    program = "import socket; print(socket.gethostbyaddr('10.0.0.10')[0])"
    done = await task.run(sys.executable, "-c", program)
    assert done.stdout == "ip-10-0-0-10.ec2.internal\n", done.stderr


async def test_the_other_address_of_the_resolver_answers_as_well(task: Task) -> None:
    task.resolv_conf.write_text(f"nameserver {RESOLVER}\n")
    assert await task.addresses("ip-10-0-0-10.ec2.internal") == [ADDRESS]


# dig ------------------------------------------------------------------------------------------


async def test_dig_sees_what_ec2_shows(task: Task) -> None:
    assert await task.dig("+short", "ip-10-0-0-10.ec2.internal") == f"{ADDRESS}\n"
    assert await task.dig("+short", "-x", ADDRESS) == "ip-10-0-0-10.ec2.internal.\n"
    assert await task.dig("+short", "SRV", "web.prod.example") == "1 1 8080 a.web.prod.example.\n"
    assert await task.dig("+short", "+tcp", "www.example.com") == "192.0.0.1\n"


async def test_dig_finds_nothing_to_complain_about(task: Task) -> None:
    for words in (
        ("www.example.com",),
        ("ip-10-0-0-10.ec2.internal",),
        ("AAAA", "ip-10-0-0-10.ec2.internal"),
        ("nobody.ec2.internal",),
        ("+noedns", "web.prod.example"),
        ("+tcp", "+keepopen", "web.prod.example", "www.example.com"),
        ("+cookie", "+subnet=192.0.2.0/24", "+padding=128", "www.example.com"),
        ("ANY", "web.prod.example"),
    ):
        said = await task.dig(*words)
        assert "WARNING" not in said
        assert ";; Warning" not in said
        assert "flags: qr rd ra" in said
        assert ("EDNS: version: 0" in said) == ("+noedns" not in words)


async def test_dig_asks_again_over_tcp_for_what_was_truncated(task: Task) -> None:
    cut = await task.dig("+ignore", "many.example.com")
    assert "flags: qr tc rd ra" in cut
    assert "ANSWER: 0" in cut
    whole = await task.dig("many.example.com")
    assert "Truncated, retrying in TCP mode" in whole
    assert "ANSWER: 300" in whole


async def test_dig_is_told_no_in_the_words_of_dns(task: Task) -> None:
    for words, status in (
        (("nobody.ec2.internal",), "NXDOMAIN"),
        (("CH", "TXT", "version.bind"), "REFUSED"),
        (("+edns=5", "+noednsnegotiation", "www.example.com"), "BADVERS"),
        (("+opcode=notify", "SOA", "ec2.internal"), "NOTIMP"),
        (("-b", NOBODYS, "www.example.com"), "REFUSED"),
        (("+header-only",), "FORMERR"),
        (("+norecurse", "www.example.com"), "REFUSED"),
    ):
        assert f"status: {status}" in await task.dig(*words)
    assert "SOA" in await task.dig("nobody.ec2.internal")
    assert "not a resolver of this address" in await task.dig("-b", NOBODYS, "www.example.com")
