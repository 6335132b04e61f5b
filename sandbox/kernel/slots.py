"""Slots: a user namespace with its own range of ids and the network namespace inside it.

A task needs both before its first process exists, and they cost 0.6 ms, most of it in the network
namespace: so `SlotPool` keeps some ready and refills behind the request. A slot goes whole to one
task and is never used again; its descriptors are all that holds it, nothing is pinned by a mount.

The static program `slot` (native/slot.c) makes them, because an id map must be written by a
process outside the new namespace and Python must not be forked. It is spawned once for a batch and
hands each slot over a socket; its network namespace has `lo` up and the sysctls below.

What it does not do: choose ids (`kernel.idranges` does), make interfaces (the network layer does).
"""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.native import raising

PROGRAM = Path(__file__).resolve().parents[1] / "_bin" / "slot"

SYSCTLS = (
    # As Docker does: ping without raw sockets, and port 80 without a capability.
    "net/ipv4/ping_group_range=0 65535",
    "net/ipv4/ip_unprivileged_port_start=0",
    # The kernel accepts redirects if either says so, hence both; "default" is what eth0 will get.
    "net/ipv4/conf/all/accept_redirects=0",
    "net/ipv4/conf/default/accept_redirects=0",
    "net/ipv4/ip_forward=0",
    "net/ipv6/conf/all/accept_redirects=0",
    "net/ipv6/conf/default/accept_redirects=0",
    # Addresses and routes are the agent's to give, not a router advertisement's.
    "net/ipv6/conf/all/accept_ra=0",
    "net/ipv6/conf/default/accept_ra=0",
    "net/ipv6/conf/all/forwarding=0",
    # No address of the interface's own making either (1 is none: linux/if_link.h, addr_gen_mode).
    "net/ipv6/conf/default/addr_gen_mode=1",
)

_REPORT = struct.Struct("=Ii56s")
_FDS = struct.Struct("=2i")
_RETRY_S = (1, 30)
"""A refill that failed is tried again after the first, doubling up to the second."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Whoever has it closes it. Ids `id_base` to `id_base + 65535` are 0 to 65535 inside."""

    userns_fd: int
    netns_fd: int
    id_base: int

    def close(self) -> None:
        os.close(self.userns_fd)
        os.close(self.netns_fd)


async def make(
    ranges: Sequence[int], *, sysctls: Sequence[str] = SYSCTLS, program: Path = PROGRAM
) -> list[Slot]:
    """One slot for each first id, in order; all of them or KernelError and none."""
    slots: list[Slot] = []
    with ExitStack() as undo:
        undo.callback(lambda: _close_all(slots))
        with raising("socketpair", "slot"):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                _load_ipv6()
                arguments = [str(program), *map(str, ranges), *_present(sysctls)]
                child = _spawn(program, arguments, theirs.fileno())
            try:
                ours.setblocking(False)
                while (slot := await _receive(ours)) is not None:
                    slots.append(slot)
            finally:
                # At the end of the stream it is already gone, or a moment from it.
                _end(child.pid)
                child.settle()
        if child.errno:
            raise KernelError("execve", str(program), child.errno)
        if len(slots) != len(ranges):
            raise KernelError("slot", f"ended after {len(slots)} of {len(ranges)}", errno.ECHILD)
        undo.pop_all()
    return slots


@trio.lowlevel.enable_ki_protection  # or a Ctrl-C could leave a child that nobody knows
def _spawn(program: Path, arguments: Sequence[str], fd: int) -> native.Spawned:
    return native.Spawned(str(program), arguments, [fd])


def _load_ipv6() -> None:
    """Have its module loaded now, if it is one: loaded by a task's first socket of that family, it
    would come with its own defaults into all namespaces that there are."""
    with suppress(OSError):  # a kernel without it: no socket, no sysctls
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()


def _present(sysctls: Sequence[str]) -> list[str]:
    """Without those of an IP version that the kernel has not; a module may bring it at any time."""
    return [s for s in sysctls if os.path.exists(f"/proc/sys/{s.partition('=')[0]}")]


async def _receive(ours: socket.socket) -> Slot | None:
    """The next slot, None at the end; KernelError when the program reports a failure."""
    with raising("recvmsg", "slot"):
        await trio.lowlevel.wait_readable(ours)
        # Not socket.recv_fds: it drops its flags, and the descriptors would survive an exec.
        space = socket.CMSG_SPACE(_FDS.size)
        data, control, _, _ = ours.recvmsg(_REPORT.size, space, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    id_base, error, call = _REPORT.unpack(data)
    if error:
        name, _, subject = call.rstrip(b"\0").decode().partition(" ")
        raise KernelError(name, f"{subject} for ids {id_base}", error)
    ((_, _, fds),) = control
    userns_fd, netns_fd = _FDS.unpack(fds)
    return Slot(userns_fd, netns_fd, id_base)


def _end(pid: int) -> None:
    """Kill and reap: its child, if any, sees the end of its pipe and ends too."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _close_all(slots: Iterable[Slot]) -> None:
    for slot in slots:
        slot.close()


class SlotPool:
    """Keeps up to `size` slots ready, more than half of it between bursts: one run of the program
    makes several. `claim` gives so many free ranges, `release` takes back an unused one.
    """

    def __init__(
        self,
        size: int,
        claim: Callable[[int], list[int]],
        release: Callable[[int], None],
        *,
        sysctls: Sequence[str] = SYSCTLS,
        program: Path = PROGRAM,
    ) -> None:
        self._size = size
        self._claim = claim
        self._release = release
        self._sysctls = sysctls
        self._program = program
        self._ready: list[Slot] = []
        self._taken = trio.Event()

    @property
    def ready(self) -> int:
        return len(self._ready)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Refill until cancelled, then give back what is ready. Started once the pool is full.

        A refill that fails is only tried again later: `take` on an empty pool makes its own slot,
        so whoever needs one gets the error itself.
        """
        delay: float = _RETRY_S[0]
        try:
            while True:
                self._taken = trio.Event()
                try:
                    await self._refill()
                except KernelError:
                    timeout, delay = delay, min(delay * 2, _RETRY_S[1])
                else:
                    timeout, delay = math.inf, _RETRY_S[0]
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                with trio.move_on_after(timeout):
                    await self._taken.wait()
        finally:
            self.close()

    async def take(self) -> Slot:
        """A slot for one task; immediate when one is ready. Its range stays claimed."""
        await trio.lowlevel.checkpoint()  # before the pop: a cancelled caller would lose the slot
        if not self._ready:
            return (await self._make(1))[0]
        slot = self._ready.pop(0)
        if len(self._ready) <= self._size // 2:
            self._taken.set()
        return slot

    def close(self) -> None:
        """Drop what is ready and release its ranges."""
        while self._ready:
            slot = self._ready.pop()
            slot.close()
            self._release(slot.id_base)

    async def _refill(self) -> None:
        if missing := self._size - len(self._ready):
            self._ready += await self._make(missing)

    async def _make(self, count: int) -> list[Slot]:
        claimed = self._claim(count)
        try:
            return await make(claimed, sysctls=self._sysctls, program=self._program)
        except BaseException:
            for id_base in claimed:
                self._release(id_base)
            raise
