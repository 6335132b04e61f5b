"""Images whose layers are hostile, or only unusual: names, links, whiteouts, bombs and the rest.

A refusal is of the layer that is named last. Limits are those of LIMITS. What no entry says of an
accepted tree is 0644, 0755 for directories, 0:0, the time 0, and no extended attributes.
"""

from __future__ import annotations

import functools
import gzip
import os
import random
import struct
import zlib
from collections.abc import Callable

import zstandard

from sandbox.images.documents import GZIP_LAYER, LAYER_TYPES, TAR_LAYER, ZSTD_LAYER
from sandbox.images.layers import LayerLimits
from tests.hostile.cases import (
    Case,
    accepts,
    bad_layer,
    good,
    not_asked,
    numbered,
    refuses,
    unlike,
)
from tests.hostile.images import OUTSIDE, Layer, digest_of, layer
from tests.hostile.trees import MADE, NAME, d, f, fifo, link
from tests.kernel.archives import (
    BLOCK,
    GNU,
    V7,
    archive,
    directory,
    file,
    gnu_sparse,
    hardlink,
    header,
    long_name,
    padded,
    pax,
    raw_pax,
    record,
    symlink,
    with_checksum,
)

LIMITS = LayerLimits(stream_bytes=1 << 20, file_bytes=1 << 16, entries=50, report_bytes=4096)
OUT = os.fsencode(OUTSIDE)

NO_DIRECTORY = "is not a directory but has entries below it"
NO_FILE_OF_THIS_LAYER = "a hard link to what is no file of this layer"


def many(member: Callable[[bytes], bytes], count: int) -> bytes:
    return b"".join(member(b"%d" % number) for number in range(count))


# What umoci does differently more than once
LENIENT = accepts("Go's reader takes the end of the stream for the end of the archive")
NO_ZSTD = refuses("does not know zstd")
NOT_OCI = refuses("takes OCI's types only")

# Names --------------------------------------------------------------------------------------

CLEANS = accepts("cleans the name, so that it ends in the root")
ODD = [b"\xff\xfe not UTF-8", b"new\nline", b"\x1b[31m red", b"back\\slash", b"...", b"..a", b"-rf"]
DEEP = b"/".join([b"d" * 99] * 30)

NAMES = {
    "upwards": bad_layer(
        "a/../../etc/passwd: a name leads upwards",
        layer(file(b"a/../../etc/passwd")),
        umoci=CLEANS,
    ),
    "upwards, and back": bad_layer(
        "a/../b: a name leads upwards", layer(file(b"a/../b")), umoci=CLEANS
    ),
    "upwards by an absolute name": bad_layer(
        f"/..{OUTSIDE}/file: a name leads upwards",
        layer(file(b"/.." + OUT + b"/file", b"x")),
        umoci=CLEANS,
    ),
    "upwards by an extended header": bad_layer(
        "../x: a name leads upwards", layer(pax(path=b"../x") + file(b"x")), umoci=CLEANS
    ),
    "upwards by a long name": bad_layer(
        "x/../../y: a name leads upwards",
        layer(long_name(b"x/../../y") + file(b"x")),
        umoci=CLEANS,
    ),
    "upwards by ustar's prefix": bad_layer(
        "../../etc/passwd: a name leads upwards",
        layer(file(b"etc/passwd", tail=b"../..")),
        umoci=CLEANS,
    ),
    "absolute": good({b"etc": MADE, b"etc/f": f(b"x")}, layer(file(b"/etc/f", b"x"))),
    "slashes and dots": good(
        {b"abs": MADE, b"abs/f": f(b"1"), b"dot": f(), b"d": d()},
        layer(file(b"//abs///./f", b"1"), file(b"./dot/./"), directory(b"/d//")),
    ),
    "any bytes": good({name: f() for name in ODD}, layer(*map(file, ODD))),
    "a NUL in an extended header": bad_layer(
        "a name holds a NUL", layer(pax(path=b"a\0b") + file(b"x"))
    ),
    "a NUL in a long name ends it": good({b"a": f()}, layer(long_name(b"a\0b") + file(b"x"))),
    "255 bytes": good({b"n" * 255: f()}, layer(long_name(b"n" * 255) + file(b"x"))),
    "256 bytes": bad_layer(
        f"{'n' * 256}: cannot be made: ...", layer(long_name(b"n" * 256) + file(b"x"))
    ),
    "a path of 3000 bytes": good(
        {DEEP[: 100 * n - 1]: MADE for n in range(1, 30)} | {DEEP: f()},
        layer(long_name(DEEP) + file(b"x")),
    ),
    "a path of 4098 bytes": bad_layer(
        "a name is longer than 4096 bytes",
        layer(pax(path=b"n/" * 2049) + file(b"x")),
    ),
    "a GNU name of 4098 bytes": bad_layer(
        "a name is longer than 4097 bytes", layer(long_name(b"n/" * 2049) + file(b"x"))
    ),
    "two long names": bad_layer(
        "an entry has two long names",
        layer(long_name(b"a") + long_name(b"b") + file(b"x")),
        umoci=accepts("takes the last"),
    ),
    "a long name wins over an extended header": good(
        {b"long": f()}, layer(pax(path=b"pax") + long_name(b"long") + file(b"x"))
    ),
    "the last of two paths wins": good(
        {b"b": f()},
        layer(raw_pax(record(b"path", b"a") + record(b"path", b"b")) + file(b"x")),
    ),
    "a path of no bytes is no path": good({b"x": f()}, layer(pax(path=b"") + file(b"x"))),
    "a global path is not read": good(
        {b"x": f()},
        layer(raw_pax(record(b"path", b"../g"), b"g") + file(b"x")),
        umoci=refuses("knows no global headers"),
    ),
    "no name": bad_layer("/: the root is not a directory", layer(file(b""))),
    "two entries of one name": good(
        {b"a": f(b"2", 0o600)}, layer(file(b"a", b"1"), file(b"a", b"2", mode=0o600))
    ),
}

# Links --------------------------------------------------------------------------------------

INTO = symlink(b"a", OUT + b"/directory")
IN_ROOT = accepts("follows the link in the root, where it ends in a directory that it makes")

