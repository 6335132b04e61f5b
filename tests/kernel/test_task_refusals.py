"""Bad input: ECS's text where it has one, ours in one line otherwise, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.agent import Agent, open_agent
from sandbox.control.capacity import UNAVAILABLE, Capacity
from sandbox.control.tasks import RunRequest
from sandbox.errors import ClientException, InvalidParameterException, SandboxError
from sandbox.model.task import (
    ContainerDefinition,
    ContainerDependency,
    MountPoint,
    Status,
    StopCode,
    TaskDefinition,
    Volume,
)
from scripts.make_image import LayerWriter
from tests.kernel.conftest import definition, finish
from tests.kernel.probe_image import Images
from tests.kernel.tasks import STAYS, begin, container, stopped, to_the_end

IMAGE = "127.0.0.1:1/image"


def one(**members: Any) -> ContainerDefinition:
    return ContainerDefinition(**({"name": "app", "image": IMAGE} | members))


def waits(name: str, on: str) -> ContainerDefinition:
    awaited = ContainerDependency(container_name=on, condition="START")
    return one(name=name, depends_on=(awaited,))


REFUSED: list[tuple[TaskDefinition, str]] = [
    (
        definition(one(), cpu="256", memory="4096"),
        "No Fargate configuration exists for given values: 256 CPU, 4096 memory. See the Amazon "
        "ECS documentation for the valid values.",
    ),
    (
        definition(one(), cpu="300"),
        "Invalid 'cpu' setting for task. For more information, see the Troubleshooting section of "
        "the Amazon ECS Developer Guide.",
    ),
    (
        definition(one(), memory=""),
        "Fargate requires that 'memory' be defined at the task level.",
    ),
    (
        definition(one(memory=1024)),
        "The 'memory' setting for container 'app' is greater than for the task.",
    ),
    (
        definition(one(mount_points=(MountPoint(source_volume="none", container_path="/v"),))),
        "container 'app': the task has no volume 'none'",
    ),
    (
        definition(one(), volumes=(Volume(name="v"), Volume(name="v"))),
        "two volumes have the name 'v'",
    ),
    (
        definition(waits("a", "b"), waits("b", "a")),
        "containers wait for each other: 'a' for 'b', 'b' for 'a'",
    ),
    (definition(one(), one()), "two containers have the name 'app'"),
    (definition(waits("a", "c")), "container 'a': dependsOn names 'c', which is not there"),
    (definition(one(image="")), "Container.image should not be null or empty."),
    (definition(), "a task has 1 to 10 containers, not 0"),
    (definition(one(essential=False)), "no container of the task is essential"),
]


@pytest.mark.parametrize(("wanted", "text"), REFUSED, ids=lambda value: str(value)[:40])
async def test_what_fargate_refuses_is_refused_in_its_words(
    agent: Agent, state_dir: Path, wanted: TaskDefinition, text: str
) -> None:
    with pytest.raises(ClientException) as caught:
        await agent.tasks.run(RunRequest(definition=wanted))
    assert str(caught.value) == text
    assert agent.tasks.list() == []
    assert list((state_dir / "tasks").iterdir()) == []
    assert agent.node.tree.names() == []


@pytest.mark.parametrize(
    ("members", "kind", "text"),
    [
        ({"image": "image/UPPER"}, ClientException, "image/UPPER"),
        ({"image": "a b"}, ClientException, "a b"),
        ({"platform_version": "9.9"}, InvalidParameterException, "platform version '9.9'"),
    ],
)
async def test_names_that_mean_nothing_are_refused(
    agent: Agent, members: dict[str, str], kind: type[SandboxError], text: str
) -> None:
    image = members.pop("image", IMAGE)
    request = RunRequest(definition=definition(one(image=image)), **members)  # type: ignore[arg-type]
    with pytest.raises(kind, match=text):
        await agent.tasks.run(request)
    assert agent.tasks.list() == []


async def failed(
    agent: Agent, state_dir: Path, wanted: ContainerDefinition
) -> tuple[str, int | None]:
    """Why the task did not start, and the container's exit code; nothing else is left of it."""
    view = (await to_the_end(agent, wanted)).view
    known = view.known
    assert known.last_status is Status.STOPPED
    assert known.stop_code is StopCode.TASK_FAILED_TO_START
    assert known.started_at is None
    assert [c.last_status for c in known.containers] == ["STOPPED"]
    assert agent.node.tree.names() == []
    left = {path.name for path in (state_dir / "tasks" / view.id).rglob("*")}
    assert left.isdisjoint({"volumes", "upper", "work", "boot"})
    assert known.stopped_reason is not None
    assert "\n" not in known.stopped_reason
    return known.stopped_reason, known.containers[0].exit_code


