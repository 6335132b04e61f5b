"""The compiled filters against the policy: each number of each ABI, on both machines.

The filters are run by an interpreter of classic BPF that knows nothing of how they were made;
tests/kernel/test_seccomp.py asks the kernel.
"""

from __future__ import annotations

import re
import struct
from errno import EAFNOSUPPORT, ENOSYS, EPERM
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native import build_seccomp
from native.build_seccomp import COLUMNS, MACHINES, Code
from native.seccomp_policy import Condition, decisions
from sandbox.errors import ConfigError
from sandbox.kernel import seccomp

TABLE = build_seccomp.read_table(Path(build_seccomp.__file__).with_name("syscalls.tbl"))
HEADERS = Path("/usr/include/x86_64-linux-gnu/asm")
X32 = 0x40000000
ALLOWED = 0
LOW = 0xFFFFFFFF


def compiled(machine: str, *, ptrace: bool) -> Code:
    return build_seccomp.compile_filter(machine, TABLE, decisions(ptrace=ptrace))


FILTERS = {
    (machine, ptrace): compiled(machine, ptrace=ptrace)
    for machine in MACHINES
    for ptrace in (False, True)
}


def run(code: Code, arch: int, number: int, arguments: tuple[int, ...] = ()) -> tuple[int, int]:
    """The errno that the filter answers, 0 if it allows, and how many instructions that took."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    at = steps = accumulator = 0
    while True:
        steps += 1
        operation, if_true, if_false, operand = code[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x05:
                at += operand
            case 0x15:
                at += if_true if accumulator == operand else if_false
            case 0x35:
                at += if_true if accumulator >= operand else if_false
            case 0x06 if operand == 0x7FFF0000:
                return ALLOWED, steps
            case 0x06 if operand >> 16 == 5:
                return operand & 0xFFFF, steps
            case _:
                raise AssertionError(f"no filter of ours holds {operation:#x} {operand:#x}")


def answer(abi: str, name: str, *arguments: int, ptrace: bool = False) -> int:
    machine, arch = next((m, a) for m, abis in MACHINES.items() for a, n in abis if n == abi)
    return run(FILTERS[machine, ptrace], arch, TABLE[abi][name], arguments)[0]


EVERY_ABI = [(machine, arch, abi) for machine, abis in MACHINES.items() for arch, abi in abis]


@pytest.mark.parametrize("ptrace", [False, True])
@pytest.mark.parametrize(("machine", "arch", "abi"), EVERY_ABI)
def test_every_number_is_answered_as_the_policy_says(
    machine: str, arch: int, abi: str, ptrace: bool
) -> None:
    code = FILTERS[machine, ptrace]
    policy = decisions(ptrace=ptrace)
    names = {number: name for name, number in TABLE[abi].items()}
    for number in {*range(1100), *names, *(n + 1 for n in names)}:
        decision = policy[names[number]] if number in names else ENOSYS
        if not isinstance(decision, Condition):
            assert run(code, arch, number)[0] == decision, names.get(number, number)


@pytest.mark.parametrize(("machine", "arch", "abi"), EVERY_ABI)
@given(data=st.data())
def test_every_argument_is_answered_as_its_condition_says(
    machine: str, arch: int, abi: str, data: st.DataObject
) -> None:
    policy = decisions(ptrace=False)
    name = data.draw(st.sampled_from([n for n, d in policy.items() if isinstance(d, Condition)]))
    condition = policy[name]
    assert isinstance(condition, Condition)
    near = [value + n for value in condition.values for n in (-1, 0, 1)]
    low = data.draw(st.sampled_from(near) | st.integers(0, LOW)) & LOW
    high = data.draw(st.integers(0, LOW))
    arguments = [0] * 6
    arguments[condition.argument] = high << 32 | low
    matches = low & condition.mask in condition.values
    expected = condition.inside if matches else condition.outside
    code = FILTERS[machine, False]
    assert run(code, arch, TABLE[abi][name], tuple(arguments))[0] == expected


@given(st.integers(0, LOW - X32))
def test_no_number_of_x32_is_allowed(number: int) -> None:
    assert run(FILTERS["x86_64", True], 0xC000003E, X32 | number)[0] == ENOSYS


@given(st.integers(0, LOW), st.integers(0, LOW))
def test_an_unknown_machine_is_allowed_nothing(arch: int, number: int) -> None:
    if arch not in {arch for _, arch, _ in EVERY_ABI}:
        assert run(FILTERS["x86_64", True], arch, number)[0] == ENOSYS


@pytest.mark.parametrize("abi", COLUMNS)
def test_what_hides_its_arguments_does_not_exist(abi: str) -> None:
    for name in {"clone3", "socketcall"} & TABLE[abi].keys():
        assert answer(abi, name) == ENOSYS


@pytest.mark.parametrize("abi", COLUMNS)
def test_the_upper_half_of_an_argument_does_not_get_past_the_filter(abi: str) -> None:
    high = 1 << 32
    assert answer(abi, "ioctl", 0, high | 0x5412) == EPERM
    assert answer(abi, "clone", high | 0x10000000) == EPERM
    assert answer(abi, "socket", high | 38) == EAFNOSUPPORT
    assert answer(abi, "personality", high | 0x00400000) == EPERM


@pytest.mark.parametrize("abi", COLUMNS)
def test_ptrace_adds_what_reaches_into_other_processes(abi: str) -> None:
    changed = {
        name
        for name in TABLE[abi]
        if answer(abi, name, ptrace=True) != answer(abi, name, ptrace=False)
    }
    assert changed == {"kcmp", "pidfd_getfd", "process_madvise"}


def test_a_filter_is_short_and_no_call_takes_long() -> None:
    for (machine, _), code in FILTERS.items():
        assert len(code) <= 520
        for _, arch, abi in (e for e in EVERY_ABI if e[0] == machine):
            assert max(run(code, arch, number)[1] for number in TABLE[abi].values()) <= 32


def test_a_call_without_a_decision_cannot_be_built() -> None:
    policy = decisions(ptrace=False)
    del policy["mount"]
    with pytest.raises(ValueError, match="'mount'"):
        build_seccomp.check(TABLE, policy)


@pytest.mark.parametrize(("header", "abi"), [("unistd_64.h", "x86_64"), ("unistd_32.h", "i386")])
def test_the_table_has_each_number_of_the_kernels_headers(header: str, abi: str) -> None:
    if not (HEADERS / header).exists():
        pytest.skip(f"no {header} here (linux-libc-dev for x86)")
    text = (HEADERS / header).read_text()
    found = re.findall(r"^#define __NR_(\w+)\s+(\d+)$", text, re.MULTILINE)
    numbers = {name: int(number) for name, number in found if int(number) <= 467}
    assert len(numbers) > 350
    assert numbers == {name: TABLE[abi].get(name) for name in numbers}


def blob(code: Code) -> bytes:
    return b"".join(seccomp.INSTRUCTION.pack(*instruction) for instruction in code)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_filter_of_this_machine_is_taken(machine: str) -> None:
    seccomp.check(blob(FILTERS[machine, False]), machine=machine, subject="it")


def test_a_filter_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="another machine than aarch64"):
        seccomp.check(blob(FILTERS["x86_64", False]), machine="aarch64", subject="it")


@pytest.mark.parametrize("cut", [b"", b"\x06", blob(FILTERS["x86_64", False])[:-1]])
def test_a_filter_that_was_cut_off_is_refused(cut: bytes) -> None:
    with pytest.raises(ConfigError, match="not a seccomp filter"):
        seccomp.check(cut, machine="x86_64", subject="it")


def test_a_filter_that_is_longer_than_the_kernel_takes_is_refused() -> None:
    code = FILTERS["x86_64", False]
    with pytest.raises(ConfigError, match="not a seccomp filter"):
        seccomp.check(blob(code * 10), machine="x86_64", subject="it")


def test_a_filter_that_allows_at_once_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not begin"):
        seccomp.check(blob([(0x06, 0, 0, 0x7FFF0000)]), machine="x86_64", subject="it")
