"""Messages for links, addresses, routes and neighbours, prepared as bytes and sent many at a time.

What every task needs goes this way: an interface joins its VPC by two `send`s, one in each
namespace. Encoding is pure and takes microseconds (rtnetlink(7); linux/rtnetlink.h, if_link.h,
if_addr.h, neighbour.h), where pyroute2 takes half a millisecond a message, nearly all of it in
Python. `kernel.netlink` is pyroute2 and stays for what is rare.

All messages but `veth` put something where nothing or its predecessor was (NLM_F_CREATE and
NLM_F_REPLACE), so sending them again does nothing.

The kernel carries a message out while it is being sent: when `send` of the socket returns, all of
a batch is done and the answers lie in the socket. So only the last message asks for an
acknowledgement; a refusal is answered in any case. Nothing here waits for anything but the kernel's
own lock (RTNL), which may take long while namespaces are torn down: never call `Rtnetlink.send` in
the event loop.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import threading
from collections.abc import Container, Iterator, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import NamedTuple

from sandbox.errors import KernelError
from sandbox.kernel.closing import Closing
from sandbox.kernel.nfnetlink import (
    ATTRIBUTE,
    BATCH_MAX,
    ERROR,
    HEADER,
    NETLINK_CAP_ACK,
    NLA_TYPE_MASK,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    SEQUENCE_LIMIT,
    SOL_NETLINK,
    attribute,
    nested,
)

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

LOOPBACK_INDEX = 1

# linux/netlink.h
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1
NETLINK_EXT_ACK = 11

# linux/rtnetlink.h
RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_NEWNEIGH = 28
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTN_UNSPEC = 0
RTN_UNICAST = 1
RTN_BLACKHOLE = 6
RTNH_F_ONLINK = 4
RTPROT_STATIC = 4
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RT_SCOPE_NOWHERE = 255
RT_TABLE_MAIN = 254

# linux/if.h, linux/if_link.h, linux/veth.h
IFF_UP = 0x1
SIOCGIFINDEX = 0x8933
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_LINKINFO = 18
IFLA_NET_NS_FD = 28
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1

# linux/if_addr.h
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x02
IFA_F_NOPREFIXROUTE = 0x200

# linux/neighbour.h
NDA_DST = 1
NDA_LLADDR = 2
NUD_PERMANENT = 0x80

LINK = struct.Struct("=BxHiII")
"""Family, device type, index, flags, mask of the flags that are meant."""
ADDRESS = struct.Struct("=BBBBI")
"""Family, prefix length, flags, scope, index."""
ROUTE = struct.Struct("=BBBBBBBBI")
"""Family, destination's and source's prefix length, TOS, table, protocol, scope, type, flags."""
NEIGHBOUR = struct.Struct("=BxxxiHBB")
"""Family, index, state, flags, type."""
IFREQ = struct.Struct("=16si20x")
"""linux/if.h: struct ifreq with an index."""
U32 = struct.Struct("=I")

PUT = NLM_F_CREATE | NLM_F_REPLACE
NEW = NLM_F_CREATE | NLM_F_EXCL

NAME_MAX_BYTES = 15
"""IFNAMSIZ less its NUL."""

DATAGRAM_MAX_BYTES = 1 << 15


class Message(NamedTuple):
    """One request, without what is only known when it is sent."""

    call: str
    """With `subject` what an error is about: RTM_NEWADDR, "10.0.0.5/20 on link 2"."""
    subject: str
    kind: int
    flags: int
    body: bytes


class VethEnd(NamedTuple):
    name: str
    mac: str


# Links -----------------------------------------------------------------------------------------


def veth(
    near: VethEnd, far: VethEnd, *, far_netns_fd: int, mtu: int, is_up: bool = True
) -> Message:
    """A pair: `near` in the socket's namespace, `far` made in the one behind the descriptor. Moving
    it there later would wait for a grace period. EEXIST if one of the names is taken.

    `is_up` is of `near`; `far` is down, for it cannot be up before it knows its peer (ENOTCONN).
    """
    peer = _link(0, False) + _end(far, mtu) + attribute(IFLA_NET_NS_FD, U32.pack(far_netns_fd))
    information = nested(
        IFLA_LINKINFO,
        attribute(IFLA_INFO_KIND, b"veth"),
        nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer)),
    )
    body = _link(0, is_up) + _end(near, mtu) + information
    return Message("RTM_NEWLINK", f"veth {near.name}", RTM_NEWLINK, NEW, body)


def link_up(index: int) -> Message:
    return Message("RTM_NEWLINK", f"link {index} up", RTM_NEWLINK, 0, _link(index, True))


def notice(index: int) -> Message:
    """Have the kernel see now that both ends of a pair are up. It does so in the background, and
    until then the end that was up first drops what it should send, and IPv6 waits on both.

    Since Linux 6.8 ("net: core: synchronize link-watch when carrier is queried"); before, it asks
    for the link's state, which is harmless, and the moment remains.
    """
    return Message("RTM_GETLINK", f"link {index}", RTM_GETLINK, 0, _link(index, False))


def delete_link(name: str) -> Message:
    """With its peer; ENODEV if there is none. Waits for a grace period, 16 ms: not for every task,
    whose links go with its namespace."""
    body = _link(0, False) + attribute(IFLA_IFNAME, _name(name))
    return Message("RTM_DELLINK", name, RTM_DELLINK, 0, body)


def _link(index: int, is_up: bool) -> bytes:
    flags = IFF_UP if is_up else 0
    return LINK.pack(socket.AF_UNSPEC, 0, index, flags, flags)


def _end(end: VethEnd, mtu: int) -> bytes:
    return b"".join(
        (
            attribute(IFLA_IFNAME, _name(end.name)),
            attribute(IFLA_ADDRESS, _mac(end.mac)),
            attribute(IFLA_MTU, U32.pack(mtu)),
        )
    )


def _name(name: str) -> bytes:
    encoded = name.encode()
    if not 0 < len(encoded) <= NAME_MAX_BYTES or b"\0" in encoded:
        raise ValueError(f"not the name of a link: {name!r}")
    return encoded + b"\0"


def _mac(text: str) -> bytes:
    octets = bytes.fromhex(text.replace(":", ""))
    if len(octets) != 6:
        raise ValueError(f"not a MAC address: {text!r}")
    return octets


# Addresses and neighbours ----------------------------------------------------------------------


def address(index: int, interface: Interface) -> Message:
    """Without the route to the prefix that the kernel adds otherwise, and usable at once: of IPv6
    without duplicate address detection, as soon as a worker of the kernel has seen it."""
    ip = interface.ip
    flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if ip.version == 6 else 0)
    body = (
        ADDRESS.pack(_family(ip), interface.network.prefixlen, 0, RT_SCOPE_UNIVERSE, index)
        + attribute(IFA_LOCAL, ip.packed)
        + attribute(IFA_ADDRESS, ip.packed)
        + attribute(IFA_FLAGS, U32.pack(flags))
    )
    return Message("RTM_NEWADDR", f"{interface} on link {index}", RTM_NEWADDR, PUT, body)


def neighbour(index: int, ip: Address, mac: str) -> Message:
    """Permanent: never asked for, never forgotten or overwritten, and it counts towards no limit
    (gc_thresh3 is one for all namespaces of a host)."""
    body = (
        NEIGHBOUR.pack(_family(ip), index, NUD_PERMANENT, 0, 0)
        + attribute(NDA_DST, ip.packed)
        + attribute(NDA_LLADDR, _mac(mac))
    )
    return Message("RTM_NEWNEIGH", f"{ip} on link {index}", RTM_NEWNEIGH, PUT, body)


# Routes ----------------------------------------------------------------------------------------


def link_route(destination: Network, index: int) -> Message:
    """`destination` is reached directly through the link; whatever link it was before."""
    head = _route(destination, RT_SCOPE_LINK, RTN_UNICAST)
    body = head + attribute(RTA_OIF, U32.pack(index))
    return Message("RTM_NEWROUTE", f"{destination} on link {index}", RTM_NEWROUTE, PUT, body)


def gateway_route(
    destination: Network, gateway: Address, index: int, *, is_onlink: bool = False
) -> Message:
    """With `is_onlink` the gateway need not be in a network of the link: it is a neighbour there,
    and that is all there is to it."""
    flags = RTNH_F_ONLINK if is_onlink else 0
    body = (
        _route(destination, RT_SCOPE_UNIVERSE, RTN_UNICAST, flags)
        + attribute(RTA_GATEWAY, gateway.packed)
        + attribute(RTA_OIF, U32.pack(index))
    )
    return Message("RTM_NEWROUTE", f"{destination} via {gateway}", RTM_NEWROUTE, PUT, body)


def blackhole(destination: Network) -> Message:
    """What no longer prefix matches in `destination` is dropped."""
    body = _route(destination, RT_SCOPE_UNIVERSE, RTN_BLACKHOLE)
    return Message("RTM_NEWROUTE", f"blackhole {destination}", RTM_NEWROUTE, PUT, body)


def delete_route(destination: Network, index: int | None = None) -> Message:
    """Only if it leads through link `index`, when that is given. ESRCH if there is none such."""
    body = _route(destination, RT_SCOPE_NOWHERE, RTN_UNSPEC)
    if index is not None:
        body += attribute(RTA_OIF, U32.pack(index))
    return Message("RTM_DELROUTE", f"{destination}", RTM_DELROUTE, 0, body)


def _route(destination: Network, scope: int, kind: int, flags: int = 0) -> bytes:
    first = destination.network_address
    head = ROUTE.pack(
        _family(first),
        destination.prefixlen,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC if kind else 0,
        scope,
        kind,
        flags,
    )
    return head + attribute(RTA_DST, first.packed) if destination.prefixlen else head


def _family(ip: Address) -> int:
    return socket.AF_INET if ip.version == 4 else socket.AF_INET6


# Framing ---------------------------------------------------------------------------------------


def batch(messages: Sequence[Message], first_sequence: int) -> bytes:
    """One datagram: the messages in order, numbered from `first_sequence`; the last one is
    acknowledged."""
    last = len(messages) - 1
    parts = []
    for place, message in enumerate(messages):
        flags = message.flags | NLM_F_REQUEST | (NLM_F_ACK if place == last else 0)
        length = HEADER.size + len(message.body)
        parts.append(HEADER.pack(length, message.kind, flags, first_sequence + place, 0))
        parts.append(message.body)
    return b"".join(parts)


class Answer(NamedTuple):
    sequence: int
    errno: int
    """0 acknowledges."""
    text: str
    """What the kernel says beside the number, or nothing."""


def answers(datagram: bytes) -> Iterator[Answer]:
    """All errors and acknowledgements. KernelError (EBADMSG) where bytes are missing."""
    at, end = 0, len(datagram)
    while at < end:
        if end - at < HEADER.size:
            raise _malformed(f"{end - at} bytes after the last message")
        length, kind, flags, sequence, _ = HEADER.unpack_from(datagram, at)
        if not HEADER.size <= length <= end - at:
            raise _malformed(f"message of {length} bytes in {end - at}")
        if kind == NLMSG_ERROR:
            yield _answer(sequence, flags, datagram[at + HEADER.size : at + length])
        at += (length + 3) & ~3


def _answer(sequence: int, flags: int, body: bytes) -> Answer:
    if len(body) < ERROR.size + HEADER.size:
        raise _malformed(f"error of {len(body)} bytes")
    (code,) = ERROR.unpack_from(body)
    text = ""
    if flags & NLM_F_ACK_TLVS:
        echo = HEADER.size if flags & NLM_F_CAPPED else _echo_size(body)
        text = _explanation(body[ERROR.size + echo :])
    return Answer(sequence, -code, text)


def _echo_size(body: bytes) -> int:
    length: int = HEADER.unpack_from(body, ERROR.size)[0]
    return (length + 3) & ~3


def _explanation(data: bytes) -> str:
    at = 0
    while len(data) - at >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if not ATTRIBUTE.size <= length <= len(data) - at:
            raise _malformed(f"attribute of {length} bytes in {len(data) - at}")
        if kind & NLA_TYPE_MASK == NLMSGERR_ATTR_MSG:
            return data[at + ATTRIBUTE.size : at + length].rstrip(b"\0").decode(errors="replace")
        at += (length + 3) & ~3
    return ""


def _malformed(what: str) -> KernelError:
    return KernelError("recv", f"NETLINK_ROUTE ({what})", errno.EBADMSG)


# The socket ------------------------------------------------------------------------------------


class Rtnetlink(Closing):
    """A route socket of the network namespace that the calling thread is in now.

    It stays of that namespace, and holds it. Any thread may use it; two at once take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_sequence = 1
        self._socket = _open()

    def send(self, messages: Sequence[Message], *, allowing: Container[int] = ()) -> None:
        """Have up to BATCH_MAX messages carried out, in one system call and in order.

        KernelError is the first refusal, with the message that was refused; those after it were
        carried out all the same. A number in `allowing` is no refusal. If the answers make no
        sense it is not known which were carried out: send again, it does no harm.
        """
        if not messages:
            return
        if len(messages) > BATCH_MAX:
            raise ValueError(f"{len(messages)} messages at once")
        with self._lock:
            refused = self._exchange(messages)
        for place in sorted(refused):
            answer, message = refused[place], messages[place]
            if answer.errno not in allowing:
                said = f" ({answer.text})" if answer.text else ""
                raise KernelError(message.call, message.subject + said, answer.errno)

    def index(self, name: str) -> int | None:
        """Of a link in this namespace, without entering it and without the kernel's lock; None if
        there is none (netdevice(7))."""
        request = IFREQ.pack(_name(name), 0)
        try:
            answer = fcntl.ioctl(self._socket, SIOCGIFINDEX, request)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise KernelError("SIOCGIFINDEX", name, error.errno or errno.EIO) from error
        except ValueError as error:  # the socket is closed
            raise KernelError("SIOCGIFINDEX", name, errno.EBADF) from error
        found: int = IFREQ.unpack(answer)[1]
        return found

    def close(self) -> None:
        """Idempotent. Not while another thread sends."""
        self._socket.close()

    def _exchange(self, messages: Sequence[Message]) -> dict[int, Answer]:
        first = self._take_sequences(len(messages))
        try:
            self._socket.send(batch(messages, first))
        except OSError as error:
            raise KernelError("send", "NETLINK_ROUTE", error.errno or errno.EIO) from error
        return self._refusals(first, len(messages))

    def _take_sequences(self, count: int) -> int:
        """Never one of an earlier request, an answer to which may still be in the socket."""
        if self._next_sequence + count > SEQUENCE_LIMIT:
            self._next_sequence = 1
        first = self._next_sequence
        self._next_sequence += count
        return first

    def _refusals(self, first: int, count: int) -> dict[int, Answer]:
        """By place in the batch."""
        found = {}
        while True:
            for answer in answers(self._receive()):
                if not first <= answer.sequence < first + count:
                    continue
                if answer.errno:
                    found[answer.sequence - first] = answer
                if answer.sequence == first + count - 1:
                    return found

    def _receive(self) -> bytes:
        """The next datagram of the kernel; all there will be is there, so EAGAIN is an error."""
        while True:
            try:
                data, (port, _) = self._socket.recvfrom(DATAGRAM_MAX_BYTES)
            except OSError as error:
                raise KernelError("recv", "NETLINK_ROUTE", error.errno or errno.EIO) from error
            if port == 0:  # not of a process: whoever has CAP_NET_ADMIN here may send to a socket
                return data


def _open() -> socket.socket:
    """Bound, not blocking; answers without the request, with the kernel's words."""
    try:
        opened = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
    except OSError as error:
        raise KernelError("socket", "NETLINK_ROUTE", error.errno or errno.EIO) from error
    try:
        opened.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        opened.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        opened.bind((0, 0))
    except OSError as error:
        opened.close()
        raise KernelError("bind", "NETLINK_ROUTE", error.errno or errno.EIO) from error
    return opened
