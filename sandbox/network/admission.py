"""How much of the resolver one caller may have.

A caller's packets are EC2's: 1024 a second an interface, and what is beyond them is dropped (VPC
User Guide, "DNS quotas"). The whole has a bound of its own, since answers cost the agent's one loop
about half a millisecond each; when it is reached, those who have lately asked little are
answered before those who ask without end.

Time comes from the caller, in seconds of any clock that does not go backwards.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from typing import Any

PACKETS_PER_S = 1024
TOTAL_PER_S = 2048

BUCKETS_MAX = 8192
"""Then those that are full again are forgotten: that is what a new one is."""


class Bucket:
    """Tokens that come back at a rate, up to what comes back in a second."""

    __slots__ = ("at", "rate", "tokens")

    def __init__(self, rate: float, now: float) -> None:
        self.rate = self.tokens = rate
        self.at = now

    def refill(self, now: float) -> None:
        self.tokens = min(self.rate, self.tokens + (now - self.at) * self.rate)
        self.at = now


class Admission:
    """One for all resolvers of an agent: they share its loop. A caller is any key."""

    def __init__(self, per_caller: float = PACKETS_PER_S, total: float = TOTAL_PER_S) -> None:
        self._per_caller = per_caller
        self._total_rate = total
        self._total: Bucket | None = None
        self._buckets: dict[Hashable, Bucket] = {}

    def admits(self, caller: Hashable, now: float) -> bool:
        """Whether this packet is answered; counts it if so."""
        total = self._total = self._total or Bucket(self._total_rate, now)
        total.refill(now)
        bucket = self._buckets.get(caller) or self._new(caller, now)
        bucket.refill(now)
        needs_little = bucket.tokens > bucket.rate / 2
        if bucket.tokens < 1 or (total.tokens < 1 and not needs_little):
            return False
        bucket.tokens -= 1
        total.tokens = max(-total.rate, total.tokens - 1)
        return True

    def charge(self, caller: Hashable, packets: float, now: float) -> None:
        """Counts what an admitted packet has cost beyond one, as so many packets of the caller."""
        total = self._total = self._total or Bucket(self._total_rate, now)
        for bucket in (total, self._buckets.get(caller) or self._new(caller, now)):
            bucket.refill(now)
            bucket.tokens = max(-bucket.rate, bucket.tokens - packets)

    def _new(self, caller: Hashable, now: float) -> Bucket:
        if len(self._buckets) >= BUCKETS_MAX:
            for bucket in self._buckets.values():
                bucket.refill(now)
            self._buckets = {k: b for k, b in self._buckets.items() if b.tokens < b.rate}
        bucket = self._buckets[caller] = Bucket(self._per_caller, now)
        return bucket


class Places:
    """So many at once of something, for each caller and in all."""

    def __init__(self, *, per_caller: int, total: int) -> None:
        self._per_caller = per_caller
        self._total = total
        self._taken: Counter[Hashable] = Counter()

    def take(self, caller: Hashable) -> bool:
        """A place, if there is one; whoever has it gives it back with `leave`."""
        if self._taken[caller] >= self._per_caller or self._taken.total() >= self._total:
            if not self._taken[caller]:
                del self._taken[caller]
            return False
        self._taken[caller] += 1
        return True

    def leave(self, caller: Hashable) -> None:
        self._taken[caller] -= 1
        if not self._taken[caller]:
            del self._taken[caller]


class Turns:
    """Packets that wait, each caller's in a queue of its own, which have their turns in a circle.

    One queue for all is what a socket has: there a caller waits behind all that another one sent.
    """

    def __init__(self, *, per_caller: int, total_bytes: int) -> None:
        self._per_caller = per_caller
        self._total_bytes = total_bytes
        self._bytes = 0
        self._queues: OrderedDict[Hashable, deque[tuple[bytes, Any]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, caller: Hashable, packet: bytes, sender: Any) -> None:
        """Waits, or is dropped when there is no more room."""
        queue = self._queues.setdefault(caller, deque())
        if len(queue) < self._per_caller and self._bytes + len(packet) <= self._total_bytes:
            queue.append((packet, sender))
            self._bytes += len(packet)
        elif not queue:
            del self._queues[caller]

    def take(self) -> tuple[bytes, Any]:
        """The next one, when there is one, with what was put with it."""
        caller, queue = self._queues.popitem(last=False)
        packet, sender = queue.popleft()
        if queue:
            self._queues[caller] = queue
        self._bytes -= len(packet)
        return packet, sender
