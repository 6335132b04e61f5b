"""Programs as Python compiles them, read back byte by byte; the keeper's own table beside ours.

What the keeper makes of them is tests/kernel/test_keeper.py's business, and any bytes at all are
native/fuzz_program.c's.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from errno import E2BIG, ENOENT, ENOEXEC
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import KernelError
from sandbox.kernel.program import FIRST_FD, MAGIC, MAX_PROGRAM, RECORDS, Field, Program, groups

KEEPER = Path(__file__).parents[3] / "sandbox/_bin/keeper"

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
raw = st.binary().filter(lambda data: b"\0" not in data)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "u": st.integers(0, 2**32 - 1),
    "U": st.integers(0, 2**64 - 1),
    "s": texts | raw,
    "b": st.binary(),
    "l": st.lists(texts | raw),
}
records = st.sampled_from(sorted(RECORDS)).flatmap(
    lambda name: st.tuples(st.just(name), st.tuples(*(FIELDS[kind] for kind in RECORDS[name][1])))
)


class Reader:
    """Takes a program apart as keeper.h describes it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        assert len(self.data) >= size
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> bytes:
        text, nul, self.data = self.data.partition(b"\0")
        assert nul
        return text

    def field(self, kind: str) -> Any:
        match kind:
            case "u":
                return self.number("<I")
            case "U":
                return self.number("<Q")
            case "s":
                return self.text()
            case "b":
                return self.take(self.number("<I"))
            case _:
                return [self.text() for _ in range(self.number("<I"))]

    def record(self) -> tuple[str, tuple[Any, ...]]:
        number, zero, length = self.number("<H"), self.number("<H"), self.number("<I")
        assert zero == 0
        name, shape = next((n, shape) for n, (op, shape) in RECORDS.items() if op == number)
        payload = Reader(self.take(length))
        fields = tuple(payload.field(kind) for kind in shape)
        assert payload.data == b""
        return name, fields


def read(data: bytes) -> list[tuple[str, tuple[Any, ...]]]:
    reader = Reader(data)
    assert reader.take(8) == MAGIC
    assert reader.number("<I") == len(data)
    found = [reader.record() for _ in range(reader.number("<I"))]
    assert reader.data == b""
    return found


def as_bytes(field: Any) -> Any:
    match field:
        case str():
            return os.fsencode(field)
        case list():
            return [as_bytes(text) for text in field]
        case _:
            return field


def test_the_keepers_table_of_records_is_ours() -> None:
    done = subprocess.run([KEEPER, "--records"], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        [str(number), name, shape or "-"] for name, (number, shape) in RECORDS.items()
    ]


def test_no_number_is_given_to_two_records() -> None:
    numbers = [number for number, _ in RECORDS.values()]
    assert len(numbers) == len(set(numbers))


@given(st.lists(records, max_size=20))
def test_what_was_added_is_read_back(added: list[tuple[str, tuple[Field, ...]]]) -> None:
    program = Program()
    for name, fields in added:
        program.add(name, *fields)
    assert read(program.encode()) == [
        (name, tuple(map(as_bytes, fields))) for name, fields in added
    ]


def test_a_name_that_is_no_utf_8_survives() -> None:
    program = Program()
    program.add("WORKDIR", os.fsdecode(b"/\xff\xfe"))
    assert read(program.encode()) == [("WORKDIR", (b"/\xff\xfe",))]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("WORKDIR", ("a\0b",)), ("EXEC", ("", ["a\0"], [])), ("EXEC", ("", [], [b"\0"]))],
)
def test_a_nul_inside_a_text_is_refused(name: str, fields: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError, match="NUL"):
        Program().add(name, *fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("WORKDIR", ()),
        ("WORKDIR", ("a", "b")),
        ("WORKDIR", (1,)),
        ("PIVOT", ("1",)),
        ("SECCOMP", ("text",)),
        ("EXEC", ("", "sh", [])),
    ],
)
def test_a_field_of_another_shape_is_refused(name: str, fields: tuple[Field, ...]) -> None:
    with pytest.raises(TypeError):
        Program().add(name, *fields)


@pytest.mark.parametrize(("name", "value"), [("PIVOT", 2**32), ("PIVOT", -1)])
def test_a_number_never_wraps_around(name: str, value: int) -> None:
    with pytest.raises(struct.error):
        Program().add(name, value)


def test_a_program_may_be_four_mebibytes_and_no_byte_more() -> None:
    room = MAX_PROGRAM - len(with_content(0).encode())
    assert len(with_content(room).encode()) == MAX_PROGRAM
    with pytest.raises(KernelError, match="arguments and environment") as caught:
        with_content(room + 1).encode()
    assert caught.value.errno == E2BIG


def with_content(size: int) -> Program:
    program = Program()
    program.add("SECCOMP", bytes(size))
    return program


def test_descriptors_are_numbered_from_the_first_free_one_in_the_order_of_lending() -> None:
    program = Program()
    assert [program.fd(fd) for fd in (30, 20, 30)] == [FIRST_FD, FIRST_FD + 1, FIRST_FD + 2]
    assert program.lent == [30, 20, 30]


def test_a_failure_names_the_record_and_what_it_was_about() -> None:
    program = Program()
    program.add("MOUNT", 0, "proc", "proc", [])
    program.add("CAPABILITIES", 1)
    program.add("EXEC", "/bin", ["sh", "-c"], [], about="sh")
    names = [(e.call, e.subject, e.errno) for e in (program.error(n, ENOENT) for n in range(3))]
    assert names == [("mount", "proc proc", 2), ("capabilities", "", 2), ("exec", "sh", 2)]
    assert [program.is_exec(n) for n in range(4)] == [False, False, True, False]


def test_a_failure_of_no_record_is_the_keepers_own() -> None:
    error = Program().error(2**32 - 1, ENOEXEC)
    assert str(error) == "keeper start: Exec format error"


def test_a_sealed_program_can_be_neither_written_nor_cut_nor_unsealed() -> None:
    program = Program()
    program.add("INIT")
    fd = program.seal()
    try:
        assert os.pread(fd, 100, 0) == program.encode()
        assert not os.get_inheritable(fd)
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 1),
            lambda: os.ftruncate(fd, 1000),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10),
        ):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_groups_are_32_bit_numbers(ids: list[int]) -> None:
    assert list(struct.unpack(f"<{len(ids)}I", groups(ids))) == ids
