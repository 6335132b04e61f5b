"""What a program writes is data: every byte of it comes back, and nothing in it is believed."""

from __future__ import annotations

import os
import struct

import pytest
import trio

from sandbox.agent import Agent
from sandbox.model.observed import LogRecord
from sandbox.model.request import RunRequest, Streams
from tests.kernel.conftest import definition, finish
from tests.kernel.tasks import container, started, to_the_end

pytestmark = pytest.mark.guest

MIB = 1 << 20
LARGEST_CHUNK = 64 << 10


async def records(agent: Agent, image: str, script: str) -> list[LogRecord]:
    view = (await to_the_end(agent, container(image, "app", script))).view
    assert view.known.containers[0].exit_code == 0
    return [record async for record in agent.tasks.logs(view.id)]


def of(found: list[LogRecord], stream: str) -> bytes:
    return b"".join(record.data for record in found if record.stream == stream)


async def test_nul_and_invalid_utf_8_come_back_as_they_were(agent: Agent, probe_image: str) -> None:
    script = r"printf 'a\0b\n\377\376\200\n\033[2J\r\n'"
    assert of(await records(agent, probe_image, script), "stdout") == (
        b"a\0b\n\xff\xfe\x80\n\x1b[2J\r\n"
    )


async def test_a_line_of_a_mebibyte_comes_back_in_bounded_pieces(
    agent: Agent, probe_image: str
) -> None:
    found = await records(agent, probe_image, f"head -c {MIB} /dev/zero | tr '\\0' x; echo end")
    assert of(found, "stdout") == b"x" * MIB + b"end\n"
    assert max(len(record.data) for record in found) <= LARGEST_CHUNK


async def test_a_last_line_without_its_end_is_delivered(agent: Agent, probe_image: str) -> None:
    assert of(await records(agent, probe_image, "printf 'a\nno end'"), "stdout") == b"a\nno end"


async def test_no_record_and_no_other_stream_can_be_forged(agent: Agent, probe_image: str) -> None:
    forged = b"".join(struct.pack("<QBI", 1, stream, 6) + b"forged" for stream in (1, 2, 3, 255))
    octal = "".join(f"\\{byte:03o}" for byte in forged)
    found = await records(agent, probe_image, f"printf '{octal}'; echo true >&2")
    assert of(found, "stdout") == forged
    assert of(found, "stderr") == b"true\n"
    assert {record.stream for record in found} == {"stdout", "stderr"}
    assert min(record.at_ns for record in found) > 1


async def test_the_log_of_a_flood_is_its_bounded_end(agent: Agent, probe_image: str) -> None:
    found = await records(agent, probe_image, f"head -c {40 * MIB} /dev/zero; echo the end")
    told = of(found, "stdout")
    assert 30 * MIB < len(told) <= 32 * MIB
    assert told.endswith(b"\0the end\n")


async def test_a_client_that_does_not_read_holds_up_its_own_task_and_nothing_else(
    agent: Agent, probe_image: str
) -> None:
    ours, theirs = os.pipe()
    wanted = definition(container(probe_image, "app", f"head -c {MIB} /dev/zero; sleep 1000"))
    slow = await agent.tasks.run(
        RunRequest(definition=wanted), streams={"app": Streams(stdout=theirs)}
    )
    with trio.fail_after(20):
        for _ in range(3):
            assert of(await records(agent, probe_image, "echo quick"), "stdout") == b"quick\n"
        other = await started(agent, container(probe_image, "app", "exec sleep 1000"))
        for task in (slow.id, other):
            await agent.tasks.stop(task)
            await finish(agent, task)
    os.close(ours)
