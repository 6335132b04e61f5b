"""PID 1 of the guest that scripts/vm starts; never run it by hand.

The kernel boots with the host's file system (hostfs, read-only) as its root. This turns it into a
machine: an overlay whose upper layer is a tmpfs becomes the root, with its own /proc, /sys, /dev,
/run, /tmp and a cgroup v2 hierarchy. Then the command runs, orphans are reaped, and the power goes.

The word `exchange=DIR` of the kernel's command line names the host directory where scripts/vm left
conf.json and where `status` (or `error`, a traceback) is left for it.

One Python process instead of a shell script: fork and exec cost 10-30 ms each in User Mode Linux.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import termios
import time
import traceback
from pathlib import Path
from typing import TypedDict, cast

libc = ctypes.CDLL(None, use_errno=True)

# <sys/mount.h>, <linux/reboot.h>, <asm/unistd_64.h>, <linux/if.h>
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE, MS_SHARED = 1 << 12, 1 << 13, 1 << 14, 1 << 18, 1 << 20
MNT_DETACH = 2
RB_POWER_OFF = 0x4321FEDC
SYS_PIVOT_ROOT, SYS_FINIT_MODULE = 155, 313
SIOCSIFFLAGS, IFF_UP_LOOPBACK_RUNNING = 0x8914, 0x49

TMPFS_LIMIT = "size=75%"


class Conf(TypedDict):
    argv: list[str]
    cwd: str
    env: dict[str, str]
    writable: list[str]
    shown: list[str]
    disks: list[tuple[str, str, str]]


def mount(
    source: str | None, target: str, fs: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, fs, data)]
    if libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]) < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"mount {fs or source} on {target}: {os.strerror(errno)}")


def make_root(exchange: str) -> str:
    """Mount the future root: host files below, memory above.

    The upper layer cannot be hostfs, which has no trusted xattrs, whiteouts or O_TMPFILE.
    """
    upper = f"{exchange}/upper"
    mount("upper", upper, "tmpfs", 0, f"{TMPFS_LIMIT},mode=755")
    for directory in ("files", "work", "root", "kept"):
        os.mkdir(f"{upper}/{directory}")
    if (modules := modules_directory()).is_dir():
        insert_module(modules / "kernel/fs/overlayfs/overlay.ko")
    root = f"{upper}/root"
    layers = f"lowerdir=/,upperdir={upper}/files,workdir={upper}/work"
    mount("root", root, "overlay", 0, layers)
    return root


def modules_directory() -> Path:
    """Where Debian's user-mode-linux has its modules; a monolithic kernel has none."""
    return Path("/usr/lib/uml/modules", os.uname().release)


def insert_module(file: Path) -> None:
    with file.open("rb") as module:
        if libc.syscall(SYS_FINIT_MODULE, module.fileno(), b"", 0) < 0:
            raise OSError(ctypes.get_errno(), f"insmod {file}")


def mount_kernel_trees(root: str) -> None:
    mount("proc", f"{root}/proc", "proc")
    mount("sysfs", f"{root}/sys", "sysfs")
    mount("cgroup2", f"{root}/sys/fs/cgroup", "cgroup2", 0, "nsdelegate")
    mount("dev", f"{root}/dev", "devtmpfs")
    for directory in ("pts", "shm", "mqueue", "net"):
        os.makedirs(f"{root}/dev/{directory}", exist_ok=True)
    mount("devpts", f"{root}/dev/pts", "devpts", 0, "gid=5,mode=620,ptmxmode=666")
    mount("shm", f"{root}/dev/shm", "tmpfs")
    mount("mqueue", f"{root}/dev/mqueue", "mqueue")
    links = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, target in links.items():
        if not os.path.lexists(f"{root}/dev/{name}"):
            os.symlink(target, f"{root}/dev/{name}")
    mount("run", f"{root}/run", "tmpfs", 0, "mode=755")
    os.mkdir(f"{root}/run/lock")
    os.mkdir(f"{root}/run/netns")


def show_host_directories(root: str, exchange: str, conf: Conf) -> None:
    """Give the guest a /tmp of its own and the asked-for host directories above it.

    A real tmpfs on /tmp, because the root overlay cannot be the upper layer of another overlay.
    """
    kept: list[tuple[str, str]] = []

    def keep(directory: str) -> str:
        place = f"{exchange}/upper/kept/{len(kept)}"
        os.mkdir(place)
        kept.append((place, directory))
        return place

    for directory in conf["shown"]:
        mount(f"{root}{directory}", keep(directory), None, MS_BIND)
    for directory in [exchange, *conf["writable"]]:
        mount("hostfs", keep(directory), "hostfs", 0, directory)  # the option IS the host's path
    mount("tmp", f"{root}/tmp", "tmpfs", 0, f"{TMPFS_LIMIT},mode=1777")
    for place, directory in kept:
        os.makedirs(f"{root}{directory}", exist_ok=True)
        mount(place, f"{root}{directory}", None, MS_MOVE)


