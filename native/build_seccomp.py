"""Compile the system call policy to classic BPF: python -m native.build_seccomp DIR [MACHINE]

Writes DIR/seccomp-default.bpf and DIR/seccomp-ptrace.bpf, raw arrays of `struct sock_filter` that
the keeper hands to seccomp(2) as they are, for MACHINE (default: this one) and its 32-bit ABI.
Needs nothing but Python, so every machine builds the same bytes.

The form is a binary search over ranges of numbers. Loading a filter, the kernel checks and compiles
it and then runs it once for each number of each ABI, to remember which are always allowed: both
its length and its depth are paid at each launch. Loading this policy for two ABIs, p50: 488
instructions, 0.2 ms; libseccomp's binary tree 967 and 0.37; its list 774 and 1.0
(tests/kernel/under_filter.c measures it). libseccomp also cannot say "this errno if the argument
matches, else that", and it knows i386's direct socket calls only as parts of socketcall.
"""

from __future__ import annotations

import platform
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from native.seccomp_policy import ALLOW, UNKNOWN, Condition, decisions

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand: jumps skip that many instructions."""
Code = list[Instruction]
Decision = int | Condition

LOAD, JUMP, JUMP_EQUAL, JUMP_AT_LEAST, AND, RETURN = 0x20, 0x05, 0x15, 0x35, 0x54, 0x06
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000

# struct seccomp_data: nr, arch, instruction_pointer, args[6]; both machines are little-endian, so
# the low half of an argument comes first.
NUMBER, ARCH, ARGUMENTS = 0, 4, 16

MAX_JUMP = 255
MAX_INSTRUCTIONS = 4096

# The ABIs of a machine, its own first: AUDIT_ARCH_* of linux/audit.h and the table's column.
MACHINES = {
    "x86_64": ((0xC000003E, "x86_64"), (0x40000003, "i386")),
    "aarch64": ((0xC00000B7, "aarch64"), (0x40000028, "arm")),
}
COLUMNS = ("x86_64", "i386", "aarch64", "arm")

Policy = Mapping[str, Decision]
Table = Mapping[str, Mapping[str, int]]
"""For each ABI the numbers of the calls that it has."""


def read_table(path: Path) -> Table:
    table: dict[str, dict[str, int]] = {abi: {} for abi in COLUMNS}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, *numbers = line.split()
        for abi, number in zip(COLUMNS, numbers, strict=True):
            if number != "-":
                table[abi][name] = int(number)
    return table


def check(table: Table, policy: Policy) -> None:
    """Nothing by oversight: each call of the table is decided, each decision has a call."""
    known = {name for numbers in table.values() for name in numbers}
    if known != policy.keys():
        raise ValueError(f"in the table or in the policy only: {sorted(known ^ policy.keys())}")


def ranges(numbers: Mapping[str, int], policy: Policy) -> list[tuple[int, Decision]]:
    """Where each run of numbers with one decision begins. Numbers of no call are UNKNOWN."""
    points: list[tuple[int, Decision]] = [(0, UNKNOWN)]
    for name, number in sorted(numbers.items(), key=lambda item: item[1]):
        points += [(number, policy[name]), (number + 1, UNKNOWN)]
    effective = dict(points).items()  # the call at number + 1 replaces the end before it
    runs: list[tuple[int, Decision]] = []
    for number, decision in effective:
        if not runs or runs[-1][1] != decision:
            runs.append((number, decision))
    return runs


def verdict(decision: Decision) -> Code:
    if isinstance(decision, Condition):
        return compare(decision)
    return [(RETURN, 0, 0, RET_ERRNO | decision if decision != ALLOW else RET_ALLOW)]


def compare(condition: Condition) -> Code:
    code: Code = [(LOAD, 0, 0, ARGUMENTS + 8 * condition.argument)]
    if condition.mask != 0xFFFFFFFF:
        code.append((AND, 0, 0, condition.mask))
    rest = len(condition.values)
    for value in condition.values:
        code.append((JUMP_EQUAL, rest, 0, value))
        rest -= 1
    return code + verdict(condition.outside) + verdict(condition.inside)


def branch(test: int, operand: int, yes: Code, no: Code) -> Code:
    """`no` stands first; a conditional jump reaches 255 instructions, a plain one all."""
    if len(no) <= MAX_JUMP:
        return [(test, len(no), 0, operand), *no, *yes]
    return [(test, 0, 1, operand), (JUMP, 0, 0, len(no)), *no, *yes]


def search(runs: Sequence[tuple[int, Decision]]) -> Code:
    if len(runs) == 1:
        return verdict(runs[0][1])
    middle = len(runs) // 2
    return branch(JUMP_AT_LEAST, runs[middle][0], search(runs[middle:]), search(runs[:middle]))


def compile_filter(machine: str, table: Table, policy: Policy) -> Code:
    code = verdict(UNKNOWN)
    for arch, abi in reversed(MACHINES[machine]):
        body = [(LOAD, 0, 0, NUMBER), *search(ranges(table[abi], policy))]
        code = branch(JUMP_EQUAL, arch, body, code)
    return [(LOAD, 0, 0, ARCH), *code]


def main(directory: str, machine: str = "") -> None:
    machine = machine or platform.machine()
    if machine not in MACHINES:
        sys.exit(f"no system call policy for {machine}: only for {', '.join(MACHINES)}")
    table = read_table(Path(__file__).with_name("syscalls.tbl"))
    for name, ptrace in ("default", False), ("ptrace", True):
        policy = decisions(ptrace=ptrace)
        check(table, policy)
        code = compile_filter(machine, table, policy)
        if len(code) > MAX_INSTRUCTIONS:
            sys.exit(f"the filter is too long: {len(code)} of {MAX_INSTRUCTIONS} instructions")
        output = Path(directory, f"seccomp-{name}.bpf")
        new = output.with_suffix(".new")
        new.write_bytes(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
        new.replace(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
