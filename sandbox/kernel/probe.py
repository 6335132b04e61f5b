"""What this host can do, found out by doing it: for `sandbox doctor` and for skipping tests.

Version numbers lie in both directions (backports, configuration, containers, security modules), so
each requirement and each protection is tried, in a directory, a cgroup and namespaces made for it
and gone afterwards. Nothing of the host is changed, but that a controller may become enabled in
cgroup.subtree_control, as by the agent itself. It takes some 100 ms.

A finding is *active*, *degraded* (tasks run, something is weaker or slower: `why` says what) or
*missing* (no task can run: `mend` says what helps). What needs several kernel features is found
under the first that fails.
"""

from __future__ import annotations

import enum
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sandbox.errors import KernelError, SandboxError
from sandbox.kernel import (
    cgroups,
    filesystems,
    idranges,
    mounts,
    native,
    oom,
    packetlog,
    slots,
)
from sandbox.kernel.cgroups import hierarchies
from sandbox.kernel.cgroups.devices import device_program
from sandbox.kernel.netfilter import Iptables
from sandbox.kernel.thread import KernelThread

OLDEST_KERNEL = (6, 1)
NOFILE_DEFAULT = 65535
"""What a task on Fargate finds as its limit of open files."""

BIN = slots.PROGRAM.parent

CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,
}
CAP_SYS_RESOURCE = 24
_TRIED_BYTES = 64 << 20


class State(enum.StrEnum):
    ACTIVE = "active"
    DEGRADED = "degraded"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: State
    why: str = ""
    mend: str = ""


@dataclass
class Report:
    """Collects findings; a check that raises is a finding too."""

    findings: list[Finding] = field(default_factory=list)

    def active(self, name: str, why: str = "") -> None:
        self.findings.append(Finding(name, State.ACTIVE, why))

    def degraded(self, name: str, why: str, mend: str = "") -> None:
        self.findings.append(Finding(name, State.DEGRADED, why, mend))

    def missing(self, name: str, why: str, mend: str = "") -> None:
        self.findings.append(Finding(name, State.MISSING, why, mend))

    @contextmanager
    def trying(
        self, name: str, mend: str, *, otherwise: State = State.MISSING, why: str = ""
    ) -> Iterator[None]:
        """The finding is active if the block succeeds, else `otherwise`, because of its error."""
        try:
            yield
        except (SandboxError, OSError) as error:
            self.findings.append(Finding(name, otherwise, f"{error}", mend))
        else:
            self.active(name, why)


def probe(state_dir: Path) -> list[Finding]:
    """Everything that a host may lack. Writes only below `state_dir` or, before that exists, its
    nearest existing parent, and leaves nothing. Blocks meanwhile."""
    report = Report()
    _kernel(report)
    if not _privileges(report):
        return report.findings
    _oom(report)
    _calls(report)
    _seccomp(report)
    _programs(report)
    _cgroups(report)
    _limits(report)
    _namespaces(report, _existing(state_dir))
    _storage(report, _existing(state_dir))
    _tools(report)
    return report.findings


def can_run_tasks(findings: Sequence[Finding]) -> bool:
    return all(finding.state is not State.MISSING for finding in findings)


# The kernel --------------------------------------------------------------------------------


def _kernel(report: Report) -> None:
    release = os.uname().release
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    if version >= OLDEST_KERNEL:
        report.active("kernel", f"Linux {release}")
    else:
        report.degraded("kernel", f"Linux {release}", "use Linux 6.1 or later, the oldest tested")


def _privileges(report: Report) -> bool:
    """Whether going on makes sense."""
    held = _status("CapEff")
    if os.geteuid() != 0:
        report.missing("root", f"running as user {os.geteuid()}", "run it as root")
        return False
    lacking = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    if lacking:
        why = f"root without {', '.join(lacking)}"
        report.missing("root", why, "run it outside of a container, or in a privileged one")
        return False
    report.active("root")
    if held >> CAP_SYS_RESOURCE & 1:
        report.active("CAP_SYS_RESOURCE")
    else:
        report.degraded(
            "CAP_SYS_RESOURCE",
            "limits cannot be raised above the agent's own",
            "start the agent with this capability",
        )
    return True


def _oom(report: Report) -> None:
    """Tried on this process, which is none that the kernel should spare."""
    name = "agent kept from the OOM killer"
    try:
        oom.put_back(oom.lower())
    except KernelError as error:
        why = f"{error}: for want of memory the kernel may end the agent before a task"
        mend = f"start it with CAP_SYS_RESOURCE, or with OOMScoreAdjust={oom.AGENT} in its unit"
        report.degraded(name, why, mend)
    else:
        report.active(name, f"`sandbox agent` has oom_score_adj {oom.AGENT}, a container 0")


