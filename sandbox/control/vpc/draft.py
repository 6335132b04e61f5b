"""A transaction in the making: what a decision read, and what it wants written.

Every row that is read counts: should it have changed by the time of writing, nothing is written and
the decision is made again. What a row cannot tell (that there is no other subnet here, that nobody
carries this group) is told by the VPC's ledger: whoever rests on its shape writes it (`touch`), and
who rests on its interfaces compares whose turn it is in each of its subnets (`interfaces`), which
every interface that comes or goes changes.

A draft sees its own writes, so decisions follow each other in one. A refused one leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from sandbox.control.vpc.refusals import Refusal
from sandbox.control.vpc.region import Region
from sandbox.errors import Conflict
from sandbox.model import names
from sandbox.model.task import Record
from sandbox.model.vpc import (
    DhcpOptions,
    ElasticAddress,
    InternetGateway,
    NatGateway,
    Network,
    NetworkAcl,
    NetworkInterface,
    PrefixList,
    RouteTable,
    SecurityGroup,
    Subnet,
    Vpc,
)
from sandbox.store import vpc_rows
from sandbox.store.base import Store
from sandbox.store.vpc_rows import (
    REGION_LEDGER,
    VPCS,
    Addresses,
    Link,
    RegionLedger,
    VpcLedger,
    addresses_key,
    id_of,
    key_of,
    ledger_key,
    link_key,
    region_prefix,
    vpc_key,
    vpc_prefix,
)

ATTEMPTS = 8
"""How often a decision is made anew: each time somebody else's was written, so somebody wins."""

NOT_FOUND: Mapping[type[Record], Refusal] = {
    Subnet: Refusal.SUBNET_NOT_FOUND,
    RouteTable: Refusal.ROUTE_TABLE_NOT_FOUND,
    NetworkAcl: Refusal.ACL_NOT_FOUND,
    SecurityGroup: Refusal.GROUP_NOT_FOUND,
    InternetGateway: Refusal.INTERNET_GATEWAY_NOT_FOUND,
    NatGateway: Refusal.NAT_GATEWAY_NOT_FOUND,
    PrefixList: Refusal.PREFIX_LIST_NOT_FOUND,
    ElasticAddress: Refusal.ALLOCATION_NOT_FOUND,
    DhcpOptions: Refusal.DHCP_OPTIONS_NOT_FOUND,
}

R = TypeVar("R")
T = TypeVar("T", bound=Record)


