"""A kernel thread runs what it is given in order, and no answer of it is ever lost."""

from __future__ import annotations

import os
import threading
import time

import pytest
import trio
import trio.testing

from sandbox.kernel.thread import KernelThread


def fail() -> None:
    raise OSError(5, "no")


async def test_everything_runs_on_the_same_thread_which_is_not_the_loops() -> None:
    async with KernelThread("test") as thread:
        idents = {await thread.run(threading.get_native_id) for _ in range(10)}
    assert len(idents) == 1
    assert idents != {threading.get_native_id()}


async def test_calls_of_concurrent_tasks_run_one_after_another() -> None:
    running = 0
    order: list[int] = []

    def step(number: int) -> None:
        nonlocal running
        running += 1
        assert running == 1
        time.sleep(0.002)
        order.append(number)
        running -= 1

    async with KernelThread("test") as thread, trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(thread.run, step, number)
    assert sorted(order) == list(range(10))


async def test_an_exception_reaches_the_caller_and_the_thread_goes_on() -> None:
    async with KernelThread("test") as thread:
        with pytest.raises(OSError, match="no"):
            await thread.run(fail)
        assert await thread.run(len, "abc") == 3


async def test_a_cancelled_caller_still_gets_the_answer() -> None:
    """Otherwise a descriptor that the call opened would belong to nobody."""
    started, proceed = threading.Event(), threading.Event()
    answers: list[str] = []

    def slow() -> str:
        started.set()
        proceed.wait(5)
        return "opened"

    async def caller() -> None:
        answers.append(await thread.run(slow))
        await trio.lowlevel.checkpoint()
        answers.append("went on")

    async with KernelThread("test") as thread, trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
        proceed.set()
    assert answers == ["opened"]


async def test_a_caller_that_is_already_cancelled_starts_nothing() -> None:
    done: list[int] = []
    async with KernelThread("test") as thread:
        with trio.CancelScope() as scope:
            scope.cancel()
            await thread.run(done.append, 1)
    assert scope.cancelled_caught
    assert done == []


def test_code_without_a_loop_calls_it_too() -> None:
    with KernelThread("test") as thread:
        assert thread.call(os.path.join, "a", "b") == "a/b"
        with pytest.raises(OSError, match="no"):
            thread.call(fail)


async def test_closing_finishes_what_is_queued_and_ends_the_thread() -> None:
    done: list[int] = []
    thread = KernelThread("test")
    native_id = await thread.run(threading.get_native_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, time.sleep, 0.02)
        nursery.start_soon(thread.run, done.append, 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(thread.aclose)
    assert done == [1]
    with trio.fail_after(10):  # joined it is no Python thread any more, and a moment later no task
        while os.path.exists(f"/proc/self/task/{native_id}"):
            await trio.sleep(0.001)


async def test_a_closed_thread_refuses_and_may_be_closed_again() -> None:
    thread = KernelThread("test")
    await thread.aclose()
    await thread.aclose()
    thread.close()
    with pytest.raises(RuntimeError, match="closed"):
        await thread.run(len, "")
    with pytest.raises(RuntimeError, match="closed"):
        thread.call(len, "")
