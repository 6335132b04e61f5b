"""A slot is a user namespace and a network namespace that belongs to it, ready for a task."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from sandbox.errors import KernelError
from sandbox.kernel import native, slots
from sandbox.kernel.slots import Slot, SlotPool

pytestmark = pytest.mark.guest

BASES = range(0x7FF00000, 0x7FFF0000, 65536)


def inside(slot: Slot, command: str) -> str:
    """What a shell prints that is root of the slot."""
    enter = [
        "nsenter",
        f"--user=/proc/self/fd/{slot.userns_fd}",
        f"--net=/proc/self/fd/{slot.netns_fd}",
        "--",
    ]
    fds = (slot.userns_fd, slot.netns_fd)
    done = subprocess.run(
        [*enter, "sh", "-c", command], pass_fds=fds, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
async def slot() -> Iterator[Slot]:  # type: ignore[misc]  # pytest-trio awaits it
    (made,) = await slots.make([BASES[0]])
    yield made
    made.close()


async def test_each_slot_has_its_own_range_and_owns_its_network_namespace() -> None:
    made = await slots.make(BASES[:3])
    try:
        assert [slot.id_base for slot in made] == list(BASES[:3])
        assert len({os.fstat(slot.netns_fd).st_ino for slot in made}) == 3
        for slot in made:
            owner = fcntl.ioctl(slot.netns_fd, native.NS_GET_USERNS)
            assert os.path.samestat(os.fstat(owner), os.fstat(slot.userns_fd))
            os.close(owner)
            assert not os.get_inheritable(slot.netns_fd)
            assert (
                inside(slot, "cat /proc/self/uid_map /proc/self/gid_map").split()
                == [*("0", str(slot.id_base), "65536")] * 2
            )
    finally:
        for slot in made:
            slot.close()


async def test_lo_is_up_and_the_sysctls_are_those_of_a_task(slot: Slot) -> None:
    assert int(inside(slot, "cat /sys/class/net/lo/flags || true") or "0x9", 16) & 1
    values = inside(
        slot,
        "cd /proc/sys/net; cat ipv4/ping_group_range ipv4/ip_unprivileged_port_start"
        " ipv4/ip_forward ipv4/conf/default/accept_redirects",
    )
    assert values.split() == ["0", "65535", "0", "0", "0"]
    if Path("/proc/sys/net/ipv6").exists():
        values = inside(slot, "cd /proc/sys/net/ipv6/conf; cat default/accept_ra all/forwarding")
        assert values.split() == ["0", "0"]


async def test_ipv6_comes_to_a_slot_with_its_sysctls_though_nobody_used_it_before(
    slot: Slot,
) -> None:
    """Where it is a module that was not loaded, as in the guest, a first socket loads it."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        pytest.skip("this kernel has no IPv6")
    values = inside(slot, "cd /proc/sys/net/ipv6/conf; cat all/accept_ra default/accept_redirects")
    assert values.split() == ["0", "0"]


async def test_the_hosts_own_sysctls_are_not_touched(slot: Slot) -> None:
    host = Path("/proc/sys/net/ipv4/ping_group_range").read_text().split()
    assert host != inside(slot, "cat /proc/sys/net/ipv4/ping_group_range").split()


async def test_an_ip_version_that_is_loaded_later_is_not_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as before:
        before.setattr(os.path, "exists", lambda path: False)
        (early,) = await slots.make([BASES[0]])
    (late,) = await slots.make([BASES[1]])
    ports = [inside(s, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start") for s in (early, late)]
    for made in (early, late):
        made.close()
    assert ports == ["1024", "0"]


async def test_the_agents_own_limits_do_not_bound_what_runs_in_a_slot() -> None:
    """A user namespace keeps some of its maker's limits, whatever is set inside (Linux 5.14)."""
    free = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, free[1]))
    try:
        (made,) = await slots.make([BASES[0]])
    finally:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, free)
    name = f"/sandbox-test-{os.getpid()}"
    script = (
        "import ctypes; c = ctypes.CDLL(None, use_errno=True); "
        f"fd = c.mq_open(b'{name}', 0o102, 0o600, None); "
        f"print(ctypes.get_errno() if fd < 0 else c.mq_unlink(b'{name}'))"
    )
    try:
        assert inside(made, f'{sys.executable} -c "{script}"') == "0"
    finally:
        made.close()


async def test_a_failure_names_the_step_and_hands_nothing_over() -> None:
    with pytest.raises(KernelError, match=r"ping_group_range.* for ids") as refused:
        await slots.make(BASES[:2], sysctls=["net/ipv4/ping_group_range=many"])
    assert refused.value.errno == errno.EINVAL


async def test_cancelling_leaves_no_process_and_no_descriptor() -> None:
    with trio.move_on_after(0.0005):
        await slots.make(BASES)


async def test_a_program_that_is_killed_at_work_hands_nothing_over(tmp_path: Path) -> None:
    dying = tmp_path / "dying"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    with pytest.raises(KernelError, match="ended after 0 of 3"):
        await slots.make(BASES[:3], program=dying)


async def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="execve"):
        await slots.make([BASES[0]], program=tmp_path / "none")


class Ids:
    def __init__(self) -> None:
        self.free = list(BASES)
        self.claimed: set[int] = set()

    def claim_many(self, count: int) -> list[int]:
        firsts = [self.free.pop(0) for _ in range(count)]
        self.claimed.update(firsts)
        return firsts

    def release(self, first: int) -> None:
        self.claimed.remove(first)


async def test_a_pool_refills_behind_the_request_and_gives_back_what_is_left() -> None:
    ids = Ids()
    pool = SlotPool(2, ids.claim_many, ids.release)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.serve)
        assert pool.ready == 2
        taken = [await pool.take() for _ in range(3)]
        with trio.fail_after(5):
            while pool.ready < 2:
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert len({slot.id_base for slot in taken}) == 3
    assert ids.claimed == {slot.id_base for slot in taken}
    for slot in taken:
        slot.close()


async def test_an_empty_pool_tells_its_user_what_is_wrong_and_keeps_no_range(
    tmp_path: Path,
) -> None:
    ids = Ids()
    pool = SlotPool(2, ids.claim_many, ids.release, program=tmp_path / "none")
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.serve)
        with pytest.raises(KernelError, match="execve"):
            await pool.take()
        assert ids.claimed == set()
        nursery.cancel_scope.cancel()
