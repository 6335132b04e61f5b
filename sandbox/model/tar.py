"""What tarfile needs to be told before it reads a stranger's archive."""

from __future__ import annotations

import tarfile
from typing import IO

_MAX_HEADER_BYTES = 1 << 20
_MAX_PADDING_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16


class BoundedMember(tarfile.TarInfo):
    """tarfile reads the headers of long names and attributes whole, however long they say to be."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if not self.isreg() and self.size > _MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def read_padding(stream: IO[bytes]) -> None:
    """What follows the mark that ends an archive: tar pads to whole records, and who still writes
    them must not find that nobody reads. Not more than any padding is."""
    for _ in range(0, _MAX_PADDING_BYTES, _PIECE_BYTES):
        if not stream.read(_PIECE_BYTES):
            return
