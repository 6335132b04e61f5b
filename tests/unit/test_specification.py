"""SPECIFICATION.md promises nothing that no test or benchmark proves."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROOF = re.compile(r"`((?:tests|scripts)/[^`:]+)(?:::(\w+))?`")


def promises() -> list[str]:
    """The bullets of the file, each with the lines that continue it."""
    text = (ROOT / "SPECIFICATION.md").read_text()
    return [" ".join(match.split()) for match in re.findall(r"^- (.*(?:\n  .*)*)", text, re.M)]


def test_every_promise_names_its_proof() -> None:
    assert promises()
    assert [promise for promise in promises() if not PROOF.search(promise)] == []


def test_every_named_proof_exists() -> None:
    missing = [
        f"{file}::{name}"
        for promise in promises()
        for file, name in PROOF.findall(promise)
        if not (ROOT / file).exists() or f"def {name}" not in (ROOT / file).read_text()
    ]
    assert missing == []
