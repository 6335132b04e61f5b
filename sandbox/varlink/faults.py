"""Exceptions across the control socket: class to error name and parameters, and back.

An error is named after its class (`io.sandbox.NotFound`), so a client raises what control raised.
A subclass that is defined elsewhere travels as the class of the tree that it refines.
"""

from __future__ import annotations

import msgspec

from sandbox import errors
from sandbox.errors import SandboxError
from sandbox.varlink.frames import UNREADABLE

INTERFACE = "io.sandbox"

FIELDS: dict[type[SandboxError], tuple[str, ...]] = {
    errors.KernelError: ("call", "subject", "errno"),
    errors.Conflict: ("key", "expected", "actual"),
    errors.RegistryError: ("reference", "message", "status"),
    errors.TaskFailed: ("cause", "exit_code"),
    errors.Ec2Error: ("code", "message"),
}
"""The arguments, in order, of exceptions that take more than a message."""


class Fault(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Every parameter that an error may have; `message` is always there, for people."""

    message: str = ""
    call: str | None = None
    subject: str | None = None
    errno: int | None = None
    key: str | None = None
    expected: int | None = None
    actual: int | None = None
    reference: str | None = None
    status: int | None = None
    cause: str | None = None
    exit_code: int | None = None
    code: str | None = None


CLASSES: dict[str, type[SandboxError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SandboxError)
}
"""What can be told apart at the other end: the tree in `sandbox.errors`."""


def encode(error: SandboxError) -> tuple[str, Fault]:
    """The nearest class of the tree, and its arguments."""
    kind = next(each for each in type(error).__mro__ if each in CLASSES.values())
    fields = [name for name in FIELDS.get(kind, ()) if name != "message"]
    parameters = {name: getattr(error, name) for name in fields}
    message = error.message if isinstance(error, errors.RegistryError) else str(error)
    return f"{INTERFACE}.{kind.__name__}", Fault(message, **parameters)


def decode(name: str, parameters: bytes) -> SandboxError:
    """The exception to raise; a SandboxError with the name in it when it is none of ours."""
    kind = CLASSES.get(name.removeprefix(f"{INTERFACE}."))
    try:
        fault = msgspec.json.decode(parameters, type=Fault)
    except UNREADABLE:
        kind = None
    if kind is None:
        return SandboxError(f"agent answered {name} {parameters[:200].decode(errors='replace')}")
    return kind(*(getattr(fault, field) for field in FIELDS.get(kind, ("message",))))
