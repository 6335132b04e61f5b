"""Network namespaces: made, entered and left again, pinned by a path, and their sysctls.

A thread is in one network namespace. `within` steps into another for the length of a block, which
is only for a KernelThread. What `/proc/sys/net` shows and changes is the namespace of the thread
that opens a file there (network_namespaces(7)), so it is reached by entering.

A namespace lives as long as something holds it: a process or thread in it, a descriptor, a socket
of it, or the bind mount of its nsfs file that `pin` makes, which is what survives this process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.native import raising

NSFS_MAGIC = 0x6E736673
"""linux/magic.h"""

_HERE = "/proc/thread-self/ns/net"


def here() -> int:
    """A descriptor of the namespace that this thread is in."""
    with raising("open", _HERE):
        return os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)


def create() -> int:
    """A descriptor of a new namespace, owned by the user namespace of this thread, which stays
    where it is."""
    home = here()
    try:
        native.unshare(native.CLONE_NEWNET)
        try:
            return here()
        finally:
            native.setns(home, native.CLONE_NEWNET)
    finally:
        os.close(home)


@contextmanager
def within(netns_fd: int) -> Iterator[None]:
    """This thread is in that namespace while the block runs."""
    home = here()
    try:
        native.setns(netns_fd, native.CLONE_NEWNET)
        try:
            yield
        finally:
            native.setns(home, native.CLONE_NEWNET)
    finally:
        os.close(home)


# Pinned by a path ------------------------------------------------------------------------------


def pin(netns_fd: int, path: Path) -> None:
    """Bind its nsfs file to `path`, in the mount namespace of this thread."""
    with raising("open", f"{path}"):
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    native.mount(f"/proc/thread-self/fd/{netns_fd}", path.as_posix(), None, native.MS_BIND)


def pinned(path: Path) -> int | None:
    """A descriptor of the namespace that is pinned there; None if there is none, or only the file
    that was made for it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError("open", f"{path}", error.errno or errno.EIO) from error
    if native.fstatfs_magic(fd) == NSFS_MAGIC:
        return fd
    os.close(fd)
    return None


def unpin(path: Path) -> None:
    """Nothing to do if it is not there. The namespace goes with the last that holds it."""
    while _is_pin(path):
        native.umount2(path.as_posix(), native.MNT_DETACH | native.UMOUNT_NOFOLLOW)
    with raising("unlink", f"{path}"):
        path.unlink(missing_ok=True)


def _is_pin(path: Path) -> bool:
    fd = pinned(path)
    if fd is not None:
        os.close(fd)
    return fd is not None


# Sysctls ---------------------------------------------------------------------------------------


def read_sysctl(key: str) -> str | None:
    """`key` as "net/ipv4/ip_forward"; None if this kernel or namespace has it not."""
    try:
        with open(f"/proc/sys/{key}") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError("read", f"/proc/sys/{key}", error.errno or errno.EIO) from error


def write_sysctl(key: str, value: str) -> None:
    with raising("write", f"/proc/sys/{key}"), open(f"/proc/sys/{key}", "w") as file:
        file.write(value)
