"""Detached mounts and in-root paths, by descriptor.

Everything made here is a *detached* mount: a descriptor that no path leads to and no mount table
shows. It is passed to the process that attaches it in a namespace of its own, and vanishes with
its last descriptor; so nothing of a task ever appears among the host's mounts, and nothing has to
be unmounted. All functions may run on any thread that is in the agent's own mount namespace.

Kernel facts this rests on:
- A layer is on disk once, with the image's own ids. An idmapped copy of its mount (5.12) shows
  them shifted into a task's range; overlay accepts such layers since 5.19.
- Overlay takes layers as descriptors since 6.13. Before, a layer needs a path in the caller's mount
  namespace: `overlay` then works on a throw-away thread in a throw-away namespace. The new API
  would take at most 255 bytes of `lowerdir` there, so that path uses mount(2), whose page of
  options holds hundreds of layers by their one to three digit names.
- A mount outside the caller's namespace cannot be cloned unless it is detached, and before 6.15 not
  even then: hence the thread clones first and unshares afterwards. A part of a mount that is
  detached from the start is had there by attaching another mount of the same file system.
- Names in an image are hostile. openat2 with RESOLVE_IN_ROOT reads "/", ".." and links as a process
  with that root would. It answers EAGAIN when a rename races with "..": try again, not for ever.

What it does not do: attach anything for a task (the keeper does, inside the task's namespaces), or
know where layers and writable directories are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.thread import KernelThread

# A host may have turned these on for its own overlays. Redirects and metadata-only copies make the
# kernel believe xattrs found in layers; an index costs a directory a mount and buys nothing here.
_PLAIN = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off"}

_RESOLVE = native.RESOLVE_IN_ROOT | native.RESOLVE_NO_MAGICLINKS
_ATTEMPTS = 100


# Mounts ------------------------------------------------------------------------------------


def clone(fd: int, *, recursive: bool = False, read_only: bool = False) -> int:
    """A detached copy of the mount at `fd`, showing only what is below it.

    It is private: a copy of a shared mount (systemd shares all of them) is its peer otherwise, and
    what a container has mounted on it appears on the host.
    """
    depth = native.AT_RECURSIVE if recursive else 0
    copy = _copy(fd, depth)
    with _unless_complete(copy):
        read_only_attr = native.MOUNT_ATTR_RDONLY if read_only else 0
        _set(copy, read_only_attr, at_flags=depth, propagation=native.MS_PRIVATE)
    return copy


def part(mount_fd: int, path: str, again: Callable[[], int]) -> int:
    """A detached, private mount of directory `path` of the detached mount at `mount_fd`.

    The path is ours: no link is followed. `again` gives another detached mount of the same file
    system, for kernels that clone none that is detached (before 6.15).
    """
    if clones_detached():
        flags = os.O_PATH | os.O_DIRECTORY
        fd = native.openat2(mount_fd, path, flags, resolve=native.RESOLVE_NO_SYMLINKS)
        try:
            return clone(fd)
        finally:
            os.close(fd)
    with KernelThread("part") as thread:
        return thread.call(lambda: _part_by_name(path, again))


@cache
def clones_detached() -> bool:
    """Whether the kernel clones a mount that is detached (6.15): found out by trying, once."""
    with ExitStack() as opened:
        mount = tmpfs(1 << 20, 0o700, 0, 0)
        opened.callback(os.close, mount)
        try:
            opened.callback(os.close, _copy(mount))
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True


def _part_by_name(path: str, again: Callable[[], int]) -> int:
    """Changes the thread for good, as `_overlay_by_name` does."""
    with ExitStack() as opened:
        whole = again()
        opened.callback(os.close, whole)
        stage = _stage(opened)
        _put(whole, stage, "whole")
        return native.open_tree(stage, f"whole/{path}", native.OPEN_TREE_CLONE)


def _copy(fd: int, depth: int = 0) -> int:
    return native.open_tree(fd, "", native.OPEN_TREE_CLONE | native.AT_EMPTY_PATH | depth)


def idmapped(path_fd: int, userns_fd: int, *, read_only: bool = False) -> int:
    """A detached copy whose ids 0.. are those of the user namespace; EINVAL if the fs cannot.

    For the layers of an overlay, not to be attached: it may be the peer of a shared mount.
    """
    copy = _copy(path_fd)
    with _unless_complete(copy):
        read_only_attr = native.MOUNT_ATTR_RDONLY if read_only else 0
        _set(copy, native.MOUNT_ATTR_IDMAP | read_only_attr, userns_fd=userns_fd)
    return copy


def tmpfs(
    size_bytes: int,
    mode: int,
    uid: int,
    gid: int,
    *,
    attrs: int = native.MOUNT_ATTR_NOSUID | native.MOUNT_ATTR_NODEV,
) -> int:
    """A detached tmpfs; its root directory has the mode and the host ids given."""
    context = native.fsopen("tmpfs")
    try:
        native.fsconfig_string(context, "size", str(size_bytes))
        native.fsconfig_string(context, "mode", f"{mode:o}")
        native.fsconfig_string(context, "uid", str(uid))
        native.fsconfig_string(context, "gid", str(gid))
        native.fsconfig_create(context)
        return native.fsmount(context, attrs)
    finally:
        os.close(context)


def overlay(
    lowers: Sequence[int],
    upper: int | None,
    work: int | None,
    *,
    volatile: bool = True,
    again: Callable[[], int] | None = None,
) -> int:
    """A detached overlay, nodev, of detached layer mounts, the topmost first.

    `upper` and `work` are directories in one directory of one mount, or both None for a read-only
    overlay of two layers or more. `volatile` leaves out every sync, also that of an unmount; the
    kernel then refuses the same `work` again while it holds incompat/volatile. When that mount is
    detached, `again` gives another one of the same file system, for kernels that need it.

    The descriptors stay the caller's and usable. (Before 6.13 those of `lowers` are made to refer
    to fresh copies of the same mounts.)
    """
    if (upper is None) != (work is None):
        raise KernelError("overlay", "upper and work go together", errno.EINVAL)
    if overlay_takes_descriptors():
        return _overlay_by_descriptor(lowers, upper, work, volatile=volatile)
    with KernelThread("overlay") as thread:
        return thread.call(lambda: _overlay_by_name(lowers, upper, work, volatile, again))


@cache
def overlay_takes_descriptors() -> bool:
    """Whether the kernel takes layers as descriptors (6.13): found out by trying, once."""
    with ExitStack() as opened:
        context = native.fsopen("overlay")
        opened.callback(os.close, context)
        root = native.openat2(native.AT_FDCWD, "/", os.O_PATH)
        opened.callback(os.close, root)
        try:
            native.fsconfig_fd(context, "lowerdir+", root)
        except KernelError as error:
            # EOPNOTSUPP before overlay spoke the new API (6.5), then EINVAL for not being a name.
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        return True


def _overlay_by_descriptor(
    lowers: Sequence[int], upper: int | None, work: int | None, *, volatile: bool
) -> int:
    context = native.fsopen("overlay")
    try:
        for key, value in _PLAIN.items():
            native.fsconfig_string(context, key, value)
        for lower in lowers:
            native.fsconfig_fd(context, "lowerdir+", lower)
        if upper is not None and work is not None:
            native.fsconfig_fd(context, "upperdir", upper)
            native.fsconfig_fd(context, "workdir", work)
            if volatile:
                native.fsconfig_flag(context, "volatile")
        native.fsconfig_create(context)
        return native.fsmount(context, native.MOUNT_ATTR_NODEV)
    finally:
        os.close(context)


def _overlay_by_name(
    lowers: Sequence[int],
    upper: int | None,
    work: int | None,
    volatile: bool,
    again: Callable[[], int] | None,
) -> int:
    """The same before 6.13. Changes the thread for good: it must end afterwards.

    The namespace, and all that is attached in it, goes with the thread; a clone taken of a mount
    before is detached again and stays.
    """
    options = [f"{key}={value}" for key, value in _PLAIN.items()]
    options.append("lowerdir=" + ":".join(str(n) for n in range(len(lowers))))
    with ExitStack() as opened:
        writable: int | None = None
        if upper is not None and work is not None:
            # upper and work must be on one mount: one of the whole file system, or a copy of that
            # of the directory which holds both.
            writable = again() if again else native.open_tree(upper, "..", native.OPEN_TREE_CLONE)
            opened.callback(os.close, writable)
            options.append(f"upperdir=rw/{_name_in(writable, upper)}")
            options.append(f"workdir=rw/{_name_in(writable, work)}")
            options.extend(["volatile"] if volatile else [])
        stage = _stage(opened)
        for n, lower in enumerate(lowers):
            _put(lower, stage, str(n))
        if writable is not None:
            _put(writable, stage, "rw")
        _mkdir(stage, "root", 0o700)
        native.mount("overlay", "root", "overlay", native.MS_NODEV, ",".join(options))
        for lower in lowers:
            _detach_again(lower)
        return native.open_tree(stage, "root", native.OPEN_TREE_CLONE)


def _stage(opened: ExitStack) -> int:
    """An empty directory in a mount namespace of the thread's own, and its working directory."""
    stage = tmpfs(1 << 20, 0o700, 0, 0)
    opened.callback(os.close, stage)
    native.unshare(native.CLONE_NEWNS)
    native.mount(None, "/", None, native.MS_REC | native.MS_PRIVATE)
    _attach(stage, native.AT_FDCWD, "/")
    with native.raising("fchdir", "stage"):
        os.fchdir(stage)
    return stage


