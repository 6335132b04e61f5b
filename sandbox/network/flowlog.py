"""VPC flow logs: what passed at each interface and what was refused, in AWS's version 2 format.

A record is one direction of a flow at one interface within an aggregation interval (VPC User Guide,
"Flow log records"), so a connection between two tasks makes four. What makes them:

    ACCEPT   the connection table, read at the end of an interval, and the connections that ended in
             it: packets and bytes as the kernel counts them, less what was counted before
    REJECT   packets that a rule logged before it dropped them (`drops`)
    NODATA   an interface without traffic in the interval
    SKIPDATA something about this interface was lost: events or logged packets nobody had room for,
             refusals beyond the rate that is logged, connections from before the agent began

This is pure: connections and packets in, records out. Times are seconds since 1970.

As on AWS, traffic with the VPC's resolver, with link-local addresses (metadata, time, DHCP) and
with a subnet's router is not recorded, an interface appears with its private address, and ports of
what has none are 0 (VPC User Guide, "Flow log limitations"). Other than there: `end` is the
interval's or the connection's, for the kernel does not keep the time of the last packet; and a
packet is what the kernel forwards, which may be several of the wire's in one (segmentation
offload), its bytes those of that one.

What a refusal means for the others: a packet that ingress refuses was accepted where it was sent
from. An ACL also refuses packets of connections, which are counted before they get there: these are
taken off again where they did not pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import ceil
from typing import Literal, NamedTuple, Self

import msgspec

from sandbox.kernel.flows import Counters, Flow
from sandbox.kernel.packetlog import LoggedPacket
from sandbox.model.vpc import Network, resolver_address, router_address
from sandbox.network import drops
from sandbox.network.rules import private_addresses

VERSION = "2"
MaxAggregationInterval = Literal[60, 600]
"""Seconds. AWS's default is 600, but at interfaces of its Nitro hosts always 60."""
MAX_AGGREGATION_INTERVAL: MaxAggregationInterval = 60

FLOWS_MAX = 200_000
"""Connections whose counters are remembered; some 300 bytes each."""
PENDING_MAX = 200_000
"""Records of an interval that wait for its end: connections that ended, and refusals."""
IPS_DYING = 1 << 9
"""Deleted, and its event is on the way. (linux/netfilter/nf_conntrack_common.h)"""
SECOND_NS = 10**9

Action = Literal["ACCEPT", "REJECT"]
LogStatus = Literal["OK", "NODATA", "SKIPDATA"]


