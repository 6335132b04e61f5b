"""What the jailed unpacker makes of archives, held against GNU tar, and how layers are kept.

What it makes of hostile ones is a corpus: tests/hostile/layers.py.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import trio
import zstandard

from sandbox.errors import ImageError, KernelError
from sandbox.images.failures import pull_failure_text
from sandbox.images.layers import LayerLimits, LayerStore
from sandbox.images.reference import parse
from sandbox.kernel.trees import remove_tree
from tests.kernel import archives as tar

ROOT = Path(__file__).parents[2]
ID_BASE = 1 << 30
PLAIN = "application/vnd.oci.image.layer.v1.tar"
GZIP = PLAIN + "+gzip"
ZSTD = PLAIN + "+zstd"


@pytest.fixture(scope="session")
def unpacker() -> Path:
    subprocess.run([ROOT / "scripts/native", "unpack"], check=True)
    return ROOT / "sandbox/_bin/unpack"


@pytest.fixture
def stores(unpacker: Path, tmp_path: Path) -> Callable[..., LayerStore]:
    def make(limits: LayerLimits | None = None) -> LayerStore:
        return LayerStore(tmp_path / "layers", unpacker=unpacker, id_base=ID_BASE, limits=limits)

    return make


@pytest.fixture
def store(stores: Callable[..., LayerStore]) -> LayerStore:
    return stores()


def diff_id_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def chunked(content: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        await trio.lowlevel.checkpoint()
        yield content[at : at + size]


async def add(store: LayerStore, content: bytes) -> Path:
    return await store.add(chunked(content), media_type=PLAIN, diff_id=diff_id_of(content))


def names(store: LayerStore, content: bytes) -> list[str]:
    """What lies where layers lie: nothing after a failure."""
    return sorted(os.listdir(store.path(diff_id_of(content)).parent))


# -------------------------------------------------------------------- what comes out


def described(root: bytes) -> dict[bytes, dict[str, object]]:
    """Everything about a tree that an archive can say."""
    found: dict[bytes, dict[str, object]] = {}
    links: dict[int, bytes] = {}
    for top, directories, files in os.walk(root):
        for name in ([b""] if top == root else []) + sorted(directories + files):
            path = os.path.join(top, name) if name else root
            about = os.lstat(path)
            kind = stat.S_IFMT(about.st_mode)
            relative = os.path.relpath(path, root)
            found[relative] = {
                "mode": about.st_mode,
                "owner": (about.st_uid, about.st_gid),
                "mtime": about.st_mtime_ns,
                "target": os.readlink(path) if kind == stat.S_IFLNK else None,
                "content": Path(os.fsdecode(path)).read_bytes() if kind == stat.S_IFREG else None,
                "has holes": kind == stat.S_IFREG and about.st_blocks * 512 < about.st_size,
                "linked to": links.setdefault(about.st_ino, relative),
                "xattrs": {
                    key: os.getxattr(path, key, follow_symlinks=False)
                    for key in os.listxattr(path, follow_symlinks=False)
                },
            }
    return found


def make_rich_tree(root: Path) -> None:
    top = os.fsencode(root)
    (root / "etc/deep" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (root / "etc/deep" / ("d" * 120) / ("e" * 120) / ("f" * 200)).write_text("long names")
    for number, text in enumerate([b"plain", b"\xff\xfe not utf-8", b"new\nline", b" \\ * ' \""]):
        path = os.path.join(top, b"etc", text)
        with open(path, "wb") as file:
            file.write(os.urandom(number * 40_000))
        os.chown(path, 1000 + number, 65535 - number)
    os.symlink("x" * 1000, root / "etc/long link")
    os.symlink(b"\xff", os.path.join(top, b"etc/link"))
    os.lchown(root / "etc/link", 7, 8)
    os.link(root / "etc/plain", root / "hard")
    os.mkfifo(root / "fifo", 0o620)
    (root / "suid").write_text("x")
    os.chown(root / "suid", 12, 34)
    os.chmod(root / "suid", 0o6755)
    (root / "tmp").mkdir()
    os.chmod(root / "tmp", 0o1777)
    (root / "setgid").mkdir()
    os.chown(root / "setgid", 0, 50)
    os.chmod(root / "setgid", 0o2755)
    (root / "setgid/inner").mkdir()
    (root / "setgid/inner").chmod(0o755)
    (root / "setgid/file").write_text("of group 50")
    os.chown(root / "setgid/file", 0, 0)
    (root / "shut").mkdir()
    (root / "shut/in").write_text("reached all the same")
    (root / "shut/in").chmod(0)
    (root / "shut").chmod(0)
    with (root / "holes").open("wb") as holes:
        for offset in (0, 1 << 20, 5 << 20, 9 << 20, 11 << 20, 13 << 20, 15 << 20):
            holes.seek(offset)
            holes.write(b"data" * 2048)
        holes.truncate(20 << 20)
    os.setxattr(root / "holes", "user.note", b"of\0bytes\n")
    os.setxattr(root / "etc", "user.dir", b"d")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(root / "etc/plain", "security.capability", capability)
    for late, mtime_ns in [("hard", -1_500_000_001), ("suid", 9_999_999_999_123_456_789)]:
        os.utime(root / late, ns=(0, mtime_ns))
    os.utime(root / "etc/link", ns=(0, 86_400_000_000_001), follow_symlinks=False)
    for later in ("fifo", "tmp", "setgid", "etc", ""):
        os.utime(root / later, ns=(0, 1_234_567_890_123_456_789))
    root.chmod(0o751)


def gnu_tar(*arguments: str | Path) -> None:
    subprocess.run(["tar", "--numeric-owner", *map(str, arguments)], check=True)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=pax", "--sparse"],
        ["--format=pax", "--sparse", "--sparse-version=0.1"],
        ["--format=pax"],
        ["--format=gnu", "--sparse"],
        ["--format=gnu", "--sort=inode"],
    ],
    ids=" ".join,
)
async def test_a_rich_archive_becomes_what_gnu_tar_makes_of_it(
    store: LayerStore, tmp_path: Path, options: list[str]
) -> None:
    source, archive, expected = tmp_path / "source", tmp_path / "archive", tmp_path / "expected"
    source.mkdir()
    expected.mkdir()
    make_rich_tree(source)
    xattrs = ["--xattrs", "--xattrs-include=*"] if "--format=pax" in options else []
    gnu_tar("--create", *options, *xattrs, "-C", source, "-f", archive, ".")
    gnu_tar("--extract", *xattrs, "-p", "-C", expected, "-f", archive)
    made = await store.add(archive, media_type=PLAIN, diff_id=diff_id_of(archive.read_bytes()))
    assert described(os.fsencode(made)) == described(os.fsencode(expected))
    assert described(os.fsencode(made))[b"setgid/file"]["owner"] == (0, 0)


async def test_a_layer_without_a_root_entry_has_an_ordinary_root(store: LayerStore) -> None:
    made = await add(store, tar.archive(tar.file(b"a/b", b"x")))
    assert stat.filemode(made.stat().st_mode) == "drwxr-xr-x"
    assert stat.filemode((made / "a").stat().st_mode) == "drwxr-xr-x"
    assert store.sizes(diff_id_of(tar.archive(tar.file(b"a/b", b"x")))) == (1, 2)


async def test_a_directory_keeps_its_time_whatever_comes_into_it_later(store: LayerStore) -> None:
    content = tar.archive(
        tar.header(b"./", b"5", mtime=111, mode=0o755),
        tar.header(b"a", b"5", mtime=222, mode=0o700),
        tar.file(b"z"), tar.file(b"a/late"), tar.directory(b"b"), tar.file(b"a/later"),
        tar.file(b".wh.gone"), tar.file(b"a/.wh.gone"),
    )  # fmt: skip
    made = await add(store, content)
    assert (made.stat().st_mtime, (made / "a").stat().st_mtime) == (111, 222)


# -------------------------------------------------------------------- whiteouts


async def test_whiteouts_hide_what_lower_layers_have_and_nothing_else(
    store: LayerStore, tmp_path: Path
) -> None:
    lower = await add(
        store,
        tar.archive(
            *(
                tar.file(b"%s/%s" % (d, f), b"low")
                for d in (b"w", b"o", b"r")
                for f in (b"1", b"2")
            ),
            tar.file(b"top", b"low"),
        ),
    )
    upper = await add(
        store,
        tar.archive(
            tar.file(b"w/.wh.1"), tar.directory(b"w"), tar.file(b"w/3", b"up"),
            tar.file(b"o/5", b"up"), tar.file(b"o/.wh..wh..opq"), tar.file(b"o/.wh.2"),
            tar.file(b"o/4", b"up"),
            tar.file(b".wh.r"), tar.file(b"r/6", b"up"),
            tar.file(b"w/2", b"up"), tar.file(b"w/.wh.2"),
            tar.symlink(b".wh.top", b"of any type"),
            tar.file(b".wh..wh.aufs"), tar.file(b".wh..wh.plnk/12.34"),
        ),
    )  # fmt: skip
    assert stat.S_ISCHR((upper / "top").lstat().st_mode)
    assert (upper / "top").lstat().st_rdev == 0
    merged = tmp_path / "merged"
    merged.mkdir()
    script = 'mount -t overlay none -o lowerdir="$1:$2" "$3" && cd "$3" && grep -r . | sort'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *map(str, (upper, lower, merged))]
    seen = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert seen == ["o/4:up", "o/5:up", "r/6:up", "w/2:up", "w/3:up"]
    assert sorted(os.listdir(upper / "o")) == ["4", "5"]


async def test_a_marker_whose_directory_was_replaced_has_no_effect(
    store: LayerStore, tmp_path: Path
) -> None:
    content = tar.archive(
        tar.file(b"a/.wh.b"), tar.file(b"a/.wh..wh..opq"), tar.symlink(b"a", os.fsencode(tmp_path))
    )
    before = sorted(os.listdir(tmp_path))
    made = await add(store, content)
    assert os.listdir(made) == ["a"] and (made / "a").is_symlink()
    assert sorted(os.listdir(tmp_path)) == before
    assert not os.listxattr(tmp_path)


async def test_an_opaque_root_is_known(store: LayerStore) -> None:
    content = tar.archive(tar.file(b".wh..wh..opq"), tar.file(b"f"))
    await add(store, content)
    assert store.is_opaque(diff_id_of(content))


# -------------------------------------------------------------------- attacks


async def test_an_error_names_the_entry_in_one_printable_line(store: LayerStore) -> None:
    content = tar.archive(tar.file(b"\x1b[31m\n\xff", uid=70_000))
    with pytest.raises(ImageError) as caught:
        await add(store, content)
    assert str(caught.value).endswith(r": \x1b[31m\n\xff: uid 70000 is not below 65536")


@pytest.mark.parametrize("length", [1, 511, 512, 600, 1024, 1536])
async def test_a_truncated_archive_is_refused(store: LayerStore, length: int) -> None:
    content = tar.file(b"f", b"x" * 700)[:length]
    with pytest.raises(ImageError, match="truncated"):
        await add(store, content)
    assert names(store, content) == []


async def test_padding_of_any_length_belongs_to_the_diff_id(store: LayerStore) -> None:
    content = tar.archive(tar.file(b"f", b"x")) + bytes(100_001)
    assert (await add(store, content) / "f").read_text() == "x"
    with pytest.raises(ImageError, match="has content of sha256:"):
        await store.add(
            chunked(content[:-1]), media_type=PLAIN, diff_id=diff_id_of(content + b"\0")
        )
    assert len(names(store, content)) == 2  # the good one and its sizes


async def test_a_full_disk_is_the_hosts_fault_and_told_in_the_words_of_ecs(
    unpacker: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", disk], check=True)
    try:
        store = LayerStore(disk / "layers", unpacker=unpacker, id_base=ID_BASE)
        content = tar.archive(tar.file(b"a: large", bytes(2 << 20)))
        with pytest.raises(KernelError) as full:
            await add(store, content)
        assert str(full.value) == "write a: large: No space left on device"
        assert pull_failure_text(full.value, parse("busybox")) == (
            "CannotPullContainerError: ref pull has been retried 5 time(s): "
            "failed to extract layer: no space left on device"
        )
        assert names(store, content) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# -------------------------------------------------------------------- the transfer

TREE = tar.archive(*(tar.file(b"d/%d" % n, os.urandom(3000) + bytes(5000)) for n in range(300)))


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize(
    ("media_type", "transfer"),
    [
        (PLAIN, TREE),
        (GZIP, gzip.compress(TREE)),
        (GZIP, gzip.compress(TREE[:99_999]) + gzip.compress(TREE[99_999:])),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.compress(TREE)),
        (ZSTD, zstd(TREE)),
        (ZSTD, zstd(TREE[:99_999]) + zstd(TREE[99_999:])),
    ],
    ids=["plain", "gzip", "gzip members", "docker", "zstd", "zstd frames"],
)
async def test_a_layer_arrives_in_any_packing(
    store: LayerStore, media_type: str, transfer: bytes
) -> None:
    heard: list[int] = []
    made = await store.add(
        chunked(transfer),
        media_type=media_type,
        diff_id=diff_id_of(TREE),
        progress=lambda done, _: heard.append(done),
    )
    assert len(list((made / "d").iterdir())) == 300
    assert heard[-1] == len(TREE) and heard == sorted(heard)
    assert store.ids() == [diff_id_of(TREE)]
    assert store.sizes(diff_id_of(TREE)) == (300 * 8000, 301)


@pytest.mark.parametrize(
    ("media_type", "transfer", "message"),
    [
        (GZIP, gzip.compress(TREE)[:-5], "gzip stream is damaged"),
        (GZIP, gzip.compress(TREE) + b"more", "gzip stream is damaged"),
        (GZIP, gzip.compress(TREE)[:-8] + bytes(8), "gzip stream is damaged"),
        (GZIP, TREE, "gzip stream is damaged"),
        (ZSTD, zstd(TREE)[:-5], "zstd stream is"),
        (ZSTD, zstd(TREE) + zstd(b"")[:-2], "zstd stream is"),
        (ZSTD, zstd(TREE) + b"more", "zstd stream is damaged"),
        (PLAIN, gzip.compress(TREE), "header"),
        ("application/vnd.in-toto+json", TREE, "unknown type of layer"),
    ],
)
async def test_a_damaged_transfer_is_refused_and_nothing_is_left(
    store: LayerStore, media_type: str, transfer: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        await store.add(chunked(transfer), media_type=media_type, diff_id=diff_id_of(TREE))
    assert names(store, TREE) == []


async def test_a_bomb_is_stopped_at_the_limit(stores: Callable[..., LayerStore]) -> None:
    content = tar.header(b"zeros", size=1 << 33) + bytes(1 << 28)
    store = stores(LayerLimits(stream_bytes=1 << 24))
    for media_type, transfer in ((GZIP, gzip.compress(content, 1)), (ZSTD, zstd(content))):
        before = psutil.Process().memory_info().rss
        with pytest.raises(ImageError, match="larger than 16777216 bytes"):
            await store.add(chunked(transfer), media_type=media_type, diff_id=diff_id_of(content))
        assert psutil.Process().memory_info().rss - before < 64 << 20
        assert names(store, content) == []


# -------------------------------------------------------------------- the store


@pytest.mark.parametrize(
    "diff_id", ["", "sha256:", "sha256:" + "A" * 64, "sha256:../" + "a" * 61, "sha512:" + "a" * 64,
                "sha256:" + "a" * 64 + "\n"],
)  # fmt: skip
async def test_only_a_digest_names_a_layer(store: LayerStore, diff_id: str) -> None:
    with pytest.raises(ImageError, match="not a sha256 digest"):
        await store.add(chunked(TREE), media_type=PLAIN, diff_id=diff_id)


async def test_a_layer_wanted_twice_at_a_time_is_unpacked_once(store: LayerStore) -> None:
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        taken += 1
        async for chunk in chunked(TREE):
            yield chunk

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(
                lambda: store.add(counted(), media_type=PLAIN, diff_id=diff_id_of(TREE))
            )
    assert taken == 1
    assert store.has(diff_id_of(TREE))


async def test_a_cancelled_layer_leaves_no_process_and_no_file(store: LayerStore) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield TREE[:500_000]
        inner = [c for c in psutil.Process().children(recursive=True) if c.name() == "unpack"]
        assert len(inner) == 2
        cancel.cancel()
        await trio.sleep_forever()

    with trio.CancelScope() as cancel:
        await store.add(stalled(), media_type=PLAIN, diff_id=diff_id_of(TREE))
    assert cancel.cancelled_caught
    assert names(store, TREE) == []
    assert not [c for c in psutil.Process().children(recursive=True) if c.name() == "unpack"]


async def test_a_layer_that_does_not_come_to_an_end_is_given_up(
    stores: Callable[..., LayerStore],
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield TREE[:5000]
        await trio.sleep_forever()

    store = stores(LayerLimits(seconds=0.3))
    with pytest.raises(ImageError, match=r"longer than 0\.3 s"):
        await store.add(endless(), media_type=PLAIN, diff_id=diff_id_of(TREE))
    assert names(store, TREE) == []


async def test_a_refusal_does_not_wait_for_a_slow_transfer(store: LayerStore) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 512
        await trio.sleep_forever()

    with trio.fail_after(5), pytest.raises(ImageError, match="not octal"):
        await store.add(slow(), media_type=PLAIN, diff_id=diff_id_of(TREE))


async def test_an_error_of_the_transfer_passes_through(store: LayerStore) -> None:
    class BrokenOff(Exception):
        pass

    async def broken() -> AsyncIterator[bytes]:
        yield TREE[:5000]
        raise BrokenOff

    with pytest.RaisesGroup(BrokenOff):
        await store.add(broken(), media_type=PLAIN, diff_id=diff_id_of(TREE))
    assert names(store, TREE) == []


async def test_sweep_removes_what_a_crash_left_and_nothing_else(store: LayerStore) -> None:
    made = await add(store, TREE)
    half = made.parent / f".{'a' * 64}.12345678"
    (half / "some/files").mkdir(parents=True)
    (made.parent / f"{'b' * 64}.sizes").write_text("1 1")

    async def sweeping() -> AsyncIterator[bytes]:
        yield other[:512]
        store.sweep()
        yield other[512:]

    other = tar.archive(tar.file(b"other"))
    await store.add(sweeping(), media_type=PLAIN, diff_id=diff_id_of(other))
    assert store.ids() == sorted([diff_id_of(TREE), diff_id_of(other)])
    assert not half.exists()
    assert len(names(store, TREE)) == 4


async def test_the_deepest_layer_can_be_made_and_removed(store: LayerStore) -> None:
    content = tar.archive(
        tar.pax(path=b"d/" * 2040 + b"f") + tar.file(b"f", b"deep"),
        tar.file(b"e/x"),
        tar.pax(path=b"e/" + b"d/" * 2040 + b"f") + tar.file(b"f", b"deep"),
        tar.file(b"e", b"a file in the place of 2000 directories"),
    )
    made = await add(store, content)
    assert sorted(os.listdir(made)) == ["d", "e"]
    store.remove(diff_id_of(content))
    store.remove(diff_id_of(content))
    assert names(store, content) == []
    assert not store.has(diff_id_of(content))


def test_removing_a_tree_follows_no_link(tmp_path: Path) -> None:
    kept, doomed = tmp_path / "kept", tmp_path / "doomed"
    (kept / "in").mkdir(parents=True)
    (doomed / "a").mkdir(parents=True)
    for place in (doomed, doomed / "a"):
        (place / "link").symlink_to(kept)
    remove_tree(doomed)
    assert (kept / "in").is_dir() and not doomed.exists()


# -------------------------------------------------------------------- the jail


async def test_what_reads_the_archive_can_do_nothing_else(store: LayerStore) -> None:
    seen: dict[str, str] = {}
    mounts = ""
    namespaces: set[str] = set()

    async def looking() -> AsyncIterator[bytes]:
        nonlocal mounts, namespaces
        yield TREE[:5000]
        with trio.fail_after(5):
            while seen.get("Seccomp") != "2":
                await trio.sleep(0.01)
                for process in psutil.Process().children(recursive=True):
                    proc = Path(f"/proc/{process.pid}")
                    lines = (proc / "status").read_text().splitlines()
                    status = dict(line.split(":\t", 1) for line in lines)
                    if status["NSpid"].endswith("\t1"):
                        seen.update(status)
                        mounts = (proc / "mountinfo").read_text()
                        namespaces = {
                            name
                            for name in ("user", "mnt", "net", "pid", "ipc", "uts")
                            if os.readlink(proc / "ns" / name)
                            != os.readlink(Path("/proc/self/ns") / name)
                        }
        yield TREE[5000:]

    await store.add(looking(), media_type=PLAIN, diff_id=diff_id_of(TREE))
    assert set(seen["Uid"].split()) == set(seen["Gid"].split()) == {str(ID_BASE)}
    assert seen["Groups"].strip() == ""
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP
    assert {int(seen[s], 16) for s in ("CapEff", "CapPrm", "CapBnd")} == {0x8000001B}
    assert seen["NoNewPrivs"] == "1"
    assert namespaces == {"user", "mnt", "net", "pid", "ipc", "uts"}
    (mount,) = mounts.splitlines()
    assert {"nosuid", "nodev", "noexec"} <= set(mount.split()[5].split(","))


def test_a_file_system_without_idmapped_mounts_is_named(unpacker: Path, tmp_path: Path) -> None:
    script = 'mount -t ramfs none "$1" && exec "$2" 1073741824 9 9 9 </dev/null 3<"$1" 4>&1'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), str(unpacker)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b"Ethe file system of the layer store has no idmapped mounts\0"


@pytest.mark.parametrize("arguments", [["0", "1", "1", "1"], ["65536", "-1", "1", "1"], ["x"]])
def test_the_unpacker_refuses_arguments_that_would_be_dangerous(
    unpacker: Path, tmp_path: Path, arguments: list[str]
) -> None:
    command = ["sh", "-c", 'd=$1; shift; exec "$@" 3<"$d" 4>&1', "sh", str(tmp_path), str(unpacker)]
    done = subprocess.run([*command, *arguments], capture_output=True, check=False)
    assert done.returncode == 1 and done.stdout.startswith(b"E")
