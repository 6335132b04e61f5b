"""A region on a real store, with ids that are the same each time."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from sandbox.control.vpc.draft import Draft, commit
from sandbox.control.vpc.limits import TODAY, Limits
from sandbox.control.vpc.region import PUBLIC_POOL, Region
from sandbox.errors import Ec2Error
from sandbox.store.sqlite import SqliteStore

R = TypeVar("R")


class Ec2:
    """Decides and writes at once, as a caller would; `refused` sees that nothing was written."""

    DEFAULTS = TODAY

    def __init__(
        self, path: Path, *, limits: Limits = TODAY, public_pool: str = PUBLIC_POOL
    ) -> None:
        self.path = path
        self.store = SqliteStore.open(path)
        self._limits = limits
        self._pool = public_pool
        self._random = random.Random(5)
        self.region = self._region()

    def limit(self, **limits: int) -> None:
        """Quotas that are sooner reached."""
        self._limits = dataclasses.replace(self._limits, **limits)
        self.region = self._region()

    def _region(self) -> Region:
        return Region(
            store=self.store,
            limits=self._limits,
            public_pool=self._pool,
            random=self._random.randbytes,
            clock=lambda: 1.0,
        )

    def do(self, decide: Callable[[Draft], R]) -> R:
        async def write() -> R:
            return await commit(self.region, decide, durable=False)

        return trio.run(write)

    def refused(self, decide: Callable[[Draft], object]) -> tuple[str, str]:
        """Code and text of the refusal."""
        before = self.store.revision
        with pytest.raises(Ec2Error) as caught:
            self.do(decide)
        assert self.store.revision == before
        return caught.value.code, str(caught.value)

    def reopen(self) -> None:
        trio.run(self.store.aclose)
        self.store = SqliteStore.open(self.path)
        self.region = self._region()
