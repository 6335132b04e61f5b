"""What a task sees and may do, by what a program inside of it reports.

The probe gets in by every way there is: as the first process of a container with each option that
matters, by an exec, as a health check. The agent is started by an odd parent: other signals are
ignored and blocked, it has another priority, umask, groups, directories open, and secrets in its
environment. None of that may show inside, and all ways must look the same where they should.

An expectation stands here as one sentence, its test's name; docs/isolation.md lists them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, ENOSYS, ENXIO, EPERM, EROFS
from pathlib import Path
from typing import Any

import pytest

from sandbox.kernel import capabilities
from tests.conftest import leaving_nothing
from tests.kernel.probe_image import ROOT, Report, differences
from tests.kernel.probe_tasks import WAYS

pytestmark = [pytest.mark.guest, pytest.mark.only_reads]

PEOPLE = {
    "user": (1000, 1000, 1000, 1000),
    "exec as user": (1000, 1000, 1000, 1000),
    "set-uid": (1000, 0, 0, 0),
}
"""Real, effective, saved and file system uid where they are not 0."""

EXECS = ("exec", "exec as user", "exec in terminal", "health check")
EVERY_WAY = [*WAYS, "first", "second", *EXECS]
TERMINALS = ("terminal", "exec in terminal")
SECRET = "SECRET_OF_THE_AGENT"

# User Mode Linux makes something else of int 0x80.
HAS_I386 = (
    platform.machine() == "x86_64" and "User Mode Linux" not in Path("/proc/cpuinfo").read_text()
)
ABIS = ("native", "i386") if HAS_I386 else ("native",)

DEFAULT = capabilities.mask(capabilities.DEFAULT)

MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
THROTTLES = tuple(map(str, Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle")))
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

MOUNTS = {
    "/": ("overlay", {"rw", "nodev"}),
    "/proc": ("proc", {"rw", "nosuid", "nodev", "noexec"}),
    "/dev": ("tmpfs", {"rw", "nosuid", "noexec"}),
    "/dev/pts": ("devpts", {"rw", "nosuid", "noexec"}),
    "/dev/shm": ("tmpfs", {"rw", "nosuid", "nodev", "noexec"}),
    "/dev/mqueue": ("mqueue", {"rw", "nosuid", "nodev", "noexec"}),
    "/sys": ("sysfs", {"ro", "nosuid", "nodev", "noexec"}),
    "/sys/fs/cgroup": ("cgroup2", {"ro", "nosuid", "nodev", "noexec"}),
}
"""Besides the nodes of /dev and what is masked or read-only: type and flags."""

NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}
LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/ptmx": "pts/ptmx",
}


def be_odd() -> None:
    """In the agent's process, before it is executed."""
    for number in (signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1, signal.SIGRTMIN + 5):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMAX})
    os.umask(0o027)
    os.setgroups([4, 27, 1000])
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(3)


