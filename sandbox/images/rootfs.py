"""The root file system of a container: its image's layers below, a writable layer of its own above.

    <container directory>/upper, work    the writable layer, owned by the task's ids
                          boot           the boot during which it was made

The layers are on disk once, with the image's ids. Each is cloned into a detached mount whose ids
are shifted by the task's user namespace, and one overlay is laid over the clones: 4 us a layer, so
nothing is kept between launches. (Opening a layer's directory is 2 us of that; a cache of opened
directories would hold deleted layers' disk space for less than it saves.) The result is a
descriptor that no path leads to; the keeper attaches it.

Kernel facts:
- A new directory of an overlay shows what its upper directory says. So `upper` belongs to the
  task's id 0 and has mode, times and user xattrs of the image's topmost root directory; otherwise
  root of the task could not create a file in "/".
- Overlay does not look for the opaque mark on the root of a layer, so layers below one that has it
  are left out. It refuses one directory twice (ELOOP); of equal layers the topmost decides alone.
- A `volatile` overlay skips every sync and leaves work/incompat/volatile, with which the kernel
  refuses the next mount: after a crash of the host upper may be torn. For a container that is
  started again in place this is no crash, so within one boot `work` is made new; after another
  boot the whole writable layer is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import trio

from sandbox.images.blobs import reported
from sandbox.images.documents import Image
from sandbox.images.layers import LayerStore
from sandbox.images.trees import remove_tree
from sandbox.images.users import User, resolve_user
from sandbox.images.volumes import copy_xattrs, populate_volume
from sandbox.kernel import mounts

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_THREADS = 8


class Rootfs(msgspec.Struct, frozen=True, kw_only=True):
    """`mount_fd` is a detached overlay; it lives as long as the descriptor or who attached it."""

    mount_fd: int

    def close(self) -> None:
        os.close(self.mount_fd)


class RootfsStore:
    """Root file systems over the layers of one store. Methods run side by side, on threads."""

    def __init__(self, layers: LayerStore) -> None:
        self._layers = layers
        self._threads = trio.CapacityLimiter(_THREADS)

    async def prepare(
        self, image: Image, container_dir: Path, userns_fd: int, id_base: int
    ) -> Rootfs:
        """A fresh mount of the container's root; its writable layer is made, or taken up again.

        No other mount of `container_dir` may be in use. On cancellation nothing is left open.
        """
        opaque = self._layers.is_opaque
        lowers = [self._layers.path(diff_id) for diff_id in stack(image.diff_ids, opaque)]
        return await trio.to_thread.run_sync(
            _prepare, lowers, container_dir, userns_fd, id_base, limiter=self._threads
        )

    async def discard(self, container_dir: Path) -> None:
        """Delete the writable layer; nothing if there is none. No mount may use it any more."""
        await trio.to_thread.run_sync(_discard, container_dir, limiter=self._threads)

    async def populate_volume(self, root_fd: int, path: str, volume: Path, id_base: int) -> None:
        """Fill an empty volume with what the root has at `path` (see `images.volumes`)."""
        await trio.to_thread.run_sync(
            populate_volume, root_fd, path, volume, id_base, limiter=self._threads
        )

    @staticmethod
    def resolve_user(root_fd: int, spec: str) -> User:
        """Ids and home of `spec` in that root (see `images.users`)."""
        return resolve_user(root_fd, spec)


def stack(diff_ids: Sequence[str], is_opaque: Callable[[str], bool]) -> list[str]:
    """The layers that count, topmost first, as overlay wants them."""
    lowers: list[str] = []
    for diff_id in reversed(diff_ids):
        if diff_id not in lowers:
            lowers.append(diff_id)
        if is_opaque(diff_id):
            break
    return lowers


def _prepare(lowers: Sequence[Path], container_dir: Path, userns_fd: int, id_base: int) -> Rootfs:
    with ExitStack() as opened, reported("mkdir", container_dir):
        _make_writable(container_dir, lowers, id_base)
        layers = [_shifted(path, userns_fd, opened) for path in lowers or [container_dir / "lower"]]
        upper = _open(container_dir / "upper", opened)
        work = _open(container_dir / "work", opened)
        return Rootfs(mount_fd=mounts.overlay(layers, upper, work, volatile=True))


def _shifted(path: Path, userns_fd: int, opened: ExitStack) -> int:
    fd = os.open(path, _DIRECTORY)
    try:
        layer = mounts.idmapped(fd, userns_fd, read_only=True)
    finally:
        os.close(fd)
    # By number: on kernels before 6.13 overlay() lets it refer to another copy.
    opened.callback(os.close, layer)
    return layer


def _open(path: Path, opened: ExitStack) -> int:
    fd = os.open(path, _DIRECTORY)
    opened.callback(os.close, fd)
    return fd


# The writable layer ------------------------------------------------------------------------


def _make_writable(container_dir: Path, lowers: Sequence[Path], id_base: int) -> None:
    boot, boot_id = container_dir / "boot", _BOOT_ID.read_text()
    if boot.exists() and boot.read_text() == boot_id:
        remove_tree(container_dir / "work")
        (container_dir / "work").mkdir(mode=0o700)
        return
    _discard(container_dir)
    container_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("upper", "work"):
        (container_dir / name).mkdir(mode=0o700)
    if not lowers:  # an image from nothing; overlay wants a layer all the same
        (container_dir / "lower").mkdir(mode=0o755)
    _dress(container_dir / "upper", lowers[0] if lowers else container_dir / "lower", id_base)
    boot.write_text(boot_id)  # last: without it the layer is begun anew


def _dress(upper: Path, image_root: Path, id_base: int) -> None:
    """Give the upper directory the looks of the image's root, and the task's root as its owner."""
    with ExitStack() as opened:
        source, copy = _open(image_root, opened), _open(upper, opened)
        status = os.fstat(source)
        os.fchown(copy, id_base, id_base)
        os.fchmod(copy, stat.S_IMODE(status.st_mode))
        copy_xattrs(source, copy)
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def _discard(container_dir: Path) -> None:
    with reported("unlink", container_dir):
        (container_dir / "boot").unlink(missing_ok=True)
    for name in ("upper", "work", "lower"):
        remove_tree(container_dir / name)
