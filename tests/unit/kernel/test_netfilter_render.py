"""A rule set as the text that iptables-restore reads."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.kernel.netfilter import Chain, Rule, RuleSet, Table, render


def rule_set(*rules: Rule) -> RuleSet:
    return RuleSet(tables=(Table("mangle", (Chain("FORWARD", rules, "DROP"),)),))


def test_a_table_names_its_chains_before_its_rules_and_ends_in_one_commit() -> None:
    rules = RuleSet(
        tables=(
            Table(
                "mangle",
                (
                    Chain("FORWARD", (("-i", "sb12ab+", "-g", "eg"),), "DROP"),
                    Chain("eg", (("-m", "mark", "--mark", "0x1/0xffff", "-j", "ACCEPT"),)),
                ),
            ),
            Table("nat", ()),
        )
    )
    assert render(rules).splitlines() == [
        "*mangle",
        ":FORWARD DROP [0:0]",
        ":eg - [0:0]",
        "-A FORWARD -i sb12ab+ -g eg",
        "-A eg -m mark --mark 0x1/0xffff -j ACCEPT",
        "COMMIT",
        "*nat",
        "COMMIT",
    ]


def test_equal_rule_sets_are_equal_data() -> None:
    assert rule_set(("-j", "DROP")) == rule_set(("-j", "DROP"))
    assert rule_set(("-j", "DROP")) != rule_set(("-j", "ACCEPT"))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"))), min_size=1))
def test_every_word_stays_one_word(words: list[str]) -> None:
    line = render(rule_set(tuple(words))).splitlines()[2]
    assert shlex.split(line, posix=True) == ["-A", "FORWARD", *words]


@pytest.mark.parametrize("word", ["a\nCOMMIT", "a\0b", "a\rb", "\x1b[0m"])
def test_a_word_that_could_end_the_line_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="not printable"):
        render(rule_set(("--comment", word)))


def test_a_chain_of_others_gets_and_loses_single_rules_in_the_same_transaction() -> None:
    to_new, to_old = ("-j", "NEW"), ("-j", "OLD")
    table = Table(
        "filter",
        (Chain("NEW"), Chain("OLD")),
        first=(("FORWARD", to_new), ("FORWARD", ("-j", "SECOND"))),
        without=(("FORWARD", to_old),),
        gone=("OLD",),
    )
    assert render(RuleSet(tables=(table,), keep_other_chains=True)).splitlines() == [
        "*filter",
        ":NEW - [0:0]",
        ":OLD - [0:0]",
        "-D FORWARD -j OLD",
        "-I FORWARD 1 -j SECOND",
        "-I FORWARD 1 -j NEW",
        "-X OLD",
        "COMMIT",
    ]