class FlowRecord(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", tag_field="version", tag=2
):
    """AWS's field names; None where AWS writes `-`."""

    account_id: str
    interface_id: str
    srcaddr: str | None = None
    dstaddr: str | None = None
    srcport: int | None = None
    dstport: int | None = None
    protocol: int | None = None
    packets: int | None = None
    bytes: int | None = None
    start: int
    end: int
    action: Action | None = None
    log_status: LogStatus = "OK"

    def line(self) -> str:
        values = (getattr(self, name) for name in self.__struct_fields__)
        return " ".join((VERSION, *("-" if value is None else str(value) for value in values)))

    @classmethod
    def parse(cls, line: str) -> Self:
        """ValueError for what `line` did not write."""
        version, *values = line.split(" ")
        if version != VERSION or len(values) != len(cls.__struct_fields__):
            raise ValueError(f"not a flow log record of version {VERSION}: {line[:200]!r}")
        fields = zip(cls.__struct_encode_fields__, values, strict=True)
        members = {name: value for name, value in fields if value != "-"}
        try:
            return msgspec.convert(members, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{error}: {line[:200]!r}") from error


# What happens between interfaces -----------------------------------------------------------------


class _Key(NamedTuple):
    """What one record is about, but for its action."""

    interface: str
    source: str
    destination: str
    source_port: int
    destination_port: int
    protocol: int


class _View(NamedTuple):
    """A flow at one interface: the direction that began it, and the other one."""

    there: _Key
    back: _Key


class _Owners:
    """Interfaces by address, and what is nobody's to record."""

    def __init__(self, network: Network) -> None:
        self.by_address: dict[str, str] = {}
        for name, interface in network.interfaces.items():
            for address in private_addresses(interface):
                self.by_address[address] = name
        self.nat_gateways: dict[str, tuple[str, str]] = {}
        for nat in network.nat_gateways.values():
            for address in (nat.private_ip, nat.public_ip):
                self.nat_gateways[address] = (nat.network_interface_id, nat.private_ip)
        self.interfaces = frozenset(network.interfaces)
        self._silent = frozenset(
            (
                str(resolver_address(network.vpc.cidr_block)),
                *(str(router_address(subnet.cidr_block)) for subnet in network.subnets.values()),
            )
        )

    def is_recorded(self, source: str, destination: str) -> bool:
        return not (self._is_silent(source) or self._is_silent(destination))

    def _is_silent(self, address: str) -> bool:
        return address in self._silent or address.startswith(("169.254.", "fe80:"))

    def views(self, flow: Flow) -> list[_View]:
        there, back = flow.original, flow.reply
        if not self.is_recorded(there.source, there.destination):
            return []
        found = []
        ports = there.source_port or 0, there.destination_port or 0
        if sender := self.by_address.get(there.source):
            found.append(_view(sender, there.source, there.destination, *ports, there.protocol))
        if there.source != back.destination and (nat := self.nat_gateways.get(back.destination)):
            name, private = nat
            behind = back.destination_port or 0
            found.append(_view(name, there.source, private, *ports, there.protocol))
            found.append(_view(name, private, back.source, behind, ports[1], there.protocol))
        if receiver := self.by_address.get(back.source):
            port = back.source_port or 0
            found.append(_view(receiver, there.source, back.source, ports[0], port, there.protocol))
        return found


def _view(
    interface: str, source: str, destination: str, from_port: int, to_port: int, protocol: int
) -> _View:
    return _View(
        _Key(interface, source, destination, from_port, to_port, protocol),
        _Key(interface, destination, source, to_port, from_port, protocol),
    )


# The aggregator ----------------------------------------------------------------------------------


class _Sum(msgspec.Struct, gc=False):
    packets: int
    bytes: int
    start: float
    end: float

    def add(self, packets: int, octets: int, start: float, end: float) -> None:
        self.packets += packets
        self.bytes += octets
        self.start = min(self.start, start)
        self.end = max(self.end, end)


class _Seen(msgspec.Struct, gc=False, frozen=True):
    """What was counted of a connection up to the last reading of the table that had it."""

    there: Counters
    back: Counters
    interval: int
    interfaces: tuple[str, ...]


NOTHING = Counters(0, 0)


class Aggregator:
    """Of one VPC, from `now` on. For one caller at a time, who at each end of an interval first
    hands over what events and packets there are (`ended`, `refused`, `lost`), then reads the table,
    and then, before any other event, writes down what `close` gives."""

    def __init__(
        self, account_id: str, network: Network, now: float, table: Iterable[Flow] = ()
    ) -> None:
        """`table`: the connections that there are already, after events have been asked for."""
        self._account_id = account_id
        self._owners = _Owners(network)
        self._began = now
        self._interval = 0
        self._knows_all = False
        """Whether the last reading of the table is remembered whole: then what was not in it has
        begun since."""
        self._seen: dict[tuple[int, int], _Seen] = {}
        self._pending: dict[tuple[_Key, Action], _Sum] = {}
        self._stopped: dict[_Key, Counters] = {}
        """Counted in a connection, but refused before it got to that interface."""
        self._skipped: set[str] = set()
        for flow in table:
            deque(self._passed(flow), maxlen=0)
        self._knows_all = len(self._seen) < FLOWS_MAX

    def change(self, network: Network) -> None:
        """Before addresses of interfaces that are gone are given to others."""
        self._owners = _Owners(network)

    def lost(self) -> None:
        """Events or packets, and nobody knows whose."""
        self._skipped |= self._owners.interfaces

    def ended(self, flow: Flow, now: float) -> None:
        """A connection was taken out of the table."""
        views = self._owners.views(flow)
        seen = self._seen.pop(_key(flow), None)
        if not views:
            return
        if seen is None:
            seen = self._first(flow, views)
        end = now if flow.stopped_at_ns is None else flow.stopped_at_ns / SECOND_NS
        for key, delta in _deltas(flow, views, seen):
            self._add(key, "ACCEPT", delta, self._start(flow), end)

    def refused(self, packet: LoggedPacket, now: float) -> None:
        """A packet that one of `drops.drop_chains` logged."""
        refusal = drops.refusal(packet.prefix)
        if refusal is None:
            return
        sender = self._owners.by_address.get(packet.source)
        receiver = self._owners.by_address.get(packet.destination)
        refusing = sender if refusal.is_egress else receiver
        if refusing is None or not self._owners.is_recorded(packet.source, packet.destination):
            return
        if refusal.stands_for_more:
            self._skipped.add(refusing)
            return
        at = packet.at_ns / SECOND_NS if packet.at_ns is not None else now
        one = Counters(1, packet.bytes)
        fields = packet[1:3] + packet[4:6] + packet[3:4]
        self._add(_Key(refusing, *fields), "REJECT", one, at, at)
        if refusal.is_established:
            for name in (sender, receiver) if refusal.is_egress else (receiver,):
                if name is not None:
                    self._take_off(_Key(name, *fields), one)
        elif not refusal.is_egress and sender is not None:
            self._add(_Key(sender, *fields), "ACCEPT", one, at, at)

    def close(self, flows: Iterable[Flow], now: float) -> Iterator[FlowRecord]:
        """The records of the interval that ends; `flows` is the whole table.

        The next interval has begun when the last record was taken.
        """
        heard: set[str] = set()
        for key, action, total in self._sums(flows, now):
            if action == "ACCEPT":
                stopped = self._stopped.get(key, NOTHING)
                total.packets -= stopped.packets
                total.bytes -= stopped.bytes
            if total.packets > 0:
                heard.add(key.interface)
                yield self._record(key, action, total)
        self._find_lost()
        self._knows_all = len(self._seen) < FLOWS_MAX
        for name in sorted(self._skipped):
            yield self._empty(name, now, "SKIPDATA")
        for name in sorted(self._owners.interfaces - heard - self._skipped):
            yield self._empty(name, now, "NODATA")
        self._pending, self._stopped, self._skipped = {}, {}, set()
        self._began, self._interval = now, self._interval + 1

    def _sums(self, flows: Iterable[Flow], now: float) -> Iterator[tuple[_Key, Action, _Sum]]:
        """Those of the table are handed out one by one, with what waited for them."""
        for flow in flows:
            for key, delta in self._passed(flow):
                waiting = self._pending.pop((key, "ACCEPT"), None)
                total = _Sum(delta.packets, delta.bytes, self._start(flow), now)
                if waiting is not None:
                    total.add(waiting.packets, waiting.bytes, waiting.start, waiting.end)
                yield key, "ACCEPT", total
        for (key, action), total in self._pending.items():
            yield key, action, total

    def _passed(self, flow: Flow) -> Iterator[tuple[_Key, Counters]]:
        """Since the table was read the last time."""
        if flow.status & IPS_DYING:
            return
        views = self._owners.views(flow)
        if not views:
            return
        key = _key(flow)
        seen = self._seen.get(key)
        if seen is None:
            seen = self._first(flow, views)
            if len(self._seen) >= FLOWS_MAX:
                self._skipped.update(seen.interfaces)
                return
        self._seen[key] = _Seen(
            flow.original_counters or NOTHING,
            flow.reply_counters or NOTHING,
            self._interval,
            seen.interfaces,
        )
        yield from _deltas(flow, views, seen)

    def _first(self, flow: Flow, views: list[_View]) -> _Seen:
        """What to take off. If it may be older than what we remember, nobody knows what passed
        since: all that it has."""
        interfaces = tuple(view.there.interface for view in views)
        if self._knows_all and flow.original_counters is not None:
            return _Seen(NOTHING, NOTHING, self._interval, interfaces)
        self._skipped.update(interfaces)
        there, back = flow.original_counters or NOTHING, flow.reply_counters or NOTHING
        return _Seen(there, back, self._interval, interfaces)

    def _find_lost(self) -> None:
        """Connections that the last reading of the table did not have, and of whose end there was
        no event until this one: what they had counted last is lost."""
        lost = [key for key, seen in self._seen.items() if seen.interval < self._interval - 1]
        for key in lost:
            self._skipped.update(self._seen.pop(key).interfaces)

    def _add(self, key: _Key, action: Action, passed: Counters, start: float, end: float) -> None:
        waiting = self._pending.get((key, action))
        if waiting is not None:
            waiting.add(passed.packets, passed.bytes, start, end)
        elif len(self._pending) < PENDING_MAX:
            self._pending[key, action] = _Sum(passed.packets, passed.bytes, start, end)
        else:
            self._skipped.add(key.interface)

    def _take_off(self, key: _Key, one: Counters) -> None:
        before = self._stopped.get(key, NOTHING)
        if before is NOTHING and len(self._stopped) >= PENDING_MAX:
            self._skipped.add(key.interface)
            return
        self._stopped[key] = Counters(before.packets + one.packets, before.bytes + one.bytes)

    def _start(self, flow: Flow) -> float:
        started = flow.started_at_ns
        return self._began if started is None else max(self._began, started / SECOND_NS)

    def _record(self, key: _Key, action: Action, total: _Sum) -> FlowRecord:
        return FlowRecord(
            account_id=self._account_id,
            interface_id=key.interface,
            srcaddr=key.source,
            dstaddr=key.destination,
            srcport=key.source_port,
            dstport=key.destination_port,
            protocol=key.protocol,
            packets=total.packets,
            bytes=max(0, total.bytes),
            start=int(total.start),
            end=max(int(total.start), ceil(total.end)),
            action=action,
        )

    def _empty(self, interface: str, now: float, status: LogStatus) -> FlowRecord:
        return FlowRecord(
            account_id=self._account_id,
            interface_id=interface,
            start=int(self._began),
            end=ceil(now),
            log_status=status,
        )


def _key(flow: Flow) -> tuple[int, int]:
    """The kernel's id alone may be that of two: it is a hash of 32 bits."""
    return flow.id or 0, hash(flow.original)


def _deltas(flow: Flow, views: list[_View], seen: _Seen) -> Iterator[tuple[_Key, Counters]]:
    there = _less(flow.original_counters or NOTHING, seen.there)
    back = _less(flow.reply_counters or NOTHING, seen.back)
    for view in views:
        if there.packets:
            yield view.there, there
        if back.packets:
            yield view.back, back


def _less(now: Counters, before: Counters) -> Counters:
    return Counters(max(0, now.packets - before.packets), max(0, now.bytes - before.bytes))