LINKS = {
    "outward": good(
        {b"a": link(OUT + b"/file"), b"b": link(b"../" * 9 + b"etc")},
        layer(symlink(b"a", OUT + b"/file"), symlink(b"b", b"../" * 9 + b"etc")),
    ),
    "to themselves": good({b"a": link(b"a")}, layer(symlink(b"a", b"a"))),
    "to nothing": bad_layer("a: cannot be made: ...", layer(symlink(b"a", b""))),
    "a target of 4095 bytes": good(
        {b"a": link(b"t" * 4095)}, layer(long_name(b"t" * 4095, b"K") + symlink(b"a", b"x"))
    ),
    "a target of 4096 bytes": bad_layer(
        "a: cannot be made: ...", layer(long_name(b"t" * 4096, b"K") + symlink(b"a", b"x"))
    ),
    "owner and time are the link's own": good(
        {b"a": link(OUT + b"/file", uid=7, gid=8, mtime_ns=9 * 10**9)},
        layer(header(b"a", b"2", link=OUT + b"/file", mode=0o777, uid=7, gid=8, mtime=9)),
    ),
    "a file below one": bad_layer(f"a: {NO_DIRECTORY}", layer(INTO, file(b"a/b")), umoci=IN_ROOT),
    "a directory below one": bad_layer(
        f"a/b: {NO_DIRECTORY}", layer(INTO, directory(b"a/b/c")), umoci=IN_ROOT
    ),
    "a link below one": bad_layer(
        f"a: {NO_DIRECTORY}", layer(INTO, symlink(b"a/b", b"x")), umoci=IN_ROOT
    ),
    "below one by way of procfs": bad_layer(
        f"a: {NO_DIRECTORY}",
        layer(symlink(b"a", b"/proc/self/root/etc"), file(b"a/b")),
        umoci=IN_ROOT,
    ),
    "below one that leads to itself": bad_layer(
        f"a: {NO_DIRECTORY}", layer(symlink(b"a", b"a"), file(b"a/b"))
    ),
    "below one inside the image": bad_layer(
        f"a: {NO_DIRECTORY}",
        layer(directory(b"d"), symlink(b"a", b"d"), file(b"a/b")),
        umoci=accepts("follows the link"),
    ),
    "a parent replaced by one": bad_layer(
        f"a: {NO_DIRECTORY}",
        layer(directory(b"a"), file(b"a/b"), INTO, file(b"a/c")),
        umoci=IN_ROOT,
    ),
    "a parent's parent replaced by one": bad_layer(
        f"a/b: {NO_DIRECTORY}", layer(file(b"a/b/c"), INTO, file(b"a/b/d")), umoci=IN_ROOT
    ),
    "a parent replaced by one, and it by a directory": good(
        {b"a": d(), b"a/c": f()}, layer(file(b"a/b"), INTO, directory(b"a"), file(b"a/c"))
    ),
    "replaced by a file, and not written through": good(
        {b"a": f(b"x")}, layer(symlink(b"a", OUT + b"/file"), file(b"a", b"x"))
    ),
    "replaced by a directory, whose mode is not the target's": good(
        {b"a": d(0o777, mtime=5)}, layer(INTO, header(b"a", b"5", mode=0o777, mtime=5))
    ),
    "replaced by a directory of a higher layer": good(
        {b"a": MADE, b"a/b": f()},
        layer(INTO),
        layer(file(b"a/b")),
        umoci=unlike("one tree for all layers: the link is followed, in the root"),
    ),
    "in place of a directory of a lower layer": good(
        {b"a": link(OUT + b"/directory")}, layer(file(b"a/b")), layer(INTO)
    ),
    "in place of the root": bad_layer(
        "/: the root is not a directory", layer(symlink(b"./", OUT + b"/directory"))
    ),
}

# Hard links ---------------------------------------------------------------------------------

HARD_LINKS = {
    "to a file of this layer": good(
        {b"a": f(b"x", 0o4711, uid=5), b"b": f(b"x", 0o4711, uid=5, same_as=b"a")},
        layer(file(b"a", b"x", mode=0o4711, uid=5), header(b"b", b"1", link=b"a", uid=5)),
    ),
    "to an absolute name, which is below the root": good(
        {b"a": f(b"x"), b"b": f(b"x", same_as=b"a")},
        layer(file(b"a", b"x"), hardlink(b"b", b"/./a")),
    ),
    "to itself": good(
        {b"a": f(b"x")},
        layer(file(b"a", b"x"), hardlink(b"a", b"/a")),
        umoci=refuses("removes the file before it links to it"),
    ),
    "to what is replaced afterwards": good(
        {b"a": f(b"2"), b"b": f(b"1")},
        layer(file(b"a", b"1"), hardlink(b"b", b"a"), file(b"a", b"2")),
    ),
    "upwards": bad_layer(
        "a: a name leads upwards", layer(hardlink(b"a", b"../.." + OUT + b"/file"))
    ),
    "upwards by an extended header": bad_layer(
        "a: a name leads upwards", layer(pax(linkpath=b"../etc/passwd") + hardlink(b"a", b"x"))
    ),
    "to the host": bad_layer(f"a: {NO_FILE_OF_THIS_LAYER}", layer(hardlink(b"a", OUT + b"/file"))),
    "through a symbolic link": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}", layer(symlink(b"a", OUT), hardlink(b"b", b"a/file"))
    ),
    "to a symbolic link": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}",
        layer(symlink(b"a", OUT + b"/file"), hardlink(b"b", b"a")),
        umoci=accepts("links to the link itself"),
    ),
    "to a directory": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}", layer(directory(b"a"), hardlink(b"b", b"a"))
    ),
    "to the root": bad_layer(f"b: {NO_FILE_OF_THIS_LAYER}", layer(hardlink(b"b", b"/"))),
    "to a FIFO": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}",
        layer(header(b"a", b"6"), hardlink(b"b", b"a")),
        umoci=accepts("links to the FIFO"),
    ),
    "to a device": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}",
        layer(header(b"a", b"3"), hardlink(b"b", b"a")),
        umoci=accepts("makes the device and links to it"),
    ),
    "to a file of a lower layer": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}",
        layer(file(b"a", b"x")),
        layer(hardlink(b"b", b"a")),
        umoci=accepts("one tree for all layers: the file is there"),
    ),
    "to what it replaces": bad_layer(
        f"a: {NO_FILE_OF_THIS_LAYER}", layer(file(b"a/b"), hardlink(b"a", b"a/b"))
    ),
    "to a later file": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}", layer(hardlink(b"b", b"a"), file(b"a"))
    ),
    "to a whiteout": bad_layer(
        f"b: {NO_FILE_OF_THIS_LAYER}", layer(file(b".wh.a"), hardlink(b"b", b".wh.a"))
    ),
}

