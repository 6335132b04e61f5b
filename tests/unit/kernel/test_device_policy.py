"""The device program, run by a small interpreter of the instructions that it uses."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.kernel.cgroups import devices

BLOCK, CHARACTER = 1, 2
MKNOD, READ, WRITE = 1, 2, 4

NODES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "console": (5, 1),
    "ptmx": (5, 2),
    "pts/0": (136, 0),
    "pts/1000": (136, 1000),
}


def allows(kind: int, access: int, major: int, minor: int) -> bool:
    context = struct.pack("<III", access << 16 | kind, major, minor)
    code = list(struct.iter_unpack("<BBhi", devices.device_program()))
    registers = dict.fromkeys(range(11), 0)
    at = 0
    while True:
        operation, pair, offset, immediate = code[at]
        target, source = pair & 15, pair >> 4
        at += 1
        if operation == devices.LOAD_WORD:
            registers[target] = struct.unpack_from("<I", context, offset)[0]
        elif operation == devices.MOVE:
            registers[target] = immediate
        elif operation == devices.MOVE_REGISTER:
            registers[target] = registers[source]
        elif operation == devices.AND:
            registers[target] &= immediate
        elif operation == devices.SHIFT_RIGHT:
            registers[target] >>= immediate
        elif operation == devices.JUMP_IF_EQUAL:
            at += offset * (registers[target] == immediate)
        elif operation == devices.JUMP_IF_NOT_EQUAL:
            at += offset * (registers[target] != immediate)
        else:
            assert operation == devices.EXIT
            return bool(registers[0])


@pytest.mark.parametrize("access", [READ, WRITE, READ | WRITE])
@pytest.mark.parametrize("name", NODES)
def test_what_programs_expect_opens(name: str, access: int) -> None:
    assert allows(CHARACTER, access, *NODES[name])


@pytest.mark.parametrize("name", NODES)
def test_nothing_is_made_and_no_block_device_opens(name: str) -> None:
    assert not allows(CHARACTER, MKNOD, *NODES[name])
    assert not allows(CHARACTER, MKNOD | READ | WRITE, *NODES[name])
    assert not allows(BLOCK, READ, *NODES[name])


@given(
    st.sampled_from([BLOCK, CHARACTER]),
    st.integers(1, 7),
    st.one_of(st.sampled_from([1, 5, 10, 136]), st.integers(0, 4095)),
    st.one_of(st.integers(0, 12), st.integers(0, 2**20 - 1)),
)
def test_nothing_else_opens(kind: int, access: int, major: int, minor: int) -> None:
    is_known = (major, minor) in NODES.values() or major == 136
    expected = kind == CHARACTER and not access & MKNOD and is_known
    assert allows(kind, access, major, minor) == expected
