"""The system call filters that were compiled when the package was built.

`native/seccomp_policy.py` says what a task may call and why; `native/build_seccomp.py` compiles it
to classic BPF for this machine's native and 32-bit ABIs. Here the ready array of `struct
sock_filter` is only read and checked, because compiling costs milliseconds and belongs to no
launch: loading it costs a tenth of one.

The check is against a mix-up, not against an attacker (who could write our package could do all):
a filter built for another machine would answer every call of this one with ENOSYS.
"""

from __future__ import annotations

import platform
import struct
from functools import cache
from pathlib import Path

from sandbox.errors import ConfigError, KernelError

INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter: code, jt, jf, k."""

MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS: what struct sock_fprog may hold."""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD_ARCH = (0x20, 0, 0, 4)
"""BPF_LD | BPF_W | BPF_ABS of seccomp_data.arch: numbers mean nothing before the ABI is known."""
_JEQ = 0x15
_RET = 0x06


@cache
def filter(*, ptrace: bool) -> bytes:
    """The filter of a container, with or without SYS_PTRACE, for the keeper's SECCOMP record.

    KernelError if the package was built without it, ConfigError if it is not one for this machine.
    """
    name = "seccomp-ptrace.bpf" if ptrace else "seccomp-default.bpf"
    path = Path(__file__).resolve().parent.parent / "_bin" / name
    try:
        blob = path.read_bytes()
    except OSError as e:
        raise KernelError("read", str(path), e.errno or 0) from e
    check(blob, machine=platform.machine(), subject=str(path))
    return blob


def check(blob: bytes, *, machine: str, subject: str) -> None:
    """Raise ConfigError unless `blob` is a whole filter whose first ABI is that of `machine`."""
    count, rest = divmod(len(blob), INSTRUCTION.size)
    if rest or not 0 < count <= MAX_INSTRUCTIONS:
        raise ConfigError(f"{subject} is not a seccomp filter: {len(blob)} bytes")
    instructions = list(INSTRUCTION.iter_unpack(blob))
    if instructions[0] != _LOAD_ARCH or instructions[-1][0] != _RET:
        raise ConfigError(f"{subject} is not a seccomp filter: it does not begin with the ABI")
    code, _, _, arch = instructions[1]
    if code != _JEQ or arch != AUDIT_ARCH.get(machine):
        raise ConfigError(f"{subject} was built for another machine than {machine}: build it again")
