"""The caller's side of an attached task or exec: signals, the terminal, the wait for answers.

The program's streams do not pass here: the agent was given our descriptors. What is left for us is
to pass on what only we can see: signals, the size of the terminal, and its raw mode, which is
restored on every way out that a process has a say in.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from sandbox.client.link import Link
from sandbox.varlink.calls import R, Stream

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)


class Signals:
    """Signals as something to wait for: a descriptor that is readable when some came.

    Python's wakeup descriptor has the handler-safe half done already; the handlers do nothing.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._read

    def take(self) -> list[signal.Signals]:
        try:
            numbers = os.read(self._read, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers if number in FORWARDED]

    @contextmanager
    def caught(self) -> Iterator[None]:
        def nothing(number: int, frame: FrameType | None) -> None: ...

        before = {number: signal.signal(number, nothing) for number in FORWARDED}
        wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(self._write)


def answers(
    link: Link,
    call: Stream[R],
    signals: Signals,
    on_signal: Callable[[signal.Signals], None],
    deadline: float | None = None,
    on_deadline: Callable[[], None] = lambda: None,
) -> Generator[R]:
    """The answers to a call that was sent; between them, what the user does reaches the task."""
    sources: list[Link | Signals] = [link, signals]
    while True:
        while not link.buffered:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select(sources, [], [], left)
            if signals in ready:
                for number in signals.take():
                    on_signal(number)
            if deadline is not None and time.monotonic() >= deadline:
                deadline = None
                on_deadline()
            if link in ready:
                break
        reply, continues = link.receive(call)
        yield reply
        if not continues:
            return


def window() -> tuple[int, int]:
    """Rows and columns of our terminal, 24 and 80 without one."""
    for stream in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(stream)
        except OSError:
            continue
        if rows and columns:
            return rows, columns
    return 24, 80


@contextmanager
def raw_terminal(wanted: bool) -> Iterator[None]:
    """Our terminal passes every key on while this lasts, if `wanted` and stdin is one."""
    if not wanted or not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class Bar:
    """How far a pull is, on one line of stderr, if that is a terminal.

    Layers come side by side, so what is shown is their sum, as far as they are known.
    """

    WIDTH = 24
    PERIOD_S = 0.1

    def __init__(self) -> None:
        self._shown = False
        self._next = 0.0
        self._enabled = sys.stderr.isatty()
        self._parts: dict[str, tuple[int, int | None]] = {}

    def show(self, what: str, done: int, total: int | None) -> None:
        self._parts[what] = (done, total)
        now = time.monotonic()
        if not self._enabled or (now < self._next and done != total):
            return
        self._next, self._shown = now + self.PERIOD_S, True
        sys.stderr.write("\r" + self.line(*self.sum(self._parts), window()[1]) + "\x1b[K")
        sys.stderr.flush()

    @staticmethod
    def sum(parts: Mapping[str, tuple[int, int | None]]) -> tuple[str, int, int | None]:
        """What to call all parts together, and their bytes; one alone has its own name."""
        done = sum(done for done, _ in parts.values())
        totals = [total for _, total in parts.values() if total is not None]
        total = sum(totals) if len(totals) == len(parts) else None
        ended = sum(done == total for done, total in parts.values())
        what = f"{ended} of {len(parts)} layers" if len(parts) > 1 else next(iter(parts))
        return what, done, total

    @classmethod
    def line(cls, what: str, done: int, total: int | None, columns: int) -> str:
        from sandbox.cli.output import one_line, size

        amount = size(done) if total is None else f"{size(done)} / {size(total)}"
        filled = cls.WIDTH * min(done, total) // total if total else 0
        gauge = f"[{'#' * filled}{'.' * (cls.WIDTH - filled)}] " if total else ""
        room = max(0, columns - len(gauge) - len(amount) - 3)
        return f"{one_line(what)[:room]}  {gauge}{amount}"

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
