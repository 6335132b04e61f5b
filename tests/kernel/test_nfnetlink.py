"""A netfilter socket that is lied to, one that overflows, and what is refused."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from sandbox.errors import KernelError
from sandbox.kernel.flows import flush_mark_message, get_message
from sandbox.kernel.ipset import Change, Member, messages
from sandbox.kernel.nfnetlink import (
    BATCH_MAX,
    DATAGRAM_MAX_BYTES,
    ERROR,
    HEADER,
    NLMSG_ERROR,
    Message,
    Nfnetlink,
    answers,
    batch,
    message_type,
    open_socket,
    receive,
    refusal,
)
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

REFUSED = messages([Change("add", "missing", Member("10.0.0.1"))])


@pytest.fixture
def netfilter(inside: KernelThread) -> Iterator[Nfnetlink]:
    with inside.call(Nfnetlink) as opened:
        yield opened


@pytest.fixture
def opened(inside: KernelThread) -> Iterator[socket.socket]:
    with inside.call(open_socket) as bare:
        yield bare


def test_nothing_to_read_is_no_waiting(opened: socket.socket) -> None:
    with pytest.raises(KernelError) as caught:
        receive(opened, bytearray(DATAGRAM_MAX_BYTES))
    assert caught.value.errno == errno.EAGAIN


def test_a_message_of_a_process_is_not_taken_for_the_kernels(
    inside: KernelThread, opened: socket.socket
) -> None:
    forged = HEADER.pack(20, NLMSG_ERROR, 0, 1, 0) + ERROR.pack(0)
    with inside.call(open_socket) as forger:
        forger.sendto(forged, (opened.getsockname()[0], 0))
    opened.send(batch(REFUSED, 1))
    [answer] = answers(receive(opened, bytearray(DATAGRAM_MAX_BYTES)))
    refused = refusal(answer)
    assert refused is not None
    assert refused.errno == errno.ENOENT


def test_a_datagram_that_is_too_long_is_an_error_and_gone(opened: socket.socket) -> None:
    opened.send(batch(REFUSED, 1))
    with pytest.raises(KernelError, match="datagram of") as caught:
        receive(opened, bytearray(8))
    assert caught.value.errno == errno.EBADMSG
    with pytest.raises(KernelError) as caught:
        receive(opened, bytearray(8))
    assert caught.value.errno == errno.EAGAIN


def test_lost_answers_are_an_error_and_the_socket_is_usable_after_it(netfilter: Nfnetlink) -> None:
    netfilter._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is
    with pytest.raises(KernelError) as caught:
        netfilter.send(REFUSED * BATCH_MAX)
    assert caught.value.errno == errno.ENOBUFS
    assert {place: each.errno for place, each in netfilter.send(REFUSED).items()} == {
        0: errno.ENOENT
    }


def test_every_refusal_of_a_batch_is_known_by_its_place(netfilter: Nfnetlink) -> None:
    unknown = Message(message_type(6, 200), REFUSED[0].body)
    refused = netfilter.send([REFUSED[0], flush_mark_message(1, 1), unknown, REFUSED[0]])
    assert {place: each.errno for place, each in refused.items()} == {
        0: errno.ENOENT,
        2: errno.EINVAL,
        3: errno.ENOENT,
    }


def test_a_refused_dump_says_why(netfilter: Nfnetlink) -> None:
    with pytest.raises(KernelError, match="dump") as caught:
        netfilter.dump(Message(message_type(1, 200), get_message(0, 0).body))
    assert caught.value.errno == errno.EINVAL
    assert netfilter.dump(get_message(0, 0)) == []


def test_a_batch_is_bounded_and_may_be_empty(netfilter: Nfnetlink) -> None:
    assert netfilter.send([]) == {}
    with pytest.raises(ValueError, match="in one batch"):
        netfilter.send(REFUSED * (BATCH_MAX + 1))


def test_numbers_begin_again_before_they_overflow(netfilter: Nfnetlink) -> None:
    netfilter._next_sequence = (1 << 32) - 2
    for _ in range(4):
        refused = netfilter.send(REFUSED * 2)
        assert [each.errno for each in refused.values()] == [errno.ENOENT] * 2