# Whiteouts ----------------------------------------------------------------------------------

LOWER = layer(*(file(b"d/%s" % name, b"low") for name in (b"1", b"2")), file(b"top", b"low"))
LOW, TOP = f(b"low"), {b"top": f(b"low")}
OPAQUE = b"d/.wh..wh..opq"
merged = functools.partial(good, is_about_the_kernel=True)

WHITEOUTS = {
    "of a file": merged({b"d": MADE, b"d/2": LOW, **TOP}, LOWER, layer(file(b"d/.wh.1"))),
    "of a directory": merged(TOP, LOWER, layer(file(b".wh.d"))),
    "of everything": merged({}, LOWER, layer(file(b".wh.d"), file(b".wh.top"))),
    "of the same twice": merged(TOP, LOWER, layer(file(b".wh.d"), file(b".wh.d"))),
    "of nothing": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, **TOP}, LOWER, layer(file(b".wh.no"))
    ),
    "of any type": merged({}, LOWER, layer(directory(b".wh.d"), symlink(b".wh.top", OUT))),
    "by a device": merged(TOP, LOWER, layer(header(b".wh.d", b"3"))),
    "by a long name": merged(TOP, LOWER, layer(long_name(b"./.wh.d") + file(b"x"))),
    "of what this layer brings before": merged(
        {b"d": MADE, b"d/1": f(b"up"), b"d/2": LOW, **TOP},
        LOWER,
        layer(file(b"d/1", b"up"), file(b"d/.wh.1")),
    ),
    "of what this layer brings after": merged(
        {b"d": MADE, b"d/1": f(b"up"), b"d/2": LOW, **TOP},
        LOWER,
        layer(file(b"d/.wh.1"), file(b"d/1", b"up")),
    ),
    "of a directory that this layer begins anew": merged(
        {b"d": MADE, b"d/3": f(b"up"), **TOP}, LOWER, layer(file(b".wh.d"), file(b"d/3", b"up"))
    ),
    "of a directory, after its new content": merged(
        {b"d": MADE, b"d/3": f(b"up"), **TOP}, LOWER, layer(file(b"d/3", b"up"), file(b".wh.d"))
    ),
    "opaque, before its siblings": merged(
        {b"d": MADE, b"d/3": f(b"up"), **TOP}, LOWER, layer(file(OPAQUE), file(b"d/3", b"up"))
    ),
    "opaque, after its siblings": merged(
        {b"d": MADE, b"d/3": f(b"up"), **TOP}, LOWER, layer(file(b"d/3", b"up"), file(OPAQUE))
    ),
    "opaque, between its siblings": merged(
        {b"d": MADE, b"d/1": f(b"up"), b"d/3": f(b"up"), **TOP},
        LOWER,
        layer(file(b"d/1", b"up"), file(OPAQUE), file(b"d/3", b"up"), file(b"d/.wh.2")),
    ),
    "opaque and empty": merged({b"d": MADE, **TOP}, LOWER, layer(file(OPAQUE))),
    "opaque where nothing is": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, b"n": MADE, **TOP},
        LOWER,
        layer(file(b"n/.wh..wh..opq")),
        umoci=unlike("makes no directory for a marker alone"),
    ),
    "an opaque root": merged({b"new": f()}, LOWER, layer(file(b"new"), file(b".wh..wh..opq"))),
    "an opaque root, between layers": merged(
        {b"last": f()}, LOWER, layer(file(b".wh..wh..opq")), layer(file(b"last"))
    ),
    "what a higher layer brings back": merged(
        {b"d": MADE, b"d/1": f(b"new"), **TOP},
        LOWER,
        layer(file(b".wh.d")),
        layer(file(b"d/1", b"new")),
    ),
    "of a file, then a directory of the name": merged(
        {b"top": MADE, b"top/in": f(), b"d": MADE, b"d/1": LOW, b"d/2": LOW},
        LOWER,
        layer(file(b".wh.top"), file(b"top/in")),
    ),
    "in a directory that no lower layer has": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, b"n": MADE, b"n/gone": NAME, **TOP},
        LOWER,
        layer(file(b"n/.wh.gone")),
        umoci=unlike("overlayfs lists a whiteout where it has nothing to merge"),
    ),
    "of the name .opq": merged(
        {b"a": f()}, layer(file(b".opq"), file(b"a")), layer(file(b".wh..opq"))
    ),
    "aufs's own": merged(
        {b"a": f()},
        layer(file(b".wh..wh.aufs"), file(b".wh..wh.plnk/12.34"), file(b"a")),
        umoci=unlike("makes what is below aufs's own directories"),
    ),
    "in a directory replaced by a link": merged(
        {b"a": link(OUT)}, layer(file(b"a/.wh.file"), file(b"a/.wh..wh..opq"), symlink(b"a", OUT))
    ),
    "below a link": bad_layer(
        f"a: {NO_DIRECTORY}", layer(symlink(b"a", OUT), file(b"a/.wh.file")), umoci=IN_ROOT
    ),
    "below a link of a lower layer": merged(
        {b"a": MADE, b"a/file": NAME},
        layer(symlink(b"a", OUT)),
        layer(file(b"a/.wh.file")),
        umoci=unlike("the link is followed, in the root"),
    ),
    "of no name": bad_layer(
        "a/.wh.: a whiteout of no name",
        layer(file(b"a/.wh.")),
        umoci=accepts("takes it for a whiteout of the directory that it is in"),
    ),
    "of the directory": bad_layer(
        "a/.wh..: a whiteout of no name",
        layer(file(b"a/.wh..")),
        umoci=accepts("takes it for a whiteout of the directory that it is in"),
    ),
    "of the parent": bad_layer("a/.wh...: a whiteout of no name", layer(file(b"a/.wh..."))),
    "of a long name": bad_layer(
        f".wh.{'n' * 300}: a whiteout of a name that is too long",
        layer(long_name(b".wh." + b"n" * 300) + file(b"x")),
    ),
    "with entries below": bad_layer(
        "a/.wh.b/c: an entry lies below a whiteout",
        layer(file(b"a/.wh.b/c")),
        umoci=accepts("makes a directory of that name"),
    ),
}

