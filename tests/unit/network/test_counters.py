"""Sums of what the kernel counts, over reloads that begin again at zero."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import NetworkError
from sandbox.kernel.netfilter import Counter
from sandbox.network.counters import (
    Reading,
    Totals,
    admitted_by,
    fold,
    forgotten,
    reading,
    restarted,
)

EGRESS = admitted_by("sg-1", is_egress=True)
LAYOUT = {"ge1": ("sgr-1", "sgr-2", "sgr-2"), "ae1": (EGRESS, None), "gi1": ()}


def packets(*counts: int) -> tuple[Counter, ...]:
    return tuple(Counter(count, 60 * count) for count in counts)


def test_rules_are_told_apart_by_their_place_and_those_of_one_subject_are_added() -> None:
    counted = {"ge1": packets(3, 4, 5), "ae1": packets(12, 12), "somebody-else": packets(7)}
    assert reading(counted, LAYOUT) == {
        "ge1": {"sgr-1": 3, "sgr-2": 9},
        "ae1": {"sg-1 egress": 12},
        "gi1": {},
    }


@pytest.mark.parametrize("counters", [packets(3, 4), packets(3, 4, 5, 6), ()])
def test_a_chain_that_is_not_ours_any_more_is_not_counted(counters: tuple[Counter, ...]) -> None:
    counted = {"ge1": counters, "ae1": packets(1, 1)}
    with pytest.raises(NetworkError, match=r"chain ge1 has . rules, not 3"):
        reading(counted, LAYOUT)


def folded(*readings: Reading) -> dict[str, int]:
    totals = Totals()
    for each in readings:
        totals = fold(totals, each)
    return dict(totals.flows)


def test_a_second_reading_adds_what_has_come_since_the_first() -> None:
    assert folded({"ge1": {"a": 3}}, {"ge1": {"a": 3}}, {"ge1": {"a": 10}}) == {"a": 10}


def test_a_counter_that_went_back_has_begun_again_and_its_neighbours_with_it() -> None:
    first, second = {"ge1": {"a": 5, "b": 1}}, {"ge1": {"a": 2, "b": 4}}
    assert folded(first, second) == {"a": 7, "b": 5}


def test_a_chain_with_other_rules_has_begun_again() -> None:
    assert folded({"ge1": {"a": 5}}, {"ge1": {"a": 6, "b": 1}}) == {"a": 11, "b": 1}
    assert folded({"ge1": {"a": 5, "b": 1}}, {"ge1": {"a": 6}}) == {"a": 11, "b": 1}


def test_a_replaced_chain_begins_again_also_where_the_counters_do_not_show_it() -> None:
    totals = fold(Totals(), {"ge1": {"a": 5}, "gi1": {"b": 5}})
    totals = fold(restarted(totals, ["ge1"]), {"ge1": {"a": 6}, "gi1": {"b": 6}})
    assert totals.flows == {"a": 11, "b": 6}


def test_one_chain_may_be_read_alone() -> None:
    assert folded({"ge1": {"a": 5}, "gi1": {"b": 5}}, {"gi1": {"b": 9}}, {"ge1": {"a": 6}}) == {
        "a": 6,
        "b": 9,
    }


def test_what_is_forgotten_has_no_sum_any_more() -> None:
    totals = fold(Totals(), {"ge1": {"a": 5, "b": 1}})
    assert forgotten(restarted(totals, ["ge1"]), ["a"]).flows == {"b": 1}


def test_totals_are_stored_and_come_back() -> None:
    totals = fold(Totals(), {"ge1": {"a": 5, EGRESS: 1}})
    assert msgspec.json.decode(msgspec.json.encode(totals), type=Totals) == totals


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("flow"), st.sampled_from("ab")),
        st.tuples(st.just("read"), st.just("")),
        st.tuples(st.sampled_from(["replace", "crash"]), st.just("")),
    ),
    max_size=40,
)


@given(EVENTS)
def test_no_flow_is_lost_or_counted_twice_if_the_chain_is_read_before_it_is_replaced(
    events: list[tuple[str, str]],
) -> None:
    """A crash loses that the chain was replaced. Then a flow may be missed, never counted twice."""
    kernel, happened, totals, crashed = {"a": 0, "b": 0}, {"a": 0, "b": 0}, Totals(), False
    for event, rule in (*events, ("read", "")):
        if event == "flow":
            kernel[rule] += 1
            happened[rule] += 1
            continue
        totals = fold(totals, {"ge1": dict(kernel)})
        if event in ("replace", "crash"):
            kernel = {"a": 0, "b": 0}
            crashed = crashed or event == "crash"
        if event == "replace":
            totals = restarted(totals, ["ge1"])
    for rule, count in happened.items():
        assert totals.flows[rule] <= count
        assert crashed or totals.flows[rule] == count