def _put(fd: int, stage: int, name: str) -> None:
    _mkdir(stage, name, 0o700)
    _attach(fd, stage, name)


def _attach(fd: int, target: int, name: str) -> None:
    native.move_mount(fd, "", target, name, native.MOVE_MOUNT_F_EMPTY_PATH)


def _detach_again(fd: int) -> None:
    """Let descriptor number `fd` refer to a detached copy of the attached mount it refers to."""
    copy = clone(fd)
    with native.raising("dup2", f"{fd}"):
        os.dup2(copy, fd, inheritable=False)
    os.close(copy)


def _set(
    fd: int, attrs: int, *, at_flags: int = 0, propagation: int = 0, userns_fd: int = -1
) -> None:
    at_flags |= native.AT_EMPTY_PATH
    native.mount_setattr(fd, "", at_flags, attrs, 0, propagation, userns_fd=userns_fd)


def _name_in(top: int, fd: int) -> str:
    """The path of directory `fd` below `top`, which is its parent or the root of its file system;
    a rename meanwhile must not have changed it."""
    with native.raising("stat", f"descriptor {fd}"):
        path = os.readlink(f"/proc/self/fd/{fd}")
        for name in (path.lstrip("/"), os.path.basename(path)):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=top, follow_symlinks=False)):
                    return name
    raise KernelError("overlay", f"{path} moved", errno.ESTALE)


