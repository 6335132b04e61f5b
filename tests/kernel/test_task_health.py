"""Health checks, by what they do in a real container and what the task says of it.

ECS's least interval is 5 s; here it is 1 s, and one task has a container for each case. Only the
checks that never end are stopped soon: how long the others take depends on the machine.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sandbox.agent import Agent, open_agent
from sandbox.model.task import (
    ContainerDefinition,
    ContainerKnown,
    Health,
    HealthCheck,
    KeyValuePair,
    Status,
    TaskView,
)
from tests.conftest import IN_GUEST
from tests.kernel.tasks import (
    STAYS,
    container,
    execute,
    of,
    processes_of,
    reached,
    started,
    stopped,
)

pytestmark = pytest.mark.usefixtures("any_period")


ENDLESS_S = 5 if IN_GUEST else 1
"""The timeout of a check that never ends, long enough for a shell to say something before."""


def checked(
    image: str, name: str, *command: str, timeout: int = 60, **members: int
) -> ContainerDefinition:
    """A container that is checked every second."""
    check = HealthCheck(command=command, interval=1, timeout=timeout, **members)
    return container(image, name, STAYS, health_check=check)


def decided(known: ContainerKnown) -> bool:
    return known.health is not Health.UNKNOWN


@pytest.mark.guest
async def test_every_way_in_which_a_check_can_end(agent: Agent, tiny: str) -> None:
    hangs = "echo thinking; sleep 991 & (setsid sleep 992 &); sleep 993; true"
    task = await started(
        agent,
        checked(tiny, "good", "CMD", "echo", "fine", "and well"),
        checked(tiny, "shell", "CMD-SHELL", "echo $0 $1; test -d /tmp && echo said; exit 0"),
        checked(tiny, "bad", "CMD-SHELL", "echo why; exit 3", retries=2),
        checked(tiny, "hangs", "CMD-SHELL", hangs, retries=1, timeout=ENDLESS_S),
        checked(tiny, "absent", "CMD", "no-such-check", retries=2),
        checked(tiny, "young", "CMD", "false", retries=1, start_period=300),
        checked(tiny, "none", "NONE"),
        checked(tiny, "loud", "CMD", "yes", timeout=ENDLESS_S),
        msgspec.structs.replace(
            checked(tiny, "user", "CMD-SHELL", "echo $(id -u) $A $AWS_REGION $PWD $HOME"),
            user="app",
            working_directory="/tmp",
            environment=(KeyValuePair(name="A", value="b"),),
        ),
        cpu="1024",
        memory="2048",
    )
    names = ("good", "shell", "bad", "hangs", "absent", "user")
    said = f"Health check exceeded timeout ({ENDLESS_S}s): thinking\n"

    def is_told(view: TaskView) -> bool:
        """A check that is stopped has not always come to say something on a busy machine."""
        return all(decided(of(view, n)) for n in names) and of(view, "hangs").health_output == said

    view = await reached(agent, task, is_told)
    assert of(view, "good").health is Health.HEALTHY
    assert of(view, "good").health_output == "fine and well\n"
    assert of(view, "shell").health is Health.HEALTHY
    assert of(view, "shell").health_output == "/bin/sh\nsaid\n"
    assert of(view, "bad").health is Health.UNHEALTHY
    assert of(view, "bad").health_output == "why\n"
    assert of(view, "hangs").health is Health.UNHEALTHY
    assert of(view, "absent").health is Health.UNHEALTHY
    assert "no-such-check" in (of(view, "absent").health_output or "")
    assert of(view, "young").health is Health.UNKNOWN
    assert of(view, "none").health is Health.UNKNOWN
    assert of(view, "none").health_output is None

    assert of(view, "user").health_output == "1000 b us-east-1 /tmp /home/app\n"
    assert len(of(view, "loud").health_output or "") <= 4200

    # An unhealthy container runs on, and so does the task: replacing it is a service's business.
    assert view.known.health is Health.UNHEALTHY
    assert view.known.last_status is Status.RUNNING
    assert {c.last_status for c in view.known.containers} == {"RUNNING"}
    # One check of `hangs` may be under way, with three that sleep; none has left any.
    assert len([line for line in processes_of(agent, task) if line.startswith("sleep 99")]) <= 3
    outcome = await stopped(agent, task)
    assert [c.exit_code for c in outcome.view.known.containers] == [0] * 9


async def test_retries_count_failures_in_a_row_and_a_success_mends_all(
    agent: Agent, tiny: str
) -> None:
    counts = (
        "test -e /good; code=$?; n=$(($(cat /$code 2>/dev/null) + 1));"
        " echo $n >/$code; echo $code $n; exit $code"
    )
    task = await started(
        agent, checked(tiny, "app", "CMD-SHELL", counts, retries=2, start_period=300)
    )

    async def seen(code: int, number: int) -> ContainerKnown:
        """The container after a check ended with the code, for the number-th time or later."""

        def is_seen(view: TaskView) -> bool:
            last, count = map(int, (of(view, "app").health_output or "-1 0").split())
            return last == code and count >= number

        return of(await reached(agent, task, is_seen), "app")

    async def becomes(health: Health) -> ContainerKnown:
        view = await reached(agent, task, lambda view: of(view, "app").health is health)
        assert view.known.health is health
        return of(view, "app")

    assert (await seen(1, 2)).health is Health.UNKNOWN  # within startPeriod
    await execute(agent, task, "touch", "/good")
    since = (await becomes(Health.HEALTHY)).health_since
    again = await seen(0, 2)
    assert (again.health, again.health_since) == (Health.HEALTHY, since)
    _, failures, _ = await execute(agent, task, "cat", "/1")
    await execute(agent, task, "rm", "/good")
    # After a success, failures count in the startPeriod as well: two of them.
    code, count = ((await becomes(Health.UNHEALTHY)).health_output or "").split()
    assert code == "1"
    assert int(count) - int(failures) >= 2
    await execute(agent, task, "touch", "/good")
    await becomes(Health.HEALTHY)
    await stopped(agent, task)


async def test_the_next_agent_goes_on_checking(state_dir: Path, tmp_path: Path, tiny: str) -> None:
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        task = await started(agent, checked(tiny, "app", "CMD", "test", "-e", "/good", retries=1))
        await reached(agent, task, lambda view: of(view, "app").health is Health.UNHEALTHY)
        await execute(agent, task, "touch", "/good")
    async with open_agent(state_dir, tmp_path / "run", resident=True) as agent:
        await reached(agent, task, lambda view: of(view, "app").health is Health.HEALTHY)
        await stopped(agent, task)
