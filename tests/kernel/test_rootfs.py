"""Root file systems as the task and as the host see them."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from sandbox.errors import ImageError
from sandbox.images.documents import Image, ImageConfig
from sandbox.images.layers import LayerStore
from sandbox.images.rootfs import Rootfs, RootfsStore
from sandbox.kernel import slots
from scripts.make_image import LayerWriter, Layout

ROOT = Path(__file__).parents[2]
UNPACKER_BASE = 1 << 30
BASE = 0x7FFE0000
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
Prepare = Callable[[Image], Awaitable[Rootfs]]
Build = Callable[..., Awaitable[Image]]


@pytest.fixture
async def slot() -> AsyncIterator[slots.Slot]:
    (slot,) = await slots.make([BASE])
    yield slot
    slot.close()


@pytest.fixture
def layers(tmp_path: Path) -> LayerStore:
    subprocess.run([ROOT / "scripts/native", "unpack"], check=True)
    program = ROOT / "sandbox/_bin/unpack"
    return LayerStore(tmp_path / "layers", unpacker=program, id_base=UNPACKER_BASE)


@pytest.fixture
def roots(layers: LayerStore) -> RootfsStore:
    return RootfsStore(layers)


@pytest.fixture
def build(layers: LayerStore, tmp_path: Path) -> Build:
    """An image of layers, each written by a function, lowest first."""
    layout = Layout(tmp_path / "layout")

    async def make(*writers: Callable[[LayerWriter], None]) -> Image:
        made = [layout.layer(writer) for writer in writers]
        for layer in made:
            blob = layout.directory / "blobs/sha256" / layer.digest[7:]
            await layers.add(blob, media_type=GZIP, diff_id=layer.diff_id)
        return Image(
            reference="x",
            digest="sha256:" + "0" * 64,
            platform="linux/amd64",
            config=ImageConfig(),
            diff_ids=tuple(layer.diff_id for layer in made),
            size_bytes=0,
            config_digest="sha256:" + "1" * 64,
        )

    return make


@pytest.fixture
async def prepare(roots: RootfsStore, slot: slots.Slot, tmp_path: Path) -> AsyncIterator[Prepare]:
    """The root of one container, again and again; closed after the test."""
    made: list[Rootfs] = []

    async def one(image: Image) -> Rootfs:
        for old in made:
            old.close()
        made.clear()
        made.append(await roots.prepare(image, tmp_path / "container", slot.userns_fd, BASE))
        return made[0]

    yield one
    for old in made:
        old.close()


def at(root: Rootfs, path: str = "") -> Path:
    return Path(f"/proc/self/fd/{root.mount_fd}", path)


def as_root_of_the_task(slot: slots.Slot, root: Rootfs, script: str) -> None:
    """Run a shell script in the task's user namespace, in its root directory."""
    command = ["nsenter", f"--user=/proc/self/fd/{slot.userns_fd}", "-S", "0", "-G", "0"]
    command += ["sh", "-ec", f"cd /proc/self/fd/{root.mount_fd}; {script}"]
    subprocess.run(command, check=True, pass_fds=[slot.userns_fd, root.mount_fd])


def base(layer: LayerWriter) -> None:
    layer.directory("etc")
    layer.directory("tmp", 0o1777)
    layer.directory("data/deep")
    layer.file("etc/owned", b"owned", 0o640, uid=1000, gid=1001)
    layer.file("etc/gone", b"gone")
    layer.file("data/deep/hidden", b"hidden")


def change(layer: LayerWriter) -> None:
    layer.whiteout("etc/gone")
    layer.opaque("data")
    layer.file("data/new", b"new")


# Layers -------------------------------------------------------------------------------------


async def test_the_task_sees_the_merged_image_with_its_own_ids(
    build: Build, prepare: Prepare, layers: LayerStore
) -> None:
    image = await build(base, change)
    root = await prepare(image)
    assert sorted(os.listdir(at(root, "etc"))) == ["owned"]
    assert os.listdir(at(root, "data")) == ["new"]
    status = at(root, "etc/owned").stat()
    assert (status.st_uid, status.st_gid) == (BASE + 1000, BASE + 1001)
    on_disk = (layers.path(image.diff_ids[0]) / "etc/owned").stat()
    assert (on_disk.st_uid, on_disk.st_gid) == (1000, 1001)


async def test_root_of_the_task_may_write_everywhere_and_the_layers_stay(
    build: Build, prepare: Prepare, layers: LayerStore, slot: slots.Slot
) -> None:
    image = await build(base)
    root = await prepare(image)
    as_root_of_the_task(
        slot, root, "echo x >made; echo y >>etc/owned; rm etc/gone; chown 5 tmp; mkdir -p a/b"
    )
    assert at(root, "made").stat().st_uid == BASE
    assert at(root, "tmp").stat().st_uid == BASE + 5
    assert at(root, "etc/owned").read_bytes() == b"ownedy\n"
    layer = layers.path(image.diff_ids[0])
    assert (layer / "etc/owned").read_bytes() == b"owned"
    assert sorted(os.listdir(layer)) == ["data", "etc", "tmp"]
    assert (layer / "etc/gone").exists()


