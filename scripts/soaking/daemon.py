"""The agent under test: `sandbox agent` as a process of its own, killed and started again.

A command that finds no agent starts one for itself. So while the daemon is away another one may
come first, and the daemon waits until that one leaves; it gives up after a while, and is started
again, as a service manager would.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

SANDBOX = str(Path(sys.executable).parent / "sandbox")
ANSWERS_S = 60.0
ENDS_S = 30.0
LOOK_S = 0.05
LEAVES_S = 0.5
"""An agent that a command started leaves a fifth of a second after its last client."""
GAVE_WAY = "another agent holds"
WARM_SLOTS = 4


class Daemon:
    """`ended` is told of each agent that ends."""

    def __init__(self, directory: Path, ended: Callable[[], None]) -> None:
        self.state = directory / "state"
        self.socket = directory / "run/agent.sock"
        self.environment = {
            **os.environ,
            "SANDBOX_STATE_DIR": str(self.state),
            "SANDBOX_RUN_DIR": str(self.socket.parent),
        }
        self._config = directory / "agent.toml"
        self._config.write_text(f"warm_slots = {WARM_SLOTS}\nstopped_tasks_kept = 1000000\n")
        self._log = directory / "agent.log"
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self.answers = trio.Event()
        """Set while it answers, as far as is known."""
        self.unasked: list[str] = []
        """Ends that nobody asked for."""
        self.peak_rss_mib = 0

    def start(self) -> None:
        """Nothing if it lives."""
        if self._process is not None:
            return
        command = [SANDBOX, "agent", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def attend(self) -> None:
        """See when it answers, and start it again when it has ended by itself."""
        while True:
            await trio.sleep(LOOK_S)
            self.measure()
            self._revive()
            if not self.answers.is_set() and self._process is not None:
                listener = listener_of(self.socket)
                if listener == self._process.pid:
                    self.answers.set()
                elif listener is not None:
                    await trio.sleep(LEAVES_S)  # whoever asks it keeps it there

    async def ready(self) -> None:
        """Wait until the daemon itself answers; TooSlowError if it does not."""
        with trio.fail_after(ANSWERS_S):
            await self.answers.wait()

    def _answers_no_more(self) -> None:
        if self.answers.is_set():  # else somebody waits for this one
            self.answers = trio.Event()

    async def end(self, number: int) -> int:
        """Send a signal that ends it; its exit status, -9 also if it had to be made to."""
        assert self._process is not None
        process, self._process = self._process, None
        self._answers_no_more()
        process.send_signal(number)
        with trio.move_on_after(ENDS_S):
            while process.poll() is None:
                await trio.sleep(0.01)
        process.kill()
        self._ended()
        return process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _revive(self) -> None:
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return
        self._process = None
        self._answers_no_more()
        said = self._log.read_text().splitlines()[-1:]
        if GAVE_WAY not in "".join(said):
            self.unasked.append(f"an agent ended by itself with {status}: {said}")
        self._ended()
        self.start()

    def descriptors(self) -> int:
        assert self._process is not None
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def measure(self) -> None:
        if self._process is None:
            return
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            rss_kib = next(line.split()[1] for line in status if line.startswith("VmRSS:"))
            self.peak_rss_mib = max(self.peak_rss_mib, int(rss_kib) >> 10)

    def complaints(self) -> list[str]:
        """What all agents have logged as an error; a line may be cut off by a SIGKILL."""
        found = []
        for line in self._log.read_text().splitlines():
            try:
                level = json.loads(line).get("level", "")
            except (ValueError, AttributeError):
                level = "" if line.startswith("{") or GAVE_WAY in line else "none"
            if level in ("error", "critical", "exception", "none"):
                found.append(line[:2000])
        return found


def listener_of(path: Path) -> int | None:
    """The process that listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return None
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[0])
