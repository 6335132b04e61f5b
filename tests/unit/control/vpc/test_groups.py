"""Security groups and prefix lists: names, rules, quotas, indexes."""

from __future__ import annotations

import msgspec
import pytest

from sandbox.control.vpc import Draft, load
from sandbox.control.vpc.groups import (
    authorize,
    create_security_group,
    delete_security_group,
    describe_rules,
    revoke,
    revoke_ids,
)
from sandbox.control.vpc.indexes import release_index, retired_indexes
from sandbox.control.vpc.interfaces import (
    InterfaceRequest,
    create_network_interface,
    delete_network_interface,
)
from sandbox.control.vpc.permissions import RuleRequest
from sandbox.control.vpc.prefix_lists import (
    create_prefix_list,
    delete_prefix_list,
    modify_prefix_list,
)
from sandbox.control.vpc.subnets import create_subnet
from sandbox.control.vpc.turns import RESTING_MOST
from sandbox.control.vpc.vpcs import create_vpc, delete_vpc
from sandbox.model.vpc import SecurityGroup, SecurityGroupRule, Vpc
from sandbox.store.vpc_rows import VpcLedger, ledger_key
from tests.unit.control.vpc.regions import Ec2

WEB = RuleRequest(ip_protocol="tcp", from_port=80, to_port=80, cidr_ipv4="10.0.0.0/8")


@pytest.fixture
def vpc(ec2: Ec2) -> Vpc:
    return ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))


@pytest.fixture
def web(ec2: Ec2, vpc: Vpc) -> SecurityGroup:
    return make(ec2, vpc, "web")


def make(ec2: Ec2, vpc: Vpc, name: str) -> SecurityGroup:
    return ec2.do(lambda draft: create_security_group(draft, name, "of a test", vpc.vpc_id))


def allow(
    ec2: Ec2, group: SecurityGroup, *requests: RuleRequest, is_egress: bool = False
) -> tuple[SecurityGroupRule, ...]:
    return ec2.do(lambda draft: authorize(draft, group.group_id, requests, is_egress=is_egress))


def rules(ec2: Ec2, group: SecurityGroup) -> tuple[SecurityGroupRule, ...]:
    return load(ec2.store, group.vpc_id).groups[group.group_id].rules


def ingress(ec2: Ec2, group: SecurityGroup) -> list[str]:
    return [r.security_group_rule_id for r in rules(ec2, group) if not r.is_egress]


def test_a_new_group_lets_nothing_in_and_all_out(ec2: Ec2, web: SecurityGroup) -> None:
    (only,) = rules(ec2, web)
    assert (only.is_egress, only.ip_protocol, only.cidr_ipv4) == (True, "-1", "0.0.0.0/0")


def test_the_same_name_is_for_another_vpc(ec2: Ec2, vpc: Vpc, web: SecurityGroup) -> None:
    code, text = ec2.refused(lambda draft: create_security_group(draft, "WEB  ", "d", vpc.vpc_id))
    assert code == "InvalidGroup.Duplicate"
    assert text == f"The security group 'WEB' already exists for VPC '{vpc.vpc_id}'"
    other = ec2.do(lambda draft: create_vpc(draft, "10.0.0.0/16"))
    assert make(ec2, other, "web").group_name == "web"


def test_a_rule_is_added_once_in_each_direction(ec2: Ec2, web: SecurityGroup) -> None:
    allow(ec2, web, WEB)
    allow(ec2, web, WEB, is_egress=True)
    same = msgspec.structs.replace(
        WEB, ip_protocol="6", cidr_ipv4="10.9.9.9/8", description="other"
    )
    code, text = ec2.refused(lambda draft: authorize(draft, web.group_id, [same], is_egress=False))
    assert code == "InvalidPermission.Duplicate"
    assert text == (
        'the specified rule "peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW"'
        " already exists"
    )


def test_of_rules_that_are_added_together_one_bad_one_keeps_all_out(
    ec2: Ec2, web: SecurityGroup
) -> None:
    (kept,) = allow(ec2, web, WEB)
    udp = msgspec.structs.replace(WEB, ip_protocol="udp")
    bad = msgspec.structs.replace(WEB, cidr_ipv4="nonsense")
    for last in (WEB, bad, udp):
        code, _ = ec2.refused(
            lambda draft, last=last: authorize(  # type: ignore[misc]
                draft, web.group_id, [udp, last], is_egress=False
            )
        )
        assert code in ("InvalidPermission.Duplicate", "InvalidParameterValue")
    assert ingress(ec2, web) == [kept.security_group_rule_id]


