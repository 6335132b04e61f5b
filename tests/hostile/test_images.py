"""Every image of the corpus is refused with its reason, or is exactly the tree that it should be.

Each is pulled into an empty store through both of its doors: over HTTP from a registry, and from an
OCI layout. What is accepted is read through a really mounted root; of what is refused nothing may
be left.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.errors import ImageError, RegistryError
from sandbox.images.rootfs import RootfsStore
from sandbox.kernel import slots
from tests.conftest import IN_GUEST
from tests.hostile import documents, layers, umoci
from tests.hostile.cases import Accepted, Case, Refused
from tests.hostile.conftest import ID_BASE, Tally
from tests.hostile.images import Parts
from tests.hostile.trees import NOW, Tree, described
from tests.kernel.pulling import Shelf, World, open_world
from tests.unit.images.http_server import Answer, Asked, Server, reply

CASES = layers.CASES | documents.CASES
PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.guest] if case.is_about_the_kernel else [])
    for name, case in CASES.items()
]

ASKED = [
    name
    for name, case in CASES.items()
    if "layout" in case.doors and case.umoci.does != "not asked"
]
"""All that a layout can say: it has no Content-Type, and bytes do not break off on the way."""


@contextmanager
def counted(tally: Tally, name: str) -> Iterator[list[Refused | Accepted]]:
    """What was seen of a case, and whether it was right."""
    seen: list[Refused | Accepted] = []
    yield seen
    expected = CASES[name].outcome
    for outcome in seen:
        is_accepted = isinstance(outcome, Accepted)
        (tally.accepted if is_accepted else tally.rejected).add(name)
        if is_accepted and outcome != expected:
            tally.wrongly.add(name)
    assert [outcome for outcome in seen if outcome != expected] == []


@pytest.mark.parametrize("name", PARAMETERS)
async def test_an_image_is_refused_and_leaves_nothing_or_is_the_tree_that_it_should_be(
    name: str, server: Server, slot: slots.Slot, tally: Tally, tmp_path: Path
) -> None:
    case = CASES[name]
    shelf = shelve(case, server, tmp_path / "image")
    doors = {"registry": shelf.name, "layout": f"oci:{tmp_path}/image:latest"}
    with counted(tally, name) as seen:
        for door in case.doors:
            place = tmp_path / door
            place.mkdir()
            async with open_world(place, layers.LIMITS) as world:
                seen.append(await outcome_of(world, doors[door], slot, place))
    assert all(path.startswith("/v2/shelf/") for path in server.paths())


def shelve(case: Case, server: Server, directory: Path) -> Shelf:
    """Write the image into a layout, which the server serves as a registry does."""
    parts = Parts(case.image, server.host)
    layout = parts.write(directory)

    def before(asked: Asked) -> Answer | None:
        digest = asked.path.rpartition("/")[2]
        if digest == "latest":
            return reply("200 OK", parts.root, Content_Type=parts.content_type)
        return None if digest in parts.blobs else reply("404 Not Found")

    return Shelf(server, layout, before)


async def outcome_of(world: World, name: str, slot: slots.Slot, place: Path) -> Refused | Accepted:
    since_ns = time.time_ns()
    try:
        image = await world.images.ensure(name)
    except (ImageError, RegistryError) as error:
        assert world.left() == []
        return Refused(str(error))
    layers_mode = (world.root / "layers").stat().st_mode & 0o777
    assert layers_mode == 0o700, "no other user reaches a set-user-id file of an image"
    roots = RootfsStore(world.layers)
    root = await roots.prepare(image, place / "container", slot.userns_fd, ID_BASE)
    try:
        return Accepted(described(Path(f"/proc/self/fd/{root.mount_fd}"), ID_BASE, since_ns))
    finally:
        root.close()


@pytest.mark.skipif(IN_GUEST, reason="says nothing about the kernel")
@pytest.mark.skipif(shutil.which("umoci") is None, reason="needs umoci: scripts/setup --tests")
@pytest.mark.parametrize("name", ASKED)
def test_umoci_makes_the_same_of_it_or_the_corpus_says_why_not(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    layout, place = tmp_path / "layout", tmp_path / "umoci"
    Parts(case.image, "").write(layout)
    place.mkdir()
    assert what_umoci_does(case, layout, place) == case.umoci.does, case.umoci.because


def what_umoci_does(case: Case, layout: Path, place: Path) -> str:
    since_ns = time.time_ns()
    try:
        bundle = umoci.unpack(layout, place)
    except umoci.UmociRefused:
        return "the same" if isinstance(case.outcome, Refused) else "refuses"
    if isinstance(case.outcome, Refused):
        return "accepts"
    theirs = described(bundle / "rootfs", 0, since_ns)
    return "the same" if same(theirs, case.outcome.tree) else "another tree"


def same(theirs: Tree, ours: Tree) -> bool:
    """Times that no entry says are left to everybody."""
    unsaid = {path for path, node in ours.items() if node.mtime_ns == NOW}
    return ours == {
        path: dataclasses.replace(node, mtime_ns=NOW) if path in unsaid else node
        for path, node in theirs.items()
    }