@pytest.fixture(scope="module")
def collected(probe_image: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("agent")
    program = (sys.executable, "-m", "tests.kernel.probe_tasks", probe_image, str(directory))
    with leaving_nothing(), socket.socket(socket.AF_UNIX) as of_the_host, stray_directory() as fd:
        of_the_host.bind(f"\0sandbox-test-{os.getpid()}")
        done = subprocess.run(
            [*program, *THROTTLES, "/proc/1/exe"],
            cwd=ROOT,
            env=os.environ | {SECRET: SECRET},
            stdout=subprocess.PIPE,
            pass_fds=(fd,),
            preexec_fn=be_odd,
            timeout=300,
            check=True,
        )
    return {"state": str(directory), **json.loads(done.stdout)}


@contextmanager
def stray_directory() -> Iterator[int]:
    """A descriptor that survives exec, of the kind with which a container could leave its root."""
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def reports(collected: Any) -> dict[str, Report]:
    found: dict[str, Report] = collected["reports"]
    return found


@pytest.fixture(scope="module")
def facts(collected: Any) -> dict[str, Any]:
    found: dict[str, Any] = collected["facts"]
    return found


@pytest.fixture(params=EVERY_WAY)
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def told(way: str, reports: dict[str, Report]) -> Report:
    return reports[way]


# 3. Users ----------------------------------------------------------------------------------


def test_a_task_has_a_range_of_ids_of_its_own(told: Report) -> None:
    (inside, base, count), *more = [line.split() for line in told["uid_map"].splitlines()]
    assert (inside, count, more) == ("0", "65536", [])
    assert int(base) >= 65536
    assert told["gid_map"] == told["uid_map"]


def test_the_ranges_of_two_live_tasks_are_disjoint(
    reports: dict[str, Report], facts: dict[str, Any]
) -> None:
    one, other = (int(reports[name]["uid_map"].split()[1]) for name in ("first", "second"))
    assert [one, other] == facts["bases"] == facts["uids on the host"]
    assert abs(one - other) >= 65536


def test_it_is_who_it_shall_be(way: str, told: Report) -> None:
    uids = told["status"]["Uid"].split()
    assert tuple(map(int, uids)) == PEOPLE.get(way, (0, 0, 0, 0))
    gid = "1000" if way in PEOPLE else "0"
    assert told["status"]["Gid"].split() == [gid] * 4


def test_supplementary_groups_are_those_of_the_images_user(way: str, told: Report) -> None:
    assert told["status"]["Groups"].split() == (["2000"] if way in PEOPLE else [])


# 4. Capabilities ---------------------------------------------------------------------------


def bounding_set(way: str) -> int:
    if way == "with ptrace":
        return DEFAULT | capabilities.mask(["SYS_PTRACE"])
    if way == "without raw":
        return DEFAULT & ~capabilities.mask(["NET_RAW"])
    return DEFAULT


def test_capabilities_are_exactly_those_of_the_definition(way: str, told: Report) -> None:
    bounding = bounding_set(way)
    held = 0 if way in ("user", "exec as user") else bounding
    sets = {name: int(told["status"][name], 16) for name in ("CapBnd", "CapPrm", "CapEff")}
    assert sets == {"CapBnd": bounding, "CapPrm": held, "CapEff": held}


def test_no_capability_is_inheritable_or_ambient(told: Report) -> None:
    assert int(told["status"]["CapInh"], 16) == int(told["status"]["CapAmb"], 16) == 0
    assert told["securebits"] == 0


# 5. System calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("abi", ABIS)
def test_the_filter_holds_in_each_abi(abi: str, told: Report) -> None:
    answers = told["system_calls"][abi]
    denied = ("mount", "setns", "unshare user", "bpf", "keyctl", "io_uring_setup", "sethostname")
    assert {answers[call] for call in denied} == {EPERM}
    assert answers["clone3"] == ENOSYS


def test_x32_does_not_exist_in_a_task(told: Report) -> None:
    assert set(told["system_calls"].get("x32", {}).values()) <= {ENOSYS}


def test_every_way_in_has_the_same_filter(way: str, reports: dict[str, Report]) -> None:
    ways_of_root = {k: v["system_calls"] for k, v in reports.items() if k not in PEOPLE}
    other = reports["user"]["system_calls"] if way in PEOPLE else ways_of_root["root"]
    changed = differences(reports[way]["system_calls"], other)
    changed = {place for place in changed if place.partition("/")[0] in ABIS}
    if way == "with ptrace":
        calls = {"kcmp", "pidfd_getfd", "process_madvise"}
        assert {place.partition("/")[2] for place in changed} == calls
    elif way == "set-uid":  # effective uid 0: what the kernel itself asks is answered otherwise
        assert changed <= differences(ways_of_root["root"], other)
    else:
        assert changed == set()


def test_one_filter_is_loaded_and_no_new_privs_is_off(told: Report) -> None:
    status = told["status"]
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "0")
    assert status.get("Seccomp_filters", "1") == "1"