def _calls(report: Report) -> None:
    old = f"needs Linux {'.'.join(map(str, OLDEST_KERNEL))} or later, and no filter that denies it"
    with report.trying("pidfd", old), _descriptor(os.pidfd_open(os.getpid())) as pidfd:
        os.close(native.pidfd_getfd(pidfd, pidfd))
    with report.trying("openat2", old), _descriptor(_open("/")) as root:
        os.close(mounts.resolve(root, "../.."))
    with report.trying("close_range", old):
        last = 2**31 - 1
        native.close_range(last, last)
    with report.trying("mount API by descriptor", old):
        os.close(mounts.tmpfs(1 << 20, 0o700, 0, 0))


def _seccomp(report: Report) -> None:
    mend = "use a kernel with CONFIG_SECCOMP_FILTER"
    with report.trying("seccomp", mend):
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
        if not {"errno", "kill_process"} <= set(actions):
            raise SandboxError(f"no filter can answer with errno, only {' '.join(actions)}")
        for name in ("seccomp-default.bpf", "seccomp-ptrace.bpf"):
            (BIN / name).stat()


def _programs(report: Report) -> None:
    """The static programs; with glibc each keeper costs 580 kB of memory instead of 18."""
    for name in ("keeper", "slot", "unpack"):
        try:
            is_glibc = b"GLIBC_" in (BIN / name).read_bytes()
        except OSError as error:
            report.missing(f"program {name}", f"{error}", "build it: scripts/native")
            continue
        if is_glibc and name == "keeper":
            why = "built with glibc: 580 kB of memory a container instead of 18"
            report.degraded(f"program {name}", why, "install musl-tools and run scripts/native")
        else:
            report.active(f"program {name}")


# Control groups ----------------------------------------------------------------------------


def _cgroups(report: Report) -> None:
    try:
        _try_cgroups(report, f"probe{os.getpid()}")
    except SandboxError as error:
        report.missing("cgroup", f"{error}", "give the agent a writable cgroup v2 hierarchy")


def _try_cgroups(report: Report, instance: str) -> None:
    with ExitStack() as undo:
        tree = cgroups.CgroupTree.open(instance)
        undo.callback(tree.close)
        undo.callback(tree.remove)
        group = tree.create("task-probe", cgroups.Limits(memory_max=1 << 24, pids_max=16))
        undo.callback(group.close)
        enabled = f" (just enabled: {', '.join(tree.enabled)})" if tree.enabled else ""
        report.active("cgroup", tree.form.removesuffix(f"/sandbox-{instance}") + enabled)
        _controllers(report, group.directory_fd)
        _kill(report, group.directory_fd)
        _device_policy(report, group.directory_fd)


def _controllers(report: Report, group_fd: int) -> None:
    chosen = hierarchies.choose(
        hierarchies.parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    )
    for name in hierarchies.CONTROLLERS:
        if name in chosen.legacy:
            why = "bound to cgroup v1: the same limits, enforced through that"
            report.degraded(
                f"controller {name}", why, "boot with systemd.unified_cgroup_hierarchy=1"
            )
        else:
            report.active(f"controller {name}", "cgroup v2")
    if memory := chosen.legacy.get("memory"):
        accounted = os.path.exists(f"{memory.path}/memory.memsw.limit_in_bytes")
    else:
        accounted = os.access("memory.swap.max", os.F_OK, dir_fd=group_fd)
    if accounted:
        report.active("swap limit")
    elif len(Path("/proc/swaps").read_text().splitlines()) < 2:
        report.active("swap limit", "this host has no swap")
    else:
        report.degraded("swap limit", "swap is not accounted for", "boot with swapaccount=1")


def _kill(report: Report, group_fd: int) -> None:
    mend = "use Linux 5.14 or later; until then tasks are frozen first, then killed"
    flags = os.O_WRONLY | os.O_CLOEXEC
    with (
        report.trying("cgroup.kill", mend, otherwise=State.DEGRADED),
        _descriptor(os.open("cgroup.kill", flags, dir_fd=group_fd)) as kill,
    ):
        os.write(kill, b"1")


def _device_policy(report: Report, group_fd: int) -> None:
    mend = "use a kernel with CONFIG_CGROUP_BPF; until then /dev and the id range alone protect"
    with (
        report.trying("device policy", mend, otherwise=State.DEGRADED),
        _descriptor(native.bpf_device_program(device_program())) as program,
    ):
        native.bpf_attach_cgroup_device(group_fd, program)


def _limits(report: Report) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    can_raise = _status("CapEff") >> CAP_SYS_RESOURCE & 1
    if can_raise or hard == resource.RLIM_INFINITY or hard >= NOFILE_DEFAULT:
        report.active("nofile limit", f"{NOFILE_DEFAULT}")
    else:
        report.degraded(
            "nofile limit",
            f"tasks get {hard}, not {NOFILE_DEFAULT}: the agent's own hard limit",
            f"start the agent with ulimit -Hn {NOFILE_DEFAULT} (LimitNOFILE= of its unit)",
        )


# Namespaces and layers ---------------------------------------------------------------------


