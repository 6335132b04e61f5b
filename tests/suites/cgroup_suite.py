"""What a cgroup must do, on every kind of host.

A subclass gives the fixture `tree`, an opened CgroupTree of an instance of its own; the suite asks
for effects that a task or a user sees, never for files. Children join as a task's first process
does: by their own writes.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel.cgroups import Cgroup, CgroupTree, Limits, Members

MIB = 1 << 20
PATIENCE_S = 20.0

JOIN = """
import os, sys
directory, tasks = int(sys.argv[1]), [int(fd) for fd in sys.argv[2].split(",") if fd]
os.write(os.open("cgroup.procs", os.O_WRONLY, dir_fd=directory), b"0")
for fd in tasks:
    os.write(fd, b"0")
exec(sys.argv[3])
"""

SPIN = "while True: pass"
HOLD = "import time; time.sleep(600)"
EAT_MEMORY = "held = b'x' * (96 << 20)"
SAY_READY = "print('ready', flush=True)\n"


class KillSuite:
    """How a cgroup is ended, by whatever means the kernel has."""

    async def test_a_fork_bomb_is_killed_whole(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits(pids_max=40))
        bomb = """
while True:
    try: os.fork()
    except OSError: pass
"""
        with inside(group, bomb):
            await eventually(lambda: group.stats().pids == 40)
            group.kill()
            assert await group.wait_empty(PATIENCE_S)
            assert group.pids() == []
        group.remove()
        assert tree.find(group.name) is None

    async def test_killing_a_task_kills_its_containers(self, tree: CgroupTree) -> None:
        task = tree.create("task-1", Limits())
        web = tree.create("task-1/web", Limits())
        with inside(web, SAY_READY + HOLD, ready=True) as child:
            assert task.pids() == web.pids() == [child.pid]
            task.kill()
            assert child.wait(PATIENCE_S) == -9
            assert await task.wait_empty(PATIENCE_S)
        release(web, task)

    async def test_a_frozen_cgroup_can_be_killed(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits())
        with inside(group, SAY_READY + SPIN, ready=True) as child:
            group.freeze()
            await eventually(group.is_frozen)
            group.kill()
            assert child.wait(PATIENCE_S) == -9
            assert await group.wait_empty(PATIENCE_S)
        release(group)

    async def test_what_is_in_a_nest_is_ended_apart_and_limited_with_the_rest(
        self, tree: CgroupTree
    ) -> None:
        group = leaf(tree, Limits(pids_max=40))
        nest = group.nest("exec.1")
        with inside(group, SAY_READY + HOLD, ready=True) as first:
            with inside(group, SAY_READY + HOLD, ready=True, nest=nest) as second:
                assert sorted(group.pids()) == sorted([first.pid, second.pid])
                assert nest.pids() == [second.pid]
                assert group.stats().pids == 2
                with pytest.raises(KernelError) as caught:
                    nest.remove()
                assert caught.value.errno == errno.EBUSY
                with closing(group.find_nest("exec.1")) as found:
                    found.kill()
                assert second.wait(PATIENCE_S) == -9
                assert await nest.wait_empty(PATIENCE_S)
                nest.remove()
            assert first.poll() is None
            group.nest("exec.2").close()
        group.remove()  # with the nest that nobody removed
        nest.kill()
        nest.remove()

    async def test_ending_what_is_gone_is_no_error(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits())
        other = tree.find(group.name)
        assert other is not None
        other.populated()
        group.remove()
        other.kill()
        assert await other.wait_empty(1)
        assert not other.populated()
        assert other.pids() == []
        other.remove()


class CgroupSuite(KillSuite):
    """Needs root, and the fixture `tree`."""

    def test_memory_beyond_the_limit_is_an_oom_kill_that_is_counted(self, tree: CgroupTree) -> None:
        task = tree.create("task-1", Limits())
        web = tree.create("task-1/web", Limits(memory_max=48 * MIB))
        with inside(web, EAT_MEMORY) as child:
            assert child.wait(PATIENCE_S) == -9
        assert web.oom_kills() == 1
        assert task.oom_kills() == 1
        assert web.stats().memory_peak_bytes <= 48 * MIB
        release(web, task)

    def test_the_limit_of_a_task_holds_for_the_sum_of_its_containers(
        self, tree: CgroupTree
    ) -> None:
        task = tree.create("task-1", Limits(memory_max=64 * MIB))
        idle = tree.create("task-1/idle", Limits())
        hungry = tree.create("task-1/hungry", Limits())
        with inside(idle, "held = b'x' * (8 << 20);" + SAY_READY + HOLD, ready=True):
            with inside(hungry, EAT_MEMORY) as child:
                assert child.wait(PATIENCE_S) == -9
            assert hungry.oom_kills() == 1
            assert idle.oom_kills() == 0
            assert task.oom_kills() == 1
        release(idle, hungry, task)

    def test_a_cpu_quota_throttles(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits(cpu_quota_us=20_000))
        with inside(group, SPIN):
            time.sleep(2)
            stats = group.stats()
        assert stats.cpu_throttled_periods > 3
        assert stats.cpu_periods >= stats.cpu_throttled_periods
        assert 0 < stats.cpu_usage_ns < 1_000_000_000
        release(group)

    def test_cpu_time_is_shared_by_weight(self, tree: CgroupTree) -> None:
        tree.create("task-1", Limits())
        light = tree.create("task-1/light", Limits(cpu_weight=100))
        heavy = tree.create("task-1/heavy", Limits(cpu_weight=400))
        on_one_cpu = f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n{SPIN}"
        with inside(light, on_one_cpu), inside(heavy, on_one_cpu):
            time.sleep(2)
            ratio = heavy.stats().cpu_usage_ns / light.stats().cpu_usage_ns
        assert 2 < ratio < 8
        release(light, heavy)

    def test_processes_are_limited(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits(pids_max=5))
        count_forks = """
