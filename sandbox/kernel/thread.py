"""One OS thread that runs callables in order.

Namespaces, root and working directory belong to an OS thread. A thread of a shared pool that calls
unshare or setns hands the change to its next user; a KernelThread has only its owner's callables on
it, so they may step into a namespace and stay there. Order also makes it the natural home of a
library that must not be entered twice (a netlink socket).

`run` is for trio: it costs one hop there and one back, about 50 us, without polling. It is shielded
once the callable is on its way: a cancelled caller first learns how the call ended, so a descriptor
that was opened is never lost and an intent never left lying. The cancellation is delivered at the
caller's next checkpoint. Callables must therefore be short.

`call` is the same for threads without a trio loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

import outcome
import trio

from sandbox.kernel.closing import Closing

Result = TypeVar("Result")
Args = TypeVarTuple("Args")
Job = tuple[Callable[[], Any], Callable[[outcome.Outcome[Any]], None]]


class KernelThread(Closing):
    """Started when made; close it to end it. A daemon thread: it never holds up the exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # An interrupt between handing over and waiting would leave nobody for the answer.
    @trio.lowlevel.enable_ki_protection
    async def run(self, fn: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run `fn(*args)` on the thread; returns or raises what it does."""
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()
        self._submit(
            lambda: fn(*args),
            lambda result: token.run_sync_soon(trio.lowlevel.reschedule, task, result),
        )
        result: Result = await trio.lowlevel.wait_task_rescheduled(
            lambda _: trio.lowlevel.Abort.FAILED
        )
        return result

    def call(self, fn: Callable[[*Args], Result], *args: *Args) -> Result:
        """Run `fn(*args)` on the thread and block for it: for code without a trio loop."""
        answer: SimpleQueue[outcome.Outcome[Result]] = SimpleQueue()
        self._submit(lambda: fn(*args), answer.put)
        return answer.get().unwrap()

    def close(self) -> None:
        """End after what is queued, and wait for that. Later calls raise RuntimeError."""
        with self._gate:
            if not self._is_closed:
                self._is_closed = True
                self._jobs.put(None)
        self._thread.join()

    async def aclose(self) -> None:
        """`close` for trio: what is queued ends without holding up the loop."""
        with trio.CancelScope(shield=True):
            if not self._is_closed:
                await self.run(lambda: None)
            self.close()

    def _submit(
        self, fn: Callable[[], Any], deliver: Callable[[outcome.Outcome[Any]], None]
    ) -> None:
        with self._gate:
            if self._is_closed:
                raise RuntimeError(f"kernel thread {self._name} is closed")
            self._jobs.put((fn, deliver))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            fn, deliver = job
            deliver(outcome.capture(fn))
            del job, fn, deliver  # or the last call's arguments would live until the next call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
