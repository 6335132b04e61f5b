"""Which resource limits a container starts with."""

from __future__ import annotations

import pytest

from sandbox.errors import TaskFailed
from sandbox.kernel.rlimits import INFINITY, NUMBERS, HostLimits
from sandbox.model.task import Ulimit
from sandbox.runtime.container import choose_limits

FREE = dict.fromkeys(NUMBERS, INFINITY)


def host(*, may_raise: bool = False, **hard: int) -> HostLimits:
    first = {"nproc": 5000, "sigpending": 6000}
    return HostLimits(hard=FREE | hard, first=first, may_raise=may_raise)


def chosen(given: HostLimits, *ulimits: Ulimit) -> dict[str, tuple[int, int]]:
    names = {number: name for name, number in NUMBERS.items()}
    limits = choose_limits(ulimits, given).limits
    return {names[number]: (soft, hard) for number, soft, hard in limits}


def test_without_a_word_they_are_the_kernels_and_open_files_fargates() -> None:
    assert chosen(host()) == {
        **dict.fromkeys(NUMBERS, (INFINITY, INFINITY)),
        "core": (0, INFINITY),
        "memlock": (8 << 20, 8 << 20),
        "msgqueue": (819200, 819200),
        "nice": (0, 0),
        "nofile": (65535, 65535),
        "nproc": (5000, 5000),
        "rtprio": (0, 0),
        "sigpending": (6000, 6000),
        "stack": (8 << 20, INFINITY),
    }
    assert choose_limits((), host()).lowered == ()


def test_what_cannot_be_raised_is_lowered_and_named() -> None:
    small = host(fsize=20480, stack=1 << 20, nofile=4096)
    limits = chosen(small)
    assert (limits["fsize"], limits["stack"]) == ((20480, 20480), (1 << 20, 1 << 20))
    assert set(choose_limits((), small).lowered) == {
        "fsize is 20480, not unlimited: the host's hard limit",
        "stack is 1048576, not unlimited: the host's hard limit",
        "nofile is 4096, not 65535: the host's hard limit",
    }
    assert chosen(host(may_raise=True, fsize=20480)) == chosen(host())


def test_what_was_asked_for_takes_the_place_of_a_default() -> None:
    asked = Ulimit(name="fsize", soft_limit=1, hard_limit=2)
    unlimited = Ulimit(name="stack", soft_limit=-1, hard_limit=-1)
    limits = chosen(host(fsize=20480), asked, unlimited)
    assert (limits["fsize"], limits["stack"]) == ((1, 2), (INFINITY, INFINITY))
    assert choose_limits((asked,), host(fsize=20480)).lowered == ()


def test_what_was_asked_for_and_cannot_be_given_is_refused() -> None:
    asked = Ulimit(name="fsize", soft_limit=1, hard_limit=20481)
    with pytest.raises(
        TaskFailed, match="ulimit fsize 20481 is above this host's hard limit 20480"
    ):
        choose_limits((asked,), host(fsize=20480))
