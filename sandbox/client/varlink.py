"""The client's half of a varlink exchange, without any I/O: what to send, what an answer means."""

from __future__ import annotations

import msgspec

from sandbox.errors import AgentUnavailable
from sandbox.varlink import calls, faults, frames
from sandbox.varlink.calls import Call, R


def question(call: Call[R]) -> bytes:
    """The message that makes the call."""
    return frames.encode(
        frames.Request(
            method=calls.name(type(call)),
            parameters=msgspec.Raw(msgspec.json.encode(call)),
            more=isinstance(call, calls.Stream),
        )
    )


def answer(call: Call[R], frame: frames.Frame) -> tuple[R, bool]:
    """What a message says, and whether another follows; raises what the agent answered instead."""
    frames.close_all(frame.descriptors)  # an agent sends none; one that does shall not leak here
    try:
        reply = msgspec.json.decode(frame.body, type=frames.Reply)
        if reply.error is None:
            kind = calls.reply_type(call)
            return msgspec.json.decode(reply.parameters, type=kind), reply.continues
    except frames.UNREADABLE as error:
        raise AgentUnavailable(f"the agent's answer is not understood: {error}") from None
    raise faults.decode(reply.error, bytes(reply.parameters))


def lost(socket: str) -> AgentUnavailable:
    return AgentUnavailable(f"the agent at {socket} is gone")


def absent(socket: str, reason: str) -> AgentUnavailable:
    return AgentUnavailable(f"no agent answers at {socket}: {reason}")
