"""Content-addressed files: <root>/sha256/<hex>.

A file is there in full or not at all: it is written under `<root>/tmp`, hashed on the way, flushed,
and renamed to its digest when digest and size are right. After a crash whatever lies in `tmp` is
rubbish, and `sweep` removes it. `Check` is the same verification for content that goes elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import trio

from sandbox.errors import ImageError, KernelError
from sandbox.images.documents import Descriptor

Send = Callable[[bytes], Awaitable[None]]
CHUNK_BYTES = 1 << 20


class Check:
    """Counts and hashes content as it passes; ImageError as soon as it cannot be right any more."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.size = 0

    async def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self._descriptor.size:
            raise self._wrong(f"is longer than its {self._descriptor.size} bytes")
        await trio.to_thread.run_sync(self._hash.update, chunk)

    def finish(self) -> None:
        """Hold the whole against the descriptor."""
        if self.size != self._descriptor.size:
            raise self._wrong(f"has {self.size} bytes instead of {self._descriptor.size}")
        digest = f"sha256:{self._hash.hexdigest()}"
        if digest != self._descriptor.digest:
            raise self._wrong(f"has digest {digest}")

    def _wrong(self, what: str) -> ImageError:
        return ImageError(f"content of {self._descriptor.digest} {what}")


@contextlib.asynccontextmanager
async def checking(descriptor: Descriptor) -> AsyncIterator[Send]:
    """Gives a function that takes content in pieces; ImageError at the end if it was not right."""
    check = Check(descriptor)
    yield check.update
    check.finish()


class BlobStore:
    """Made by the image store; `root` belongs to it alone."""

    def __init__(self, root: Path) -> None:
        self._files = root / "sha256"
        self._temporary = root / "tmp"
        for directory in (self._files, self._temporary):
            with reported("mkdir", directory):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._files / digest.removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        return self.path(digest).exists()

    def digests(self) -> set[str]:
        with reported("scandir", self._files):
            return {f"sha256:{name}" for name in os.listdir(self._files)}

    def remove(self, digest: str) -> None:
        with reported("unlink", self.path(digest)):
            self.path(digest).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a crash left behind; only while nobody writes."""
        with reported("unlink", self._temporary):
            for path in self._temporary.iterdir():
                path.unlink()

    def read(self, descriptor: Descriptor) -> bytes:
        """A small blob; ImageError when it is not what it was, for instance after a disk error."""
        path = self.path(descriptor.digest)
        with reported("read", path), path.open("rb") as file:
            body = file.read(descriptor.size + 1)
        if digest_of(body) != descriptor.digest:
            raise ImageError(f"stored content of {descriptor.digest} is damaged")
        return body

    async def write(self, body: bytes) -> None:
        """Keep `body` under its own digest."""
        digest = digest_of(body)
        if self.has(digest):
            return
        async with self.writing(Descriptor(digest=digest, size=len(body))) as send:
            await send(body)

    @contextlib.asynccontextmanager
    async def writing(self, descriptor: Descriptor) -> AsyncIterator[Send]:
        """Gives a function that takes the blob in pieces; it is stored when the block ends well.

        ImageError at the end, and nothing stored, when the pieces are not the blob.
        """
        check = Check(descriptor)
        with self.temporary() as (path, file):

            async def send(chunk: bytes) -> None:
                await check.update(chunk)
                await trio.to_thread.run_sync(_write, file, path, chunk)

            yield send
            check.finish()
            await trio.to_thread.run_sync(_publish, file, path, self.path(descriptor.digest))

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """An empty file that is gone when the block ends, unless it was renamed."""
        path = self._temporary / os.urandom(8).hex()
        with reported("open", path):
            file = path.open("xb", buffering=0)
        try:
            with file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@contextlib.contextmanager
def reported(call: str, path: Path) -> Iterator[None]:
    """An OSError of file work becomes a KernelError that names the file."""
    try:
        yield
    except OSError as error:
        raise KernelError(call, str(error.filename or path), error.errno or 0) from error


def _write(file: BinaryIO, path: Path, chunk: bytes) -> None:
    with reported("write", path):
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]


def _publish(file: BinaryIO, path: Path, final: Path) -> None:
    with reported("rename", final):
        os.fsync(file.fileno())
        path.rename(final)
        directory = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
