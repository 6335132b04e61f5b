from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import ConfigError
from sandbox.kernel import capabilities

HEADER = Path("/usr/include/linux/capability.h")


def test_a_task_starts_with_dockers_fourteen() -> None:
    # CapBnd of a process in `docker run`, without options.
    assert capabilities.effective_set() == 0x00000000A80425FB
    assert len(capabilities.DEFAULT) == 14


def test_what_is_dropped_is_gone_and_nothing_else() -> None:
    without = capabilities.effective_set(drop=["NET_RAW", "MKNOD"])
    assert set(capabilities.DEFAULT) - set(capabilities.names(without)) == {"NET_RAW", "MKNOD"}


def test_dropping_what_is_not_there_changes_nothing() -> None:
    assert capabilities.effective_set(drop=["SYS_ADMIN"]) == capabilities.effective_set()


def test_ptrace_can_be_added() -> None:
    assert capabilities.effective_set(add=["SYS_PTRACE"]) == 0xA80C25FB


def test_dropping_all_leaves_what_was_added() -> None:
    assert capabilities.effective_set(drop=["ALL"]) == 0
    assert capabilities.effective_set(add=["KILL"], drop=["ALL", "KILL"]) == 1 << 5


@pytest.mark.parametrize("name", ["", "CAP_KILL", "kill", "ALL", "SYS_ADMIN ", "41"])
def test_a_name_that_ecs_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a capability"):
        capabilities.effective_set(add=[name])


@pytest.mark.parametrize("bits", [-1, 1 << 41, 1 << 63])
def test_a_bit_without_a_name_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError):
        capabilities.names(bits)


@given(st.sets(st.sampled_from(capabilities.NAMES)))
def test_names_and_masks_say_the_same(names: set[str]) -> None:
    assert set(capabilities.names(capabilities.mask(names))) == names


@given(
    st.sets(st.sampled_from(capabilities.NAMES)),
    st.sets(st.sampled_from([*capabilities.NAMES, "ALL"])),
)
def test_nothing_is_kept_that_was_neither_default_nor_added(add: set[str], drop: set[str]) -> None:
    kept = set(capabilities.names(capabilities.effective_set(add, drop)))
    assert add <= kept <= add | set(capabilities.DEFAULT)
    assert not (kept - add) & drop


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers here (linux-libc-dev)")
def test_the_numbers_are_the_kernels() -> None:
    found = re.findall(r"^#define CAP_(\w+)\s+(\d+)$", HEADER.read_text(), re.MULTILINE)
    numbers = {name: int(number) for name, number in found}
    assert numbers == {name: capabilities.number(name) for name in numbers}
    assert len(numbers) > 35
