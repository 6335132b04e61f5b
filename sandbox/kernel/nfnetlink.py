"""The framing of messages to and from netfilter: what ipset and conntrack have in common, and of
it what route messages have too (`kernel.rtnetlink`).

A message is a netlink header, a netfilter header (address family, version, resource) and
attributes, each with a header of its own and padded to four bytes (netlink(7); linux/netlink.h,
linux/netfilter/nfnetlink.h). Making the bytes is pure; only `Nfnetlink` talks to the kernel. It is
here, and not pyroute2, because the join of a task is a few hundred bytes that take pyroute2 50
times as long as the kernel. What happens rarely goes through pyroute2 all the same.

Netfilter carries a message out while it is being sent: when `send` of the socket returns, all of a
batch is done and the answers lie in the socket. So only the last message of a batch asks for an
acknowledgement. A refusal is answered in any case; what nothing was said about was carried out.
Nothing here ever waits.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from sandbox.errors import KernelError
from sandbox.kernel.closing import Closing

# linux/netlink.h, asm-generic/socket.h, linux/sock_diag.h
NETLINK_NETFILTER = 12
PROTOCOLS = {socket.NETLINK_ROUTE: "NETLINK_ROUTE", NETLINK_NETFILTER: "NETLINK_NETFILTER"}
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
NLA_TYPE_MASK = 0x3FFF

# linux/netfilter/nfnetlink.h
NFNL_SUBSYS_CTNETLINK = 1
NFNL_SUBSYS_IPSET = 6

HEADER = struct.Struct("=IHHII")
"""Length, type, flags, sequence, port."""
NFGEN = struct.Struct(">BBH")
"""Address family, version, resource."""
ATTRIBUTE = struct.Struct("=HH")
"""Length with this header, type."""
ERROR = struct.Struct("=i")
NATIVE = struct.Struct("=I")

PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
"""By what is beyond a multiple of four."""

BATCH_MAX = 128
"""Messages of one batch. Were all of them refused, their answers (768 bytes each by the kernel's
count) would still fit into a receive buffer of the default size, 208 KiB, twice."""

DATAGRAM_MAX_BYTES = 1 << 16
"""The kernel puts at most 32 KiB of a dump into one; an echo is as long as the request was."""

DUMP_MAX_BYTES = 1 << 28
"""Of one dump; a million tracked connections are less."""

SEQUENCE_LIMIT = 1 << 32


class Message(NamedTuple):
    """One request, without what is only known when it is sent."""

    kind: int
    body: bytes
    """From the netfilter header on, padded as its attributes are."""
    flags: int = 0


class Answer(NamedTuple):
    """One message of the kernel; `body` is all after the netlink header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


class Refusal(NamedTuple):
    errno: int
    """Not always one of errno.h: ipset has numbers of its own from 4096 on."""
    echo: bytes
    """The request or a part of it, from its netlink header on."""


# Making messages -------------------------------------------------------------------------------


def message_type(subsystem: int, command: int) -> int:
    return subsystem << 8 | command


def attribute(kind: int, payload: bytes) -> bytes:
    size = len(payload)
    return ATTRIBUTE.pack(4 + size, kind) + payload + PADDING[size & 3]


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def batch(messages: Sequence[Message], first_sequence: int) -> bytes:
    """One datagram: the messages in order, numbered from `first_sequence`; the last one is
    acknowledged."""
    last = len(messages) - 1
    parts = []
    for place, (kind, body, flags) in enumerate(messages):
        flags |= NLM_F_REQUEST | NLM_F_ACK if place == last else NLM_F_REQUEST
        parts.append(HEADER.pack(16 + len(body), kind, flags, first_sequence + place, 0))
        parts.append(body)
    return b"".join(parts)


# Reading messages ------------------------------------------------------------------------------


def answers(datagram: bytes, protocol: int = NETLINK_NETFILTER) -> Iterator[Answer]:
    """KernelError (EBADMSG) at a message that is cut off or says an impossible length."""
    at, end = 0, len(datagram)
    while at < end:
        if end - at < HEADER.size:
            raise malformed(f"{end - at} bytes after the last message", protocol)
        length, kind, flags, sequence, _ = HEADER.unpack_from(datagram, at)
        if length < HEADER.size or length > end - at:
            raise malformed(f"message of {length} bytes in {end - at}", protocol)
        yield Answer(kind, flags, sequence, datagram[at + HEADER.size : at + length])
        at += (length + 3) & ~3


