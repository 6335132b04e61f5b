"""The quickstart's tour: each step shows the command, what it printed, and how long it took.

Run by scripts/quickstart, with a registry behind $TINY and $MANY. It has a state directory of its
own below /var/tmp, so a Sandbox that this machine already has is not touched. However it ends, by
Ctrl-C too, it ends its tasks and its agents before that directory goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from sandbox.client.link import reach
from sandbox.client.place import Place
from sandbox.errors import AgentUnavailable

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = str(ROOT / ".venv/bin/sandbox")
WHO = (
    "id; echo pid $$; echo 'host ids:' $(cat /proc/self/uid_map);"
    " echo 'cgroup:' $(tail -n1 /proc/self/cgroup); echo 'network:' $(ls /sys/class/net)"
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPIN = "while true; do :; done"
EAT = "x=a; while true; do x=$x$x; done"
SURVIVE = "for i in 1 2 3 4 5 6; do echo still here $i; sleep 0.5; done; exit 42"

times: list[tuple[str, float]] = []


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    print(f"\n\033[1m== {title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)
    began = time.monotonic()
    yield
    times.append((title, time.monotonic() - began))


def show(*words: str, expect: int | None = 0) -> None:
    """Run a command of the CLI as a person would type it."""
    typed = (
        shlex.join(words).replace(os.environ["TINY"], "$TINY").replace(os.environ["MANY"], "$MANY")
    )
    print(f"$ sandbox {typed}", flush=True)
    status = subprocess.run([SANDBOX, *words]).returncode
    if status:
        print(f"exit status {status}", flush=True)
    if expect is not None and status != expect:
        sys.exit(f"quickstart: expected exit status {expect}, not {status}")


def ask(*words: str) -> str:
    return subprocess.run([SANDBOX, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def inspect(task: str) -> dict[str, object]:
    found = json.loads(ask("inspect", task))[0]
    assert isinstance(found, dict)
    return found


def start_agent(agents: list[subprocess.Popen[bytes]]) -> None:
    """One more in `agents`, in a group of its own: Ctrl-C is ours, and we end it last."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # or we might leave before we know of it
    try:
        agents.append(
            subprocess.Popen(
                [SANDBOX, "agent"],
                stderr=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
            )
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    wait_until(is_resident, every_s=0.5)  # an ephemeral agent leaves only if it is left alone


def is_resident() -> bool:
    try:
        link, agent = reach(Place.of().socket)
    except AgentUnavailable:
        return False
    link.close()
    return agent.resident


def wait_until(is_so: Callable[[], bool], timeout_s: float = 30, every_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit("quickstart: nothing happened for too long")
        time.sleep(every_s)


def tour(agents: list[subprocess.Popen[bytes]], tiny: str, many: str) -> None:
    with step("What this host can enforce"):
        print("$ sandbox doctor")
        print("\n".join(ask("doctor").splitlines()[-1:]))
    with step("Pull a real image over HTTP, layers in parallel"):
        show("image", "pull", many)
    with step("A task, and who it is"):
        show("run", tiny, "sh", "-c", WHO)
        print("(uid 0 inside is an unprivileged id outside; lo is all the network it has)")
    start_agent(agents)
    with step("A quarter of a cpu is a quarter of a cpu"):
        task = ask(
            "run", "-d", "--cpu", "256", "--stop-timeout", "2", tiny, "sh", "-c", SPIN
        ).strip()
        time.sleep(2)
        show("stats", task)
        subprocess.run([SANDBOX, "stop", task], stdout=subprocess.DEVNULL)
    with step("Memory is a hard limit, and an OOM kill is called one"):
        show("run", "--memory", "512", "--stop-timeout", "2", tiny, "sh", "-c", EAT, expect=137)
    with step("Three containers, one volume, localhost, dependsOn"):
        example = "docs/examples/two_containers.py"
        print(f"$ python {example} $TINY", flush=True)
        state = os.environ["SANDBOX_STATE_DIR"]
        subprocess.run([sys.executable, ROOT / example, tiny, state], check=True)
    with step("kill -9 of the agent: the task lives on, the next agent knows how it ended"):
        survive(agents, tiny)


def survive(agents: list[subprocess.Popen[bytes]], tiny: str) -> None:
    task = ask("run", "-d", "--stop-timeout", "2", tiny, "sh", "-c", SURVIVE).strip()
    wait_until(lambda: bool(ask("logs", task)))
    print(f"$ kill -9 {agents[-1].pid}   # the agent", flush=True)
    agents[-1].kill()
    agents[-1].wait()
    time.sleep(1)
    start_agent(agents)
    wait_until(lambda: inspect(task)["lastStatus"] == "STOPPED")
    show("logs", task)
    containers = inspect(task)["containers"]
    assert isinstance(containers, list)
    print(f"exit code found by the next agent: {containers[0]['exitCode']}")


@contextlib.contextmanager
def agents_of_ours() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Agents, which are ended when the tour ends."""
    agents: list[subprocess.Popen[bytes]] = []
    try:
        yield agents
    finally:
        leave_nothing(agents)


def leave(signum: int, _frame: object) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # once is enough: what follows cleans up
    sys.exit(128 + signum)


def leave_nothing(agents: list[subprocess.Popen[bytes]]) -> None:
    """End all tasks, then all agents, also one that a command started and that is about to leave.

    Whether any is left is told by the lock of the state directory.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    lock = Path(os.environ["SANDBOX_STATE_DIR"], "lock")
    if not lock.exists():
        return
    listed = subprocess.run([SANDBOX, "ps", "--all", "--json"], stdout=subprocess.PIPE).stdout
    tasks = [task["taskId"] for task in json.loads(listed or "[]")]
    if tasks:
        subprocess.run([SANDBOX, "rm", "--force", *tasks], stdout=subprocess.DEVNULL)
    for agent in agents:
        agent.terminate()
        agent.wait()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def main() -> None:
    began = time.monotonic()
    for each in SIGNALS:
        signal.signal(each, leave)
    with tempfile.TemporaryDirectory(prefix="sandbox-quickstart-", dir="/var/tmp") as state:
        os.environ["SANDBOX_STATE_DIR"] = state
        os.environ["SANDBOX_RUN_DIR"] = f"{state}/run"
        with agents_of_ours() as agents:
            tour(agents, os.environ["TINY"], os.environ["MANY"])
    print("\nseconds")
    for title, seconds in times:
        print(f"{seconds:7.1f}  {title}")
    print(f"{time.monotonic() - began:7.1f}  all of it")
    print("\nNext: README.md, docs/guide/, and `sandbox run --help`.")


if __name__ == "__main__":
    main()