# What overlayfs believes --------------------------------------------------------------------


def xattrs(*pairs: tuple[bytes, bytes]) -> bytes:
    return raw_pax(b"".join(record(b"SCHILY.xattr." + key, value) for key, value in pairs))


BELIEVED = {
    "a raw whiteout": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, **TOP},
        LOWER,
        layer(header(b"top", b"3"), header(b"d", b"3")),
        umoci=unlike("makes the device, and it replaces what is there"),
    ),
    "opaque by an attribute": merged(
        {b"d": d(), b"d/1": LOW, b"d/2": LOW, **TOP},
        LOWER,
        layer(xattrs((b"trusted.overlay.opaque", b"y")) + directory(b"d")),
    ),
    "opaque by a user's attribute": merged(
        {b"d": d(), b"d/1": LOW, b"d/2": LOW, **TOP},
        LOWER,
        layer(xattrs((b"user.overlay.opaque", b"y")) + directory(b"d")),
        umoci=unlike("keeps attributes of user.overlay"),
    ),
    "a whiteout by an attribute": merged(
        {b"d": d(), b"d/1": f(), b"d/2": LOW, **TOP},
        LOWER,
        layer(
            xattrs((b"trusted.overlay.opaque", b"x")) + directory(b"d"),
            xattrs((b"trusted.overlay.whiteout", b"")) + file(b"d/1"),
        ),
    ),
    "a redirect": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, b"new": d(), **TOP},
        LOWER,
        layer(xattrs((b"trusted.overlay.redirect", b"/d")) + directory(b"new")),
    ),
    "a copy of metadata only": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, b"top": f()},
        LOWER,
        layer(xattrs((b"trusted.overlay.metacopy", b"")) + file(b"top")),
    ),
}

# Devices and FIFOs --------------------------------------------------------------------------

MAKES = unlike("makes device nodes when it is root")

DEVICES = {
    "of characters and blocks": good(
        {b"after": f()},
        layer(header(b"null", b"3", tail=b""), header(b"dev/sda", b"4"), file(b"after")),
        umoci=MAKES,
    ),
    "in place of a file": good(
        {b"a": f(b"x")}, layer(file(b"a", b"x"), header(b"a", b"3")), umoci=MAKES
    ),
    "below a link": good(
        {b"a": link(OUT + b"/directory")},
        layer(INTO, header(b"a/null", b"3")),
        umoci=unlike("follows the link in the root and makes the device"),
    ),
    "a FIFO": good(
        {b"a": fifo(0o6620, uid=3, gid=4)}, layer(header(b"a", b"6", mode=0o6620, uid=3, gid=4))
    ),
    "a FIFO below a FIFO": bad_layer(
        f"a: {NO_DIRECTORY}", layer(header(b"a", b"6"), header(b"a/b", b"6"))
    ),
    "with content that they cannot have": good(
        {b"a": fifo(), b"b": f(b"x")}, layer(header(b"a", b"6", size=4096), file(b"b", b"x"))
    ),
}

# Set-id bits, modes and owners --------------------------------------------------------------

SET_ID = {
    "set-user-id and owner": good(
        {b"a": f(b"x", 0o6755, uid=12, gid=34)},
        layer(file(b"a", b"x", mode=0o6755, uid=12, gid=34)),
    ),
    "a directory that gives its group": good(
        {
            b"d": d(0o2755, gid=50),
            b"d/f": f(),
            b"d/d": d(),
            b"d/l": link(b"f"),
            b"d/p": fifo(),
        },
        layer(
            header(b"d", b"5", mode=0o2755, gid=50),
            file(b"d/f"),
            directory(b"d/d"),
            symlink(b"d/l", b"f"),
            header(b"d/p", b"6"),
        ),
    ),
    "sticky": good({b"tmp": d(0o1777)}, layer(directory(b"tmp", 0o1777))),
    "of mode 0": good(
        {b"d": d(0), b"d/f": f(b"x", 0)}, layer(directory(b"d", 0), file(b"d/f", b"x", mode=0))
    ),
    "bits beyond a mode": good(
        {b"a": f(b"", 0o644)},
        layer(header(b"a", mode=0o100644)),
    ),
    "of the root": good(
        {b".": d(0o1711, uid=5, gid=6, mtime=7)},
        layer(header(b"./", b"5", mode=0o1711, uid=5, gid=6, mtime=7)),
    ),
    "of the root, said twice": good(
        {b".": d(0o700, mtime=8)},
        layer(header(b"./", b"5", mode=0o777, mtime=7), header(b"/", b"5", mode=0o700, mtime=8)),
    ),
    "the highest id": good(
        {b"a": f(uid=65535, gid=65535)}, layer(file(b"a", uid=65535, gid=65535))
    ),
    "an id beyond": bad_layer(
        "a: uid 65536 is not below 65536",
        layer(file(b"a", uid=65536)),
        umoci=accepts("root may own files by any id"),
    ),
    "an id that overflows": bad_layer(
        "a: gid 4294967296 is not below 65536",
        layer(pax(gid=b"4294967296") + file(b"a")),
        umoci=accepts("hands it to chown, where it becomes 0"),
    ),
    "an id that wraps to root": bad_layer(
        "a number in an extended header is out of range",
        layer(pax(uid=b"18446744069414584320") + file(b"a")),
    ),
    "a negative id": bad_layer(
        "a: uid -2 is not below 65536",
        layer(file(b"a", uid=-2)),
        umoci=accepts("hands it to chown, where it becomes 4294967294"),
    ),
    "an id of other digits": bad_layer(
        "a number in an extended header is not decimal",
        layer(pax(uid="\u0661".encode()) + file(b"a")),
    ),
}

