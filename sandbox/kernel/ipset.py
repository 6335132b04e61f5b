"""Address sets of one network namespace: what rules match instead of single addresses.

A set is data, and equality decides whether the kernel must be touched. Sets come and go as rarely
as rules; what comes and goes with every task are members. So there are two doors. `AddressSets`
makes, replaces, lists and destroys sets through pyroute2, in a thread's own namespace. `Membership`
changes members of sets that are there: all that the join of a task needs is one datagram, whose
bytes (`messages`) are a pure function of the changes. Measured by `scripts/bench sets`.

The messages are those of linux/netfilter/ipset/ip_set.h: attributes in network order say so in
their type. Without NLM_F_EXCL, adding a member that is there changes its mark, and deleting one
that is not there is no error.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

from pyroute2 import IPSet
from pyroute2.netlink.exceptions import NetlinkError

from sandbox.errors import KernelError
from sandbox.kernel import nfnetlink
from sandbox.kernel.closing import Closing
from sandbox.kernel.netfilter import Family
from sandbox.kernel.nfnetlink import (
    BATCH_MAX,
    HEADER,
    NATIVE,
    NFGEN,
    NFNL_SUBSYS_IPSET,
    NLA_F_NET_BYTEORDER,
    Message,
    Nfnetlink,
    Refusal,
    attribute,
    message_type,
    nested,
)

SET_NAME_MAX_BYTES = 31
PLAIN_NAME = re.compile(r"[!-~]{1,31}")
"""The kernel takes any bytes; iptables takes these."""
WHOLE_MARK = 0xFFFFFFFF

FILL_MAX = 1000
"""Members of one message; each takes up to 48 bytes, and an attribute at most 65535."""

# linux/netfilter/ipset/ip_set.h
PROTOCOL = 6
"""Of ADD and DEL; understood by every kernel since 2.6.39."""
CMD_ADD = 9
CMD_DEL = 10
ATTR_PROTOCOL = 1
ATTR_SETNAME = 2
ATTR_DATA = 7
ATTR_ADT = 8
ATTR_LINENO = 9
"""In the host's order."""
ATTR_IP = 1
ATTR_CIDR = 3
ATTR_SKBMARK = 27
ATTR_IPADDR_IPV4 = 1
ATTR_IPADDR_IPV6 = 2
LIST_NAMES = 2

FIRST_PRIVATE_ERROR = 4096
IN_USE = 4100
PRIVATE_ERRORS = {
    4097: "protocol error, or not an address of the set's family",
    4104: "invalid prefix length",
    4114: "set has no marks",
    4352: "set is full",
    4353: "not an address that can be a member",
}
"""Those of enum ipset_errno that a change of a member can give, and the first two of those that
linux/netfilter/ipset/ip_set_hash.h adds."""


