"""Which device nodes a task may open, as a program for its cgroup. Pure: the bytes are made here.

The second line behind a /dev that holds nothing else: a node that reached a task by a mistake
elsewhere still opens nothing. Character devices that every program may expect can be read and
written; no block device; nothing may be made with mknod (overlay's whiteouts, 0:0, are made by the
kernel without asking here).

A program gets {u32 access << 16 | type, u32 major, u32 minor} in r1 and answers 0 (EPERM) or 1 in
r0. Each rule here ends by itself or falls through to the next, so there are no labels to resolve.
"""

from __future__ import annotations

import struct

ALLOWED: dict[str, tuple[int, int | None]] = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "console": (5, 1),
    "ptmx": (5, 2),
    "pts": (136, None),
}
"""Name to major and minor; None is every minor."""

# linux/bpf.h and linux/bpf_common.h
LOAD_WORD, MOVE, MOVE_REGISTER, AND, SHIFT_RIGHT = 0x61, 0xB7, 0xBF, 0x57, 0x77
JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL, EXIT = 0x15, 0x55, 0x95
TYPE_CHARACTER = 2
ACCESS_MKNOD = 1

ANSWER, CONTEXT, ACCESS, TYPE, MAJOR, MINOR = range(6)


def device_program() -> bytes:
    """The instructions, struct bpf_insn after struct bpf_insn."""
    code = [
        _instruction(LOAD_WORD, ACCESS, CONTEXT, offset=0),
        _instruction(MOVE_REGISTER, TYPE, ACCESS),
        _instruction(AND, TYPE, immediate=0xFFFF),
        _instruction(SHIFT_RIGHT, ACCESS, immediate=16),
        _instruction(AND, ACCESS, immediate=ACCESS_MKNOD),
        _instruction(LOAD_WORD, MAJOR, CONTEXT, offset=4),
        _instruction(LOAD_WORD, MINOR, CONTEXT, offset=8),
        _instruction(JUMP_IF_EQUAL, TYPE, offset=2, immediate=TYPE_CHARACTER),
        *_answer(0),
        _instruction(JUMP_IF_EQUAL, ACCESS, offset=2, immediate=0),
        *_answer(0),
    ]
    for major, minor in ALLOWED.values():
        if minor is None:
            code += [_instruction(JUMP_IF_NOT_EQUAL, MAJOR, offset=2, immediate=major)]
        else:
            code += [
                _instruction(JUMP_IF_NOT_EQUAL, MAJOR, offset=3, immediate=major),
                _instruction(JUMP_IF_NOT_EQUAL, MINOR, offset=2, immediate=minor),
            ]
        code += _answer(1)
    code += _answer(0)
    return b"".join(code)


def _answer(value: int) -> list[bytes]:
    return [_instruction(MOVE, ANSWER, immediate=value), _instruction(EXIT)]


def _instruction(
    operation: int, target: int = 0, source: int = 0, *, offset: int = 0, immediate: int = 0
) -> bytes:
    return struct.pack("<BBhi", operation, source << 4 | target, offset, immediate)
