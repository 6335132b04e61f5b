"""A VPC with interfaces for tests of its resolver, and short ways to ask it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network

import dns.message
import dns.rcode
import dns.rdatatype

from sandbox.model.vpc import Network, NetworkInterface, Vpc
from sandbox.network.answers import Message, answer
from sandbox.network.names import PrivateZone, Zone, zone_of

CALLER = "10.0.0.5"
POOL = IPv4Network("198.18.0.0/15")


def vpc(cidr_block: str = "10.0.0.0/16", **members: object) -> Vpc:
    given = {"vpc_id": "vpc-1", "cidr_block": cidr_block, "number": 1, "created_at": 0.0}
    return Vpc(**(given | members))  # type: ignore[arg-type]


def interface(private_ip: str, public_ip: str | None, ipv6: str | None = None) -> NetworkInterface:
    return NetworkInterface(
        network_interface_id=f"eni-{private_ip}",
        vpc_id="vpc-1",
        subnet_id="subnet-1",
        availability_zone="us-east-1a",
        private_ip=private_ip,
        ipv6_address=ipv6,
        mac_address="02:00:00:00:00:01",
        public_ip=public_ip,
        group_ids=("sg-1",),
        attachment_id="attachment",
        task="task",
        created_at=0.0,
    )


def zone(
    interfaces: Mapping[str, str | None] | None = None,
    *,
    region: str = "us-east-1",
    private_zones: Iterable[PrivateZone] = (),
    **members: object,
) -> Zone:
    """Of a VPC with these interfaces: their private addresses, and the public ones behind them."""
    found = {CALLER: None} if interfaces is None else interfaces
    return zone_of(
        Network(
            vpc=vpc(**members),  # type: ignore[arg-type]
            interfaces={private: interface(private, public) for private, public in found.items()},
        ),
        region=region,
        public_pool=POOL,
        private_zones=private_zones,
    )


def asked(
    name: str, kind: str = "A", *, of: Zone | None = None, caller: str = CALLER, query_id: int = 0
) -> Message | None:
    """The answer to one question; None if it is somebody else's."""
    query = dns.message.make_query(name, kind, id=query_id)
    return answer(query, of or zone(), caller)


def told(message: Message | None) -> str | list[str]:
    """What a client learns: values, or the error, or NODATA; FORWARDED if others are asked."""
    if message is None:
        return "FORWARDED"
    if message.rcode() != dns.rcode.NOERROR:
        return dns.rcode.to_text(message.rcode())
    values = [str(record) for records in message.answer for record in records]
    return values or "NODATA"


def zone_that_says_no(message: Message | None) -> str:
    assert message is not None
    [soa] = message.authority
    assert soa.rdtype == dns.rdatatype.SOA
    return str(soa.name)