@contextmanager
def _unless_complete(fd: int) -> Iterator[None]:
    """Close `fd` if the block fails; on success it is the caller's."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


# Paths in an image -------------------------------------------------------------------------


def resolve(
    root_fd: int, path: str | bytes, *, directory: bool = False, follow: bool = True
) -> int:
    """An O_PATH descriptor of `path` as a process with that root would find it.

    With `follow` false a link as the last component is itself the answer.
    """
    flags = os.O_PATH | (os.O_DIRECTORY if directory else 0) | (0 if follow else os.O_NOFOLLOW)
    for _ in range(_ATTEMPTS - 1):
        try:
            return native.openat2(root_fd, path, flags, resolve=_RESOLVE)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
    return native.openat2(root_fd, path, flags, resolve=_RESOLVE)


def read_bounded(root_fd: int, path: str | bytes, limit: int) -> bytes:
    """The content of a regular file in the root; EINVAL for another kind, EFBIG beyond `limit`.

    The kind is looked at before anything is opened: opening alone blocks on a FIFO and acts on
    some devices. Links are followed inside the root.
    """
    name = os.fsdecode(path)
    found = resolve(root_fd, path)
    try:
        with native.raising("read", name):
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise KernelError("read", name, errno.EINVAL)
            fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                content = file.read(limit + 1)
    finally:
        os.close(found)
    if len(content) > limit:
        raise KernelError("read", name, errno.EFBIG)
    return content


def make_dirs(root_fd: int, path: str | bytes, mode: int, uid: int, gid: int) -> None:
    """Create what is missing of a directory path in the root, with mode and host ids given.

    What exists is left as it is. A link on the way is followed inside the root; one that leads
    nowhere is EEXIST. Each directory is made below the descriptor of the one above it.
    """
    done = b"/"
    for name in os.fsencode(path).split(b"/"):
        if name in (b"", b"."):
            continue
        parent, done = done, os.path.join(done, name)
        try:
            os.close(resolve(root_fd, done, directory=True))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            above = resolve(root_fd, parent, directory=True)
            try:
                _make_dir(above, name, mode, uid, gid)
            finally:
                os.close(above)


def _make_dir(parent: int, name: bytes, mode: int, uid: int, gid: int) -> None:
    _mkdir(parent, name, 0o700)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    made = native.openat2(parent, name, flags, resolve=native.RESOLVE_BENEATH)
    try:
        with native.raising("fchown", name):
            os.fchown(made, uid, gid)
        with native.raising("fchmod", name):
            os.fchmod(made, mode)
    finally:
        os.close(made)


def _mkdir(parent: int, name: str | bytes, mode: int) -> None:
    with native.raising("mkdirat", name):
        os.mkdir(name, mode, dir_fd=parent)
