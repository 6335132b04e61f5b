"""Flow log records: AWS's format, and what becomes a record of what the kernel counts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sandbox.kernel.flows import Counters, Flow, FlowTuple
from sandbox.kernel.packetlog import LoggedPacket
from sandbox.model.vpc import Network
from sandbox.network import flowlog
from sandbox.network.drops import DROP_EGRESS, DROP_INGRESS, drop_chains
from sandbox.network.flowlog import IPS_DYING, Aggregator, FlowRecord
from tests.networks import OUTSIDE, group, interface, nat_gateway, network, subnet

A, B, PUBLIC_A, PUBLIC_B = "10.0.0.4", "10.0.1.4", "198.18.0.4", "198.18.0.20"
NAT_PRIVATE, NAT_PUBLIC = "10.0.1.14", "198.19.255.1"
ACCOUNT = "123456789012"
T0 = 1_700_000_000
NS = 10**9


def place(*more: Any, without_b: bool = False) -> Network:
    enis = [interface("eni-a", "subnet-a", A, "sg-1", public_ip=PUBLIC_A)]
    if not without_b:
        enis.append(interface("eni-b", "subnet-b", B, "sg-1", public_ip=PUBLIC_B))
    return network(
        subnet("subnet-a", "10.0.0.0/28"),
        subnet("subnet-b", "10.0.1.0/28"),
        group("sg-1"),
        *enis,
        *more,
    )


def flow(
    source: str = A,
    destination: str = B,
    there: tuple[int, int] = (3, 180),
    back: tuple[int, int] = (2, 120),
    *,
    protocol: int = 6,
    source_here: str | None = None,
    destination_here: str | None = None,
    started: float = T0 + 1,
    stopped: float | None = None,
    **members: Any,
) -> Flow:
    """`there` and `back` are packets and bytes."""
    ports = {"source_port": 40000, "destination_port": 80} if protocol == 6 else {"icmp_id": 7}
    original = FlowTuple(source=source, destination=destination, protocol=protocol, **ports)
    reply = replace(
        original,
        source=destination_here or destination,
        destination=source_here or source,
        source_port=original.destination_port,
        destination_port=original.source_port,
    )
    made = Flow(
        original=original,
        reply=reply,
        original_counters=Counters(*there),
        reply_counters=Counters(*back),
        started_at_ns=int(started * NS),
        stopped_at_ns=None if stopped is None else int(stopped * NS),
        id=1,
    )
    return replace(made, **members)


@pytest.fixture
def aggregator() -> Aggregator:
    return Aggregator(ACCOUNT, place(), T0)


def lines(aggregator: Aggregator, *flows: Flow, now: float = T0 + 60) -> list[str]:
    """Of the interval, without what all of them have in common."""
    found = [record.line() for record in aggregator.close(flows, now)]
    assert all(line.startswith(f"2 {ACCOUNT} ") for line in found)
    return [line.removeprefix(f"2 {ACCOUNT} ") for line in found]


# The format -------------------------------------------------------------------------------------

# VPC User Guide, "Flow log record examples"
EXAMPLES = [
    "2 123456789010 eni-1235b8ca123456789 172.31.16.139 172.31.16.21 20641 22 6 20 4249 "
    "1418530010 1418530070 ACCEPT OK",
    "2 123456789010 eni-1235b8ca123456789 172.31.9.69 172.31.9.12 49761 3389 6 20 4249 "
    "1418530010 1418530070 REJECT OK",
    "2 123456789010 eni-1235b8ca123456789 - - - - - - - 1431280876 1431280934 - NODATA",
    "2 123456789010 eni-11111111aaaaaaaaa - - - - - - - 1431280876 1431280934 - SKIPDATA",
    "2 123456789010 eni-1235b8ca123456789 203.0.113.12 172.31.16.139 0 0 1 4 336 "
    "1432917027 1432917142 ACCEPT OK",
    "2 123456789010 eni-1235b8ca123456789 2001:db8:1234:a100:8d6e:3477:df66:f105 "
    "2001:db8:1234:a102:3304:8879:34cf:4071 34892 22 6 54 8855 1477913708 1477913820 ACCEPT OK",
]


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_of_the_guide_are_read_and_written_the_same(line: str) -> None:
    assert FlowRecord.parse(line).line() == line


def test_as_json_a_record_has_the_names_of_aws() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(FlowRecord.parse(EXAMPLES[2])))
    assert encoded["version"] == 2
    assert encoded["interface-id"] == "eni-1235b8ca123456789"
    assert encoded["log-status"] == "NODATA"
    assert encoded["srcaddr"] is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "2",
        EXAMPLES[0].replace("2 ", "3 ", 1),
        EXAMPLES[0] + " x",
        EXAMPLES[0].replace("22", "x"),
    ],
)
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a flow log record|Expected"):
        FlowRecord.parse(line)


@given(st.text(max_size=200))
def test_any_text_is_a_record_or_refused(text: str) -> None:
    try:
        assert FlowRecord.parse(text).line()
    except ValueError as error:
        assert str(error)


# Connections ------------------------------------------------------------------------------------


def test_a_connection_between_two_tasks_is_two_records_at_each(aggregator: Aggregator) -> None:
    assert lines(aggregator, flow()) == [
        f"eni-a {A} {B} 40000 80 6 3 180 {T0 + 1} {T0 + 60} ACCEPT OK",
        f"eni-a {B} {A} 80 40000 6 2 120 {T0 + 1} {T0 + 60} ACCEPT OK",
        f"eni-b {A} {B} 40000 80 6 3 180 {T0 + 1} {T0 + 60} ACCEPT OK",
        f"eni-b {B} {A} 80 40000 6 2 120 {T0 + 1} {T0 + 60} ACCEPT OK",
    ]


def of(interface: str, found: list[str]) -> list[str]:
    return [line for line in found if line.startswith(interface)]


def test_each_interval_has_what_passed_in_it(aggregator: Aggregator) -> None:
    lines(aggregator, flow(there=(3, 180), back=(2, 120)))
    second = lines(aggregator, flow(there=(10, 1000), back=(2, 120)), now=T0 + 120)
    assert of("eni-a", second) == [f"eni-a {A} {B} 40000 80 6 7 820 {T0 + 60} {T0 + 120} ACCEPT OK"]
    third = lines(aggregator, flow(there=(10, 1000), back=(2, 120)), now=T0 + 180)
    assert third == [f"eni-{x} - - - - - - - {T0 + 120} {T0 + 180} - NODATA" for x in "ab"]
    aggregator.ended(flow(there=(11, 1100), back=(3, 180), stopped=T0 + 200), T0 + 59)
    assert of("eni-b", lines(aggregator, now=T0 + 240)) == [
        f"eni-b {A} {B} 40000 80 6 1 100 {T0 + 180} {T0 + 200} ACCEPT OK",
        f"eni-b {B} {A} 80 40000 6 1 60 {T0 + 180} {T0 + 200} ACCEPT OK",
    ]


def test_connections_with_the_same_ends_in_one_interval_are_one_record(
    aggregator: Aggregator,
) -> None:
    aggregator.ended(flow(stopped=T0 + 5), T0 + 59)
    aggregator.ended(flow(started=T0 + 6, stopped=T0 + 9, id=2), T0 + 59)
    found = lines(aggregator, flow(there=(1, 60), back=(0, 0), started=T0 + 10, id=3))
    assert of("eni-a", found) == [
        f"eni-a {A} {B} 40000 80 6 7 420 {T0 + 1} {T0 + 60} ACCEPT OK",
        f"eni-a {B} {A} 80 40000 6 4 240 {T0 + 1} {T0 + 9} ACCEPT OK",
    ]


def test_an_id_that_two_connections_have_is_no_baseline_for_the_other(
    aggregator: Aggregator,
) -> None:
    lines(aggregator, flow(there=(5, 500)))
    found = lines(aggregator, flow(), flow(protocol=1, there=(1, 84), back=(1, 84)), now=T0 + 120)
    assert of(f"eni-a {A} {B} 0 0 1", found)[0].split()[6:8] == ["1", "84"]


def test_a_connection_that_is_being_deleted_is_counted_by_its_event_alone(
    aggregator: Aggregator,
) -> None:
    aggregator.ended(flow(stopped=T0 + 5), T0 + 59)
    found = lines(aggregator, flow(status=IPS_DYING))
    assert [line.split()[6] for line in of("eni-a", found)] == ["3", "2"]
    assert of("eni-a", lines(aggregator, now=T0 + 120)) == [
        f"eni-a - - - - - - - {T0 + 60} {T0 + 120} - NODATA"
    ]


def test_a_task_with_a_public_address_appears_with_its_private_one(aggregator: Aggregator) -> None:
    out = flow(A, OUTSIDE, source_here=PUBLIC_A)
    coming = flow(OUTSIDE, PUBLIC_B, destination_here=B, id=2)
    ends = [tuple(line.split()[:3]) for line in lines(aggregator, out, coming)]
    assert ends == [
        *[("eni-a", A, OUTSIDE), ("eni-a", OUTSIDE, A)],
        *[("eni-b", OUTSIDE, B), ("eni-b", B, OUTSIDE)],
    ]


def test_a_nat_gateway_has_both_sides_at_its_interface() -> None:
    """As in the guide's example of traffic through one."""
    nat = nat_gateway("nat-1", "subnet-b", NAT_PRIVATE, NAT_PUBLIC)
    aggregator = Aggregator(ACCOUNT, place(*nat), T0)
    one = flow(A, OUTSIDE, source_here=NAT_PUBLIC)
    one = replace(one, reply=replace(one.reply, destination_port=1024))
    found = [line.split()[:5] for line in lines(aggregator, one) if line.startswith("eni-nat")]
    assert found == [
        ["eni-nat-1", A, NAT_PRIVATE, "40000", "80"],
        ["eni-nat-1", NAT_PRIVATE, A, "80", "40000"],
        ["eni-nat-1", NAT_PRIVATE, OUTSIDE, "1024", "80"],
        ["eni-nat-1", OUTSIDE, NAT_PRIVATE, "80", "1024"],
    ]


