"""Programs that Python compiles, read by the keeper's own C, in this process.

Any bytes at all, under sanitizers, are native/fuzz_program.c's.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.kernel.program import Field, Program
from tests.conftest import ROOT
from tests.fuzz.hostile_bytes import mutated
from tests.fuzz.program_seeds import command, container, each_record
from tests.unit.kernel.test_program import FIELDS, read, records

Reader = Callable[[bytes], str | None]
Records = list[tuple[str, tuple[Field, ...]]]

PROGRAM_BYTES = 16 << 20
"""More than sizeof(struct program)."""

SEEDS = [make().encode() for make in (container, command, each_record)]


@pytest.fixture(scope="session")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """What `program_read` has against some bytes."""
    library = tmp_path_factory.mktemp("reader") / "reader.so"
    source = ROOT / "native/keeper_program.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    program_read = ctypes.CDLL(str(library)).program_read
    program_read.restype = ctypes.c_char_p
    program_read.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    program = ctypes.create_string_buffer(PROGRAM_BYTES)

    def ask(data: bytes) -> str | None:
        found: bytes | None = program_read(program, data, len(data))
        return None if found is None else found.decode()

    return ask


others = records.filter(lambda record: record[0] != "EXEC")


@given(st.lists(others, max_size=20), st.tuples(*(FIELDS[kind] for kind in "sll")))
def test_the_keeper_reads_whatever_is_compiled(
    refusal: Reader, added: Records, last: tuple[Field, ...]
) -> None:
    program = Program()
    for name, fields in [*added, ("EXEC", last)]:
        program.add(name, *fields)
    assert refusal(program.encode()) is None


@given(mutated(SEEDS))
def test_the_keeper_refuses_a_program_or_reads_all_of_it(refusal: Reader, data: bytes) -> None:
    if refusal(data) is None:
        assert read(data)[-1][0] == "EXEC"