async def test_the_root_directory_looks_as_in_the_image_and_belongs_to_the_task(
    build: Build, prepare: Prepare, layers: LayerStore
) -> None:
    image = await build(base)
    source = layers.path(image.diff_ids[-1])
    source.chmod(0o711)
    os.setxattr(source, "user.note", b"kept")
    os.utime(source, ns=(1, 123456789_000000007))
    root = await prepare(image)
    status = at(root).stat()
    assert (status.st_uid, status.st_gid) == (BASE, BASE)
    assert stat.S_IMODE(status.st_mode) == 0o711
    assert status.st_mtime_ns == 123456789_000000007
    assert os.getxattr(at(root), "user.note") == b"kept"


async def test_an_opaque_root_hides_the_layers_below_it(build: Build, prepare: Prepare) -> None:
    def fresh(layer: LayerWriter) -> None:
        layer.file(".wh..wh..opq", b"")
        layer.file("only", b"")

    root = await prepare(await build(base, fresh))
    assert os.listdir(at(root)) == ["only"]


async def test_a_layer_may_come_twice(build: Build, prepare: Prepare) -> None:
    root = await prepare(await build(base, change, base))
    assert at(root, "etc/gone").exists()
    assert sorted(os.listdir(at(root, "data"))) == ["deep", "new"]


async def test_an_image_of_120_layers_runs(build: Build, prepare: Prepare) -> None:
    def writer(number: int) -> Callable[[LayerWriter], None]:
        return lambda layer: layer.file(f"file{number}", b"x")

    root = await prepare(await build(*(writer(number) for number in range(120))))
    assert len(os.listdir(at(root))) == 120


async def test_an_image_without_layers_is_an_empty_root(
    build: Build, prepare: Prepare, slot: slots.Slot
) -> None:
    root = await prepare(await build())
    assert os.listdir(at(root)) == []
    as_root_of_the_task(slot, root, "echo x >file")
    assert at(root, "file").stat().st_uid == BASE


async def test_no_mount_shows_on_the_host(build: Build, prepare: Prepare) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    await prepare(await build(base))
    assert Path("/proc/self/mountinfo").read_text() == before


# The writable layer -------------------------------------------------------------------------


async def test_a_container_that_starts_again_finds_what_it_wrote(
    build: Build, prepare: Prepare, slot: slots.Slot
) -> None:
    image = await build(base)
    as_root_of_the_task(slot, await prepare(image), "echo kept >made; rm etc/gone")
    for _ in range(2):
        again = await prepare(image)
        assert at(again, "made").read_text() == "kept\n"
        assert not at(again, "etc/gone").exists()


async def test_after_another_boot_the_writable_layer_is_begun_anew(
    build: Build, prepare: Prepare, slot: slots.Slot, tmp_path: Path
) -> None:
    image = await build(base)
    as_root_of_the_task(slot, await prepare(image), "echo torn >made")
    (work,) = (tmp_path / "container").glob("work.*")
    work.rename(work.with_name("work.of-another-boot"))
    assert not at(await prepare(image), "made").exists()


async def test_half_a_writable_layer_is_begun_anew(
    build: Build, prepare: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "container/upper").mkdir(parents=True)
    (tmp_path / "container/upper/half").touch()
    (tmp_path / "container/work").mkdir()
    assert not at(await prepare(await build(base)), "half").exists()


async def test_a_writable_layer_goes_whatever_the_task_left_in_it(
    build: Build, roots: RootfsStore, slot: slots.Slot, tmp_path: Path
) -> None:
    directory = tmp_path / "container"
    (tmp_path / "victim").write_text("mine")
    root = await roots.prepare(await build(base), directory, slot.userns_fd, BASE)
    as_root_of_the_task(
        slot,
        root,
        f"ln -s {tmp_path} out; mkfifo pipe; rm -r data; mkdir -m 0 closed; "
        "i=0; while [ $i -lt 200 ]; do mkdir d; cd -P d; i=$((i+1)); done",
    )
    root.close()
    locked = directory / "upper/locked"
    locked.touch()
    lock(locked)
    lock(directory / "upper/closed")
    (directory / "run.0").mkdir()
    await roots.discard(directory)
    await roots.discard(directory)
    assert os.listdir(directory) == ["run.0"]
    assert (tmp_path / "victim").read_text() == "mine"


def lock(path: Path) -> None:
    """chattr +i"""
    fd = os.open(path, os.O_RDONLY)
    fcntl.ioctl(fd, 0x40086602, struct.pack("l", 0x10 | 0x80000))
    os.close(fd)


# Users and volumes --------------------------------------------------------------------------


async def test_a_user_is_found_in_the_containers_own_root(
    build: Build, prepare: Prepare, roots: RootfsStore, slot: slots.Slot
) -> None:
    root = await prepare(await build(base))
    as_root_of_the_task(slot, root, "echo 'late:x:77:78::/late:' >etc/passwd")
    user = roots.resolve_user(root.mount_fd, "late")
    assert (user.uid, user.gid, user.home) == (77, 78, "/late")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volumes/data"
    path.mkdir(parents=True)
    return path