def test_a_set_uid_program_of_the_image_runs_as_its_owner(reports: dict[str, Report]) -> None:
    assert reports["set-uid"]["status"]["Uid"].split() == ["1000", "0", "0", "0"]
    assert reports["user"]["status"]["Uid"].split() == ["1000"] * 4


# 6. File systems ---------------------------------------------------------------------------


def flags(mount: dict[str, str]) -> set[str]:
    return set(mount["options"].split(",")) - {"relatime"}


def test_the_mounts_are_exactly_these(way: str, told: Report) -> None:
    expected = MOUNTS.copy()
    if way == "read-only":
        expected["/"] = ("overlay", {"ro", "nodev"})
    special = {f"/dev/{name}" for name in (*NODES, "tty")} | {*MASKED, *READ_ONLY, *THROTTLES}
    found = {m["point"]: (m["type"], flags(m)) for m in told["mounts"] if m["point"] not in special}
    assert found == expected


def test_no_mount_is_seen_twice_or_shared(told: Report) -> None:
    points = [mount["point"] for mount in told["mounts"]]
    assert len(points) == len(set(points))
    assert {mount["propagation"] for mount in told["mounts"]} == {""}


def test_what_covers_a_path_can_be_neither_written_nor_executed(told: Report) -> None:
    covers = [m for m in told["mounts"] if m["point"] in {*MASKED, *READ_ONLY, *THROTTLES}]
    assert len(covers) >= len(READ_ONLY) - 1
    assert all(flags(cover) >= {"ro", "nosuid", "noexec"} for cover in covers)


def test_masked_paths_are_empty(told: Report) -> None:
    there = [told["paths"][path] for path in (*MASKED, *THROTTLES)]
    there = [path for path in there if path["type"] != "absent"]
    assert len(there) >= 2  # /proc/timer_list or the like exists on every kernel
    directories = [path for path in there if path["type"] == "directory"]
    assert {(path["entries"], path["write"]) for path in directories} <= {(0, EROFS), (0, EACCES)}
    nodes = [path for path in there if path["type"] != "directory"]
    assert {(p["type"], p["major"], p["minor"], p["bytes"]) for p in nodes} <= {
        ("character", 1, 3, 0)
    }


def test_settings_of_the_kernel_cannot_be_written(told: Report) -> None:
    below = ("/proc/sys/kernel/core_pattern", "/proc/sys/net/ipv4/ip_forward")
    settings = (*READ_ONLY, "/sys", "/sys/fs/cgroup", *below)
    there = {path: told["paths"][path] for path in settings}
    assert {
        p for p, about in there.items() if about["type"] != "absent" and not about["write"]
    } == (set())


def test_no_file_system_for_debugging_is_mounted(told: Report) -> None:
    kernel = ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security")
    places = ("/sys/fs/bpf", "/sys/fs/pstore", *kernel)
    assert {told["paths"][place].get("entries", 0) for place in places} == {0}


def test_what_programs_need_of_proc_is_there(told: Report) -> None:
    for path in ("/proc/meminfo", "/proc/cpuinfo"):
        assert told["paths"][path]["bytes"] > 0


def test_the_devices_are_exactly_these(way: str, told: Report) -> None:
    devices = dict(told["devices"])
    ours = [devices.pop(path) for path in list(devices) if path.startswith("/dev/pts/")]
    nodes = {f"/dev/{name}" for name in (*NODES, "tty")}
    assert devices.keys() == nodes | LINKS.keys() | {"/dev/pts", "/dev/shm", "/dev/mqueue"}
    assert {path: devices[path]["target"] for path in LINKS} == LINKS
    for name, number in NODES.items():
        node = devices[f"/dev/{name}"]
        assert (node["type"], node["major"], node["minor"]) == ("character", *number)
        assert (node["mode"], node["open"]) == (0o666, 0)
    assert {(node["type"], node["major"]) for node in ours} <= {
        ("character", 5),
        ("character", 136),
    }
    assert len(ours) == (2 if way in TERMINALS else 1)