def prepare_modules(root: str) -> None:
    """Put the modules where the kernel's own autoloading looks for them."""
    modules = modules_directory()
    if not modules.is_dir():
        return
    os.makedirs(f"{root}/lib/modules", exist_ok=True)
    if not os.path.lexists(link := f"{root}/lib/modules/{modules.name}"):
        os.symlink(modules, link)
    # Debian's guest kernel has nf_tables without its ip, ip6 and inet families: of the two
    # back ends of iptables only legacy works.
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            legacy = f"/usr/sbin/{name}-legacy{suffix}"
            alternative = f"{root}/etc/alternatives/{name}{suffix}"
            if os.path.exists(root + legacy) and os.path.lexists(alternative):
                os.unlink(alternative)
                os.symlink(legacy, alternative)


def enter(root: str) -> None:
    """Make `root` the root of every process.

    pivot_root, not chroot: it moves the kernel's helper threads (modprobe) too, and a chrooted
    process may not make user namespaces. Shared at the end, as systemd leaves it.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    os.mkdir(f"{root}/.old")
    os.chdir(root)
    if libc.syscall(SYS_PIVOT_ROOT, b".", b".old") < 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    libc.umount2(b"/.old", MNT_DETACH)
    os.rmdir("/.old")
    mount(None, "/", None, MS_REC | MS_SHARED)


def settle(conf: Conf) -> None:
    socket.sethostname("guest")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        lo_up = struct.pack("16sH14x", b"lo", IFF_UP_LOOPBACK_RUNNING)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, lo_up)
    for controller in Path("/sys/fs/cgroup/cgroup.controllers").read_text().split():
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text(f"+{controller}")
    Path("/proc/sys/kernel/core_pattern").write_text("|/bin/false")
    if modules_directory().is_dir():
        # Nothing autoloads these: a device node would have to be there first.
        for module in ("loop", "tun", "fuse"):
            os.spawnv(os.P_WAIT, "/sbin/modprobe", ["modprobe", "-q", module])
    for device, mount_point, fs in conf["disks"]:
        os.makedirs(mount_point, exist_ok=True)
        mount(device, mount_point, fs, 0, "prjquota")


def open_console(path: str) -> int:
    """A console that passes bytes as they are."""
    console = os.open(path, os.O_RDWR | os.O_NOCTTY)
    attributes = termios.tcgetattr(console)
    attributes[1] &= ~termios.OPOST
    attributes[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    termios.tcsetattr(console, termios.TCSANOW, attributes)
    return console


def start(conf: Conf, out: int, err: int) -> int:
    """Fork and exec the command; the only other process here is PID 1, with a single thread."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for target, source in enumerate((os.open("/dev/null", os.O_RDWR), out, err)):
            os.dup2(source, target)
        os.closerange(3, 64)
        for signum in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
        os.chdir(conf["cwd"])
        os.execvpe(conf["argv"][0], conf["argv"], conf["env"])
    except OSError as error:
        os.write(2, f"scripts/vm: {conf['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def run(conf: Conf) -> int:
    """Run the command, copy what it says to the consoles, reap as every init must.

    It gets pipes and not the consoles themselves, for which isatty() would be true. Once it has
    ended only what already is in the pipes is copied: daemons that it left may keep them open.
    """
    (out, out_write), (err, err_write) = os.pipe(), os.pipe()
    copies = {out: open_console("/dev/tty1"), err: open_console("/dev/tty2")}
    consoles = list(copies.values())
    woken, wake = os.pipe()
    for descriptor in (woken, wake, out, err):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    command = start(conf, out_write, err_write)
    os.close(out_write)
    os.close(err_write)
    status: int | None = None
    while True:
        ready, _, _ = select.select([woken, *copies], [], [], None if status is None else 0)
        if status is not None and not ready:
            break
        for descriptor in ready:
            data = read(descriptor)
            if descriptor == woken:
                continue
            if data == b"":
                del copies[descriptor]
                continue
            while data:
                data = data[os.write(copies[descriptor], data) :]
        for pid, ended in reap():
            if pid == command:
                status = ended
    for console in consoles:
        termios.tcdrain(console)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return None


def reap() -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def guest(exchange: str) -> None:
    conf = cast(Conf, json.loads(Path(exchange, "conf.json").read_text()))
    root = make_root(exchange)
    mount_kernel_trees(root)
    show_host_directories(root, exchange, conf)
    prepare_modules(root)
    enter(root)
    settle(conf)
    status = run(conf)
    Path(exchange, "status.new").write_text(str(status))
    os.rename(f"{exchange}/status.new", f"{exchange}/status")


def main() -> None:
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    named = re.search(r"\bexchange=(\S+)", Path("/proc/cmdline").read_text())
    assert named, "the kernel's command line names no exchange directory"
    exchange = named[1]
    mount("hostfs", exchange, "hostfs", 0, exchange)
    try:
        guest(exchange)
    except BaseException:
        Path(exchange, "error").write_text(traceback.format_exc())
    os.sync()
    libc.reboot(RB_POWER_OFF)
    time.sleep(10)  # PID 1 must not return before the power is gone


if __name__ == "__main__":
    main()
