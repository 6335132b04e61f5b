"""Network namespaces that threads enter and paths hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import netns
from sandbox.kernel.thread import KernelThread


@pytest.fixture
def thread() -> Iterator[KernelThread]:
    with KernelThread("netns") as thread:
        yield thread


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_a_thread_comes_back_from_where_it_was(thread: KernelThread) -> None:
    home = os.stat("/proc/self/ns/net").st_ino
    made = thread.call(netns.create)

    def look() -> list[int]:
        seen = [os.stat("/proc/thread-self/ns/net").st_ino]
        with pytest.raises(RuntimeError), netns.within(made):
            seen.append(os.stat("/proc/thread-self/ns/net").st_ino)
            raise RuntimeError
        return [*seen, os.stat("/proc/thread-self/ns/net").st_ino]

    assert thread.call(look) == [home, inode(made), home]
    assert inode(made) != home
    os.close(made)


def test_a_sysctl_is_that_of_the_namespace_entered(thread: KernelThread) -> None:
    key = "net/ipv4/ip_default_ttl"
    made = thread.call(netns.create)

    def change() -> tuple[str | None, str | None]:
        with netns.within(made):
            netns.write_sysctl(key, "33")
            return netns.read_sysctl(key), netns.read_sysctl("net/ipv4/no_such_thing")

    assert thread.call(change) == ("33", None)
    assert netns.read_sysctl(key) == "64"
    with pytest.raises(KernelError, match="no_such_thing"):
        netns.write_sysctl("net/ipv4/no_such_thing", "1")
    os.close(made)


def test_a_pin_keeps_a_namespace_until_it_is_taken_away(
    thread: KernelThread, tmp_path: Path
) -> None:
    path = tmp_path / "vpc-1"
    assert netns.pinned(path) is None
    path.touch()  # a file without a mount: the one who made it did not get further
    assert netns.pinned(path) is None
    made = thread.call(netns.create)
    expected = inode(made)
    thread.call(netns.pin, made, path)
    os.close(made)
    found = netns.pinned(path)
    assert found is not None
    assert inode(found) == expected
    os.close(found)
    for _ in range(2):
        netns.unpin(path)
        assert not path.exists()


def test_a_namespace_pinned_twice_by_mistake_is_unpinned_whole(
    thread: KernelThread, tmp_path: Path
) -> None:
    path = tmp_path / "vpc-1"
    made = thread.call(netns.create)
    for _ in range(2):
        thread.call(netns.pin, made, path)
    os.close(made)
    netns.unpin(path)
    assert not path.exists()


def test_a_link_in_the_place_of_a_pin_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "vpc-1"
    path.symlink_to("/proc/self/ns/net")
    with pytest.raises(KernelError, match="open"):
        netns.pinned(path)
