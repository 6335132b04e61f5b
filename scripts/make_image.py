#!/usr/bin/env python3
"""Make small container images, as OCI layouts, from Debian packages and from nothing.

    scripts/make_image.py tiny|many DIR

For tests and the quickstart: real layers, a real manifest, no registry needed. The same input
makes the same bytes: entries are written in a given order, owned by root, at time 0. Only the
standard library is used, so nothing of the product helps to make what the product is tested with.

    tiny   Debian's busybox-static and the few files a program expects; one layer
    many   perl, git, locales, headers and more: seven layers, some 16 000 entries, some 220 MB;
           the last layer deletes (a whiteout, an opaque directory) and replaces
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


class LayerWriter:
    """One layer's archive: plain verbs over tarfile. Paths are relative to the image's root."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._directories: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        if path not in self._directories:
            self._directories.add(path)
            self._add(tarfile.DIRTYPE, path, mode)

    def file(self, path: str, data: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        entry = self._entry(tarfile.REGTYPE, path, mode)
        entry.size, entry.uid, entry.gid = len(data), uid, gid
        self._archive.addfile(entry, io.BytesIO(data))

    def symlink(self, path: str, target: str) -> None:
        self._add(tarfile.SYMTYPE, path, 0o777, target)

    def hard_link(self, path: str, target: str) -> None:
        self._add(tarfile.LNKTYPE, path, 0o644, target)

    def whiteout(self, path: str) -> None:
        """Delete what a lower layer has at this path."""
        parent, _, name = path.rpartition("/")
        self.file(f"{parent}/.wh.{name}".lstrip("/"), b"")

    def opaque(self, path: str) -> None:
        """Hide everything that lower layers have in this directory."""
        self.directory(path)
        self.file(f"{path}/.wh..wh..opq", b"")

    def package(self, deb: Path) -> None:
        """The files of a Debian package; directories that are there already are not repeated."""
        unpacked = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE
        )
        assert unpacked.stdout
        with unpacked, tarfile.open(fileobj=unpacked.stdout, mode="r|") as source:
            for entry in source:
                path = entry.name.removeprefix("./").rstrip("/")
                if entry.isdir():
                    if path not in ("", "."):
                        self.directory(path, entry.mode)
                    continue
                entry.name, entry.linkname = path, entry.linkname.removeprefix("./")
                entry.mtime, entry.uname, entry.gname, entry.pax_headers = 0, "", "", {}
                self._archive.addfile(entry, source.extractfile(entry) if entry.isreg() else None)
        if unpacked.returncode != 0:
            raise subprocess.CalledProcessError(unpacked.returncode, "dpkg-deb")

    def _add(self, kind: bytes, path: str, mode: int, target: str = "") -> None:
        self._archive.addfile(self._entry(kind, path, mode, target))

    def _entry(self, kind: bytes, path: str, mode: int, target: str = "") -> tarfile.TarInfo:
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode, entry.linkname = kind, mode, target
        return entry


@dataclass(frozen=True)
class Layer:
    digest: str
    size: int
    diff_id: str
    media_type: str = f"{OCI}.layer.v1.tar+gzip"


class Layout:
    """An OCI image layout in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self._manifests: list[dict[str, Any]] = []

    def layer(self, write: Callable[[LayerWriter], None]) -> Layer:
        """Store one gzip'd layer with what `write` puts into it."""
        with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as blob:
            # Level 1: a third of the default's time, and a puller's work is the same.
            compressed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=blob, mtime=0)
            plain = _Hashed(compressed)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as archive:
                write(LayerWriter(archive))
            compressed.close()
        diff_id = f"sha256:{plain.sha256.hexdigest()}"
        file = Path(blob.name)
        with file.open("rb") as content:
            digest = f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"
        file.chmod(0o644)
        size = file.stat().st_size
        file.rename(self._blob(digest))
        return Layer(digest, size, diff_id)

    def image(self, tag: str, layers: Sequence[Layer], config: dict[str, Any]) -> str:
        """Store an image of these layers under a tag; its manifest's digest."""
        configuration = {
            "architecture": ARCHITECTURE,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.json(f"{OCI}.config.v1+json", configuration),
            "layers": [
                {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
                for layer in layers
            ],
        }
        described = self.json(f"{OCI}.manifest.v1+json", manifest)
        described["annotations"] = {"org.opencontainers.image.ref.name": tag}
        self._manifests.append(described)
        index = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.index.v1+json",
            "manifests": self._manifests,
        }
        (self.directory / "index.json").write_text(json.dumps(index))
        return str(described["digest"])

    def json(self, media_type: str, value: dict[str, Any]) -> dict[str, Any]:
        """Store a JSON blob; its descriptor."""
        data = json.dumps(value, separators=(",", ":")).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def _blob(self, digest: str) -> Path:
        return self.directory / "blobs/sha256" / digest.removeprefix("sha256:")


