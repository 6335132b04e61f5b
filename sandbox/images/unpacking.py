"""One run of the jailed unpacker (`native/unpack.c`), and the whiteouts that it reports.

The unpacker gets the tar stream on a pipe, an empty directory and a pipe for its report. Three
things happen side by side: a thread decompresses, hashes and feeds; the unpacker makes files; the
report is read here, because an unread one would stop both. Whoever ends early ends the others:
reading the report is given up only together with the life of the unpacker, and a thread that
writes to a dead one gets EPIPE.

Whiteouts become overlayfs's form afterwards. The jail cannot do it (trusted.* is the host's) and
must not: it reads hostile bytes. Its report is believed no more than the archive: parents are
resolved beneath the layer and through no link, and what is made there is made without following
one. A whiteout removes only what lower layers have. If this layer has something of that name
itself, it stays; if that is a directory, it becomes opaque, or it would join the hidden one.

Overlayfs lists a whiteout as a name that cannot be opened where it has nothing to merge (measured
up to 6.18): so none is made below an opaque directory, where it would hide nothing anyway. A
whiteout in a directory that no lower layer has still shows so, as it does in other engines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from sandbox.errors import ImageError, KernelError
from sandbox.images.blobs import reported
from sandbox.images.flights import Report, together
from sandbox.images.layer_stream import Decode, Read
from sandbox.kernel import native

OPAQUE_XATTR = "trusted.overlay.opaque"

_FIRST_HIGH_FD = 10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_LAYER = native.RESOLVE_BENEATH | native.RESOLVE_NO_SYMLINKS | native.RESOLVE_NO_XDEV
_FULL = {
    "No space left on device": errno.ENOSPC,
    "Quota exceeded": errno.EDQUOT,
    "Disk quota exceeded": errno.EDQUOT,
}
"""In the words of musl and glibc, which is how the unpacker reports what a call answered."""
_TOTALS = re.compile(rb"K([0-9]{1,20}) ([0-9]{1,20})")
_REPLACED_LATER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class LayerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer may cost."""

    stream_bytes: int = 200 << 30
    """Fargate's largest ephemeral storage: a larger layer fits into no task."""
    file_bytes: int = 200 << 30
    entries: int = 1 << 21
    """An entry of 512 bytes in the archive may take 4 KiB on disk: so no more than 8 GiB."""
    report_bytes: int = 16 << 20
    """Of whiteouts and skipped devices, which are held in memory."""
    seconds: float = 3600


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """What the unpacker reported. Paths are bytes relative to the layer."""

    entries: int
    size_bytes: int
    whiteouts: tuple[bytes, ...]
    opaques: tuple[bytes, ...]
    devices: tuple[bytes, ...]


class Unpacker:
    """The program, the host ids it may use, and how many of its feeders run at a time."""

    def __init__(self, program: Path, id_base: int, limits: LayerLimits) -> None:
        self._program = program
        self._id_base = id_base
        self._limits = limits
        self._threads = trio.CapacityLimiter(os.cpu_count() or 1)

    async def unpack(
        self, read: Read, decode: Decode, directory: Path, diff_id: str, report: Report
    ) -> Unpacked:
        """Fill the empty `directory`; `read` is called in a thread.

        ImageError unless the whole stream was well-formed and is what `diff_id` says. When this
        ends, also by cancellation, nothing writes to `directory` any more.
        """
        run = self._start(directory)
        digest = hashlib.sha256()

        def feed() -> None:
            done = 0
            for piece in decode(read):
                digest.update(piece)
                done += len(piece)
                if not _write(run.stream, piece):
                    return
                trio.from_thread.run_sync(report, done, None)

        async def feed_in_thread() -> None:
            try:
                await trio.to_thread.run_sync(feed, limiter=self._threads)
            finally:
                os.close(run.stream)

        async def listen() -> None:
            await run.read_report()
            outcomes.append(_parse(bytes(run.report)))  # a refusal ends the feeder too

        outcomes: list[Unpacked] = []
        try:
            with trio.fail_after(self._limits.seconds):
                await together(feed_in_thread, listen)
        except trio.TooSlowError:
            raise ImageError(f"takes longer than {self._limits.seconds:g} s to unpack") from None
        finally:
            await run.end()
        if f"sha256:{digest.hexdigest()}" != diff_id:
            raise ImageError(f"has content of sha256:{digest.hexdigest()}")
        return outcomes[0]

    def _start(self, directory: Path) -> _Run:
        limits = self._limits
        numbers = (self._id_base, limits.stream_bytes, limits.entries, limits.file_bytes)
        arguments = ["unpack", *map(str, numbers)]
        with (
            reported("posix_spawn", self._program),
            contextlib.ExitStack() as opened,
            contextlib.ExitStack() as kept,
        ):

            def closed_later(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            def inherited(fd: int, number: int) -> tuple[int, int, int]:
                """By way of a high number, or one descriptor would replace another."""
                high = fcntl.fcntl(closed_later(fd), fcntl.F_DUPFD_CLOEXEC, _FIRST_HIGH_FD)
                return os.POSIX_SPAWN_DUP2, closed_later(high), number

            layer = inherited(os.open(directory, _DIRECTORY), 3)
            tar, stream = os.pipe()
            kept.callback(os.close, stream)
            stdin = inherited(tar, 0)
            with contextlib.suppress(OSError):  # fewer wake-ups; the default size is right too
                fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 1 << 20)
            report, report_end = os.pipe()
            kept.callback(os.close, report)
            reporting = inherited(report_end, 4)
            null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
            actions = [stdin, null, (os.POSIX_SPAWN_DUP2, 1, 2), layer, reporting]
            pid = os.posix_spawn(self._program, arguments, {}, file_actions=actions)
            run = _Run(pid, _pidfd_of(pid), stream, report, limits.report_bytes)
            kept.pop_all()
            return run


