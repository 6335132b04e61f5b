"""What Fargate accepts: every size pair, and for each rule the text that a user reads."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import ClientException, InvalidParameterException
from sandbox.model import fargate
from sandbox.model.refusals import Incompatible
from sandbox.model.task import ContainerDefinition, PortMapping, TaskDefinition, TaskStorage

# The table as the developer guide gives it, written out by hand.
GUIDE = {
    "256": "512 1024 2048",
    "512": "1024 2048 3072 4096",
    "1024": "2048 3072 4096 5120 6144 7168 8192",
    "2048": "4096 5120 6144 7168 8192 9216 10240 11264 12288 13312 14336 15360 16384",
    "4096": "8192 9216 10240 11264 12288 13312 14336 15360 16384 17408 18432 19456 20480 21504 "
    "22528 23552 24576 25600 26624 27648 28672 29696 30720",
    "8192": "16384 20480 24576 28672 32768 36864 40960 45056 49152 53248 57344 61440",
    "16384": "32768 40960 49152 57344 65536 73728 81920 90112 98304 106496 114688 122880",
}
PAIRS = {(cpu, memory) for cpu, row in GUIDE.items() for memory in row.split()}
PAIRS_2017 = {pair for pair in PAIRS if int(pair[0]) <= 4096}
EVERY_CPU = [*GUIDE, "128", "0", "32768"]
EVERY_MEMORY = [str(memory) for memory in (0, 256, *range(512, 131072 + 1, 512))]


def container(name: str = "app", **members: Any) -> dict[str, Any]:
    return {"name": name, "image": "busybox", **members}


def define(*containers: dict[str, Any], **members: Any) -> TaskDefinition:
    task = {"family": "f", "cpu": "256", "memory": "512"}
    wire = {**task, "containerDefinitions": containers or [container()], **members}
    return msgspec.convert(wire, TaskDefinition)


def refusals(definition: TaskDefinition, **options: Any) -> list[tuple[str, str]]:
    return [(found.where, found.text) for found in fargate.check(definition, **options)]


# Sizes


def test_there_are_74_pairs_now_and_50_in_2017() -> None:
    assert (len(PAIRS), len(PAIRS_2017)) == (74, 50)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, PAIRS),
        ({"platform_version": "1.3.0"}, PAIRS_2017),
        ({"era": "2017"}, PAIRS_2017),
    ],
)
def test_exactly_the_pairs_of_the_table_are_accepted(
    options: dict[str, Any], pairs: set[tuple[str, str]]
) -> None:
    accepted = {
        (cpu, memory)
        for cpu in EVERY_CPU
        for memory in EVERY_MEMORY
        if not fargate.check(define(cpu=cpu, memory=memory), **options)
    }
    assert accepted == pairs


@pytest.mark.parametrize(
    ("text", "cpu"),
    [
        ("256", "256"),
        ("1 vCPU", "1024"),
        ("1 vcpu", "1024"),
        (".25 vcpu", "256"),
        ("0.5vCPU", "512"),
        ("16 VCPU", "16384"),
        ("0256", "256"),
    ],
)
def test_cpu_is_normalised_to_units(text: str, cpu: str) -> None:
    assert fargate.normalise_cpu(text) == cpu


@pytest.mark.parametrize(
    ("text", "memory"),
    [("512", "512"), ("0.5GB", "512"), ("1 GB", "1024"), (".5 gb", "512"), ("30.0 GB", "30720")],
)
def test_memory_is_normalised_to_mebibytes(text: str, memory: str) -> None:
    assert fargate.normalise_memory(text) == memory


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "3GB",
        ".25",
        "0.1 vcpu",
        "1e3",
        "-256",
        "1  vcpu",
        "٢٥٦",
        "256\n",
        "." * 9,
        "9" * 99,
    ],
)
def test_what_is_no_amount_of_cpu_is_refused_in_the_words_of_ecs(text: str) -> None:
    with pytest.raises(ClientException, match=r"^Invalid 'cpu' setting for task\. For more inf"):
        fargate.normalise_cpu(text)


@pytest.mark.parametrize("text", ["", "1 vCPU", ".5", "0.3GB", "512MB", "1 GB\n", "1.2.3 GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ClientException, match=r"^Invalid 'memory' setting for task"):
        fargate.normalise_memory(text)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_is_refused(text: str) -> None:
    for normalise in (fargate.normalise_cpu, fargate.normalise_memory):
        with suppress(ClientException):
            assert normalise(text).isdigit()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"cpu": ""}, "Fargate requires that 'cpu' be defined at the task level."),
        ({"memory": ""}, "Fargate requires that 'memory' be defined at the task level."),
        (
            {"cpu": "300"},
            "Invalid 'cpu' setting for task. For more information, see the Troubleshooting section "
            "of the Amazon ECS Developer Guide.",
        ),
        (
            {"cpu": "1024", "memory": "1024"},
            "No Fargate configuration exists for given values: 1024 CPU, 1024 memory. See the "
            "Amazon ECS documentation for the valid values.",
        ),
        # The launch talk's slide has them swapped.
        (
            {"memory": "1 vCPU", "cpu": "3GB"},
            "Invalid 'cpu' setting for task. For more information, see the Troubleshooting section "
            "of the Amazon ECS Developer Guide.",
        ),
    ],
)
def test_a_bad_size_is_refused_in_the_words_of_ecs(members: dict[str, str], text: str) -> None:
    with pytest.raises(ClientException) as refused:
        fargate.accept(define(**members))
    assert str(refused.value) == text


def test_a_bad_size_is_refused_in_the_words_of_2017() -> None:
    assert refusals(define(cpu="300"), era="2017") == [("cpu", "Invalid 'cpu' setting for task.")]
    pair = define(cpu="8192", memory="16384")
    text = "No Fargate configuration exists for given values."
    assert refusals(pair, era="2017") == [("cpu", text)]
    assert refusals(pair, platform_version="1.3.0") == [
        ("cpu", "8192 CPU needs Fargate platform version 1.4.0")
    ]


def test_latest_is_a_number_and_unknown_versions_are_refused() -> None:
    assert fargate.resolve_platform_version("LATEST") == "1.4.0"
    assert fargate.resolve_platform_version("1.3.0") == "1.3.0"
    with pytest.raises(
        InvalidParameterException, match=r"'2\.0\.0' is none of LATEST, 1.3.0, 1.4.0"
    ):
        fargate.check(define(), "2.0.0")


# What is accepted


def test_an_accepted_definition_is_normalised_as_ecs_returns_it() -> None:
    accepted = fargate.accept(
        define(
            container(portMappings=[{"containerPort": 80}, {"containerPort": 53, "hostPort": 53}]),
            cpu=".25 vCPU",
            memory="1 GB",
        )
    )
    assert (accepted.cpu, accepted.memory) == ("256", "1024")
    assert accepted.container_definitions[0].port_mappings == (
        PortMapping(container_port=80, host_port=80),
        PortMapping(container_port=53, host_port=53),
    )
    assert fargate.accept(accepted) == accepted


def test_a_definition_that_uses_everything_is_accepted() -> None:
    app = container(
        "app",
        cpu=200,
        memory=400,
        memoryReservation=100,
        entryPoint=["/bin/sh", "-c"],
        command=["exit 0"],
        environment=[{"name": "A", "value": "b=c"}],
        workingDirectory="/srv",
        user="1000:users",
        dependsOn=[
            {"containerName": "setup", "condition": "SUCCESS"},
            {"containerName": "db", "condition": "HEALTHY"},
        ],
        startTimeout=2,
        stopTimeout=120,
        restartPolicy={"enabled": True, "ignoredExitCodes": [0, 255]},
        readonlyRootFilesystem=True,
        linuxParameters={
            "capabilities": {"add": ["SYS_PTRACE"], "drop": ["ALL"]},
            "initProcessEnabled": True,
        },
        ulimits=[
            {"name": "nofile", "softLimit": 1024, "hardLimit": 1048576},
            {"name": "core", "softLimit": 0, "hardLimit": -1},
        ],
        systemControls=[
            {"namespace": "net.ipv4.ip_unprivileged_port_start", "value": "0"},
            {"namespace": "kernel.sem", "value": "250 32000 100 128"},
            {"namespace": "fs.mqueue.msg_max", "value": "20"},
        ],
        mountPoints=[{"sourceVolume": "data", "containerPath": "/data"}],
        volumesFrom=[{"sourceContainer": "setup", "readOnly": True}],
        portMappings=[{"containerPort": 80}, {"containerPort": 80, "protocol": "udp"}],
        interactive=True,
        pseudoTerminal=True,
    )
    database = container("db", healthCheck={"command": ["CMD-SHELL", "true"]})
    setup = container("setup", essential=False, healthCheck={"command": ["NONE"]})
    definition = define(app, database, setup, volumes=[{"name": "data"}], pidMode="task")
    assert fargate.check(definition) == []


# What is refused, one container


@pytest.mark.parametrize(
    ("members", "where", "text"),
    [
        ({"image": " "}, "image", "Container.image should not be null or empty."),
        (
            {"portMappings": [{"containerPort": 80, "hostPort": 8080}]},
            "portMappings[0].hostPort",
            "When networkMode=awsvpc, the host ports and container ports in port mappings must "
            "match.",
        ),
        (
            {"portMappings": [{"containerPort": 65536}]},
            "portMappings[0].containerPort",
            "Invalid 'containerPort' setting for container 'app'.",
        ),
        (
            {"memory": 513},
            "memory",
            "The 'memory' setting for container 'app' is greater than for the task.",
        ),
        (
            {"memory": 100, "memoryReservation": 100},
            "memory",
            "container 'app': memory (100) is not above memoryReservation (100)",
        ),
        ({"memory": 5}, "memory", "container 'app': memory is 5 MiB, the least is 6"),
        (
            {"portMappings": [{"protocol": "udp"}]},
            "portMappings[0].containerPort",
            "Invalid 'containerPort' setting for container 'app'.",
        ),
        (
            {"portMappings": [{"containerPortRange": "90-80"}]},
            "portMappings[0].containerPortRange",
            "container 'app': '90-80' is not a range of ports such as 8000-8010",
        ),
        (
            {"portMappings": [{"containerPortRange": "80-90", "containerPort": 80}]},
            "portMappings[0]",
            "container 'app': with containerPortRange there is no containerPort and no hostPort",
        ),
        ({"cpu": -1}, "cpu", "container 'app': cpu is -1"),
        ({"stopTimeout": 121}, "stopTimeout", "is 121, allowed is 2 to 120"),
        ({"startTimeout": 1}, "startTimeout", "is 1, allowed is 2 to 120"),
        ({"workingDirectory": "srv"}, "workingDirectory", "'srv' is not an absolute path"),
        ({"workingDirectory": "/a\0b"}, "workingDirectory", "contains a NUL byte"),
        ({"command": ["a", "b\0"]}, "command", "command contains a NUL byte"),
        ({"entryPoint": ["\0"]}, "entryPoint", "entryPoint contains a NUL byte"),
        (
            {"environment": [{"name": "A", "value": "\0"}]},
            "environment",
            "environment contains a NUL byte",
        ),
        (
            {"environment": [{"name": "A=B", "value": "c"}]},
            "environment[0].name",
            "'A=B' cannot name an environment variable",
        ),
        ({"user": "a:b:c"}, "user", "user 'a:b:c' is not user, uid, user:group or uid:gid"),
        ({"user": ""}, "user", "user '' is not user"),
        (
            {"dependsOn": [{"containerName": "db", "condition": "START"}]},
            "dependsOn[0]",
            "dependsOn names 'db', which is not there",
        ),
        (
            {"dependsOn": [{"containerName": "app", "condition": "START"}]},
            "dependsOn[0]",
            "dependsOn names the container itself",
        ),
        ({"healthCheck": {"command": ["true"]}}, "healthCheck.command", "is not CMD with"),
        ({"healthCheck": {"command": ["CMD"]}}, "healthCheck.command", "is not CMD with"),
        (
            {"healthCheck": {"command": ["NONE"], "interval": 4}},
            "healthCheck.interval",
            "is 4, allowed is 5 to 300",
        ),
        (
            {"healthCheck": {"command": ["NONE"], "timeout": 61}},
            "healthCheck.timeout",
            "is 61, allowed is 2 to 60",
        ),
        (
            {"healthCheck": {"command": ["NONE"], "retries": 0}},
            "healthCheck.retries",
            "is 0, allowed is 1 to 10",
        ),
        (
            {"healthCheck": {"command": ["NONE"], "startPeriod": 301}},
            "healthCheck.startPeriod",
            "is 301, allowed is 0 to 300",
        ),
        (
            {"restartPolicy": {"enabled": True, "restartAttemptPeriod": 59}},
            "restartPolicy.restartAttemptPeriod",
            "is 59, allowed is 60 to 1800",
        ),
        (
            {"restartPolicy": {"enabled": True, "ignoredExitCodes": [0] * 51}},
            "restartPolicy.ignoredExitCodes",
            "ignores 51 exit codes, at most 50",
        ),
        (
            {"ulimits": [{"name": "files", "softLimit": 1, "hardLimit": 1}]},
            "ulimits[0].name",
            "there is no ulimit 'files'",
        ),
        (
            {"ulimits": [{"name": "nofile", "softLimit": 1, "hardLimit": 1048577}]},
            "ulimits[0].hardLimit",
            "is 1048577, allowed is 0 to 1048576",
        ),
        (
            {"ulimits": [{"name": "core", "softLimit": -1, "hardLimit": 1}]},
            "ulimits[0]",
            "ulimit core has soft above hard",
        ),
        (
            {"ulimits": [{"name": "core", "softLimit": 1, "hardLimit": 1}] * 2},
            "ulimits[1].name",
            "ulimit core is set twice",
        ),
        (
            {"systemControls": [{"namespace": "kernel.core_pattern", "value": "|/x"}]},
            "systemControls[0].namespace",
            "Fargate does not let 'kernel.core_pattern' be set",
        ),
        (
            {"systemControls": [{"namespace": "net.core.somaxconn", "value": " "}]},
            "systemControls[0].value",
            "systemControls[0].value is empty",
        ),
        (
            {"systemControls": [{"namespace": "net.core.somaxconn", "value": "1"}] * 2},
            "systemControls[1].namespace",
            "net.core.somaxconn is set twice",
        ),
        (
            {"linuxParameters": {"capabilities": {"add": ["NET_ADMIN"]}}},
            "linuxParameters.capabilities.add[0]",
            "Fargate adds no capability but SYS_PTRACE: NET_ADMIN",
        ),
        (
            {"linuxParameters": {"capabilities": {"drop": ["CAP_CHOWN"]}}},
            "linuxParameters.capabilities.drop[0]",
            "there is no capability 'CAP_CHOWN'",
        ),
        (
            {"mountPoints": [{"sourceVolume": "logs", "containerPath": "/logs"}]},
            "mountPoints[0].sourceVolume",
            "the task has no volume 'logs'",
        ),
        (
            {"mountPoints": [{"sourceVolume": "data", "containerPath": "data"}]},
            "mountPoints[0].containerPath",
            "'data' is not an absolute path",
        ),
        (
            {"mountPoints": [{"sourceVolume": "data", "containerPath": "/data/../"}]},
            "mountPoints[0].containerPath",
            "nothing can be mounted on /",
        ),
        (
            {
                "mountPoints": [
                    {"sourceVolume": "data", "containerPath": "/data"},
                    {"sourceVolume": "data", "containerPath": "/data/"},
                ]
            },
            "mountPoints[1].containerPath",
            "two volumes are mounted on '/data/'",
        ),
        (
            {"volumesFrom": [{"sourceContainer": "db"}]},
            "volumesFrom[0].sourceContainer",
            "volumesFrom names 'db', which is not there",
        ),
        (
            {"volumesFrom": [{"sourceContainer": "app"}]},
            "volumesFrom[0].sourceContainer",
            "volumesFrom names the container itself",
        ),
    ],
)
def test_a_container_that_fargate_would_refuse_is_refused_for_that_alone(
    members: dict[str, Any], where: str, text: str
) -> None:
    found = refusals(define(container(**members), volumes=[{"name": "data"}]))
    assert [found_where for found_where, _ in found] == [f"containerDefinitions[0].{where}"]
    assert text in found[0][1]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("privileged", True),
        ("hostname", "web"),
        ("links", ["db"]),
        ("extraHosts", [{"hostname": "db", "ipAddress": "10.0.0.1"}]),
        ("dnsServers", ["10.0.0.2"]),
        ("dnsSearchDomains", ["example.com"]),
        ("disableNetworking", True),
        ("dockerSecurityOptions", ["no-new-privileges"]),
        ("resourceRequirements", [{"type": "GPU", "value": "1"}]),
        ("linuxParameters.devices", [{"hostPath": "/dev/kvm"}]),
        ("linuxParameters.tmpfs", [{"containerPath": "/tmp", "size": 64}]),
        ("linuxParameters.sharedMemorySize", 64),
        ("linuxParameters.maxSwap", 0),
        ("linuxParameters.swappiness", 0),
    ],
)
def test_what_fargate_has_not_is_refused_by_name(member: str, value: object) -> None:
    *above, name = member.split(".")
    members: dict[str, Any] = {above[0]: {name: value}} if above else {name: value}
    assert refusals(define(container(**members))) == [
        (
            f"containerDefinitions[0].{member}",
            f"container 'app': {member} is not supported on Fargate",
        )
    ]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("secrets", [{"name": "A", "valueFrom": "a"}]),
        ("environmentFiles", [{"type": "s3", "value": "arn:aws:s3:::b/a.env"}]),
        ("logConfiguration", {"logDriver": "awslogs"}),
        ("repositoryCredentials", {"credentialsParameter": "a"}),
        ("firelensConfiguration", {"type": "fluentbit"}),
        ("credentialSpecs", ["credentialspecdomainless:a"]),
    ],
)
def test_what_is_not_built_yet_is_refused_and_not_forgotten(member: str, value: Any) -> None:
    assert refusals(define(container(**{member: value}))) == [
        (f"containerDefinitions[0].{member}", f"container 'app': {member} is not implemented yet")
    ]


@pytest.mark.parametrize(
    ("member", "value", "text"),
    [
        ("host.sourcePath", {"sourcePath": "/srv"}, "is not supported on Fargate"),
        ("dockerVolumeConfiguration", {"scope": "task"}, "is not supported on Fargate"),
        ("efsVolumeConfiguration", {"fileSystemId": "fs-1"}, "is not implemented yet"),
        ("configuredAtLaunch", True, "is not implemented yet"),
    ],
)
def test_a_volume_that_is_not_empty_is_refused(member: str, value: object, text: str) -> None:
    definition = define(volumes=[{"name": "v", member.split(".")[0]: value}])
    assert refusals(definition) == [(f"volumes[0].{member}", f"volume 'v': {member} {text}")]


def test_members_that_say_nothing_are_as_if_left_out() -> None:
    nothing: dict[str, Any] = {
        **{"privileged": False, "disableNetworking": False, "hostname": "", "links": []},
        **{"dnsServers": [], "extraHosts": [], "resourceRequirements": [], "secrets": []},
        "linuxParameters": {"devices": [], "tmpfs": []},
    }
    volume = {"name": "v", "host": {}}
    assert refusals(define(container(**nothing), volumes=[volume])) == []


def test_declarations_are_accepted_and_kept() -> None:
    mapping = {"containerPortRange": "8000-8010", "name": "web", "appProtocol": "http"}
    wanted = container(portMappings=[mapping], dockerLabels={"a": "b"})
    accepted = fargate.accept(define(wanted)).container_definitions[0]
    assert accepted == define(wanted).container_definitions[0]


@pytest.mark.parametrize("other", [{"containerPort": 8010}, {"containerPortRange": "8010-8020"}])
def test_a_port_is_in_one_range_only(other: dict[str, Any]) -> None:
    ports = [{"containerPortRange": "8000-8010"}, other]
    assert refusals(define(container(portMappings=ports))) == [
        (
            "containerDefinitions[0].portMappings[1]",
            "TCP host port '8010' is mapped multiple times in task.",
        )
    ]


def test_the_pid_namespace_of_the_host_is_refused() -> None:
    assert refusals(define(pidMode="host")) == [
        ("pidMode", "pidMode host is not supported on Fargate")
    ]


@pytest.mark.parametrize(
    "namespace",
    ["net", "net.", "net..x", "net./../kernel", "net.a/b", "kernel.sem.x", "fs.mqueue", "vm.x", ""],
)
def test_no_system_control_leads_out_of_the_allowed_names(namespace: str) -> None:
    control = {"namespace": namespace, "value": "1"}
    assert len(refusals(define(container(systemControls=[control])))) == 1


@pytest.mark.parametrize(
    "members",
    [
        {"linuxParameters": {"capabilities": {"add": ["SYS_PTRACE"]}}},
        {"systemControls": [{"namespace": "net.core.somaxconn", "value": "1"}]},
        {"restartPolicy": {"enabled": True}},
    ],
)
def test_what_came_with_platform_1_4_is_refused_before_it(members: dict[str, Any]) -> None:
    definition = define(container(**members))
    assert refusals(definition) == []
    ((_, text),) = refusals(definition, platform_version="1.3.0")
    assert "Fargate platform version 1.4.0" in text


@pytest.mark.parametrize(("size", "is_allowed"), [(20, 0), (21, 1), (200, 1), (201, 0), (-1, 0)])
def test_ephemeral_storage_is_21_to_200_gib(size: int, is_allowed: bool) -> None:
    found = refusals(define(ephemeralStorage={"sizeInGiB": size}))
    text = f"ephemeralStorage.sizeInGiB is {size}, allowed is 21 to 200"
    assert found == ([] if is_allowed else [("ephemeralStorage.sizeInGiB", text)])


@pytest.mark.parametrize("options", [{"platform_version": "1.3.0"}, {"era": "2017"}])
def test_ephemeral_storage_needs_platform_1_4(options: dict[str, Any]) -> None:
    text = "ephemeralStorage needs Fargate platform version 1.4.0"
    asked = define(ephemeralStorage={"sizeInGiB": 30})
    assert refusals(asked, **options) == [("ephemeralStorage", text)]


def test_a_task_has_20_gib_or_what_it_asks_for_and_had_10_and_4() -> None:
    asked = define(ephemeralStorage={"sizeInGiB": 30})
    assert fargate.storage(define()) == TaskStorage(size_gib=20)
    assert fargate.storage(asked) == TaskStorage(size_gib=30)
    for options in ({"platform_version": "1.3.0"}, {"era": "2017"}):
        found = fargate.storage(define(), **options)  # type: ignore[arg-type]
        assert found == TaskStorage(size_gib=10, volumes_gib=4)


def test_pid_mode_is_refused_before_platform_1_4() -> None:
    assert refusals(define(pidMode="task"), platform_version="1.3.0") == [
        ("pidMode", "pidMode needs Fargate platform version 1.4.0")
    ]


def test_there_were_no_linux_parameters_in_2017() -> None:
    definition = define(container(linuxParameters={"initProcessEnabled": True}))
    ((where, text),) = refusals(definition, era="2017")
    assert where == "containerDefinitions[0].linuxParameters"
    assert text == "container 'app': Fargate of 2017 has no linuxParameters"


# What is refused, the task


@pytest.mark.parametrize(
    ("definition", "where", "text"),
    [
        (define(family="a b"), "family", "family 'a b' is not 1 to 255 letters"),
        (
            define(*[container(f"c{n}") for n in range(11)]),
            "containerDefinitions",
            "a task has 1 to 10 containers, not 11",
        ),
        (
            define(container(essential=False)),
            "containerDefinitions",
            "no container of the task is essential",
        ),
        (
            define(container("a"), container("a")),
            "containerDefinitions[1].name",
            "two containers have the name 'a'",
        ),
        (
            define(container("a.b")),
            "containerDefinitions[0].name",
            "container 'a.b' is not 1 to 255 letters, digits, hyphens and underscores",
        ),
        (
            define(container("a", cpu=128), container("b", cpu=129)),
            "cpu",
            "the containers ask for 257 CPU units, the task has 256",
        ),
        (
            define(container("a", memoryReservation=256), container("b", memoryReservation=257)),
            "memory",
            "the containers reserve 513 MiB of memory, the task has 512",
        ),
        (
            define(
                container("a", portMappings=[{"containerPort": 3000}]),
                container("b", portMappings=[{"containerPort": 3000}]),
            ),
            "containerDefinitions[1].portMappings[0]",
            "TCP host port '3000' is mapped multiple times in task.",
        ),
        (
            define(volumes=[{"name": "v"}, {"name": "v"}]),
            "volumes[1].name",
            "two volumes have the name 'v'",
        ),
        (define(volumes=[{"name": "../v"}]), "volumes[0].name", "volume '../v' is not 1 to 255"),
        (
            define(
                container("a", dependsOn=[{"containerName": "b", "condition": "COMPLETE"}]),
                container("b"),
            ),
            "containerDefinitions[0].dependsOn[0]",
            "container 'a': COMPLETE cannot be awaited of 'b', which is essential",
        ),
        (
            define(
                container("a", dependsOn=[{"containerName": "b", "condition": "HEALTHY"}]),
                container("b", healthCheck={"command": ["NONE"]}),
            ),
            "containerDefinitions[0].dependsOn[0]",
            "container 'a': HEALTHY cannot be awaited of 'b', which has no healthCheck",
        ),
        (
            define(
                container("a", dependsOn=[{"containerName": "b", "condition": "START"}] * 2),
                container("b"),
            ),
            "containerDefinitions[0].dependsOn[1]",
            "container 'a': dependsOn names 'b' twice",
        ),
        (
            define(
                container("a", dependsOn=[{"containerName": "b", "condition": "START"}]),
                container("b", dependsOn=[{"containerName": "a", "condition": "START"}]),
            ),
            "containerDefinitions",
            "containers wait for each other: 'a' for 'b', 'b' for 'a'",
        ),
        (
            define(
                container("a", dependsOn=[{"containerName": "b", "condition": "START"}]),
                container("b", volumesFrom=[{"sourceContainer": "a"}]),
            ),
            "containerDefinitions",
            "containers wait for each other: 'a' for 'b', 'b' for 'a'",
        ),
        (
            define(container(command=["x" * 65536])),
            "",
            "bytes of JSON, 65536 are allowed",
        ),
    ],
)
def test_a_task_that_fargate_would_refuse_is_refused_for_that_alone(
    definition: TaskDefinition, where: str, text: str
) -> None:
    found = refusals(definition)
    assert [found_where for found_where, _ in found] == [where]
    assert text in found[0][1]


def test_the_longest_cycle_is_told_in_the_order_of_waiting() -> None:
    ring = [
        container(f"c{n}", dependsOn=[{"containerName": f"c{(n + 1) % 4}", "condition": "START"}])
        for n in range(4)
    ]
    ((_, text),) = refusals(define(*ring))
    steps = text.removeprefix("containers wait for each other: ").split(", ")
    assert sorted(steps) == [f"'c{n}' for 'c{(n + 1) % 4}'" for n in range(4)]


def test_no_container_at_all_is_refused() -> None:
    definition = TaskDefinition(family="f", cpu="256", memory="512", container_definitions=())
    assert refusals(definition) == [
        ("containerDefinitions", "a task has 1 to 10 containers, not 0")
    ]


def test_every_breach_is_listed_and_the_first_is_what_ecs_says() -> None:
    definition = define(
        container("a", stopTimeout=1, image=""),
        container("b", memory=1024, user=":"),
        cpu="1",
    )
    with pytest.raises(Incompatible) as refused:
        fargate.accept(definition)
    assert refused.value.code == "ClientException"
    assert [found.where for found in refused.value.all] == [
        "cpu",
        "containerDefinitions[0].image",
        "containerDefinitions[0].stopTimeout",
        "containerDefinitions[1].user",
        "containerDefinitions[1].memory",
    ]
    assert str(refused.value) == refused.value.all[0].text


@pytest.mark.parametrize(
    "broken",
    [
        ContainerDefinition(name="a", image="b", cpu="many"),  # type: ignore[arg-type]
        ContainerDefinition(name="a", image="b", command="true"),  # type: ignore[arg-type]
        ContainerDefinition(name="a", image="b\udc80"),
        ContainerDefinition(name="a", image="b", cpu=object()),  # type: ignore[arg-type]
        ContainerDefinition(
            name="a",
            image="b",
            port_mappings=(PortMapping(container_port=1, protocol="sctp"),),  # type: ignore[arg-type]
        ),
    ],
)
def test_members_of_a_wrong_type_are_refused_as_malformed(broken: ContainerDefinition) -> None:
    definition = TaskDefinition(
        family="f", cpu="256", memory="512", container_definitions=(broken,)
    )
    ((_, text),) = refusals(definition)
    assert text.startswith("the task definition is malformed: ")


@given(st.text(), st.text(), st.text(), st.text())
def test_whatever_is_in_a_name_a_refusal_is_one_printable_line(
    name: str, other: str, path: str, family: str
) -> None:
    definition = define(
        container(
            name,
            user=path,
            workingDirectory=path,
            dependsOn=[{"containerName": other, "condition": "HEALTHY"}],
            mountPoints=[{"sourceVolume": other, "containerPath": path}],
            volumesFrom=[{"sourceContainer": other}],
            systemControls=[{"namespace": other, "value": path}],
            environment=[{"name": path, "value": path}],
        ),
        volumes=[{"name": other}],
        family=family,
    )
    for _, text in refusals(definition):
        assert text.isprintable()
        assert len(text) < 300
