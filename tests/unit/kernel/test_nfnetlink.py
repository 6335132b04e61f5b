"""Netfilter's messages as bytes, made and read."""

from __future__ import annotations

import errno
import struct

import pytest
from pyroute2.netlink.nfnetlink.ipset import ipset_msg

from sandbox.errors import KernelError
from sandbox.kernel.ipset import (
    FILL_MAX,
    Change,
    Member,
    fill_messages,
    messages,
    refused_line,
)
from sandbox.kernel.nfnetlink import (
    Message,
    Refusal,
    answers,
    attribute,
    attributes,
    batch,
    nested,
    number,
)

JOIN = [
    Change("add", "eni", Member("10.0.0.10", 0x2A, 0xFFFF)),
    Change("add", "g7", Member("10.0.0.10")),
]

JOIN_BYTES = bytes.fromhex(
    # netlink: 64 bytes, IPSET_CMD_ADD, NLM_F_REQUEST, sequence 5
    "40000000" "0906" "0100" "05000000" "00000000"
    "02000000"  # netfilter: AF_INET
    "05000100" "06000000"  # IPSET_ATTR_PROTOCOL 6
    "08000200" "656e6900"  # IPSET_ATTR_SETNAME "eni"
    "1c000780"  # IPSET_ATTR_DATA, nested
    "0c000180" "08000140" "0a00000a"  # IPSET_ATTR_IP { IPSET_ATTR_IPADDR_IPV4 10.0.0.10 }
    "0c001b40" "0000002a0000ffff"  # IPSET_ATTR_SKBMARK 0x2a/0xffff
    # netlink: 52 bytes, IPSET_CMD_ADD, NLM_F_REQUEST | NLM_F_ACK, sequence 6
    "34000000" "0906" "0500" "06000000" "00000000"
    "02000000"
    "05000100" "06000000"
    "07000200" "67370000"
    "10000780" "0c000180" "08000140" "0a00000a"
)  # fmt: skip


def test_a_join_is_these_bytes() -> None:
    assert batch(messages(JOIN), 5).hex(" ", 4) == JOIN_BYTES.hex(" ", 4)


def test_a_leave_differs_in_its_command_alone() -> None:
    leave = [change._replace(verb="delete") for change in JOIN]
    assert batch(messages(leave), 5) == JOIN_BYTES.replace(b"\x09\x06", b"\x0a\x06")


def decoded(message: Message) -> ipset_msg:
    found = ipset_msg(batch([message], 1))
    found.decode()
    return found


@pytest.mark.parametrize("address", ["10.0.0.10", "fd00::a", "10.1.0.0/16", "fd00::/64"])
@pytest.mark.parametrize("name", ["g", "g65535", "n" * 31])
def test_pyroute2_reads_the_set_the_address_and_the_prefix(address: str, name: str) -> None:
    [message] = messages([Change("add", name, Member(address))])
    found = decoded(message)
    assert found.get_attr("IPSET_ATTR_SETNAME") == name
    data = found.get_attr("IPSET_ATTR_DATA")
    version = "6" if ":" in address else "4"
    start = data.get_attr("IPSET_ATTR_IP_FROM").get_attr(f"IPSET_ATTR_IPADDR_IPV{version}")
    prefix_length = data.get_attr("IPSET_ATTR_CIDR")
    assert (start if prefix_length is None else f"{start}/{prefix_length}") == address


def test_a_filling_is_cut_into_messages_that_fit_into_an_attribute() -> None:
    members = [Member(f"fd00::{n:x}", n, 0xFFFF) for n in range(1, 2 * FILL_MAX + 2)]
    parts = list(fill_messages("n" * 31, members))
    assert [len(addresses) for _, addresses in parts] == [FILL_MAX, FILL_MAX, 1]
    for message, addresses in parts:
        elements = decoded(message).get_attr("IPSET_ATTR_ADT").get_attrs("IPSET_ATTR_DATA")
        starts = [element.get_attr("IPSET_ATTR_IP_FROM") for element in elements]
        assert [start.get_attr("IPSET_ATTR_IPADDR_IPV6") for start in starts] == addresses


@pytest.mark.parametrize(
    "change",
    [
        Change("add", "", Member("10.0.0.1")),
        Change("add", "n" * 32, Member("10.0.0.1")),
        Change("add", "é", Member("10.0.0.1")),
        Change("add", "a\0b", Member("10.0.0.1")),
        Change("add", "g", Member("")),
        Change("add", "g", Member("10.0.0")),
        Change("add", "g", Member("10.0.0.1\0")),
        Change("add", "g", Member("10.0.0.0/x")),
        Change("add", "g", Member("10.0.0.0/999")),
        Change("add", "g", Member("fd00::1::2")),
        Change("add", "g", Member("10.0.0.1", -1)),
        Change("add", "g", Member("10.0.0.1", 1 << 32)),
        Change("add", "g", Member("10.0.0.1", 0x10000, 0xFFFF)),
    ],
    ids=str,
)
def test_what_is_no_name_no_address_and_no_mark_is_not_sent(change: Change) -> None:
    with pytest.raises(ValueError):
        messages([change])


# Reading ---------------------------------------------------------------------------------------


def answer(body: bytes, length: int | None = None) -> bytes:
    size = 16 + len(body) if length is None else length
    return struct.pack("=IHHII", size, 2, 0, 1, 0) + body


def test_answers_follow_one_another_in_a_datagram() -> None:
    found = list(answers(answer(b"abc") + b"\0" + answer(b"defg")))
    assert [each.body for each in found] == [b"abc", b"defg"]


@pytest.mark.parametrize(
    "datagram",
    [
        answer(b"")[:15],
        answer(b"", length=15),
        answer(b"", length=0),
        answer(b"abcd", length=21),
        answer(b"", length=1 << 31),
        answer(b"") + b"\0" * 4,
    ],
)
def test_a_message_of_an_impossible_length_is_an_error(datagram: bytes) -> None:
    with pytest.raises(KernelError) as caught:
        list(answers(datagram))
    assert caught.value.errno == errno.EBADMSG


def test_attributes_are_read_without_their_flags_and_padding() -> None:
    data = nested(7, attribute(1, b"abcde"), attribute(2 | 0x4000, b""))
    assert attributes(attributes(data)[7]) == {1: b"abcde", 2: b""}
    assert attributes(b"") == {}


@pytest.mark.parametrize(
    "data",
    [
        b"\x03\x00\x01\x00",
        b"\x00\x00\x00\x00",
        b"\x09\x00\x01\x00abcd",
        b"\xff\xff\x01\x00abcd",
        b"\x04\x00\x01\x00ab",
    ],
)
def test_an_attribute_of_an_impossible_length_is_an_error(data: bytes) -> None:
    with pytest.raises(KernelError) as caught:
        attributes(data)
    assert caught.value.errno == errno.EBADMSG


def test_a_number_has_its_size_or_is_an_error() -> None:
    assert number({8: b"\x00\x00\x01\x02"}, 8, 4) == 0x102
    assert number({}, 8, 4) is None
    with pytest.raises(KernelError):
        number({8: b"\x01\x02"}, 8, 4)


@pytest.mark.parametrize("echo", [b"", b"\0" * 19, b"\0" * 20, b"\0" * 20 + b"\xff" * 8])
def test_an_echo_without_a_line_names_no_member(echo: bytes) -> None:
    assert refused_line(Refusal(4097, echo)) >= FILL_MAX