def attributes(data: bytes) -> dict[int, bytes]:
    """Payloads by type; of several of one type the last, as the kernel reads them.

    KernelError (EBADMSG) at one that is cut off or says an impossible length.
    """
    found = {}
    at, end = 0, len(data)
    while at < end:
        if end - at < 4:
            raise malformed(f"{end - at} bytes after the last attribute")
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if length < 4 or length > end - at:
            raise malformed(f"attribute of {length} bytes in {end - at}")
        found[kind & NLA_TYPE_MASK] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def number(attributes: Mapping[int, bytes], kind: int, size: int) -> int | None:
    """An unsigned number in network order; None if it is not there."""
    value = attributes.get(kind)
    if value is None:
        return None
    if len(value) != size:
        raise malformed(f"attribute {kind} of {len(value)} bytes, not {size}")
    return int.from_bytes(value, "big")


def malformed(what: str, protocol: int = NETLINK_NETFILTER) -> KernelError:
    return KernelError("recv", f"{PROTOCOLS[protocol]} ({what})", errno.EBADMSG)


def refusal(answer: Answer) -> Refusal | None:
    """What an NLMSG_ERROR says; None if it acknowledges."""
    if len(answer.body) < ERROR.size:
        raise malformed(f"error of {len(answer.body)} bytes")
    (code,) = ERROR.unpack_from(answer.body)
    return Refusal(-code, answer.body[ERROR.size :]) if code else None


# The socket ------------------------------------------------------------------------------------