@dataclass(frozen=True, slots=True)
class Member:
    address: str
    """An address, or in a hash:net a network, in its usual short form."""
    mark: int | None = None
    """What `-j SET --map-mark` writes to the packet: needs a set `with_marks`."""
    mark_mask: int = WHOLE_MARK
    """Which bits of the packet's mark it replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSet:
    name: str
    type: Literal["hash:ip", "hash:net"] = "hash:ip"
    family: Family = "inet"
    with_marks: bool = False
    max_members: int = 65536
    members: frozenset[Member] = frozenset()


class Change(NamedTuple):
    """One member comes to a set or leaves it."""

    verb: Literal["add", "delete"]
    set_name: str
    member: Member


# Messages --------------------------------------------------------------------------------------

ADD = message_type(NFNL_SUBSYS_IPSET, CMD_ADD)
DELETE = message_type(NFNL_SUBSYS_IPSET, CMD_DEL)
KINDS = {"add": ADD, "delete": DELETE}
CALLS = {ADD: "IPSET_CMD_ADD", DELETE: "IPSET_CMD_DEL"}

PREAMBLE = NFGEN.pack(socket.AF_INET, 0, 0) + attribute(ATTR_PROTOCOL, bytes([PROTOCOL]))
"""The family is a part of the set; this one is not looked at."""

# Laid out once: an address is in every element.
IPV4_START = nested(ATTR_IP, attribute(ATTR_IPADDR_IPV4 | NLA_F_NET_BYTEORDER, bytes(4)))[:-4]
IPV6_START = nested(ATTR_IP, attribute(ATTR_IPADDR_IPV6 | NLA_F_NET_BYTEORDER, bytes(16)))[:-16]


def messages(changes: Iterable[Change]) -> list[Message]:
    """One message a change, in order. ValueError for what is no name of a set, no address and no
    mark."""
    return [
        Message(KINDS[verb], _named(set_name) + nested(ATTR_DATA, _element(member)))
        for verb, set_name, member in changes
    ]


def fill_messages(set_name: str, members: Iterable[Member]) -> Iterator[tuple[Message, list[str]]]:
    """Messages that add up to FILL_MAX members each, and whose addresses those are.

    The kernel stops such a message at the first member that it refuses.
    """
    start = _named(set_name) + attribute(ATTR_LINENO, NATIVE.pack(0))
    remaining = iter(members)
    while several := list(islice(remaining, FILL_MAX)):
        elements = (
            nested(ATTR_DATA, _element(member), attribute(ATTR_LINENO, NATIVE.pack(line)))
            for line, member in enumerate(several)
        )
        yield (
            Message(ADD, start + nested(ATTR_ADT, *elements)),
            [member.address for member in several],
        )


def _named(set_name: str) -> bytes:
    if not PLAIN_NAME.fullmatch(set_name):
        raise ValueError(f"not a name of a set: {set_name!r}")
    return PREAMBLE + attribute(ATTR_SETNAME, set_name.encode() + b"\0")


def _element(member: Member) -> bytes:
    address, slash, prefix_length = member.address.partition("/")
    parts = _address(address)
    if slash:
        parts += attribute(ATTR_CIDR, bytes([int(prefix_length)]))
    if member.mark is not None:
        if not 0 <= member.mark | member.mark_mask <= WHOLE_MARK or member.mark & ~member.mark_mask:
            raise ValueError(f"not a mark: {member.mark:#x}/{member.mark_mask:#x}")
        mark = member.mark << 32 | member.mark_mask
        parts += attribute(ATTR_SKBMARK | NLA_F_NET_BYTEORDER, mark.to_bytes(8, "big"))
    return parts


def _address(address: str) -> bytes:
    """The whole IPSET_ATTR_IP."""
    try:
        if ":" in address:
            return IPV6_START + socket.inet_pton(socket.AF_INET6, address)
        return IPV4_START + socket.inet_pton(socket.AF_INET, address)
    except OSError as error:
        raise ValueError(f"not an address: {address!r}") from error


def refused_line(refusal: Refusal) -> int:
    """Which member of a message of `fill_messages` was refused: the kernel echoes the message and
    writes it there. Beyond all of them if it was the message that was refused."""
    try:
        echoed = nfnetlink.attributes(refusal.echo[HEADER.size + NFGEN.size :])
    except KernelError:
        return FILL_MAX
    line = echoed.get(ATTR_LINENO, b"")
    return int(NATIVE.unpack(line)[0]) if len(line) == NATIVE.size else FILL_MAX


def described(call: str, subject: str, number: int) -> KernelError:
    """ipset has numbers of its own, for which there is a text but no errno."""
    if number < FIRST_PRIVATE_ERROR:
        return KernelError(call, subject, number)
    said = PRIVATE_ERRORS.get(number, f"ipset error {number}")
    return KernelError(call, f"{subject} ({said})", errno.EINVAL)


# Members ---------------------------------------------------------------------------------------


class Membership(Closing):
    """Changes of members in the network namespace that the calling thread is in now.

    Afterwards it may be used from any thread, and it never waits: as Nfnetlink.
    """

    def __init__(self) -> None:
        self._netfilter = Nfnetlink()

    def apply(self, changes: Sequence[Change]) -> None:
        """Make all changes in order, in one system call and one answer (up to BATCH_MAX of them).

        Repeating it changes nothing. A refused change does not keep those after it from being made;
        the error names the first one. ENOENT is a set that is not there.
        """
        prepared = messages(changes)
        refused: dict[int, Refusal] = {}
        for start in range(0, len(prepared), BATCH_MAX):
            answers = self._netfilter.send(prepared[start : start + BATCH_MAX])
            refused |= {start + place: refusal for place, refusal in answers.items()}
        if refused:
            raise _first_of(refused, changes)

    def fill(self, set_name: str, members: Iterable[Member]) -> None:
        """Add many members to one set. Up to FILL_MAX others may be missing after a refusal."""
        for message, addresses in fill_messages(set_name, members):
            for refusal in self._netfilter.send([message]).values():
                line = refused_line(refusal)
                address = f" {addresses[line]}" if line < len(addresses) else ""
                raise described("IPSET_CMD_ADD", f"{set_name}{address}", refusal.errno)

    def close(self) -> None:
        self._netfilter.close()


def _first_of(refused: dict[int, Refusal], changes: Sequence[Change]) -> KernelError:
    place = min(refused)
    change = changes[place]
    others = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    subject = f"{change.set_name} {change.member.address}{others}"
    return described(CALLS[KINDS[change.verb]], subject, refused[place].errno)


# Sets ------------------------------------------------------------------------------------------


class AddressSets(Closing):
    """An ipset socket of the namespace that this thread is in now; the thread's own, as Netlink."""

    def __init__(self) -> None:
        with _asking("socket", "NETLINK_NETFILTER"):
            self._ipset: Any = IPSet()
        try:
            self._membership = Membership()
        except KernelError:
            self._ipset.close()
            raise

    def put(self, wanted: AddressSet) -> None:
        """Create the set, or replace it in one step: rules see the old members or the new ones.

        An existing set keeps its type, family and marks: EINVAL if `wanted` has others.
        """
        if self._create(wanted, wanted.name):
            self._membership.fill(wanted.name, wanted.members)
        else:
            self._replace(wanted)

    def add(self, to: AddressSet, member: Member) -> None:
        """A member that is there takes the new mark."""
        self._membership.apply([Change("add", to.name, member)])

    def delete(self, where: AddressSet, member: Member) -> None:
        """Nothing to do if it is not there."""
        self._membership.apply([Change("delete", where.name, member)])

    def members(self, name: str) -> frozenset[Member]:
        with _asking("IPSET_CMD_LIST", name):
            answers = list(self._ipset.list(name))
        return frozenset(member for answer in answers for member in _members(answer))

    def names(self) -> list[str]:
        with _asking("IPSET_CMD_LIST", "all sets"):
            answers = list(self._ipset.list(flags=LIST_NAMES))
        return sorted(answer.get_attr("IPSET_ATTR_SETNAME") for answer in answers)

    def destroy(self, name: str) -> None:
        """EBUSY while a rule names it. Nothing to do if it is gone."""
        try:
            with _asking("IPSET_CMD_DESTROY", name):
                self._ipset.destroy(name)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        self._membership.close()
        self._ipset.close()

    def _replace(self, wanted: AddressSet) -> None:
        beside = f"{wanted.name[: SET_NAME_MAX_BYTES - 1]}~"
        self.destroy(beside)  # what an earlier attempt left
        self._create(wanted, beside)
        try:
            self._membership.fill(beside, wanted.members)
            with _asking("IPSET_CMD_SWAP", wanted.name):
                self._ipset.swap(beside, wanted.name)
        finally:
            self.destroy(beside)

    def _create(self, wanted: AddressSet, name: str) -> bool:
        """False when a set of that name exists."""
        try:
            with _asking("IPSET_CMD_CREATE", name):
                self._ipset.create(
                    name,
                    stype=wanted.type,
                    family=_address_family(wanted.family),
                    maxelem=wanted.max_members,
                    skbinfo=wanted.with_marks,
                )
        except KernelError as error:
            if error.errno == errno.EEXIST:
                return False
            raise
        return True


