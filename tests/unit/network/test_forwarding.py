"""Names of others, asked of resolvers that are on loopback and not always honest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import trio
import trio.testing

from sandbox.network.admission import PACKETS_PER_S, Admission
from sandbox.network.answers import Message
from sandbox.network.forwarding import (
    ENTRY_BYTES_MAX,
    FORWARDS_PER_CALLER,
    FORWARDS_TOTAL,
    NO_ANSWER,
    NO_SERVER,
    OFF,
    TOO_MANY,
    Cache,
    Forwarder,
    Reply,
)
from sandbox.network.relaying import Kept, Question, keep, relay
from sandbox.network.resolv_conf import Server
from tests.unit.network.upstream import Answers, Transport, Upstream, address, reply, upstream

CALLER = "10.0.0.5"


def question(name: str = "www.example.com.", kind: str = "A", **flags: bool) -> Question:
    return Question(dns.name.from_text(name), dns.rdatatype.from_text(kind), **flags)


def forwarder(*servers: Upstream | Server) -> Forwarder:
    found = [server.server if isinstance(server, Upstream) else server for server in servers]
    return Forwarder(lambda: found, Admission())


def heard(got: Reply, limit: int = 65535, **query: Any) -> Message:
    """What a client that asked the same is told."""
    assert isinstance(got, Kept), got
    asked = dns.message.from_wire(got.wire).question[0]
    client = dns.message.make_query(asked.name, asked.rdtype, **query)
    wire = relay(client, got, trio.current_time(), limit)
    assert len(wire) <= limit
    message = dns.message.from_wire(wire)
    assert client.is_response(message)
    return message


def values(got: Reply) -> list[str]:
    return [str(record) for records in heard(got).answer for record in records]


async def at_once(*asks: Callable[[], Awaitable[Reply]]) -> list[Reply]:
    """All asked before any is answered; answers in the order that they come."""
    got: list[Reply] = []

    async def ask(one: Callable[[], Awaitable[Reply]]) -> None:
        got.append(await one())

    async with trio.open_nursery() as nursery:
        for one in asks:
            nursery.start_soon(ask, one)
    return got


# What goes well -------------------------------------------------------------------------------


async def test_a_name_of_others_is_asked_of_the_host_s_resolver() -> None:
    async with upstream(address) as other:
        assert values(await forwarder(other).ask(question(), CALLER)) == ["192.0.2.1"]
    assert other.asked == [("www.example.com.", "udp")]
    assert other.queries[0].flags & dns.flags.RD
    assert other.queries[0].payload == 1232


async def test_questions_come_from_many_ports_and_with_many_ids() -> None:
    async with upstream(address) as other:
        asker = forwarder(other)
        for number in range(20):
            await asker.ask(question(f"n{number}.example.com."), CALLER)
    assert len(set(other.ports)) > 10
    assert len({query.id for query in other.queries}) > 10


async def test_an_alias_is_followed_and_kept() -> None:
    def alias(query: Message, _: Transport) -> Answers:
        records = "www.example.com. 30 IN CNAME a.cdn.example.", "a.cdn.example. 60 IN A 192.0.2.7"
        yield reply(query, *records).to_wire()

    async with upstream(alias) as other:
        got = await forwarder(other).ask(question(), CALLER)
    assert values(got) == ["a.cdn.example.", "192.0.2.7"]


async def test_a_truncated_answer_is_asked_for_again_over_tcp() -> None:
    def many(query: Message, transport: Transport) -> Answers:
        records = [f"www.example.com. 60 IN TXT {'x' * 200}{n}" for n in range(30)]
        whole = reply(query, *(records if transport == "tcp" else ()))
        whole.flags |= dns.flags.TC if transport == "udp" else 0
        yield whole.to_wire(max_size=65535)

    async with upstream(many) as other:
        got = await forwarder(other).ask(question(kind="TXT"), CALLER)
    assert len(values(got)) == 30
    assert [transport for _, transport in other.asked] == ["udp", "tcp"]


async def test_dnssec_is_asked_for_and_passed_on_for_who_wants_it() -> None:
    signature = (
        "www.example.com. 60 IN RRSIG A 8 3 60 20300101000000 20200101000000 1 example.com. AAAA"
    )

    def signed(query: Message, _: Transport) -> Answers:
        yield reply(query, "www.example.com. 60 IN A 192.0.2.1", signature).to_wire()

    async with upstream(signed) as other:
        asker = forwarder(other)
        plain = await asker.ask(question(), CALLER)
        wanted = await asker.ask(question(is_dnssec_wanted=True, is_checking_disabled=True), CALLER)
    assert (len(values(plain)), len(values(wanted))) == (1, 2)
    assert [bool(query.ednsflags & dns.flags.DO) for query in other.queries] == [False, True]
    assert [bool(query.flags & dns.flags.CD) for query in other.queries] == [False, True]


# What goes wrong ------------------------------------------------------------------------------


async def test_without_a_server_the_answer_is_there_at_once() -> None:
    assert await forwarder().ask(question(), CALLER) == NO_SERVER
    assert NO_SERVER.rcode == dns.rcode.SERVFAIL


async def test_what_is_off_is_refused_at_once() -> None:
    assert await Forwarder(None, Admission()).ask(question(), CALLER) == OFF
    assert OFF.rcode == dns.rcode.REFUSED


async def test_a_silent_server_is_asked_twice_and_then_the_next_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with upstream(lambda query, transport: []) as silent, upstream(address) as other:
        asker = forwarder(silent, other)
        assert values(await asker.ask(question(), CALLER)) == ["192.0.2.1"]
        assert len(silent.asked) == 2
        assert 3.9 < trio.current_time() < 5
        # Who failed lately is asked last ...
        await asker.ask(question("b.example.com."), CALLER)
        assert len(silent.asked) == 2
        # ... for a while.
        await trio.sleep(31)
        await asker.ask(question("c.example.com."), CALLER)
        assert len(silent.asked) == 4


async def test_a_server_that_fails_gives_way_to_the_next_one_without_waiting() -> None:
    def failing(query: Message, _: Transport) -> Answers:
        yield reply(query, rcode="SERVFAIL").to_wire()

    async with upstream(failing) as broken, upstream(address) as other:
        with trio.fail_after(1.5):
            got = await forwarder(broken, other).ask(question(), CALLER)
        assert values(got) == ["192.0.2.1"]
        assert len(broken.asked) == 1


async def test_all_silent_is_a_failure_after_a_bounded_time_and_kept_for_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with upstream(lambda query, transport: []) as silent:
        asker = forwarder(silent, silent, silent, silent)
        assert await asker.ask(question(), CALLER) == NO_ANSWER
        assert 11.9 < trio.current_time() < 13
        count = len(silent.asked)
        assert await asker.ask(question(), CALLER) == NO_ANSWER
        assert len(silent.asked) == count
        await trio.sleep(1.1)
        await asker.ask(question(), CALLER)
        assert len(silent.asked) > count


async def test_a_port_where_nobody_listens_is_a_failure_at_once() -> None:
    async with upstream(address) as other:
        pass
    with trio.fail_after(1.5):
        assert await forwarder(other).ask(question(), CALLER) == NO_ANSWER


async def test_an_address_that_the_kernel_refuses_is_a_failure_and_no_error() -> None:
    nobody = Server("255.255.255.255"), Server("fe80::1%nolink")
    assert await forwarder(*nobody).ask(question(), CALLER) == NO_ANSWER


async def test_a_server_that_closes_its_stream_is_a_failure_and_no_error() -> None:
    def broken(query: Message, transport: Transport) -> Answers:
        if transport == "udp":
            short = reply(query)
            short.flags |= dns.flags.TC
            yield short.to_wire()

    async with upstream(broken) as other:
        assert await forwarder(other).ask(question(), CALLER) == NO_ANSWER
    assert [transport for _, transport in other.asked] == ["udp", "tcp", "udp", "tcp"]


# Lies -----------------------------------------------------------------------------------------


async def test_what_does_not_answer_the_question_is_passed_over() -> None:
    def noisy(query: Message, _: Transport) -> Answers:
        lie = reply(query, "www.example.com. 60 IN A 203.0.113.66")
        lie.id ^= 1
        yield lie.to_wire()
        other = dns.message.make_query("other.example.com", "A", id=query.id)
        yield reply(other, "other.example.com. 60 IN A 203.0.113.66").to_wire()
        yield query.to_wire()
        yield b"\xff" * 40
        yield b""
        yield from address(query, "udp")

    async with upstream(noisy) as other:
        assert values(await forwarder(other).ask(question(), CALLER)) == ["192.0.2.1"]
    assert len(other.asked) == 1


async def test_an_answer_from_another_address_is_passed_over() -> None:
    """127.0.0.2 knows id, port and question, and still is not who was asked."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as spoofer:
        await spoofer.bind(("127.0.0.2", 0))
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as given:
            await given.bind(("127.0.0.1", 0))
            server = Server("127.0.0.1", given.getsockname()[1])

            async def serve() -> None:
                wire, peer = await given.recvfrom(65535)
                query = dns.message.from_wire(wire)
                lie = reply(query, "www.example.com. 60 IN A 203.0.113.66")
                await spoofer.sendto(lie.to_wire(), peer)
                await given.sendto(next(iter(address(query, "udp"))), peer)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                assert values(await forwarder(server).ask(question(), CALLER)) == ["192.0.2.1"]


