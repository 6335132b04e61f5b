"""Detached mounts show what they should to whom they should, and nothing in the host's table.

Run again in the guest: its kernel is older than overlay's layers by descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from sandbox.errors import KernelError
from sandbox.kernel import mounts, native, slots
from sandbox.kernel.thread import KernelThread

pytestmark = pytest.mark.guest

BASE = 0x7FFF0000
MS_SHARED = 1 << 20
Opened = Callable[[int], int]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Descriptors given to it are closed after the test."""
    with ExitStack() as stack:

        def register(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        yield register


@pytest.fixture
def userns() -> Iterator[int]:
    (slot,) = trio.run(slots.make, [BASE])
    yield slot.userns_fd
    slot.close()


@pytest.fixture
def root(tmp_path: Path, opened: Opened) -> int:
    """An image's root with links that try to lead out of it."""
    image = tmp_path / "image"
    (image / "etc").mkdir(parents=True)
    (image / "etc/passwd").write_text("root:x:0:0::/:\n")
    (image / "link").symlink_to("/etc/passwd")
    (image / "out").symlink_to("../../../../../../../../etc/hostname")
    (image / "loop").symlink_to("loop")
    (image / "dangling").symlink_to("/nowhere")
    (image / "run").mkdir()
    (image / "var").mkdir()
    (image / "var/run").symlink_to("/run")
    os.mkfifo(image / "fifo")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hostname").write_text("the host's")
    return opened(path(image))


def path(name: str | Path) -> int:
    return os.open(name, os.O_PATH | os.O_CLOEXEC)


def at(fd: int, name: str = "") -> Path:
    return Path(f"/proc/self/fd/{fd}", name)


def mount_table() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_what_is_mounted_on_a_copy_of_a_shared_mount_appears_there_alone(tmp_path: Path) -> None:
    for name in ("shared", "copy"):
        (tmp_path / name).mkdir()

    def mounted() -> list[str]:
        native.unshare(native.CLONE_NEWNS)
        native.mount(None, "/", None, native.MS_REC | native.MS_PRIVATE)
        native.mount("tmpfs", str(tmp_path / "shared"), "tmpfs", 0)
        native.mount(None, str(tmp_path / "shared"), None, MS_SHARED)
        (tmp_path / "shared/sub").mkdir()
        original = path(tmp_path / "shared")
        copy = mounts.clone(original)
        native.move_mount(
            copy, "", native.AT_FDCWD, str(tmp_path / "copy"), native.MOVE_MOUNT_F_EMPTY_PATH
        )
        os.close(copy)
        os.close(original)
        native.mount("tmpfs", str(tmp_path / "copy/sub"), "tmpfs", 0)
        lines = Path("/proc/thread-self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].endswith("/sub")]

    with KernelThread("shared") as thread:
        assert thread.call(mounted) == [str(tmp_path / "copy/sub")]


def layers_of(directory: Path, count: int, userns: int, opened: Opened) -> list[int]:
    found = []
    for number in range(count):
        layer = directory / f"layer{number}"
        layer.mkdir()
        (layer / f"file{number}").write_text(str(number))
        (layer / "shared").write_text(str(number))
        found.append(opened(mounts.idmapped(opened(path(layer)), userns, read_only=True)))
    return found


def writable(directory: Path, name: str, opened: Opened) -> tuple[int, int]:
    found = []
    for part in ("upper", "work"):
        (directory / name / part).mkdir(parents=True)
        os.chown(directory / name / part, BASE, BASE)
        found.append(opened(path(directory / name / part)))
    return found[0], found[1]


def errno_of(error: pytest.ExceptionInfo[KernelError]) -> int:
    return error.value.errno


# Mounts ------------------------------------------------------------------------------------


def test_an_idmapped_mount_shifts_ids_and_leaves_the_disk_alone(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    os.chown(tmp_path, 5, 7)
    mount = opened(mounts.idmapped(opened(path(tmp_path)), userns))
    assert (at(mount).stat().st_uid, at(mount).stat().st_gid) == (BASE + 5, BASE + 7)
    assert tmp_path.stat().st_uid == 5


def test_a_read_only_clone_refuses_writes_where_the_original_does_not(
    tmp_path: Path, opened: Opened
) -> None:
    mount = opened(mounts.clone(opened(path(tmp_path)), read_only=True))
    with pytest.raises(OSError, match="Read-only"):
        at(mount, "file").touch()
    (tmp_path / "file").touch()
    assert at(mount, "file").exists()


def test_a_tmpfs_has_the_size_owner_and_mode_asked_for(opened: Opened) -> None:
    mount = opened(mounts.tmpfs(1 << 20, 0o1750, BASE, BASE + 1))
    root = at(mount).stat()
    assert (stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid) == (0o1750, BASE, BASE + 1)
    with pytest.raises(OSError, match="No space") as full:
        at(mount, "file").write_bytes(bytes(2 << 20))
    assert full.value.errno == errno.ENOSPC


def test_an_overlay_of_120_shifted_layers_works_and_is_in_no_mount_table(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    before = mount_table()
    layers = layers_of(tmp_path, 120, userns, opened)
    upper, work = writable(tmp_path, "one", opened)

    merged = opened(mounts.overlay(layers, upper, work))

    assert sorted(os.listdir(at(merged))) == sorted(["shared", *(f"file{n}" for n in range(120))])
    assert at(merged, "shared").read_text() == "0", "the first layer is the topmost"
    assert at(merged, "file119").stat().st_uid == BASE
    at(merged, "file7").write_text("changed")
    assert (tmp_path / "one/upper/file7").read_text() == "changed"
    assert (tmp_path / "layer7/file7").read_text() == "7"
    assert native.fstatfs_magic(merged) == native.OVERLAYFS_SUPER_MAGIC
    assert mount_table() == before


def test_layers_can_be_used_for_a_second_overlay(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    layers = layers_of(tmp_path, 3, userns, opened)
    merged = [
        opened(mounts.overlay(layers, *writable(tmp_path, name, opened))) for name in ("one", "two")
    ]
    at(merged[0], "file0").unlink()
    assert at(merged[1], "file0").stat().st_uid == BASE


def test_layers_by_name_give_the_same_overlay_on_every_kernel(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    layers = layers_of(tmp_path, 120, userns, opened)
    upper, work = writable(tmp_path, "one", opened)
    before = mount_table()
    with KernelThread("overlay") as thread:
        merged = opened(
            thread.call(lambda: mounts._overlay_by_name(layers, upper, work, True, None))
        )
    at(merged, "file5").write_text("changed")
    assert (tmp_path / "one/upper/file5").read_text() == "changed"
    assert at(layers[5], "file5").stat().st_uid == BASE
    assert mount_table() == before


def test_device_nodes_in_an_overlay_do_not_open(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    layers = layers_of(tmp_path, 1, userns, opened)
    merged = opened(mounts.overlay(layers, *writable(tmp_path, "one", opened)))
    os.mknod(tmp_path / "one/upper/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with pytest.raises(PermissionError):
        at(merged, "zero").open("rb")


def test_redirects_that_an_image_brings_are_not_followed(
    tmp_path: Path, userns: int, opened: Opened
) -> None:
    layers = layers_of(tmp_path, 2, userns, opened)
    (tmp_path / "layer1/secret").mkdir()
    (tmp_path / "layer1/secret/key").touch()
    (tmp_path / "layer0/bait").mkdir()
    os.setxattr(tmp_path / "layer0/bait", "trusted.overlay.redirect", b"/secret")
    merged = opened(mounts.overlay(layers, *writable(tmp_path, "one", opened)))
    try:
        found = os.listdir(at(merged, "bait"))
    except PermissionError:
        found = []
    assert found == []


def test_a_refusal_says_what_overlay_said(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(KernelError, match="overlay"):
        mounts.overlay([], opened(path(tmp_path)), None)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(KernelError) as refused:
        mounts.overlay([opened(mounts.clone(opened(path(file))))] * 2, None, None)
    assert refused.value.errno in (errno.EINVAL, errno.ENOTDIR)


# Paths in an image -------------------------------------------------------------------------


def test_links_and_dots_never_lead_out_of_the_root(root: int, opened: Opened) -> None:
    inside = os.stat(opened(mounts.resolve(root, "/etc/passwd")))
    for name in ("link", "../../etc/passwd", "etc/../../../etc/passwd", "/var/run/../link"):
        assert os.path.samestat(os.stat(opened(mounts.resolve(root, name))), inside)
    with pytest.raises(KernelError) as missing:
        mounts.resolve(root, "out")
    assert errno_of(missing) == errno.ENOENT


def test_a_link_itself_can_be_asked_for(root: int, opened: Opened) -> None:
    found = os.stat(opened(mounts.resolve(root, "out", follow=False)))
    assert stat.S_ISLNK(found.st_mode)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loop", errno.ELOOP),
        ("etc/passwd/x", errno.ENOTDIR),
        ("a\0b", errno.EINVAL),
        ("n" * 256, errno.ENAMETOOLONG),
    ],
)
def test_what_cannot_be_resolved_is_an_error_that_says_why(
    root: int, name: str, expected: int
) -> None:
    with pytest.raises(KernelError) as refused:
        mounts.resolve(root, name)
    assert errno_of(refused) == expected


def test_a_file_is_read_to_its_bound(root: int) -> None:
    assert mounts.read_bounded(root, "link", 15) == b"root:x:0:0::/:\n"
    with pytest.raises(KernelError) as large:
        mounts.read_bounded(root, "etc/passwd", 14)
    assert errno_of(large) == errno.EFBIG


@pytest.mark.parametrize("name", ["fifo", "etc"])
def test_only_regular_files_are_read_and_nothing_blocks(root: int, name: str) -> None:
    with pytest.raises(KernelError) as refused:
        mounts.read_bounded(root, name, 100)
    assert errno_of(refused) == errno.EINVAL


def test_missing_directories_are_made_with_their_owner_and_mode(root: int, tmp_path: Path) -> None:
    mounts.make_dirs(root, "/var/run/app//./data", 0o2775, BASE, BASE + 1)
    for name in ("run/app", "run/app/data"):
        made = (tmp_path / "image" / name).stat()
        assert (stat.S_IMODE(made.st_mode), made.st_uid, made.st_gid) == (0o2775, BASE, BASE + 1)
    assert (tmp_path / "image/run").stat().st_uid == 0, "what existed is left alone"
    mounts.make_dirs(root, "/var/run/app/data", 0o700, 0, 0)
    assert (tmp_path / "image/run/app/data").stat().st_uid == BASE


def test_directories_are_not_made_through_a_link_that_leads_nowhere(
    root: int, tmp_path: Path
) -> None:
    with pytest.raises(KernelError) as refused:
        mounts.make_dirs(root, "dangling/data", 0o755, BASE, BASE)
    assert errno_of(refused) == errno.EEXIST
    assert not Path("/nowhere").exists()
    with pytest.raises(KernelError) as refused:
        mounts.make_dirs(root, "etc/passwd/data", 0o755, BASE, BASE)
    assert errno_of(refused) == errno.ENOTDIR
    mounts.make_dirs(root, "../../above", 0o755, BASE, BASE)
    assert (tmp_path / "image/above").is_dir()
    assert not (tmp_path / "above").exists()
