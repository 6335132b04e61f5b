"""Why a pull failed, in the words of ECS.

A task whose image cannot be had stops with `CannotPullContainerError: ...`. On platform 1.4 the
rest is containerd's own text: `failed to resolve ref` when the name led to no manifest, `failed to
copy` when content broke off afterwards, each behind the agent's "has been retried N time(s)". The
counts are those that Fargate shows for these two steps. A text names the image, but where ECS's own
does not.
"""

from __future__ import annotations

import errno

from sandbox.errors import (
    ImageError,
    ImageNotFound,
    KernelError,
    ReferenceInvalid,
    RegistryError,
    SandboxError,
)
from sandbox.images.answers import phrase
from sandbox.images.documents import NoSuchPlatform
from sandbox.images.reference import AnyReference, Reference

_RESOLVE = "CannotPullContainerError: pull image manifest has been retried 1 time(s)"
_COPY = "CannotPullContainerError: ref pull has been retried 5 time(s)"
_DENIED = (
    "pull access denied, repository does not exist or may require authorization: "
    "server message: insufficient_scope: authorization failed"
)
_MAX_REASON = 1024


class TransferError(RegistryError):
    """A blob of a manifest that was resolved could not be had in full."""


def pull_failure_text(
    error: SandboxError, reference: AnyReference, *, is_asked: bool = True
) -> str:
    """The stoppedReason of a task whose image could not be pulled; nobody `is_asked` for one that
    must not be."""
    text = _text(error, reference) if is_asked else f"CannotPullContainerError: {error}"
    return text[:_MAX_REASON]


def _text(error: SandboxError, reference: AnyReference) -> str:
    resolve = f"{_RESOLVE}: failed to resolve ref {reference}"
    match error:
        case ImageNotFound():
            return f"{resolve}: not found"
        case TransferError():
            return f"{_COPY}: failed to copy: httpReadSeeker: failed open: {error}"
        case RegistryError(status=401):
            return f"{resolve}: {_DENIED}"
        case RegistryError(status=int() as status) if isinstance(reference, Reference):
            said = f"{_url(error, reference)}: {status} {phrase(status)}".strip()
            return f"{resolve}: unexpected status from HEAD request to {said}"
        case RegistryError(message=message) if isinstance(reference, Reference):
            return f'{resolve}: failed to do request: Head "{_url(error, reference)}": {message}'
        case KernelError(errno=errno.ENOSPC):
            return f"{_COPY}: failed to extract layer: no space left on device"
        case KernelError():
            return f"{_COPY}: failed to extract layer: {error}"
        case ImageError() if not isinstance(error, NoSuchPlatform | ReferenceInvalid):
            about = "" if str(reference) in str(error) else f"{reference}: "
            return f"CannotPullContainerError: {about}{error}"
        case _:
            return f"CannotPullContainerError: {error}"


def _url(error: RegistryError, reference: Reference) -> str:
    return f"{error.scheme}://{reference.host}/v2/{reference.path}/manifests/{reference.target}"
