"""What registries say beside content: challenges, tokens, refusals, pauses. Pure.

Nothing of it is trusted: a parser here answers with what it understood; what it did not is absent,
never an exception.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Iterable
from http import HTTPStatus

import msgspec

_WORD = re.compile(r"""([\w!#$%&'*+.^`|~-]+)(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+)))?""")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_SECONDS = re.compile("[0-9]+", re.ASCII)
_SHOWN_ERRORS = 3
_SHOWN_CHARACTERS = 300
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class _Entry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Entry] = []


def challenges(headers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of all WWW-Authenticate headers, parameters by scheme; the first of a kind counts."""
    schemes: dict[str, dict[str, str]] = {}
    for header in headers:
        parameters: dict[str, str] = {}
        for word in _WORD.finditer(header):
            name, quoted, bare = word[1].lower(), word[2], word[3]
            if quoted is None and bare is None:
                parameters = {}
                schemes.setdefault(name, parameters)
            else:
                value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters.setdefault(name, value)
    return schemes


def token(body: bytes) -> str | None:
    """The bearer token in a realm's answer, fit for a header."""
    try:
        answer = msgspec.json.decode(body, type=_TokenAnswer)
    except _UNREADABLE:
        return None
    found = answer.token or answer.access_token
    return found if _TOKEN.fullmatch(found) else None


def refusal(status: int, body: bytes) -> str:
    """The status in words and what the registry wrote about it, as one line."""
    try:
        errors = msgspec.json.decode(body, type=_Errors).errors
    except _UNREADABLE:
        errors = []
    texts = [f"{error.code.lower()}: {error.message}" for error in errors[:_SHOWN_ERRORS]]
    line = "".join(c if c.isprintable() else " " for c in ", ".join(texts))
    said = f" - Server message: {line[:_SHOWN_CHARACTERS]}" if line else ""
    return f"{status} {phrase(status)}".strip() + said


def phrase(status: int) -> str:
    """HTTP's words for a status; empty for one that HTTP does not know."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def retry_after(header: str, now: float) -> float:
    """Seconds to wait, given as such or as a date; 0 when nothing is said."""
    if _SECONDS.fullmatch(header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
