"""Which hierarchies are used, and what limits mean in them."""

from __future__ import annotations

import pytest

from sandbox.errors import ConfigError
from sandbox.kernel.cgroups.files import shares
from sandbox.kernel.cgroups.hierarchies import (
    Mount,
    choose,
    parse_mountinfo,
    parse_own_cgroup,
)

PURE = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"

HYBRID = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate
33 31 0:30 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
"""

CPU = Mount("/sys/fs/cgroup/cpu,cpuacct", 1, frozenset({"cpu"}))
MEMORY = Mount("/sys/fs/cgroup/memory", 1, frozenset({"memory"}))


def test_a_pure_host_has_one_tree_for_everything() -> None:
    chosen = choose(parse_mountinfo(PURE))
    assert chosen.unified == Mount("/sys/fs/cgroup", 2)
    assert chosen.legacy == {}


def test_on_a_hybrid_host_each_bound_controller_keeps_its_hierarchy() -> None:
    chosen = choose(parse_mountinfo(HYBRID))
    assert chosen.unified.path == "/sys/fs/cgroup/unified"
    assert chosen.legacy == {"cpu": CPU, "memory": MEMORY}  # pids stays with version 2


def test_copies_of_a_mount_that_containers_were_given_are_not_used() -> None:
    copy = "99 22 0:26 / /var/lib/machines/x/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert choose(parse_mountinfo(PURE + copy)).unified.path == "/sys/fs/cgroup"


def test_a_mount_point_with_a_blank_is_read_as_it_is() -> None:
    [mount] = parse_mountinfo(PURE.replace("/sys/fs/cgroup", r"/my\040cgroups"))
    assert mount.path == "/my cgroups"


def test_a_host_without_version_2_is_refused_with_what_mends_it() -> None:
    legacy_only = HYBRID.replace("cgroup2", "none2")
    with pytest.raises(ConfigError, match="mount -t cgroup2"):
        choose(parse_mountinfo(legacy_only))


def test_the_own_place_is_that_of_version_2() -> None:
    assert parse_own_cgroup("4:memory:/a\n1:name=systemd:/b\n0::/c/agent\n") == "/c/agent"
    assert parse_own_cgroup("4:memory:/a\n") == "/"


@pytest.mark.parametrize(
    ("weight", "expected"), [(1, 10), (100, 1024), (200, 2048), (10000, 102400)]
)
def test_weights_become_shares_on_the_kernels_scale(weight: int, expected: int) -> None:
    assert shares(weight) == expected
