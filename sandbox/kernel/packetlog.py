"""Packets that the rules of one network namespace log with NFLOG, as values.

The kernel sends the beginning of each packet, with the prefix of the rule, to whoever has bound the
rule's group in that namespace (iptables-extensions(8), NFLOG; linux/netfilter/nfnetlink_log.h). It
collects some of them before it does, for a tenth of a second at most, so that a flood costs the
reader little. What nobody reads in time is lost, but not unseen: packets are numbered.

Whoever sends a packet decides about its bytes: any may come, and lengths that are not true.

nfnetlink_log and the NFLOG target may be missing in a kernel: `works` tries.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import trio

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.closing import Closing
from sandbox.kernel.netfilter import Chain, Iptables, Rule, RuleSet, Table
from sandbox.kernel.netlink import Netlink
from sandbox.kernel.nfnetlink import (
    DATAGRAM_MAX_BYTES,
    NFGEN,
    NLMSG_ERROR,
    Message,
    Refusal,
    answers,
    attribute,
    attributes,
    batch,
    malformed,
    message_type,
    number,
    open_socket,
    receive,
    refusal,
    subscribe,
    transmit,
)
from sandbox.kernel.thread import KernelThread

# linux/netfilter/nfnetlink.h, linux/netfilter/nfnetlink_log.h
NFNL_SUBSYS_ULOG = 4
PACKET = message_type(NFNL_SUBSYS_ULOG, 0)
CONFIG = message_type(NFNL_SUBSYS_ULOG, 1)
NFULA_CFG_CMD = 1
NFULA_CFG_MODE = 2
NFULA_CFG_TIMEOUT = 4
NFULA_CFG_QTHRESH = 5
NFULA_CFG_FLAGS = 6
NFULNL_CFG_CMD_BIND = b"\1"
NFULNL_CFG_F_SEQ = 1
NFULNL_COPY_PACKET = 2
NFULA_PACKET_HDR = 1
NFULA_TIMESTAMP = 3
NFULA_PAYLOAD = 9
NFULA_PREFIX = 10
NFULA_SEQ = 12

SNAP_BYTES = 64
"""Of each packet; the headers of IPv4 with options, or of IPv6, and the ports."""
COLLECTED_MAX = 64
COLLECTED_FOR_10_MS = 10
BUFFER_BYTES = 4 << 20
"""What waits in the kernel at most."""
READ_MAX = 4096
"""Packets of one reading."""

ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
IPV4_HEADER_BYTES, IPV6_HEADER_BYTES = 20, 40
EXTENSIONS = frozenset({socket.IPPROTO_HOPOPTS, socket.IPPROTO_ROUTING, socket.IPPROTO_DSTOPTS})
EXTENSIONS_MAX = 8
WITH_PORTS = frozenset(
    # and UDP-Lite, which the socket module has no name for before 3.12
    {socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP, 33, 136}
)


class LoggedPacket(NamedTuple):
    prefix: str
    source: str
    destination: str
    protocol: int
    """Its number; of IPv6 the first that is no extension header."""
    source_port: int
    destination_port: int
    """0: it has none, or is not the first fragment."""
    bytes: int
    """With its IP header, as that says."""
    at_ns: int | None
    """When it came, since 1970; None: the kernel did not look at the clock."""


class LostPackets(NamedTuple):
    """Between the packets before it and those after it, so many found no room."""

    packets: int


class PacketLog(Closing):
    """What is logged to `group` in the network namespace that the calling thread is in now.

    KernelError with EPERM if another socket has the group already (as if we were not root), EINVAL
    where the kernel has no nfnetlink_log.
    """

    def __init__(self, group: int, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._buffer = bytearray(DATAGRAM_MAX_BYTES)
        self._expected: int | None = None
        self._socket = open_socket()
        try:
            subscribe(self._socket, (), buffer_bytes)
            self._bind(group)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    async def receive(self) -> list[LoggedPacket | LostPackets]:
        """Wait until there are some; about READ_MAX of them at most, in order."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            if found := self.read():
                return found

    def read(self) -> list[LoggedPacket | LostPackets]:
        """Those that there are, about READ_MAX at most, without waiting.

        A message that makes no sense is a packet lost. How many were lost is known only when
        another packet comes.
        """
        found: list[LoggedPacket | LostPackets] = []
        while len(found) < READ_MAX:
            try:
                datagram = receive(self._socket, self._buffer)
            except KernelError as error:
                if error.errno == errno.ENOBUFS:
                    continue  # the next number tells how many
                if error.errno == errno.EAGAIN:
                    break
                raise
            found += self._packets(datagram)
        return found

    def close(self) -> None:
        """The kernel forgets the group; rules that log to it go on and do nothing."""
        self._socket.close()

    def _bind(self, group: int) -> None:
        messages = bind_messages(group)
        transmit(self._socket, batch(messages, 1))
        for refused in self._answered(len(messages)):
            raise KernelError("NFULNL_MSG_CONFIG", f"group {group}", refused.errno)

    def _answered(self, last: int) -> Iterator[Refusal]:
        while True:
            for answer in answers(receive(self._socket, self._buffer)):
                if answer.kind == NLMSG_ERROR:
                    if refused := refusal(answer):
                        yield refused
                    if answer.sequence == last:
                        return

    def _packets(self, datagram: bytes) -> Iterator[LoggedPacket | LostPackets]:
        for sequence, packet in packets_in(datagram):
            if sequence is not None:
                if self._expected is not None and sequence != self._expected:
                    yield LostPackets((sequence - self._expected) % (1 << 32))
                self._expected = (sequence + 1) % (1 << 32)
            yield packet


