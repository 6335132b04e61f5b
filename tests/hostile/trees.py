"""All that an archive can say about a tree, as a table writes it and as a root really is."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

NOW = -1
"""The time of what no entry of an archive brought: between the test's begin and its end."""
_TICK_NS = 20_000_000
"""By how much a file system's clock may be behind."""


@dataclass(frozen=True, kw_only=True)
class Node:
    kind: str
    """As ls shows it: d, -, l, p, c, b; or ? for a name that nothing can be had of."""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    target: bytes = b""
    digest: str = ""
    has_holes: bool = False
    same_as: bytes = b""
    """The first path of the same file, in the order of bytes, if this is not it."""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


Tree = Mapping[bytes, Node]
"""By path; the root is b"."."""
ROOT = {b".": Node(kind="d", mode=0o755, mtime_ns=NOW)}
"""The root of an image that does not describe it."""


def d(mode: int = 0o755, *, mtime: int = 0, mtime_ns: int | None = None, **about: object) -> Node:
    return _node("d", mode, mtime, mtime_ns, about)


def f(
    content: bytes = b"",
    mode: int = 0o644,
    *,
    mtime: int = 0,
    mtime_ns: int | None = None,
    **about: object,
) -> Node:
    return _node("-", mode, mtime, mtime_ns, {"digest": short_digest(content), **about})


def link(target: bytes, *, mtime_ns: int = 0, **about: object) -> Node:
    return _node("l", 0o777, 0, mtime_ns, {"target": target, **about})


def fifo(mode: int = 0o644, **about: object) -> Node:
    return _node("p", mode, 0, None, about)


MADE = Node(kind="d", mode=0o755, mtime_ns=NOW)
"""A directory on the way to an entry, which no entry brought."""


NAME = Node(kind="?")


def _node(
    kind: str, mode: int, mtime: int, mtime_ns: int | None, about: Mapping[str, object]
) -> Node:
    nanoseconds = mtime * 10**9 if mtime_ns is None else mtime_ns
    return Node(kind=kind, mode=mode, mtime_ns=nanoseconds, **about)  # type: ignore[arg-type]


def short_digest(content: bytes) -> str:
    return f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}"


def described(root: Path, id_base: int, since_ns: int) -> dict[bytes, Node]:
    """The tree at `root`, whose ids begin at `id_base` on the host."""
    top = os.fsencode(root)
    first: dict[int, bytes] = {}
    found = {}
    paths = [b"."]
    for directory, directories, files in os.walk(top):
        inner = os.path.relpath(directory, top)
        paths += [os.path.normpath(os.path.join(inner, name)) for name in directories + files]
    for path in sorted(paths):
        try:
            node, inode = _read(os.path.join(top, path), id_base, since_ns)
        except FileNotFoundError:
            found[path] = NAME
            continue
        leader = first.setdefault(inode, path)
        found[path] = node if leader == path else replace(node, same_as=leader)
    return found


def _read(path: bytes, id_base: int, since_ns: int) -> tuple[Node, int]:
    about = os.lstat(path)
    kind = stat.filemode(about.st_mode)[0]
    content = Path(os.fsdecode(path)).read_bytes() if kind == "-" else None
    node = Node(
        kind=kind,
        mode=stat.S_IMODE(about.st_mode),
        uid=about.st_uid - id_base,
        gid=about.st_gid - id_base,
        mtime_ns=NOW
        if since_ns - _TICK_NS <= about.st_mtime_ns <= time.time_ns()
        else about.st_mtime_ns,
        target=os.readlink(path) if kind == "l" else b"",
        digest="" if content is None else short_digest(content),
        has_holes=kind == "-" and about.st_blocks * 512 < about.st_size,
        xattrs={
            name: _shifted(name, os.getxattr(path, name, follow_symlinks=False), id_base)
            for name in os.listxattr(path, follow_symlinks=False)
        },
    )
    return node, about.st_ino


def _shifted(name: str, value: bytes, id_base: int) -> bytes:
    """A capability as its namespace sees it; without the root id, it is everybody's (version 2)."""
    if name != "security.capability" or len(value) != 24:
        return value
    magic, *sets, root = struct.unpack("<6I", value)
    if root != id_base:
        return value
    return struct.pack("<5I", magic & 0x00FFFFFF | 0x02000000, *sets)
