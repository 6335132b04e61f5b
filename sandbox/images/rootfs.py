"""The root file system of a container: its image's layers below, a writable layer of its own above.

    <directory>/upper             the writable layer, owned by the task's ids
                work.<boot id>    overlay's, and the sign that upper is whole

The layers are on disk once, with the image's ids. Each is cloned into a detached mount whose ids
are shifted by the task's user namespace, and one overlay is laid over the clones. The result is a
descriptor that no path leads to; the keeper attaches it. Nothing is kept open between launches:
opening a layer's directory takes 2 us, and one that were kept would hold a deleted layer's space.
What costs is closing the clones (50 us each, a grace period), so that is left to the keeper.
All else takes less than the way to a thread and back, so it is done in place where the kernel can.

Kernel facts:
- A new directory of an overlay shows what its upper directory says. So `upper` has mode, times,
  user xattrs and owner of the image's topmost root directory, the owner as one of the task's ids;
  otherwise root of the task could not create a file in "/".
- Overlay does not look for the opaque mark on the root of a layer, so layers below one that has it
  are left out. It refuses one directory twice (ELOOP); of equal layers the topmost decides alone.
- A `volatile` overlay skips every sync and leaves work/incompat/volatile, with which the kernel
  refuses the next mount: after a crash of the host upper may be torn. For a container that is
  started again in place this is no crash, so within one boot the work directory is emptied; after
  another boot the whole writable layer is begun anew.
"""

from __future__ import annotations

import contextlib
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
from sandbox.images.users import User, resolve_user
from sandbox.images.volumes import copy_xattrs, populate_volume
from sandbox.kernel import mounts
from sandbox.kernel.trees import empty_directory, remove_known, remove_tree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_THREADS = 8
_USERS = 256
"""Users of images that are remembered."""
_PARTS = ("upper", "lower", "work")
_WORK = ("work/incompat/volatile/dirty", "work/incompat/volatile/", "work/incompat/", "work/")


class Rootfs(msgspec.Struct, frozen=True, kw_only=True):
    """`mount_fd` is a detached overlay; it lives as long as the descriptor or who attached it."""

    mount_fd: int
    layers: tuple[int, ...]
    """The clones, which the overlay needs no more: somebody who may wait closes them."""
    is_fresh: bool
    """The writable layer was made now: what is seen is the image's alone."""

    def close(self) -> None:
        for fd in (self.mount_fd, *self.layers):
            os.close(fd)


class RootfsStore:
    """Root file systems over the layers of one store. Methods run side by side, on threads."""

    def __init__(self, layers: LayerStore) -> None:
        self._layers = layers
        self._threads = trio.CapacityLimiter(_THREADS)
        self._users: dict[tuple[str, str], User] = {}
        with reported("read", _BOOT_ID):
            self._boot = _BOOT_ID.read_text().strip()

    async def prepare(
        self,
        image: Image,
        directory: Path,
        userns_fd: int,
        id_base: int,
        *,
        again: Callable[[], int] | None = None,
    ) -> Rootfs:
        """A fresh mount of the container's root; its writable layer is made, or taken up again.

        No other mount of `directory` may be in use; for `again` see `mounts.overlay`. On
        cancellation nothing is left open.
        """
        opaque = self._layers.is_opaque
        lowers = [self._layers.path(diff_id) for diff_id in stack(image.diff_ids, opaque)]
        writable = _Writable(directory, self._boot, id_base, again)
        if mounts.overlay_takes_descriptors():
            await trio.lowlevel.checkpoint()
            return _prepare(lowers, writable, userns_fd)
        return await trio.to_thread.run_sync(
            _prepare, lowers, writable, userns_fd, limiter=self._threads
        )

    async def discard(self, directory: Path, expected: Sequence[str] = ()) -> None:
        """Delete the writable layer; nothing if there is none. No mount may use it any more.

        Quicker when it holds just what is `expected` (see `trees.remove_known`).
        """
        if _discard_known(directory, self._boot, expected):
            return
        await trio.to_thread.run_sync(discard, directory, limiter=self._threads)

    async def populate_volume(self, root_fd: int, path: str, volume: Path, id_base: int) -> None:
        """Fill an empty volume with what the root has at `path` (see `images.volumes`)."""
        await trio.to_thread.run_sync(
            populate_volume, root_fd, path, volume, id_base, limiter=self._threads
        )

    def user(self, image: Image, root: Rootfs, spec: str) -> User:
        """Ids and home of `spec` in that root (see `images.users`).

        An image that nobody has written to yet always gives the same answer.
        """
        if not root.is_fresh:
            return resolve_user(root.mount_fd, spec)
        key = (image.digest, spec)
        if (user := self._users.get(key)) is None:
            if len(self._users) == _USERS:
                self._users.clear()
            user = self._users[key] = resolve_user(root.mount_fd, spec)
        return user

    @staticmethod
    def resolve_user(root_fd: int, spec: str) -> User:
        """The same in a root that a container has written to."""
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


