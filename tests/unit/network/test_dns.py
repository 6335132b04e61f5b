"""A resolver on real sockets on loopback, with clients that mean well and clients that do not.

The VPC is 127.0.0.0/16 here, so that callers can be told apart by their address.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from sandbox.network.admission import Admission
from sandbox.network.answers import Message
from sandbox.network.dns import CONNECTIONS_PER_CALLER, IDLE_S, PIPELINE_MAX, Resolver
from sandbox.network.forwarding import Forwarder
from sandbox.network.names import RecordSet, Zone, private_zone
from sandbox.network.resolv_conf import Server
from tests.unit.network import vpcs
from tests.unit.network.upstream import Upstream, address, upstream
from tests.unit.network.vpcs import told

ONE, OTHER, STRANGER = "127.0.0.5", "127.0.0.6", "127.0.0.7"
NAME = "ip-127-0-0-5.ec2.internal"

MANY = private_zone(
    "prod.local",
    {
        "many.prod.local": [
            RecordSet("SRV", tuple(f"1 1 {n} host{n}.{'x' * 50}.prod.local." for n in range(8)), 10)
        ],
        "broken.prod.local": [RecordSet("A", ("nonsense",), 10)],
    },
)


def zone() -> Zone:
    return vpcs.zone(
        {ONE: None, OTHER: None},
        cidr_block="127.0.0.0/16",
        private_zones=[MANY],
        enable_dns_hostnames=True,
    )


@dataclass
class Served:
    resolver: Resolver
    datagrams: socket.socket
    listener: socket.socket
    serving: trio.CancelScope

    @property
    def port(self) -> int:
        port: int = self.datagrams.getsockname()[1]
        return port

    @asynccontextmanager
    async def caller(self, source: str = ONE) -> AsyncIterator[trio.socket.SocketType]:
        """A UDP socket from an address, connected to the resolver."""
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as given:
            await given.bind((source, 0))
            await given.connect(("127.0.0.1", self.port))
            yield given

    async def ask(self, query: Message, source: str = ONE) -> Message:
        async with self.caller(source) as given:
            await given.send(query.to_wire())
            with trio.fail_after(5):
                return dns.message.from_wire(await given.recv(65535))

    async def connect(self, source: str = ONE) -> trio.SocketStream:
        given = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM)
        await given.bind((source, 0))
        await given.connect(("127.0.0.1", self.listener.getsockname()[1]))
        return trio.SocketStream(given)

    async def works(self) -> bool:
        over_udp = await self.ask(dns.message.make_query(NAME, "A"))
        async with await self.connect() as stream:
            await stream.send_all(framed(dns.message.make_query(NAME, "A")))
            return told(over_udp) == told(await next_answer(stream)) == [ONE]


def framed(query: Message | bytes) -> bytes:
    wire = query if isinstance(query, bytes) else query.to_wire()
    return len(wire).to_bytes(2, "big") + wire


async def next_answer(stream: trio.SocketStream) -> Message:
    with trio.fail_after(5):
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            # Never more than this message: the next one may follow at once.
            wanted = 2 - len(data) if len(data) < 2 else 2 + int.from_bytes(data[:2], "big")
            more = await stream.receive_some(wanted - len(data) if len(data) >= 2 else wanted)
            assert more, "closed instead of answered"
            data += more
    return dns.message.from_wire(data[2:])


async def is_closed(stream: trio.SocketStream) -> bool:
    with trio.fail_after(IDLE_S + 5):
        try:
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def served(
    servers: Callable[[], Sequence[Server]] | None = None, admission: Admission | None = None
) -> AsyncIterator[Served]:
    resolver = resolver_of(servers, admission or Admission())
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        datagrams.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            found = Served(resolver, datagrams, listener, scope)
            nursery.start_soon(serve, found)
            yield found
            scope.cancel()


def resolver_of(servers: Callable[[], Sequence[Server]] | None, admission: Admission) -> Resolver:
    return Resolver(zone(), Forwarder(servers, admission), admission)


async def serve(found: Served) -> None:
    with found.serving:
        await found.resolver.serve([found.datagrams], [found.listener])


def asking(other: Upstream) -> Callable[[], Sequence[Server]]:
    return lambda: [other.server]


# Datagrams ------------------------------------------------------------------------------------


async def test_a_name_of_the_vpc_is_answered_to_who_asks() -> None:
    async with served() as resolver:
        query = dns.message.make_query(NAME, "A")
        got = await resolver.ask(query)
        assert query.is_response(got)
        assert told(got) == [ONE]


async def test_a_name_of_others_is_asked_of_the_hosts_resolver() -> None:
    async with upstream(address) as other, served(asking(other)) as resolver:
        query = dns.message.make_query("WWW.example.com", "A", use_edns=0)
        got = await resolver.ask(query)
        assert query.is_response(got)
        assert told(got) == ["192.0.2.1"]
        assert got.flags & dns.flags.RA
        assert got.edns == 0


async def test_why_a_name_could_not_be_looked_up_is_told() -> None:
    async with served(tuple) as resolver:
        got = await resolver.ask(dns.message.make_query("www.example.com", "A", use_edns=0))
        assert got.rcode() == dns.rcode.SERVFAIL
        [reason] = got.options
        assert isinstance(reason, dns.edns.EDEOption)
        assert reason.text == "the host has no name server"


async def test_an_address_that_is_nobodys_is_refused() -> None:
    async with served() as resolver:
        got = await resolver.ask(dns.message.make_query(NAME, "A"), STRANGER)
        assert told(got) == "REFUSED"


async def test_a_newer_zone_is_known_at_once() -> None:
    async with served() as resolver:
        resolver.resolver.zone = vpcs.zone({STRANGER: None}, cidr_block="127.0.0.0/16")
        query = dns.message.make_query(NAME, "A")
        assert told(await resolver.ask(query, STRANGER)) == [ONE]
        assert told(await resolver.ask(query, ONE)) == "REFUSED"


@pytest.mark.parametrize(
    ("payload", "is_truncated"), [(None, True), (512, True), (0, True), (1232, False)]
)
async def test_an_answer_beyond_what_the_client_takes_is_truncated(
    payload: int | None, is_truncated: bool
) -> None:
    edns = {} if payload is None else {"use_edns": 0, "payload": payload}
    async with served() as resolver:
        query = dns.message.make_query("many.prod.local", "SRV", **edns)  # type: ignore[arg-type]
        got = await resolver.ask(query)
        assert bool(got.flags & dns.flags.TC) == is_truncated
        assert len(got.answer) == (0 if is_truncated else 1)
        assert query.is_response(got)


async def test_a_caller_beyond_its_rate_hears_nothing_and_others_do() -> None:
    query = dns.message.make_query(NAME, "A").to_wire()
    async with served(admission=Admission(per_caller=5)) as resolver:
        async with resolver.caller(ONE) as given:
            for _ in range(50):
                await given.send(query)
            answers = 0
            with trio.move_on_after(0.15):
                while True:
                    await given.recv(65535)
                    answers += 1
            assert 5 <= answers <= 7  # a token comes back every 0.2 s
        assert told(await resolver.ask(dns.message.make_query(NAME, "A"), OTHER)) == [ONE]
        await trio.sleep(0.4)
        assert told(await resolver.ask(dns.message.make_query(NAME, "A"), ONE)) == [ONE]


HOSTILE = {
    "nothing": (b"", None),
    "half a header": (b"\0\1\1\0\0\1", None),
    "an answer": (b"\0\1\x81\0\0\1\0\0\0\0\0\0\0\0\1\0\1", None),
    "a header alone": (b"\0\1\1\0\0\1" + bytes(6), "FORMERR"),
    "no question": (b"\0\1\1\0" + bytes(8), "FORMERR"),
    "two questions": (b"\0\1\1\0\0\2" + bytes(6) + b"\0\0\1\0\1" * 2, "FORMERR"),
    "an answer in a query": (b"\0\1\1\0\0\1\xff\xff" + bytes(4) + b"\0\0\1\0\1", "FORMERR"),
    "a name that points at itself": (b"\0\1\1\0\0\1" + bytes(6) + b"\xc0\x0c\0\1\0\1", "FORMERR"),
    "a name that points behind": (b"\0\1\1\0\0\1" + bytes(6) + b"\xff\xff\0\1\0\1", "FORMERR"),
    "something behind the end": (b"\0\1\1\0\0\1" + bytes(6) + b"\0\0\1\0\1xyz", "FORMERR"),
    "a notify": (b"\0\1\x21\0\0\1" + bytes(6) + b"\0\0\6\0\1", "NOTIMP"),
    "an update": (b"\0\1\x29\0\0\1" + bytes(6) + b"\0\0\6\0\1", "NOTIMP"),
    "too long": (b"\0\1\1\0\0\1" + bytes(6) + b"\0\0\1\0\1" + bytes(5000), "FORMERR"),
    "two OPT": (
        b"\0\1\1\0\0\1\0\0\0\0\0\2\0\0\1\0\1" + b"\0\0\x29\x10\0" + bytes(6) * 2,
        "FORMERR",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_is_no_query_is_an_error_or_silence(case: str) -> None:
    wire, expected = HOSTILE[case]
    async with served() as resolver:
        async with resolver.caller() as given:
            await given.send(wire)
            await given.send(dns.message.make_query(NAME, "A", id=7).to_wire())
            with trio.fail_after(5):
                got = [
                    dns.message.from_wire(await given.recv(65535))
                    for _ in range(2 if expected else 1)
                ]
        assert [told(message) for message in got] == [*([expected] if expected else []), [ONE]]
        if expected:
            assert (got[0].id, got[0].flags & dns.flags.QR) == (1, dns.flags.QR)
            assert got[0].flags & dns.flags.RD


async def test_a_fault_of_ours_is_one_clients_servfail_and_is_told() -> None:
    with capture_logs() as lines:
        async with served() as resolver:
            for _ in range(3):
                got = await resolver.ask(dns.message.make_query("broken.prod.local", "A"))
                assert told(got) == "SERVFAIL"
            assert await resolver.works()
    [line] = lines
    assert line["event"] == "a query could not be answered"
    assert line["caller"] == ONE


async def test_the_log_tells_each_kind_once_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    query = dns.message.make_query("www.example.com", "A")
    with capture_logs() as lines:
        async with served() as resolver:
            for _ in range(5):
                assert told(await resolver.ask(query)) == "REFUSED"
            await trio.sleep(61)
            await resolver.ask(query)
    assert [line["untold"] for line in lines] == [0, 4]


# Connections ----------------------------------------------------------------------------------


async def test_a_large_answer_comes_whole_over_tcp() -> None:
    async with served() as resolver, await resolver.connect() as stream:
        query = dns.message.make_query("many.prod.local", "SRV")
        await stream.send_all(framed(query))
        got = await next_answer(stream)
        assert query.is_response(got)
        assert len(told(got)) == 8


async def test_a_query_that_comes_byte_by_byte_is_answered() -> None:
    async with served() as resolver, await resolver.connect() as stream:
        for byte in framed(dns.message.make_query(NAME, "A")):
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.001)
        assert told(await next_answer(stream)) == [ONE]


async def test_a_slow_question_does_not_hold_up_those_behind_it() -> None:
    async with upstream(address) as other, served(asking(other)) as resolver:
        other.gate = trio.Event()
        async with await resolver.connect() as stream:
            slow = dns.message.make_query("www.example.com", "A", id=1)
            quick = dns.message.make_query(NAME, "A", id=2)
            await stream.send_all(framed(slow) + framed(quick))
            assert (await next_answer(stream)).id == 2
            other.gate.set()
            assert (await next_answer(stream)).id == 1


async def test_questions_of_one_connection_that_wait_are_bounded() -> None:
    async with upstream(address) as other, served(asking(other)) as resolver:
        other.gate = trio.Event()
        async with await resolver.connect() as stream:
            for number in range(PIPELINE_MAX + 5):
                await stream.send_all(framed(dns.message.make_query(f"n{number}.example", "A")))
            with trio.move_on_after(0.3):
                while len(other.asked) <= PIPELINE_MAX:
                    await trio.sleep(0.01)
            assert len(other.asked) == PIPELINE_MAX
            other.gate.set()
            answers = [await next_answer(stream) for _ in range(PIPELINE_MAX + 5)]
        assert len({str(answer.question[0].name) for answer in answers}) == PIPELINE_MAX + 5


async def test_a_client_that_has_said_all_is_still_answered() -> None:
    async with (
        upstream(address) as other,
        served(asking(other)) as resolver,
        await resolver.connect() as stream,
    ):
        await stream.send_all(framed(dns.message.make_query("www.example.com", "A")))
        await stream.send_eof()
        assert told(await next_answer(stream)) == ["192.0.2.1"]
        assert await is_closed(stream)


@pytest.mark.parametrize(
    "prefix", [b"\0\0", b"\0\1x", b"\0\x0bxxxxxxxxxxx", b"\xff\xff", b"\x10\x01"]
)
async def test_a_length_that_no_query_has_ends_the_connection(prefix: bytes) -> None:
    async with served() as resolver:
        async with await resolver.connect() as stream:
            await stream.send_all(prefix)
            with trio.fail_after(2):
                assert await is_closed(stream)
        assert await resolver.works()


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\x20", b"\0\x20abc"])
async def test_a_client_that_stops_is_let_go(
    said: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with served() as resolver, await resolver.connect() as stream:
        if said:
            await stream.send_all(said)
        assert await is_closed(stream)
        assert IDLE_S - 0.1 < trio.current_time() < IDLE_S + 1


async def test_a_trickle_does_not_hold_a_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with served() as resolver, await resolver.connect() as stream:
        with suppress(trio.BrokenResourceError):
            for byte in framed(dns.message.make_query(NAME, "A")):
                await stream.send_all(bytes([byte]))
                await trio.sleep(3)
        assert await is_closed(stream)


async def test_a_client_that_takes_no_answers_is_let_go(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with served() as resolver:
        given = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_STREAM)
        given.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await given.bind((ONE, 0))
        await given.connect(("127.0.0.1", resolver.listener.getsockname()[1]))
        query = framed(dns.message.make_query("many.prod.local", "SRV"))
        async with trio.SocketStream(given) as stream:
            with trio.fail_after(600), pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(query * 200)
        assert await resolver.works()


async def test_connections_are_bounded_for_each_caller() -> None:
    async with served() as resolver:
        streams = [await resolver.connect() for _ in range(CONNECTIONS_PER_CALLER)]
        async with await resolver.connect() as stream:
            with trio.fail_after(2):
                assert await is_closed(stream)
        async with await resolver.connect(OTHER) as stream:
            await stream.send_all(framed(dns.message.make_query(NAME, "A")))
            assert told(await next_answer(stream)) == [ONE]
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(2):
            while resolver.resolver._connections._taken:
                await trio.sleep(0.01)
        assert await resolver.works()


async def test_a_stream_beyond_its_rate_waits_its_turn() -> None:
    slow = served(admission=Admission(per_caller=5))
    async with slow as resolver, await resolver.connect() as stream:
        started = trio.current_time()
        for _ in range(7):
            await stream.send_all(framed(dns.message.make_query(NAME, "A")))
        for _ in range(7):
            assert told(await next_answer(stream)) == [ONE]
        assert trio.current_time() - started > 0.3


# Its life -------------------------------------------------------------------------------------


async def test_sockets_stay_open_and_what_waits_in_them_is_answered_by_the_next() -> None:
    async with served() as resolver, resolver.caller() as given:
        assert await resolver.works()
        resolver.serving.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await given.send(dns.message.make_query(NAME, "A").to_wire())
        async with await resolver.connect() as stream, trio.open_nursery() as nursery:
            await stream.send_all(framed(dns.message.make_query(NAME, "A")))
            successor = resolver_of(None, Admission())
            nursery.start_soon(successor.serve, [resolver.datagrams], [resolver.listener])
            with trio.fail_after(5):
                assert told(dns.message.from_wire(await given.recv(65535))) == [ONE]
                assert told(await next_answer(stream)) == [ONE]
            nursery.cancel_scope.cancel()


async def test_a_cancelled_resolver_leaves_no_descriptor_whatever_it_was_doing() -> None:
    async with upstream(address) as other, served(asking(other)) as resolver:
        other.gate = trio.Event()
        before = len(os.listdir("/proc/self/fd"))
        async with (
            resolver.caller() as given,
            await resolver.connect() as asking_one,
            await resolver.connect() as idle,
        ):
            await given.send(dns.message.make_query("a.example", "A").to_wire())
            await asking_one.send_all(framed(dns.message.make_query("b.example", "A")))
            await idle.send_all(b"\0")
            with trio.fail_after(5):
                while len(other.asked) < 2:
                    await trio.sleep(0.01)
            resolver.serving.cancel()
            assert await is_closed(asking_one)
            assert await is_closed(idle)
        other.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("how", ["closed", "shut down"])
async def test_a_socket_that_fails_ends_no_other(how: str) -> None:
    with capture_logs() as lines:
        async with served() as resolver:
            bad, worse = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket()
            with bad, worse:
                bad.bind(("127.0.0.1", 0))
                worse.bind(("127.0.0.1", 0))
                worse.listen()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(resolver.resolver.serve, [bad], [worse])
                    await trio.testing.wait_all_tasks_blocked()
                    for given in (bad, worse):
                        if how == "closed":
                            trio.lowlevel.notify_closing(given)
                            given.close()
                        else:
                            with suppress(OSError):  # it is not connected, and shut down anyway
                                given.shutdown(socket.SHUT_RDWR)
                    assert await resolver.works()
                    nursery.cancel_scope.cancel()
    assert {line["event"] for line in lines} == {
        "a socket for queries is gone",
        "a socket for connections is gone",
    }


async def test_sockets_that_are_closed_before_they_are_served_are_passed_over() -> None:
    async with served() as resolver:
        gone = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        gone.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(resolver.resolver.serve, [gone], [])
            assert await resolver.works()
            nursery.cancel_scope.cancel()


async def test_one_packet_does_not_wait_behind_hundreds_of_another_caller() -> None:
    query = dns.message.make_query(NAME, "A").to_wire()
    async with served() as resolver, resolver.caller(ONE) as loud, resolver.caller(OTHER) as quiet:
        resolver.serving.cancel()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(200):
            await loud.send(query)
        await quiet.send(query)
        async with trio.open_nursery() as nursery:
            successor = resolver_of(None, Admission())
            nursery.start_soon(successor.serve, [resolver.datagrams], [])
            with trio.fail_after(5):
                await quiet.recv(65535)
            nursery.cancel_scope.cancel()
        answered_before = 0
        with suppress(BlockingIOError):
            while True:
                os.read(loud.fileno(), 65535)
                answered_before += 1
        assert answered_before < 20


async def test_a_storm_of_one_caller_leaves_the_loop_and_other_callers_their_turn() -> None:
    """Nobody waits for long while one sends as fast as it can."""
    query = dns.message.make_query(NAME, "A").to_wire()
    async with served() as resolver, resolver.caller(ONE) as loud:

        async def storm() -> None:
            while True:
                for _ in range(20):
                    with suppress(OSError):
                        await loud.send(query)
                await trio.sleep(0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(storm)
            await trio.sleep(1.5)  # its burst is spent
            answered = 0
            async with resolver.caller(OTHER) as given:
                for _ in range(10):
                    await given.send(query)
                    with trio.move_on_after(1):
                        await given.recv(65535)
                        answered += 1
            nursery.cancel_scope.cancel()
        assert answered >= 8
