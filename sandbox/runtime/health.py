"""Health checks: a command in the container, again and again.

Fargate's rules: healthy at the first success; unhealthy after `retries` failures in a row; what
fails within `startPeriod` does not count, unless a success came before. The verdict changes nothing
here: whether a task is replaced is a service's business.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from sandbox.errors import SandboxError
from sandbox.model.observed import ExecRequest
from sandbox.model.request import Streams
from sandbox.model.task import Health, HealthCheck
from sandbox.runtime import execs
from sandbox.runtime.keeper import Ended
from sandbox.runtime.logs import Tail

_OUTPUT_LIMIT: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Verdict:
    health: Health
    output: str
    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Count:
    """What has been seen so far; pure, so that the rules can be tested without a container."""

    health: Health = Health.UNKNOWN
    failures: int = 0
    has_succeeded: bool = False

    def after(self, check: HealthCheck, *, ok: bool, age_s: float) -> Count:
        if ok:
            return Count(health=Health.HEALTHY, has_succeeded=True)
        if age_s < check.start_period and not self.has_succeeded:
            return self
        failures = self.failures + 1
        health = Health.UNHEALTHY if failures >= check.retries else self.health
        return Count(health=health, failures=failures, has_succeeded=self.has_succeeded)


def command(check: HealthCheck) -> tuple[str, ...] | None:
    """What to execute; None when the check is switched off."""
    kind, *words = check.command
    match kind:
        case "NONE":
            return None
        case "CMD-SHELL":
            return ("/bin/sh", "-c", *words)
        case "CMD":
            return tuple(words)
        case _:
            return tuple(check.command)


async def watch(
    check: HealthCheck,
    target: execs.Target,
    tell: Callable[[Verdict], Awaitable[None]],
) -> None:
    """Until cancelled. `tell` hears of every check."""
    words = command(check)
    if words is None:
        return
    count, began = Count(), time.monotonic()
    while True:
        await trio.sleep(check.interval)
        code, output = await _once(check, target, words)
        count = count.after(check, ok=code == 0, age_s=time.monotonic() - began)
        await tell(Verdict(health=count.health, output=output, exit_code=code))


async def _once(
    check: HealthCheck, target: execs.Target, words: tuple[str, ...]
) -> tuple[int, str]:
    try:
        command = await target.start(ExecRequest(command=words), Streams())
    except SandboxError as error:
        return getattr(error, "exit_code", None) or 126, str(error)
    keeper = command.keeper
    try:
        end = None
        with trio.move_on_after(check.timeout):
            end = await keeper.wait()
            await keeper.wait_gone()
        code = end.exit_code if isinstance(end, Ended) else 137
        output = b"".join(r.data for r in Tail(keeper.status_dir, "").read())[:_OUTPUT_LIMIT]
        text = output.decode(errors="replace")
        return code, text if end else f"Health check exceeded timeout ({check.timeout}s): {text}"
    finally:
        await command.leave(kill=True)
