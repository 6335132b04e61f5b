"""What reaches the user's terminal: tables, JSON, one-line errors, and text made harmless.

Everything that a task, an image or a registry may have chosen passes `harmless` before it is shown
on a terminal: escapes could retype a shell's input or hide what is written. Into a pipe or a file
goes the raw data, since a program reads it there.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

DANGEROUS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""C0 without tab and newline, DEL, C1, and what reorders text or breaks lines in Unicode."""


def harmless(text: str) -> str:
    """`text` with control characters shown instead of sent."""
    return DANGEROUS.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    code = ord(found.group())
    if code < 0x20 or code == 0x7F:
        return "^" + chr(code ^ 0x40)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: object) -> str:
    return harmless(" ".join(str(text).split()))


def complain(text: str) -> None:
    """Our one line for what went wrong."""
    with suppress(OSError):  # who does not want to hear it need not
        print(f"sandbox: {one_line(text)}", file=sys.stderr, flush=True)


class StdoutFailed(OSError):
    """Our stdout takes no more, for another reason than that its reader went away."""


class Stdout(io.FileIO):
    """Descriptor 1, whose errors are told from those of other files."""

    @classmethod
    def text(cls, like: TextIO) -> TextIO:
        """For sys.stdout, in its place."""
        buffer = io.BufferedWriter(cls(1, "w", closefd=False))
        return io.TextIOWrapper(
            buffer, like.encoding, like.errors, line_buffering=bool(like.line_buffering)
        )

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutFailed(error.errno, error.strerror) from None


def give_up_stdout() -> None:
    """Let the interpreter find nothing that it could not write, when it ends."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


def print_json(value: Any) -> None:
    import msgspec

    data = msgspec.json.encode(value)
    if sys.stdout.isatty():
        data = msgspec.json.format(data, indent=2)
    sys.stdout.write(data.decode() + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table(headers, rows, width):
        print(line)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None
) -> list[str]:
    """Aligned lines; with a `width` the widest columns give way until a line fits."""
    cells = [list(headers), *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    gaps = 2 * (len(headers) - 1)
    while width is not None and sum(widths) + gaps > width and max(widths) > SHORTEST:
        widths[widths.index(max(widths))] -= 1
    return [
        "  ".join(_fit(cell, room) for cell, room in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


SHORTEST = 4
"""A column narrower than this says nothing."""


def _fit(cell: str, room: int) -> str:
    return cell.ljust(room) if len(cell) <= room else cell[: room - 1] + "…"


def age(seconds: float) -> str:
    """A time span in its largest whole unit: 45s, 12m, 3h, 2d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def since(at: float | None) -> str:
    return "-" if at is None else age(time.time() - at)


def size(count: int | None) -> str:
    """Bytes for people, in powers of 1024."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
