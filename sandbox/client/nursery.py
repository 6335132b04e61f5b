"""A nursery that raises what was raised, when that was one thing.

Users of the API write `except TaskFailed`, not `except*`: a group with a single exception in it
says nothing more than the exception.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio


@contextmanager
def unwrapped() -> Iterator[None]:
    """Take a lone exception out of the groups that nurseries put around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery]:
    with unwrapped():
        async with trio.open_nursery() as nursery:
            yield nursery