# Extended attributes ------------------------------------------------------------------------

NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
DROPPED = [
    (b"trusted.md5sum", b"x"), (b"security.selinux", b"x"), (b"security.ima", b"x"),
    (b"system.posix_acl_access", b"x"), (b"user.overlay.origin", b"x"), (b"none", b"x"),
]  # fmt: skip
KEEPS = unlike("keeps what the file system takes")

XATTRS = {
    "of users": good(
        {b"d": d(xattrs={"user.a": b"\0\n="}), b"f": f(xattrs={"user.a": b"1", "user.b": b""})},
        layer(
            xattrs((b"user.a", b"\0\n=")) + directory(b"d"),
            xattrs((b"user.a", b"1"), (b"user.b", b"")) + file(b"f"),
        ),
        umoci=unlike("leaves out attributes of no bytes, as Go's reader does"),
    ),
    "of the root": good(
        {b".": d(xattrs={"user.a": b"1"})}, layer(xattrs((b"user.a", b"1")) + directory(b"./"))
    ),
    "a capability": good(
        {b"ping": f(b"x", 0o755, uid=5, xattrs={"security.capability": NET_RAW})},
        layer(xattrs((b"security.capability", NET_RAW)) + file(b"ping", b"x", mode=0o755, uid=5)),
    ),
    "a capability of a directory": good(
        {b"d": d()},
        layer(xattrs((b"security.capability", NET_RAW)) + directory(b"d")),
        umoci=unlike("keeps what the kernel takes"),
    ),
    "a capability that is none": bad_layer(
        "a: fsetxattr: Invalid argument", layer(xattrs((b"security.capability", b"x")) + file(b"a"))
    ),
    "a capability of another namespace": bad_layer(
        "a: fsetxattr: Invalid argument",
        layer(
            xattrs((b"security.capability", struct.pack("<6I", 0x03000001, 1, 0, 0, 0, 70_000)))
            + file(b"a")
        ),
        umoci=accepts("root may say so"),
    ),
    "all others are dropped": good(
        {b"f": f(), b"d": d()},
        layer(xattrs(*DROPPED[:2]) + file(b"f"), xattrs(*DROPPED) + directory(b"d")),
        umoci=refuses("the kernel does not take this access list"),
    ),
    "in libarchive's words": good(
        {b"f": f()}, layer(pax(LIBARCHIVE__xattr__user__a=b"MQ") + file(b"f"))
    ),
    "of links and FIFOs": good(
        {b"l": link(b"f"), b"p": fifo()},
        layer(
            xattrs((b"user.a", b"1")) + symlink(b"l", b"f"),
            xattrs((b"user.a", b"1")) + header(b"p", b"6"),
        ),
        umoci=refuses("the kernel does not take them"),
    ),
    "of an entry, not of the next": good(
        {b"a": f(xattrs={"user.a": b"1"}), b"b": f()},
        layer(xattrs((b"user.a", b"1")) + file(b"a"), file(b"b")),
    ),
    "of a file that is replaced": good(
        {b"a": f()}, layer(xattrs((b"user.a", b"1")) + file(b"a"), file(b"a"))
    ),
    "a long name": bad_layer(
        "a: the name of an extended attribute is too long",
        layer(xattrs((b"user." + b"n" * 300, b"")) + file(b"a")),
        umoci=accepts("leaves out what the kernel finds too long"),
    ),
    "a long value": bad_layer(
        "a: fsetxattr: ...", layer(xattrs((b"user.a", bytes(70_000))) + file(b"a"))
    ),
}

# Times --------------------------------------------------------------------------------------

LATEST = (1 << 34) - 1 - (1 << 31)
"""Seconds: the last that ext4 keeps."""

TIMES = {
    "negative": good({b"a": f(mtime=-3)}, layer(file(b"a", mtime=-3))),
    "negative fractions": good(
        {b"a": f(mtime_ns=-1_250_000_000), b"b": f(mtime_ns=-500_000_000)},
        layer(pax(mtime=b"-1.25") + file(b"a"), pax(mtime=b"-0.5") + file(b"b")),
    ),
    "digits beyond nanoseconds": good(
        {b"a": f(mtime_ns=1_123_456_789)}, layer(pax(mtime=b"1.1234567899999") + file(b"a"))
    ),
    "of the year 2446": good(
        {b"a": f(mtime=LATEST)},
        layer(pax(mtime=b"%d" % LATEST) + file(b"a")),
        umoci=unlike("counts nanoseconds in 64 bits, which end in 2262"),
    ),
    "of a link": good(
        {b"a": link(b"b", mtime_ns=86_400_000_000_001)},
        layer(pax(mtime=b"86400.000000001") + symlink(b"a", b"b")),
    ),
    "of directories, whatever comes into them later": merged(
        {b".": d(mtime=111), b"a": d(mtime=222), b"z": f(), b"a/f": f(), b"b": d(), b"a/g": f()},
        layer(file(b"a/gone")),
        layer(
            header(b"./", b"5", mode=0o755, mtime=111),
            header(b"a", b"5", mode=0o755, mtime=222),
            file(b"z"),
            file(b"a/f"),
            directory(b"b"),
            file(b"a/g"),
            file(b"a/.wh.gone"),
        ),
    ),
    "out of range": bad_layer(
        "a number in an extended header is out of range",
        layer(pax(mtime=b"9" * 30) + file(b"a")),
    ),
    "not decimal": bad_layer(
        "a time in an extended header is not decimal", layer(pax(mtime=b"1e9") + file(b"a"))
    ),
}

# Entries that replace each other ------------------------------------------------------------

