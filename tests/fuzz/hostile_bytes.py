"""Bytes of strangers for hypothesis: any at all, and good ones with something done to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NASTY = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"..",
    b"/",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 30,
    b"9" * 5000,
    b"-1",
    b"1e999",
    b"\\ud800",
    b"\xd9\xa3",
    b" " * 600,
)

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["sha256:" + "0" * 64, "\0", "/", "", "0:0", "9" * 20]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A good input with one to four things cut out, doubled, overwritten or put in."""
    data = draw(st.sampled_from(list(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 64)))
        here = st.sampled_from([b"", data[start:end] * 2])
        part = draw(here | st.sampled_from(NASTY) | st.binary(max_size=8))
        data = data[:start] + part + data[end:]
    return data


@st.composite
def changed_json(draw: st.DrawFn, documents: Sequence[Any]) -> bytes:
    """A good document of which one value, however deep, is another one or gone."""
    root = {"": json.loads(json.dumps(draw(st.sampled_from(list(documents)))))}
    holder: Any = root
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 3)):
        holder = holder[key]
        keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw(st.sampled_from(keys))
    if isinstance(holder, dict) and holder is not root and draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(JSON)
    return json.dumps(root[""]).encode()


def hostile(seeds: Sequence[bytes], documents: Sequence[Any] = ()) -> st.SearchStrategy[bytes]:
    found = st.binary(max_size=2000)
    if seeds:
        found |= mutated(seeds)
    if documents:
        found |= changed_json(documents) | mutated([json.dumps(d).encode() for d in documents])
    return found
