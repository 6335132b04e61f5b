"""Unpacking layers with all checks, beside programs that make a tree of an archive without them.

Ours is the whole way of a layer into its store: digest of every byte, the jail around its reader,
names resolved below the root for each entry, limits, whiteouts. tar and bsdtar trust the archive:
they keep owners, modes, times and extended attributes, and check nothing else. All of them read a
file that is in memory, write to one disk, and have ended when what they wrote is on it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio

from sandbox.images.documents import TAR_LAYER
from sandbox.images.layers import LayerStore
from scripts.benchmarks.figures import Figure, Section

ROOT = Path(__file__).resolve().parents[2]
ID_BASE = 1 << 30
OURS = "Sandbox, all checks"
Unpack = Callable[[Path, str, Path], None]
"""An archive, its digest, and an empty directory."""


def unpack(directory: Path, layout: Path, rounds: int) -> Section:
    archives = plain_layers(layout, directory / "archives")
    times: dict[str, list[float]] = {name: [] for name in UNPACKERS}
    for _ in range(rounds):
        for name, unpacker in UNPACKERS.items():
            times[name].append(seconds_for(unpacker, archives, directory / "unpacked"))
    shutil.rmtree(directory)
    medians = {name: statistics.median(each) for name, each in times.items()}
    fastest = min((name for name in UNPACKERS if name != OURS), key=medians.__getitem__)
    return Section(
        "Unpacking",
        f"The {len(archives)} layers of `many`, uncompressed, one after another, each into an "
        f"empty directory of the same file system; {rounds} rounds in turns, each after a `sync`. "
        "tar and bsdtar keep owners, modes, times and extended attributes, and check nothing; "
        "`sync -f` follows them, as Sandbox has a layer on disk when it is done. Sandbox also "
        "hashes all of it.",
        ("", "median s", "min s", "max s"),
        [row(name, each) for name, each in times.items()],
        [
            Figure(
                f"unpacking with all checks, of {fastest}'s without",
                medians[OURS] / medians[fastest],
                "x",
                "at most",
                1.15,
            )
        ],
    )


def row(name: str, times: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{v:.2f}" for v in (statistics.median(times), min(times), max(times))))


def plain_layers(layout: Path, directory: Path) -> dict[Path, str]:
    """The layers' archives as files of their own, with their digests."""
    directory.mkdir(parents=True)

    def read(digest: str) -> bytes:
        return (layout / "blobs" / digest.replace(":", "/")).read_bytes()

    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(read(index["manifests"][0]["digest"]))
    archives = {}
    for number, layer in enumerate(manifest["layers"]):
        content = gzip.decompress(read(layer["digest"]))
        archive = directory / str(number)
        archive.write_bytes(content)
        archives[archive] = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return archives


def seconds_for(unpacker: Unpack, archives: Mapping[Path, str], place: Path) -> float:
    took = 0.0
    for archive, diff_id in archives.items():
        place.mkdir()
        os.sync()
        began = time.perf_counter()
        unpacker(archive, diff_id, place)
        took += time.perf_counter() - began
        shutil.rmtree(place)
    return took


def sandbox(archive: Path, diff_id: str, place: Path) -> None:
    store = LayerStore(place / "layers", unpacker=ROOT / "sandbox/_bin/unpack", id_base=ID_BASE)

    async def add() -> None:
        await store.add(archive, media_type=TAR_LAYER, diff_id=diff_id)

    trio.run(add)


def trusting(*command: str) -> Unpack:
    def run(archive: Path, _: str, place: Path) -> None:
        subprocess.run([*command, "-C", place, "-f", archive], check=True)
        subprocess.run(["sync", "-f", place], check=True)

    return run


UNPACKERS: dict[str, Unpack] = {
    OURS: sandbox,
    "GNU tar": trusting("tar", "-xp", "--numeric-owner", "--xattrs", "--xattrs-include=*"),
    "bsdtar": trusting("bsdtar", "-xp", "--numeric-owner", "--xattrs"),
}
