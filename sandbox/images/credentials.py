"""Who we are to a registry: Docker's `config.json`, read only when somebody names the file.

    {"auths": {"HOST": {"auth": base64("user:password")} or {"identitytoken": "..."}}}

A host may be written as `host`, `host:port`, `https://host/v1/`; Docker Hub is
`https://index.docker.io/v1/`. Credential helpers are programs of the user's desktop: an agent that
runs as root does not start them, and says so instead of pulling anonymously without a word.
"""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec

from sandbox.errors import ConfigError

_MAX_BYTES = 1 << 20
_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """A user name with a password, or a refresh token (`identity_token`) which replaces both."""

    username: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        """Never the secret: a record like this ends up in logs and tracebacks."""
        return f"Credentials(username={self.username!r})"


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _File(msgspec.Struct, frozen=True):
    auths: dict[str, _Auth] = {}
    credsStore: str = ""
    credHelpers: dict[str, str] = {}


class DockerConfig:
    """The credentials of one `config.json`."""

    def __init__(self, path: Path, content: _File) -> None:
        self._path = path
        self._content = content
        self._auths = {_host(key): auth for key, auth in content.auths.items()}
        self._helpers = {_host(key): name for key, name in content.credHelpers.items()}

    @classmethod
    def load(cls, path: Path) -> DockerConfig:
        """Read the file; ConfigError when it cannot be read or is not Docker's."""
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes")
        try:
            return cls(path, msgspec.json.decode(raw, type=_File))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a Docker config.json: {error}") from error

    def for_host(self, domain: str) -> Credentials | None:
        """What to show to the registry `domain`; None is anonymous."""
        host = _host(domain)
        auth = self._auths.get(host)
        if auth is not None and (auth.auth or auth.username or auth.identitytoken):
            return self._decode(host, auth)
        helper = self._helpers.get(host) or (self._content.credsStore if auth is not None else "")
        if helper:
            raise ConfigError(
                f"{self._path}: credentials of {host} are kept by docker-credential-{helper}, "
                "which sandbox does not run; put them into the file"
            )
        return None

    def _decode(self, host: str, auth: _Auth) -> Credentials:
        if auth.identitytoken:
            return Credentials(username=auth.username, identity_token=auth.identitytoken)
        if not auth.auth:
            return Credentials(username=auth.username, password=auth.password)
        try:
            text = base64.b64decode(auth.auth, validate=True).decode()
        except ValueError as error:  # of base64 as of UTF-8
            raise ConfigError(f"{self._path}: auth of {host} is not base64 text") from error
        username, colon, password = text.partition(":")
        if not colon or not username:
            raise ConfigError(f"{self._path}: auth of {host} is not user:password")
        return Credentials(username=username, password=password.rstrip("\0"))


def _host(key: str) -> str:
    host = key.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()
    return "docker.io" if host in _HUB else host
