"""The binding answers as the kernel does: a value, or an error that names the object."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sandbox.errors import KernelError
from sandbox.kernel import native
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest


def own_namespace(name: str) -> str:
    return os.readlink(f"/proc/thread-self/ns/{name}")


def test_a_thread_that_splits_off_takes_no_other_thread_with_it() -> None:
    before = own_namespace("uts")
    with KernelThread("test") as thread:
        home = os.open("/proc/thread-self/ns/uts", os.O_RDONLY)
        thread.call(native.unshare, native.CLONE_NEWUTS)
        assert thread.call(own_namespace, "uts") != before
        assert own_namespace("uts") == before
        thread.call(native.setns, home, native.CLONE_NEWUTS)
        assert thread.call(own_namespace, "uts") == before
        os.close(home)


def test_errors_name_the_call_and_what_the_descriptor_was(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(KernelError) as refused:
        native.setns(fd, native.CLONE_NEWNET)
    os.close(fd)
    error = refused.value
    assert (error.call, error.subject, error.errno) == ("setns", str(tmp_path), errno.EINVAL)


def test_a_mount_context_explains_itself() -> None:
    context = native.fsopen("tmpfs")
    with pytest.raises(KernelError, match=r"fsconfig size .*tmpfs: Bad value for 'size'"):
        native.fsconfig_string(context, "size", "much")
    os.close(context)


@pytest.mark.parametrize("name", ["a\0b", b"a\0b"])
def test_a_name_with_nul_is_refused_and_never_cut_short(name: str | bytes) -> None:
    with pytest.raises(KernelError) as refused:
        native.openat2(native.AT_FDCWD, name, os.O_PATH)
    assert refused.value.errno == errno.EINVAL


def test_descriptors_are_closed_on_exec(tmp_path: Path) -> None:
    here = native.openat2(native.AT_FDCWD, str(tmp_path), os.O_PATH)
    pidfd = os.pidfd_open(os.getpid())
    found = [
        here,
        native.open_tree(here, "", native.OPEN_TREE_CLONE | native.AT_EMPTY_PATH),
        native.fsopen("tmpfs"),
        native.pidfd_getfd(pidfd, here),
        native.bpf_device_program(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)),
    ]
    assert not any(os.get_inheritable(fd) for fd in found)
    for fd in (*found, pidfd):
        os.close(fd)


def test_a_range_of_descriptors_is_closed_and_no_other() -> None:
    first = os.open("/", os.O_PATH)
    base = os.sysconf("SC_OPEN_MAX") - 10
    for number in range(base, base + 4):
        os.dup2(first, number)
    native.close_range(base + 1, base + 2)
    is_open = [os.path.exists(f"/proc/self/fd/{n}") for n in range(base, base + 4)]
    assert is_open == [True, False, False, True]
    for fd in (first, base, base + 3):
        os.close(fd)


def test_file_systems_are_told_apart_by_their_magic() -> None:
    for path, magic in (("/proc", native.PROC_SUPER_MAGIC), ("/sys", native.SYSFS_MAGIC)):
        fd = os.open(path, os.O_PATH)
        assert native.fstatfs_magic(fd) == magic
        os.close(fd)


def test_a_device_program_that_is_none_is_refused() -> None:
    for insns in (b"x", bytes(8), b""):
        with pytest.raises(KernelError, match="bpf_prog_load"):
            native.bpf_device_program(insns)


def test_a_call_that_waits_does_not_hold_up_other_threads(tmp_path: Path) -> None:
    """Opening a FIFO blocks until somebody writes: here, only if this thread may go on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened: list[int] = []
    reader = threading.Thread(
        target=lambda: opened.append(native.openat2(native.AT_FDCWD, str(fifo), os.O_RDONLY))
    )
    reader.start()
    time.sleep(0.02)
    writer = os.open(fifo, os.O_WRONLY)
    reader.join(5)
    assert opened
    os.close(writer)
    os.close(opened[0])


TELL = """
import os
for fd in (3, 4, 5):
    os.write(fd, b"%d" % fd)
held = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
others = [fd for fd in range(6, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
status = open("/proc/self/status").read().split()
blocked = status[status.index("SigBlk:") + 1]
environment = open("/proc/self/environ").read()
os.write(5, f" {held} {others} {blocked} [{environment}]".encode())
"""


def test_a_program_begins_with_what_it_was_given_and_nothing_else() -> None:
    """Each descriptor stands where another shall be: in a process where 3, 4 and 5 are free."""
    script = (
        "import os, sys; from sandbox.kernel import native; os.closerange(3, 64);"
        "fds = [os.memfd_create(name) for name in 'abc']; assert fds == [3, 4, 5];"
        "python = sys.executable;"
        "child = native.Spawned(python, [python, '-IS', '-c', sys.argv[1]], [5, 3, 4]);"
        "assert os.waitpid(child.pid, 0)[1] == 0;"
        "print([os.pread(fd, 1000, 0).decode() for fd in fds])"
    )
    command = [sys.executable, "-c", script, TELL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == repr(["4", f"5 {['/dev/null'] * 3} [] fffffffffffbfeff []", "3"]) + "\n"


def test_why_a_program_did_not_begin_is_known(tmp_path: Path) -> None:
    child = native.Spawned(str(tmp_path / "none"), ["none"], [])
    assert os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) == 127
    assert child.errno == errno.ENOENT
    child.settle()
