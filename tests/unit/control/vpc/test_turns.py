"""What was given back is given again as late as can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.control.vpc import turns
from sandbox.control.vpc.turns import RESTING_MOST
from sandbox.store.vpc_rows import Turn


def take(turn: Turn, numbers: range, taken: set[int]) -> tuple[int, Turn]:
    found = turns.take(turn, numbers, taken.__contains__)
    assert found is not None
    return found


def test_numbers_are_given_upwards() -> None:
    turn = Turn()
    given: list[int] = []
    for _ in range(4):
        number, turn = take(turn, range(4, 8), set(given))
        given.append(number)
    assert given == [4, 5, 6, 7]
    assert turns.take(turn, range(4, 8), set(given).__contains__) is None


def test_one_that_was_freed_just_before_the_cursor_comes_to_it_is_passed_over() -> None:
    turn = turns.give_back(Turn(cursor=5), 5)
    given: set[int] = set()
    for _ in range(6):
        number, turn = take(turn, range(4, 11), given)
        given.add(number)
        assert number != 5
    assert take(turn, range(4, 11), given)[0] == 5


@given(st.lists(st.booleans(), max_size=60), st.integers(2, 12))
def test_a_small_range_is_a_queue(frees: list[bool], size: int) -> None:
    turn, free, held = Turn(), list(range(size)), list[int]()
    for wants_to_free in frees:
        if wants_to_free and held:
            number = held.pop(len(held) // 2)
            free.append(number)
            turn = turns.give_back(turn, number)
        elif free:
            number, turn = take(turn, range(size), set(held))
            assert number == free.pop(0)
            held.append(number)
        else:
            assert turns.take(turn, range(size), set(held).__contains__) is None


@pytest.mark.parametrize("start", [0, 700, 2000])
def test_in_a_large_range_as_many_are_freed_before_it_comes_back(start: int) -> None:
    numbers, taken = range(3000), set(range(3000)) - {start}
    turn = turns.give_back(Turn(cursor=start), start)
    for other in range(2001, 2001 + RESTING_MOST - 1):
        taken.remove(other)
        turn = turns.give_back(turn, other)
        assert len(turn.resting) <= RESTING_MOST
    assert take(turn, numbers, taken)[0] == start  # all others are taken or rest less long
    taken.remove(2900)
    turn = turns.give_back(turn, 2900)
    assert take(turn, numbers, taken)[0] == start


def test_giving_back_twice_is_giving_back_once() -> None:
    turn = turns.give_back(turns.give_back(Turn(), 3), 4)
    assert turns.give_back(turn, 4) == turn
    assert turns.give_back(turn, 3).resting == (4, 3)


def test_who_asks_for_a_number_that_rests_has_it() -> None:
    turn = turns.give_back(turns.give_back(Turn(), 3), 4)
    assert turns.without(turn, 3).resting == (4,)
    assert turns.without(turn, 9) == turn