Populate = Callable[[str], Awaitable[None]]


@pytest.fixture
async def content(
    build: Build, prepare: Prepare, slot: slots.Slot, roots: RootfsStore, volume: Path
) -> Populate:
    root = await prepare(await build(base))
    as_root_of_the_task(
        slot,
        root,
        "cd data; umask 0; mkdir -m 2750 dir; echo one >dir/file; chown 5:6 dir/file; "
        "chmod 4711 dir/file; ln dir/file twin; ln -s /etc/owned link; ln -s /data ../alias; "
        "mkfifo -m 620 pipe; truncate -s 1G sparse; echo end >>sparse; chown -h 7 link; "
        "cp /bin/true ping; setcap cap_net_raw+ep ping; "
        "python3 -c \"import os; os.setxattr('dir', 'user.note', b'kept')\"; "
        "touch -d @1000 dir/file; touch -d @2000 dir; chown 8:9 .; chmod 750 .",
    )

    async def populate(path: str) -> None:
        with trio.fail_after(10):
            await roots.populate_volume(root.mount_fd, path, volume, BASE)

    return populate


@pytest.mark.parametrize("path", ["/data", "data/", "/alias", "/etc/../data"])
async def test_an_empty_volume_starts_with_the_images_content(
    content: Populate, volume: Path, path: str
) -> None:
    await content(path)
    assert sorted(os.listdir(volume)) == [
        "deep",
        "dir",
        "link",
        "ping",
        "pipe",
        "sparse",
        "twin",
    ]

    def owner(name: str) -> tuple[int, int, str]:
        found = (volume / name).lstat()
        return found.st_uid - BASE, found.st_gid - BASE, oct(stat.S_IMODE(found.st_mode))

    assert owner("") == (8, 9, "0o750")
    assert owner("dir") == (0, 0, "0o2750")
    assert owner("dir/file") == (5, 6, "0o4711")
    assert owner("link")[0] == 7
    assert owner("pipe") == (0, 0, "0o620")
    assert (volume / "twin").samefile(volume / "dir/file")
    assert (volume / "link").readlink() == Path("/etc/owned")
    assert ((volume / "dir").stat().st_mtime, (volume / "dir/file").stat().st_mtime) == (2000, 1000)
    assert os.getxattr(volume / "dir", "user.note") == b"kept"
    sparse = (volume / "sparse").stat()
    assert sparse.st_size == (1 << 30) + 4
    assert sparse.st_blocks * 512 < 1 << 20
    assert (volume / "deep/hidden").read_bytes() == b"hidden"
    assert namespace_of_capability(volume / "ping") == BASE


def namespace_of_capability(path: Path) -> int | None:
    """The host id of whose namespace's root a file capability is; None if it is anybody's."""
    value = os.getxattr(path, "security.capability")
    magic, permitted, _, _, _, *root_id = struct.unpack("<5I" + "I" * (len(value) == 24), value)
    assert permitted == 1 << 13  # CAP_NET_RAW
    return root_id[0] if magic >> 24 == 3 else None


async def test_a_capability_from_a_layer_holds_in_the_task_and_nowhere_else(
    build: Build,
    prepare: Prepare,
    layers: LayerStore,
    roots: RootfsStore,
    volume: Path,
) -> None:
    image = await build(base)
    in_layer = layers.path(image.diff_ids[0]) / "data/deep/hidden"
    subprocess.run(["setcap", "cap_net_raw+ep", in_layer], check=True)
    root = await prepare(image)
    await roots.populate_volume(root.mount_fd, "/data/deep", volume, BASE)
    assert namespace_of_capability(in_layer) is None
    assert namespace_of_capability(volume / "hidden") == BASE


async def test_a_volume_with_something_in_it_is_left_alone(content: Populate, volume: Path) -> None:
    (volume / "mine").touch()
    await content("/data")
    assert os.listdir(volume) == ["mine"]


async def test_a_copy_that_was_cut_off_is_begun_anew(content: Populate, volume: Path) -> None:
    (volume / "half").touch()
    volume.with_name(".populating").mkdir()
    (volume.with_name(".populating") / "data").touch()
    await content("/data/dir")
    assert os.listdir(volume) == ["file"]
    await content("/data")
    assert os.listdir(volume) == ["file"]


@pytest.mark.parametrize("path", ["/nothing/here", "/data/deep"])
async def test_without_content_the_volume_belongs_to_the_tasks_root(
    content: Populate, volume: Path, path: str
) -> None:
    await content(path)
    assert volume.stat().st_uid == BASE


@pytest.mark.parametrize("path", ["/etc/owned", "/data/pipe", "/data/link"])
async def test_a_volume_over_something_else_than_a_directory_is_refused(
    content: Populate, volume: Path, path: str
) -> None:
    with pytest.raises(ImageError, match="no directory there"):
        await content(path)
    assert os.listdir(volume.parent) == ["data"]
