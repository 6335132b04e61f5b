from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.errors import NetworkError
from sandbox.model.vpc import DhcpOptions
from sandbox.network.resolv_conf import HostServers, Server, for_task, servers_in
from tests.unit.network.vpcs import vpc


def options(**members: object) -> DhcpOptions:
    return DhcpOptions(dhcp_options_id="dopt-1", **members)  # type: ignore[arg-type]


def test_a_task_is_given_the_vpcs_resolver_and_the_regions_domain() -> None:
    assert for_task(vpc(), options(), region="us-east-1") == (
        "search ec2.internal\nnameserver 10.0.0.2\noptions timeout:2 attempts:5\n"
    )
    text = for_task(vpc("10.9.0.0/24"), options(), region="eu-west-1")
    assert text.startswith("search eu-west-1.compute.internal\nnameserver 10.9.0.2\n")


def test_dhcp_options_say_which_domains_and_servers() -> None:
    given = options(
        domain_name="corp.example example.com",
        domain_name_servers=("10.0.0.53", "AmazonProvidedDNS", "2001:db8::53", "10.0.0.54"),
    )
    assert for_task(vpc(), given, region="us-east-1") == (
        "search corp.example example.com\n"
        "nameserver 10.0.0.53\nnameserver 10.0.0.2\nnameserver 2001:db8::53\n"
        "options timeout:2 attempts:5\n"
    )


@pytest.mark.parametrize(
    "members",
    [
        {"domain_name": "a\nnameserver 1.2.3.4"},
        {"domain_name": "a.example  b.example"},
        {"domain_name": "-x"},
        {"domain_name": "ü.example"},
        {"domain_name_servers": ("10.0.0.2\nsearch evil",)},
        {"domain_name_servers": ("resolver.example",)},
        {"domain_name_servers": ("",)},
    ],
)
def test_what_would_be_another_line_is_refused(members: dict[str, object]) -> None:
    with pytest.raises(NetworkError, match=r"^DHCP options dopt-1: no (domain name|address): "):
        for_task(vpc(), options(**members), region="us-east-1")


def test_only_nameserver_lines_with_an_address_count_and_three_of_them() -> None:
    text = """# nameserver 9.9.9.9
nameserver 127.0.0.53
  nameserver\tfe80::1%eth0   # router
nameserver
nameserver dns.example
nameserver 300.1.1.1
Nameserver 8.8.4.4
search nameserver
nameserver 2001:db8::1
nameserver 192.0.2.4
"""
    assert servers_in(text) == (
        Server("127.0.0.53"),
        Server("fe80::1%eth0"),
        Server("2001:db8::1"),
    )


def test_the_hosts_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    servers = HostServers(path)
    assert servers() == ()
    path.write_text("nameserver 192.0.2.1\n")
    assert servers() == (Server("192.0.2.1"),)
    path.write_text("nameserver 192.0.2.22\n")
    assert servers() == (Server("192.0.2.22"),)
    other = tmp_path / "other"
    other.write_text("nameserver 192.0.2.33\n")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.rename(path)
    assert servers() == (Server("192.0.2.33"),)
    path.unlink()
    assert servers() == ()


def test_a_file_that_is_no_text_has_no_servers(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"\xff\xfe\0nameserver\0 1.2.3.4\n" + bytes(100_000))
    assert HostServers(path)() == ()
    assert HostServers(tmp_path)() == ()
