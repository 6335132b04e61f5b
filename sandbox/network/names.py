"""The names that a VPC's resolver knows by itself, as a value, and what one of them is.

    ip-10-0-0-5.ec2.internal                  A      every address of the VPC's block
    ec2-198-18-0-5.compute-1.amazonaws.com    A      public addresses: inside, the private one
    5.0.0.10.in-addr.arpa                     PTR    both, backwards
    web.prod.local                            any    private zones (service discovery)
    localhost, RFC 1918 backwards, ...               answered here so that nobody else is asked

Outside us-east-1 the domains are REGION.compute.internal and REGION.compute.amazonaws.com. (VPC
User Guide, "DNS attributes for your VPC": private names are resolved always, public ones exist
with enableDnsHostnames and mean the private address inside the VPC, the public one elsewhere.)

Chosen where the guide says nothing: a private name is made of its address, so those of addresses
that nobody has are answered as well, reserved ones included; a public address that is another VPC's
is answered by itself, without a look at that VPC's attributes.

What is answered here is never asked of others, also when the answer is no: our own domains of every
region, the VPC's addresses backwards, the zones of RFC 6303 and RFC 7793 (Route 53's resolver has
rules of its own for them, too), and single labels, which would tell the host's resolver what a
task looks for and a task what the host's search domain has.

Names are tuples of labels here: a suffix of a tuple is had and hashed in no time, while a name of
127 labels costs dnspython a millisecond to take apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Literal

from sandbox.model.vpc import Network

Labels = tuple[bytes, ...]
"""From the host to the top, in lower case, without the root's empty one."""

TTL_S = 60
"""Of every name that is made of an address, and of every no."""

FIRST_REGION = "us-east-1"
"""It is older than the scheme of the names: its domains have no region in them."""

IN_ADDR: Labels = (b"in-addr", b"arpa")


@dataclass(frozen=True, slots=True)
class RecordSet:
    """All records of one type at a name."""

    kind: Literal["A", "AAAA", "SRV", "PTR"]
    values: tuple[str, ...]
    """As a zone file has them: `10.0.0.5`, `1 1 8080 a.web.prod.local.`"""
    ttl_s: int = TTL_S


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateZone:
    """A zone that only the VPC sees; it hides a public one of the same name."""

    origin: Labels
    records: Mapping[Labels, tuple[RecordSet, ...]]
    """Of every name that there is; names that are only on the way to others have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """What one VPC's resolver knows at one moment."""

    vpc_id: str
    is_on: bool
    """enableDnsSupport."""
    callers: frozenset[str]
    """The addresses of the VPC's interfaces: who may ask."""
    domain: Labels
    public_domain: Labels
    cidr: IPv4Network
    public_pool: IPv4Network
    public: Mapping[IPv4Address, IPv4Address | None]
    """Of this VPC: what is behind a public address; None where it has no name."""
    private_zones: Mapping[Labels, PrivateZone]
    served: frozenset[Labels]
    """Zones that have nothing in them, so that nobody else is asked."""
    existing: frozenset[Labels]
    """Names in them that exist all the same: they lead to names that there are."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a name: its records, none of them, or (None) that it does not exist."""

    origin: Labels
    """The zone that says so."""
    records: tuple[RecordSet, ...] | None