class Draft:
    """`put`, `delete` and `expect` are what `Store.txn` takes; a caller may add rows of its own."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.now = region.clock()
        self.put: dict[str, msgspec.Struct] = {}
        self.delete: set[str] = set()
        self.expect: dict[str, int] = {}
        self._keys: dict[str, Sequence[str]] = {}

    # Reading ---------------------------------------------------------------------------------

    def peek(self, key: str, kind: type[T]) -> T | None:
        """As this draft would leave it; a change of it by others does not matter."""
        if key in self.delete:
            return None
        if (own := self.put.get(key)) is not None:
            assert isinstance(own, kind)
            return own
        row = self.region.store.get(key, kind)
        return row.value if row is not None else None

    def get(self, key: str, kind: type[T]) -> T | None:
        """As `peek`, but a change of it by others makes this draft void."""
        row = self.region.store.get(key, kind)
        self.expect.setdefault(key, row.rev if row is not None else 0)
        return self.peek(key, kind)

    def find(self, kind: type[T], id: str) -> T:
        """The object of that id, whichever VPC it is in. Raises the refusal of its kind."""
        prefixes = [vpc_prefix(vpc, kind) for vpc in self.region_ledger().vpcs]
        for prefix in (region_prefix(kind), *prefixes):
            if self.peek(prefix + id, kind) is not None:
                found = self.get(prefix + id, kind)
                assert found is not None
                return found
        raise NOT_FOUND[kind].error(id=id)

    def vpc(self, vpc_id: str) -> Vpc:
        if vpc_id in self.region_ledger().vpcs:
            vpc = self.get(vpc_key(vpc_id), Vpc)
            if vpc is not None:
                return vpc
        raise Refusal.VPC_NOT_FOUND.error(id=vpc_id)

    def interface(self, network_interface_id: str) -> NetworkInterface:
        link = self.peek(link_key(network_interface_id), Link)
        if link is not None and link.network_interface_id == network_interface_id:
            key = vpc_prefix(link.vpc_id, NetworkInterface) + link.private_ip
            interface = self.get(key, NetworkInterface)
            if interface is not None:
                return interface
        raise Refusal.INTERFACE_NOT_FOUND.error(id=network_interface_id)

    def all(self, kind: type[T], vpc_id: str) -> dict[str, T]:
        """Of that VPC, by id. Who rests on there being no other must `touch` the VPC."""
        return self._under(vpc_prefix(vpc_id, kind), f"{VPCS}{vpc_id}/", kind)

    def all_of_region(self, kind: type[T]) -> dict[str, T]:
        """Of those that are of no VPC. Who rests on there being no other must touch the region."""
        prefix = region_prefix(kind)
        return self._under(prefix, prefix, kind)

    def interfaces(self, vpc_id: str) -> list[NetworkInterface]:
        """That there are no others counts."""
        for subnet_id in self.ledger(vpc_id).subnets:
            self.get(addresses_key(vpc_id, subnet_id), Addresses)
        return list(self.all(NetworkInterface, vpc_id).values())

    def _under(self, prefix: str, listed: str, kind: type[T]) -> dict[str, T]:
        if listed not in self._keys:  # a search of all keys: once
            self._keys[listed] = self.region.store.keys(listed)
        keys = {key for key in (*self._keys[listed], *self.put) if key.startswith(prefix)}
        found = [self.peek(key, kind) for key in sorted(keys)]
        return {id_of(record): record for record in found if record is not None}

    # Ledgers ---------------------------------------------------------------------------------

    def region_ledger(self) -> RegionLedger:
        return self.peek(REGION_LEDGER, RegionLedger) or RegionLedger()

    def ledger(self, vpc_id: str) -> VpcLedger:
        found = self.peek(ledger_key(vpc_id), VpcLedger)
        if found is None:
            raise Refusal.VPC_NOT_FOUND.error(id=vpc_id)
        return found

    def touch_region(self, **changes: object) -> RegionLedger:
        """This rests on what there is in the region: void if anybody else who says so is first."""
        ledger = self.get(REGION_LEDGER, RegionLedger) or RegionLedger()
        ledger = msgspec.structs.replace(ledger, **{"writes": ledger.writes + 1, **changes})
        self.save(REGION_LEDGER, ledger)
        return ledger

    def touch(self, vpc_id: str, **changes: object) -> VpcLedger:
        """This rests on what there is in the VPC, but for its interfaces."""
        ledger = self.get(ledger_key(vpc_id), VpcLedger)
        if ledger is None:
            raise Refusal.VPC_NOT_FOUND.error(id=vpc_id)
        ledger = msgspec.structs.replace(ledger, **{"writes": ledger.writes + 1, **changes})
        self.save(ledger_key(vpc_id), ledger)
        return ledger

    # Writing ---------------------------------------------------------------------------------

    def mint(self, kind: str) -> str:
        return names.ec2_id(kind, self.region.random(9))

    def add(self, record: T) -> T:
        """One that is new: void if there is one of its id after all."""
        found = self.get(key_of(record), type(record))
        assert found is None, "17 digits at random are nobody else's"
        return self.change(record)

    def change(self, record: T) -> T:
        self.save(key_of(record), record)
        return record

    def remove(self, record: Record) -> None:
        self.erase(key_of(record))

    def save(self, key: str, value: msgspec.Struct) -> None:
        self.delete.discard(key)
        self.put[key] = value

    def erase(self, key: str) -> None:
        self.put.pop(key, None)
        self.delete.add(key)


async def commit(region: Region, decide: Callable[[Draft], R], *, durable: bool = True) -> R:
    """Write what `decide` drafts, all or nothing, and return what it returns.

    It is called again on a fresh draft when what it read has changed meanwhile, so it must not have
    effects of its own. Raises what it raises (then nothing is written), and Ec2Error
    RequestLimitExceeded when others were faster `ATTEMPTS` times.
    """
    for _ in range(ATTEMPTS):
        draft = Draft(region)
        result = decide(draft)
        if not draft.put and not draft.delete:
            return result
        try:
            await region.store.txn(
                draft.put, delete=draft.delete, expect=draft.expect, durable=durable
            )
        except Conflict:
            continue
        return result
    raise Refusal.BUSY.error()


def load(store: Store, vpc_id: str) -> Network:
    """All of one VPC as it is now. Raises InvalidVpcID.NotFound."""
    network = vpc_rows.network(store, vpc_id)
    if network is None:
        raise Refusal.VPC_NOT_FOUND.error(id=vpc_id)
    return network
