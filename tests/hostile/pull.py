"""A process that pulls one image, to be killed on its way.

python -m tests.hostile.pull DIRECTORY NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from tests.kernel.pulling import open_world


async def main(directory: Path, name: str) -> None:
    async with open_world(directory) as world:
        await world.images.ensure(name)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
