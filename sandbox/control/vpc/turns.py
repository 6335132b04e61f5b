"""Numbers that are given in turn, so that one that came back rests as long as possible.

What carried a freed address or index may still be about: a tracked connection, a neighbour's cache,
a name that somebody resolved. So numbers are given upwards from a cursor, round and round, and the
last `RESTING_MOST` that came back are passed over as long as there is another. A freed number comes
back after every other free one, or after `RESTING_MOST` more were freed. What is stored stays small
whatever the range: who has a number is known elsewhere, by a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import msgspec

from sandbox.store.vpc_rows import Turn

RESTING_MOST = 256


def take(turn: Turn, numbers: range, is_taken: Callable[[int], bool]) -> tuple[int, Turn] | None:
    """The next number and the turn after it; None when all are taken."""
    resting = frozenset(turn.resting)
    start = turn.cursor if turn.cursor in numbers else numbers.start
    for number in chain(range(start, numbers.stop), range(numbers.start, start)):
        if number not in resting and not is_taken(number):
            return number, msgspec.structs.replace(turn, cursor=number + 1)
    for number in turn.resting:
        if number in numbers and not is_taken(number):
            return number, without(turn, number)
    return None


def without(turn: Turn, number: int) -> Turn:
    """The turn after somebody was given this number because he asked for it."""
    resting = tuple(other for other in turn.resting if other != number)
    return msgspec.structs.replace(turn, resting=resting)


def give_back(turn: Turn, number: int) -> Turn:
    """Behind all others; giving back twice is giving back once."""
    resting = (*without(turn, number).resting, number)[-RESTING_MOST:]
    return msgspec.structs.replace(turn, resting=resting)