async def test_an_image_that_is_not_there(agent: Agent, state_dir: Path, tiny: str) -> None:
    absent = tiny.rpartition(":")[0] + "-absent:latest"
    assert await failed(agent, state_dir, one(image=absent)) == (
        "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to "
        f"resolve ref {absent}: not found",
        None,
    )


async def test_a_registry_that_is_not_there(agent: Agent, state_dir: Path) -> None:
    reason, code = await failed(agent, state_dir, one())
    assert reason.startswith(
        "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to "
        f'resolve ref {IMAGE}:latest: failed to do request: Head "http://127.0.0.1:1/v2/image/'
        'manifests/latest": '
    )
    assert code is None


async def test_an_image_with_another_digest(agent: Agent, state_dir: Path, tiny: str) -> None:
    wrong = f"{tiny.rpartition(':')[0]}@sha256:{'0' * 64}"
    reason, _ = await failed(agent, state_dir, one(image=wrong))
    assert reason.startswith("CannotPullContainerError: ")
    assert reason.endswith(": not found")


@pytest.mark.guest
async def test_programs_that_cannot_run(agent: Agent, state_dir: Path, images: Images) -> None:
    def content(layer: LayerWriter) -> None:
        layer.file("data", b"no program\n", 0o644)
        layer.file("broken", b"\x7fELF of no kind", 0o755)
        layer.file("script", b"#!/no/interpreter\n", 0o755)
        layer.symlink("loop", "loop")

    image = images.make("unfit", content, Cmd=[])
    start = "CannotStartContainerError: exec: "
    expected: list[tuple[tuple[str, ...] | None, str, int | None]] = [
        (("nothing",), f'{start}"nothing": executable file not found in $PATH', 127),
        (("/nothing",), f'{start}"/nothing": executable file not found in $PATH', 127),
        (("/data",), f'{start}"/data": permission denied', 126),
        (("/bin",), f'{start}"/bin": permission denied', 126),
        (("/broken",), f'{start}"/broken": exec format error', 126),
        (("/script",), f'{start}"/script": executable file not found in $PATH', 127),
        (("/data/x",), f'{start}"/data/x": not a directory', 126),
        (("/loop",), f'{start}"/loop": too many levels of symbolic links', 126),
        (("",), f'{start}"": executable file not found in $PATH', 127),
        (None, "CannotCreateContainerError: no command specified for container 'app'", None),
    ]
    for command, reason, code in expected:
        assert await failed(agent, state_dir, one(image=image, command=command)) == (reason, code)


async def test_a_working_directory_that_cannot_be(agent: Agent, state_dir: Path, tiny: str) -> None:
    wanted = one(image=tiny, command=("true",), working_directory="/etc/passwd/x")
    assert await failed(agent, state_dir, wanted) == (
        "CannotStartContainerError: workdir /etc/passwd/x: Not a directory",
        None,
    )


async def test_arguments_beyond_what_the_kernel_takes(
    agent: Agent, state_dir: Path, tiny: str, any_period: None
) -> None:
    wanted = one(image=tiny, command=("echo", "x" * (1 << 18)))
    reason, code = await failed(agent, state_dir, wanted)
    assert reason.endswith(": argument list too long")
    assert code == 126


