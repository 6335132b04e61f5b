"""Messages and descriptors come out of the byte stream as they went in, however it was cut."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.varlink import frames
from sandbox.varlink.frames import Broken, Frame, Frames

bodies = st.lists(st.binary(max_size=40).map(lambda body: body.replace(b"\0", b"")), max_size=8)


@given(bodies, st.lists(st.integers(min_value=1, max_value=20), max_size=40))
def test_any_cut_of_the_stream_gives_the_same_messages(
    bodies: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(body + b"\0" for body in bodies)
    reader, found = Frames(), []
    for cut in [*cuts, len(stream)]:
        chunk, stream = stream[:cut], stream[cut:]
        found += reader.feed(chunk)
    found += reader.feed(stream)
    assert found == [Frame(body) for body in bodies]


@given(st.binary(max_size=300))
def test_hostile_bytes_never_make_more_than_they_are(data: bytes) -> None:
    assert len(Frames().feed(data)) == data.count(b"\0")


def test_a_message_beyond_the_bound_breaks_the_connection() -> None:
    reader = Frames(limit=10)
    assert reader.feed(b"0123456789") == []
    with pytest.raises(Broken):
        reader.feed(b"0")
    with pytest.raises(Broken):
        Frames(limit=10).feed(b"01234567890\0")


def test_descriptors_belong_to_the_last_message_that_their_chunk_began() -> None:
    assert Frames().feed(b"a\0b\0", [7]) == [Frame(b"a"), Frame(b"b", (7,))]
    reader = Frames()
    assert reader.feed(b"a\0b", [7]) == [Frame(b"a")]
    assert reader.feed(b"c\0d\0", [8]) == [Frame(b"bc", (7,)), Frame(b"d", (8,))]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        yield left, right


def receive(endpoint: socket.socket, reader: Frames, size: int = frames.CHUNK) -> list[Frame]:
    data, ancillary, flags, _ = endpoint.recvmsg(
        size, frames.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    return reader.feed(data, frames.received(ancillary, flags))


@pytest.mark.parametrize("size", [3, 8, frames.CHUNK])
def test_each_message_gets_its_own_descriptors_over_a_real_socket(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    left, right = pair
    pipes = [os.pipe() for _ in range(3)]
    messages = [
        (b"plain", []),
        (b"one", [pipes[0][1]]),
        (b"plain", []),
        (b"two", [pipes[1][1], pipes[2][1]]),
    ]
    for body, descriptors in messages:
        left.sendmsg([body + b"\0"], frames.rights(descriptors))
    left.close()
    reader, found = Frames(), list[Frame]()
    while len(found) < len(messages):
        found += receive(right, reader, size)
    assert [(frame.body, len(frame.descriptors)) for frame in found] == [
        (body, len(descriptors)) for body, descriptors in messages
    ]
    received = [descriptor for frame in found for descriptor in frame.descriptors]
    for number, descriptor in enumerate(received):
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, b"%d" % number)
        os.close(descriptor)
    for number, (read, write) in enumerate(pipes):
        os.close(write)
        assert os.read(read, 10) == b"%d" % number
        os.close(read)


def test_descriptors_of_a_message_that_never_ends_are_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    read, write = os.pipe()
    left.sendmsg([b"begun"], frames.rights([write]))
    os.close(write)
    reader = Frames()
    receive(right, reader)
    reader.close()
    assert os.read(read, 1) == b"", "the last writer of the pipe is gone"
    os.close(read)


def test_more_descriptors_than_the_bound_break_the_connection_and_leak_none(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    read, write = os.pipe()
    left.sendmsg([b"many\0"], frames.rights([write] * (frames.DESCRIPTOR_LIMIT + 1)))
    os.close(write)
    with pytest.raises(Broken):
        receive(right, Frames())
    assert os.read(read, 1) == b""
    os.close(read)
