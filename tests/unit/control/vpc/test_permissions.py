"""A rule is kept as EC2 shows it, and counts as EC2 counts it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.control.vpc import permissions
from sandbox.control.vpc.permissions import RuleRequest, canonical, weight
from sandbox.errors import Ec2Error
from sandbox.model.vpc import PrefixList

WEB = RuleRequest(ip_protocol="tcp", from_port=80, to_port=80, cidr_ipv4="10.0.0.0/8")


def shown(request: RuleRequest) -> str:
    return permissions.shown(canonical(request, "sgr-1", is_egress=False))


def changed(**members: object) -> RuleRequest:
    return msgspec.structs.replace(WEB, **members)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (WEB, "peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW"),
        (changed(ip_protocol="6"), "peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW"),
        (changed(ip_protocol="TCP"), "peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW"),
        (changed(ip_protocol="017"), "peer: 10.0.0.0/8, UDP, from port: 80, to port: 80, ALLOW"),
        (changed(ip_protocol="all"), "peer: 10.0.0.0/8, ALL, ALLOW"),
        (changed(ip_protocol="-1"), "peer: 10.0.0.0/8, ALL, ALLOW"),
        (changed(ip_protocol="050"), "peer: 10.0.0.0/8, 50, ALLOW"),
        (
            changed(cidr_ipv4="10.9.8.7/8"),
            "peer: 10.0.0.0/8, TCP, from port: 80, to port: 80, ALLOW",
        ),
        (
            changed(ip_protocol="1", from_port=8, to_port=-1),
            "peer: 10.0.0.0/8, ICMP, from port: 8, to port: -1, ALLOW",
        ),
        (
            changed(ip_protocol="icmp", from_port=None, to_port=None),
            "peer: 10.0.0.0/8, ICMP, from port: -1, to port: -1, ALLOW",
        ),
        (
            RuleRequest(ip_protocol="58", cidr_ipv6="2001:DB8::1/32"),
            "peer: 2001:db8::/32, ICMPV6, from port: -1, to port: -1, ALLOW",
        ),
    ],
)
def test_a_rule_is_kept_as_ec2_shows_it(request_: RuleRequest, expected: str) -> None:
    assert shown(request_) == expected


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (changed(ip_protocol="256"), "InvalidParameterValue", "'256' for IP protocol"),
        (changed(ip_protocol=""), "InvalidParameterValue", "Unknown protocol"),
        (changed(ip_protocol="\0" * 999), "InvalidParameterValue", "?..."),
        (changed(ip_protocol="६"), "InvalidParameterValue", "Unknown protocol"),
        (changed(from_port=None), "InvalidParameterValue", "both from and to ports"),
        (changed(to_port=None), "InvalidParameterValue", "both from and to ports"),
        (changed(from_port=81), "InvalidParameterValue", "(81:80)"),
        (changed(from_port=-1), "InvalidParameterValue", "(-1:80)"),
        (changed(to_port=65536), "InvalidParameterValue", "(80:65536)"),
        (changed(ip_protocol="icmp", from_port=256), "InvalidParameterValue", "type (256)"),
        (changed(ip_protocol="icmp", from_port=-1), "InvalidParameterValue", "code (80)"),
        (changed(cidr_ipv4="10.0.0.0"), "InvalidParameterValue", "not a valid CIDR block"),
        (changed(cidr_ipv4="10.0.0.0/33"), "InvalidParameterValue", "10.0.0.0/33"),
        (changed(cidr_ipv4="10.0.0.0/255.0.0.0"), "InvalidParameterValue", "cidrIp"),
        (changed(cidr_ipv4="::/0"), "InvalidParameterValue", "cidrIp"),
        (changed(cidr_ipv4=None, cidr_ipv6="fe80::%lo/64"), "InvalidParameterValue", "cidrIpv6"),
        (changed(cidr_ipv4=None, cidr_ipv6="::/129"), "InvalidParameterValue", "cidrIpv6"),
        (changed(cidr_ipv4=None), "InvalidPermission.Malformed", "exactly one"),
        (changed(prefix_list_id="pl-1"), "InvalidPermission.Malformed", "exactly one"),
        (changed(description="a" * 256), "InvalidParameterValue", "less than 256"),
        (changed(description="naïve"), "InvalidParameterValue", "Invalid rule description"),
        (changed(description="a\n"), "InvalidParameterValue", "&;{}!$*"),
    ],
)
def test_what_is_no_rule_is_refused(request_: RuleRequest, code: str, text: str) -> None:
    with pytest.raises(Ec2Error) as caught:
        canonical(request_, "sgr-1", is_egress=False)
    assert caught.value.code == code
    assert text in str(caught.value)


TEXTS = st.text(max_size=60)
PORTS = st.none() | st.integers(-(2**40), 2**40)


@given(
    st.builds(
        RuleRequest,
        ip_protocol=TEXTS | st.sampled_from(["tcp", "icmp", "-1", "6"]),
        from_port=PORTS,
        to_port=PORTS,
        cidr_ipv4=st.none() | TEXTS | st.sampled_from(["0.0.0.0/0", "1.2.3.4/5"]),
        cidr_ipv6=st.none() | TEXTS,
        referenced_group_id=st.none() | TEXTS,
        description=st.none() | TEXTS,
    )
)
def test_anything_is_a_rule_or_a_refusal_and_a_rule_stays_the_same(request_: RuleRequest) -> None:
    try:
        rule = canonical(request_, "sgr-1", is_egress=True)
    except Ec2Error as error:
        assert len(str(error)) < 400
        return
    members = {name: getattr(rule, name) for name in RuleRequest.__struct_fields__}
    again = canonical(RuleRequest(**members), "sgr-1", is_egress=True)
    assert again == rule


def test_what_counts_is_what_a_peer_may_become() -> None:
    requests = [
        WEB,
        changed(cidr_ipv4=None, cidr_ipv6="::/0"),
        changed(cidr_ipv4=None, referenced_group_id="sg-1"),
        changed(cidr_ipv4=None, prefix_list_id="pl-1"),
    ]
    rules = [canonical(request, "sgr-1", is_egress=False) for request in requests]
    empty = PrefixList(
        prefix_list_id="pl-1", prefix_list_name="n", max_entries=20, index=1, created_at=0
    )
    lists = {"pl-1": empty}
    assert weight(rules, "IPv4", is_egress=False, lists=lists) == 22
    assert weight(rules, "IPv6", is_egress=False, lists=lists) == 2
    assert weight(rules, "IPv4", is_egress=True, lists=lists) == 0