async def test_records_of_other_names_reach_nobody() -> None:
    def generous(query: Message, _: Transport) -> Answers:
        whole = reply(
            query,
            "www.example.com. 60 IN A 192.0.2.1",
            "bank.example. 60 IN A 203.0.113.66",
            "www.example.com. 60 IN TXT surprise",
        )
        whole.authority.append(dns.rrset.from_text("example.com.", 60, "IN", "NS", "ns.evil."))
        whole.additional.append(dns.rrset.from_text("bank.example.", 60, "IN", "A", "203.0.113.66"))
        yield whole.to_wire()

    async with upstream(generous) as other:
        got = await forwarder(other).ask(question(), CALLER)
    assert values(got) == ["192.0.2.1"]
    assert (heard(got).authority, heard(got).additional) == ([], [])


async def test_a_chain_without_end_and_an_answer_that_denies_itself_are_failures() -> None:
    def loop(query: Message, _: Transport) -> Answers:
        records = (
            "www.example.com. 60 IN CNAME b.example.com.",
            "b.example.com. 60 IN CNAME www.example.com.",
        )
        yield reply(query, *records).to_wire()

    def denied(query: Message, _: Transport) -> Answers:
        yield reply(query, "www.example.com. 60 IN A 192.0.2.1", rcode="NXDOMAIN").to_wire()

    for handler in (loop, denied):
        async with upstream(handler) as other:
            assert await forwarder(other).ask(question(), CALLER) == NO_ANSWER