REPLACED = {
    "a file by a directory": good(
        {b"a": d(), b"a/b": f(b"2")}, layer(file(b"a", b"1"), directory(b"a"), file(b"a/b", b"2"))
    ),
    "a directory by a file": good({b"a": f(b"2")}, layer(file(b"a/b/c", b"1"), file(b"a", b"2"))),
    "a directory by a link": good({b"a": link(b"x")}, layer(file(b"a/b/c"), symlink(b"a", b"x"))),
    "a directory joins a directory": good(
        {b"a": d(0o711), b"a/b": f(), b"a/c": f()},
        layer(directory(b"a", 0o700), file(b"a/b"), directory(b"a", 0o711), file(b"a/c")),
    ),
    "a FIFO by a file": good({b"a": f(b"x")}, layer(header(b"a", b"6"), file(b"a", b"x"))),
    "a file by nothing: entries below it": bad_layer(
        f"a/b: {NO_DIRECTORY}", layer(file(b"a"), file(b"a/b/c"))
    ),
    "a file of a lower layer by a directory": merged(
        {b"a": MADE, b"a/b": f()},
        layer(file(b"a")),
        layer(file(b"a/b")),
        umoci=refuses("one tree for all layers: the file is in the way"),
    ),
    "a directory of a lower layer by a file": merged(
        {b"a": f(b"x")}, layer(file(b"a/b")), layer(file(b"a", b"x"))
    ),
    "a directory of a lower layer by its new attributes": merged(
        {b"a": d(0o700, uid=5), b"a/b": f()},
        layer(directory(b"a"), file(b"a/b")),
        layer(header(b"a", b"5", mode=0o700, uid=5)),
    ),
}

# Sparse files -------------------------------------------------------------------------------

HOLES = b"a" * 4096 + bytes(36864) + b"b" * 4096
HALVES = b"a" * 4096 + b"b" * 4096
ON_DISK = unlike("writes the holes of a sparse file as zeros")

SPARSE = {
    "GNU": good(
        {b"s": f(HOLES, has_holes=True)},
        layer(gnu_sparse(b"s", [(0, 4096), (40960, 4096)], 45056, HALVES)),
        umoci=refuses("does not know the type"),
    ),
    "GNU with a map of 30": good(
        {b"s": f(b"".join(b"x" + bytes(8) for _ in range(30)))},
        layer(gnu_sparse(b"s", [(n * 9, 1) for n in range(30)], 270, b"x" * 30)),
        umoci=refuses("does not know the type"),
    ),
    "PAX 0.1": good(
        {b"s": f(HOLES, has_holes=True)},
        layer(
            pax(
                GNU__sparse__map=b"0,4096,40960,4096",
                GNU__sparse__size=b"45056",
                GNU__sparse__numblocks=b"2",
            )
            + file(b"s", HALVES)
        ),
        umoci=ON_DISK,
    ),
    "PAX 1.0": good(
        {b"real": f(HOLES, has_holes=True)},
        layer(
            pax(
                GNU__sparse__major=b"1",
                GNU__sparse__minor=b"0",
                GNU__sparse__realsize=b"45056",
                GNU__sparse__name=b"real",
            )
            + file(b"s", padded(b"2\n0\n4096\n40960\n4096\n") + HALVES)
        ),
        umoci=ON_DISK,
    ),
    "PAX 0.0": bad_layer(
        "sparse files of PAX format 0.0 are not supported",
        layer(pax(GNU__sparse__offset=b"0") + file(b"s")),
    ),
    "of more than a file may have": bad_layer(
        "s: is larger than 65536 bytes",
        layer(gnu_sparse(b"s", [(0, 3)], 1 << 62, b"abc")),
    ),
    "that overlaps": bad_layer(
        "s: the map of a sparse file overlaps",
        layer(gnu_sparse(b"s", [(0, 5), (3, 5)], 10, b"x" * 10)),
    ),
    "with more data than its map": bad_layer(
        "s: the map of a sparse file does not fit its size",
        layer(gnu_sparse(b"s", [(0, 5)], 10, b"x" * 10)),
    ),
    "with data beyond its size": bad_layer(
        "s: the map of a sparse file does not fit its size",
        layer(gnu_sparse(b"s", [(8, 4)], 10, b"abcd")),
    ),
    "out of range": bad_layer(
        "s: the map of a sparse file is out of range",
        layer(gnu_sparse(b"s", [((1 << 63) - 1, 4)], 9, b"abcd")),
    ),
    "with a map that is none": bad_layer(
        "s: the map of a sparse file is malformed",
        layer(
            pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__realsize=b"9")
            + file(b"s", b"7\n" + b"x" * 510)
        ),
    ),
    "with a map that ends early": bad_layer(
        "s: the map of a sparse file is truncated",
        layer(
            pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__realsize=b"9")
            + file(b"s", b"1" * 15 + b"\n" + b"1\n0\n" * 124)
        ),
    ),
    "without a size": bad_layer(
        "s: a sparse file is described in two ways or not at all",
        layer(pax(GNU__sparse__map=b"0,1") + file(b"s", b"x")),
    ),
    "in two ways": bad_layer(
        "s: a sparse file is described in two ways or not at all",
        layer(
            pax(GNU__sparse__map=b"0,3", GNU__sparse__size=b"3")
            + gnu_sparse(b"s", [(0, 3)], 3, b"abc")
        ),
    ),
}

# Headers ------------------------------------------------------------------------------------

MALFORMED = "an extended header is malformed"

