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
from collections.abc import Container, Sequence
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
from sandbox.kernel import nfnetlink
from sandbox.kernel.nfnetlink import (
    ATTRIBUTE,
    BATCH_MAX,
    ERROR,
    HEADER,
    NETLINK_CAP_ACK,
    NLA_TYPE_MASK,
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
    """As `nfnetlink.batch`."""
    return nfnetlink.batch(
        [nfnetlink.Message(each.kind, each.body, each.flags) for each in messages], first_sequence
    )


class Answer(NamedTuple):
    sequence: int
    errno: int
    """0 acknowledges."""
    text: str
    """What the kernel says beside the number, or nothing."""


def read(answer: nfnetlink.Answer) -> Answer:
    """An error or an acknowledgement. KernelError (EBADMSG) where bytes are missing."""
    body = answer.body
    if len(body) < ERROR.size + HEADER.size:
        raise _malformed(f"error of {len(body)} bytes")
    (code,) = ERROR.unpack_from(body)
    text = ""
    if answer.flags & NLM_F_ACK_TLVS:
        echo = HEADER.size if answer.flags & NLM_F_CAPPED else _echo_size(body)
        text = _explanation(body[ERROR.size + echo :])
    return Answer(answer.sequence, -code, text)


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
    return nfnetlink.malformed(what, socket.NETLINK_ROUTE)


# The socket ------------------------------------------------------------------------------------


class Rtnetlink(nfnetlink.Requests):
    """A route socket; it holds its namespace. Answers are without the request, with the kernel's
    words."""

    def __init__(self) -> None:
        options = (NETLINK_CAP_ACK, NETLINK_EXT_ACK)
        super().__init__(nfnetlink.open_socket(socket.NETLINK_ROUTE, options))

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

    def _exchange(self, messages: Sequence[Message]) -> dict[int, Answer]:
        """Refusals by place in the batch. All there will be is there: EAGAIN is an error."""
        first = self._take_sequences(len(messages))
        nfnetlink.transmit(self._socket, batch(messages, first))
        outcomes = self._outcomes(first, len(messages))
        said = ((place, read(answer)) for place, answer in outcomes)
        return {place: answer for place, answer in said if answer.errno}
