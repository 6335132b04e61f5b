from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.unit.control.vpc.regions import Ec2


@pytest.fixture
def ec2(tmp_path: Path) -> Iterator[Ec2]:
    opened = Ec2(tmp_path / "store.db")
    yield opened
    trio.run(opened.store.aclose)