def test_shared_memory_is_everybodys_and_sticky(told: Report) -> None:
    assert told["devices"]["/dev/shm"]["mode"] == told["devices"]["/dev/mqueue"]["mode"] == 0o1777


def test_the_root_of_the_image_belongs_to_the_tasks_root(told: Report) -> None:
    root = told["paths"]["/"]
    assert (root["uid"], root["gid"], root["mode"]) == (0, 0, 0o755)


def test_the_root_can_be_written_unless_it_is_read_only(way: str, told: Report) -> None:
    expected = {"read-only": EROFS, "user": EACCES, "exec as user": EACCES}
    assert told["paths"]["/"]["write"] == expected.get(way, 0)


def test_the_cgroup_is_the_root_of_what_is_seen(way: str, told: Report) -> None:
    seen = {line.split(":", 2)[2] for line in told["cgroup"].splitlines()}
    below = {path for path in seen if re.fullmatch("/exec[.][0-9a-f]{16}", path)}
    assert seen - below <= {"/"}
    assert len(below) == (1 if way in EXECS else 0)


# 7. The first process ----------------------------------------------------------------------


def test_it_has_descriptors_0_1_and_2_and_nothing_of_the_agents(way: str, told: Report) -> None:
    descriptors = told["descriptors"]
    assert descriptors.keys() == {"0", "1", "2"}
    if way in TERMINALS:
        assert {d["target"] for d in descriptors.values()} == {"/dev/pts/0"}
        return
    if way == "health check":  # it wrote its report to a file of its own
        assert descriptors["1"]["type"] == "fifo"
    assert descriptors["0"]["target"] == "/dev/null"
    assert {descriptors[fd]["type"] for fd in ("1", "2")} == {"fifo"}
    assert {descriptors[fd]["uid"] for fd in ("1", "2")} == {PEOPLE.get(way, (0,))[0]}


def test_the_environment_is_the_images_the_definitions_and_what_a_task_may_know(
    way: str, told: Report
) -> None:
    variables = dict(entry.split("=", 1) for entry in told["environment"])
    expected = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME": told["hostname"],
        "HOME": "/home/app" if way in PEOPLE else "/root",
        "AWS_EXECUTION_ENV": "AWS_ECS_FARGATE",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    if way == "terminal":
        expected["TERM"] = "xterm"
    if way == "variables":
        expected["ASKED_FOR"] = "yes"
    assert variables == expected


def test_nothing_it_says_holds_a_secret_of_the_agent(told: Report) -> None:
    assert SECRET not in json.dumps(told)


def test_no_signal_is_blocked_ignored_or_handled(told: Report) -> None:
    sets = ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd")
    assert {name: int(told["status"][name], 16) for name in sets} == dict.fromkeys(sets, 0)


def test_umask_priority_and_scheduler_are_the_usual_ones(told: Report) -> None:
    assert (told["umask"], told["nice"], told["scheduler"]) == (0o022, 0, os.SCHED_OTHER)


def test_its_oom_score_is_0_and_cannot_be_lowered(told: Report) -> None:
    assert told["oom_score_adj"] == 0
    assert told["lower_oom_score_adj"] in (EACCES, EPERM)


def test_the_limit_of_open_files_is_fargates_or_what_the_host_gives(told: Report) -> None:
    soft, hard = told["limits"]["nofile"]
    assert soft == hard
    assert soft == 65535 or (soft < 65535 and not may_raise_limits())


def may_raise_limits() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line for line in lines if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & capabilities.mask(["SYS_RESOURCE"]))


