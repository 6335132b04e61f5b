"""The one region that an agent is: what its network operations are bound by."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network

from sandbox.control.vpc.limits import TODAY, Limits
from sandbox.errors import ConfigError
from sandbox.store.base import Store

PUBLIC_POOL = "198.18.0.0/15"
"""For benchmarks between networks (RFC 2544): no address of the internet, no usual private one."""
ELASTIC_PREFIX = 24


@dataclass(frozen=True, kw_only=True)
class Region:
    store: Store
    name: str = "us-east-1"
    zones: tuple[str, ...] = ("us-east-1a", "us-east-1b", "us-east-1c")
    limits: Limits = TODAY
    public_pool: str = PUBLIC_POOL
    random: Callable[[int], bytes] = os.urandom
    clock: Callable[[], float] = time.time

    @property
    def pool(self) -> IPv4Network:
        return IPv4Network(self.public_pool)

    @property
    def elastic_pool(self) -> IPv4Network:
        """The last /24 of the pool: Elastic addresses, those of NAT gateways among them. No block
        of a subnet lies in it. Its last address but one is the agent's own, for AWS's services."""
        last = int(self.pool.broadcast_address)
        return IPv4Network((last & ~0xFF, ELASTIC_PREFIX))


def check_public_pool(text: str, routes: Iterable[str] = ()) -> str:
    """`public_pool` as it is set, in its shortest form; `routes` are the destinations of the host.

    Raises ConfigError for what is no pool, and for one that takes addresses that the host reaches
    by another way. The default route is no such way, everything overlaps it. The routes that the
    agent itself makes for the pool are not for this.
    """
    try:
        pool = IPv4Network(text)
    except ValueError:
        raise ConfigError(f"public_pool: {text!r} is not an IPv4 network") from None
    if pool.prefixlen >= ELASTIC_PREFIX:
        raise ConfigError(f"public_pool: {pool} is too small, it takes a /{ELASTIC_PREFIX - 1}")
    if (
        pool.is_loopback
        or pool.is_link_local
        or pool.is_multicast
        or pool.network_address.is_unspecified
    ):
        raise ConfigError(f"public_pool: {pool} has addresses that cannot be routed")
    for route in (IPv4Network(text, strict=False) for text in routes):
        if route.prefixlen and pool.overlaps(route):
            raise ConfigError(
                f"public_pool: {pool} overlaps the route of this host to {route}: choose another"
            )
    return str(pool)
