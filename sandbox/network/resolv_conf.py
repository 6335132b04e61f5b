"""resolv.conf(5): the text that a task gets, and the name servers that the host's own text has."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from sandbox.errors import NetworkError
from sandbox.model.vpc import DhcpOptions, Vpc, resolver_address
from sandbox.network.names import private_domain

AMAZON = "AmazonProvidedDNS"

SERVERS_MAX = 3
"""MAXNS: libraries read no more."""

FILE_LIMIT = 64 << 10

DOMAIN = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Server:
    """A resolver that is asked on the host's behalf."""

    address: str
    port: int = 53


def for_task(vpc: Vpc, options: DhcpOptions, *, region: str) -> str:
    """A task's /etc/resolv.conf, from its VPC's DHCP options.

    The domain name may be several, apart by blanks, which Linux takes for a search list (VPC User
    Guide, "DHCP option sets"); without one it is the region's. NetworkError for a name or a server
    that would be something else in the file. The options line is Amazon Linux's.
    """
    domains = (options.domain_name or private_domain(region)).split(" ")
    servers = [
        str(resolver_address(vpc.cidr_block)) if server == AMAZON else server
        for server in options.domain_name_servers
    ]
    if bad := [domain for domain in domains if not DOMAIN.fullmatch(domain)]:
        raise NetworkError(f"DHCP options {options.dhcp_options_id}: no domain name: {bad[0]!r}")
    if bad := [server for server in servers if not _is_address(server)]:
        raise NetworkError(f"DHCP options {options.dhcp_options_id}: no address: {bad[0]!r}")
    lines = [
        f"search {' '.join(domains)}",
        *(f"nameserver {server}" for server in servers[:SERVERS_MAX]),
        "options timeout:2 attempts:5",
    ]
    return "\n".join(lines) + "\n"


def servers_in(content: str) -> tuple[Server, ...]:
    """The `nameserver` lines that have an address, in order, as many as libraries read."""
    found = []
    for line in content.splitlines():
        match line.split():
            case ["nameserver", address, *_] if _is_address(address):
                found.append(Server(address))
    return tuple(found[:SERVERS_MAX])


class HostServers:
    """The host's name servers, read again when the file is another one or was written.

    A call costs a stat. A file that is not there or not readable has none: a resolver that cannot
    tell whom to ask says so to each client, and is right again once the file is.
    """

    def __init__(self, path: Path = Path("/etc/resolv.conf")) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._servers: tuple[Server, ...] = ()

    def __call__(self) -> Sequence[Server]:
        try:
            status = os.stat(self._path)
            seen = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    self._servers = servers_in(file.read(FILE_LIMIT))
                self._seen = seen
        except OSError:
            self._seen, self._servers = None, ()
        return self._servers


def _is_address(word: str) -> bool:
    try:
        return bool(ip_address(word))
    except ValueError:
        return False
