"""What EC2 refuses, in its words; a refused request leaves every row as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from sandbox.control.vpc import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.errors import Ec2Error
from tests.unit.control.vpc.refused_states import FULL, STATE
from tests.unit.control.vpc.refused_values import VALUES
from tests.unit.control.vpc.regions import Ec2
from tests.unit.control.vpc.world import World, make_world

CASES = [*STATE, *VALUES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Nothing in this file is written, so one is enough for all."""
    ec2 = Ec2(Path(tmp_path_factory.mktemp("ec2")) / "store.db")
    yield ec2.do(lambda draft: make_world(ec2, draft))
    trio.run(ec2.store.aclose)


@pytest.mark.parametrize(
    ("code", "text", "decide"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_it_is_refused_in_ec2s_words_and_nothing_is_written(
    world: World, code: str, text: str, decide: Callable[[Draft, World], object]
) -> None:
    found, said = world.ec2.refused(lambda draft: decide(draft, world))
    assert found == code
    assert text in said
    assert len(said) < 400


@pytest.mark.parametrize(("code", "limits", "decide"), FULL, ids=[case[0] for case in FULL])
def test_one_beyond_the_quota_is_refused_and_with_one_more_it_is_not(
    world: World,
    code: str,
    limits: dict[str, int],
    decide: Callable[[Draft, World], object],
) -> None:
    world.ec2.limit(**limits)
    try:
        assert world.ec2.refused(lambda draft: decide(draft, world))[0] == code
        world.ec2.limit(**{name: most + 1 for name, most in limits.items()})
        decide(Draft(world.ec2.region), world)
    finally:
        world.ec2.limit(**{name: getattr(Ec2.DEFAULTS, name) for name in limits})


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.name)
def test_no_text_is_spoiled_by_what_somebody_sent(refusal: Refusal) -> None:
    hostile = "{0}{x}\n\x1b[31m\ud800" + "a" * 10**5
    names = ("id", "vpc", "subnet", "group", "cidr", "value", "parameter", "why", "name")
    more = ("number", "address", "association", "table", "destination", "gateway", "pool")
    rest = ("other", "acl", "zone", "zones", "elastic", "protocol", "first", "last", "type")
    last = ("code", "count", "limit", "version", "expected", "max_entries", "rule", "description")
    error = refusal.error(**dict.fromkeys((*names, *more, *rest, *last), hostile))
    assert isinstance(error, Ec2Error)
    assert str(error).isprintable()
    assert len(str(error)) < 600