def test_rules_are_revoked_by_what_they_say_or_by_id_all_or_none(
    ec2: Ec2, web: SecurityGroup
) -> None:
    udp = msgspec.structs.replace(WEB, ip_protocol="udp")
    one, two = allow(ec2, web, WEB, udp)
    tcp = msgspec.structs.replace(WEB, ip_protocol="6", description="whatever")
    sctp = msgspec.structs.replace(WEB, ip_protocol="132")
    code, _ = ec2.refused(lambda draft: revoke(draft, web.group_id, [tcp, sctp], is_egress=False))
    assert code == "InvalidPermission.NotFound"
    code, _ = ec2.refused(lambda draft: revoke(draft, web.group_id, [tcp], is_egress=True))
    assert code == "InvalidPermission.NotFound"
    ec2.do(lambda draft: revoke(draft, web.group_id, [tcp], is_egress=False))
    assert ingress(ec2, web) == [two.security_group_rule_id]
    code, text = ec2.refused(
        lambda draft: revoke_ids(
            draft,
            web.group_id,
            [two.security_group_rule_id, one.security_group_rule_id],
            is_egress=False,
        )
    )
    assert code == "InvalidSecurityGroupRuleId.NotFound"
    assert one.security_group_rule_id in text
    ec2.do(
        lambda draft: revoke_ids(draft, web.group_id, [two.security_group_rule_id], is_egress=False)
    )
    assert ingress(ec2, web) == []


def test_descriptions_change_and_nothing_else(ec2: Ec2, web: SecurityGroup) -> None:
    (rule,) = allow(ec2, web, WEB)
    id = rule.security_group_rule_id
    ec2.do(lambda draft: describe_rules(draft, web.group_id, {id: "from the office"}))
    found = next(r for r in rules(ec2, web) if r.security_group_rule_id == id)
    assert found == msgspec.structs.replace(rule, description="from the office")


def test_a_group_takes_sixty_rules_of_each_direction_and_version(
    ec2: Ec2, web: SecurityGroup
) -> None:
    def of(version: int, count: int) -> list[RuleRequest]:
        if version == 4:
            blocks = [f"10.0.{n}.0/24" for n in range(count)]
            return [RuleRequest(ip_protocol="-1", cidr_ipv4=block) for block in blocks]
        blocks = [f"fd00:{n:x}::/32" for n in range(count)]
        return [RuleRequest(ip_protocol="-1", cidr_ipv6=block) for block in blocks]

    allow(ec2, web, *of(4, 60))
    allow(ec2, web, *of(6, 60))
    allow(ec2, web, *of(4, 59), is_egress=True)  # it has one from the start
    itself = RuleRequest(ip_protocol="-1", referenced_group_id=web.group_id)
    for one_more in (of(4, 61)[-1], of(6, 61)[-1], itself):
        code, _ = ec2.refused(
            lambda draft, one=one_more: authorize(  # type: ignore[misc]
                draft, web.group_id, [one], is_egress=False
            )
        )
        assert code == "RulesPerSecurityGroupLimitExceeded"
    assert len(rules(ec2, web)) == 180


def test_a_group_is_kept_while_an_interface_or_another_group_needs_it(
    ec2: Ec2, vpc: Vpc, web: SecurityGroup
) -> None:
    subnet = ec2.do(lambda draft: create_subnet(draft, vpc.vpc_id, "10.0.0.0/24"))
    request = InterfaceRequest(subnet_id=subnet.subnet_id, task="t", group_ids=(web.group_id,))
    interface = ec2.do(lambda draft: create_network_interface(draft, request))
    gone = lambda draft: delete_security_group(draft, web.group_id)  # noqa: E731
    assert ec2.refused(gone) == (
        "DependencyViolation",
        f"resource {web.group_id} has a dependent object",
    )
    ec2.do(lambda draft: delete_network_interface(draft, interface.network_interface_id))
    other = make(ec2, vpc, "other")
    named = RuleRequest(ip_protocol="-1", referenced_group_id=web.group_id)
    allow(ec2, other, named)
    assert ec2.refused(gone)[0] == "DependencyViolation"
    ec2.do(lambda draft: revoke(draft, other.group_id, [named], is_egress=False))
    allow(ec2, web, named)  # its own rule holds nobody
    ec2.do(gone)
    assert web.group_id not in load(ec2.store, vpc.vpc_id).groups


# Indexes -----------------------------------------------------------------------------------


def test_an_index_is_not_given_again_before_it_is_released_and_then_as_late_as_can_be(
    ec2: Ec2, vpc: Vpc, web: SecurityGroup
) -> None:
    ec2.do(lambda draft: delete_security_group(draft, web.group_id))
    assert ec2.do(lambda draft: retired_indexes(draft, vpc.vpc_id, "group")) == (web.index,)
    assert make(ec2, vpc, "next").index == web.index + 1
    for _ in range(2):
        ec2.do(lambda draft: release_index(draft, vpc.vpc_id, "group", web.index))
        assert ec2.do(lambda draft: retired_indexes(draft, vpc.vpc_id, "group")) == ()
    given = {make(ec2, vpc, f"group {n}").index for n in range(20)}
    assert given == set(range(web.index + 2, web.index + 22))
    ec2.do(lambda draft: release_index(draft, "vpc-gone", "group", 7))