HEADERS = {
    "before POSIX": good(
        {b"d": d(), b"d/f": f(b"v7")},
        layer(
            header(b"d/", b"\0", magic=V7, mode=0o755), file(b"d/f", b"v7", kind=b"\0", magic=V7)
        ),
    ),
    "ustar's with a prefix": good(
        {b"some": MADE, b"some/prefix": MADE, b"some/prefix/f": f(b"x")},
        layer(file(b"f", b"x", tail=b"some/prefix")),
    ),
    "a link with a size": good(
        {b"a": link(b"x")}, layer(header(b"a", b"2", link=b"x", mode=0o777, size=4096))
    ),
    "GNU's with times where ustar has a prefix": good(
        {b"f": f(b"x")}, layer(file(b"f", b"x", magic=GNU, tail=b"14710000000"))
    ),
    "a file whose name ends in a slash": good({b"a": f(b"x")}, layer(file(b"a/", b"x"))),
    "a type that is not known": bad_layer(
        "f: unknown type of entry 0x56",
        layer(file(b"f", kind=b"V")),
    ),
    "a contiguous file": bad_layer(
        "f: unknown type of entry 0x37",
        layer(file(b"f", b"x", kind=b"7")),
    ),
    "Solaris's own": bad_layer(
        "f: unknown type of entry 0x58",
        layer(file(b"f", kind=b"X")),
    ),
    "a wrong checksum": bad_layer("a header's checksum is wrong", layer(header(b"f")[:-1] + b"x")),
    "a number that is not octal": bad_layer(
        "a number in a header is not octal",
        layer(with_checksum(header(b"f")[:100] + b"8" + header(b"f")[101:])),
    ),
    "a negative size": bad_layer("a size in a header is negative", layer(header(b"f", size=-1))),
    "a size of 90 bits": bad_layer(
        "a number in a header is out of range", layer(header(b"f", size=1 << 90))
    ),
    "a record longer than its header": bad_layer(
        MALFORMED, layer(raw_pax(b"99 path=x\n") + file(b"f"))
    ),
    "a record of nothing": bad_layer(MALFORMED, layer(raw_pax(b"3 \n") + file(b"f"))),
    "a record without a value": bad_layer(MALFORMED, layer(raw_pax(b"7 path\n") + file(b"f"))),
    "a record that does not end": bad_layer(MALFORMED, layer(raw_pax(b"8 path=x ") + file(b"f"))),
    "a negative size in a record": bad_layer(
        "a number in an extended header is not decimal", layer(pax(size=b"-5") + file(b"f"))
    ),
    "a size of its own in a record": good(
        {b"f": f(b"abc")}, layer(pax(size=b"3") + header(b"f", size=0) + padded(b"abc"))
    ),
    "two extended headers": bad_layer(
        "an entry has two extended headers",
        layer(pax(path=b"a") + pax(path=b"b") + file(b"f")),
        umoci=accepts("takes the last"),
    ),
    "an extended header of nothing": bad_layer(
        "an extended header has no entry", layer(pax(path=b"a")), umoci=LENIENT
    ),
    "an extended header of 2 MiB": bad_layer(
        "an extended header is longer than 1048576 bytes", layer(header(b"x", b"x", size=2 << 20))
    ),
}

# Bombs --------------------------------------------------------------------------------------

ZEROS = archive(many(lambda name: file(name, bytes(60_000)), 40))
NO_LIMIT = accepts("has no limits")
ENTRIES = "the layer has more than 50 entries"


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zstd(content: bytes, **options: int) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


