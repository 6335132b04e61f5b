from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from sandbox.images.rootfs import stack
from sandbox.kernel.trees import remove_tree


def deep(top: Path, depth: int) -> None:
    """Nest directories far deeper than a path may be long."""
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d" * 50, dir_fd=fd)
        below = os.open("d" * 50, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_a_tree_deeper_than_any_path_is_deleted_with_few_descriptors(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    deep(top, 3000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        remove_tree(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not top.exists()


def test_what_links_lead_to_stays(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "a/link").symlink_to(tmp_path / "outside")
    (top / "a/b/link").symlink_to(tmp_path / "outside/file")
    (top / "up").symlink_to("..")
    os.link(tmp_path / "outside/file", top / "a/hard")
    os.mkfifo(top / "fifo")
    remove_tree(top)
    assert os.listdir(tmp_path) == ["outside"]
    assert (tmp_path / "outside/file").read_text() == "mine"


def test_many_entries_in_many_directories_go(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for one in range(30):
        for two in range(10):
            (top / f"{one}/{two}").mkdir(parents=True)
            for three in range(5):
                (top / f"{one}/{two}/{three}").touch()
    remove_tree(top)
    assert not top.exists()


def test_a_link_in_place_of_the_tree_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "top").symlink_to("outside")
    with pytest.raises(Exception, match="rmdir"):
        remove_tree(tmp_path / "top")
    assert (tmp_path / "outside").exists()


def test_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_layers_are_stacked_topmost_first_each_once() -> None:
    assert stack(["a", "b", "a", "c"], lambda _: False) == ["c", "a", "b"]
    assert stack([], lambda _: False) == []


def test_nothing_below_an_opaque_layer_counts() -> None:
    assert stack(["a", "b", "c"], lambda layer: layer == "b") == ["c", "b"]
