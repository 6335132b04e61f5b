"""What comes out of a task is hostile: nothing is made outside of the destination."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from sandbox.client.archive import NoArchive, pack, unpack
from sandbox.errors import ConfigError, InvalidParameterException


def stream(*members: tuple[str, bytes | str | None, bytes]) -> io.BytesIO:
    """A tar of (name, content or link target, type)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o6755
            if isinstance(content, str):
                member.linkname = content
            elif content is not None:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    out.seek(0)
    return out


FILE, DIR, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def test_a_tree_comes_back_as_it_was_packed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"x" * 100_000)
    (source / "link").symlink_to("deep/file")
    os.link(source / "deep" / "file", source / "hard")
    (source / "run").write_text("#!/bin/sh")
    (source / "run").chmod(0o755)
    out = io.BytesIO()
    pack(str(source), "anything", out)
    out.seek(0)
    assert unpack(out, str(tmp_path / "copy")) == 0
    copy = tmp_path / "copy"
    assert (copy / "hard").read_bytes() == (copy / "deep" / "file").read_bytes() == b"x" * 100_000
    assert os.readlink(copy / "link") == "deep/file"
    assert stat.S_IMODE((copy / "run").stat().st_mode) == 0o755


@pytest.mark.parametrize("blocks", range(21))
def test_an_archive_of_any_size_is_read_to_its_very_end(tmp_path: Path, blocks: int) -> None:
    archive = stream(("file", bytes(512 * blocks), FILE))
    assert unpack(archive, f"{tmp_path}/") == 0
    assert archive.read() == b"", "whoever writes it would find that nobody reads"


def test_a_directory_receives_the_copy_under_its_own_name(tmp_path: Path) -> None:
    unpack(stream(("name", b"a", FILE)), str(tmp_path))
    assert (tmp_path / "name").read_bytes() == b"a"
    unpack(stream(("name", b"b", FILE)), str(tmp_path / "other"))
    assert (tmp_path / "other").read_bytes() == b"b"


def test_a_whole_root_takes_the_name_of_its_destination(tmp_path: Path) -> None:
    members = ((".", None, DIR), ("./bin", None, DIR), ("./bin/sh", b"sh", FILE))
    unpack(stream(*members), str(tmp_path / "root"))
    assert (tmp_path / "root" / "bin" / "sh").read_bytes() == b"sh"
    unpack(stream(*members), str(tmp_path))
    assert (tmp_path / "bin" / "sh").read_bytes() == b"sh"


def test_names_that_climb_out_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("../evil", "a/../../evil", "/../evil"):
        with pytest.raises(InvalidParameterException, match="climbs out"):
            unpack(stream((name, b"evil", FILE)), str(inside))
    unpack(stream(("/abs", b"a", FILE)), str(inside))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["abs", "inside"]


@pytest.mark.parametrize("target", ["/", "..", "../outside"])
def test_links_of_the_archive_are_made_but_never_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    hostile = stream(("t", None, DIR), ("t/out", target, LINK), ("t/out/evil", b"e", FILE))
    with pytest.raises(ConfigError):
        unpack(hostile, str(tmp_path / "inside"))
    assert os.readlink(tmp_path / "inside" / "t" / "out") == target
    assert not list(tmp_path.rglob("evil"))


def test_a_file_replaces_a_link_instead_of_writing_through_it(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "inside").mkdir()
    hostile = stream(("t", str(tmp_path / "victim"), LINK), ("t", b"theirs", FILE))
    unpack(hostile, str(tmp_path / "inside"))
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "inside" / "t").read_text() == "theirs"


def test_a_hard_link_to_something_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "inside").mkdir()
    with pytest.raises(InvalidParameterException):
        unpack(stream(("t", None, DIR), ("t/h", "../secret", HARD)), str(tmp_path / "inside"))


def test_devices_are_skipped_and_set_id_bits_dropped(tmp_path: Path) -> None:
    members = (("t", None, DIR), ("t/null", None, tarfile.CHRTYPE), ("t/su", b"x", FILE))
    assert unpack(stream(*members), str(tmp_path)) == 1
    assert stat.S_IMODE((tmp_path / "t" / "su").stat().st_mode) == 0o755
    assert not (tmp_path / "t" / "null").exists()


def test_a_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "kept").write_text("k")
    with pytest.raises(ConfigError):
        unpack(stream(("t", b"x", FILE)), str(tmp_path))
    assert (tmp_path / "t" / "kept").read_text() == "k"


@pytest.mark.parametrize("data", [b"", b"nonsense" * 100])
def test_something_that_is_no_archive_is_said(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidParameterException, match="proper archive"):
        unpack(io.BytesIO(data), str(tmp_path / "x"))


@pytest.mark.parametrize("target", ["", "/", "//"])
def test_a_hard_link_to_nothing_is_an_error(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        unpack(stream(("x", target, HARD)), str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_without_end_is_not_read_into_memory(tmp_path: Path, kind: bytes) -> None:
    class Endless(io.RawIOBase):
        """A header that says to be as long as can be, and then is."""

        def __init__(self) -> None:
            member = tarfile.TarInfo("x")
            member.type, member.size = kind, 8 << 30
            self.sent = 0
            self.rest = member.tobuf(tarfile.GNU_FORMAT)

        def read(self, size: int = -1) -> bytes:
            piece, self.rest = (self.rest + b" " * size)[:size], self.rest[size:]
            self.sent += size
            assert self.sent < 4 << 20
            return piece

    with pytest.raises(NoArchive):
        unpack(Endless(), str(tmp_path / "x"))  # type: ignore[arg-type]