def zstd_window(content: bytes) -> bytes:
    """A frame that asks for a window of a gigabyte."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


BOMBS = {
    "a large file": bad_layer(
        "big: is larger than 65536 bytes", layer(file(b"big", bytes(70_000))), umoci=NO_LIMIT
    ),
    "a large layer": bad_layer(
        "the layer is larger than 1048576 bytes",
        layer(many(lambda name: file(name, bytes(60_000)), 20)),
        umoci=NO_LIMIT,
    ),
    "gzip, a hundred to one": bad_layer(
        "the layer is larger than 1048576 bytes",
        Layer(archive=ZEROS, pack=gzipped, media_type=GZIP_LAYER),
        umoci=NO_LIMIT,
    ),
    "zstd, a thousand to one": bad_layer(
        "the layer is larger than 1048576 bytes",
        Layer(archive=ZEROS, pack=zstd, media_type=ZSTD_LAYER),
    ),
    "a file of eight gigabytes that never comes": bad_layer(
        "zeros: is larger than 65536 bytes", layer(header(b"zeros", size=1 << 33))
    ),
    "a zstd window of a gigabyte": bad_layer(
        "the layer's zstd stream is damaged: ...",
        Layer(archive=archive(file(b"f")), pack=zstd_window, media_type=ZSTD_LAYER),
    ),
    "entries": bad_layer(f"50: {ENTRIES}", layer(many(file, 60)), umoci=NO_LIMIT),
    "one name, again and again": bad_layer(
        f"f: {ENTRIES}", layer(many(lambda _: file(b"f"), 60)), umoci=NO_LIMIT
    ),
    "directories that no entry brings": bad_layer(
        f"{'d/' * 49}d: {ENTRIES}", layer(pax(path=b"d/" * 60 + b"f") + file(b"f")), umoci=NO_LIMIT
    ),
    "whiteouts": bad_layer(
        "has too many whiteouts",
        layer(many(lambda name: long_name(b".wh." + name * 100) + file(b"x"), 49)),
        umoci=NO_LIMIT,
    ),
}

# Truncation, padding and packing ------------------------------------------------------------

CONTENT = file(b"f", b"x" * 700)
NOISE = random.Random(1)
"""The same each time: it decides what is wrong with a packed archive that is called plain."""
TREE = archive(
    directory(b"./"), *(file(b"%d" % n, NOISE.randbytes(999) + bytes(9)) for n in range(40))
)
TREE_NODES = {b".": d()} | {b"%d" % n: f(TREE[BLOCK * (2 + 3 * n) :][:1008]) for n in range(40)}
NO_END = "the archive is truncated: it has no end mark"


def raw(content: bytes) -> Layer:
    return Layer(archive=content)


def packed(media_type: str, pack: Callable[[bytes], bytes]) -> Layer:
    return Layer(archive=TREE, pack=pack, media_type=media_type)


def two(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: pack(content[:9999]) + pack(content[9999:])


def gzip_with_fields(content: bytes) -> bytes:
    """A header with an extra field, a name, a comment and a checksum of its own."""
    head = b"\x1f\x8b\x08\x1e" + bytes(5) + b"\xff" + b"\4\0SGxx" + b"../../name\0comment\0"
    checksum = struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    return head + checksum + gzipped(content)[10:]


TRUNCATED = {
    "nothing at all": bad_layer(NO_END, raw(b""), umoci=LENIENT),
    "half a header": bad_layer("the archive is truncated", raw(CONTENT[:500])),
    "after a header": bad_layer("f: the archive is truncated", raw(CONTENT[:512])),
    "in content": bad_layer("f: the archive is truncated", raw(CONTENT[:1000])),
    "in padding": bad_layer("f: the archive is truncated", raw(CONTENT[:1500]), umoci=LENIENT),
    "without an end mark": bad_layer(NO_END, raw(CONTENT), umoci=LENIENT),
    "in an extended header": bad_layer(
        "the archive is truncated", raw(pax(path=b"a")[:600]), umoci=LENIENT
    ),
    "with half an end mark": good({b"f": f(b"x" * 700)}, raw(CONTENT + bytes(512))),
    "an entry after half an end mark": bad_layer(
        "an entry follows the end mark", raw(CONTENT + bytes(512) + archive(file(b"g")))
    ),
    "more after the end mark": good(
        {b"f": f(b"x" * 700)}, raw(archive(CONTENT) + b"any padding" + archive(file(b"g")))
    ),
}

GZIP_DAMAGED = "the layer's gzip stream is damaged: ..."

PACKED = {
    "plain": good(TREE_NODES, raw(TREE)),
    "gzip": good(TREE_NODES, packed(GZIP_LAYER, gzipped)),
    "gzip in Docker's words": good(TREE_NODES, packed(LAYER_TYPES[4], gzipped), umoci=NOT_OCI),
    "gzip with all fields of its header": good(
        TREE_NODES,
        packed(GZIP_LAYER, gzip_with_fields),
        umoci=refuses("pgzip finds the header's own checksum wrong; gzip and zlib do not"),
    ),
    "gzip members": good(TREE_NODES, packed(GZIP_LAYER, two(gzipped))),
    "gzip members of nothing": good(
        TREE_NODES, packed(GZIP_LAYER, lambda c: gzipped(b"") * 5000 + gzipped(c))
    ),
    "zstd": good(TREE_NODES, packed(ZSTD_LAYER, zstd), umoci=NO_ZSTD),
    "zstd frames": good(TREE_NODES, packed(ZSTD_LAYER, two(zstd)), umoci=NO_ZSTD),
    "zstd frames that are skipped": good(
        TREE_NODES,
        packed(ZSTD_LAYER, lambda c: b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstd(c)),
        umoci=NO_ZSTD,
    ),
    "gzip that ends early": bad_layer(GZIP_DAMAGED, packed(GZIP_LAYER, lambda c: gzipped(c)[:-5])),
    "gzip members, one cut off": bad_layer(
        GZIP_DAMAGED, packed(GZIP_LAYER, lambda c: gzipped(c) + gzipped(b"")[:-2])
    ),
    "gzip and more": bad_layer(GZIP_DAMAGED, packed(GZIP_LAYER, lambda c: gzipped(c) + b"more")),
    "gzip with a wrong checksum": bad_layer(
        GZIP_DAMAGED, packed(GZIP_LAYER, lambda c: gzipped(c)[:-8] + bytes(4) + gzipped(c)[-4:])
    ),
    "gzip with a wrong length": bad_layer(
        GZIP_DAMAGED, packed(GZIP_LAYER, lambda c: gzipped(c)[:-4] + bytes(4))
    ),
    "zstd that ends early": bad_layer(
        "the layer's zstd stream is ...", packed(ZSTD_LAYER, lambda c: zstd(c)[:-5])
    ),
    "zstd frames, one cut off": bad_layer(
        "the layer's zstd stream is ...", packed(ZSTD_LAYER, lambda c: zstd(c) + zstd(b"")[:-2])
    ),
    "zstd and more": bad_layer(
        "the layer's zstd stream is damaged: ...", packed(ZSTD_LAYER, lambda c: zstd(c) + b"more")
    ),
    "plain, called gzip": bad_layer(
        GZIP_DAMAGED,
        packed(GZIP_LAYER, bytes),
        umoci=accepts("skopeo looks at the content, and packs it"),
    ),
    "gzip, called plain": bad_layer(
        "a number in a header is not octal", packed(TAR_LAYER, gzipped)
    ),
    "zstd, called gzip": bad_layer(GZIP_DAMAGED, packed(GZIP_LAYER, zstd)),
}

# Digests of what was unpacked, and layers together ------------------------------------------

OTHER = "sha256:" + "0" * 64


def layers_of_numbers(count: int) -> list[Layer]:
    return [layer(file(b"%d" % number)) for number in range(count)]


STACKED = {
    "no layers": good({}),
    "a layer of nothing": good({}, layer()),
    "a layer twice": merged(
        {b"d": MADE, b"d/1": LOW, b"d/2": LOW, **TOP}, LOWER, layer(file(b".wh.d")), LOWER
    ),
    "another content than its diff_id": bad_layer(
        f"has content of {digest_of(TREE)}", Layer(archive=TREE, diff_id=OTHER)
    ),
    "padding that its diff_id does not count": bad_layer(
        f"has content of {digest_of(TREE + bytes(512))}",
        Layer(archive=TREE + bytes(512), diff_id=digest_of(TREE)),
    ),
    "130 layers": merged(
        {b"%d" % n: f() for n in range(130)},
        *layers_of_numbers(130),
        umoci=not_asked("takes three seconds"),
    ),
    "a bad layer over good ones": bad_layer(
        "../x: a name leads upwards",
        *layers_of_numbers(3),
        layer(file(b"../x")),
        umoci=CLEANS,
    ),
}

CASES: dict[str, Case] = numbered(
    {
        "names": NAMES,
        "links": LINKS,
        "hard links": HARD_LINKS,
        "whiteouts": WHITEOUTS,
        "overlay": BELIEVED,
        "devices": DEVICES,
        "set-id": SET_ID,
        "xattrs": XATTRS,
        "times": TIMES,
        "replaced": REPLACED,
        "sparse": SPARSE,
        "headers": HEADERS,
        "bombs": BOMBS,
        "truncated": TRUNCATED,
        "packed": PACKED,
        "stacked": STACKED,
    }
)
