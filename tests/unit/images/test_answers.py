from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.images.answers import challenges, refusal, retry_after, token


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (
            ['Bearer realm="https://a/t",service="s, x",scope="repository:a:pull,push"'],
            {
                "bearer": {
                    "realm": "https://a/t",
                    "service": "s, x",
                    "scope": "repository:a:pull,push",
                }
            },
        ),
        (["Basic realm=plain"], {"basic": {"realm": "plain"}}),
        (["BASIC"], {"basic": {}}),
        (
            ['Basic realm="x", Bearer realm="y"'],
            {"basic": {"realm": "x"}, "bearer": {"realm": "y"}},
        ),
        (['Basic realm="1"', 'Basic realm="2"'], {"basic": {"realm": "1"}}),
        ([r'Basic realm="a\"b"'], {"basic": {"realm": 'a"b'}}),
        ([""], {}),
        (['="x"'], {"x": {}}),
    ],
)
def test_challenges_are_read_as_they_are_written(
    headers: list[str], found: dict[str, dict[str, str]]
) -> None:
    assert challenges(headers) == found


@given(st.lists(st.text(max_size=200), max_size=4))
def test_no_header_is_too_odd(headers: list[str]) -> None:
    assert isinstance(challenges(headers), dict)


@pytest.mark.parametrize(
    "piece", ["\\", "a=", ",", " ", ' ,"', 'a="', "a = ", 'a="\\"', "=", 'a="b" ', "\t=\t"]
)
def test_a_long_header_is_read_in_time_that_grows_with_its_length(piece: str) -> None:
    """100 kB are what HTTP's parser lets through; squared, they hold the agent for minutes."""
    long = piece * (100_000 // len(piece))
    started = time.process_time()
    for header in (long, f'Bearer realm="{long}', f"Bearer {long}", f"Bearer a={long}b"):
        challenges([header])
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"token":"abc"}', "abc"),
        (b'{"access_token":"abc","expires_in":3}', "abc"),
        (b'{"token":"a b"}', None),
        (b'{"token":"\xff"}', None),
        (b"{}", None),
        (b"", None),
    ],
)
def test_a_token_is_fit_for_a_header_or_none(body: bytes, found: str | None) -> None:
    assert token(body) == found


def test_a_refusal_is_one_printable_line_of_bounded_length() -> None:
    assert refusal(404, b"<html>") == "404 Not Found"
    assert refusal(599, b"") == "599"
    assert refusal(403, b'{"errors":[{"code":"DENIED","message":"a\\n\\u001b[2Jb"}]}') == (
        "403 Forbidden - Server message: denied: a  [2Jb"
    )
    long = b'{"errors":[{"code":"X","message":"' + b"y" * 10_000 + b'"}]}'
    assert len(refusal(500, long)) < 400


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("", 0),
        ("-7", 0),
        ("soon", 0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 0),
        ("99999999999999", 99999999999999),
        ("9" * 5000, math.inf),
        ("٣", 0),
    ],
)
def test_a_pause_is_given_in_seconds_or_as_a_date(header: str, seconds: float) -> None:
    assert retry_after(header, now=60) == seconds
