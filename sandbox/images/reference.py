"""Image names, by the rules of Docker's reference grammar.

    reference   := [domain "/"] path [":" tag] ["@" digest]
    busybox     -> docker.io/library/busybox:latest
    me/tool     -> docker.io/me/tool:latest
    host:5000/x -> host:5000/x:latest

The first component is a domain when it contains "." or ":", is "localhost", or is not lower case;
that is the whole rule, and it decides between Docker Hub and any other registry. A digest wins over
a tag: with both, the tag is only remembered. Two names mean files of this machine instead:
`oci:DIR[:TAG]` (split at the last colon after the last slash) and `docker-archive:FILE`.

Stricter than Docker in one place: sha256 is the only digest algorithm, because a digest becomes a
file name and a part of a URL.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import msgspec

from sandbox.errors import ReferenceInvalid

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_COMPONENT}(?:\.{_COMPONENT})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_SEGMENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_REFERENCE = re.compile(
    rf"(?P<domain>{_DOMAIN})/(?P<path>{_SEGMENT}(?:/{_SEGMENT})*)"
    rf"(?::(?P<tag>{_TAG}))?(?:@(?P<digest>[^@]+))?"
)
_ANY_TAG = re.compile(_TAG)
_MAX_LENGTH = 1024
"""Longest text looked at: 255 of path, 128 of tag, a digest, and a domain's 253 fit well."""
_MAX_PATH = 255
_SHOWN = 80


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A normalised name in a registry; has a tag, a digest, or both."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        """The normalised name; without the tag when a digest decides, as Docker and ECS show it."""
        name = f"{self.domain}/{self.path}"
        return f"{name}@{self.digest}" if self.digest else f"{name}:{self.tag}"

    @property
    def host(self) -> str:
        """Where the registry answers: Docker Hub's name is not its host."""
        return "registry-1.docker.io" if self.domain == "docker.io" else self.domain

    @property
    def target(self) -> str:
        """What is asked of the registry."""
        return self.digest or self.tag or "latest"


class LayoutReference(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a directory of OCI's image layout."""

    directory: Path
    tag: str | None = None

    def __str__(self) -> str:
        return f"oci:{self.directory}" + (f":{self.tag}" if self.tag else "")


class ArchiveReference(msgspec.Struct, frozen=True, kw_only=True):
    """An image in a file as `docker save` writes it."""

    file: Path

    def __str__(self) -> str:
        return f"docker-archive:{self.file}"


AnyReference = Reference | LayoutReference | ArchiveReference


def parse(text: str) -> AnyReference:
    """The reference that a user meant by `text`; ReferenceInvalid says what is wrong with it.

    Paths of files stay as they were given: who knows the caller's directory makes them absolute.
    """
    if len(text) > _MAX_LENGTH:
        raise _invalid(text, f"longer than {_MAX_LENGTH} characters")
    if text.startswith("oci:"):
        return _layout(text)
    if text.startswith("docker-archive:"):
        return ArchiveReference(file=_path(text, text.removeprefix("docker-archive:")))
    return parse_name(text)


def parse_name(text: str) -> Reference:
    """Like `parse`, for names in a registry only."""
    if not text:
        raise _invalid(text, "empty")
    if re.fullmatch("[a-f0-9]{64}", text):
        raise _invalid(text, "64 hexadecimal digits are an id, not a name")
    domain, remainder = _split_domain(text)
    if (path := re.split("[:@]", remainder, maxsplit=1)[0]) != path.lower():
        raise _invalid(text, "the repository name must be lower case")
    match = _REFERENCE.fullmatch(f"{domain}/{remainder}")
    if match is None:
        raise _invalid(text, "expected [HOST[:PORT]/]NAME[:TAG][@DIGEST]")
    if len(match["path"]) > _MAX_PATH:
        raise _invalid(text, f"the repository name is longer than {_MAX_PATH} characters")
    digest = match["digest"]
    if digest is not None and not DIGEST.fullmatch(digest):
        raise _invalid(text, "the digest must be sha256: and 64 lower-case hexadecimal digits")
    tag = match["tag"] or (None if digest else "latest")
    return Reference(domain=domain, path=match["path"], tag=tag, digest=digest)


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine by its very name, without asking a resolver."""
    name = hostname(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def hostname(host: str) -> str:
    """`host[:port]` without the port, and without the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _split_domain(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if not slash:
        return "docker.io", f"library/{text}"
    if first == "index.docker.io":
        first = "docker.io"
    is_domain = first == "localhost" or "." in first or ":" in first or first != first.lower()
    domain, path = (first, rest) if is_domain else ("docker.io", text)
    if domain == "docker.io" and "/" not in path:
        path = f"library/{path}"
    return domain, path


def _layout(text: str) -> LayoutReference:
    body = text.removeprefix("oci:")
    head, slash, last = body.rpartition("/")
    name, colon, tag = last.rpartition(":")
    if not colon:
        return LayoutReference(directory=_path(text, body))
    if not _ANY_TAG.fullmatch(tag):
        raise _invalid(text, "expected oci:DIR[:TAG]")
    return LayoutReference(directory=_path(text, head + slash + name), tag=tag)


def _path(text: str, path: str) -> Path:
    if not path or "\0" in path:
        raise _invalid(text, "a path is missing after the colon")
    return Path(path)


def _invalid(text: str, why: str) -> ReferenceInvalid:
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return ReferenceInvalid(f"invalid reference format: {shown!r}: {why}")
