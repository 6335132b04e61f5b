"""What a container definition asks for, as the container then finds it."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.task import (
    ContainerDefinition,
    ContainerDependency,
    KernelCapabilities,
    KeyValuePair,
    LinuxParameters,
    MountPoint,
    StopCode,
    SystemControl,
    Ulimit,
    Volume,
)
from tests.kernel.conftest import Outcome, until
from tests.kernel.probe_image import Images
from tests.kernel.tasks import (
    STAYS,
    container,
    execute,
    heard,
    killed,
    of,
    processes_of,
    started,
    stopped,
    to_the_end,
    written,
)

WITH_INIT = LinuxParameters(init_process_enabled=True)


async def side_by_side(agent: Agent, *wanted: ContainerDefinition) -> list[Outcome]:
    """Each in a task of its own, to its end."""
    outcomes: dict[int, Outcome] = {}

    async def run(place: int, definition: ContainerDefinition) -> None:
        outcomes[place] = await to_the_end(agent, definition)

    async with trio.open_nursery() as nursery:
        for place, definition in enumerate(wanted):
            nursery.start_soon(run, place, definition)
    return [outcomes[place] for place in range(len(wanted))]


# user ----------------------------------------------------------------------------------------


@pytest.mark.guest
async def test_a_user_is_named_or_numbered_and_has_the_images_groups(
    agent: Agent, tiny: str
) -> None:
    expected = {
        None: "0 0 0 /root",
        "app": "1000 1000 1000 2000 /home/app",
        "1000": "1000 1000 1000 2000 /home/app",
        "app:extra": "1000 2000 2000 /home/app",
        "1000:0": "1000 0 0 /home/app",
        "0:1000": "0 1000 1000 /root",
        "4321": "4321 0 0 /",
        "4321:8765": "4321 8765 8765 /",
        "65535": "65535 0 0 /",
    }
    say = "echo $(id -u) $(id -g) $(id -G) $HOME"
    outcomes = await side_by_side(agent, *(container(tiny, "app", say, user=u) for u in expected))
    assert [outcome.stdout.strip() for outcome in outcomes] == list(expected.values())


async def test_the_images_user_holds_unless_the_definition_has_one(
    agent: Agent, images: Images
) -> None:
    image = images.make("of-app", User="app")
    own, other = await side_by_side(
        agent, container(image, "app", "id -u"), container(image, "app", "id -u", user="0")
    )
    assert (own.stdout, other.stdout) == ("1000\n", "0\n")


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("nobody-here", "unable to find user 'nobody-here': no matching entries in passwd file"),
        ("app:none", "unable to find group 'none': no matching entries in group file"),
        ("65536", "user '65536': id 65536 is beyond a task's 65536 ids"),
    ],
)
async def test_a_user_that_cannot_be_had_fails_the_task(
    agent: Agent, tiny: str, user: str, why: str
) -> None:
    known = (await to_the_end(agent, container(tiny, "app", "true", user=user))).view.known
    assert known.stop_code is StopCode.TASK_FAILED_TO_START
    assert known.stopped_reason == f"CannotStartContainerError: {why}"
    assert known.containers[0].exit_code is None


# directory, arguments, environment -----------------------------------------------------------


async def test_the_working_directory_is_made_where_it_is_missing(
    agent: Agent, images: Images
) -> None:
    image = images.make("works", WorkingDir="/home/app")
    say = "pwd; stat -c '%u %g %a' ."
    own, made = await side_by_side(
        agent,
        container(image, "app", say),
        container(image, "app", say, user="app", working_directory="/made/deep"),
    )
    assert own.stdout == "/home/app\n0 0 755\n"
    assert made.stdout == "/made/deep\n0 0 755\n"


async def test_entry_point_and_command_combine_as_dockers_do(agent: Agent, images: Images) -> None:
    image = images.make("words", Entrypoint=["echo", "entry"], Cmd=["cmd"])
    expected: list[tuple[dict[str, Any], str]] = [
        ({}, "entry cmd"),
        ({"command": ("mine",)}, "entry mine"),
        ({"entry_point": ("echo", "other")}, "other"),
        ({"entry_point": ("echo", "other"), "command": ("mine", "too")}, "other mine too"),
        ({"command": ()}, "entry cmd"),
        ({"entry_point": (), "command": ("echo", "mine")}, "mine"),
    ]
    wanted = [ContainerDefinition(name="app", image=image, **members) for members, _ in expected]
    outcomes = await side_by_side(agent, *wanted)
    assert [outcome.stdout.strip() for outcome in outcomes] == [text for _, text in expected]
    image = images.make("command", Entrypoint=["false"], Cmd=["echo", "cmd"])
    (outcome,) = await side_by_side(
        agent, ContainerDefinition(name="app", image=image, entry_point=())
    )
    assert outcome.stdout.strip() == "cmd"


async def test_arguments_arrive_byte_for_byte(agent: Agent, tiny: str) -> None:
    words = ("a b", "", "$HOME", "*", "'\"\\", "line\nline", "umlaut ü", "-n")
    script = 'for word; do printf "<%s>" "$word"; done'
    (outcome,) = await side_by_side(
        agent, container(tiny, "app", "", command=("sh", "-c", script, "sh", *words))
    )
    assert outcome.stdout == "".join(f"<{word}>" for word in words)


async def test_variables_come_from_the_image_fargate_and_the_definition(
    agent: Agent, images: Images
) -> None:
    image = images.make("variables", Env=["PATH=/bin", "A=image", "B=image", "AWS_REGION=image"])
    own = (
        KeyValuePair(name="B", value="mine"),
        KeyValuePair(name="EMPTY", value=""),
        KeyValuePair(name="TEXT", value="a=b c\nd"),
        KeyValuePair(name="AWS_DEFAULT_REGION", value="mine"),
    )
    plain, changed = await side_by_side(
        agent,
        container(image, "app", "", command=("env",)),
        container(image, "app", "", command=("env", "-0"), environment=own),
    )
    assert set(plain.stdout.splitlines()) == {
        "PATH=/bin",
        "A=image",
        "B=image",
        "HOME=/root",
        f"HOSTNAME={plain.view.id[:12]}",
        "AWS_EXECUTION_ENV=AWS_ECS_FARGATE",
        "AWS_REGION=us-east-1",
        "AWS_DEFAULT_REGION=us-east-1",
    }
    variables = set(changed.stdout.split("\0"))
    assert {"A=image", "B=mine", "EMPTY=", "TEXT=a=b c\nd", "AWS_DEFAULT_REGION=mine"} <= variables


# root, init ----------------------------------------------------------------------------------


@pytest.mark.guest
async def test_a_read_only_root_leaves_volumes_and_shared_memory_writable(
    agent: Agent, tiny: str
) -> None:
    script = "for place in /new /tmp/new /etc/hosts /v/new /dev/shm/new; do echo > $place; done"
    outcome = await to_the_end(
        agent,
        container(
            tiny,
            "app",
            script + "; mount -o remount,rw / || mount -t tmpfs none /mnt; echo $?",
            readonly_root_filesystem=True,
            mount_points=(MountPoint(source_volume="v", container_path="/v"),),
        ),
        volumes=(Volume(name="v"),),
    )
    refused = [line for line in outcome.stderr.splitlines() if "Read-only file system" in line]
    assert len(refused) == 3
    for line, place in zip(refused, ("/new", "/tmp/new", "/etc/hosts"), strict=True):
        assert place in line
    assert outcome.stdout != "0\n"


async def test_our_init_reaps_what_a_program_does_not(agent: Agent, tiny: str) -> None:
    # The program forgets a child that has ended, and so does a shell that became `sleep`.
    script = "(sleep 0.1 & exec sleep 0.05) & exec sleep 1000"
    task = await started(
        agent,
        container(tiny, "with", script, linux_parameters=WITH_INIT),
        container(tiny, "without", script),
    )
    ending = ("sh -c", "sleep 0.")
    await until(lambda: not any(line.startswith(ending) for line in processes_of(agent, task)))
    with trio.fail_after(10):
        while await zombies(agent, task, "without") != 2:
            await trio.sleep(0.01)
        # The child of `sleep` itself; no orphan.
        while await zombies(agent, task, "with") != 1:
            await trio.sleep(0.01)
    await killed(agent, task)


async def zombies(agent: Agent, task: str, name: str) -> int:
    _, out, _ = await execute(agent, task, "sh", "-c", "cat /proc/[0-9]*/stat", container=name)
    return out.count(") Z ")


async def test_our_init_passes_signals_on_and_ends_as_the_program_ended(
    agent: Agent, tiny: str
) -> None:
    script = "trap 'echo usr1' USR1; trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    task = await started(agent, container(tiny, "app", script, linux_parameters=WITH_INIT))
    await heard(agent, task, "up")
    await agent.tasks.kill(task, signal.SIGUSR1)
    await heard(agent, task, "usr1")
    await agent.tasks.kill(task, signal.SIGTERM)
    with trio.fail_after(10):
        async for view in agent.tasks.watch(task):
            last = view
    assert of(last, "app").exit_code == 9
    (signalled,) = await side_by_side(
        agent, container(tiny, "app", "kill -SEGV $$", linux_parameters=WITH_INIT)
    )
    assert signalled.container.exit_code == 139


async def test_a_missing_program_is_told_under_our_init_too(agent: Agent, tiny: str) -> None:
    (outcome,) = await side_by_side(
        agent, container(tiny, "app", "", command=("nothing",), linux_parameters=WITH_INIT)
    )
    assert outcome.container.exit_code == 127
    assert outcome.container.reason == (
        'CannotStartContainerError: exec: "nothing": executable file not found in $PATH'
    )


# limits --------------------------------------------------------------------------------------


async def test_ulimits_are_those_of_the_definition(agent: Agent, tiny: str) -> None:
    (outcome,) = await side_by_side(
        agent,
        container(
            tiny,
            "app",
            "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Ss; ulimit -Hs; ulimit -St",
            ulimits=(
                Ulimit(name="nofile", soft_limit=100, hard_limit=200),
                Ulimit(name="core", soft_limit=0, hard_limit=0),
                Ulimit(name="stack", soft_limit=1 << 20, hard_limit=2 << 20),
                Ulimit(name="cpu", soft_limit=77, hard_limit=88),
            ),
        ),
    )
    assert outcome.stdout.split() == ["100", "200", "0", "1024", "2048", "77"]
    assert outcome.container.lowered == ()


async def test_a_small_ulimit_is_not_in_the_way_of_the_start_itself(
    agent: Agent, tiny: str
) -> None:
    (outcome,) = await side_by_side(
        agent,
        container(
            tiny,
            "app",
            "echo started",
            ulimits=(
                Ulimit(name="nofile", soft_limit=4, hard_limit=4),
                Ulimit(name="nproc", soft_limit=1, hard_limit=1),
                Ulimit(name="fsize", soft_limit=0, hard_limit=0),
                Ulimit(name="memlock", soft_limit=0, hard_limit=0),
            ),
        ),
    )
    assert outcome.stdout == "started\n"


@pytest.mark.guest
async def test_open_files_are_fargates_or_what_the_host_gives_and_that_is_said(
    agent: Agent, tiny: str
) -> None:
    ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (outcome,) = await side_by_side(agent, container(tiny, "app", "ulimit -n; ulimit -Hn"))
    given = 65535 if agent.node.may_raise_limits else min(65535, ceiling)
    lowered = f"nofile is {given}, not 65535: the host's hard limit"
    assert outcome.stdout.split() == [str(given)] * 2
    assert outcome.container.lowered == (() if given == 65535 else (lowered,))


SHOWN = "cat /proc/self/limits"
SMALL: dict[int, int] = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_CPU: 1000,
    resource.RLIMIT_DATA: 1 << 40,
    resource.RLIMIT_FSIZE: 600 << 10,
    resource.RLIMIT_MEMLOCK: 4096,
    resource.RLIMIT_MSGQUEUE: 4096,
    resource.RLIMIT_NOFILE: 900,
    resource.RLIMIT_NPROC: 2000,
    resource.RLIMIT_SIGPENDING: 2000,
    resource.RLIMIT_STACK: 1 << 20,
}


@contextmanager
def limited() -> Iterator[None]:
    """This process, which embeds the agent, as after `ulimit -S`."""
    before = {number: resource.getrlimit(number) for number in SMALL}
    for number, soft in SMALL.items():
        resource.setrlimit(number, (soft, before[number][1]))
    try:
        yield
    finally:
        for number, limits in before.items():
            resource.setrlimit(number, limits)


async def test_limits_of_the_agent_are_not_those_of_its_tasks(agent: Agent, tiny: str) -> None:
    """A file of 4 MiB and as much output pass, where the agent may write 600 KiB to a file."""
    script = f"{SHOWN} >&2; head -c 4194304 /dev/zero | tee /file; exec wc -c </file >&2"
    wanted = container(tiny, "app", script)
    free = await to_the_end(agent, wanted)
    with limited():
        held = await to_the_end(agent, wanted)
        task = await started(agent, container(tiny, "app", STAYS))
        assert (await execute(agent, task, "sh", "-c", SHOWN))[1] in held.stderr
        await stopped(agent, task)
    assert held.stderr == free.stderr
    assert held.stderr.endswith("\n4194304\n")
    assert len(held.stdout) == 4194304


async def test_limits_are_the_kernels_own_defaults(agent: Agent, tiny: str) -> None:
    (outcome,) = await side_by_side(agent, container(tiny, "app", "cat /proc/self/limits"))
    limits = by_name(outcome.stdout)
    expected = {
        "core file size": ["0", "unlimited"],
        "cpu time": ["unlimited", "unlimited"],
        "file size": ["unlimited", "unlimited"],
        "stack size": ["8388608", "unlimited"],
        "locked memory": ["8388608", "8388608"],
        "msgqueue size": ["819200", "819200"],
        "realtime priority": ["0", "0"],
    }
    assert {name: limits[name] for name in expected} == expected
    of_first = by_name(Path("/proc/1/limits").read_text())
    for name in ("processes", "pending signals"):
        assert limits[name] == [of_first[name][1]] * 2
    assert [text for text in outcome.container.lowered if not text.startswith("nofile")] == []


def by_name(text: str) -> dict[str, list[str]]:
    """/proc/PID/limits: soft and hard."""
    lines = text.splitlines()[1:]
    return {line[:26].removeprefix("Max ").strip(): line[26:].split()[:2] for line in lines}


@pytest.mark.guest
async def test_a_ulimit_that_was_asked_for_is_given_or_fails_the_task(
    agent: Agent, tiny: str
) -> None:
    ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    asked = min(ceiling + 1, 1 << 20)
    limit = Ulimit(name="nofile", soft_limit=asked, hard_limit=asked)
    (outcome,) = await side_by_side(agent, container(tiny, "app", "ulimit -n", ulimits=(limit,)))
    if agent.node.may_raise_limits or asked <= ceiling:
        assert outcome.stdout == f"{asked}\n"
        return
    assert outcome.container.exit_code is None
    assert outcome.view.known.stopped_reason == (
        f"CannotStartContainerError: ulimit nofile {asked} is above this host's hard limit "
        f"{ceiling}, and the agent lacks CAP_SYS_RESOURCE"
    )


# settings of the kernel ----------------------------------------------------------------------


def controls(**values: str) -> tuple[SystemControl, ...]:
    """Underscores that stand for dots are doubled."""
    return tuple(
        SystemControl(namespace=name.replace("__", "."), value=value)
        for name, value in values.items()
    )


def shown(wanted: tuple[SystemControl, ...]) -> str:
    return "cat " + " ".join(f"/proc/sys/{c.namespace.replace('.', '/')}" for c in wanted)


async def said_by(agent: Agent, outcome: Outcome, name: str) -> list[str]:
    return (await written(agent, outcome.view.id, name)).split()


@pytest.mark.guest
async def test_system_controls_of_the_network_are_the_whole_tasks(agent: Agent, tiny: str) -> None:
    wanted = controls(
        net__ipv4__ip_local_port_range="2000 3000",
        net__ipv4__tcp_keepalive_time="77",
    )
    show = shown(wanted)
    after = (ContainerDependency(container_name="setter", condition="SUCCESS"),)
    outcome = await to_the_end(
        agent,
        container(tiny, "setter", show, essential=False, system_controls=wanted),
        container(tiny, "other", show, depends_on=after),
    )
    expected = ["2000", "3000", "77"]
    assert await said_by(agent, outcome, "setter") == expected
    assert await said_by(agent, outcome, "other") == expected


@pytest.mark.guest
async def test_system_controls_of_ipc_are_the_containers_own(agent: Agent, tiny: str) -> None:
    wanted = controls(
        kernel__msgmax="4321",
        kernel__sem="100 200 30 40",
        kernel__shm_rmid_forced="1",
        fs__mqueue__msg_max="33",
    )
    show = shown(wanted)
    outcome = await to_the_end(
        agent,
        container(tiny, "setter", f"{show}; sleep 1", system_controls=wanted),
        container(tiny, "other", show, essential=False),
    )
    assert await said_by(agent, outcome, "setter") == ["4321", "100", "200", "30", "40", "1", "33"]
    assert "4321" not in await said_by(agent, outcome, "other")


@pytest.mark.guest
async def test_a_control_that_this_kernel_keeps_from_namespaces_fails_the_task_by_name(
    agent: Agent, tiny: str
) -> None:
    # Older kernels (6.1) have no net.core.* in a network namespace of a user namespace.
    wanted = controls(net__core__somaxconn="1234")
    show = "cd /proc/sys/net/core && test -e somaxconn && cat somaxconn"
    plain, changed = await side_by_side(
        agent,
        container(tiny, "app", show),
        container(tiny, "app", show, system_controls=wanted),
    )
    if plain.container.exit_code == 0:
        assert changed.stdout == "1234\n"
    else:
        assert changed.container.reason == (
            "CannotStartContainerError: sysctl net/core/somaxconn 1234: No such file or directory"
        )


async def test_a_value_that_the_kernel_refuses_fails_the_task_by_name(
    agent: Agent, tiny: str
) -> None:
    wanted = controls(net__ipv4__ip_local_port_range="many")
    (outcome,) = await side_by_side(agent, container(tiny, "app", "true", system_controls=wanted))
    assert outcome.container.reason == (
        "CannotStartContainerError: sysctl net/ipv4/ip_local_port_range many: Invalid argument"
    )


@pytest.mark.guest
async def test_capabilities_are_dropped_and_sys_ptrace_is_added(agent: Agent, tiny: str) -> None:
    def having(**members: tuple[str, ...]) -> LinuxParameters:
        return LinuxParameters(capabilities=KernelCapabilities(**members))

    script = "touch /tmp/x; chown 1000 /tmp/x && echo chown; grep CapEff /proc/self/status"
    default, without, none, ptrace = await side_by_side(
        agent,
        container(tiny, "app", script),
        container(tiny, "app", script, linux_parameters=having(drop=("CHOWN",))),
        container(tiny, "app", script, linux_parameters=having(drop=("ALL",))),
        container(tiny, "app", script, linux_parameters=having(drop=("ALL",), add=("SYS_PTRACE",))),
    )
    assert default.stdout.split() == ["chown", "CapEff:", "00000000a80425fb"]
    assert without.stdout.split() == ["CapEff:", "00000000a80425fa"]
    assert none.stdout.split() == ["CapEff:", "0000000000000000"]
    assert ptrace.stdout.split() == ["CapEff:", "0000000000080000"]
    assert "Operation not permitted" in without.stderr


async def test_the_longest_names_and_awkward_ones_work(agent: Agent, tiny: str) -> None:
    for name in ("x" * 255, "tasks", "volumes", "notify_on_release", "run", "-", "_"):
        outcome = await to_the_end(
            agent,
            container(
                tiny,
                name,
                "touch /v/here; echo fine",
                mount_points=(MountPoint(source_volume=name, container_path="/v"),),
            ),
            volumes=(Volume(name=name),),
        )
        assert outcome.stdout == "fine\n", (name[:20], outcome.view.known)
