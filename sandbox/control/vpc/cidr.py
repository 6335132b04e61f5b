"""CIDR blocks as EC2 takes them. Pure.

EC2 canonicalises: 100.68.0.18/18 is 100.68.0.0/18 from then on (EC2 API Reference, CreateVpc,
IpRange). It wants the prefix length, and it as a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from sandbox.control.vpc.refusals import Refusal

_IPV4 = re.compile(r"[0-9.]{7,15}/[0-9]{1,2}")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}/[0-9]{1,3}")
_ADDRESS = re.compile(r"[0-9.]{7,15}")

_UNROUTABLE = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
"""No block of a VPC overlaps these: this host, link-local, multicast and what is reserved."""


def ipv4_block(text: str, parameter: str = "cidrBlock") -> IPv4Network:
    """Raises InvalidParameterValue."""
    if _IPV4.fullmatch(text):
        try:
            return IPv4Network(text, strict=False)
        except ValueError:
            pass
    raise Refusal.NOT_A_CIDR.error(value=text, parameter=parameter)


def ipv6_block(text: str, parameter: str = "ipv6CidrBlock") -> IPv6Network:
    """Raises InvalidParameterValue."""
    if _IPV6.fullmatch(text):
        try:
            return IPv6Network(text, strict=False)
        except ValueError:
            pass
    raise Refusal.NOT_A_CIDR.error(value=text, parameter=parameter)


def block(text: str, parameter: str = "cidrBlock") -> IPv4Network | IPv6Network:
    """Of either version."""
    return ipv6_block(text, parameter) if ":" in text else ipv4_block(text, parameter)


def address(text: str) -> IPv4Address:
    """Raises InvalidParameterValue."""
    if _ADDRESS.fullmatch(text):
        try:
            return IPv4Address(text)
        except ValueError:
            pass
    raise Refusal.NOT_AN_ADDRESS.error(value=text)


def is_vpc_size(network: IPv4Network) -> bool:
    """Of a VPC, and of a subnet."""
    return 16 <= network.prefixlen <= 28


def is_unroutable(network: IPv4Network) -> bool:
    return any(network.overlaps(other) for other in _UNROUTABLE)


def overlap(network: IPv4Network, others: Iterable[str]) -> bool:
    return any(network.overlaps(IPv4Network(other)) for other in others)
