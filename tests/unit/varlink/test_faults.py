"""An exception that control raises is the exception that the client gets."""

from __future__ import annotations

import errno

import msgspec
import pytest

from sandbox import errors
from sandbox.varlink import faults

RAISED = [
    errors.NotFound("no task abc"),
    errors.ClientException("No Fargate configuration exists for given values."),
    errors.InvalidParameterException("Invalid 'containerPort' setting for container 'NAME'."),
    errors.ConfigError("cannot"),
    errors.AgentRunning("held"),
    errors.KernelError("openat2", "/proc/self", errno.EACCES),
    errors.Conflict("task/a", 3, 4),
    errors.RegistryError("host/name", "not found", 404),
    errors.RegistryError("host/name", "no route"),
    errors.TaskFailed("exec: no such file", 127),
    errors.Ec2Error("InvalidVpcID.NotFound", "The vpc ID 'vpc-0' does not exist"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_class_arguments_and_text_survive(error: errors.SandboxError) -> None:
    name, fault = faults.encode(error)
    again = faults.decode(name, msgspec.json.encode(fault))
    assert type(again) is type(error)
    assert (again.args, str(again)) == (error.args, str(error))
    assert vars(again) == vars(error)


def test_a_refinement_travels_as_the_class_of_the_tree() -> None:
    class OutOfSpace(errors.ImageError):
        pass

    name, _ = faults.encode(OutOfSpace("the disk is full"))
    assert name == "io.sandbox.ImageError"


@pytest.mark.parametrize("parameters", [b"{}", b"[]", b"nonsense", b'{"message": 7}'])
def test_an_error_that_is_none_of_ours_is_told_as_it_came(parameters: bytes) -> None:
    again = faults.decode("org.varlink.service.MethodNotFound", parameters)
    assert type(again) is errors.SandboxError
    assert "MethodNotFound" in str(again)
