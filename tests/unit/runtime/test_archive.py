"""What leaves a container as an archive, while the container goes on living."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest
import trio

from sandbox.client.nursery import open_nursery
from sandbox.errors import InvalidParameterException
from sandbox.runtime import archive


async def packed(root: Path, path: str) -> tarfile.TarFile:
    """The archive of `path` in `root`, read to its end."""
    read, write = os.pipe()
    at = os.open(root, os.O_PATH)
    data = b""

    async def collect() -> None:
        nonlocal data
        async with trio.lowlevel.FdStream(read) as stream:
            async for chunk in stream:
                data += chunk

    try:
        async with open_nursery() as nursery:
            nursery.start_soon(collect)
            try:
                await archive.pack(at, path, write, os.getuid())
            finally:
                os.close(write)
    finally:
        os.close(at)
    return tarfile.open(fileobj=io.BytesIO(data))


@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_file_that_changes_meanwhile_keeps_its_announced_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"x" * 100_000)
    (tree / "b").write_bytes(b"after")
    reopen = archive._reopen

    def changing(fd: int, flags: int) -> int:
        if not flags & os.O_DIRECTORY:
            os.truncate(tree / "a", size)
        return reopen(fd, flags)

    monkeypatch.setattr(archive, "_reopen", changing)
    with await packed(tmp_path, "tree") as tar:
        a, b = tar.extractfile("tree/a"), tar.extractfile("tree/b")
        assert a and b
        assert a.read() == (b"x" * min(size, 100_000)).ljust(100_000, b"\0")
        assert b.read() == b"after"


async def test_a_file_that_vanishes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "b").write_bytes(b"b")
    monkeypatch.setattr(archive, "_names", lambda _: ["a", "b"])
    with await packed(tmp_path, "tree") as tar:
        assert tar.getnames() == ["tree", "tree/b"]


async def test_what_cannot_be_copied_is_named_for_the_reader_to_count(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree" / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "tree" / "socket"))
    with await packed(tmp_path, "tree") as tar:
        assert [(m.name, m.type) for m in tar if not m.isdir()] == [
            ("tree/fifo", tarfile.FIFOTYPE),
            ("tree/socket", tarfile.FIFOTYPE),
        ]


async def test_a_reader_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    read, write = os.pipe()
    os.close(read)
    at = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(InvalidParameterException, match="nobody reads"):
            await archive.pack(at, "/file", write, 0)
    finally:
        os.close(at)
        os.close(write)


async def test_a_tree_without_a_bottom_is_refused(tmp_path: Path) -> None:
    current = tmp_path
    for _ in range(archive._MAX_DEPTH + 2):
        current /= "d"
        current.mkdir()
    with pytest.raises(InvalidParameterException, match="more than 200 deep"):
        await packed(tmp_path, "d")


@pytest.mark.parametrize("blocks", range(21))
async def test_an_archive_that_comes_in_is_read_to_its_very_end(
    tmp_path: Path, blocks: int
) -> None:
    with (tmp_path / "archive").open("w+b", buffering=0) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            member = tarfile.TarInfo("file")
            member.size = 512 * blocks
            tar.addfile(member, io.BytesIO(bytes(512 * blocks)))
        file.seek(0)
        at = os.open(tmp_path, os.O_PATH)
        try:
            await archive.unpack(at, "/", file.fileno(), os.getuid())
        finally:
            os.close(at)
        assert file.read() == b"", "whoever writes it would find that nobody reads"
