"""The interface description says what the agent does, no more and no less."""

from __future__ import annotations

import re

from sandbox.api import introspection
from tests.unit.api.interface import interface


def test_the_description_is_that_of_the_calls() -> None:
    assert introspection.description("io.sandbox") == interface()


def test_every_name_is_one_that_varlink_allows() -> None:
    for name in introspection.INTERFACES:
        text = re.sub(r"#.*", "", introspection.description(name))
        for kind, declared in re.findall(r"^(type|method|error) (\S+?)[ (]", text, re.MULTILINE):
            assert re.fullmatch("[A-Z][A-Za-z0-9]*", declared), (kind, declared)
        for member in re.findall(r"(\w+):", text):
            assert re.fullmatch("[A-Za-z](_?[A-Za-z0-9])*", member), member
        types = set(re.findall(r"^type (\w+)", text, re.MULTILINE))
        used = set(re.findall(r"[:\]?]\s*([A-Z]\w*)", text))
        assert used <= types
