"""See scripts/bench, which starts this with a registry behind $TINY and $MANY."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import trio

import sandbox
from scripts import make_image
from scripts.benchmarks import crun, machine
from scripts.benchmarks.disk import own_disk
from scripts.benchmarks.figures import Section, summary
from scripts.benchmarks.launch import launch, rate
from scripts.benchmarks.memory import memory
from scripts.benchmarks.network import network
from scripts.benchmarks.pull import pull
from scripts.benchmarks.revocation import revocation
from scripts.benchmarks.sets import sets
from scripts.benchmarks.storage import storage
from scripts.benchmarks.unpack import unpack

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    *("launch", "memory", "pull", "unpack", "rate", "storage"),
    *("sets", "net", "revocation"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("part", nargs="?", default="all", choices=(*PARTS, "all"))
    parser.add_argument("--write", action="store_true", help="docs/benchmarks.md")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    options = parser.parse_args()
    if options.write and (options.quick or options.part != "all"):
        parser.error("only a whole run is written down")
    chosen = PARTS if options.part == "all" else (options.part,)
    before = machine.load()
    sections = measure(chosen, options.quick)
    made_by = "scripts/bench " + " ".join(sys.argv[1:])
    text = report(sections, machine.described(before), made_by.strip())
    print(text)
    if options.write:
        (ROOT / "docs/benchmarks.md").write_text(text)
    figures = [figure for section in sections for figure in section.figures]
    return 0 if all(figure.is_met for figure in figures) else 1


def measure(chosen: tuple[str, ...], quick: bool) -> list[Section]:
    tiny, many = os.environ["TINY"], os.environ["MANY"]
    sections: dict[str, Section] = {}
    with own_disk() as disk:
        if {"launch", "rate"} & set(chosen):
            sections |= trio.run(launches, disk / "launches", tiny, chosen, quick)
        if "memory" in chosen:
            say("memory")
            sections["memory"] = trio.run(memory, disk / "memory", tiny)
        if "pull" in chosen:
            say("pull")
            sections["pull"] = pull(disk, many, 2 if quick else 5)
        if "unpack" in chosen:
            say("unpack")
            layout = make_image.cached("many", ROOT / "build/images")
            sections["unpack"] = unpack(disk / "unpack", layout, 2 if quick else 7)
        if "storage" in chosen:
            say("storage")
            sections["storage"] = trio.run(storage, disk / "storage", 20 if quick else 100)
        if "sets" in chosen:
            say("sets")
            sections["sets"] = sets(disk / "sets", quick)
        if "net" in chosen:
            say("net")
            joins, count = (10, 50) if quick else (200, 1000)
            sections["net"] = trio.run(network, disk / "network", joins, count)
        if "revocation" in chosen:
            say("revocation")
            sections["revocation"] = revocation(disk / "revocation", quick)
    return [sections[part] for part in PARTS if part in sections]


async def launches(
    directory: Path, image: str, chosen: tuple[str, ...], quick: bool
) -> dict[str, Section]:
    """One agent and one crun for both parts."""
    bundle, state = directory / "bundle", directory / "state"
    sections = {}
    crun.make_bundle(bundle, make_image.cached("tiny", ROOT / "build/images"))
    with crun.serving(bundle) as peer:
        async with sandbox.open_sandbox(state_dir=state) as sb:
            await sb.pull(image)
            if "launch" in chosen:
                say("launch")
                pairs, warm = (10, 3) if quick else (100, 20)
                sections["launch"] = await launch(sb, peer, image, pairs, warm)
            if "rate" in chosen:
                say("rate")
                sections["rate"] = await rate(sb, peer, image, 1 if quick else 3, state)
    return sections


def report(sections: list[Section], where: str, made_by: str) -> str:
    body = "\n".join(section.markdown() for section in sections)
    return (
        "# Benchmarks\n\n"
        f"Made by `{made_by}`; nothing here is written by hand. Sandbox and what it is compared "
        "with ran in turns, in one run on one machine: believe the ratios more than the times.\n\n"
        f"{summary(sections)}\n{body}\n## Machine\n\n{where}"
    )


def say(part: str) -> None:
    print(f"bench: {part} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
