from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sandbox.errors import ImageError
from sandbox.images.blobs import BlobStore, checking
from sandbox.images.documents import Descriptor

BODY = b"content"
BLOB = Descriptor(digest="sha256:" + hashlib.sha256(BODY).hexdigest(), size=len(BODY))


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


async def test_what_was_written_is_found_by_its_digest(blobs: BlobStore) -> None:
    await blobs.write(BODY)
    await blobs.write(BODY)
    assert blobs.digests() == {BLOB.digest}
    assert blobs.read(BLOB) == BODY
    blobs.remove(BLOB.digest)
    blobs.remove(BLOB.digest)
    assert not blobs.has(BLOB.digest)


@pytest.mark.parametrize("pieces", [[b"conTent"], [b"conten"], [b"content", b"!"], []])
async def test_wrong_content_is_never_stored(
    blobs: BlobStore, pieces: list[bytes], tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match="content of sha256:"):
        async with blobs.writing(BLOB) as send:
            for piece in pieces:
                await send(piece)
    with pytest.raises(ImageError, match="content of sha256:"):
        async with checking(BLOB) as send:
            for piece in pieces:
                await send(piece)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_what_is_given_up_is_not_stored(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with blobs.writing(BLOB) as send:
            await send(BODY)
            raise ZeroDivisionError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_damaged_file_is_not_read_as_its_digest(blobs: BlobStore) -> None:
    await blobs.write(BODY)
    blobs.path(BLOB.digest).write_bytes(b"Content")
    with pytest.raises(ImageError, match="damaged"):
        blobs.read(BLOB)


def test_the_sweep_leaves_whole_files(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "blobs/tmp/half").write_bytes(b"half")
    (tmp_path / "blobs/sha256" / BLOB.digest[7:]).write_bytes(BODY)
    blobs.sweep()
    assert blobs.digests() == {BLOB.digest}
    assert list((tmp_path / "blobs/tmp").iterdir()) == []


def test_nobody_else_may_look_in(tmp_path: Path) -> None:
    BlobStore(tmp_path / "blobs")
    assert (tmp_path / "blobs/sha256").stat().st_mode & 0o777 == 0o700
