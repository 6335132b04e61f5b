"""The probe tells the truth about this host and leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.kernel import mounts, packetlog, probe
from sandbox.kernel.cgroups import hierarchies
from sandbox.kernel.netfilter import BACKENDS
from sandbox.kernel.probe import Finding, State

pytestmark = pytest.mark.guest


@pytest.fixture
def findings(tmp_path: Path) -> dict[str, Finding]:
    found = probe.probe(tmp_path)
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


def test_this_host_can_run_tasks(findings: dict[str, Finding]) -> None:
    missing = [f for f in findings.values() if f.state is State.MISSING]
    assert missing == []
    assert probe.can_run_tasks(list(findings.values()))


def test_whatever_is_not_active_says_why(findings: dict[str, Finding]) -> None:
    assert all(f.why for f in findings.values() if f.state is not State.ACTIVE)


def test_each_controller_is_found_where_the_kernel_mounted_it(
    findings: dict[str, Finding],
) -> None:
    chosen = hierarchies.choose(
        hierarchies.parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    )
    for name in hierarchies.CONTROLLERS:
        expected = State.DEGRADED if name in chosen.legacy else State.ACTIVE
        assert findings[f"controller {name}"].state is expected


def test_a_file_system_without_id_mapping_is_missing_and_says_what_to_do() -> None:
    found = {f.name: f for f in probe.probe(Path("/sys/kernel"))}
    layers = found["id-mapped layers"]
    assert layers.state is State.MISSING
    assert layers.mend == (
        "/sys/kernel is on sysfs: put the state directory (--state-dir) on ext4, xfs or btrfs, "
        "or from Linux 6.3 on tmpfs; a mounted image file of ext4 will do"
    )
    assert not probe.can_run_tasks(list(found.values()))


def test_layers_by_name_are_no_lack(findings: dict[str, Finding]) -> None:
    layers = findings["id-mapped layers"]
    assert layers.state is State.ACTIVE
    given = "descriptor" if mounts.overlay_takes_descriptors() else "name (Linux before 6.13)"
    assert layers.why.endswith(f"layers by {given}")


def test_it_leaves_nothing_where_the_state_directory_will_be(tmp_path: Path) -> None:
    probe.probe(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_where_packets_can_be_logged_it_says_by_which_backend(findings: dict[str, Finding]) -> None:
    assert findings["NFLOG"].state is State.ACTIVE
    assert findings["NFLOG"].why.split()[-1] in BACKENDS


def test_without_nflog_tasks_run_and_flow_logs_lack_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packetlog, "works", lambda iptables: False)
    found = {f.name: f for f in probe.probe(tmp_path)}
    assert found["NFLOG"].state is State.DEGRADED
    assert "no REJECT" in found["NFLOG"].why
    assert probe.can_run_tasks(list(found.values()))
