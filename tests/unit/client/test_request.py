"""What a caller gives becomes the request that control checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.client.place import RUN_DIR, STATE_DIR, Place
from sandbox.client.request import task_request
from sandbox.errors import InvalidParameterException
from sandbox.model.request import RunRequest
from sandbox.model.task import (
    ContainerDefinition,
    KeyValuePair,
    LinuxParameters,
    MountPoint,
    PortMapping,
    TaskDefinition,
    Ulimit,
    Volume,
)


def test_an_image_alone_is_the_smallest_fargate_task() -> None:
    assert task_request(image="tiny") == RunRequest(
        definition=TaskDefinition(
            family="run",
            cpu="256",
            memory="512",
            container_definitions=(ContainerDefinition(name="main", image="tiny"),),
        )
    )


def test_every_option_has_its_place() -> None:
    request = task_request(
        image="tiny",
        command=["a", "b"],
        cpu="1 vCPU",
        memory=2048,
        name="web",
        environment={"A": "1", "B": ""},
        user="1:2",
        working_directory="/srv",
        entry_point=[],
        read_only=True,
        init=True,
        volumes=["data:/data", "data:/again:ro"],
        ulimits=["nofile=10:20", "core=0"],
        ports=["80", "53/udp"],
        stop_timeout=2,
        interactive=True,
        terminal=True,
        pull="never",
        platform="linux/arm64",
        platform_version="1.3.0",
        remove=True,
    )
    assert request.definition.container_definitions == (
        ContainerDefinition(
            name="web",
            image="tiny",
            command=("a", "b"),
            entry_point=(),
            environment=(KeyValuePair(name="A", value="1"), KeyValuePair(name="B", value="")),
            user="1:2",
            working_directory="/srv",
            readonly_root_filesystem=True,
            linux_parameters=LinuxParameters(init_process_enabled=True),
            mount_points=(
                MountPoint(source_volume="data", container_path="/data"),
                MountPoint(source_volume="data", container_path="/again", read_only=True),
            ),
            ulimits=(
                Ulimit(name="nofile", soft_limit=10, hard_limit=20),
                Ulimit(name="core", soft_limit=0, hard_limit=0),
            ),
            port_mappings=(
                PortMapping(container_port=80),
                PortMapping(container_port=53, protocol="udp"),
            ),
            stop_timeout=2,
            interactive=True,
            pseudo_terminal=True,
        ),
    )
    assert request.definition.volumes == (Volume(name="data"),)
    assert (request.definition.family, request.definition.memory) == ("web", "2048")
    assert (request.pull, request.platform, request.platform_version, request.remove) == (
        "never",
        "linux/arm64",
        "1.3.0",
        True,
    )


@pytest.mark.parametrize("text", ["/host:/path", "./here:/path", "../up:/path", "~/me:/path"])
def test_host_directories_are_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="sandbox cp"):
        task_request(image="tiny", volumes=[text])


@pytest.mark.parametrize("text", ["data", ":/path", "data:path", "data:/path:x", ""])
def test_a_volume_is_a_name_and_an_absolute_path(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="NAME:/path"):
        task_request(image="tiny", volumes=[text])


@pytest.mark.parametrize("text", ["8080:80", "127.0.0.1:8080:80/tcp"])
def test_publishing_a_port_of_the_host_points_to_the_public_address(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="--public-ip"):
        task_request(image="tiny", ports=[text])


@pytest.mark.parametrize("text", ["", "http", "80/sctp", "-1", "8\u0660"])
def test_a_port_is_a_number(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="expected PORT"):
        task_request(image="tiny", ports=[text])


@pytest.mark.parametrize("text", ["nofile", "nofile=", "nofile=a", "nofile=1:b"])
def test_a_ulimit_has_numbers(text: str) -> None:
    with pytest.raises(InvalidParameterException, match="NAME=SOFT"):
        task_request(image="tiny", ulimits=[text])


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"comand": ["a"]}, "containers[0] has no member 'comand', did you mean 'command'?"),
        ({"port_mappings": []}, "containers[0] has no member 'port_mappings'"),
        (
            {"portMappings": [{"containerPort": 1}, {"port": 80}]},
            "containers[0].portMappings[1] has no member 'port'",
        ),
        (
            {"linuxParameters": {"capabilities": {"ad": []}}},
            "containers[0].linuxParameters.capabilities has no member 'ad'",
        ),
        ({"healthCheck": {"cmd": []}}, "containers[0].healthCheck has no member 'cmd'"),
        ({"cpu": "1"}, "containers[0]: Expected `int`, got `str` - at `$.cpu`"),
    ],
)
def test_a_member_that_there_is_not_is_told_by_its_path(mapping: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidParameterException) as refused:
        task_request(containers=[{"name": "a", "image": "tiny", **mapping}])
    assert str(refused.value).startswith(text)


def test_volumes_beside_containers_are_names_or_as_ecs_has_them() -> None:
    containers = [{"name": "a", "image": "tiny", "dockerLabels": {"any": "thing"}}]
    request = task_request(
        containers=containers, volumes=["a", {"name": "b", "host": {}}, Volume(name="c")]
    )
    assert [volume.name for volume in request.definition.volumes] == ["a", "b", "c"]
    with pytest.raises(InvalidParameterException, match=r"volumes\[0\] has no member 'nam'"):
        task_request(containers=containers, volumes=[{"nam": "a"}])


@pytest.mark.parametrize("name", ["foo", "files", "streams", "comand"])
def test_an_option_that_there_is_not_is_a_type_error(name: str) -> None:
    option: Any = {name: 1}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        task_request(image="tiny", **option)


def test_what_needs_a_network_is_refused_as_the_command_line_does() -> None:
    network: Any = {"security_groups": ["sg-1"], "subnet": "s", "assign_public_ip": True}
    text = (
        "assign_public_ip, security_groups, subnet: "
        "tasks have only their loopback interface in this version"
    )
    with pytest.raises(InvalidParameterException) as refused:
        task_request(image="tiny", **network)
    assert str(refused.value) == text
    nothing: Any = {"security_groups": [], "assign_public_ip": False}
    task_request(image="tiny", **nothing)


@pytest.mark.parametrize("name", ["command", "entry_point", "volumes", "ulimits", "ports"])
def test_one_string_in_place_of_several_is_a_type_error(name: str) -> None:
    option: Any = {name: "echo hi"}
    with pytest.raises(TypeError, match=f"{name} is a sequence of strings"):
        task_request(image="tiny", **option)


@pytest.mark.parametrize("option", [{"environment": "A=1"}, {"image": 5}])
def test_an_option_of_another_kind_is_a_type_error(option: Any) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        task_request(**{"image": "tiny", **option})


def test_a_port_may_be_a_number_and_none_is_nothing() -> None:
    nothing: Any = dict.fromkeys(["command", "environment", "volumes", "ulimits"])
    (container,) = task_request(image="t", ports=[80], **nothing).definition.container_definitions
    assert container == ContainerDefinition(
        name="main", image="t", port_mappings=(PortMapping(container_port=80),)
    )


def test_a_word_for_pull_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidParameterException, match="pull 'foo' is none of missing, always"):
        task_request(image="tiny", pull="foo")  # type: ignore[arg-type]


def test_the_containers_of_a_task_may_share_a_pid_namespace() -> None:
    assert task_request(image="tiny", pid_mode="task").definition.pid_mode == "task"


def test_local_images_are_found_from_the_callers_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (container,) = task_request(image="oci:dir:tag").definition.container_definitions
    assert container.image == f"oci:{tmp_path}/dir:tag"
    mapping = {"name": "a", "image": "docker-archive:f.tar"}
    (container,) = task_request(containers=[mapping]).definition.container_definitions
    assert container.image == f"docker-archive:{tmp_path}/f.tar"


def test_options_win_over_the_environment_and_that_over_the_defaults() -> None:
    environ = {"SANDBOX_STATE_DIR": "/e/state", "SANDBOX_RUN_DIR": "/e/run"}
    assert Place.of(environ={}) == (STATE_DIR, RUN_DIR)
    assert Place.of(environ=environ) == ("/e/state", "/e/run")
    assert Place.of("/o/state", "/o/run", environ) == ("/o/state", "/o/run")


def test_an_own_state_directory_has_its_own_run_directory() -> None:
    assert Place.of("/o/state", environ={}) == ("/o/state", "/o/state/run")
    assert Place.of(STATE_DIR, environ={}).socket == "/run/sandbox/agent.sock"
