"""One state directory: one agent at a time, and who that agent is.

The instance id is random and stored with the directory's device, inode and the machine's id. A
copied or restored directory differs in them: it gets a new id, so that it never sweeps what the
original made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from sandbox.errors import AgentRunning, ConfigError
from sandbox.kernel.processes import is_zombie, start_time
from sandbox.model import names

_LAST_CHILD_S: Final = 5


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The file `instance` of a state directory."""

    instance: str
    device: int
    inode: int
    machine: str

    def is_of(self, other: Identity) -> bool:
        mine = (self.device, self.inode, self.machine)
        return mine == (other.device, other.inode, other.machine)


@contextlib.contextmanager
def hold(state_dir: Path) -> Iterator[None]:
    """The lock of one agent a state directory; the kernel lets it go when we die.

    It is on the directory itself: a file in it could be taken away, and the next agent would lock
    another one of that name. The file is for agents that know no other lock, and tells commands
    that this is a state directory.
    """
    if os.geteuid() != 0:
        raise ConfigError("sandbox needs root: namespaces, cgroups and mounts are made directly")
    with contextlib.ExitStack() as held:
        file = state_dir / "lock"
        _lock(held, made(state_dir), os.O_RDONLY | os.O_DIRECTORY, file)
        fd = _lock(held, file, os.O_RDWR | os.O_CREAT, file)
        with _usable(file):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
        yield


def _lock(held: contextlib.ExitStack, path: Path, flags: int, file: Path) -> int:
    with _usable(path):
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    held.callback(os.close, fd)
    deadline = time.monotonic() + _LAST_CHILD_S
    while not _locked(fd):
        if not _has_died(file) or time.monotonic() > deadline:
            raise AgentRunning(
                f"another agent holds {file.parent}: wait for its tasks, with which it leaves if a"
                " command started it; stop it if it is a resident one; or name another --state-dir"
            )
        time.sleep(0.005)
    return fd


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_died(file: Path) -> bool:
    """Of the agent that the lock's file names: one that was killed while it started a program holds
    its locks a moment longer, by the child that has not executed anything yet."""
    try:
        pid, started = map(int, file.read_text().split())
    except (OSError, ValueError):
        return False
    return start_time(pid) != started or is_zombie(pid)


def identify(state_dir: Path) -> tuple[Identity, Identity | None]:
    """Who this directory's agent is, and what was written down: another one's in a copy.

    Written down (`keep`) only after the tasks of a copy were recorded as lost: if we die before
    that, it is still seen to be a copy.
    """
    status = state_dir.stat()
    here = Identity(
        instance=names.instance_id(secrets.token_bytes(2)),
        device=status.st_dev,
        inode=status.st_ino,
        machine=_machine_id(),
    )
    path = state_dir / "instance"
    try:
        with _usable(path):
            kept = msgspec.json.decode(path.read_bytes(), type=Identity) if path.exists() else None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}: remove the file if no task of it runs") from None
    if kept is not None and kept.is_of(here):
        return kept, kept
    return here, kept


def keep(identity: Identity, state_dir: Path) -> None:
    path, text = state_dir / "instance", msgspec.json.encode(identity)
    if path.exists() and path.read_bytes() == text:
        return
    fresh = path.with_suffix(".new")
    with _usable(path):
        with fresh.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def _machine_id() -> str:
    """machine-id(5); hosts without one are told apart by device and inode alone."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def made(directory: Path) -> Path:
    """A directory of ours, root's alone."""
    with _usable(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None
