"""A file system of a limited size: bounded, told truly, as good as new when it is used again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel import filesystems, loop, mounts
from sandbox.kernel.filesystems import Filesystem, FilesystemPool
from sandbox.kernel.thread import KernelThread
from tests.kernel.conftest import until
from tests.leaks import loop_devices

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    file = tmp_path / "empty"
    filesystems.template(file, SIZE)
    return file


@pytest.fixture
def made(tmp_path: Path, empty: Path) -> Iterator[Filesystem]:
    filesystem = filesystems.make(tmp_path / "made", empty)
    yield filesystem
    filesystem.close()


def let_go(directory: Path) -> bool:
    """No device has a file there; a mount namespace that ends lets go a little later."""
    deadline = time.monotonic() + 5
    while is_used := any(str(directory) in device for device in loop_devices()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return not is_used


def fill(path: Path, size_bytes: int) -> int:
    """How much could be written."""
    done = 0
    with path.open("wb", buffering=0) as file:
        try:
            while done < size_bytes:
                done += file.write(bytes(MIB))
            os.fsync(file.fileno())
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return done


def test_it_holds_its_size_and_then_answers_enospc(made: Filesystem) -> None:
    usage = made.usage()
    assert SIZE <= usage.size_bytes < SIZE * 1.01
    assert usage.used_bytes < 64 << 10
    wrote = fill(made.path / "big", 2 * SIZE)
    assert SIZE * 0.95 < wrote < SIZE
    assert made.usage().used_bytes > SIZE * 0.95


def test_what_is_empty_takes_nothing_of_the_host_and_what_is_deleted_comes_back(
    made: Filesystem,
) -> None:
    before = made.allocated_bytes()
    assert before < MIB
    fill(made.path / "big", SIZE // 2)
    assert made.allocated_bytes() > SIZE // 2
    (made.path / "big").unlink()
    assert made.allocated_bytes() < before + MIB


def test_what_is_reserved_counts_and_takes_nothing(made: Filesystem) -> None:
    before, allocated = made.usage().used_bytes, made.allocated_bytes()
    made.reserve("images", SIZE // 2)
    assert made.usage().used_bytes - before >= SIZE // 2
    assert made.reserved_bytes("images") == SIZE // 2
    assert made.allocated_bytes() < allocated + MIB
    with pytest.raises(KernelError) as refused:
        made.reserve("more", SIZE)
    assert refused.value.errno == errno.ENOSPC


def test_it_is_not_among_the_hosts_mounts_and_its_device_goes_with_it(
    tmp_path: Path, empty: Path
) -> None:
    made = filesystems.make(tmp_path / "made", empty)
    assert any(str(tmp_path / "made") in device for device in loop_devices())
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    made.close()
    assert let_go(tmp_path)


def test_a_part_of_it_outlives_it(tmp_path: Path, empty: Path) -> None:
    made = filesystems.make(tmp_path / "made", empty)
    (made.path / "volumes/data").mkdir(parents=True)
    (made.path / "volumes/data/file").write_text("kept")
    part = mounts.part(made.mount_fd, "volumes/data", made.again)
    made.close()
    assert Path(f"/proc/self/fd/{part}/file").read_text() == "kept"
    os.close(part)
    assert let_go(tmp_path)


def test_the_ways_of_older_kernels_give_the_same(
    tmp_path: Path, empty: Path, made: Filesystem
) -> None:
    (made.path / "app/upper").mkdir(parents=True)
    (made.path / "app/work").mkdir()
    with ExitStack() as opened, KernelThread("part") as first, KernelThread("overlay") as second:

        def kept(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        part = kept(first.call(lambda: mounts._part_by_name("app/upper", made.again)))
        upper, work, below = (
            kept(os.open(path, os.O_PATH | os.O_DIRECTORY))
            for path in (made.path / "app/upper", made.path / "app/work", tmp_path)
        )
        layers = [kept(mounts.clone(below))]
        merged = kept(
            second.call(lambda: mounts._overlay_by_name(layers, upper, work, True, made.again))
        )
        Path(f"/proc/self/fd/{merged}/written").write_text("once")
        assert Path(f"/proc/self/fd/{part}/written").read_text() == "once"
        assert (made.path / "app/upper/written").read_text() == "once"


def test_who_opens_it_again_finds_the_same_while_it_is_used_and_after(
    tmp_path: Path, empty: Path
) -> None:
    file = tmp_path / "made"
    first = filesystems.make(file, empty)
    (first.path / "a").write_text("one cache")
    second = filesystems.reopen(file)
    assert second.device == first.device
    assert (second.path / "a").read_text() == "one cache"
    first.close()
    second.close()
    with loop.found(file) as device:
        assert device is None
    third = filesystems.reopen(file)
    assert (third.path / "a").read_text() == "one cache"
    third.close()


def test_it_can_be_dropped_without_writing_what_is_dirty(tmp_path: Path, empty: Path) -> None:
    made = filesystems.make(tmp_path / "made", empty)
    before = made.allocated_bytes()
    (made.path / "dirty").write_bytes(bytes(SIZE // 2))
    file = os.open(tmp_path / "made", os.O_RDONLY)
    made.drop()
    assert os.fstat(file).st_blocks * 512 < before + MIB
    os.close(file)


def test_a_process_that_is_killed_leaves_no_device(tmp_path: Path, empty: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sandbox.kernel import filesystems;"
        "made = filesystems.make(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print('made', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "made"), str(empty)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"made\n"
        assert any(str(tmp_path) in device for device in loop_devices())
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert let_go(tmp_path)


def test_a_failure_leaves_no_file_and_no_device(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(MIB))
    with pytest.raises(KernelError, match="fsconfig"):
        filesystems.make(tmp_path / "made", garbage)
    assert not (tmp_path / "made").exists()
    with pytest.raises(KernelError, match="open"):
        filesystems.make(tmp_path / "made", tmp_path / "nothing")
    assert not (tmp_path / "made").exists()


def test_mkfs_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"mkfs\.ext4 .*Device size reported to be zero"):
        filesystems._mkfs(tmp_path)


# The reserve -----------------------------------------------------------------------------------


@pytest.fixture
async def pool(tmp_path: Path) -> Iterator[FilesystemPool]:  # type: ignore[misc]
    pool = FilesystemPool(tmp_path / "reserve", SIZE, 2)
    pool.sweep()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.serve)
        await until(lambda: pool.ready == 2)
        yield pool
        nursery.cancel_scope.cancel()
    assert all(file.suffix == ".empty" for file in (tmp_path / "reserve").iterdir())


async def test_one_of_the_reserve_is_given_its_name_and_the_next_one_made(
    pool: FilesystemPool, tmp_path: Path
) -> None:
    devices = len(loop_devices())
    taken = await pool.take(tmp_path / "mine", SIZE)
    assert len(loop_devices()) == devices, "nothing was attached on request"
    assert os.fstat(taken.file_fd).st_ino == (tmp_path / "mine").stat().st_ino
    await until(lambda: pool.ready == 2)
    pool.give_back(tmp_path / "mine", taken, is_empty=True)
    assert pool.ready == 3
    assert not (tmp_path / "mine").exists()


async def test_what_comes_back_empty_is_used_again_and_looks_like_new(
    pool: FilesystemPool, tmp_path: Path
) -> None:
    first = await pool.take(tmp_path / "mine", SIZE)
    fresh = first.usage().used_bytes
    (first.path / "secret").write_text("of the first")
    os.sync()
    (first.path / "secret").unlink()
    pool.give_back(tmp_path / "mine", first, is_empty=True)
    again = await pool.take(tmp_path / "other", SIZE)
    assert again is first
    assert [entry.name for entry in again.path.iterdir()] == ["lost+found"]
    assert again.usage().used_bytes == fresh
    pool.give_back(tmp_path / "other", again, is_empty=True)


@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
async def test_one_that_is_full_or_of_another_size_is_not_used_again(
    size: int, pool: FilesystemPool, tmp_path: Path
) -> None:
    taken = await pool.take(tmp_path / "mine", size)
    fill(taken.path / "big", 20 * MIB)
    pool.give_back(tmp_path / "mine", taken, is_empty=True)
    assert not (tmp_path / "mine").exists()
    await until(lambda: not any(f"{tmp_path}/mine" in device for device in loop_devices()))


async def test_what_comes_back_after_the_end_goes_at_once(tmp_path: Path) -> None:
    pool = FilesystemPool(tmp_path / "reserve", SIZE, 1)
    pool.sweep()
    taken = await pool.take(tmp_path / "mine", SIZE)
    await pool.aclose()
    pool.give_back(tmp_path / "mine", taken, is_empty=True)
    assert let_go(tmp_path)


async def test_a_directory_that_is_gone_fails_the_request_and_not_the_reserve(
    pool: FilesystemPool, tmp_path: Path
) -> None:
    with pytest.raises(KernelError, match="rename"):
        await pool.take(tmp_path / "nowhere" / "mine", SIZE)
    assert pool.ready == 2


def test_a_sweep_deletes_what_was_kept_ready_and_keeps_the_template(tmp_path: Path) -> None:
    (tmp_path / "1.ext4").touch()
    (tmp_path / f"{SIZE}.empty").touch()
    FilesystemPool(tmp_path, SIZE, 2).sweep()
    assert [file.name for file in tmp_path.iterdir()] == [f"{SIZE}.empty"]
