"""What an agent can be told: the keys of its file, with their defaults and bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from sandbox.errors import ConfigError

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Factor = Annotated[float, msgspec.Meta(gt=0)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """/etc/sandbox/agent.toml, or the keyword arguments of `open_sandbox`: docs/guide/agent.md."""

    account_id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{12}\Z")] = "123456789012"
    region: Annotated[str, msgspec.Meta(pattern=r"\A[a-z]+(-[a-z0-9]+)+\Z")] = "us-east-1"
    era: Literal["current", "2017"] = "current"
    """Whose rules a task definition is held to: Fargate's of today, or those of its launch."""
    max_tasks: _Count = 2000
    host_free_memory_mib: _Count | None = None
    host_free_storage_mib: _Count | None = None
    memory_overcommit: _Factor | None = None
    cpu_overcommit: _Factor | None = None
    storage_overcommit: _Factor | None = None
    """How much of the host all tasks together may be promised: 1.0 is all of it once."""
    warm_slots: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 16
    """How many user and network namespaces are kept ready."""
    warm_storage: Annotated[int, msgspec.Meta(ge=0, le=256)] = 4
    """How many file systems for tasks are kept ready."""
    insecure_registries: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    """Hosts that may be spoken to over plain http; loopback always may."""
    docker_config: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """A `config.json` as `docker login` writes it, read anew for each pull."""
    keep_blobs: bool = False
    """Keep layers also as they were transferred, to push images on unchanged."""
    stopped_tasks_kept_s: _Count = 3600
    stopped_tasks_kept: _Count = 1000


def read_config(settings: Mapping[str, Any]) -> Config:
    """ConfigError, with the key first, for what is no setting or no value for it."""
    try:
        return msgspec.convert(dict(settings), Config)
    except msgspec.ValidationError as error:
        what, _, where = f"{error}".partition(" - at `$.")
        key = f"{where.removesuffix('`')}: " if where else ""
        raise ConfigError(f"configuration: {key}{what[:1].lower()}{what[1:]}") from None
