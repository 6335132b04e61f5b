"""What `sandbox doctor --deep` shows; tests/kernel/test_doctor.py runs it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sandbox.cli import deep, doctor
from sandbox.errors import SandboxError
from sandbox.model.protections import ROWS, WAYS

GUIDE = Path(__file__).parents[3] / "docs/guide/doctor.md"

FAILED = {
    "name": "a protection",
    "place": "system_calls native mount",
    "found": "success",
    "demanded": "EPERM",
    "mend": "what to do",
    "ways": ["exec"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "shown"), [(io.StringIO, False), (Terminal, True)])
def test_progress_is_shown_on_a_terminal_alone_and_wiped_away(
    stderr: type[io.StringIO], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = stderr()
    monkeypatch.setattr("sys.stderr", to)
    with doctor.progress(2) as tell:
        tell("exec")
    line = "\r1 of 2 ways into a task: exec\x1b[K\r\x1b[K"
    assert to.getvalue() == (line if shown else "")


def test_a_failed_protection_is_told_with_the_ways_in_that_it_fails_by(
    capsys: pytest.CaptureFixture[str],
) -> None:
    everywhere = FAILED | {"name": "another", "ways": ["exec", "init"]}
    doctor.show_examined({"checked": 7, "ways": ["exec", "init"], "failed": [FAILED, everywhere]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "!!  a protection",
        "      found at system_calls native mount: success",
        "      demanded: EPERM",
        "      what to do",
        "      only by: exec",
    ]
    assert lines[5] == "!!  another" and "only by" not in "".join(lines[6:])
    assert lines[-1] == "7 protections checked inside real tasks, by 2 ways in: 2 do not hold"


def test_what_a_hostile_report_holds_does_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile: dict[str, Any] = FAILED | {"found": "\x1b[2J", "place": "mounts /\x9b2J"}
    doctor.show_examined({"checked": 1, "ways": ["exec"], "failed": [hostile]})
    assert not {"\x1b", "\x9b"} & set(capsys.readouterr().out)


def test_the_image_is_the_probe_and_its_users(tmp_path: Path) -> None:
    program, file = tmp_path / "program", tmp_path / "image.tar"
    program.write_bytes(b"a program")
    deep.image_archive(file, program)
    with tarfile.open(file) as archive:
        files = {entry.name: entry.mode for entry in archive if entry.isfile()}
    assert files == {
        "etc/passwd": 0o644,
        "etc/group": 0o644,
        "probe": 0o755,
        "probe-set-uid": 0o4755,
    }


@pytest.mark.parametrize("written", [b"", b"no JSON", b'{"cut": ', b"\xff"])
def test_a_report_that_is_none_is_an_error_of_one_line(written: bytes) -> None:
    with pytest.raises(SandboxError, match="report cannot be read"):
        deep.parsed(written)


@pytest.mark.parametrize(("mask", "may"), [("000001ffffffffff", True), ("000001fffeffffff", False)])
def test_whether_limits_may_be_raised_is_read_from_the_capabilities(
    mask: str, may: bool, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tagent\nCapEff:\t{mask}\n")
    assert deep.this_host(str(status)).may_raise_limits is may


def test_the_guide_shows_what_is_told() -> None:
    told = f"{len(ROWS)} protections checked inside real tasks, by {len(WAYS)} ways in: all hold"
    assert told in GUIDE.read_text()
