"""What an image says of how to run it makes the task that it should, or none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sandbox.agent import Agent
from sandbox.model.task import ContainerDefinition
from tests.hostile import umoci
from tests.hostile.cases import Refused
from tests.hostile.conftest import Tally
from tests.hostile.images import Parts
from tests.hostile.processes import CASES, Process, Run, base
from tests.kernel.conftest import Outcome
from tests.kernel.tasks import to_the_end


@pytest.mark.parametrize("name", CASES)
async def test_a_task_is_who_and_where_it_should_be_or_does_not_run(
    name: str, agent: Agent, tally: Tally, tmp_path: Path
) -> None:
    case = CASES[name]
    write(case, tmp_path / "image")
    wanted = ContainerDefinition(name="app", image=f"oci:{tmp_path}/image:latest", stop_timeout=2)
    outcome = await to_the_end(agent, wanted)
    seen = process(outcome, case) if outcome.view.known.started_at else refusal(outcome)
    if isinstance(seen, Refused):
        tally.rejected.add(name)
        assert (outcome.stdout, outcome.stderr) == ("", "")
    else:
        tally.accepted.add(name)
        tally.wrongly |= {name} if seen != case.outcome else set()
    assert seen == case.outcome


def write(case: Run, directory: Path) -> None:
    image = dataclasses.replace(case.image, layers=(base(), *case.image.layers))
    Parts(image, "").write(directory)


def refusal(outcome: Outcome) -> Refused:
    return Refused(outcome.view.known.stopped_reason or "")


def process(outcome: Outcome, case: Run) -> Process:
    """What it said of itself; of the environment what the case is about."""
    assert (outcome.stderr, outcome.container.exit_code) == ("", 0)
    uid, gid, groups, cwd, *pairs = outcome.stdout.splitlines()
    environment = dict(pair.replace("\\", "\n").split("=", 1) for pair in pairs)
    about = case.outcome.env if isinstance(case.outcome, Process) else environment
    return Process(
        uid=numbers(uid)[0],
        gid=numbers(gid)[0],
        groups=frozenset(numbers(groups)),
        cwd=cwd,
        env={name: value for name, value in environment.items() if name in about},
    )


def numbers(line: str) -> list[int]:
    """Of a line of /proc/self/status."""
    return [int(number) for number in line.split()[1:]]


@pytest.mark.skipif(shutil.which("umoci") is None, reason="needs umoci: scripts/setup --tests")
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.umoci.does != "not asked"])
def test_umoci_describes_the_same_process_or_the_corpus_says_why_not(
    name: str, tmp_path: Path
) -> None:
    case, place = CASES[name], tmp_path / "umoci"
    write(case, tmp_path / "image")
    place.mkdir()
    assert what_umoci_does(case, tmp_path / "image", place) == case.umoci.does, case.umoci.because


def what_umoci_does(case: Run, layout: Path, place: Path) -> str:
    try:
        bundle = umoci.unpack(layout, place)
    except umoci.UmociRefused:
        return "the same" if isinstance(case.outcome, Refused) else "refuses"
    if isinstance(case.outcome, Refused):
        return "accepts"
    theirs = json.loads((bundle / "config.json").read_bytes())["process"]
    return "the same" if is_told(case.outcome, theirs) else "another tree"


def is_told(process: Process, theirs: dict[str, Any]) -> bool:
    """What it leaves to the runtime is left out: home directories, and where links lead."""
    user = theirs["user"]
    groups = frozenset(user.get("additionalGids", []))
    if (user["uid"], user["gid"], groups) != (process.uid, process.gid, process.groups):
        return False
    environment = dict(pair.split("=", 1) for pair in theirs["env"])
    return process.env.items() <= environment.items()