def test_an_index_that_a_live_group_has_cannot_be_released(
    ec2: Ec2, vpc: Vpc, web: SecurityGroup
) -> None:
    before = ec2.store.revision
    ec2.do(lambda draft: release_index(draft, vpc.vpc_id, "group", web.index))
    assert ec2.store.revision == before


def test_groups_are_not_deleted_faster_than_their_connections_are_ended(ec2: Ec2, vpc: Vpc) -> None:
    ec2.limit(retired_indexes=2)
    made = [make(ec2, vpc, f"group {n}") for n in range(3)]
    for group in made[:2]:
        ec2.do(lambda draft, g=group: delete_security_group(draft, g.group_id))  # type: ignore[misc]
    gone = lambda draft: delete_security_group(draft, made[2].group_id)  # noqa: E731
    assert ec2.refused(gone)[0] == "Unavailable"
    ec2.do(lambda draft: release_index(draft, vpc.vpc_id, "group", made[0].index))
    ec2.do(gone)


# Prefix lists ------------------------------------------------------------------------------


def test_a_vpc_has_a_copy_of_each_list_that_a_group_of_it_names(
    ec2: Ec2, vpc: Vpc, web: SecurityGroup
) -> None:
    made = ec2.do(lambda draft: create_prefix_list(draft, "offices", 20, ["192.0.2.7/24"]))
    id = made.prefix_list_id
    assert made.entries == ("192.0.2.0/24",)
    assert load(ec2.store, vpc.vpc_id).prefix_lists == {}
    named = RuleRequest(ip_protocol="-1", prefix_list_id=id)
    allow(ec2, web, named)
    assert load(ec2.store, vpc.vpc_id).prefix_lists == {id: made}
    new = ec2.do(
        lambda draft: modify_prefix_list(
            draft, id, add=["198.51.100.0/24"], remove=["192.0.2.0/24"], current_version=1
        )
    )
    assert (new.version, new.entries) == (2, ("198.51.100.0/24",))
    assert load(ec2.store, vpc.vpc_id).prefix_lists == {id: new}
    gone = lambda draft: delete_prefix_list(draft, id)  # noqa: E731
    assert ec2.refused(gone)[0] == "DependencyViolation"
    ec2.do(lambda draft: revoke(draft, web.group_id, [named], is_egress=False))
    assert load(ec2.store, vpc.vpc_id).prefix_lists == {}
    ec2.do(gone)
    again = ec2.do(lambda draft: create_prefix_list(draft, "offices", 20))
    assert again.index == made.index + 1


def test_a_list_counts_for_what_it_may_hold(ec2: Ec2, web: SecurityGroup) -> None:
    made = ec2.do(lambda draft: create_prefix_list(draft, "offices", 59))
    id = made.prefix_list_id
    allow(ec2, web, RuleRequest(ip_protocol="-1", prefix_list_id=id), WEB)
    for size, expected in ((60, None), (61, "RulesPerSecurityGroupLimitExceeded")):
        if expected is None:
            ec2.do(lambda draft: revoke(draft, web.group_id, [WEB], is_egress=False))
            ec2.do(lambda draft: modify_prefix_list(draft, id, max_entries=60))
        else:
            code, _ = ec2.refused(
                lambda draft, n=size: modify_prefix_list(  # type: ignore[misc]
                    draft, id, max_entries=n
                )
            )
            assert code == expected


def test_a_vpc_takes_its_copies_along(ec2: Ec2, vpc: Vpc) -> None:
    made = ec2.do(lambda draft: create_prefix_list(draft, "offices", 5))
    (default,) = load(ec2.store, vpc.vpc_id).groups.values()
    allow(ec2, default, RuleRequest(ip_protocol="-1", prefix_list_id=made.prefix_list_id))
    ec2.do(lambda draft: delete_vpc(draft, vpc.vpc_id))
    assert ec2.store.keys("vpc/") == []
    ec2.do(lambda draft: delete_prefix_list(draft, made.prefix_list_id))


def test_the_ledger_stays_small_whatever_comes_and_goes(ec2: Ec2, vpc: Vpc) -> None:
    def come_and_go(draft: Draft) -> None:
        for _ in range(64):
            group = create_security_group(draft, "group", "of a test", vpc.vpc_id)
            delete_security_group(draft, group.group_id)
            release_index(draft, vpc.vpc_id, "group", group.index)

    for _ in range(2 * RESTING_MOST // 64):
        ec2.do(come_and_go)
    row = ec2.store.get(ledger_key(vpc.vpc_id), VpcLedger)
    assert row is not None
    assert len(row.value.group_indexes.resting) == RESTING_MOST
    assert len(msgspec.json.encode(row.value)) < 2500
