"""Any requests in any order: what is true of a region stays true, and a refusal changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sandbox.control.vpc import (
    Draft,
    acls,
    addresses,
    defaults,
    gateways,
    groups,
    indexes,
    interfaces,
    prefix_lists,
    routes,
    subnets,
    vpcs,
)
from sandbox.control.vpc.interfaces import InterfaceRequest
from sandbox.control.vpc.limits import Limits
from sandbox.control.vpc.permissions import RuleRequest
from sandbox.errors import Ec2Error
from sandbox.model.vpc import (
    AclEntry,
    ElasticAddress,
    InternetGateway,
    NatGateway,
    NetworkAcl,
    NetworkInterface,
    PrefixList,
    RouteTable,
    SecurityGroup,
    Subnet,
)
from sandbox.store.vpc_rows import vpc_ids
from tests.unit.control.vpc.invariants import check
from tests.unit.control.vpc.regions import Ec2

FEW = Limits(
    vpcs=2,
    subnets_per_vpc=3,
    groups=6,
    rules_per_group=3,
    groups_per_interface=2,
    elastic_addresses=3,
    acls_per_vpc=3,
    entries_per_acl=2,
    route_tables_per_vpc=3,
    routes_per_table=2,
    interfaces=14,
    retired_indexes=3,
)

NONE = 20
PICK = st.integers(0, NONE)
"""Which of those that there are; NONE is none of them."""
BLOCKS = st.sampled_from(
    ["10.0.0.0/28", "10.0.0.0/27", "10.0.0.16/28", "10.0.1.0/28", "10.1.0.0/28"]
)
PEERS = st.sampled_from(["cidr", "group", "list"])


def chosen(ids: Sequence[str], number: int) -> str:
    return ids[number % len(ids)] if ids and number != NONE else "none-0"


class RegionModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name) / "store.db"
        # Room for the blocks of three small subnets beside the Elastic addresses.
        self.ec2 = Ec2(path, limits=FEW, public_pool="203.0.112.0/23")

    def teardown(self) -> None:
        trio.run(self.ec2.store.aclose)
        self.directory.cleanup()

    def attempt(self, decide: Callable[[Draft], object]) -> None:
        before = self.ec2.store.revision
        try:
            self.ec2.do(decide)
        except Ec2Error:
            assert self.ec2.store.revision == before

    def pick(self, kind: type, number: int) -> str:
        draft = Draft(self.ec2.region)
        found = [*draft.all_of_region(kind)]
        for vpc_id in draft.region_ledger().vpcs:
            found += draft.all(kind, vpc_id)
        return chosen(found, number)

    def pick_vpc(self, number: int) -> str:
        return chosen(vpc_ids(self.ec2.store), number)

    def pick_interface(self, number: int) -> str:
        draft = Draft(self.ec2.region)
        found: list[str] = []
        for vpc_id in draft.region_ledger().vpcs:
            each = draft.all(NetworkInterface, vpc_id).values()
            found += [interface.network_interface_id for interface in each]
        return chosen(found, number)

    @initialize()
    def begin(self) -> None:
        """With some of everything, so that requests are about something."""

        def make(draft: Draft) -> None:
            vpc = vpcs.create_vpc(draft, "10.0.0.0/16").vpc_id
            for block in ("10.0.0.0/28", "10.0.0.16/28"):
                subnets.create_subnet(draft, vpc, block)
            gateway = gateways.create_internet_gateway(draft).internet_gateway_id
            gateways.attach_internet_gateway(draft, gateway, vpc)
            groups.create_security_group(draft, "a", "d", vpc)
            prefix_lists.create_prefix_list(draft, "l", 2)
            addresses.allocate_address(draft)

        self.ec2.do(make)

    # VPCs and subnets

    @rule()
    def create_vpc(self) -> None:
        self.attempt(lambda draft: vpcs.create_vpc(draft, "10.0.0.0/16"))

    @rule()
    def create_default_vpc(self) -> None:
        self.attempt(defaults.create_default_vpc)

    @rule(n=PICK)
    def delete_vpc(self, n: int) -> None:
        vpc = self.pick_vpc(n)
        self.attempt(lambda draft: vpcs.delete_vpc(draft, vpc))

    @rule(n=PICK, block=BLOCKS)
    def create_subnet(self, n: int, block: str) -> None:
        vpc = self.pick_vpc(n)
        self.attempt(lambda draft: subnets.create_subnet(draft, vpc, block))

    @rule(n=PICK)
    def delete_subnet(self, n: int) -> None:
        subnet = self.pick(Subnet, n)
        self.attempt(lambda draft: subnets.delete_subnet(draft, subnet))

    # Interfaces and public addresses

    @rule(n=PICK, g=st.lists(PICK, max_size=2), is_public=st.booleans(), last=st.none() | PICK)
    def create_interface(self, n: int, g: list[int], is_public: bool, last: int | None) -> None:
        request = InterfaceRequest(
            subnet_id=self.pick(Subnet, n),
            task="t",
            group_ids=tuple(self.pick(SecurityGroup, each) for each in g),
            assign_public_ip=is_public,
            private_ip=None if last is None else f"10.0.0.{last % 20}",
        )
        self.attempt(lambda draft: interfaces.create_network_interface(draft, request))

    @rule(n=PICK)
    def delete_interface(self, n: int) -> None:
        id = self.pick_interface(n)
        self.attempt(lambda draft: interfaces.delete_network_interface(draft, id))

    @rule(n=PICK, g=st.lists(PICK, max_size=3))
    def modify_groups(self, n: int, g: list[int]) -> None:
        id = self.pick_interface(n)
        chosen = tuple(self.pick(SecurityGroup, each) for each in g)
        self.attempt(lambda draft: interfaces.modify_groups(draft, id, chosen))

    @rule()
    def allocate_address(self) -> None:
        self.attempt(addresses.allocate_address)

    @rule(n=PICK)
    def release_address(self, n: int) -> None:
        id = self.pick(ElasticAddress, n)
        self.attempt(lambda draft: addresses.release_address(draft, id))

    @rule(n=PICK, m=PICK, moves=st.booleans())
    def associate_address(self, n: int, m: int, moves: bool) -> None:
        id, eni = self.pick(ElasticAddress, n), self.pick_interface(m)
        self.attempt(
            lambda draft: addresses.associate_address(draft, id, eni, allow_reassociation=moves)
        )

    @rule(n=PICK)
    def disassociate_address(self, n: int) -> None:
        id = self.pick(ElasticAddress, n)
        address = Draft(self.ec2.region).all_of_region(ElasticAddress).get(id)
        association = address.association_id if address is not None else None
        self.attempt(lambda draft: addresses.disassociate_address(draft, association or "none"))

    # Gateways and routes

    @rule()
    def create_internet_gateway(self) -> None:
        self.attempt(gateways.create_internet_gateway)

    @rule(n=PICK, m=PICK)
    def attach_internet_gateway(self, n: int, m: int) -> None:
        id, vpc = self.pick(InternetGateway, n), self.pick_vpc(m)
        self.attempt(lambda draft: gateways.attach_internet_gateway(draft, id, vpc))

    @rule(n=PICK, m=PICK)
    def detach_internet_gateway(self, n: int, m: int) -> None:
        id, vpc = self.pick(InternetGateway, n), self.pick_vpc(m)
        self.attempt(lambda draft: gateways.detach_internet_gateway(draft, id, vpc))

    @rule(n=PICK, m=PICK)
    def create_nat_gateway(self, n: int, m: int) -> None:
        subnet, id = self.pick(Subnet, n), self.pick(ElasticAddress, m)
        self.attempt(lambda draft: gateways.create_nat_gateway(draft, subnet, id))

    @rule(n=PICK)
    def delete_nat_gateway(self, n: int) -> None:
        id = self.pick(NatGateway, n)
        self.attempt(lambda draft: gateways.delete_nat_gateway(draft, id))

    @rule(n=PICK, m=PICK, kind=st.sampled_from([InternetGateway, NatGateway]))
    def create_route(self, n: int, m: int, kind: type) -> None:
        table, target = self.pick(RouteTable, n), self.pick(kind, m)
        block = f"{m % 3}.0.0.0/8"
        self.attempt(lambda draft: routes.create_route(draft, table, block, target))

    @rule(n=PICK, m=PICK)
    def associate_route_table(self, n: int, m: int) -> None:
        table, subnet = self.pick(RouteTable, n), self.pick(Subnet, m)
        self.attempt(lambda draft: routes.associate_route_table(draft, table, subnet))

    @rule(n=PICK, m=PICK)
    def replace_main_table(self, n: int, m: int) -> None:
        table, vpc = self.pick(RouteTable, n), self.pick_vpc(m)
        self.attempt(
            lambda draft: routes.replace_route_table_association(
                draft, routes.main_of(draft, draft.vpc(vpc).vpc_id).main_association_id or "", table
            )
        )

    @rule(n=PICK, is_new=st.booleans())
    def create_or_delete_route_table(self, n: int, is_new: bool) -> None:
        table, vpc = self.pick(RouteTable, n), self.pick_vpc(n)
        if is_new:
            self.attempt(lambda draft: routes.create_route_table(draft, vpc))
        else:
            self.attempt(lambda draft: routes.delete_route_table(draft, table))

    # Groups, prefix lists, ACLs

    @rule(n=PICK, name=st.sampled_from(["a", "A", "b", "c"]))
    def create_group(self, n: int, name: str) -> None:
        vpc = self.pick_vpc(n)
        self.attempt(lambda draft: groups.create_security_group(draft, name, "d", vpc))

    @rule(n=PICK)
    def delete_group(self, n: int) -> None:
        id = self.pick(SecurityGroup, n)
        self.attempt(lambda draft: groups.delete_security_group(draft, id))

    @rule(n=PICK)
    def release_indexes(self, n: int) -> None:
        vpc = self.pick_vpc(n)
        self.attempt(lambda draft: indexes.release_index(draft, vpc, "group", n % 7))

    @rule(n=PICK, m=PICK, peer=PEERS, is_egress=st.booleans(), is_new=st.booleans())
    def change_rules(self, n: int, m: int, peer: str, is_egress: bool, is_new: bool) -> None:
        group, change = self.pick(SecurityGroup, n), groups.authorize if is_new else groups.revoke
        request = RuleRequest(
            ip_protocol="-1",
            cidr_ipv4=f"{m % 5}.0.0.0/8" if peer == "cidr" else None,
            referenced_group_id=self.pick(SecurityGroup, m) if peer == "group" else None,
            prefix_list_id=self.pick(PrefixList, m) if peer == "list" else None,
        )
        self.attempt(lambda draft: change(draft, group, [request], is_egress=is_egress))

    @rule(n=st.integers(1, 3))
    def create_prefix_list(self, n: int) -> None:
        self.attempt(lambda draft: prefix_lists.create_prefix_list(draft, "l", n))

    @rule(n=PICK, size=st.integers(0, 3))
    def change_prefix_list(self, n: int, size: int) -> None:
        id = self.pick(PrefixList, n)
        if size == 0:
            self.attempt(lambda draft: prefix_lists.delete_prefix_list(draft, id))
        else:
            self.attempt(
                lambda draft: prefix_lists.modify_prefix_list(
                    draft, id, add=[f"{n % 9}.0.0.0/8"], max_entries=size
                )
            )

    @rule(n=PICK, m=PICK)
    def put_acl(self, n: int, m: int) -> None:
        """Make one, put it before a subnet, or delete it."""
        vpc, acl, subnet = self.pick_vpc(n), self.pick(NetworkAcl, n), self.pick(Subnet, m)
        if m % 3 == 0:
            self.attempt(lambda draft: acls.create_network_acl(draft, vpc))
        elif m % 3 == 1:
            self.attempt(lambda draft: acls.delete_network_acl(draft, acl))
        else:
            self.attempt(
                lambda draft: acls.replace_network_acl_association(
                    draft, draft.find(Subnet, subnet).network_acl_association_id, acl
                )
            )

    @rule(n=PICK, number=st.integers(99, 102), is_egress=st.booleans())
    def create_acl_entry(self, n: int, number: int, is_egress: bool) -> None:
        acl = self.pick(NetworkAcl, n)
        entry = AclEntry(
            rule_number=number,
            is_egress=is_egress,
            rule_action="deny",
            protocol="-1",
            cidr_block="0.0.0.0/0",
        )
        self.attempt(lambda draft: acls.create_entry(draft, acl, entry))

    @rule()
    def restart(self) -> None:
        self.ec2.reopen()

    @invariant()
    def what_is_true_stays_true(self) -> None:
        check(self.ec2.region)


TestRegion = RegionModel.TestCase
TestRegion.settings = settings(
    max_examples=10,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
