"""Who a container runs as: `user`, `uid`, `user:group`, `uid:gid`, by the image's own files.

Docker's rules, with its texts: a name must be in the image's passwd, a number need not; without a
group it is the passwd's, and the groups that list the user come along; with a group there are no
others. Stricter in two places: a number is always that number (Docker lets a passwd entry *named*
"1000" turn it into another), and a line of passwd whose ids are not decimal is no entry (Docker
reads 0, which is root).

The files are the image's: found inside its root, regular, bounded. Nothing here asks the host.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import msgspec

from sandbox.errors import ImageError, KernelError
from sandbox.kernel import mounts

_PASSWD, _GROUP = "etc/passwd", "etc/group"
_MAX_BYTES = 1 << 20
_RANGE = 65536
_NUMBER = re.compile("[0-9]{1,10}", re.ASCII)


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Ids as the task sees them. `groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


class _Account(msgspec.Struct, frozen=True):
    name: str
    uid: int
    gid: int
    home: str


class _Group(msgspec.Struct, frozen=True):
    name: str
    gid: int
    members: tuple[str, ...]


def resolve_user(root_fd: int, spec: str) -> User:
    """The user that `spec` means in the root file system at `root_fd`; empty is root.

    ImageError for a name that is not there and an id that a task cannot have.
    """
    user, _, group = spec.partition(":")
    account = _account(root_fd, user or "0")
    gid = _gid(root_fd, group) if group else account.gid
    groups = () if group else _memberships(root_fd, account.name)
    return User(
        uid=_fitting(account.uid, spec),
        gid=_fitting(gid, spec),
        groups=tuple(_fitting(number, spec) for number in groups),
        home=account.home or "/",
    )


def _account(root_fd: int, user: str) -> _Account:
    number = int(user) if _NUMBER.fullmatch(user) else None
    for account in _accounts(root_fd):
        if account.uid == number or (number is None and account.name == user):
            return account
    if number is None:
        raise ImageError(f"unable to find user {user[:80]!r}: no matching entries in passwd file")
    return _Account("", number, 0, "/")


def _gid(root_fd: int, group: str) -> int:
    if _NUMBER.fullmatch(group):
        return int(group)
    for entry in _groups(root_fd):
        if entry.name == group:
            return entry.gid
    raise ImageError(f"unable to find group {group[:80]!r}: no matching entries in group file")


def _memberships(root_fd: int, name: str) -> tuple[int, ...]:
    """Groups that list the user, each once, in the file's order."""
    if not name:
        return ()
    return tuple(dict.fromkeys(g.gid for g in _groups(root_fd) if name in g.members))


def _fitting(number: int, spec: str) -> int:
    if number >= _RANGE:
        raise ImageError(f"user {spec[:80]!r}: id {number} is beyond a task's {_RANGE} ids")
    return number


def _accounts(root_fd: int) -> Iterator[_Account]:
    for fields in _lines(root_fd, _PASSWD):
        if len(fields) >= 4 and _NUMBER.fullmatch(fields[2]) and _NUMBER.fullmatch(fields[3]):
            home = fields[5] if len(fields) > 5 else ""
            yield _Account(fields[0], int(fields[2]), int(fields[3]), home)


def _groups(root_fd: int) -> Iterator[_Group]:
    for fields in _lines(root_fd, _GROUP):
        if len(fields) >= 3 and _NUMBER.fullmatch(fields[2]):
            members = fields[3].split(",") if len(fields) > 3 else []
            yield _Group(fields[0], int(fields[2]), tuple(members))


def _lines(root_fd: int, path: str) -> Iterator[list[str]]:
    try:
        content = mounts.read_bounded(root_fd, path, _MAX_BYTES)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise ImageError(f"/{path} of the image cannot be read: {error}") from error
    # Names are bytes to the kernel; the specification's text is UTF-8.
    for line in content.decode("utf-8", "surrogateescape").split("\n"):
        yield line.strip("\r").split(":")
