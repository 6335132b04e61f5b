"""Every exception that Sandbox raises on purpose.

    SandboxError
    ├── KernelError          a system call said no: call, subject, errno
    ├── ConfigError          a setting, a directory or the host is not usable
    │   └── AgentRunning     another agent holds the state directory
    ├── StoreError           the revision log cannot be read or written
    │   └── Conflict         a compared revision moved; read again and retry
    ├── RegistryError        a registry answered wrongly or not at all: reference, status
    ├── ImageError           an image, layer, archive or image configuration is not acceptable
    │   ├── ImageNotFound    no such image here (or there)
    │   └── ReferenceInvalid not an image name
    ├── NetworkError         an interface, group or route cannot be made
    ├── TaskFailed           a task ended before it ran: cause (an ECS text)
    ├── ApiError             a request is refused: code and text as ECS has them
    │   ├── ClientException
    │   ├── InvalidParameterException
    │   ├── NotFound         no such task, container or object
    │   └── Ec2Error         the same of EC2, which has a code for each reason
    └── AgentUnavailable     no agent answers on the control socket

An error says what was attempted, on which object, what the system answered and, where it is
known, what to do. Messages are one line, without a full stop, unless AWS's own text has one.
"""

from __future__ import annotations

import os


class SandboxError(Exception):
    """Root of the tree. `str(error)` is one line that may be shown to a user."""


class KernelError(SandboxError):
    """A system call failed. `call` is its name, `subject` what it was asked to work on."""

    def __init__(self, call: str, subject: str, errno: int) -> None:
        super().__init__(call, subject, errno)
        self.call = call
        self.subject = subject
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.call} {self.subject}: {os.strerror(self.errno)}".replace("  ", " ")


class ConfigError(SandboxError):
    """A setting, a directory or the host itself cannot be used as it is."""


class AgentRunning(ConfigError):
    """Another agent holds the state directory (its lock is taken)."""


class StoreError(SandboxError):
    """The revision log cannot be read or written; the only error that ends the agent."""


class Conflict(StoreError):
    """A revision that a transaction compared has moved. Nothing was written."""

    def __init__(self, key: str, expected: int, actual: int) -> None:
        super().__init__(key, expected, actual)
        self.key = key
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.key} is at revision {self.actual}, not {self.expected}"


class RegistryError(SandboxError):
    """A registry refused, broke off or answered nonsense. `status` is HTTP's, if there was one."""

    scheme = "https"
    """What was spoken with it; `http` where that was allowed."""

    def __init__(self, reference: str, message: str, status: int | None = None) -> None:
        super().__init__(reference, message, status)
        self.reference = reference
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return f"{self.reference}: {self.message}"


class ImageError(SandboxError):
    """An image, a layer, an archive or an image configuration is not acceptable."""


class ImageNotFound(ImageError):
    """No image of that name is stored here, or the registry has none."""


class ReferenceInvalid(ImageError):
    """Not an image name by Docker's rules."""


class NetworkError(SandboxError):
    """An interface, a group or a route cannot be made."""


class TaskFailed(SandboxError):
    """A task ended before it ran. `cause` is the text that ECS would give as stoppedReason."""

    def __init__(
        self, cause: str, exit_code: int | None = None, *, container: str | None = None
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.exit_code = exit_code
        """126 (not executable) or 127 (not found) as a shell has them, when that was it; 125 for
        a command whose output could not be written."""
        self.container = container
        """Which one is to blame, when one of several is."""


class ApiError(SandboxError):
    """A request is refused. `code` is ECS's exception name, `str(error)` ECS's text."""

    code = "ServerException"


class ClientException(ApiError):
    code = "ClientException"


class InvalidParameterException(ApiError):
    code = "InvalidParameterException"


class NotFound(ApiError):
    """No such task, container, image or volume."""

    code = "ResourceNotFoundException"


class Ec2Error(ApiError):
    """A request about the network is refused: code and text as EC2 has them."""

    # EC2's codes are no exceptions of its model, as ECS's are, but a list in its API Reference
    # ("Error codes for the Amazon EC2 API"): so they are values here, not classes.
    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class AgentUnavailable(SandboxError):
    """No agent answers on the control socket."""
