"""The documents that promise something promise nothing that no test or benchmark proves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("SPECIFICATION.md", "SECURITY.md", "docs/isolation.md")
PROOF = re.compile(r"`((?:tests|scripts)/[^`:]+)(?:::(\w+))?`")


def promises(document: str) -> list[str]:
    """The bullets of the file, each with the lines that continue it."""
    text = (ROOT / document).read_text()
    return [" ".join(match.split()) for match in re.findall(r"^- (.*(?:\n  .*)*)", text, re.M)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_promise_names_its_proof(document: str) -> None:
    assert promises(document)
    assert [promise for promise in promises(document) if not PROOF.search(promise)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_named_proof_exists(document: str) -> None:
    missing = [
        f"{file}::{name}"
        for promise in promises(document)
        for file, name in PROOF.findall(promise)
        if not (ROOT / file).exists() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]
    assert missing == []