class Requests(Closing):
    """A socket for requests of the network namespace that the calling thread is in now.

    It stays of that namespace and may be used from any thread, by one at a time (others wait).
    Nothing blocks for anything but the kernel's own work.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._lock = threading.Lock()
        self._next_sequence = 1
        self._buffer = bytearray(DATAGRAM_MAX_BYTES)
        self._socket = opened

    def close(self) -> None:
        """Idempotent. Not while another thread uses it."""
        self._socket.close()

    def _take_sequences(self, count: int) -> int:
        """Never one of an earlier request, an answer to which may still be in the socket."""
        if self._next_sequence + count > SEQUENCE_LIMIT:
            self._next_sequence = 1
        first = self._next_sequence
        self._next_sequence += count
        return first

    def _outcomes(self, first: int, count: int) -> Iterator[tuple[int, Answer]]:
        """What was said of the requests numbered from `first`, by place; the last one always is."""
        last = first + count - 1
        while True:
            for answer in answers(receive(self._socket, self._buffer), self._socket.proto):
                if not first <= answer.sequence <= last or answer.kind != NLMSG_ERROR:
                    continue
                yield answer.sequence - first, answer
                if answer.sequence == last:
                    return


class Nfnetlink(Requests):
    def __init__(self) -> None:
        super().__init__(open_socket())

    def send(self, messages: Sequence[Message]) -> dict[int, Refusal]:
        """Have up to BATCH_MAX messages carried out, in one system call and in order.

        What was refused, by its place in `messages`; a refusal does not stop those after it.
        KernelError if the answers were lost (ENOBUFS) or make no sense: then it is not known which
        messages were carried out, and the socket is usable nevertheless.
        """
        if not messages:
            return {}
        if len(messages) > BATCH_MAX:
            raise ValueError(f"{len(messages)} messages in one batch")
        with self._lock:
            first = self._take_sequences(len(messages))
            try:
                transmit(self._socket, batch(messages, first))
                return self._refusals(first, len(messages))
            except KernelError:
                self._drain()
                raise

    def dump(self, message: Message) -> list[bytes]:
        """The bodies of all answers, from their netfilter headers on. KernelError as `send`, and
        with the call `dump` if it is refused or longer than DUMP_MAX_BYTES."""
        with self._lock:
            sequence = self._take_sequences(1)
            kind, body, flags = message
            flags |= NLM_F_REQUEST | NLM_F_DUMP
            try:
                transmit(self._socket, HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body)
                return self._parts(sequence)
            except KernelError:
                self._drain()
                raise

    def _refusals(self, first: int, count: int) -> dict[int, Refusal]:
        outcomes = self._outcomes(first, count)
        return {place: refused for place, answer in outcomes if (refused := refusal(answer))}

    def _parts(self, sequence: int) -> list[bytes]:
        parts: list[bytes] = []
        size = 0
        while True:
            for answer in answers(receive(self._socket, self._buffer)):
                if answer.sequence != sequence:
                    continue
                if answer.kind in (NLMSG_DONE, NLMSG_ERROR):
                    refused = refusal(answer)
                    if refused is not None:
                        raise KernelError("dump", "NETLINK_NETFILTER", refused.errno)
                    if size > DUMP_MAX_BYTES:
                        raise KernelError("dump", "NETLINK_NETFILTER", errno.EOVERFLOW)
                    return parts
                # Beyond the bound it is read to its end all the same: the next one would be EBUSY.
                size += len(answer.body)
                if size <= DUMP_MAX_BYTES:
                    parts.append(answer.body)

    def _drain(self) -> None:
        """A full buffer would have no room for the next answers."""
        while True:
            try:
                receive(self._socket, self._buffer)
            except KernelError as error:
                if error.errno not in (errno.ENOBUFS, errno.EBADMSG):
                    return


def open_socket(
    protocol: int = NETLINK_NETFILTER, options: Iterable[int] = (NETLINK_CAP_ACK,)
) -> socket.socket:
    """Bound, not blocking, and without the request in the acknowledgements."""
    try:
        opened = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            protocol,
        )
    except OSError as error:
        raise _failed("socket", protocol, error) from error
    try:
        for option in options:
            opened.setsockopt(SOL_NETLINK, option, 1)
        opened.bind((0, 0))
    except OSError as error:
        opened.close()
        raise _failed("bind", protocol, error) from error
    return opened


def transmit(opened: socket.socket, datagram: bytes) -> None:
    """To the kernel, which has carried it out when this returns."""
    try:
        opened.send(datagram)
    except OSError as error:
        raise _failed("send", opened.proto, error) from error


def receive(opened: socket.socket, buffer: bytearray) -> bytes:
    """The next datagram of the kernel; KernelError with EAGAIN if there is none, with ENOBUFS if
    some were lost since the last call, with EBADMSG if it is longer than `buffer`."""
    while True:
        try:
            # With MSG_TRUNC the length is that of the datagram, however little of it was copied.
            size, (port, _) = opened.recvfrom_into(buffer, 0, socket.MSG_TRUNC)
        except OSError as error:
            raise _failed("recv", opened.proto, error) from error
        if port != 0:
            continue  # of a process: whoever has CAP_NET_ADMIN here may send to a socket
        if size > len(buffer):
            raise malformed(f"datagram of {size} bytes", opened.proto)
        return bytes(memoryview(buffer)[:size])


def _failed(call: str, protocol: int, error: OSError) -> KernelError:
    return KernelError(call, PROTOCOLS[protocol], error.errno or errno.EIO)


def subscribe(opened: socket.socket, groups: Iterable[int], buffer_bytes: int) -> None:
    """Have what is sent to these groups, of which `buffer_bytes` wait at most."""
    try:
        # The kernel doubles it, because it counts its own share.
        opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes // 2)
        for group in groups:
            opened.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except OSError as error:
        raise _failed("setsockopt", opened.proto, error) from error


def drops(opened: socket.socket) -> int:
    """Datagrams that found no room, since it was opened; modulo 2**32."""
    try:
        info = opened.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * (SK_MEMINFO_DROPS + 1))
    except OSError as error:
        raise KernelError("getsockopt", "SO_MEMINFO", error.errno or errno.EIO) from error
    if len(info) <= 4 * SK_MEMINFO_DROPS:
        raise KernelError("getsockopt", "SO_MEMINFO", errno.EOPNOTSUPP)
    return int(NATIVE.unpack_from(info, 4 * SK_MEMINFO_DROPS)[0])
