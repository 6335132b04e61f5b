from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.errors import ImageError
from sandbox.images.users import User, resolve_user

PASSWD = """root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:,,,:/home/app:/bin/sh
1000:x:0:0::/root:/bin/sh
broken:x:zero:0::/:/bin/sh
minus:x:-1:0::/:/bin/sh
huge:x:4294967296:0::/:/bin/sh
big:x:70000:0::/:/bin/sh
short:x:7
nohome:x:8:8

+::::::
digits:x:\u0661:0::/:/bin/sh
"""
GROUP = """root:x:0:
app:x:1001:
wheel:x:10:root,app
video:x:44:app,app
video2:x:44:app
far:x:99999:other
broken:x:x:app
"""
Resolve = Callable[[str], User]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image/etc").mkdir(parents=True)
    (tmp_path / "image/etc/passwd").write_text(PASSWD)
    (tmp_path / "image/etc/group").write_text(GROUP)
    return tmp_path / "image"


@pytest.fixture
def resolve(image: Path) -> Iterator[Resolve]:
    fd = os.open(image, os.O_PATH)
    yield lambda spec: resolve_user(fd, spec)
    os.close(fd)


@pytest.mark.parametrize(
    ("spec", "user"),
    [
        ("", User(uid=0, gid=0, groups=(10,), home="/root")),
        ("root", User(uid=0, gid=0, groups=(10,), home="/root")),
        ("app", User(uid=1000, gid=1001, groups=(10, 44), home="/home/app")),
        ("1000", User(uid=1000, gid=1001, groups=(10, 44), home="/home/app")),
        ("4242", User(uid=4242, gid=0)),
        ("app:video", User(uid=1000, gid=44, home="/home/app")),
        ("app:4", User(uid=1000, gid=4, home="/home/app")),
        ("5:6", User(uid=5, gid=6)),
        ("65535:65535", User(uid=65535, gid=65535)),
        (":44", User(uid=0, gid=44, home="/root")),
        ("app:", User(uid=1000, gid=1001, groups=(10, 44), home="/home/app")),
        ("nohome", User(uid=8, gid=8)),
        ("007", User(uid=7, gid=0)),
    ],
)
def test_users_are_found_by_dockers_rules(resolve: Resolve, spec: str, user: User) -> None:
    assert resolve(spec) == user


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody", "unable to find user 'nobody': no matching entries in passwd file"),
        ("app:nothing", "unable to find group 'nothing': no matching entries in group file"),
        ("broken", "unable to find user"),
        ("minus", "unable to find user"),
        ("short", "unable to find user"),
        ("digits", "unable to find user"),
        ("huge", "beyond"),
        ("big", "id 70000 is beyond a task's 65536 ids"),
        ("65536", "beyond"),
        ("1:65536", "beyond"),
        ("app:far", "beyond"),
        ("4294967296", "beyond"),
        ("4294967295", "beyond"),
        ("99999999999999999999", "unable to find user"),
        ("-1", "unable to find user"),
        ("+0", "unable to find user"),
        ("0x0", "unable to find user"),
        (" 0", "unable to find user"),
        ("0\n", "unable to find user"),
        ("\u0660", "unable to find user"),
        ("1e3", "unable to find user"),
    ],
)
def test_nobody_becomes_somebody_else_by_mistake(resolve: Resolve, spec: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        resolve(spec)


def test_numbers_need_no_files_and_names_do(image: Path, resolve: Resolve) -> None:
    (image / "etc/passwd").unlink()
    (image / "etc/group").unlink()
    assert resolve("") == User(uid=0, gid=0)
    assert resolve("12:34") == User(uid=12, gid=34)
    with pytest.raises(ImageError, match="no matching entries"):
        resolve("root")


def test_links_are_read_inside_the_image(image: Path, resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("app:x:1:1::/:\n")
    (image / "etc/passwd").rename(image / "real")
    (image / "etc/passwd").symlink_to("/real")
    assert resolve("app").uid == 1000
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("../../passwd")
    with pytest.raises(ImageError, match="no matching entries"):
        resolve("app")


def test_a_pipe_or_a_gigabyte_as_passwd_is_refused(image: Path, resolve: Resolve) -> None:
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    with pytest.raises(ImageError, match="cannot be read"):
        resolve("app")
    (image / "etc/passwd").unlink()
    with (image / "etc/passwd").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ImageError, match="cannot be read"):
        resolve("app")


def test_names_that_are_not_text_do_not_hide_the_others(image: Path, resolve: Resolve) -> None:
    (image / "etc/passwd").write_bytes(b"caf\xe9:x:5:5::/:\r\nok:x:6:6::/ok:\r\n")
    assert resolve("ok").home == "/ok"