async def test_a_task_that_nobody_knows(agent: Agent) -> None:
    for task in ("0" * 32, "none", "arn:aws:ecs:us-east-1:123456789012:task/default/" + "0" * 32):
        with pytest.raises(SandboxError, match=r"The referenced task was not found\."):
            await agent.tasks.stop(task)


async def test_one_failure_does_not_touch_another_task(agent: Agent, tiny: str) -> None:
    outcome = await to_the_end(
        agent,
        container(tiny, "app", "sleep 0.3; echo fine"),
        container(tiny, "side", "", command=("nothing",), essential=False),
    )
    assert outcome.stdout == "fine\n"
    assert [c.exit_code for c in outcome.view.known.containers] == [0, 127]


async def test_the_container_whose_image_cannot_be_had_says_so_itself(
    agent: Agent, tiny: str
) -> None:
    good, bad = container(tiny, "good", "true"), one(name="bad")
    outcome = await to_the_end(agent, good, bad)
    known = {each.name: each for each in outcome.view.known.containers}
    assert known["bad"].reason == outcome.view.known.stopped_reason
    assert known["good"].reason is None


async def test_what_must_not_be_pulled_is_not_said_to_have_been_tried(agent: Agent) -> None:
    request = RunRequest(definition=definition(one()), pull="never")
    task = (await agent.tasks.run(request)).id
    outcome = await finish(agent, task)
    assert outcome.view.known.stopped_reason == (
        f"CannotPullContainerError: {IMAGE}:latest is not stored here, and must not be pulled"
    )


async def test_slow_registries_hold_up_nobody_but_those_who_wait_for_them(
    agent: Agent, tiny: str
) -> None:
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    waiting = [
        await begin(agent, container(f"127.0.0.1:{port}/image:{n}", "app", "true"))
        for n in range(20)
    ]
    with trio.fail_after(15):
        outcome = await to_the_end(agent, container(tiny, "app", "true"))
    assert outcome.container.exit_code == 0
    for task in waiting:
        await agent.tasks.stop(task)
    for task in waiting:
        await finish(agent, task)
    await silent[0].aclose()


async def test_a_most_of_tasks_holds_for_many_who_ask_at_once(agent: Agent, tiny: str) -> None:
    agent.tasks.capacity = Capacity(max_tasks=3)
    tasks: list[str] = []
    refused: list[str] = []

    async def ask() -> None:
        try:
            tasks.append(await begin(agent, container(tiny, "app", STAYS)))
        except InvalidParameterException as error:
            refused.append(str(error))

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(ask)
    assert (len(tasks), set(refused)) == (3, {UNAVAILABLE})
    for task in tasks:
        await stopped(agent, task)


async def test_a_name_means_the_task_that_lives(agent: Agent, tiny: str) -> None:
    before = [await begin(agent, container(tiny, "app", "true"), family="web") for _ in range(2)]
    for task in before:
        await finish(agent, task)
    with pytest.raises(InvalidParameterException, match="2 tasks are called web: "):
        agent.tasks.find("web")
    live = await begin(agent, container(tiny, "app", STAYS), family="web")
    assert agent.tasks.find("web") == live
    await stopped(agent, live)


async def test_an_agent_of_2017_refuses_what_came_later_in_the_words_of_then(
    state_dir: Path, tmp_path: Path
) -> None:
    larger = RunRequest(definition=definition(one(), cpu="8192", memory="16384"))
    async with open_agent(state_dir, tmp_path / "run", {"warm_slots": 1, "era": "2017"}) as agent:
        with pytest.raises(ClientException) as refused:
            await agent.tasks.run(larger)
        assert str(refused.value) == "No Fargate configuration exists for given values."
        agent.reload({"warm_slots": 1, "max_tasks": 0})
        with pytest.raises(InvalidParameterException, match="Capacity is unavailable"):
            await agent.tasks.run(larger)
