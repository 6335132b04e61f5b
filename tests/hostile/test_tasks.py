"""What an image says of how to run it makes the task that it should, or none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sandbox.agent import Agent
from sandbox.model.task import ContainerDefinition
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
    environment = dict(pair.split("=", 1) for pair in pairs)
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