def zone_of(
    network: Network,
    *,
    region: str,
    public_pool: IPv4Network,
    private_zones: Iterable[PrivateZone] = (),
) -> Zone:
    """The names of a VPC. Costs less than a microsecond an interface.

    A VPC without enableDnsHostnames sees no private zones, as in EC2 (Route 53 Developer Guide,
    "Considerations when working with a private hosted zone").
    """
    vpc, interfaces = network.vpc, network.interfaces.values()
    cidr = IPv4Network(vpc.cidr_block)
    served = frozenset(SERVED | _reverse_of_ipv6(vpc.ipv6_cidr_block))
    return Zone(
        vpc_id=vpc.vpc_id,
        is_on=vpc.enable_dns_support,
        callers=frozenset(
            address
            for interface in interfaces
            for address in (interface.private_ip, interface.ipv6_address)
            if address is not None
        ),
        domain=labels(private_domain(region)),
        public_domain=labels(public_domain(region)),
        cidr=cidr,
        public_pool=public_pool,
        public={
            IPv4Address(interface.public_ip): (
                IPv4Address(interface.private_ip) if vpc.enable_dns_hostnames else None
            )
            for interface in interfaces
            if interface.public_ip is not None
        },
        private_zones={zone.origin: zone for zone in private_zones if vpc.enable_dns_hostnames},
        served=served,
        existing=served
        | {_backwards(cidr, octets) for octets in range(1, -(-cidr.prefixlen // 8))},
    )


def private_zone(name: str, records: Mapping[str, Sequence[RecordSet]]) -> PrivateZone:
    """A zone from names in full, as text. Make it once and give it to many snapshots."""
    origin = labels(name)
    found: dict[Labels, tuple[RecordSet, ...]] = {origin: ()}
    for owner, sets in records.items():
        path = labels(owner)
        if path[-len(origin) :] != origin:
            raise ValueError(f"{owner} is not in {name}")
        for start in range(1, len(path) - len(origin)):
            found.setdefault(path[start:], ())
        found[path] = tuple(sets)
    return PrivateZone(origin=origin, records=found)


def private_domain(region: str) -> str:
    return "ec2.internal" if region == FIRST_REGION else f"{region}.compute.internal"


def public_domain(region: str) -> str:
    if region == FIRST_REGION:
        return "compute-1.amazonaws.com"
    return f"{region}.compute.amazonaws.com"


def private_name(address: IPv4Address | str, region: str) -> str:
    """`privateDnsName` of an interface."""
    return f"ip-{_dashed(address)}.{private_domain(region)}"


def public_name(address: IPv4Address | str, region: str) -> str:
    """`publicDnsName` of a public address."""
    return f"ec2-{_dashed(address)}.{public_domain(region)}"


def labels(name: str) -> Labels:
    """Of a name as text; it is one that somebody of ours wrote, not a stranger."""
    return tuple(name.lower().rstrip(".").encode().split(b"."))


def text(name: Labels) -> str:
    """With the dot at its end."""
    return b".".join(name).decode() + "."


# Looking up ---------------------------------------------------------------------------------


def find(name: Labels, zone: Zone) -> Found | None:
    """What is known of a name; None if somebody else is to be asked."""
    for look in (_private_zone, _localhost, _private, _public, _reverse, _served, _single):
        if (found := look(name, zone)) is not None:
            return found
    return None


def _private_zone(name: Labels, zone: Zone) -> Found | None:
    """The longest zone wins, as in Route 53."""
    for start in range(len(name) if zone.private_zones else 0):
        if (private := zone.private_zones.get(name[start:])) is not None:
            return Found(private.origin, private.records.get(name))
    return None


def _localhost(name: Labels, zone: Zone) -> Found | None:
    """RFC 6761, 6.3: this machine, whatever is before it."""
    if name[-1:] != (b"localhost",):
        return None
    return Found(name[-1:], (RecordSet("A", ("127.0.0.1",)), RecordSet("AAAA", ("::1",))))


def _private(name: Labels, zone: Zone) -> Found | None:
    host = _below(zone.domain, name)
    if host is None:
        return None
    if host == ():
        return Found(zone.domain, ())
    address = _undashed(host, b"ip-")
    if address is None or address not in zone.cidr:
        return Found(zone.domain, None)
    return Found(zone.domain, (RecordSet("A", (str(address),)),))


def _public(name: Labels, zone: Zone) -> Found | None:
    """Only addresses of our pool are ours; all others are Amazon's."""
    host = _below(zone.public_domain, name)
    address = _undashed(host, b"ec2-") if host else None
    if address is None or address not in zone.public_pool:
        return None
    meant = zone.public.get(address, address)
    if meant is None:
        return Found(zone.public_domain, None)
    return Found(zone.public_domain, (RecordSet("A", (str(meant),)),))


def _reverse(name: Labels, zone: Zone) -> Found | None:
    block, beyond = _block(name)
    if block is None:
        return None
    if block.subnet_of(zone.cidr):
        own, prefix, domain, is_named = zone.cidr, "ip-", zone.domain, True
    elif block.subnet_of(zone.public_pool):
        own, prefix, domain = zone.public_pool, "ec2-", zone.public_domain
        is_named = zone.public.get(block[0], block[0]) is not None
    else:
        return None
    origin = _backwards(block, min(3, -(-own.prefixlen // 8)))
    if beyond:
        return Found(origin, None)
    if block.prefixlen < 32:
        return Found(origin, ())
    pointer = RecordSet("PTR", (f"{prefix}{_dashed(block[0])}.{text(domain)}",))
    return Found(origin, (pointer,) if is_named else None)


def _served(name: Labels, zone: Zone) -> Found | None:
    for start in range(len(name)):
        if name[start:] in zone.served:
            return Found(name[start:], () if name in zone.existing else None)
    return None


def _single(name: Labels, zone: Zone) -> Found | None:
    return Found((), None) if len(name) == 1 else None


# Addresses in names -------------------------------------------------------------------------


def _below(domain: Labels, name: Labels) -> Labels | None:
    """What is before the domain; None if the name is not in it."""
    return name[: -len(domain)] if name[-len(domain) :] == domain else None


def _dashed(address: IPv4Address | str) -> str:
    return str(address).replace(".", "-")


def _undashed(host: Labels, prefix: bytes) -> IPv4Address | None:
    """The address in `ip-10-0-0-5`; None if the host is no single label of that form."""
    if len(host) != 1 or not host[0].startswith(prefix) or b"." in host[0]:
        return None
    try:
        return IPv4Address(host[0][len(prefix) :].replace(b"-", b".").decode("ascii"))
    except ValueError:
        return None


def _block(name: Labels) -> tuple[IPv4Network | None, Labels]:
    """The addresses that a name in in-addr.arpa is about, and what of it is before their octets."""
    host = _below(IN_ADDR, name)
    if not host:
        return None, ()
    octets: list[int] = []
    while host and len(octets) < 4 and (octet := _octet(host[-1])) is not None:
        octets.append(octet)
        host = host[:-1]
    if not octets:
        return None, host
    return IPv4Network((bytes([*octets, 0, 0, 0])[:4], 8 * len(octets))), host


def _octet(label: bytes) -> int | None:
    if not label.isdigit() or len(label) > 3 or label != b"%d" % int(label):
        return None
    value = int(label)
    return value if value < 256 else None


def _backwards(block: IPv4Network, octets: int) -> Labels:
    """The name in in-addr.arpa of the first octets of the block's address."""
    packed = block.network_address.packed[:octets]
    return (*(b"%d" % octet for octet in reversed(packed)), *IN_ADDR)


def _reverse_of_ipv6(block: str | None) -> frozenset[Labels]:
    """The name in ip6.arpa of the VPC's own block, whose prefix is 56 bits: whole nibbles."""
    if block is None:
        return frozenset()
    network = IPv6Network(block)
    nibbles = network.network_address.exploded.replace(":", "")[: network.prefixlen // 4]
    return frozenset({(*(nibble.encode() for nibble in reversed(nibbles)), b"ip6", b"arpa")})


SERVED = frozenset(
    labels(name)
    for name in (
        "ec2.internal",
        "compute.internal",
        "localdomain",
        *(f"{octet}.in-addr.arpa" for octet in (0, 10, 127)),
        *(f"{octet}.172.in-addr.arpa" for octet in range(16, 32)),
        *(f"{octet}.100.in-addr.arpa" for octet in range(64, 128)),
        "168.192.in-addr.arpa",
        "254.169.in-addr.arpa",
        "2.0.192.in-addr.arpa",
        "100.51.198.in-addr.arpa",
        "113.0.203.in-addr.arpa",
        "255.255.255.255.in-addr.arpa",
        *("0." * 32 + "ip6.arpa", "1." + "0." * 31 + "ip6.arpa"),
        *(f"{nibble}.e.f.ip6.arpa" for nibble in "89ab"),
        "d.f.ip6.arpa",
        "8.b.d.0.1.0.0.2.ip6.arpa",
    )
)
