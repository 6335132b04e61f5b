"""Interfaces and their addresses, private and public: who has which, and who is next."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Network

import msgspec
import pytest

from sandbox.control.vpc import Draft, load
from sandbox.control.vpc.addresses import (
    allocate_address,
    associate_address,
    disassociate_address,
    release_address,
)
from sandbox.control.vpc.gateways import (
    attach_internet_gateway,
    create_internet_gateway,
    create_nat_gateway,
    delete_nat_gateway,
    detach_internet_gateway,
)
from sandbox.control.vpc.groups import create_security_group
from sandbox.control.vpc.interfaces import (
    InterfaceRequest,
    create_network_interface,
    delete_network_interface,
    modify_groups,
)
from sandbox.control.vpc.subnets import create_subnet, delete_subnet
from sandbox.control.vpc.turns import RESTING_MOST
from sandbox.control.vpc.vpcs import create_vpc
from sandbox.errors import NetworkError
from sandbox.model import names
from sandbox.model.vpc import NetworkInterface, Subnet, Vpc
from sandbox.store.vpc_rows import Addresses, addresses_key
from tests.unit.control.vpc.regions import Ec2


@pytest.fixture
def vpc(ec2: Ec2) -> Vpc:
    return ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))


@pytest.fixture
def subnet(ec2: Ec2, vpc: Vpc) -> Subnet:
    return ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.0/28"))


@pytest.fixture
def gateway(ec2: Ec2, vpc: Vpc) -> str:
    id = ec2.do(create_internet_gateway).internet_gateway_id
    ec2.do(lambda draft: attach_internet_gateway(draft, id, vpc.vpc_id))
    return id


def take(ec2: Ec2, subnet: Subnet, **members: object) -> NetworkInterface:
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t", **members)  # type: ignore[arg-type]
    return ec2.do(lambda draft: create_network_interface(draft, request))


def give_back(ec2: Ec2, interface: NetworkInterface) -> None:
    id = interface.network_interface_id
    ec2.do(lambda draft: delete_network_interface(draft, id))


def last(interface: NetworkInterface) -> int:
    return int(interface.private_ip.rpartition(".")[2])


# Private addresses -------------------------------------------------------------------------


def test_an_interface_has_the_next_address_the_default_group_and_names_of_its_own(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    interface = take(
        ec2, subnet, description="arn:aws:ecs:us-east-1:1:attachment/a", bandwidth_mbit=9
    )
    network = load(ec2.store, vpc.vpc_id)
    assert network.interfaces == {interface.network_interface_id: interface}
    assert interface.private_ip == "10.0.0.4"
    assert interface.public_ip is None
    assert interface.mac_address == names.mac_address(interface.network_interface_id)
    assert interface.mac_address.startswith("0a:")
    (group,) = network.groups
    assert interface.group_ids == (group,)
    assert interface.availability_zone == subnet.availability_zone


def test_the_five_reserved_addresses_are_never_given_and_the_twelfth_task_is_refused(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    other = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.16/28"))
    given = [last(take(ec2, subnet)) for _ in range(11)]
    assert given == list(range(4, 15))
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t")
    code, text = ec2.refused(lambda draft: create_network_interface(draft, request))
    assert code == "InsufficientFreeAddressesInSubnet"
    assert text == (
        "The specified subnet does not have enough free addresses to satisfy the request."
    )
    assert last(take(ec2, other)) == 20


def test_a_freed_address_comes_back_last(ec2: Ec2, subnet: Subnet) -> None:
    first, second = take(ec2, subnet), take(ec2, subnet)
    give_back(ec2, second)
    give_back(ec2, first)
    ec2.reopen()
    assert [last(take(ec2, subnet)) for _ in range(11)] == [*range(6, 15), 5, 4]


def test_an_address_that_was_freed_ahead_of_the_cursor_comes_back_last_as_well(
    ec2: Ec2, subnet: Subnet
) -> None:
    held = [take(ec2, subnet) for _ in range(11)]
    for interface in (held[4], held[0], held[9]):
        give_back(ec2, interface)
    give_back(ec2, take(ec2, subnet))
    assert [last(take(ec2, subnet)) for _ in range(3)] == [4, 13, 8]


def test_giving_back_twice_is_giving_back_once(ec2: Ec2, subnet: Subnet) -> None:
    interface = take(ec2, subnet)
    give_back(ec2, interface)
    before = ec2.store.revision
    give_back(ec2, interface)
    assert ec2.store.revision == before
    ec2.do(lambda draft: delete_subnet(draft, subnet.subnet_id))


def test_an_address_that_is_asked_for_is_given_if_it_is_free(ec2: Ec2, subnet: Subnet) -> None:
    interface = take(ec2, subnet, private_ip="10.0.0.9")
    assert interface.private_ip == "10.0.0.9"
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t", private_ip="10.0.0.9")
    assert ec2.refused(lambda draft: create_network_interface(draft, request)) == (
        "InvalidIPAddress.InUse",
        "Address 10.0.0.9 is in use.",
    )
    assert [last(take(ec2, subnet)) for _ in range(6)] == [4, 5, 6, 7, 8, 10]
    give_back(ec2, interface)
    assert last(take(ec2, subnet, private_ip="10.0.0.9")) == 9


def test_what_is_kept_for_a_subnet_is_small_however_many_come_and_go(ec2: Ec2, vpc: Vpc) -> None:
    large = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.64.0/18"))
    request = InterfaceRequest(subnet_id=large.subnet_id, task="t")

    def come_and_go(draft: Draft) -> None:
        for _ in range(64):
            interface = create_network_interface(draft, request)
            delete_network_interface(draft, interface.network_interface_id)

    for _ in range(2 * RESTING_MOST // 64):
        ec2.do(come_and_go)
    row = ec2.store.get(addresses_key(vpc.vpc_id, large.subnet_id), Addresses)
    assert row is not None
    assert len(row.value.turn.resting) == RESTING_MOST
    assert len(msgspec.json.encode(row.value)) < 2000
    assert take(ec2, large).private_ip == str(IPv4Network("10.0.64.0/18")[2 * RESTING_MOST + 4])


def test_after_a_restart_the_same_is_there_and_the_next_address_is_the_same(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    for _ in range(3):
        give_back(ec2, take(ec2, subnet, assign_public_ip=True))
    held = take(ec2, subnet)
    before = load(ec2.store, vpc.vpc_id)
    draft = Draft(ec2.region)
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t")
    expected = create_network_interface(draft, request).private_ip  # and not written
    ec2.reopen()
    assert load(ec2.store, vpc.vpc_id) == before
    assert before.interfaces == {held.network_interface_id: held}
    assert take(ec2, subnet).private_ip == expected


# Ids and groups ----------------------------------------------------------------------------


def test_an_id_that_was_minted_ahead_is_kept(ec2: Ec2, subnet: Subnet) -> None:
    id = "eni-0123456789abcdef0"
    assert take(ec2, subnet, network_interface_id=id).network_interface_id == id


def test_two_live_interfaces_never_share_the_name_of_a_link(ec2: Ec2, subnet: Subnet) -> None:
    interface = take(ec2, subnet, network_interface_id="eni-0123456789abcdef0")
    twin = "eni-01234567000000000"
    with pytest.raises(NetworkError, match=f"{twin}: another one has a link of its name"):
        take(ec2, subnet, network_interface_id=twin)
    give_back(ec2, interface)
    take(ec2, subnet, network_interface_id=twin)
    give_back(ec2, interface)  # it is gone, and its twin is not it
    assert list(load(ec2.store, subnet.vpc_id).interfaces) == [twin]


def test_an_id_whose_link_is_taken_is_minted_again(ec2: Ec2, subnet: Subnet) -> None:
    taken, free = bytes(9), b"\1" * 9
    take(ec2, subnet, network_interface_id=names.ec2_id("eni", taken), attachment_id="a")
    minted = iter([taken, taken, free])
    ec2.region = dataclasses.replace(ec2.region, random=lambda _: next(minted))
    interface = take(ec2, subnet, attachment_id="b")
    assert interface.network_interface_id == names.ec2_id("eni", free)


def test_the_groups_of_a_running_interface_change(ec2: Ec2, vpc: Vpc, subnet: Subnet) -> None:
    interface = take(ec2, subnet)
    made = tuple(
        ec2.do(
            lambda draft, n=name: create_security_group(draft, n, "d", vpc.vpc_id)  # type: ignore[misc]
        ).group_id
        for name in ("a", "b")
    )
    id = interface.network_interface_id
    now = ec2.do(lambda draft: modify_groups(draft, id, (*reversed(made), made[0])))
    assert now.group_ids == tuple(sorted(made))
    assert load(ec2.store, vpc.vpc_id).interfaces[id] == now


# Public addresses --------------------------------------------------------------------------


def test_a_subnet_takes_a_block_of_its_size_at_its_first_public_address(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    assert take(ec2, subnet).public_ip is None
    assert load(ec2.store, vpc.vpc_id).subnets[subnet.subnet_id].public_block is None
    assert take(ec2, subnet, assign_public_ip=True).public_ip == "198.18.0.5"
    assert take(ec2, subnet, assign_public_ip=True).public_ip == "198.18.0.6"
    assert load(ec2.store, vpc.vpc_id).subnets[subnet.subnet_id].public_block == "198.18.0.0/28"
    other = ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))
    twin = ec2.do(lambda draft: create_subnet(draft, other.vpc_id, "10.0.0.0/24"))
    assert take(ec2, twin, assign_public_ip=True).public_ip == "198.18.1.4"


def test_the_subnet_decides_on_public_addresses_where_the_task_does_not(ec2: Ec2, vpc: Vpc) -> None:
    public = ec2.do(
        lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.2.0/24", map_public_ip_on_launch=True)
    )
    assert take(ec2, public).public_ip is not None
    assert take(ec2, public, assign_public_ip=False).public_ip is None


def test_an_exhausted_pool_is_named_and_leaves_others_alone(ec2: Ec2, vpc: Vpc) -> None:
    made = [
        ec2.do(lambda draft, b=block: create_subnet(draft, vpc.vpc_id, b))  # type: ignore[misc]
        for block in ("10.0.0.0/17", "10.0.128.0/17")
    ]
    large = ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))
    whole = ec2.do(lambda draft: create_subnet(draft, large.vpc_id, "10.0.0.0/16"))
    assert take(ec2, whole, assign_public_ip=True).public_ip == "198.18.0.4"
    assert take(ec2, made[0], assign_public_ip=True).public_ip == "198.19.0.4"
    request = InterfaceRequest(subnet_id=made[1].subnet_id, task="t", assign_public_ip=True)
    code, text = ec2.refused(lambda draft: create_network_interface(draft, request))
    assert code == "InsufficientAddressCapacity"
    assert text.startswith("public_pool 198.18.0.0/15 has no block of the size of 10.0.128.0/17")
    assert take(ec2, made[1]).private_ip == "10.0.128.4"
    assert take(ec2, made[0], assign_public_ip=True).public_ip == "198.19.0.5"


def test_the_block_of_a_deleted_subnet_is_given_again_after_all_others(
    ec2: Ec2, vpc: Vpc, subnet: Subnet
) -> None:
    give_back(ec2, take(ec2, subnet, assign_public_ip=True))
    ec2.do(lambda draft: delete_subnet(draft, subnet.subnet_id))
    again = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.0/28"))
    assert take(ec2, again, assign_public_ip=True).public_ip == "198.18.0.20"


def test_elastic_addresses_are_of_the_end_of_the_pool_and_come_back_last(ec2: Ec2) -> None:
    first = ec2.do(allocate_address)
    assert first.public_ip == "198.19.255.1"
    ec2.do(lambda draft: release_address(draft, first.allocation_id))
    assert ec2.do(allocate_address).public_ip == "198.19.255.2"


def test_an_interface_takes_an_elastic_address_and_gives_it_up(
    ec2: Ec2, vpc: Vpc, subnet: Subnet, gateway: str
) -> None:
    interface = take(ec2, subnet, assign_public_ip=True)
    id = interface.network_interface_id
    address = ec2.do(allocate_address)
    allocation = address.allocation_id
    associated = ec2.do(lambda draft: associate_address(draft, allocation, id))
    now = load(ec2.store, vpc.vpc_id).interfaces[id]
    assert (now.public_ip, now.allocation_id) == (address.public_ip, allocation)
    assert now.association_id == associated.association_id is not None
    assert ec2.do(lambda draft: associate_address(draft, allocation, id)) == associated
    gone = lambda draft: release_address(draft, allocation)  # noqa: E731
    assert ec2.refused(gone)[0] == "InvalidIPAddress.InUse"
    detach = lambda draft: detach_internet_gateway(draft, gateway, vpc.vpc_id)  # noqa: E731
    assert ec2.refused(detach)[0] == "DependencyViolation"
    ec2.do(lambda draft: disassociate_address(draft, associated.association_id or ""))
    now = load(ec2.store, vpc.vpc_id).interfaces[id]
    assert (now.public_ip, now.allocation_id, now.association_id) == (None, None, None)
    ec2.do(gone)
    ec2.do(detach)


def test_an_elastic_address_moves_only_when_that_is_allowed(
    ec2: Ec2, subnet: Subnet, gateway: str
) -> None:
    one, two = (take(ec2, subnet).network_interface_id for _ in range(2))
    a, b = (ec2.do(allocate_address).allocation_id for _ in range(2))
    ec2.do(lambda draft: associate_address(draft, a, one))
    ec2.do(lambda draft: associate_address(draft, b, two))
    for move in (
        lambda draft: associate_address(draft, a, two),
        lambda draft: associate_address(draft, b, one),
    ):
        assert ec2.refused(move)[0] == "Resource.AlreadyAssociated"
    moved = ec2.do(lambda draft: associate_address(draft, a, two, allow_reassociation=True))
    interfaces = load(ec2.store, subnet.vpc_id).interfaces
    assert interfaces[one].public_ip is None
    assert interfaces[two].public_ip == moved.public_ip
    ec2.do(lambda draft: release_address(draft, b))


def test_the_elastic_address_of_a_task_that_ended_is_free_again(
    ec2: Ec2, subnet: Subnet, gateway: str
) -> None:
    interface = take(ec2, subnet)
    allocation = ec2.do(allocate_address).allocation_id
    id = interface.network_interface_id
    ec2.do(lambda draft: associate_address(draft, allocation, id))
    give_back(ec2, interface)
    ec2.do(lambda draft: release_address(draft, allocation))


def test_a_nat_gateway_has_an_interface_of_its_own_and_leaves_its_address(
    ec2: Ec2, vpc: Vpc, subnet: Subnet, gateway: str
) -> None:
    address = ec2.do(allocate_address)
    allocation = address.allocation_id
    nat = ec2.do(lambda draft: create_nat_gateway(draft, subnet.subnet_id, allocation))
    network = load(ec2.store, vpc.vpc_id)
    assert network.nat_gateways == {nat.nat_gateway_id: nat}
    interface = network.interfaces[nat.network_interface_id]
    assert (interface.task, interface.group_ids) == (None, ())
    assert interface.public_ip == nat.public_ip == address.public_ip
    assert interface.private_ip == nat.private_ip == "10.0.0.4"
    held = lambda draft: delete_subnet(draft, subnet.subnet_id)  # noqa: E731
    assert ec2.refused(held)[0] == "DependencyViolation"
    other = lambda draft: create_nat_gateway(draft, subnet.subnet_id, allocation)  # noqa: E731
    assert ec2.refused(other)[0] == "Resource.AlreadyAssociated"
    groups = tuple(network.groups)
    for change in (
        lambda draft: modify_groups(draft, interface.network_interface_id, groups),
        lambda draft: delete_network_interface(draft, interface.network_interface_id),
        lambda draft: disassociate_address(draft, interface.association_id or ""),
    ):
        assert ec2.refused(change)[0] == "OperationNotPermitted"
    ec2.do(lambda draft: delete_nat_gateway(draft, nat.nat_gateway_id))
    ec2.do(held)
    ec2.do(lambda draft: release_address(draft, allocation))
