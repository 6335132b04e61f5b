"""The image store with everything real: docker-registry, skopeo, the jailed unpacker, the log."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sandbox.control.images import Images
from sandbox.errors import ClientException, ImageError, ImageNotFound, RegistryError
from sandbox.images.documents import ImageConfig
from sandbox.images.image_store import ImageStore
from sandbox.images.registry import RegistryClient
from sandbox.model.task import (
    ContainerDefinition,
    ContainerKnown,
    Status,
    TaskDefinition,
    TaskDesired,
    TaskKnown,
)
from sandbox.store import rows
from scripts import skopeo
from scripts.make_image import ARCHITECTURE, Layer, LayerWriter, Layout
from tests.conftest import Registry
from tests.kernel.pulling import Shelf, World, open_world
from tests.unit.images.http_server import Answer, Asked, Server, reply, serving


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as one:
        yield one


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one


def with_file(name: str, content: bytes) -> Callable[[LayerWriter], None]:
    def write(layer: LayerWriter) -> None:
        layer.directory("srv")
        layer.file(f"srv/{name}", content)

    return write


@dataclass
class Two:
    """A layout of one image of two layers."""

    layout: Layout
    layers: list[Layer]
    digest: str


@pytest.fixture
def two(tmp_path: Path) -> Two:
    layout = Layout(tmp_path / "two")
    noise = os.urandom(3_000_000)
    layers = [layout.layer(with_file("low", b"low")), layout.layer(with_file("high", noise))]
    config = {"Cmd": ["/bin/true"], "Env": ["A=1"], "User": "app", "StopSignal": "SIGQUIT"}
    return Two(layout, layers, layout.image("latest", layers, config))


# Getting ------------------------------------------------------------------------------------


async def test_an_image_from_a_real_registry_is_complete_and_stays(
    world: World, registry: Registry
) -> None:
    progress: dict[str, tuple[int, int | None]] = {}
    name = registry.images["tiny"]
    image = await world.images.ensure(name, progress=lambda w, d, t: progress.update({w: (d, t)}))
    assert image.reference == name
    assert image.config.cmd == ("/bin/sh",)
    assert (world.layers.path(image.diff_ids[0]) / "bin/busybox").stat().st_mode & 0o111
    assert progress and all(done == total for done, total in progress.values())
    assert await world.images.ensure(name, pull="never") == image


async def test_an_image_of_many_layers_unpacks_side_by_side(
    world: World, registry: Registry
) -> None:
    image = await world.images.ensure(registry.images["many"])
    assert len(image.diff_ids) == 7
    assert world.layers.ids() == sorted(image.diff_ids)
    assert (world.layers.path(image.diff_ids[-1]) / "usr/share/vim/README").read_bytes()


async def test_docker_schema_2_is_understood(world: World, registry: Registry, two: Two) -> None:
    target = f"{registry.address}/converted:v1"
    skopeo.copy(f"oci:{two.layout.directory}:latest", f"docker://{target}", "--format=v2s2")
    image = await world.images.ensure(target)
    assert list(image.diff_ids) == [layer.diff_id for layer in two.layers]


async def test_layouts_and_archives_give_the_same_image_as_a_registry(
    world: World, two: Two, tmp_path: Path
) -> None:
    archive = tmp_path / "saved.tar"
    skopeo.copy(f"oci:{two.layout.directory}:latest", f"docker-archive:{archive}:x/y:latest")
    from_layout = await world.images.ensure(f"oci:{two.layout.directory}:latest")
    from_archive = await world.images.ensure(f"docker-archive:{archive}")
    assert from_layout.digest == two.digest
    assert from_archive.config == from_layout.config
    assert from_archive.diff_ids == from_layout.diff_ids
    assert from_layout.config.stop_signal == 3


async def test_a_layout_is_read_anew_each_time(world: World, two: Two) -> None:
    name = f"oci:{two.layout.directory}:latest"
    before = await world.images.ensure(name)
    index = two.layout.directory / "index.json"
    index.write_text('{"schemaVersion":2,"manifests":[]}')
    other = Layout(two.layout.directory)
    other.image("latest", two.layers[:1], {"Cmd": ["/bin/false"]})
    after = await world.images.ensure(name)
    assert (before.config.cmd, after.config.cmd) == (("/bin/true",), ("/bin/false",))


async def test_a_tag_that_moved_is_seen_with_always_and_not_before(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    first = await world.images.ensure(shelf.name)
    moved = two.layout.image("latest", two.layers[:1], {"Cmd": ["/moved"]})
    assert (await world.images.ensure(shelf.name)).digest == first.digest
    assert (await world.images.ensure(shelf.name, pull="always")).digest == moved
    by_digest = shelf.name.replace(":latest", f"@{first.digest}")
    asked = len(server.asked)
    assert (await world.images.ensure(by_digest)).digest == first.digest
    assert len(server.asked) == asked


async def test_an_index_leads_to_the_wanted_platform(
    world: World, two: Two, tmp_path: Path
) -> None:
    layout = two.layout
    entries = json.loads((layout.directory / "index.json").read_text())["manifests"]
    entries[0]["platform"] = {"os": "linux", "architecture": ARCHITECTURE}
    other = {**entries[0], "platform": {"os": "linux", "architecture": "riscv64"}}
    inner = layout.json(
        "application/vnd.oci.image.index.v1+json",
        {"schemaVersion": 2, "manifests": [other, entries[0]]},
    )
    index = {"schemaVersion": 2, "manifests": [inner]}
    (layout.directory / "index.json").write_text(json.dumps(index))
    assert (await world.images.ensure(f"oci:{layout.directory}")).digest == two.digest
    with pytest.raises(ImageError, match="matching platform 'linux/s390x'"):
        await world.images.ensure(f"oci:{layout.directory}", platform="linux/s390x")
    with pytest.raises(ImageError, match=f"is for platform 'linux/{ARCHITECTURE}'"):
        await world.images.ensure(f"oci:{layout.directory}", platform="linux/riscv64")


async def test_what_must_not_be_pulled_and_is_not_here_is_not_found(
    world: World, server: Server
) -> None:
    with pytest.raises(ImageNotFound, match="must not be pulled"):
        await world.images.ensure(f"{server.host}/x", pull="never")
    assert server.asked == []


async def test_layers_that_came_twice_are_fetched_once(
    world: World, server: Server, two: Two
) -> None:
    low, high = two.layers
    two.layout.image("latest", [low, high, low], {})
    shelf = Shelf(server, two.layout)
    image = await world.images.ensure(shelf.name)
    assert len(image.diff_ids) == 3
    assert shelf.blobs.count(low.digest) == 1


# Together -----------------------------------------------------------------------------------


async def test_tasks_that_want_one_image_download_it_once(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(world.images.ensure, shelf.name)
    assert len(shelf.blobs) == len(set(shelf.blobs)) == 3


async def test_images_that_share_a_layer_download_it_once(
    world: World, server: Server, two: Two
) -> None:
    low, high = two.layers
    first = two.layout.image("latest", [low, high], {"Cmd": ["/1"]})
    second = two.layout.image("latest", [high], {"Cmd": ["/2"]})
    shelf = Shelf(server, two.layout)
    name = shelf.name.replace(":latest", "@")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.images.ensure, name + first)
        nursery.start_soon(world.images.ensure, name + second)
    assert shelf.blobs.count(high.digest) == 1


async def test_a_cancelled_pull_does_not_cancel_the_others(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    first = trio.CancelScope()

    async def hasty() -> None:
        with first:
            # Cancelled when it has begun to receive: it is the one that downloads.
            await world.images.ensure(shelf.name, progress=lambda *_: first.cancel())

    async def others() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(world.images.ensure, shelf.name)

    async with trio.open_nursery() as nursery:
        for job in (hasty, others):
            nursery.start_soon(job)
            await trio.testing.wait_all_tasks_blocked()
    assert first.cancelled_caught
    assert world.images.find(shelf.name).digest == two.digest


async def test_a_failure_is_not_repeated_by_each_waiter(
    world: World, server: Server, two: Two
) -> None:
    failures: list[Exception] = []

    async def fail() -> None:
        try:
            await world.images.ensure(f"{server.host}/missing")
        except ImageNotFound as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(fail)
    assert len(failures) == 5
    assert len(server.asked) == 1


# Hostile ------------------------------------------------------------------------------------


def spoiled(two: Two, how: Callable[[bytes], bytes]) -> Callable[[Asked], Answer | None]:
    """Serves the image's upper layer as `how` changes it."""

    def before(asked: Asked) -> Answer | None:
        if two.layers[1].digest not in asked.path:
            return None
        content = (two.layout.directory / "blobs/sha256" / two.layers[1].digest[7:]).read_bytes()
        return reply("200 OK", how(content))

    return before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c[:1000] + bytes([c[1000] ^ 1]) + c[1001:], "has digest|damaged|layer"),
        (lambda c: c + b"x", "longer than its"),
        (lambda c: c[:-1], "ended after"),
        (lambda c: b"", "ended after"),
    ],
)
async def test_content_that_is_not_what_was_promised_leaves_nothing(
    world: World, server: Server, two: Two, how: Callable[[bytes], bytes], message: str
) -> None:
    shelf = Shelf(server, two.layout, before=spoiled(two, how))
    with pytest.raises((ImageError, RegistryError), match=message):
        await world.images.ensure(shelf.name)
    assert not world.layers.has(two.layers[1].diff_id)
    assert world.images.list() == []
    assert not list((world.root / "blobs/tmp").iterdir())
    await world.images.prune([])
    assert world.left() == []