def _namespaces(report: Report, directory: Path) -> None:
    id_base = idranges.WINDOW[-1]
    made: list[slots.Slot] = []
    mend = "raise sysctl user.max_user_namespaces"
    with report.trying("user and network namespaces", mend), KernelThread("probe") as thread:
        # On a thread: the caller's may have a trio loop already.
        made += thread.call(lambda: trio.run(slots.make, [id_base]))
    _own_proc(report)
    if not made:
        return
    try:
        with report.trying(
            "id-mapped layers",
            f"{directory} is on {_file_system(directory)}: put the state directory (--state-dir) on"
            " ext4, xfs or btrfs, or from Linux 6.3 on tmpfs; a mounted image file of ext4 will do",
            why=f"overlay in {directory}, layers by {_layers_given()}",
        ):
            _try_overlay(directory, made[0].userns_fd, id_base)
    finally:
        made[0].close()


def _layers_given() -> str:
    """How overlay gets its layers: by name is as well isolated and takes a thread more a launch."""
    with suppress(SandboxError):  # what is missing is told by trying an overlay
        if mounts.overlay_takes_descriptors():
            return "descriptor"
    return "name (Linux before 6.13)"


def _file_system(directory: Path) -> str:
    """Its type, by the last mount on the nearest directory above."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        found[fields[4].encode().decode("unicode_escape")] = fields[fields.index("-") + 1]
    path = directory.resolve()
    return next((found[f"{p}"] for p in (path, *path.parents) if f"{p}" in found), "?")


def _own_proc(report: Report) -> None:
    """The kernel lets a user namespace mount /proc and /sys only where the agent's own are whole.

    In most containers they are not: parts of them are masked.
    """
    command = "mount -t proc proc /proc && mount -t sysfs sysfs /sys"
    unshare = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount", "--"]
    name, mend = "own /proc and /sys", "run the agent outside of a container"
    try:
        tried = subprocess.run(
            [*unshare, "sh", "-c", command], capture_output=True, text=True, timeout=10, check=False
        )
    except FileNotFoundError as error:
        report.degraded(name, f"not tried: no {error.filename}", "install util-linux")
    except subprocess.TimeoutExpired:
        report.missing(name, "mounting them does not end", mend)
    else:
        if tried.returncode == 0:
            report.active(name)
        else:
            report.missing(name, " ".join(tried.stderr.split()), mend)


def _try_overlay(directory: Path, userns_fd: int, id_base: int) -> None:
    """Two layers with root's files, seen shifted, and a file written above them."""
    with tempfile.TemporaryDirectory(prefix=".probe", dir=directory) as scratch, ExitStack() as fds:

        def opened(fd: int) -> int:
            fds.callback(os.close, fd)
            return fd

        for name in ("lower", "lowest", "upper", "work"):
            os.mkdir(f"{scratch}/{name}")
        Path(scratch, "lower/file").touch()
        layers = [
            opened(mounts.idmapped(opened(_open(f"{scratch}/{name}")), userns_fd, read_only=True))
            for name in ("lower", "lowest")
        ]
        upper, work = (opened(_open(f"{scratch}/{name}")) for name in ("upper", "work"))
        root = opened(mounts.overlay(layers, upper, work))
        file = opened(mounts.resolve(root, "/file"))
        if os.fstat(file).st_uid != id_base:
            raise SandboxError(f"the ids of {directory} are not shifted")
        mounts.make_dirs(root, "/written", 0o755, id_base, id_base)


def _storage(report: Report, directory: Path) -> None:
    """A file system of a limited size, as a task gets one."""
    mend = "load the modules loop and ext4, install e2fsprogs; until then a task may fill the disk"
    with (
        report.trying(
            "limited storage", mend, otherwise=State.DEGRADED, why="ext4 on a loop device"
        ),
        tempfile.TemporaryDirectory(prefix=".probe", dir=directory) as scratch,
    ):
        empty = Path(scratch, "empty")
        filesystems.template(empty, _TRIED_BYTES)
        filesystems.make(Path(scratch, "made"), empty).drop()


def _tools(report: Report) -> None:
    """For networks only; tasks without one run all the same."""
    for name in ("iptables-restore", "ipset"):
        if path := shutil.which(name):
            report.active(name, path)
        else:
            report.degraded(name, "not installed: no security groups", f"install {name}")
    if shutil.which("iptables-restore"):
        _packet_log(report)


def _packet_log(report: Report) -> None:
    """A packet that a rule logs has to arrive."""
    name, mend = "NFLOG", "load the modules xt_NFLOG and nfnetlink_log"
    why = "flow logs have no REJECT: refused packets are only counted"
    with tempfile.TemporaryDirectory(prefix="sandbox-probe-") as scratch:
        try:
            iptables = Iptables.detect(str(Path(scratch, "lock")))
        except KernelError as error:
            report.degraded(name, f"{error}; {why}", mend)
            return
        if packetlog.works(iptables):
            report.active(name, f"iptables of backend {iptables.backend}")
        else:
            report.degraded(name, why, mend)


# Small -------------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value, 16)
    return 0


def _open(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


@contextmanager
def _descriptor(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)
