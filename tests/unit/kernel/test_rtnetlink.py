"""Route messages as bytes: read by pyroute2, and what may come back read by us."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from sandbox.errors import KernelError
from sandbox.kernel import nfnetlink, rtnetlink
from sandbox.kernel.rtnetlink import Message, VethEnd


def read(message: Message) -> Any:
    """As pyroute2 reads it."""
    [answer] = MarshalRtnl().parse(rtnetlink.batch([message], 1))
    return answer


def test_an_address_has_the_prefix_of_its_network_and_adds_no_route() -> None:
    read_back = read(rtnetlink.address(7, ip_interface("10.0.0.10/20")))
    assert (read_back["index"], read_back["prefixlen"]) == (7, 20)
    assert read_back.get_attr("IFA_LOCAL") == "10.0.0.10"
    assert read_back.get_attr("IFA_FLAGS") == 0x200
    six = read(rtnetlink.address(7, ip_interface("fd00::10/64")))
    assert six.get_attr("IFA_ADDRESS") == "fd00::10"
    assert six.get_attr("IFA_FLAGS") == 0x202


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            rtnetlink.link_route(ip_network("10.0.0.1/32"), 3),
            {"dst_len": 32, "scope": 253, "type": 1, "RTA_DST": "10.0.0.1", "RTA_OIF": 3},
        ),
        (
            rtnetlink.gateway_route(ip_network("0.0.0.0/0"), ip_address("10.0.0.1"), 3),
            {"dst_len": 0, "RTA_DST": None, "RTA_GATEWAY": "10.0.0.1", "RTA_OIF": 3, "flags": 0},
        ),
        (
            rtnetlink.gateway_route(
                ip_network("198.18.0.0/20"), ip_address("198.19.255.255"), 3, is_onlink=True
            ),
            {"dst_len": 20, "RTA_GATEWAY": "198.19.255.255", "flags": 4},
        ),
        (
            rtnetlink.blackhole(ip_network("10.0.0.0/16")),
            {"dst_len": 16, "type": 6, "RTA_DST": "10.0.0.0", "RTA_OIF": None},
        ),
        (
            rtnetlink.link_route(ip_network("fd00::5/128"), 3),
            {"family": 10, "dst_len": 128, "RTA_DST": "fd00::5"},
        ),
        (
            rtnetlink.delete_route(ip_network("10.0.0.5/32"), 3),
            {"dst_len": 32, "type": 0, "scope": 255, "RTA_OIF": 3},
        ),
        (
            rtnetlink.neighbour(3, ip_address("10.0.0.1"), "02:00:00:00:00:01"),
            {
                "ifindex": 3,
                "state": 0x80,
                "NDA_DST": "10.0.0.1",
                "NDA_LLADDR": "02:00:00:00:00:01",
            },
        ),
    ],
    ids=lambda value: value.subject if isinstance(value, Message) else "",
)
def test_a_message_says_to_others_what_it_is_called(
    message: Message, expected: dict[str, Any]
) -> None:
    answer = read(message)
    found = {
        name: answer.get_attr(name) if name.startswith(("RTA_", "NDA_")) else answer[name]
        for name in expected
    }
    assert found == expected


def test_a_pair_names_both_ends() -> None:
    near, far = VethEnd("sb0000", "02:00:00:00:00:01"), VethEnd("eth0", "0a:01:02:03:04:05")
    answer = read(rtnetlink.veth(near, far, far_netns_fd=9, mtu=9001))
    assert (answer.get_attr("IFLA_IFNAME"), answer.get_attr("IFLA_MTU")) == ("sb0000", 9001)
    assert (answer["flags"], answer["change"]) == (1, 1)
    peer = answer.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "VETH_INFO_PEER")
    assert (peer.get_attr("IFLA_IFNAME"), peer["flags"]) == ("eth0", 0)
    assert peer.get_attr("IFLA_ADDRESS") == far.mac


@pytest.mark.parametrize("name", ["", "a" * 16, "a\0b"])
def test_what_cannot_be_the_name_of_a_link_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a link"):
        rtnetlink.delete_link(name)


def test_only_the_last_message_of_a_batch_is_acknowledged() -> None:
    messages = [rtnetlink.link_up(1), rtnetlink.link_up(2), rtnetlink.link_up(3)]
    read_back = list(MarshalRtnl().parse(rtnetlink.batch(messages, 41)))
    assert [m["header"]["sequence_number"] for m in read_back] == [41, 42, 43]
    assert [m["header"]["flags"] & nfnetlink.NLM_F_ACK for m in read_back] == [0, 0, 4]


def answers(datagram: bytes) -> list[rtnetlink.Answer]:
    return [
        rtnetlink.read(answer)
        for answer in nfnetlink.answers(datagram, socket.NETLINK_ROUTE)
        if answer.kind == nfnetlink.NLMSG_ERROR
    ]


def refused(sequence: int, code: int, text: bytes) -> bytes:
    body = struct.pack("=i", -code) + nfnetlink.HEADER.pack(20, 24, 5, sequence, 0)
    body += nfnetlink.attribute(rtnetlink.NLMSGERR_ATTR_MSG, text)
    flags = rtnetlink.NLM_F_CAPPED | rtnetlink.NLM_F_ACK_TLVS
    return nfnetlink.HEADER.pack(16 + len(body), nfnetlink.NLMSG_ERROR, flags, sequence, 0) + body


def test_a_refusal_has_the_kernels_own_words() -> None:
    [answer] = answers(refused(3, errno.ENETUNREACH, b"Nexthop has invalid gateway\0"))
    assert answer == (3, errno.ENETUNREACH, "Nexthop has invalid gateway")


@given(st.binary(max_size=200), st.integers(0, 100), st.binary(max_size=8))
def test_any_bytes_are_answers_or_a_kernel_error(noise: bytes, at: int, other: bytes) -> None:
    good = refused(1, 1, b"no")
    for data in (noise, good[:at] + other + good[at + len(other) :], good[:at]):
        try:
            answers(data)
        except KernelError as error:
            assert error.errno == errno.EBADMSG
