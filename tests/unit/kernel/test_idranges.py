"""Ranges of ids are disjoint: from the host's users, from each other, from other agents'."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import KernelError
from sandbox.kernel.idranges import (
    SIZE,
    WINDOW,
    IdRanges,
    Owner,
    account_ids,
    next_free,
    subordinate_ids,
)

SMALL = range(0x70000000, 0x70000000 + 8 * SIZE, SIZE)
INSIDE = st.integers(SMALL.start - SIZE, SMALL.stop + SIZE)
RESERVED = st.lists(
    st.builds(lambda first, count: range(first, first + count), INSIDE, st.integers(0, 3 * SIZE)),
    max_size=6,
)
CLAIMED = st.sets(st.sampled_from(SMALL))


def overlaps(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


@given(RESERVED, CLAIMED, INSIDE)
def test_a_free_range_touches_nothing_that_is_taken(
    reserved: list[range], claimed: set[int], after: int
) -> None:
    first = next_free(SMALL, reserved, claimed, after)
    if first is not None:
        assert first in SMALL
        assert first not in claimed
        assert not any(overlaps(range(first, first + SIZE), other) for other in reserved)


@given(RESERVED, CLAIMED, INSIDE)
def test_none_is_free_only_when_each_is_taken(
    reserved: list[range], claimed: set[int], after: int
) -> None:
    if next_free(SMALL, reserved, claimed, after) is None:
        for first in SMALL:
            mine = range(first, first + SIZE)
            assert first in claimed or any(overlaps(mine, other) for other in reserved)


def test_ranges_are_used_in_turn() -> None:
    claimed: set[int] = set()
    last = SMALL.start - 1
    seen = []
    for _ in range(len(SMALL) + 2):
        first = next_free(SMALL, [], claimed, last)
        assert first is not None
        seen.append(first)
        last = first
    assert seen == [*SMALL, *SMALL[:2]]


def test_the_window_stays_below_the_ids_that_programs_take_for_negative() -> None:
    assert WINDOW[-1] + SIZE - 1 == 2**31 - 1
    assert len(WINDOW) == 4096


def test_accounts_and_subordinate_ranges_are_read_as_their_manuals_say() -> None:
    assert account_ids("root:x:0:0:root:/root:/bin/sh\n+nis\nbad:x:-1:\nu:x:1000:1000::/:\n") == [
        range(0, 1),
        range(1000, 1001),
    ]
    assert subordinate_ids("u:100000:65536\n# no\n1000:5:x\nv:200000:10\n") == [
        range(100000, 165536),
        range(200000, 200010),
    ]


@given(
    st.from_regex(r"[0-9a-f]{4}", fullmatch=True),
    st.integers(1, 2**22),
    st.integers(0, 2**63),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_an_owner_is_read_as_it_was_written(
    instance: str, pid: int, start_time: int, state_dir: str
) -> None:
    owner = Owner(instance, pid, start_time, state_dir)
    assert Owner.parse(str(owner)) == owner


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "state").mkdir()
    return tmp_path


def agent(host: Path, instance: str, state: str = "state") -> IdRanges:
    return IdRanges(instance, host / state, window=SMALL, claims=host / "claims", etc=host / "etc")


def test_two_agents_share_the_window_and_no_range_until_none_is_left(host: Path) -> None:
    one, two = agent(host, "aaaa"), agent(host, "bbbb")
    firsts = [each.claim() for _ in range(4) for each in (one, two)]
    assert sorted(firsts) == list(SMALL)
    with pytest.raises(KernelError, match="claim"):
        one.claim()
    two.release(firsts[1])
    assert one.claim() == firsts[1]


def test_the_hosts_users_and_their_subordinate_ranges_are_never_handed_out(host: Path) -> None:
    (host / "etc/passwd").write_text(f"odd:x:{SMALL[0] + 5}:0::/:\n")
    (host / "etc/subgid").write_text(f"odd:{SMALL[2] - 1}:2\n")
    ranges = agent(host, "aaaa")
    assert [ranges.claim() for _ in range(5)] == list(SMALL[3:])


def test_what_a_killed_agent_wrote_aside_goes_with_the_next_recovery(host: Path) -> None:
    agent(host, "aaaa").claim()
    (source,) = (host / "claims").glob(".aaaa.*")
    dead = source.with_name(".bbbb.4194303")
    dead.write_text("bbbb 4194303 1 /nowhere\n")
    agent(host, "cccc").recover({})
    assert source.exists() and not dead.exists()


def test_what_an_agent_had_half_written_when_it_was_killed_goes_too(host: Path) -> None:
    agent(host, "aaaa")
    torn = host / "claims" / ".bbbb.4194303.new"
    being_written = host / "claims" / f".cccc.{os.getpid()}.new"
    torn.touch()
    being_written.touch()
    agent(host, "dddd").recover({})
    assert being_written.exists() and not torn.exists()


def test_of_several_claims_there_are_all_or_none(host: Path) -> None:
    ranges = agent(host, "aaaa")
    with pytest.raises(KernelError, match="id range"):
        ranges.claim_many(len(SMALL) + 1)
    assert claimed(host) == set()
    assert ranges.claim_many(len(SMALL)) == list(SMALL)


def claimed(host: Path) -> set[int]:
    return {int(name) for name in os.listdir(host / "claims") if name.isdecimal()}


def test_after_a_restart_an_agent_owns_the_ranges_of_its_tasks_and_no_other(host: Path) -> None:
    before = agent(host, "aaaa")
    kept, lost = before.claim(), before.claim()
    other = agent(host, "bbbb").claim()

    after = agent(host, "aaaa")
    after.recover({kept})
    assert claimed(host) == {kept, other}
    assert lost in [after.claim() for _ in range(6)]


def test_a_range_that_is_only_in_the_store_is_claimed_again_after_a_reboot(host: Path) -> None:
    agent(host, "aaaa").recover({SMALL[3]})
    other = agent(host, "bbbb")
    assert [other.claim() for _ in range(7)] == [*SMALL[:3], *SMALL[4:]]


def test_a_task_whose_range_another_agent_has_is_an_error(host: Path) -> None:
    taken = agent(host, "bbbb").claim()
    with pytest.raises(KernelError, match="File exists"):
        agent(host, "aaaa").recover({taken})


def test_claims_of_a_dead_agent_stay_while_its_state_directory_is_there(host: Path) -> None:
    (host / "claims").mkdir()
    claim = host / "claims" / str(SMALL[0])
    claim.write_text(str(Owner("dead", 2**22 + 1, 1, str(host / "gone"))))
    garbage = host / "claims" / str(SMALL[1])
    garbage.write_text("who knows")

    (host / "gone").mkdir()
    agent(host, "aaaa").recover(())
    assert claim.exists()
    (host / "gone").rmdir()
    agent(host, "aaaa").recover(())
    assert not claim.exists()
    assert garbage.exists()


@pytest.mark.parametrize("taken_away", ["one", "all"])
def test_claims_that_were_taken_away_are_claimed_again_before_another(
    host: Path, taken_away: str
) -> None:
    one = agent(host, "aaaa")
    kept, held = one.claim_many(2)
    one.recover([kept, held])
    if taken_away == "all":
        shutil.rmtree(host / "claims")
    else:
        (host / "claims" / str(kept)).unlink()
    given_back = one.claim()
    assert len({kept, held, given_back}) == 3
    other = agent(host, "bbbb")
    assert {kept, held, given_back}.isdisjoint(other.claim_many(2))
    one.release(given_back)
    shutil.rmtree(host / "claims")
    assert one.claim() != given_back
    assert not (host / "claims" / str(given_back)).exists()


def test_a_window_that_would_straddle_others_ranges_is_refused(host: Path) -> None:
    with pytest.raises(ValueError, match="overlap"):
        IdRanges("aaaa", host, window=range(5, 5 + SIZE, SIZE), claims=host / "claims")
