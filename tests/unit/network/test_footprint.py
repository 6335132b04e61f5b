"""Which rules the host gets, decided from what it has."""

from __future__ import annotations

from ipaddress import IPv4Network

from sandbox.kernel.netfilter import Table
from sandbox.network import footprint
from sandbox.network.footprint import PRIVATE, Footprint, Saved

OURS = Footprint(instance="7e57", public_pool=IPv4Network("198.18.0.0/15"))
EMPTY: Saved = {"filter": (":INPUT ACCEPT", ":FORWARD ACCEPT", ":OUTPUT ACCEPT")}
DOCKER: Saved = {
    "filter": (":FORWARD DROP", ":DOCKER -", "-A FORWARD -j DOCKER"),
    "nat": (":POSTROUTING ACCEPT", "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"),
}
INSTALLED: Saved = {
    "filter": (
        ":FORWARD ACCEPT",
        ":SB-7e57-FWD -",
        ":SB-7e57-IN -",
        "-A INPUT -j SB-7e57-IN",
        "-A FORWARD -j SB-7e57-FWD",
        "-A FORWARD -j SB-7e57-FWD",
        "-A SB-7e57-IN -i sb7e57u+ -j DROP",
    ),
}


def tables(saved: Saved) -> dict[str, Table]:
    return {table.name: table for table in footprint.installing(OURS, saved).tables}


def test_private_destinations_are_dropped_before_anything_new_is_accepted() -> None:
    answers, *rules = OURS.chain("FWD").rules
    assert "RELATED,ESTABLISHED" in answers
    assert [rule[1] for rule in rules[: len(PRIVATE)]] == list(PRIVATE)
    assert {rule[-1] for rule in rules[: len(PRIVATE)]} == {"DROP"}
    assert rules[len(PRIVATE)] == ("-i", "sb7e57u+", "-j", "ACCEPT")


def test_an_exception_comes_before_the_drops() -> None:
    allowed = Footprint(
        instance="7e57", public_pool=OURS.public_pool, private_destinations=("10.1.0.0/16",)
    )
    assert allowed.chain("FWD").rules[1] == ("-d", "10.1.0.0/16", "-i", "sb7e57u+", "-j", "ACCEPT")


def test_a_jump_is_put_first_where_there_is_none_and_nowhere_twice() -> None:
    fresh = tables(DOCKER)
    assert fresh["filter"].first == (
        ("FORWARD", ("-j", "SB-7e57-FWD")),
        ("INPUT", ("-j", "SB-7e57-IN")),
    )
    assert fresh["nat"].first == (("POSTROUTING", ("-j", "SB-7e57-POST")),)
    again = tables(INSTALLED)
    assert again["filter"].first == ()
    assert [chain.name for chain in again["filter"].chains] == ["SB-7e57-FWD", "SB-7e57-IN"]


def test_a_jump_of_another_agent_is_not_ours() -> None:
    other = {"filter": ("-A FORWARD -j SB-0000-FWD", "-A INPUT -j SB-7e57-INX")}
    assert len(tables(other)["filter"].first) == 2


def test_removal_takes_every_copy_of_a_jump_and_the_chains_that_are_there() -> None:
    rules = footprint.removing(OURS, INSTALLED)
    assert rules is not None
    by_name = {table.name: table for table in rules.tables}
    assert by_name["filter"].without.count(("FORWARD", ("-j", "SB-7e57-FWD"))) == 2
    assert by_name["filter"].gone == ("SB-7e57-FWD", "SB-7e57-IN")
    assert by_name["nat"].gone == ()
    assert footprint.removing(OURS, DOCKER) is None


def test_the_backend_is_the_one_that_has_the_hosts_rules() -> None:
    assert footprint.holding({"nft": EMPTY, "legacy": {}}, "7e57") == ("nft",)
    assert footprint.holding({"nft": EMPTY, "legacy": DOCKER}, "7e57") == ("legacy",)
    assert footprint.holding({"nft": DOCKER, "legacy": DOCKER}, "7e57") == ("nft", "legacy")
    only_ours = {"filter": tuple(line for line in INSTALLED["filter"] if "SB-" in line)}
    assert footprint.holding({"nft": only_ours, "legacy": DOCKER}, "7e57") == ("legacy",)
    assert footprint.holding({"nft": EMPTY, "legacy": {"filter": (":INPUT DROP",)}}, "7e57") == (
        "legacy",
    )


def test_the_backend_is_one_whose_programs_are_there() -> None:
    assert footprint.holding({"legacy": {}}, "7e57") == ("legacy",)


def test_the_number_of_rules_is_the_same_for_any_number_of_vpcs() -> None:
    """There is nothing about a VPC that they could be made from; this is how many there are."""
    assert sum(len(OURS.chain(hook).rules) for hook, _, _ in footprint.HOOKS) == len(PRIVATE) + 5


def test_what_is_ours_is_told_from_what_is_like_it() -> None:
    lines = footprint.own_lines({**INSTALLED, "nat": ("-A POSTROUTING -j SB-0000-POST",)}, "7e57")
    assert len(lines) == 3
    assert all("SB-7e57-" in line for line in lines)
