"""How many there may be of each: EC2's default quotas, today's and those of Fargate's launch.

Amazon VPC User Guide, "Amazon VPC quotas". The numbers that a user can have raised at AWS are
fields, so that they can be raised here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox.model.fargate import Era


@dataclass(frozen=True, kw_only=True)
class Limits:
    vpcs: int = 5
    subnets_per_vpc: int = 200
    route_tables_per_vpc: int = 200
    routes_per_table: int = 50
    """Without the local ones."""
    internet_gateways: int = 5
    nat_gateways_per_zone: int = 5
    elastic_addresses: int = 5
    acls_per_vpc: int = 200
    entries_per_acl: int = 20
    """In each direction; without the last one, that denies."""
    groups: int | None = 2500
    """In the region."""
    groups_per_vpc: int | None = None
    rules_per_group: int = 60
    """In each direction, and of each IP version."""
    groups_per_interface: int = 5
    rules_per_interface: int = 1000
    """The product of the two above may not be greater."""
    prefix_lists: int = 100
    entries_per_prefix_list: int = 1000
    dhcp_options: int = 100
    interfaces: int = 5000
    retired_indexes: int = 1024
    """No quota of EC2's: so many groups of a VPC, and ACLs, are deleted before the data plane has
    released some. It keeps the ledger small."""

    def __post_init__(self) -> None:
        rules = self.groups_per_interface * self.rules_per_group
        if rules > self.rules_per_interface:
            raise ValueError(
                f"{self.groups_per_interface} groups of {self.rules_per_group} rules are {rules} "
                f"on an interface, at most {self.rules_per_interface} are possible"
            )


TODAY = Limits()
LAUNCH = Limits(
    groups=None, groups_per_vpc=500, rules_per_group=50, rules_per_interface=250, interfaces=350
)
"""Of 2017."""


def limits(era: Era | None = None) -> Limits:
    return LAUNCH if era == "2017" else TODAY