async def test_a_layer_with_another_content_than_its_diff_id_is_refused(
    world: World, two: Two
) -> None:
    low, high = two.layers
    lying = Layer(high.digest, high.size, low.diff_id)
    two.layout.image("lying", [lying], {})
    with pytest.raises(ImageError, match="layer sha256:"):
        await world.images.ensure(f"oci:{two.layout.directory}:lying")
    assert world.layers.ids() == []


async def test_a_manifest_that_is_not_the_digest_asked_for_is_refused(
    world: World, server: Server, two: Two
) -> None:
    other = two.layout.image("latest", two.layers[:1], {})
    content = (two.layout.directory / "blobs/sha256" / other[7:]).read_bytes()
    shelf = Shelf(server, two.layout, before=lambda _: reply("200 OK", content))
    with pytest.raises(ImageError, match="digest"):
        await world.images.ensure(shelf.name.replace(":latest", f"@{two.digest}"))


async def test_a_layer_that_breaks_off_is_resumed_while_it_is_unpacked(
    world: World, server: Server, two: Two
) -> None:
    cuts: list[int] = []

    def before(asked: Asked) -> Answer | None:
        if two.layers[1].digest not in asked.path:
            return None
        start = int(asked.headers.get("range", "bytes=0-")[6:-1])
        cuts.append(start)
        content = shelf.read(two.layers[1].digest)
        status = "206 Partial Content" if start else "200 OK"
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start : start + 1_500_000]
        return reply(status, part, length=len(content) - start, Content_Range=span)

    shelf = Shelf(server, two.layout, before=before)
    image = await world.images.ensure(shelf.name)
    assert len(cuts) > 1
    assert world.layers.has(image.diff_ids[1])


