"""Which process the kernel takes for want of memory (proc_pid_oom_score_adj(5)).

Children inherit both the value and how far down it may be set without CAP_SYS_RESOURCE; whoever has
that capability and sets the value again sets the bound too. A keeper does so for its container.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sandbox.kernel import native

AGENT: Final = -900
"""As in the agent's unit: containers are at 0, and nothing that can be spared is below."""

_FILE: Final = Path("/proc/self/oom_score_adj")


def lower(score: int = AGENT) -> int:
    """Put this process there unless it is lower; where it was. KernelError if it may not."""
    with native.raising("write", f"{_FILE}"):
        before = int(_FILE.read_text())
        if before > score:
            _FILE.write_text(f"{score}")
    return before


def put_back(score: int) -> None:
    with native.raising("write", f"{_FILE}"):
        _FILE.write_text(f"{score}")