forks = 0
try:
    while True:
        if os.fork() == 0:
            import time; time.sleep(600)
        forks += 1
except BlockingIOError:
    print(forks, flush=True)
"""
        with inside(group, count_forks) as child:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == 4
        release(group)

    async def test_a_frozen_cgroup_does_not_run_and_thaws(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits())
        with inside(group, SAY_READY + SPIN, ready=True):
            group.freeze()
            await eventually(group.is_frozen)
            before = group.stats().cpu_usage_ns
            await trio.sleep(0.3)
            assert group.stats().cpu_usage_ns == before
            group.thaw()
            await eventually(lambda: group.stats().cpu_usage_ns > before)
        release(group)

    async def test_the_end_of_the_last_process_is_noticed_at_once(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits())
        with inside(group, SAY_READY + HOLD, ready=True) as child:
            assert group.populated()
            assert not await group.wait_empty(0.05)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_soon, child)
                with trio.fail_after(PATIENCE_S):
                    assert await group.wait_empty(600)
            assert not group.populated()
        release(group)

    def test_stats_count_what_was_used(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits(memory_max=512 * MIB, pids_max=30))
        before = group.stats()
        assert (before.pids, before.cpu_usage_ns, before.oom_kills) == (0, 0, 0)
        with inside(group, "held = b'x' * (16 << 20);" + SAY_READY + HOLD, ready=True):
            during = group.stats()
        assert during.pids == 1
        assert during.cpu_usage_ns > 0
        assert 16 * MIB < during.memory_bytes <= during.memory_peak_bytes < 100 * MIB
        assert during.memory_max_bytes == 512 * MIB
        release(group)

    def test_limits_move_up_down_and_away(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits(memory_max=64 * MIB))
        for size in (128 * MIB, 32 * MIB, None, 48 * MIB):
            group.set(Limits(memory_max=size, cpu_quota_us=50_000, cpu_weight=300, pids_max=9))
            assert group.stats().memory_max_bytes == size
        group.set(Limits())
        assert group.stats().memory_max_bytes is None
        with inside(group, EAT_MEMORY) as child:
            assert child.wait(PATIENCE_S) == 0
        release(group)

    def test_creating_again_reuses_and_sets_the_limits(self, tree: CgroupTree) -> None:
        first = leaf(tree, Limits(memory_max=64 * MIB, pids_max=3))
        with inside(first, SAY_READY + HOLD, ready=True) as child:
            again = tree.create(first.name, Limits(memory_max=96 * MIB))
            assert again.pids() == [child.pid]
            assert again.stats().memory_max_bytes == 96 * MIB
        release(first, again)

    def test_names_lists_tasks_and_containers_and_find_finds_them(self, tree: CgroupTree) -> None:
        assert tree.names() == []
        for name in ("task-b", "task-a", "task-a/web", "task-a/tasks"):
            tree.create(name, Limits())
        assert sorted(tree.names()) == ["task-a", "task-a/tasks", "task-a/web", "task-b"]
        found = tree.find("task-a/tasks")
        assert found is not None
        with inside(found, SAY_READY + HOLD, ready=True) as child:
            assert found.pids() == [child.pid]
        assert tree.find("task-c") is None
        release(found)

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "web",
            "task-",
            "task-1/",
            "task-1/../..",
            "task-1/a/b",
            "../task-1",
            "task-.",
            "task-1/cgroup.procs",
        ],
    )
    def test_a_name_that_could_mean_something_else_is_refused(
        self, tree: CgroupTree, name: str
    ) -> None:
        with pytest.raises(KernelError):
            tree.create(name, Limits())
        with pytest.raises(KernelError):
            tree.find(name)

    def test_a_container_without_its_task_is_refused(self, tree: CgroupTree) -> None:
        with pytest.raises(KernelError) as caught:
            tree.create("task-1/web", Limits())
        assert caught.value.errno == errno.ENOENT

    def test_removing_takes_the_containers_along_and_may_be_repeated(
        self, tree: CgroupTree
    ) -> None:
        task = tree.create("task-1", Limits())
        web = tree.create("task-1/web", Limits())
        task.remove()
        assert tree.names() == []
        for group in (web, task):
            group.remove()

    def test_what_is_busy_is_not_removed_even_in_part(self, tree: CgroupTree) -> None:
        group = leaf(tree, Limits())
        idle = tree.create("task-1/idle", Limits())
        with inside(group, SAY_READY + HOLD, ready=True):
            task = tree.find("task-1")
            assert task is not None
            for remove in (group.remove, task.remove, tree.remove):
                with pytest.raises(KernelError) as caught:
                    remove()
                assert caught.value.errno == errno.EBUSY
            assert sorted(tree.names()) == ["task-1", "task-1/idle", "task-1/web"]
            assert idle.stats().pids == 0
        release(group, idle, task)

    def test_every_descriptor_is_closed_on_exec_and_by_close(self, tree: CgroupTree) -> None:
        before = descriptors()
        group = leaf(tree, Limits(memory_max=64 * MIB))
        assert descriptors() == before
        group.stats(), group.populated(), group.pids(), group.directory_fd, group.tasks_fds
        opened = descriptors() - before
        assert opened
        assert not any(os.get_inheritable(fd) for fd in opened)
        group.close()
        assert descriptors() == before
        assert group.stats().memory_max_bytes == 64 * MIB
        group.remove()
        assert descriptors() == before

    def test_only_harmless_devices_open(self, tree: CgroupTree, tmp_path: Path) -> None:
        group = leaf(tree, Limits())
        attempt = f"""
