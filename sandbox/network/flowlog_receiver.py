"""Has the flow log of one VPC written: listens in its namespace, and closes the intervals.

Everything that comes is taken in batches with a pause between them, so that a task that opens
connections or is refused all the time costs the agent a bounded share of a processor. What waits
meanwhile waits in the kernel; what finds no room there is lost, and the records say so (SKIPDATA).

The namespace needs nf_conntrack_acct=1 before the first connection, or there is nothing to record;
with nf_conntrack_timestamp=1 (where the kernel has it) records begin when their connections do, and
not with the interval. An agent that dies loses the interval and what passes until the next one
begins; the first interval of that one says so.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import trio

from sandbox.errors import KernelError
from sandbox.kernel.conntrack import EVENTS_MAX, Conntrack, FlowEvent, FlowEvents
from sandbox.kernel.packetlog import READ_MAX, LoggedPacket, PacketLog
from sandbox.kernel.thread import KernelThread
from sandbox.model.vpc import Network
from sandbox.network.flowlog import Aggregator
from sandbox.network.flowlog_files import FlowLogWriter

PAUSE_S = 0.05
"""After a full batch: at most 10 000 connections that end, and 80 000 packets, a second."""
DRAIN_MAX = 64
"""Batches of each kind at the end of an interval."""


class FlowLog:
    """Opened in the namespace of a KernelThread; `run` is cancelled to end it."""

    def __init__(
        self,
        aggregator: Aggregator,
        writer: FlowLogWriter,
        conntrack: Conntrack,
        events: FlowEvents,
        packets: PacketLog | None,
    ) -> None:
        self._aggregator = aggregator
        self._writer = writer
        self._conntrack = conntrack
        self._events = events
        self._packets = packets
        self._lock = trio.Lock()

    @classmethod
    @contextmanager
    def opened(
        cls,
        inside: KernelThread,
        account_id: str,
        network: Network,
        writer: FlowLogWriter,
        *,
        log_group: int | None,
    ) -> Iterator[Self]:
        """`log_group`: None where the kernel cannot log packets; then there is no REJECT."""
        with ExitStack() as stack:
            conntrack = stack.enter_context(inside.call(Conntrack))
            events = stack.enter_context(inside.call(lambda: FlowEvents(["destroy"])))
            packets = None
            if log_group is not None:
                packets = stack.enter_context(inside.call(PacketLog, log_group))
            stack.callback(writer.close)
            aggregator = Aggregator(account_id, network, time.time(), conntrack.flows())
            yield cls(aggregator, writer, conntrack, events, packets)

    async def run(self, interval_s: float) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, self._events.fileno(), self._take_events, EVENTS_MAX)
            if self._packets is not None:
                nursery.start_soon(
                    self._listen, self._packets.fileno(), self._take_packets, READ_MAX
                )
            due = trio.current_time()
            while True:
                due = max(due + interval_s, trio.current_time())
                await trio.sleep_until(due)
                await self.close_interval()

    async def change(self, network: Network) -> None:
        """After an interface's flows were flushed, and before its address is another's."""
        async with self._lock:
            self._drain()
            self._aggregator.change(network)

    async def close_interval(self) -> None:
        """Nothing is read between the table and its records: `Aggregator` says why."""
        async with self._lock:
            self._drain()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._write)

    def _write(self) -> None:
        """What cannot be written is lost, and the next interval says so."""
        flows = self._conntrack.flows()
        records = self._aggregator.close(flows, time.time())
        try:
            self._writer.write(records)
        except KernelError:
            deque(records, maxlen=0)
            self._aggregator.lost()

    async def _listen(self, fd: int, take: Callable[[], int], full: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(fd)
            async with self._lock:
                taken = take()
            await trio.sleep(PAUSE_S if taken >= full else 0)

    def _drain(self) -> None:
        for take, full in ((self._take_events, EVENTS_MAX), (self._take_packets, READ_MAX)):
            for _ in range(DRAIN_MAX):
                if take() < full:
                    break

    def _take_events(self) -> int:
        events = self._events.read()
        now = time.time()
        for event in events:
            if isinstance(event, FlowEvent):
                self._aggregator.ended(event.flow, now)
            else:
                self._aggregator.lost()
        return len(events)

    def _take_packets(self) -> int:
        if self._packets is None:
            return 0
        packets = self._packets.read()
        now = time.time()
        for packet in packets:
            if isinstance(packet, LoggedPacket):
                self._aggregator.refused(packet, now)
            else:
                self._aggregator.lost()
        return len(packets)
