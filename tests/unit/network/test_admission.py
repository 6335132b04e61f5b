from __future__ import annotations

from sandbox.network import admission
from sandbox.network.admission import Admission, Places, Turns


def admitted(gate: Admission, caller: object, packets: int, now: float) -> int:
    return sum(gate.admits(caller, now) for _ in range(packets))


def test_a_caller_has_1024_packets_a_second() -> None:
    gate = Admission()
    assert admitted(gate, "a", 5000, now=0) == 1024
    assert admitted(gate, "a", 5000, now=0.5) == 512
    assert admitted(gate, "a", 5000, now=100) == 1024


def test_one_who_asks_without_end_takes_nothing_from_another() -> None:
    gate = Admission()
    admitted(gate, "a", 5000, now=0)
    assert admitted(gate, "b", 1024, now=0) == 1024


def test_when_all_together_ask_too_much_those_who_ask_little_are_still_answered() -> None:
    gate = Admission(per_caller=100, total=200)
    for second in range(3):
        loud = [admitted(gate, caller, 1000, now=second) for caller in range(10)]
        assert gate.admits("quiet", now=second)
    # In the end those who never stop share what there is.
    assert sum(loud) <= 200 + 10 * 50
    assert max(loud) <= 100


def test_callers_that_have_gone_are_forgotten() -> None:
    gate = Admission()
    for caller in range(3 * admission.BUCKETS_MAX):
        assert gate.admits(caller, now=float(caller))
    assert len(gate._buckets) <= admission.BUCKETS_MAX


def test_places_are_bounded_for_each_and_for_all_and_come_back() -> None:
    places = Places(per_caller=2, total=3)
    assert [places.take("a"), places.take("a"), places.take("a")] == [True, True, False]
    assert [places.take("b"), places.take("b"), places.take("c")] == [True, False, False]
    places.leave("a")
    assert places.take("c")


def test_one_who_sends_much_does_not_make_another_wait() -> None:
    turns = Turns(per_caller=100, total_bytes=10_000)
    for number in range(50):
        turns.put("loud", b"%d" % number, "loud")
    turns.put("quiet", b"?", "quiet")
    assert [turns.take() for _ in range(3)] == [(b"0", "loud"), (b"?", "quiet"), (b"1", "loud")]


def test_what_waits_is_bounded_for_each_and_in_bytes() -> None:
    turns = Turns(per_caller=3, total_bytes=100)
    for caller in ("a", "b"):
        for _ in range(5):
            turns.put(caller, b"x" * 10, caller)
    turns.put("c", b"x" * 41, "c")  # 60 are there
    turns.put("d", b"x" * 40, "d")
    taken = []
    while turns:
        taken.append(turns.take()[1])
    assert taken == ["a", "b", "d", "a", "b", "a", "b"]
    turns.put("c", b"x" * 100, "c")
    assert turns.take() == (b"x" * 100, "c")
    assert not turns