@pytest.mark.parametrize(
    "address", ["169.254.169.253", "169.254.170.2", "169.254.169.254", "10.0.0.2", "10.0.0.1"]
)
def test_the_platforms_own_services_are_not_recorded(aggregator: Aggregator, address: str) -> None:
    aggregator.ended(flow(A, address, stopped=T0 + 5), T0 + 59)
    aggregator.refused(logged(f"{DROP_EGRESS} new", A, address), T0 + 5)
    found = lines(aggregator, flow(A, address, id=2))
    assert {line.split()[-1] for line in found} == {"NODATA"}


# What was refused -------------------------------------------------------------------------------


def logged(prefix: str, source: str = A, destination: str = B, length: int = 60) -> LoggedPacket:
    return LoggedPacket(prefix, source, destination, 6, 40000, 80, length, None)


def test_what_egress_refuses_never_left(aggregator: Aggregator) -> None:
    for at in (5.25, 7.5):
        aggregator.refused(logged(f"{DROP_EGRESS} new"), T0 + at)
    assert lines(aggregator) == [
        f"eni-a {A} {B} 40000 80 6 2 120 {T0 + 5} {T0 + 8} REJECT OK",
        f"eni-b - - - - - - - {T0} {T0 + 60} - NODATA",
    ]


def test_what_ingress_refuses_was_accepted_where_it_came_from(aggregator: Aggregator) -> None:
    aggregator.refused(logged(f"{DROP_INGRESS} new"), T0 + 5)
    aggregator.refused(logged(f"{DROP_INGRESS} new", OUTSIDE), T0 + 6)
    assert lines(aggregator) == [
        f"eni-b {A} {B} 40000 80 6 1 60 {T0 + 5} {T0 + 5} REJECT OK",
        f"eni-a {A} {B} 40000 80 6 1 60 {T0 + 5} {T0 + 5} ACCEPT OK",
        f"eni-b {OUTSIDE} {B} 40000 80 6 1 60 {T0 + 6} {T0 + 6} REJECT OK",
    ]