def _link_to_secrets(place: Path) -> None:
    place.symlink_to("/etc/shadow")


@pytest.mark.parametrize("name", ["blobs/sha256", "index.json", "oci-layout"])
async def test_a_layout_with_links_and_pipes_in_it_is_refused(
    world: World, two: Two, name: str, tmp_path: Path
) -> None:
    place = two.layout.directory / name
    if place.is_dir():
        place /= two.layers[1].digest[7:]
    for make in (_link_to_secrets, os.mkfifo):
        place.unlink()
        make(place)
        with trio.fail_after(5), pytest.raises(ImageError):
            await world.images.ensure(f"oci:{two.layout.directory}:latest")


async def test_archives_that_are_none_are_refused(world: World, tmp_path: Path) -> None:
    for content in (b"", b"nonsense" * 1000, b"\x1f\x8b\x08", b"\0" * 10240):
        archive = tmp_path / "archive"
        archive.write_bytes(content)
        with pytest.raises(ImageError):
            await world.images.ensure(f"docker-archive:{archive}")
    with pytest.raises(ImageNotFound, match="no such file"):
        await world.images.ensure(f"docker-archive:{tmp_path}/missing")


# Keeping and removing -----------------------------------------------------------------------


async def test_prune_removes_what_nothing_needs_and_nothing_else(world: World, two: Two) -> None:
    name = f"oci:{two.layout.directory}:latest"
    old = await world.images.ensure(name)
    new_digest = two.layout.image("latest", two.layers[:1], {"Cmd": ["/new"]})
    (two.layout.directory / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [two.layout._manifests[-1]]})
    )
    new = await world.images.ensure(name)
    assert new.digest == new_digest
    assert [shown for shown, _ in world.images.list()] == [name, None]

    assert (await world.images.prune([])).images == ()  # just handed over to somebody
    world.images._handed_over.clear()
    assert (await world.images.prune([old.digest])).images == ()
    pruned = await world.images.prune([])
    assert (pruned.images, pruned.layers) == ((old.digest,), (two.layers[1].diff_id,))
    assert [image.digest for _, image in world.images.list()] == [new.digest]
    assert world.layers.ids() == [two.layers[0].diff_id]

    assert (await world.images.prune([new.digest], unused=True)).images == ()
    assert (await world.images.prune([], unused=True)).images == (new.digest,)
    assert world.left() == []


