"""Two who decide at once: one is written, the other decides again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from sandbox.control.vpc import Draft, commit, load
from sandbox.control.vpc.draft import ATTEMPTS
from sandbox.control.vpc.groups import create_security_group, delete_security_group
from sandbox.control.vpc.interfaces import (
    InterfaceRequest,
    create_network_interface,
    modify_groups,
)
from sandbox.control.vpc.subnets import create_subnet, delete_subnet
from sandbox.control.vpc.vpcs import create_vpc
from sandbox.errors import Conflict, Ec2Error
from sandbox.model.task import Record
from sandbox.model.vpc import NetworkInterface, Subnet, Vpc
from tests.unit.control.vpc.regions import Ec2

Decision = Callable[[Draft], object]


class Row(Record, frozen=True, kw_only=True):
    text: str


@pytest.fixture
def vpc(ec2: Ec2) -> Vpc:
    return ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))


@pytest.fixture
def subnets(ec2: Ec2, vpc: Vpc) -> list[Subnet]:
    return [
        ec2.do(lambda draft, b=block: create_subnet(draft, vpc.vpc_id, b))  # type: ignore[misc]
        for block in ("10.0.0.0/28", "10.0.1.0/28")
    ]


async def write(draft: Draft) -> None:
    await draft.region.store.txn(draft.put, delete=draft.delete, expect=draft.expect)


def conflict(ec2: Ec2, one: Decision, other: Decision) -> bool:
    """Whether two that were decided on the same state cannot both be written."""
    drafts = Draft(ec2.region), Draft(ec2.region)
    one(drafts[0])
    other(drafts[1])
    trio.run(write, drafts[0])
    try:
        trio.run(write, drafts[1])
    except Conflict:
        return True
    return False


def taking(subnet: Subnet, **members: object) -> Callable[[Draft], NetworkInterface]:
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t", **members)  # type: ignore[arg-type]
    return lambda draft: create_network_interface(draft, request)


def test_two_of_one_subnet_conflict_and_two_of_two_do_not(ec2: Ec2, subnets: list[Subnet]) -> None:
    assert conflict(ec2, taking(subnets[0]), taking(subnets[0]))
    assert not conflict(ec2, taking(subnets[0]), taking(subnets[1]))


def test_who_was_slower_decides_again_and_has_another_address(
    ec2: Ec2, vpc: Vpc, subnets: list[Subnet]
) -> None:
    decided = 0

    def slowly(draft: Draft) -> NetworkInterface:
        nonlocal decided
        decided += 1
        interface = taking(subnets[0])(draft)
        if decided == 1:  # another agent's, on the same store
            other = Draft(ec2.region)
            taking(subnets[0])(other)
            draft.region.store.post(other.put)
        return interface

    mine = ec2.do(slowly)
    assert (decided, mine.private_ip) == (2, "10.0.0.5")
    found = load(ec2.store, vpc.vpc_id).interfaces.values()
    assert sorted(interface.private_ip for interface in found) == ["10.0.0.4", "10.0.0.5"]


def test_who_is_always_slower_is_told_so_in_the_end(ec2: Ec2) -> None:
    decided = 0

    def hopelessly(draft: Draft) -> None:
        nonlocal decided
        decided += 1
        draft.touch_region()
        draft.region.store.post({"ec2/ledger": draft.region_ledger()})

    with pytest.raises(Ec2Error) as caught:
        ec2.do(hopelessly)
    assert caught.value.code == "RequestLimitExceeded"
    assert decided == ATTEMPTS


def test_many_at_once_have_addresses_of_their_own(
    ec2: Ec2, vpc: Vpc, subnets: list[Subnet]
) -> None:
    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(11):
                nursery.start_soon(commit, ec2.region, taking(subnets[0]))

    trio.run(all_at_once)
    found = load(ec2.store, vpc.vpc_id).interfaces.values()
    assert len({interface.private_ip for interface in found}) == 11


def test_a_task_and_its_interface_are_written_together_or_not_at_all(
    ec2: Ec2, vpc: Vpc, subnets: list[Subnet]
) -> None:
    def accept(draft: Draft) -> NetworkInterface:
        draft.get("task/1/desired", Row)
        draft.save("task/1/desired", Row(text="wanted"))
        return taking(subnets[0])(draft)

    assert conflict(ec2, accept, accept)
    assert len(load(ec2.store, vpc.vpc_id).interfaces) == 1
    assert ec2.store.get("task/1/desired", Row) is not None


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_running", [True, False])
def test_a_group_is_not_deleted_beside_an_interface_that_takes_it(
    ec2: Ec2, vpc: Vpc, subnets: list[Subnet], is_running: bool, is_first: bool
) -> None:
    group = ec2.do(lambda draft: create_security_group(draft, "web", "d", vpc.vpc_id)).group_id
    running = ec2.do(taking(subnets[1])).network_interface_id

    def use(draft: Draft) -> object:
        if is_running:
            return modify_groups(draft, running, (group,))
        return taking(subnets[0], group_ids=(group,))(draft)

    def delete(draft: Draft) -> None:
        delete_security_group(draft, group)

    assert conflict(ec2, *((use, delete) if is_first else (delete, use)))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_subnet_is_not_deleted_beside_its_first_interface(
    ec2: Ec2, subnets: list[Subnet], is_first: bool
) -> None:
    pair = (taking(subnets[0]), lambda draft: delete_subnet(draft, subnets[0].subnet_id))
    assert conflict(ec2, *(pair if is_first else reversed(pair)))


def test_two_subnets_are_not_made_beside_each_other(ec2: Ec2, vpc: Vpc) -> None:
    def make(draft: Draft) -> Subnet:
        return create_subnet(draft, vpc.vpc_id, "10.0.9.0/24")

    assert conflict(ec2, make, make)


def test_what_is_only_read_writes_nothing(ec2: Ec2, vpc: Vpc) -> None:
    before = ec2.store.revision
    assert ec2.do(lambda draft: draft.vpc(vpc.vpc_id)) == vpc
    assert ec2.store.revision == before
