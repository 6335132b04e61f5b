"""A task's `known` row while its supervisor lives: changed here, written when others must know.

One writer: the supervisor and what it owns. Facts of this host are not synced to disk: they survive
a kill of the agent, and a power cut ends the containers that they are about anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sandbox.kernel.processes import age
from sandbox.model.task import ContainerKnown, TaskKnown
from sandbox.runtime.node import Failpoints
from sandbox.runtime.ordering import Facts
from sandbox.store import rows
from sandbox.store.base import Store


class Record:
    def __init__(self, store: Store, known: TaskKnown, failpoints: Failpoints) -> None:
        self._store = store
        self._failpoints = failpoints
        self.known = known
        self.restarting: set[str] = set()
        """Containers that ended and are about to be started again: not ended for good."""

    def container(self, name: str) -> ContainerKnown:
        return next(c for c in self.known.containers if c.name == name)

    def live(self) -> list[str]:
        return [
            c.name
            for c in self.known.containers
            if c.last_status == "RUNNING" or c.name in self.restarting
        ]

    @property
    def is_stopping(self) -> bool:
        return self.known.stop_code is not None

    def change(self, **changes: Any) -> None:
        """Of the task; written with the next `save`."""
        self.known = msgspec.structs.replace(self.known, **changes)

    def note(self, name: str, **changes: Any) -> None:
        """Of one container; written with the next `save`."""
        self.change(
            containers=tuple(
                msgspec.structs.replace(c, **changes) if c.name == name else c
                for c in self.known.containers
            )
        )

    def note_never_started(self) -> None:
        """The task ends: what waits for its start waits no more."""
        for container in self.known.containers:
            if container.last_status == "PENDING":
                self.note(container.name, last_status="STOPPED")

    def save(self, **changes: Any) -> None:
        """Not waited for: whoever reads the store sees the changes in order, a moment later."""
        self.change(**{"raised_event": False} | changes)
        self._store.post({rows.known_key(self.known.id): self.known})
        self._failpoints.reach(f"known.{self.known.last_status.name.lower()}")

    def save_event(self, version: int, **changes: Any) -> None:
        """A change that raises an event: each has a higher version than the one before."""
        self.save(version=max(self.known.version + 1, version), raised_event=True, **changes)

    def settle(self) -> None:
        """What was saved is in the store from now on."""
        self._store.flush()

    def facts(self) -> Mapping[str, Facts]:
        """What `ordering` decides by."""
        return {
            c.name: Facts(
                started=c.started_at is not None,
                ended=c.last_status == "STOPPED" and c.name not in self.restarting,
                exit_code=c.exit_code,
                health=c.health,
                reason=c.reason,
                age_s=age(c.keeper.init_start_time) if c.keeper else 0.0,
            )
            for c in self.known.containers
        }