def test_it_leads_its_own_session(way: str, told: Report) -> None:
    assert told["pid"] == told["session"] == told["process_group"]
    parent = {"init": 1}.get(way, 0)
    assert told["ppid"] == parent
    if not way.startswith("exec") and way not in ("init", "health check"):
        assert told["pid"] == 1


def test_only_a_terminal_that_was_asked_for_controls_it(way: str, told: Report) -> None:
    assert told["controlling_terminal"] == (0 if way in TERMINALS else ENXIO)


def test_nothing_ties_its_life_to_a_process_of_the_agent(told: Report) -> None:
    assert told["parent_death_signal"] == 0


def test_the_host_name_is_its_own_and_cannot_be_changed(told: Report) -> None:
    assert len(told["hostname"]) == 12
    assert told["domainname"] == "(none)"
    assert told["system_calls"]["native"]["sethostname"] == EPERM
    assert told["paths"]["/proc/sys/kernel/hostname"]["write"] in (EACCES, EPERM, EROFS)


def test_two_tasks_have_different_host_names(
    reports: dict[str, Report], facts: dict[str, Any]
) -> None:
    names = [reports[way]["hostname"] for way in ("first", "second")]
    assert names == [task[:12] for task in facts["tasks"]]


def test_our_init_cannot_be_written_to_by_the_task(reports: dict[str, Report]) -> None:
    assert reports["init"]["ppid"] == 1
    assert reports["init"]["paths"]["/proc/1/exe"]["write"] == EACCES


# 2. and 10. Namespaces and the network -----------------------------------------------------


def test_all_namespaces_but_the_clock_are_the_tasks_own(
    told: Report, facts: dict[str, Any]
) -> None:
    of_the_host = facts["namespaces of the host"]
    shared = {kind for kind, name in told["namespaces"].items() if of_the_host[kind] == name}
    assert shared <= {"time"}


def test_two_tasks_share_no_namespace(reports: dict[str, Report]) -> None:
    one, other = (reports[way]["namespaces"] for way in ("first", "second"))
    assert {kind for kind in one if one[kind] == other[kind]} <= {"time"}


def test_nothing_of_a_task_is_among_the_mounts_of_the_host(
    collected: Any, facts: dict[str, Any]
) -> None:
    lines = facts["mounts of the host"]
    traces = [collected["state"], *facts["tasks"], *map(str, facts["bases"])]
    assert [trace for trace in traces if trace in lines] == []


def test_the_only_interface_is_lo(told: Report) -> None:
    assert told["network"]["interfaces"] == ["lo"]


def test_abstract_sockets_of_the_host_are_not_seen(told: Report) -> None:
    assert told["network"]["unix_sockets"] == []


def test_raw_sockets_need_the_capability_and_ping_and_port_80_do_not(
    way: str, told: Report
) -> None:
    may = way not in ("user", "exec as user", "without raw")
    network = told["network"]
    raw = {network[kind] for kind in ("raw_socket", "raw_socket_6", "packet_socket")}
    assert raw == {0 if may else EPERM}
    assert (network["ping_socket"], network["bind_80"]) == (0, 0)


# 11. Entering ------------------------------------------------------------------------------

# A process of its own has numbers of its own; all else of an exec must be as in the container.
OWN = {
    "cgroup",
    "paths//sys/fs/cgroup/entries",
    "pid",
    "ppid",
    "session",
    "process_group",
    "descriptors/1/target",
    "descriptors/2/target",
}
OWN |= {f"status/{name}" for name in ("Pid", "Tgid", "NSpid", "NStgid", "NSpgid", "NSsid")}
COUNTED = ("status/Vm", "status/Rss", "status/voluntary", "status/nonvoluntary", "status/SigQ")


def test_an_exec_is_as_the_containers_first_process(reports: dict[str, Report]) -> None:
    changed = differences(reports["first"], reports["exec"]) - OWN
    assert {place for place in changed if not place.startswith(COUNTED)} == set()
