"""What tasks, keepers and clients write: any bytes give a value or the error that is documented."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox.client import archive, varlink
from sandbox.errors import ConfigError, InvalidParameterException, SandboxError
from sandbox.runtime import archive as into_task
from sandbox.runtime import keeper
from sandbox.runtime.logs import STREAMS, Tail
from sandbox.varlink import calls, faults, frames
from tests.fuzz.hostile_bytes import hostile

# What a keeper wrote down ----------------------------------------------------------------------

EXIT = [b"ended 0 256 1700000000000000000\nlost 1 28\n", b"failed 3 2 1700000000000000000\n"]
PID = [b"keeper 12 345\ninit 13 346\nterminal 7\nuserns 8\nnetns 9\n"]


@given(hostile(EXIT))
@example(b"ended 0 256 " + b"9" * 400)
@example(b"ended 0 256 " + b"9" * 5000)
@example(b"ended 0 256 1\nlost 1 " + b"9" * 30)
def test_how_a_container_ended_is_read_or_not_known(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "exit").write_bytes(content)
        found = keeper.read_exit(Path(directory))
        assert found is None or isinstance(found, keeper.Ended | keeper.Failed)
        assert all(loss.isprintable() for loss in keeper.read_losses(Path(directory)))


@given(hostile(PID))
def test_who_a_keeper_is_is_read_or_not_known(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "pid").write_bytes(content)
        assert keeper.has_begun(Path(directory)) in (True, False)


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack("<QBI", 5, stream, len(data)) + data


LOG = [frame(1, b"out\n") + frame(2, b"err") + frame(255, b"keeper"), frame(3, b"x" * 300)]


@given(st.lists(hostile(LOG), max_size=3), st.sampled_from(["1", "01", "x", "٣"]))
@example([b"\0" * 9 + b"\xff" * 4], "1")
def test_a_log_gives_frames_that_were_written_or_none(segments: list[bytes], odd: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        log.mkdir()
        (log / odd).write_bytes(b"")
        for number, content in enumerate(segments, 2):
            (log / str(number)).write_bytes(content)
        tail = Tail(Path(directory), "app")
        records = list(tail.read())
        assert list(tail.read()) == []
    written = b"".join(segments)
    assert all(record.data in written for record in records)
    assert {record.stream for record in records} <= set(STREAMS.values())


# The control socket ----------------------------------------------------------------------------

KINDS: list[type[calls.Call[Any]]] = [
    kind
    for kind in vars(calls).values()
    if isinstance(kind, type)
    and issubclass(kind, calls.Call)
    and kind not in (calls.Call, calls.Stream)
]
REQUEST = {
    "method": "io.sandbox.RunTask",
    "more": True,
    "parameters": {
        "request": {
            "definition": {
                "family": "a",
                "cpu": "256",
                "memory": "512",
                "container_definitions": [{"name": "a", "image": "b", "command": ["c"]}],
            }
        },
        "streams": {"a": {"stdin": 0}},
        "task": "a",
        "path": "/",
        "archive": 0,
        "reference": "a",
        "image": "a",
        "signal": 9,
    },
}
ERROR = {"error": "io.sandbox.KernelError", "parameters": {"call": "a", "subject": "b", "errno": 2}}


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\0", b"")), max_size=8), st.data())
def test_messages_are_the_same_however_they_are_cut(
    messages: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(message + b"\0" for message in messages)
    reader, found = frames.Frames(limit=64), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert [each.body for each in found] == messages


@given(st.binary(max_size=300))
def test_a_message_beyond_its_bound_is_refused_and_none_other(data: bytes) -> None:
    longest = max(map(len, data.split(b"\0")))
    try:
        frames.Frames(limit=20).feed(data)
    except frames.Broken:
        assert longest > 20
    else:
        assert longest <= 20


@given(hostile([], [REQUEST]), st.sampled_from(KINDS))
def test_a_call_is_understood_or_unreadable(data: bytes, kind: type[calls.Call[Any]]) -> None:
    try:
        request = msgspec.json.decode(data, type=frames.Request)
        call = msgspec.json.decode(request.parameters, type=kind)
    except frames.UNREADABLE:
        return
    assert msgspec.json.decode(msgspec.json.encode(call), type=kind) == call


@given(hostile([], [ERROR, {"parameters": {"version": "1", "instance": "a"}}]))
def test_an_answer_is_understood_or_one_of_our_errors(data: bytes) -> None:
    try:
        varlink.answer(calls.GetAgent(), frames.Frame(data))
    except SandboxError as error:
        assert type(error) in (*faults.CLASSES.values(), SandboxError)


# What comes out of a task ----------------------------------------------------------------------


def tar_of(*members: tuple[str, bytes, bytes | str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, str):
                member.linkname = content
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


F, D, L, H = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
OUT = [
    tar_of(("a/b", F, b"x"), ("a/h", H, "a/b"), ("a/l", L, "/etc"), ("a/" + "n" * 200, F, b"y")),
    tar_of(("a", D, b""), ("a/l", L, ".."), ("a/l/x", F, b"z"), ("a/f", tarfile.FIFOTYPE, b"")),
]


@given(hostile(OUT))
@example(tar_of(("a", H, "")))
@example(tar_of(("a", H, "/")))
def test_what_comes_out_of_a_task_stays_where_it_was_wanted(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        wanted = Path(directory) / "wanted"
        wanted.mkdir()
        with suppress(ConfigError, InvalidParameterException):
            archive.unpack(io.BytesIO(data), str(wanted / "copy"))
        assert os.listdir(directory) == ["wanted"]
        assert set(os.listdir(wanted)) <= {"copy"}


# What goes into one ----------------------------------------------------------------------------

IN = [*OUT, gzip.compress(OUT[0], mtime=0), bz2.compress(OUT[0]), lzma.compress(OUT[0])]


@given(hostile(IN))
def test_what_a_client_puts_into_a_task_is_an_archive_or_refused(data: bytes) -> None:
    fd = os.memfd_create("archive")
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        with suppress(InvalidParameterException), into_task._reading(fd) as tar:
            for member in into_task._bounded(tar):
                if content := tar.extractfile(member):
                    content.read()
    finally:
        os.close(fd)