def _pidfd_of(child: int) -> int:
    try:
        return os.pidfd_open(child)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


class _Run:
    """A started unpacker; `end` must be called."""

    def __init__(self, pid: int, pidfd: int, stream: int, report: int, report_limit: int) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._pipe = trio.lowlevel.FdStream(report)
        self._report_limit = report_limit
        self.stream = stream
        self.report = bytearray()

    async def read_report(self) -> None:
        """Until the unpacker has ended; it is killed if this is cancelled."""
        try:
            while chunk := await self._pipe.receive_some():
                self.report += chunk
                if len(self.report) > self._report_limit:
                    raise ImageError("has too many whiteouts")
        finally:
            self._kill_unless_ended()

    async def end(self) -> None:
        """Kill it if it lives, and return when both of its processes are gone.

        Its stream is closed by now: also where it cannot be killed, it ends.
        """
        with trio.CancelScope(shield=True):
            try:
                self._kill_unless_ended()
                while await self._pipe.receive_some():
                    pass  # the inner process dies with the outer one: only then is here an end
            finally:
                await self._pipe.aclose()
                await self._reap()

    async def _reap(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
        finally:
            os.waitpid(self._pid, 0)
            os.close(self._pidfd)

    def _kill_unless_ended(self) -> None:
        with reported("pidfd_send_signal", Path("unpack")), contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _write(pipe: int, piece: bytes) -> bool:
    """False if the unpacker is gone; its report says why."""
    view = memoryview(piece)
    try:
        while view:
            view = view[os.write(pipe, view) :]
    except BrokenPipeError:
        return False
    return True


def _parse(report: bytes) -> Unpacked:
    *records, rest = report.split(b"\0")
    last = records.pop() if records else b""
    if rest or last[:1] not in (b"K", b"E"):
        raise ImageError("the unpacker ended without a word")
    if last[:1] == b"E":
        raise _failure(printable(last[1:]))
    totals = _TOTALS.fullmatch(last)
    if totals is None:
        raise ImageError("the unpacker's report is malformed")
    kinds: dict[bytes, list[bytes]] = {b"W": [], b"O": [], b"D": []}
    for record in records:
        if record[:1] not in kinds:
            raise ImageError("the unpacker's report is malformed")
        kinds[record[:1]].append(record[1:])
    return Unpacked(
        entries=int(totals[1]),
        size_bytes=int(totals[2]),
        whiteouts=tuple(kinds[b"W"]),
        opaques=tuple(kinds[b"O"]),
        devices=tuple(kinds[b"D"]),
    )


def _failure(text: str) -> ImageError | KernelError:
    """What the unpacker gave up for: a full disk is no fault of the image's."""
    *about, answer = text.rsplit(": ", 2)
    if (code := _FULL.get(answer)) is None:
        return ImageError(text)
    subject, call = ("", "", *about)[-2:]
    return KernelError(call, subject, code)


def printable(text: bytes) -> str:
    """One line that a terminal may show, whatever bytes an archive has put into a name."""
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


# Whiteouts -------------------------------------------------------------------------------------


def apply_whiteouts(layer: Path, unpacked: Unpacked) -> None:
    """Give the reported markers overlayfs's form, and flush the directories that they change."""
    with reported("mknod", layer), _closing(os.open(layer, _DIRECTORY)) as root:
        for path in unpacked.opaques:
            with _inside(root, path) as directory:
                if directory is not None:
                    _make_opaque(directory)
        opaques = set(unpacked.opaques)
        for path in unpacked.whiteouts:
            if not opaques.isdisjoint(_directories_above(path)):
                continue
            parent, _, name = path.rpartition(b"/")
            if name in (b"", b".", b".."):
                raise ImageError("the unpacker's report is malformed")
            with _inside(root, parent) as directory:
                if directory is not None:
                    _hide(directory, name)


def _directories_above(path: bytes) -> Iterator[bytes]:
    while path:
        path = path.rpartition(b"/")[0]
        yield path


def _hide(directory: int, name: bytes) -> None:
    before = os.stat(directory)
    try:
        os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=directory)
    except FileExistsError:
        with _inside(directory, name) as own:
            if own is not None:
                _make_opaque(own)
        return
    os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.fsync(directory)


def _make_opaque(directory: int) -> None:
    os.setxattr(directory, OPAQUE_XATTR, b"y")
    os.fsync(directory)


@contextlib.contextmanager
def _inside(root: int, path: bytes) -> Iterator[int | None]:
    """The directory `path` below `root`; None if a later entry put something else there."""
    try:
        fd = native.openat2(root, path or b".", _DIRECTORY, resolve=_IN_LAYER)
    except KernelError as error:
        if error.errno not in _REPLACED_LATER:
            raise
        yield None
        return
    with _closing(fd):
        yield fd


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