class _Hashed(io.RawIOBase):
    """Passes what is written on and hashes it: the diff id is of the archive before gzip."""

    def __init__(self, below: gzip.GzipFile) -> None:
        self.sha256 = hashlib.sha256()
        self._below = below

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._below.write(data)


# ---------------------------------------------------------------------- the two images


def busybox(layer: LayerWriter) -> None:
    """A shell and its commands, and what a program may expect of any system."""
    for path in (
        "bin",
        "dev",
        "etc",
        "home",
        "proc",
        "root",
        "run",
        "sys",
        "usr",
        "usr/bin",
        "var",
    ):
        layer.directory(path)
    layer.directory("tmp", 0o1777)
    layer.directory("home/app")
    layer.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
    layer.file("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
    binary = Path("/bin/busybox")
    layer.file("bin/busybox", binary.read_bytes(), 0o755)
    listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True)
    for applet in sorted(set(listed.stdout.split()) - {"busybox"}):
        layer.symlink(f"bin/{applet}", "busybox")


def make_tiny(directory: Path) -> None:
    layout = Layout(directory)
    config = {"Env": [PATH], "Cmd": ["/bin/sh"], "WorkingDir": "/"}
    layout.image("latest", [layout.layer(busybox)], config)


PACKAGES = [
    ["libc6", "libcrypt1", "perl-base"],
    ["locales", "tzdata"],
    ["python3-django", "python-babel-localedata"],
    ["vim-runtime", "git"],
    ["libc6-dev", "linux-libc-dev", "iso-codes"],
]


def make_many(directory: Path) -> None:
    def changes(layer: LayerWriter) -> None:
        layer.whiteout("usr/bin/git")
        layer.opaque("usr/share/vim")
        layer.file("usr/share/vim/README", b"what was here is hidden\n")
        layer.file("etc/group", b"root:x:0:\n")

    layout = Layout(directory)
    layers = [layout.layer(busybox)]
    for names in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            debs = [download(name, Path(folder)) for name in names]
            layers.append(layout.layer(functools.partial(unpack_all, debs)))
    layers.append(layout.layer(changes))
    config = {"Env": [PATH, "LANG=C.UTF-8"], "Entrypoint": ["/usr/bin/perl"], "Cmd": ["-v"]}
    layout.image("latest", layers, config)


def unpack_all(debs: Sequence[Path], layer: LayerWriter) -> None:
    for deb in debs:
        layer.package(deb)


def download(package: str, folder: Path) -> Path:
    before = set(folder.iterdir())
    # Not as root's own download user, who could not write into the folder.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (deb,) = set(folder.iterdir()) - before
    return deb


IMAGES = {"tiny": make_tiny, "many": make_many}


def cached(name: str, cache: Path) -> Path:
    """The layout of an image, made once for this version of the recipe."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    finished = cache / f"{name}-{recipe}"
    if not finished.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            IMAGES[name](Path(scratch) / name)
            try:
                os.rename(Path(scratch) / name, finished)
            except OSError:  # another process was faster: the bytes are the same
                if not finished.exists():
                    raise
    return finished


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in IMAGES:
        sys.exit(f"usage: scripts/make_image.py {'|'.join(IMAGES)} DIR")
    IMAGES[sys.argv[1]](Path(sys.argv[2]))
