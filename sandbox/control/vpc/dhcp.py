"""DHCP options: the domain and the name servers that tasks of a VPC are told.

A set never changes; a VPC takes another one. `default` is no set but what a VPC has without one:
its own resolver and the region's domain. (VPC User Guide, "DHCP option sets in Amazon VPC")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from sandbox.control.vpc import cidr
from sandbox.control.vpc.draft import Draft
from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.tags import checked_tags
from sandbox.model.vpc import DhcpOptions, Tag, Vpc
from sandbox.store.vpc_rows import vpc_key

DEFAULT: Final = "default"
AMAZON: Final = "AmazonProvidedDNS"
SERVERS_MOST: Final = 4
_DOMAIN: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def create_dhcp_options(
    draft: Draft,
    *,
    domain_name: str | None = None,
    domain_name_servers: Sequence[str] = (AMAZON,),
    tags: Iterable[Tag] = (),
) -> DhcpOptions:
    """Servers are IPv4 addresses, up to four, or AmazonProvidedDNS."""
    draft.touch_region()
    if len(draft.all_of_region(DhcpOptions)) >= draft.region.limits.dhcp_options:
        raise Refusal.DHCP_OPTIONS_LIMIT.error()
    if domain_name is not None and not _DOMAIN.fullmatch(domain_name):
        why = "It is not a domain."
        raise Refusal.VALUE.error(value=domain_name, parameter="domain-name", why=why)
    if not 1 <= len(domain_name_servers) <= SERVERS_MOST:
        why = f"There are 1 to {SERVERS_MOST} servers."
        raise Refusal.VALUE.error(
            value=len(domain_name_servers), parameter="domain-name-servers", why=why
        )
    servers = tuple(
        server if server == AMAZON else str(cidr.address(server)) for server in domain_name_servers
    )
    options = DhcpOptions(
        dhcp_options_id=draft.mint("dopt"),
        domain_name=domain_name,
        domain_name_servers=servers,
        tags=checked_tags(tags),
    )
    return draft.add(options)


def associate_dhcp_options(draft: Draft, dhcp_options_id: str, vpc_id: str) -> Vpc:
    """`default` takes the VPC's set away. Tasks that run keep what they were told."""
    vpc = draft.vpc(vpc_id)
    draft.touch_region()
    if dhcp_options_id != DEFAULT:
        draft.find(DhcpOptions, dhcp_options_id)
    return draft.change(msgspec.structs.replace(vpc, dhcp_options_id=dhcp_options_id))


def delete_dhcp_options(draft: Draft, dhcp_options_id: str) -> None:
    """Refused while a VPC has it."""
    options = draft.find(DhcpOptions, dhcp_options_id)
    region = draft.touch_region()
    for vpc_id in region.vpcs:
        vpc = draft.peek(vpc_key(vpc_id), Vpc)
        if vpc is not None and vpc.dhcp_options_id == dhcp_options_id:
            raise Refusal.DHCP_OPTIONS_IN_USE.error(id=dhcp_options_id)
    draft.remove(options)