async def test_what_is_being_pulled_is_not_pruned(world: World, server: Server, two: Two) -> None:
    pruned: list[Any] = []
    shelf = Shelf(server, two.layout)

    async with trio.open_nursery() as nursery:

        async def prune() -> None:
            pruned.append(await world.images.prune([], unused=True))

        await world.images.ensure(
            shelf.name, progress=lambda *_: nursery.start_soon(prune) if not pruned else None
        )
    assert pruned and all(one.images == one.layers == () for one in pruned)
    assert (await world.images.ensure(shelf.name, pull="never")).digest == two.digest


async def test_an_image_that_is_wanted_while_it_is_removed_is_whole_in_the_end(
    world: World, server: Server, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(server, two.layout)
    image = await world.images.ensure(shelf.name)
    world.images._handed_over.clear()
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()
    remove = world.layers.remove

    def slowly(diff_id: str) -> None:
        token.run_sync_soon(begun.set)
        time.sleep(0.1)
        remove(diff_id)

    monkeypatch.setattr(world.layers, "remove", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.images.remove, shelf.name)
        await begun.wait()
        await world.images.ensure(shelf.name)
    assert all(world.layers.has(diff_id) for diff_id in image.diff_ids)
    assert world.images.find(shelf.name) == image
    assert (world.root / "blobs/sha256" / image.config_digest[7:]).exists()


async def test_a_name_goes_first_and_the_image_with_its_last_name(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    other = shelf.name.replace(":latest", ":other")
    image = await world.images.ensure(shelf.name)
    await world.images.ensure(other)
    world.images._handed_over.clear()
    await world.images.remove(other, [image.digest])
    with pytest.raises(ImageError, match="in use"):
        await world.images.remove(shelf.name, [image.digest])
    assert [name for name, _ in world.images.list()] == [shelf.name]
    await world.images.remove(image.digest[7:19])
    assert world.left() == []
    with pytest.raises(ImageNotFound):
        world.images.find(shelf.name)


async def test_a_crash_in_a_pull_leaves_nothing_after_the_sweep(world: World) -> None:
    (world.root / "blobs/tmp/half").write_bytes(b"half")
    world.images.sweep()
    assert world.left() == []


async def test_a_layer_that_was_lost_is_fetched_again(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    image = await world.images.ensure(shelf.name)
    world.layers.remove(image.diff_ids[0])
    assert await world.images.ensure(shelf.name) == image
    assert world.layers.has(image.diff_ids[0])


async def test_blobs_are_kept_when_asked_and_serve_a_lost_layer(
    world: World, server: Server, two: Two
) -> None:
    shelf = Shelf(server, two.layout)
    async with RegistryClient() as registry:
        images = ImageStore(world.root, world.store, world.layers, registry, keep_blobs=True)
        image = await images.ensure(shelf.name)
        kept = world.root / "blobs/sha256" / two.layers[1].digest[7:]
        assert hashlib.sha256(kept.read_bytes()).hexdigest() == kept.name
        world.layers.remove(image.diff_ids[1])
        shelf.blobs.clear()
        await images.ensure(shelf.name)
        assert two.layers[1].digest not in shelf.blobs


# Importing ----------------------------------------------------------------------------------


async def test_a_directory_and_its_tar_become_the_same_image(world: World, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/tool").write_bytes(b"#!/bin/sh\n")
    os.chown(tree / "bin/tool", 12, 34)
    (tree / "bin/tool").chmod(0o4755)
    os.symlink("tool", tree / "bin/alias")
    os.link(tree / "bin/tool", tree / "bin/twin")
    os.setxattr(tree / "bin/tool", "user.note", b"kept")
    os.mknod(tree / os.fsdecode(b"caf\xe9"), 0o644)
    config = ImageConfig(cmd=("/bin/tool",), env=(("A", "1"),), working_dir="/bin")

    image = await world.images.import_(tree, "local/tool:1", config=config)
    assert image.reference == "docker.io/local/tool:1"
    assert image.config == config
    root = world.layers.path(image.diff_ids[0])
    status = (root / "bin/tool").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4755, 12, 34)
    assert (root / "bin/alias").readlink() == Path("tool")
    assert (root / "bin/twin").samefile(root / "bin/tool")
    assert os.getxattr(root / "bin/tool", "user.note") == b"kept"
    assert b"caf\xe9" in os.listdir(os.fsencode(root))

    for option, file in (("-z", "t.gz"), ("--zstd", "t.zst"), ("--no-recursion", "t.empty")):
        archive = tmp_path / file
        subprocess.run(["tar", option, "-cf", archive, "-C", tree, "."], check=True)
        packed = await world.images.import_(archive, "local/packed", config=config)
        found = world.layers.path(packed.diff_ids[0]) / "bin/tool"
        assert found.exists() is (option != "--no-recursion")

    assert (await world.images.import_(tree, "local/tool:2", config=config)).digest == image.digest
    assert await world.images.ensure("local/tool:1", pull="never")


@pytest.mark.parametrize("content", [b"nonsense" * 100, b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"])
async def test_an_archive_that_is_none_is_no_image(
    world: World, tmp_path: Path, content: bytes
) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(ImageError):
        await world.images.import_(archive, "x")
    await world.images.prune([])
    assert world.left() == []


async def test_an_import_needs_something_to_import(world: World, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="no such file"):
        await world.images.import_(tmp_path / "missing", "x")


# What the faces call ------------------------------------------------------------------------


def task(image: str) -> TaskDesired:
    container = ContainerDefinition(name="c", image=image)
    definition = TaskDefinition(
        family="f", cpu="256", memory="512", container_definitions=(container,)
    )
    return TaskDesired(
        id="0" * 32, cluster="c", group="g", definition=definition, created_at=0, id_base=0
    )


async def test_an_image_that_a_task_uses_is_not_removed(world: World, two: Two) -> None:
    images = Images(world.images, world.store)
    name = f"oci:{two.layout.directory}:latest"
    image = await images.pull(name)
    world.images._handed_over.clear()
    desired = task(name)
    await world.store.txn({rows.desired_key(desired.id): desired})
    for known in (
        None,
        TaskKnown(id=desired.id, containers=(ContainerKnown(name="c"),)),
        TaskKnown(
            id=desired.id,
            last_status=Status.RUNNING,
            containers=(ContainerKnown(name="c", image_digest=image.digest),),
        ),
    ):
        if known is not None:
            await world.store.txn({rows.known_key(desired.id): known})
        assert [line.in_use for line in images.list()] == [True]
        with pytest.raises(ClientException, match=f"in use by task {desired.id}"):
            await images.remove(name)
        assert (await images.prune(unused=True)).images == ()
    stopped = TaskKnown(id=desired.id, last_status=Status.STOPPED)
    await world.store.txn({rows.known_key(desired.id): stopped})
    assert [line.in_use for line in images.list()] == [False]
    assert images.inspect(image.digest).digest == image.digest
    await images.remove(name)
    assert images.list() == []
