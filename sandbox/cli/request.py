"""What options of `sandbox run` mean before they become a request (`client.request`): pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sandbox.client import request
from sandbox.client.place import is_text, shown_bytes
from sandbox.errors import InvalidParameterException


def entry_point(text: str | None) -> tuple[str, ...] | None:
    """One program, as in Docker; the empty string drops the image's entry point."""
    if text is None:
        return None
    return (text,) if text else ()


def environment(
    given: Iterable[str], file_lines: Iterable[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """NAME=VALUE, or NAME to pass on our own; -e wins over files, and the last one wins."""
    merged: dict[str, str] = {}
    lines = (line.lstrip() for line in file_lines)
    for entry in (*(line for line in lines if line and not line.startswith("#")), *given):
        name, equals, value = entry.partition("=")
        if not name or "\0" in entry:
            raise InvalidParameterException(f"-e {entry!r}: expected NAME=VALUE or NAME")
        if equals:
            merged[name] = value
        elif name in environ:
            merged[name] = environ[name]
    for name, value in merged.items():
        if not is_text(name) or not is_text(value):
            shown = shown_bytes(f"{name}={value}")
            raise InvalidParameterException(f"environment {shown}: not UTF-8")
    return merged


def refuse_network(subnet: str | None, security_groups: Sequence[str], public_ip: bool) -> None:
    request.refuse_network(
        {"--subnet": subnet, "--security-group": security_groups, "--public-ip": public_ip}
    )


def duration(text: str) -> float:
    """Seconds: 90, 90s, 15m, 2h, 1d, 0.5s."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidParameterException(f"{text!r} is not a duration: 90, 90s, 15m, 2h, 1d")
    return seconds
