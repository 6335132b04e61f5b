"""Where cgroups are mounted, which hierarchy serves which controller, and our directory in each.

Choosing is pure: text of /proc in, `Mount`s out. A `Branch` is this instance's directory in one
hierarchy, held by a descriptor; whatever is done below goes through it by relative names, so no
path is resolved twice and nothing that is mounted later can slip in between.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.errors import ConfigError, KernelError
from sandbox.kernel import native

CONTROLLERS = ("cpu", "memory", "pids")

# A directory that was removed, by name and by a descriptor that is still open.
GONE = (errno.ENOENT, errno.ENODEV)

MAGIC = {1: native.CGROUP_SUPER_MAGIC, 2: native.CGROUP2_SUPER_MAGIC}

# A directory may be busy for a moment after its last process was killed or even reaped: the kernel
# drops the dead process's reference later than it wakes the parent.
REMOVAL_PATIENCE_S = 0.25

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo that is a cgroup file system."""

    path: str
    version: int
    controllers: frozenset[str] = frozenset()
    """Version 1 only: what is bound to this hierarchy."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The version 2 tree, and the version 1 hierarchy of each controller that is bound to one."""

    unified: Mount
    legacy: dict[str, Mount]


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """The cgroup mounts among the lines of /proc/self/mountinfo."""
    mounts = []
    for line in text.splitlines():
        place, _, origin = line.partition(" - ")
        fields, (kind, _, options) = place.split(), origin.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if kind == "cgroup2":
            mounts.append(Mount(path, 2))
        elif kind == "cgroup":
            bound = frozenset(options.split(",")).intersection(CONTROLLERS)
            mounts.append(Mount(path, 1, bound))
    return tuple(mounts)


def parse_own_cgroup(text: str) -> str:
    """This process's place in the version 2 tree, from the lines of /proc/self/cgroup."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    return "/"


def choose(mounts: Iterable[Mount]) -> Chosen:
    """The first mount of each hierarchy: later ones are copies that containers were given."""
    unified: Mount | None = None
    legacy: dict[str, Mount] = {}
    for mount in mounts:
        if mount.version == 2:
            unified = unified or mount
        for controller in mount.controllers:
            legacy.setdefault(controller, mount)
    if unified is None:
        raise ConfigError("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
    return Chosen(unified, legacy)


class Branch:
    """One directory of one hierarchy; the names that its methods take are relative to it."""

    def __init__(self, mount: Mount, path: str) -> None:
        """Open `path`, which must lie on a cgroup file system of the version that was announced."""
        self.version = mount.version
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError("open", path, error.errno or errno.EIO) from error
        if native.fstatfs_magic(self.fd) != MAGIC[mount.version]:
            self.close()
            raise KernelError("open", f"{path} (not a cgroup file system)", errno.EINVAL)

    def subject(self, name: str) -> str:
        return f"{self.path}/{name}"

    def mkdir(self, name: str) -> bool:
        """True when it was made now, false when it was there.

        Version 2 whatever our umask: on older kernels (6.1) who mounts cgroup2 in a cgroup
        namespace needs search permission on the way to its root, and a task's root is nobody here.
        """
        try:
            os.mkdir(name, 0o755, dir_fd=self.fd)
            if self.version == 2:
                os.chmod(name, 0o755, dir_fd=self.fd)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._failed("mkdir", name, error) from error
        return True

    def open(self, name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            raise self._failed("open", name, error) from error

    def has(self, name: str) -> bool:
        return os.access(name, os.F_OK, dir_fd=self.fd)

    def read(self, name: str) -> str:
        fd = self.open(name, os.O_RDONLY)
        try:
            parts = []
            while part := os.read(fd, _READ_BYTES):
                parts.append(part)
            return b"".join(parts).decode()
        except OSError as error:
            raise self._failed("read", name, error) from error
        finally:
            os.close(fd)

    def write(self, name: str, value: str) -> None:
        fd = self.open(name, os.O_WRONLY)
        try:
            os.write(fd, value.encode())
        except OSError as error:
            raise self._failed("write", f"{name} ({value})", error) from error
        finally:
            os.close(fd)

    def children(self, name: str) -> list[str]:
        """The directories below `name`; none if it is gone."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._failed("open", name, error) from error
        try:
            with os.scandir(fd) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            raise self._failed("readdir", name, error) from error
        finally:
            os.close(fd)

    def wait_unpopulated(self, name: str) -> None:
        """Version 2 only. EBUSY if a process stays in `name` or below; fine if `name` is gone."""
        deadline = time.monotonic() + REMOVAL_PATIENCE_S
        while self._is_populated(name):
            if time.monotonic() > deadline:
                raise KernelError("rmdir", self.subject(name), errno.EBUSY)
            time.sleep(0.001)

    def _is_populated(self, name: str) -> bool:
        try:
            return "populated 1" in self.read(f"{name}/cgroup.events")
        except KernelError as error:
            if error.errno in GONE:
                return False
            raise

    def rmdir(self, name: str) -> None:
        """Remove `name` with all below it; nothing to do if it is gone. Waits, within bounds."""
        deadline = time.monotonic() + REMOVAL_PATIENCE_S
        pause_s = 0.001
        while True:
            try:
                return os.rmdir(name, dir_fd=self.fd)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise self._failed("rmdir", name, error) from error
            children = self.children(name)
            for child in children:
                self.rmdir(f"{name}/{child}")
            if not children:
                time.sleep(pause_s)
                pause_s *= 2

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _failed(self, call: str, name: str, error: OSError) -> KernelError:
        return KernelError(call, self.subject(name), error.errno or errno.EIO)
