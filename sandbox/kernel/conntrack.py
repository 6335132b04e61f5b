"""The connections that the kernel tracks in one network namespace: list, delete, watch.

A rule that changes decides over new connections only; what is tracked goes on, and an address that
is given to somebody else takes the old connections with it, unless they are taken out of the table
here. Whose a connection is says its mark (CONNMARK), so the kernel itself can look for the marked
ones.

Two facts about kernels:

- Flushing by address (CTA_FILTER with a tuple that is an address alone) is known to new ones only;
  those before refuse the half tuple with EINVAL and change nothing. For IPv6 the kernel takes the
  wrong ones: it compares the other way round, so that every connection but those of the address
  is flushed (seen on 6.18). So those of IPv6 are always listed and deleted one by one.
- A connection has events only if somebody listened when it began (nf_conntrack_events = 2, the
  default), packets and bytes only if nf_conntrack_acct was on then, and times only if
  nf_conntrack_timestamp was (Documentation/networking/nf_conntrack-sysctl.rst).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Literal, NamedTuple

import trio

from sandbox.errors import KernelError
from sandbox.kernel.closing import Closing
from sandbox.kernel.flows import (
    DELETE,
    NEW,
    Flow,
    delete_message,
    family_of,
    flush_mark_message,
    flush_source_messages,
    get_message,
    is_of,
    packed,
    read_flow,
    set_mark_message,
)
from sandbox.kernel.nfnetlink import (
    BATCH_MAX,
    DATAGRAM_MAX_BYTES,
    Message,
    Nfnetlink,
    answers,
    drops,
    open_socket,
    receive,
    subscribe,
)

EventKind = Literal["new", "destroy"]

# linux/netfilter/nfnetlink_compat.h
GROUPS: Mapping[EventKind, int] = {"new": 1, "destroy": 3}
"""NFNLGRP_CONNTRACK_NEW and NFNLGRP_CONNTRACK_DESTROY."""
KINDS: Mapping[int, EventKind] = {NEW: "new", DELETE: "destroy"}

EVENTS_BUFFER_BYTES = 8 << 20
"""What waits in the kernel at most; an event takes 1 KiB of it."""
EVENTS_MAX = 512
"""Of one reading."""


class Conntrack(Closing):
    """The table of the network namespace that the calling thread is in now.

    Afterwards it may be used from any thread, by one at a time: as Nfnetlink. What is asked of the
    whole table takes milliseconds for ten thousand connections.
    """

    def __init__(self, *, can_filter: bool = True) -> None:
        """`can_filter`: whether to try the kernel's filter by address at all."""
        self._netfilter = Nfnetlink()
        self._can_filter = can_filter

    def flows(self, mark: int = 0, mask: int = 0) -> Iterator[Flow]:
        """Connections whose mark is `mark` in the bits of `mask`, in no order; those that come or
        go meanwhile may be there or not. The table was read when this returns."""
        return map(read_flow, self._dump(mark, mask))

    def delete(self, flows: Iterable[Flow]) -> int:
        """How many of them there were. None of another connection, if they have ids."""
        return self._change(
            "IPCTNL_MSG_CT_DELETE", ((flow, delete_message(flow)) for flow in flows)
        )

    def set_marks(self, marks: Iterable[tuple[Flow, int]]) -> int:
        """How many of them there were. One that began since with the same tuple is not told
        apart."""
        changes = ((flow, set_mark_message(flow, mark)) for flow, mark in marks)
        return self._change("IPCTNL_MSG_CT_NEW", changes)

    def flush_mark(self, mark: int, mask: int) -> None:
        """Delete the connections whose mark is `mark` in the bits of `mask`, of which there is one
        at least."""
        for refusal in self._netfilter.send([flush_mark_message(mark, mask)]).values():
            raise KernelError(
                "IPCTNL_MSG_CT_DELETE", f"with mark {mark:#x}/{mask:#x}", refusal.errno
            )

    def flush_address(self, address: str) -> None:
        """Delete the connections from and to an address."""
        if family_of(address) == socket.AF_INET and self._flush_filtered(address):
            return
        wanted = packed(address)
        # Most are none of its: their bytes do not have it anywhere.
        entries = map(read_flow, (part for part in self._dump(0, 0) if wanted in part))
        self.delete(flow for flow in entries if is_of(flow, wanted))

    def close(self) -> None:
        self._netfilter.close()

    def _change(self, call: str, changes: Iterable[tuple[Flow, Message]]) -> int:
        """How many there were: one that has ended is no error."""
        remaining = iter(changes)
        changed = 0
        while several := list(islice(remaining, BATCH_MAX)):
            refused = self._netfilter.send([message for _, message in several])
            for place, refusal in refused.items():
                if refusal.errno != errno.ENOENT:
                    raise KernelError(call, _named(several[place][0]), refusal.errno)
            changed += len(several) - len(refused)
        return changed

    def _dump(self, mark: int, mask: int) -> list[bytes]:
        return self._netfilter.dump(get_message(mark, mask))

    def _flush_filtered(self, address: str) -> bool:
        """False where the kernel cannot: then nothing was deleted."""
        if self._can_filter:
            refused = self._netfilter.send(flush_source_messages(address))
            self._can_filter = not refused
            for refusal in refused.values():
                if refusal.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise KernelError("IPCTNL_MSG_CT_DELETE", f"of {address}", refusal.errno)
        return self._can_filter


def _named(flow: Flow) -> str:
    return f"{flow.original.source} to {flow.original.destination}"


# Events ----------------------------------------------------------------------------------------


class FlowEvent(NamedTuple):
    kind: EventKind
    flow: Flow


class Lost(NamedTuple):
    """Between the events before it and those after it, so many did not fit into the buffer."""

    events: int


class FlowEvents(Closing):
    """Connections that begin and end in the network namespace that the calling thread is in now.

    What nobody reads waits in the kernel, up to `buffer_bytes`; what comes then is lost, and
    counted.
    """

    def __init__(
        self,
        kinds: Iterable[EventKind] = ("new", "destroy"),
        *,
        buffer_bytes: int = EVENTS_BUFFER_BYTES,
    ) -> None:
        self._buffer = bytearray(DATAGRAM_MAX_BYTES)
        self._is_losing = False
        self._drops = 0
        self._socket = open_socket()
        try:
            subscribe(self._socket, [GROUPS[kind] for kind in kinds], buffer_bytes)
        except KernelError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    async def receive(self) -> list[FlowEvent | Lost]:
        """Wait until there are some; up to EVENTS_MAX of them, in order."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if events := self.read():
                return events

    def read(self) -> list[FlowEvent | Lost]:
        """Those that there are, up to EVENTS_MAX, without waiting."""
        found: list[FlowEvent | Lost] = []
        while len(found) < EVENTS_MAX:
            try:
                found += events_in(receive(self._socket, self._buffer))
            except KernelError as error:
                if error.errno == errno.ENOBUFS:
                    self._is_losing = True  # after what is still in the buffer, not before it
                    continue
                if error.errno != errno.EAGAIN:
                    raise
                if self._is_losing:
                    found.append(self._lost())
                break
        return found

    def close(self) -> None:
        self._socket.close()

    def _lost(self) -> Lost:
        """Since the last time. The buffer was empty just now: only then the kernel begins again to
        put events into it."""
        self._is_losing = False
        before, self._drops = self._drops, drops(self._socket)
        return Lost((self._drops - before) % (1 << 32))


def events_in(datagram: bytes) -> Iterator[FlowEvent]:
    for answer in answers(datagram):
        if answer.kind in KINDS:
            yield FlowEvent(KINDS[answer.kind], read_flow(answer.body))