def log_rule(group: int, prefix: str, *match: str) -> Rule:
    """Logs what matches and lets it go on to the next rule; `prefix` has at most 63 bytes."""
    return (
        *(*match, "-j", "NFLOG", "--nflog-group", str(group)),
        *("--nflog-prefix", prefix, "--nflog-size", str(SNAP_BYTES)),
    )


# Messages --------------------------------------------------------------------------------------


def bind_messages(group: int) -> list[Message]:
    """Have the packets of a group: their beginnings, numbered, a few at a time."""
    header = NFGEN.pack(socket.AF_UNSPEC, 0, group)
    settings = (
        attribute(NFULA_CFG_MODE, struct.pack(">IBB", SNAP_BYTES, NFULNL_COPY_PACKET, 0)),
        attribute(NFULA_CFG_TIMEOUT, COLLECTED_FOR_10_MS.to_bytes(4, "big")),
        attribute(NFULA_CFG_QTHRESH, COLLECTED_MAX.to_bytes(4, "big")),
        attribute(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ.to_bytes(2, "big")),
    )
    return [
        Message(CONFIG, header + attribute(NFULA_CFG_CMD, NFULNL_CFG_CMD_BIND)),
        Message(CONFIG, header + b"".join(settings)),
    ]


def packets_in(datagram: bytes) -> Iterator[tuple[int | None, LoggedPacket | LostPackets]]:
    """With their numbers, if they have some.

    A packet whose headers make no sense is lost; KernelError (EBADMSG) if the kernel's own framing
    does not.
    """
    for answer in answers(datagram):
        if answer.kind != PACKET:
            continue
        found = attributes(answer.body[NFGEN.size :])
        sequence = number(found, NFULA_SEQ, 4)
        try:
            yield sequence, read_packet(found)
        except ValueError:
            yield sequence, LostPackets(1)


def read_packet(found: dict[int, bytes]) -> LoggedPacket:
    """ValueError: the packet is not of IP, or its headers do not fit into what was copied."""
    header = found.get(NFULA_PACKET_HDR, b"")
    if len(header) < 2:
        raise malformed("packet without its protocol")
    prefix = found.get(NFULA_PREFIX, b"").rstrip(b"\0").decode(errors="replace")
    payload = found.get(NFULA_PAYLOAD, b"")
    protocol = int.from_bytes(header[:2], "big")
    if protocol == ETH_P_IP:
        return _ipv4(prefix, payload, _time(found))
    if protocol == ETH_P_IPV6:
        return _ipv6(prefix, payload, _time(found))
    raise ValueError(f"protocol {protocol:#06x}")