# Once for all ---------------------------------------------------------------------------------


async def test_the_same_question_of_many_is_asked_once() -> None:
    async with upstream(address) as other:
        asker = forwarder(other)
        same = [question("WWW.example.com."), *[question()] * 9]
        got = await at_once(*(lambda q=q, n=n: asker.ask(q, n) for n, q in enumerate(same)))
    assert [values(one) for one in got] == [["192.0.2.1"]] * 10
    assert len(other.asked) == 1


async def test_when_who_asks_is_cancelled_another_one_who_waits_asks() -> None:
    async with upstream(address) as other:
        other.gate = trio.Event()
        asker = forwarder(other)
        first = trio.CancelScope()
        got: list[Reply] = []

        async def hasty() -> None:
            with first:
                await asker.ask(question(), 1)

        async def patient() -> None:
            got.append(await asker.ask(question(), 2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hasty)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(patient)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            other.gate.set()
        assert [values(one) for one in got] == [["192.0.2.1"]]
        assert len(other.asked) == 2


async def test_what_may_wait_is_bounded_for_a_caller_and_in_all() -> None:
    async with upstream(lambda query, transport: []) as silent:
        asker = forwarder(silent)
        callers = FORWARDS_TOTAL // FORWARDS_PER_CALLER
        async with trio.open_nursery() as nursery:
            for caller in range(callers):
                if caller:
                    assert await ask_when_full(asker, caller - 1) == TOO_MANY
                for number in range(FORWARDS_PER_CALLER):
                    name = f"n{number}.c{caller}.example.com."
                    nursery.start_soon(asker.ask, question(name), caller)
                await trio.testing.wait_all_tasks_blocked()
            assert await ask_when_full(asker, "somebody else") == TOO_MANY
            nursery.cancel_scope.cancel()
        # All places are free again.
        silent.handler = address
        assert values(await asker.ask(question(), 0)) == ["192.0.2.1"]


async def ask_when_full(asker: Forwarder, caller: object) -> Reply:
    with trio.fail_after(1):
        return await asker.ask(question("full.example.com."), caller)


# What is kept ---------------------------------------------------------------------------------


async def test_an_answer_is_kept_for_a_minute_with_what_is_left_of_its_ttl(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05
    async with upstream(address) as other:
        asker = forwarder(other)
        await asker.ask(question(), CALLER)
        await trio.sleep(40)
        got = await asker.ask(question("WWW.EXAMPLE.COM."), CALLER)
        assert 258 <= heard(got).answer[0].ttl <= 260
        assert len(other.asked) == 1
        await trio.sleep(25)
        await asker.ask(question(), CALLER)
        assert len(other.asked) == 2


async def test_a_no_is_kept_as_long_as_its_soa_says(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05

    def missing(query: Message, _: Transport) -> Answers:
        yield reply(query, rcode="NXDOMAIN", soa=20).to_wire()

    async with upstream(missing) as other:
        asker = forwarder(other)
        for _ in range(2):
            got = await asker.ask(question(), CALLER)
            assert (heard(got).rcode(), len(heard(got).authority)) == (dns.rcode.NXDOMAIN, 1)
            await trio.sleep(15)
        assert len(other.asked) == 1
        await asker.ask(question(), CALLER)
        assert len(other.asked) == 2


async def test_an_answer_that_may_not_be_kept_is_not() -> None:
    def fleeting(query: Message, _: Transport) -> Answers:
        yield reply(query, "www.example.com. 0 IN A 192.0.2.1").to_wire()

    async with upstream(fleeting) as other:
        asker = forwarder(other)
        for _ in range(2):
            await asker.ask(question(), CALLER)
    assert len(other.asked) == 2


def test_the_cache_is_bounded_in_number_and_size() -> None:
    cache = Cache(entries_max=3)
    names = [question(f"{name}.example.") for name in "abcd"]
    for name in names[:3]:
        cache.put(name, kept(1), now=0)
    assert cache.get(names[0], now=1) is not None  # used: another one goes
    cache.put(names[3], kept(1), now=1)
    assert [cache.get(name, now=1) is not None for name in names] == [True, False, True, True]
    assert len(kept(300).wire) > ENTRY_BYTES_MAX
    cache.put(names[1], kept(300), now=1)
    assert cache.get(names[1], now=1) is None
    assert len(cache) == 3


# What a client is told ------------------------------------------------------------------------


def kept(records: int, name: str = "www.example.com.") -> Kept:
    asked = question(name)
    query = dns.message.make_query(asked.name, "A")
    whole = reply(query, *(f"{name} 60 IN A 192.0.{n // 200}.{n % 200}" for n in range(records)))
    found = keep(asked, dns.message.from_wire(whole.to_wire(max_size=65535)), now=0.0)
    assert found is not None
    return found


async def test_each_client_gets_its_own_id_case_and_flags() -> None:
    answer = kept(2, "www.example.com.")
    client = dns.message.make_query("wWw.eXample.COM", "A", id=4711, use_edns=0, want_dnssec=True)
    client.flags |= dns.flags.CD
    message = dns.message.from_wire(relay(client, answer, 0.0, 512))
    assert client.is_response(message)
    assert str(message.question[0].name) == "wWw.eXample.COM."
    assert str(message.answer[0].name) == "wWw.eXample.COM."
    assert len(message.answer[0]) == 2
    assert message.flags == dns.flags.QR | dns.flags.RA | dns.flags.RD | dns.flags.CD
    assert (message.edns, message.ednsflags) == (0, dns.flags.DO)


async def test_a_client_without_edns_is_told_nothing_of_it() -> None:
    assert heard(kept(1)).edns == -1
    assert heard(kept(1), use_edns=0).edns == 0


async def test_an_answer_beyond_the_clients_limit_has_only_tc() -> None:
    answer = kept(60)
    for limit, edns in (
        (512, {}),
        (512, {"use_edns": 0}),
        (len(answer.wire) + 10, {"use_edns": 0}),
    ):
        message = heard(answer, limit, **edns)
        assert message.flags & dns.flags.TC
        assert message.answer == []
        assert message.edns == (0 if edns else -1)
    assert len(heard(answer, len(answer.wire) + 11, use_edns=0).answer[0]) == 60
    assert len(heard(answer, len(answer.wire)).answer[0]) == 60


async def test_ttls_of_all_records_run_down_and_never_below_nothing() -> None:
    query = dns.message.make_query("www.example.com", "A")
    whole = reply(query, "www.example.com. 30 IN CNAME a.example.", "a.example. 90 IN A 192.0.2.1")
    answer = keep(question(), dns.message.from_wire(whole.to_wire()), now=100.0)
    assert answer is not None
    message = dns.message.from_wire(relay(query, answer, 140.0, 512))
    assert [records.ttl for records in message.answer] == [0, 50]
    assert answer.fresh_s == 30


async def test_who_asks_pays_for_the_size_of_the_answer(
    mock_clock: trio.testing.MockClock,
) -> None:
    """The clock stands: nothing comes back meanwhile."""

    def large(query: Message, transport: Transport) -> Answers:
        whole = reply(query, *(f"{query.question[0].name} 0 IN A 192.0.2.{n}" for n in range(60)))
        yield whole.to_wire(max_size=65535)

    async with upstream(large) as other:
        admission = Admission()
        asker = Forwarder(lambda: [other.server], admission)
        for number in range(40):
            await asker.ask(question(f"n{number}.example."), CALLER)
        admitted = sum(admission.admits(CALLER, trio.current_time()) for _ in range(2000))
        # 40 answers of a kilobyte are worth 16 packets each.
        assert PACKETS_PER_S - 40 * 18 < admitted < PACKETS_PER_S - 40 * 14
        assert admission.admits("another", trio.current_time())


async def test_an_answer_of_many_kilobytes_is_none() -> None:
    def endless(query: Message, transport: Transport) -> Answers:
        records = [f"www.example.com. 60 IN TXT {'x' * 200}{n}" for n in range(100)]
        whole = reply(query, *(records if transport == "tcp" else ()))
        whole.flags |= dns.flags.TC if transport == "udp" else 0
        yield whole.to_wire(max_size=65535)

    async with upstream(endless) as other:
        assert await forwarder(other).ask(question(kind="TXT"), CALLER) == NO_ANSWER


async def test_an_answer_over_tcp_to_another_question_is_none() -> None:
    def astray(query: Message, transport: Transport) -> Answers:
        whole = reply(query, "www.example.com. 60 IN A 192.0.2.1")
        if transport == "udp":
            whole.flags |= dns.flags.TC
        else:
            whole.id ^= 1
        yield whole.to_wire()

    async with upstream(astray) as other:
        assert await forwarder(other).ask(question(), CALLER) == NO_ANSWER
