"""A process that ends while it is asked about is one that is gone, and no error."""

from __future__ import annotations

import os
import threading
import time

from sandbox.errors import KernelError
from sandbox.kernel.processes import start_time

RACE_S = 1.5
"""In three of four runs of it the kernel said ESRCH at open(2), before that was understood."""


def test_a_process_that_ends_while_it_is_asked_about_is_gone() -> None:
    wrong: list[KernelError] = []
    latest = os.getpid()
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                start_time(latest)
            except KernelError as error:
                wrong.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + RACE_S
    while time.monotonic() < until:
        latest = os.posix_spawn("/bin/true", ["true"], {})
        os.waitpid(latest, 0)
    is_over.set()
    for thread in asking:
        thread.join()
    assert wrong == []
