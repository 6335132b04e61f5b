"""What tarfile needs to be told before it reads a stranger's archive."""

from __future__ import annotations

import tarfile

_MAX_HEADER_BYTES = 1 << 20


class BoundedMember(tarfile.TarInfo):
    """tarfile reads the headers of long names and attributes whole, however long they say to be."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if not self.isreg() and self.size > _MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]
