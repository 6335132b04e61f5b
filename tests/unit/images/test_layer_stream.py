from __future__ import annotations

import contextlib
import gzip
import itertools
import random
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox.errors import ImageError
from sandbox.images import documents
from sandbox.images.layer_stream import PIECE_BYTES, Read, decoder

PLAIN, GZIP, ZSTD = documents.TAR_LAYER, documents.GZIP_LAYER, documents.ZSTD_LAYER


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


PACK: dict[str, Callable[[bytes], bytes]] = {PLAIN: bytes, GZIP: gzip.compress, ZSTD: zstd}


def reading(transfer: bytes, cuts: list[int]) -> Read:
    """The transfer in pieces that end at `cuts`."""
    places = [0, *sorted(cut % (len(transfer) + 1) for cut in cuts), len(transfer)]
    pieces = [transfer[a:b] for a, b in itertools.pairwise(places) if a < b]
    return lambda: pieces.pop(0) if pieces else b""


def unpacked(media_type: str, transfer: bytes, cuts: list[int] | None = None) -> bytes:
    return b"".join(decoder(media_type)(reading(transfer, cuts or [])))


def test_every_type_of_layer_that_a_manifest_may_name_can_be_read() -> None:
    for media_type in documents.LAYER_TYPES:
        decoder(media_type)


@pytest.mark.parametrize(
    "media_type", ["", PLAIN + "+bzip2", PLAIN.upper(), documents.CONFIG_TYPES[0]]
)
def test_other_types_are_refused_by_name(media_type: str) -> None:
    with pytest.raises(ImageError, match="unknown type of layer"):
        decoder(media_type)


@given(
    st.sampled_from([PLAIN, GZIP, ZSTD]),
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(st.integers(0, 5000), max_size=6),
)
def test_the_content_is_the_same_however_it_is_cut(
    media_type: str, parts: list[bytes], cuts: list[int]
) -> None:
    transfer = b"".join(PACK[media_type](part) for part in parts)
    assert unpacked(media_type, transfer, cuts) == b"".join(parts)


@given(st.sampled_from([GZIP, ZSTD]), st.binary(max_size=2000), st.integers(1, 2000))
@example(ZSTD, b"", 1)
def test_a_stream_that_is_cut_off_is_never_taken_for_whole(
    media_type: str, content: bytes, missing: int
) -> None:
    transfer = PACK[media_type](b"first") + PACK[media_type](content)
    kept = len(transfer) - 1 - missing % (len(PACK[media_type](content)) - 1)
    with pytest.raises(ImageError, match="stream is"):
        unpacked(media_type, transfer[:kept])


@given(st.sampled_from([GZIP, ZSTD]), st.data())
@settings(deadline=None)
def test_a_damaged_stream_raises_no_other_error(media_type: str, data: st.DataObject) -> None:
    transfer = bytearray(PACK[media_type](random.Random(1).randbytes(200) * 3))
    for _ in range(data.draw(st.integers(1, 3))):
        transfer[data.draw(st.integers(0, len(transfer) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert len(unpacked(media_type, bytes(transfer))) < 1 << 20


@pytest.mark.parametrize("media_type", [GZIP, ZSTD])
def test_output_comes_in_bounded_pieces(media_type: str) -> None:
    transfer = PACK[media_type](bytes(40 << 20))
    assert max(map(len, decoder(media_type)(reading(transfer, [])))) <= PIECE_BYTES + 64


def test_a_frame_cannot_ask_for_more_memory_than_is_usual() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    transfer = writer.compress(b"x" * 100) + writer.flush()
    with pytest.raises(ImageError, match="too much memory"):
        unpacked(ZSTD, transfer)


def test_the_checksum_of_a_gzip_member_counts() -> None:
    transfer = bytearray(gzip.compress(b"content"))
    transfer[-8:-4] = zlib.crc32(b"another").to_bytes(4, "little")
    with pytest.raises(ImageError, match="CRC"):
        unpacked(GZIP, bytes(transfer))