def test_an_answer_that_an_acl_refuses_is_rejected_and_not_accepted(aggregator: Aggregator) -> None:
    """The guide's example: the ping is accepted, its answer is rejected."""
    ping = flow(there=(4, 336), back=(4, 336), protocol=1)
    for _ in range(4):
        answer = LoggedPacket(f"{DROP_EGRESS} established", B, A, 1, 0, 0, 84, None)
        aggregator.refused(answer, T0 + 5)
    found = lines(aggregator, ping)
    assert [line.split()[:8] + line.split()[10:11] for line in found] == [
        ["eni-a", A, B, "0", "0", "1", "4", "336", "ACCEPT"],
        ["eni-b", A, B, "0", "0", "1", "4", "336", "ACCEPT"],
        ["eni-b", B, A, "0", "0", "1", "4", "336", "REJECT"],
    ]


def test_an_answer_that_is_refused_at_its_destination_had_left(aggregator: Aggregator) -> None:
    refused = LoggedPacket(f"{DROP_INGRESS} established", B, A, 6, 80, 40000, 60, None)
    aggregator.refused(refused, T0 + 5)
    found = lines(aggregator, flow(back=(3, 1060)))
    answers = [line.split() for line in found if line.split()[1] == B]
    assert [(each[0], *each[6:8], each[10]) for each in answers] == [
        ("eni-a", "2", "1000", "ACCEPT"),
        ("eni-b", "3", "1060", "ACCEPT"),
        ("eni-a", "1", "60", "REJECT"),
    ]