def errno_of(call):
    try: call()
    except OSError as error: return error.errno
    return 0
print(*[errno_of(call) for call in (
    lambda: os.open("/dev/null", os.O_RDWR),
    lambda: os.open("/dev/urandom", os.O_RDONLY),
    lambda: os.open("/dev/ptmx", os.O_RDWR),
    lambda: os.open("/dev/kmsg", os.O_RDONLY),
    lambda: os.mknod("{tmp_path}/null", {stat.S_IFCHR | 0o600}, os.makedev(1, 3)),
    lambda: os.mknod("{tmp_path}/disk", {stat.S_IFBLK | 0o600}, os.makedev(7, 0)),
    lambda: os.mknod("{tmp_path}/whiteout", {stat.S_IFCHR}, 0),
)])
"""
        with inside(group, attempt) as child:
            output, _ = child.communicate(timeout=PATIENCE_S)
        assert [int(number) for number in output.split()] == [
            *(0, 0, 0),
            *(errno.EPERM, errno.EPERM, errno.EPERM),
            0,
        ]
        release(group)


def leaf(tree: CgroupTree, limits: Limits) -> Cgroup:
    """A container's cgroup with these limits in a task without any."""
    tree.create("task-1", Limits())
    return tree.create("task-1/web", limits)


def release(*groups: Cgroup) -> None:
    for group in groups:
        group.close()


@contextmanager
def inside(
    group: Cgroup, code: str, *, ready: bool = False, nest: Members | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run Python `code` in the cgroup; end whatever is left there afterwards."""
    place = nest or group
    tasks = ",".join(str(fd) for fd in group.tasks_fds)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", JOIN, str(place.directory_fd), tasks, code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        pass_fds=(place.directory_fd, *group.tasks_fds),
    )
    with child:
        try:
            if ready:
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()
            place.kill()


async def end_soon(child: subprocess.Popen[str]) -> None:
    await trio.sleep(0.05)
    child.kill()


async def eventually(claim: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not claim():
            await trio.sleep(0.01)


def descriptors() -> set[int]:
    """The open descriptors of this process, without the one that lists them."""
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}")}
