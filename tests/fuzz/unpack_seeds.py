"""Archives to start fuzzing from: one of each kind of header, and all of the hostile corpus.

python -m tests.fuzz.unpack_seeds DIRECTORY
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.hostile.layers import CASES
from tests.kernel import archives as tar

MAX_BYTES = 16384
"""Of an input: tests/fuzz/run_unpack."""
GOOD = {
    "files": tar.directory(b"./") + tar.file(b"a/b", b"x" * 600) + tar.hardlink(b"h", b"a/b"),
    "replaced": tar.directory(b"a") + tar.file(b"a/b/c") + tar.symlink(b"a", b"/mnt"),
    "merged": tar.symlink(b"a", b"b") + tar.directory(b"a") + tar.header(b"a/f", b"6"),
    "whiteouts": tar.file(b"a/.wh.b") + tar.file(b"a/.wh..wh..opq") + tar.header(b"n", b"3"),
    "long": tar.long_name(b"n" * 150) + tar.long_name(b"t" * 150, b"K") + tar.symlink(b"x", b"y"),
    "pax": tar.pax(path=b"p/q", linkpath=b"z", mtime=b"-1.5", uid=b"7", size=b"3")
    + tar.file(b"x", b"abc"),
    "xattr": tar.raw_pax(
        tar.record(b"SCHILY.xattr.user.a", b"1")
        + tar.record(b"SCHILY.xattr.trusted.overlay.opaque", b"y")
    )
    + tar.file(b"x"),
    "gnu sparse": tar.gnu_sparse(b"s", [(n * 99, 3) for n in range(30)], 9999, b"x" * 90),
    "sparse 0.1": tar.pax(GNU__sparse__map=b"0,2,9,1", GNU__sparse__size=b"10")
    + tar.file(b"s", b"abc"),
    "sparse 1.0": tar.pax(
        GNU__sparse__major=b"1", GNU__sparse__realsize=b"10", GNU__sparse__name=b"real"
    )
    + tar.file(b"s", tar.padded(b"2\n0\n2\n9\n1\n") + b"abc"),
    "global": tar.raw_pax(tar.record(b"path", b"no"), b"g") + tar.file(b"f"),
    "base 256": tar.file(b"f", b"x", mtime=-(1 << 60)),
    "v7": tar.header(b"d/", b"\0", magic=tar.V7),
}


def main(directory: Path) -> None:
    directory.mkdir()
    seeds = {name: tar.archive(members) for name, members in GOOD.items()}
    seeds |= {
        name: case.image.layers[-1].archive for name, case in CASES.items() if case.image.layers
    }
    for name, content in seeds.items():
        if len(content) <= MAX_BYTES:
            (directory / re.sub(r"\W", "-", name)).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