def _time(found: dict[int, bytes]) -> int | None:
    stamp = found.get(NFULA_TIMESTAMP, b"")
    if len(stamp) != 16:
        return None
    seconds, microseconds = struct.unpack(">QQ", stamp)
    return int(seconds * 10**9 + microseconds * 1000)


# Headers (RFC 791, RFC 8200) -------------------------------------------------------------------


def _ipv4(prefix: str, data: bytes, at_ns: int | None) -> LoggedPacket:
    if len(data) < IPV4_HEADER_BYTES:
        raise ValueError("too short for IPv4")
    length, fragment = struct.unpack_from(">H2xH", data, 2)
    protocol = data[9]
    header_bytes = (data[0] & 0xF) * 4
    is_first = fragment & 0x1FFF == 0
    return LoggedPacket(
        prefix,
        socket.inet_ntop(socket.AF_INET, data[12:16]),
        socket.inet_ntop(socket.AF_INET, data[16:20]),
        protocol,
        *_ports(protocol, data[max(header_bytes, IPV4_HEADER_BYTES) :], is_first),
        length,
        at_ns,
    )


def _ipv6(prefix: str, data: bytes, at_ns: int | None) -> LoggedPacket:
    if len(data) < IPV6_HEADER_BYTES:
        raise ValueError("too short for IPv6")
    (length,) = struct.unpack_from(">H", data, 4)
    protocol, rest, is_first = _beyond_extensions(data[6], data[IPV6_HEADER_BYTES:])
    return LoggedPacket(
        prefix,
        socket.inet_ntop(socket.AF_INET6, data[8:24]),
        socket.inet_ntop(socket.AF_INET6, data[24:40]),
        protocol,
        *_ports(protocol, rest, is_first),
        IPV6_HEADER_BYTES + length,
        at_ns,
    )


def _beyond_extensions(protocol: int, data: bytes) -> tuple[int, bytes, bool]:
    """The first protocol that is none, what was copied of it, and whether it begins there."""
    is_first = True
    for _ in range(EXTENSIONS_MAX):
        if len(data) < 8:
            break
        if protocol == socket.IPPROTO_FRAGMENT:
            is_first = int.from_bytes(data[2:4], "big") >> 3 == 0
            protocol, data = data[0], data[8:]
        elif protocol in EXTENSIONS:
            protocol, data = data[0], data[8 * (data[1] + 1) :]
        else:
            break
    return protocol, data, is_first


def _ports(protocol: int, data: bytes, is_first: bool) -> tuple[int, int]:
    if protocol not in WITH_PORTS or not is_first or len(data) < 4:
        return 0, 0
    source, destination = struct.unpack_from(">HH", data)
    return source, destination


# Is it there? ----------------------------------------------------------------------------------

PROBE_GROUP = 1
PROBE_TIMEOUT_S = 1.0


def works(iptables: Iptables) -> bool:
    """Tried out in a namespace of its own: does a packet that a rule logs arrive?"""
    with KernelThread("packetlog-probe") as scratch:
        try:
            return scratch.call(_arrives, iptables)
        except KernelError:
            return False


def _arrives(iptables: Iptables) -> bool:
    native.unshare(native.CLONE_NEWNET)
    with Netlink() as netlink:
        netlink.set_loopback_up()
    rules = (log_rule(PROBE_GROUP, "probe"),)
    iptables.load(RuleSet(tables=(Table("mangle", (Chain("OUTPUT", rules, "ACCEPT"),)),)))
    with PacketLog(PROBE_GROUP) as log, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"?", ("127.0.0.1", 9))
        select.select([log], [], [], PROBE_TIMEOUT_S)
        return any(isinstance(each, LoggedPacket) for each in log.read())