# What was lost ----------------------------------------------------------------------------------


def statuses(found: list[str]) -> set[tuple[str, str]]:
    return {(line.split()[0], line.split()[-1]) for line in found}


def test_refusals_beyond_the_rate_are_told(aggregator: Aggregator) -> None:
    aggregator.refused(logged(f"{DROP_EGRESS}-more"), T0 + 5)
    assert statuses(lines(aggregator)) == {("eni-a", "SKIPDATA"), ("eni-b", "NODATA")}
    assert statuses(lines(aggregator, now=T0 + 120)) == {("eni-a", "NODATA"), ("eni-b", "NODATA")}


def test_lost_events_are_told_beside_what_is_known(aggregator: Aggregator) -> None:
    aggregator.lost()
    found = lines(aggregator, flow())
    assert statuses(found) == {(f"eni-{x}", status) for x in "ab" for status in ("OK", "SKIPDATA")}


def test_of_a_connection_from_before_the_agent_only_what_passes_later_is_recorded() -> None:
    old = flow(started=T0 - 100, there=(500, 50_000))
    aggregator = Aggregator(ACCOUNT, place(), T0, [old])
    later = replace(old, original_counters=Counters(501, 50_060))
    found = lines(aggregator, later)
    assert of("eni-a", found) == [
        f"eni-a {A} {B} 40000 80 6 1 60 {T0} {T0 + 60} ACCEPT OK",
        f"eni-a - - - - - - - {T0} {T0 + 60} - SKIPDATA",
    ]
    assert statuses(lines(aggregator, later, now=T0 + 120)) == {
        *[("eni-a", "NODATA"), ("eni-b", "NODATA")]
    }


def test_without_time_stamps_a_record_is_of_the_whole_interval(aggregator: Aggregator) -> None:
    timeless = replace(flow(back=(0, 0)), started_at_ns=None)
    aggregator.ended(timeless, T0 + 30)
    assert of("eni-a", lines(aggregator)) == [
        f"eni-a {A} {B} 40000 80 6 3 180 {T0} {T0 + 30} ACCEPT OK"
    ]


def test_a_connection_that_vanishes_without_an_event_is_told_one_interval_later(
    aggregator: Aggregator,
) -> None:
    lines(aggregator, flow())
    assert statuses(lines(aggregator, now=T0 + 120)) == {("eni-a", "NODATA"), ("eni-b", "NODATA")}
    late = lines(aggregator, now=T0 + 180)
    assert statuses(late) == {("eni-a", "SKIPDATA"), ("eni-b", "SKIPDATA")}
    assert statuses(lines(aggregator, now=T0 + 240)) == {("eni-a", "NODATA"), ("eni-b", "NODATA")}