def _prepare(lowers: Sequence[Path], writable: _Writable, userns_fd: int) -> Rootfs:
    directory = writable.directory
    with ExitStack() as failed, ExitStack() as opened, reported("mkdir", directory):
        is_fresh = writable.make(lowers)
        upper, work = _open(writable.upper, opened), _open(writable.work, opened)
        layers: list[int] = []
        # An image from nothing has no layer, and overlay wants one all the same.
        for path in lowers or [directory / "lower"]:
            layers.append(_shifted(path, userns_fd))
            failed.callback(os.close, layers[-1])
        mount_fd = mounts.overlay(layers, upper, work, volatile=True, again=writable.again)
        failed.pop_all()
        return Rootfs(mount_fd=mount_fd, layers=tuple(layers), is_fresh=is_fresh)


def _shifted(path: Path, userns_fd: int) -> int:
    with ExitStack() as opened:
        return mounts.idmapped(_open(path, opened), userns_fd, read_only=True)


def _open(path: Path | str, opened: ExitStack) -> int:
    fd = os.open(path, _DIRECTORY)
    opened.callback(os.close, fd)
    return fd


class _Writable:
    """The writable layer of one container."""

    def __init__(
        self, directory: Path, boot: str, id_base: int, again: Callable[[], int] | None
    ) -> None:
        self.directory = directory
        self.again = again
        self.upper = f"{directory}/upper"
        self.work = f"{directory}/work.{boot}"
        self._id_base = id_base

    def make(self, lowers: Sequence[Path]) -> bool:
        """Make it, or take it up again if it is whole and of this boot; was it made?"""
        try:
            self.directory.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if os.path.exists(self.work):
                self._empty_work()
                return False
            discard(self.directory)
        if not lowers:
            (self.directory / "lower").mkdir()
            (self.directory / "lower").chmod(0o755)  # whatever our umask: "/" will look like it
        os.mkdir(self.upper, 0o700)
        self._dress(lowers[0] if lowers else self.directory / "lower")
        os.mkdir(self.work, 0o700)  # last: without it the layer is begun anew
        return True

    def _empty_work(self) -> None:
        with ExitStack() as opened:
            empty_directory(_open(self.work, opened))

    def _dress(self, image_root: Path) -> None:
        """Let `upper` look like the image's root, its owner among the task's ids."""
        with ExitStack() as opened:
            source = _open(image_root, opened)
            upper = _open(self.upper, opened)
            status = os.fstat(source)
            os.fchown(upper, self._id_base + status.st_uid, self._id_base + status.st_gid)
            os.fchmod(upper, stat.S_IMODE(status.st_mode))
            copy_xattrs(source, upper)
            os.utime(upper, ns=(status.st_atime_ns, status.st_mtime_ns))


def _discard_known(directory: Path, boot: str, upper: Sequence[str]) -> bool:
    """Delete a writable layer that holds what the kernel makes in `work`, and `upper`. False when
    there is anything else; some of it may be gone then."""
    top = str(directory)
    return (
        remove_known(f"{top}/work.{boot}", _WORK)
        and remove_known(f"{top}/upper", upper)
        and not os.path.exists(f"{top}/lower")
    )


def discard(directory: Path) -> None:
    """Delete the writable layer, first what says that it is whole."""
    with reported("scandir", directory), contextlib.suppress(FileNotFoundError):
        parts = {name: name.partition(".")[0] for name in os.listdir(directory)}
        doomed = [name for name, part in parts.items() if part in _PARTS]
        for name in sorted(doomed, key=lambda name: parts[name] != "work"):
            remove_tree(directory / name)