def _members(answer: Any) -> Iterator[Member]:
    """The members in one part of a listing; a long set comes in several."""
    entries = answer.get_attr("IPSET_ATTR_ADT")
    for entry in entries.get_attrs("IPSET_ATTR_DATA") if entries else ():
        start = entry.get_attr("IPSET_ATTR_IP_FROM")
        address = start.get_attr("IPSET_ATTR_IPADDR_IPV4") or start.get_attr(
            "IPSET_ATTR_IPADDR_IPV6"
        )
        prefix_length = entry.get_attr("IPSET_ATTR_CIDR")
        mark = entry.get_attr("IPSET_ATTR_SKBMARK")
        yield Member(
            address if prefix_length is None else f"{address}/{prefix_length}",
            *(() if mark is None else mark),
        )


def _address_family(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family == "inet" else socket.AF_INET6


@contextmanager
def _asking(message: str, subject: str) -> Iterator[None]:
    """Turn the kernel's refusal of a message into KernelError."""
    try:
        yield
    except NetlinkError as error:
        if error.code < FIRST_PRIVATE_ERROR:
            raise KernelError(message, subject, error.code) from error
        if error.code == IN_USE:
            raise KernelError(message, subject, errno.EBUSY) from error
        # pyroute2 knows for which of ipset's own numbers a message can be refused, and why.
        said = error.args[1] if len(error.args) > 1 else f"ipset error {error.code}"
        raise KernelError(message, f"{subject} ({said})", errno.EINVAL) from error
    except OSError as error:
        raise KernelError(message, subject, error.errno or errno.EINVAL) from error