def test_an_event_that_comes_after_the_table_was_read_is_not_too_late(
    aggregator: Aggregator,
) -> None:
    lines(aggregator, flow())
    lines(aggregator, now=T0 + 120)
    aggregator.ended(flow(there=(4, 240), stopped=T0 + 119), T0 + 59)
    found = lines(aggregator, now=T0 + 180)
    assert statuses(found) == {("eni-a", "OK"), ("eni-b", "OK")}
    assert all(int(line.split()[8]) <= int(line.split()[9]) for line in found)


def test_without_counters_nothing_is_claimed(aggregator: Aggregator) -> None:
    uncounted = flow(original_counters=None, reply_counters=None)
    assert statuses(lines(aggregator, uncounted)) == {("eni-a", "SKIPDATA"), ("eni-b", "SKIPDATA")}


def test_beyond_the_bounds_records_are_skipped_and_memory_is_not(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowlog, "FLOWS_MAX", 1)
    monkeypatch.setattr(flowlog, "PENDING_MAX", 1)
    for port in (1, 2, 3):
        one = LoggedPacket(f"{DROP_EGRESS} new", A, B, 6, port, 80, 60, None)
        aggregator.refused(one, T0 + 1)
    found = lines(aggregator, flow(), flow(B, A, id=2))
    assert sum(" REJECT " in line for line in found) == 1
    assert statuses(found) >= {("eni-a", "SKIPDATA"), ("eni-b", "SKIPDATA")}
    assert sum(" ACCEPT " in line for line in found) == 4
    # What was not remembered is not taken for something new.
    more = lines(aggregator, flow(B, A, there=(9, 900), id=2), now=T0 + 120)
    assert statuses(more) == {("eni-a", "SKIPDATA"), ("eni-b", "SKIPDATA")}


# Interfaces -------------------------------------------------------------------------------------


def test_the_last_flows_of_an_interface_are_recorded_after_it_has_gone(
    aggregator: Aggregator,
) -> None:
    aggregator.ended(flow(stopped=T0 + 5), T0 + 59)
    aggregator.change(place(without_b=True))
    found = lines(aggregator)
    assert {line.split()[0] for line in found} == {"eni-a", "eni-b"}
    assert of("eni-b", lines(aggregator, now=T0 + 120)) == []


# Rules ------------------------------------------------------------------------------------------


def test_without_nflog_packets_are_dropped_all_the_same() -> None:
    chains = {chain.name: chain.rules for chain in drop_chains(None)}
    assert chains == {DROP_EGRESS: (("-j", "DROP"),), DROP_INGRESS: (("-j", "DROP"),)}


def test_what_another_rule_logged_is_not_recorded(aggregator: Aggregator) -> None:
    for prefix in ("", "drop-egress", "drop-egress NEW", "mine"):
        aggregator.refused(logged(prefix), T0 + 5)
    assert statuses(lines(aggregator)) == {("eni-a", "NODATA"), ("eni-b", "NODATA")}


def test_every_chain_ends_with_a_drop() -> None:
    assert all(chain.rules[-1] == ("-j", "DROP") for chain in drop_chains(7))


# A law ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_all_that_a_connection_counted_is_recorded_once(
    steps: list[tuple[int, int]],
) -> None:
    """However its life falls into intervals."""
    aggregator = Aggregator(ACCOUNT, place(), T0)
    there = back = 0
    found: list[FlowRecord] = []
    now = T0 + 60
    for sent, answered in steps:
        there, back = there + sent, back + answered
        now += 60
        found += aggregator.close([flow(there=(there, 10 * there), back=(back, 10 * back))], now)
    aggregator.ended(
        flow(there=(there + 1, 10 * there + 10), back=(back, 10 * back), stopped=now), T0 + 59
    )
    found += aggregator.close([], now + 60)
    for name in ("eni-a", "eni-b"):
        for source, count in ((A, there + 1), (B, back)):
            ours = [one for one in found if one.interface_id == name and one.srcaddr == source]
            assert sum(one.packets or 0 for one in ours) == count
            assert sum(one.bytes or 0 for one in ours) == 10 * count
            assert all(one.action == "ACCEPT" for one in ours)
