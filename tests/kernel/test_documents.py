"""What the documents tell people to type works: Python blocks, the example and the tour.

Names of images are those of a loopback registry's here; nothing else is changed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT, Registry

IMAGES = re.compile(r'(?<=sb\.run\()"debian:12"|(?<="image": )"(?:web|log)"')
WITHIN = """
import sandbox, trio

async def main():
    async with sandbox.open_sandbox() as sb:
{block}
        print("exit code", await task.wait())

trio.run(main)
"""
"""Around a block that begins in the middle, with `sb` given."""
ANSWERS = {
    "README.md": ["b'42\\n' 0 False\n"],
    "docs/guide/python.md": ["b'hello' 3\n", "exit code 0\n", "b'hello\\n'\n"],
}


def blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def run(*command: str | Path, state_dir: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SANDBOX_STATE_DIR": str(state_dir), **more}
    environment.pop("SANDBOX_RUN_DIR", None)
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("document", "number"), [(d, n) for d, answers in ANSWERS.items() for n in range(len(answers))]
)
def test_a_python_block_of_a_document_runs(
    document: str, number: int, tiny: str, tmp_path: Path
) -> None:
    found = blocks(document)
    assert len(found) == len(ANSWERS[document]), "each block has an answer here"
    block, replaced = IMAGES.subn(repr(tiny), found[number])
    assert replaced
    if "import sandbox" not in block:
        block = WITHIN.format(block=textwrap.indent(block, " " * 8))
    done = run("-c", block, state_dir=tmp_path / "state")
    assert (done.stdout, done.stderr) == (ANSWERS[document][number], "")


def test_the_example_of_two_containers_runs(tiny: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    done = run("docs/examples/two_containers.py", tiny, str(state), state_dir=state)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "client: written by one, served by another",
        "client ended with 0: Essential container in task exited",
    ]


def test_the_quickstarts_tour_runs(registry: Registry, tmp_path: Path) -> None:
    done = run(
        "-m",
        "scripts.tour",
        state_dir=tmp_path,  # it has a state directory of its own
        TINY=registry.images["tiny"],
        MANY=registry.images["many"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exit code found by the next agent: 42" in done.stdout
