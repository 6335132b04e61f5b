"""The public pool that an agent may be given, and the quotas."""

from __future__ import annotations

import pytest

from sandbox.control.vpc.limits import Limits, limits
from sandbox.control.vpc.region import PUBLIC_POOL, check_public_pool
from sandbox.errors import ConfigError


@pytest.mark.parametrize(
    ("pool", "routes"),
    [
        (PUBLIC_POOL, []),
        (PUBLIC_POOL, ["0.0.0.0/0", "10.0.0.0/8", "192.168.1.7/24"]),
        ("203.0.112.0/23", ["203.0.114.0/24"]),
    ],
)
def test_a_pool_that_is_free_is_taken(pool: str, routes: list[str]) -> None:
    assert check_public_pool(pool, routes) == pool


@pytest.mark.parametrize(
    ("pool", "routes", "text"),
    [
        ("", [], "not an IPv4 network"),
        ("198.18.0.1/15", [], "not an IPv4 network"),
        ("2001:db8::/32", [], "not an IPv4 network"),
        ("198.18.0.0/24", [], "too small"),
        ("127.0.0.0/8", [], "cannot be routed"),
        ("224.0.0.0/8", [], "cannot be routed"),
        ("0.0.0.0/8", [], "cannot be routed"),
        (PUBLIC_POOL, ["198.19.255.0/24"], "overlaps the route of this host to 198.19.255.0/24"),
        (PUBLIC_POOL, ["198.0.0.0/8"], "choose another"),
    ],
)
def test_another_is_refused_by_the_name_of_its_key(pool: str, routes: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=r"^public_pool: ") as caught:
        check_public_pool(pool, routes)
    assert text in str(caught.value)


def test_the_quotas_are_those_of_the_era() -> None:
    assert (limits().rules_per_group, limits().groups, limits().interfaces) == (60, 2500, 5000)
    then = limits("2017")
    assert (then.rules_per_group, then.groups_per_vpc, then.interfaces) == (50, 500, 350)


def test_more_rules_than_an_interface_can_have_are_no_quota() -> None:
    Limits(groups_per_interface=16, rules_per_group=62)
    with pytest.raises(ValueError, match="1008 on an interface, at most 1000"):
        Limits(groups_per_interface=16, rules_per_group=63)
