"""What the resolver of a VPC says to whom, without a socket."""

from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import pytest

from sandbox.model.vpc import Network
from sandbox.network.answers import answer
from sandbox.network.names import RecordSet, private_name, private_zone, public_name, zone_of
from tests.unit.network.vpcs import POOL, asked, interface, told, vpc, zone, zone_that_says_no

WEB = private_zone(
    "prod.local",
    {
        "web.prod.local": [
            RecordSet("A", ("10.0.0.5", "10.0.0.6"), 10),
            RecordSet("SRV", ("1 1 8080 a.web.prod.local.",), 10),
        ],
        "a.web.prod.local": [RecordSet("A", ("10.0.0.5",), 10)],
        "six.deep.prod.local": [RecordSet("AAAA", ("2001:db8::6",), 15)],
        "idle.prod.local": [RecordSet("A", (), 10)],
        "many.prod.local": [RecordSet("A", tuple(f"10.0.1.{n}" for n in range(20)), 10)],
    },
)


# Private names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "name"),
    [
        ("us-east-1", "ip-10-0-0-5.ec2.internal"),
        ("eu-west-1", "ip-10-0-0-5.eu-west-1.compute.internal"),
    ],
)
def test_an_interface_is_found_by_its_private_name_and_back(region: str, name: str) -> None:
    here = zone(region=region)
    assert private_name("10.0.0.5", region) == name
    assert told(asked(name, of=here)) == ["10.0.0.5"]
    assert told(asked("5.0.0.10.in-addr.arpa", "PTR", of=here)) == [name + "."]


def test_addresses_that_nobody_has_have_a_name_as_in_ec2() -> None:
    assert told(asked("ip-10-0-255-255.ec2.internal")) == ["10.0.255.255"]
    assert told(asked("2.0.0.10.in-addr.arpa", "PTR")) == ["ip-10-0-0-2.ec2.internal."]


def test_names_are_the_same_in_any_case_and_come_back_as_they_were_asked() -> None:
    message = asked("IP-10-0-0-5.Ec2.Internal")
    assert message is not None
    assert told(message) == ["10.0.0.5"]
    assert str(message.answer[0].name) == "IP-10-0-0-5.Ec2.Internal."
    assert message.answer[0].ttl == 60


@pytest.mark.parametrize(
    "name",
    [
        "ip-10-1-0-5.ec2.internal",  # not the VPC's
        "ip-10-0-0-05.ec2.internal",
        "ip-10-0-0.ec2.internal",
        "ip-10-0-0-5-6.ec2.internal",
        "ip-10-0-0-256.ec2.internal",
        "ip-.ec2.internal",
        "ip-10.0.0.5.ec2.internal",
        "ip-\\1100-0-0-5.ec2.internal",
        "ip-10\\.0\\.0\\.5.ec2.internal",
        "x.ip-10-0-0-5.ec2.internal",
        "host.ec2.internal",
    ],
)
def test_what_is_no_name_of_an_address_does_not_exist_and_is_not_asked_elsewhere(name: str) -> None:
    message = asked(name)
    assert told(message) == "NXDOMAIN"
    assert zone_that_says_no(message) == "ec2.internal."


def test_a_name_has_nothing_of_other_types() -> None:
    for kind in ("AAAA", "MX", "TXT", "SRV", "HTTPS"):
        message = asked("ip-10-0-0-5.ec2.internal", kind)
        assert told(message) == "NODATA"
        assert zone_that_says_no(message) == "ec2.internal."


def test_the_top_of_a_zone_has_its_soa_and_nothing_else() -> None:
    assert told(asked("ec2.internal")) == "NODATA"
    soa = told(asked("ec2.internal", "SOA"))
    assert [value.split()[-1] for value in soa] == ["60"]  # how long a no holds


def test_domains_of_other_regions_are_nobody_elses() -> None:
    assert told(asked("ip-10-0-0-5.eu-west-1.compute.internal")) == "NXDOMAIN"
    assert told(asked("ip-10-0-0-5.ec2.internal", of=zone(region="eu-west-1"))) == "NXDOMAIN"


# Backwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cidr", "name", "expected"),
    [
        ("10.0.16.0/20", "5.16.0.10.in-addr.arpa", ["ip-10-0-16-5.ec2.internal."]),
        ("10.0.16.0/20", "5.15.0.10.in-addr.arpa", "NXDOMAIN"),
        ("10.0.16.0/20", "16.0.10.in-addr.arpa", "NODATA"),
        ("10.0.16.0/20", "15.0.10.in-addr.arpa", "NXDOMAIN"),
        ("10.0.16.0/20", "0.10.in-addr.arpa", "NODATA"),
        ("10.0.16.0/20", "1.10.in-addr.arpa", "NXDOMAIN"),
        ("10.0.16.0/20", "10.in-addr.arpa", "NODATA"),
        ("10.0.0.16/28", "17.0.0.10.in-addr.arpa", ["ip-10-0-0-17.ec2.internal."]),
        ("10.0.0.16/28", "15.0.0.10.in-addr.arpa", "NXDOMAIN"),
        ("10.0.0.16/28", "0.0.10.in-addr.arpa", "NODATA"),
        ("55.1.0.0/16", "1.0.1.55.in-addr.arpa", ["ip-55-1-0-1.ec2.internal."]),
        ("55.1.0.0/16", "x.1.0.1.55.in-addr.arpa", "NXDOMAIN"),
        ("55.1.0.0/16", "x.0.1.55.in-addr.arpa", "NXDOMAIN"),
        ("55.1.0.0/16", "2.55.in-addr.arpa", "FORWARDED"),
        ("55.1.0.0/16", "55.in-addr.arpa", "FORWARDED"),
        ("10.0.0.0/16", "05.0.0.10.in-addr.arpa", "NXDOMAIN"),
        ("10.0.0.0/16", "8.8.8.8.in-addr.arpa", "FORWARDED"),
        ("10.0.0.0/16", "in-addr.arpa", "FORWARDED"),
        ("10.0.0.0/16", "256.in-addr.arpa", "FORWARDED"),
        ("10.0.0.0/16", "254.169.254.169.in-addr.arpa", "NXDOMAIN"),
        ("10.0.0.0/16", "1.1.168.192.in-addr.arpa", "NXDOMAIN"),
        ("10.0.0.0/16", "1.1.16.172.in-addr.arpa", "NXDOMAIN"),
        ("10.0.0.0/16", "1.1.32.172.in-addr.arpa", "FORWARDED"),
        ("10.0.0.0/16", "1.0.0.0.d.f.ip6.arpa", "NXDOMAIN"),
        ("10.0.0.0/16", "1.0.0.0.0.2.ip6.arpa", "FORWARDED"),
    ],
)
def test_addresses_backwards(cidr: str, name: str, expected: str | list[str]) -> None:
    caller = str(vpc(cidr).cidr_block).partition("/")[0]
    here = zone({caller: None}, cidr_block=cidr)
    assert told(asked(name, "PTR", of=here, caller=caller)) == expected


def test_a_no_comes_from_a_zone_that_the_name_is_in() -> None:
    for cidr, name, origin in (
        ("10.0.0.0/16", "05.0.0.10.in-addr.arpa", "0.10.in-addr.arpa."),
        ("10.0.16.0/20", "x.1.16.0.10.in-addr.arpa", "16.0.10.in-addr.arpa."),
        ("10.0.0.16/28", "x.17.0.0.10.in-addr.arpa", "0.0.10.in-addr.arpa."),
        ("10.0.0.0/16", "1.1.168.192.in-addr.arpa", "168.192.in-addr.arpa."),
    ):
        assert zone_that_says_no(asked(name, "PTR", of=zone(cidr_block=cidr))) == origin


def test_the_vpcs_own_ipv6_addresses_are_not_looked_up_elsewhere() -> None:
    here = zone(ipv6_cidr_block="2600:1f18:1:200::/56")
    inside = "0." * 18 + "2.0.1.0.0.0.8.1.f.1.0.0.6.2.ip6.arpa"
    assert told(asked(inside, "PTR", of=here)) == "NXDOMAIN"
    outside = "0." * 18 + "3.0.1.0.0.0.8.1.f.1.0.0.6.2.ip6.arpa"
    assert told(asked(outside, "PTR", of=here)) == "FORWARDED"


# Public names ---------------------------------------------------------------------------------

PUBLIC = {"10.0.0.5": "198.18.0.5", "10.0.0.6": None}


@pytest.mark.parametrize(
    ("region", "name"),
    [
        ("us-east-1", "ec2-198-18-0-5.compute-1.amazonaws.com"),
        ("eu-west-1", "ec2-198-18-0-5.eu-west-1.compute.amazonaws.com"),
    ],
)
def test_a_public_name_is_the_private_address_inside_the_vpc(region: str, name: str) -> None:
    here = zone(PUBLIC, region=region, enable_dns_hostnames=True)
    assert public_name("198.18.0.5", region) == name
    assert told(asked(name, of=here)) == ["10.0.0.5"]
    assert told(asked(name, "AAAA", of=here)) == "NODATA"
    assert told(asked("5.0.18.198.in-addr.arpa", "PTR", of=here)) == [name + "."]


def test_without_dns_hostnames_there_is_no_public_name() -> None:
    here = zone(PUBLIC)
    assert told(asked("ec2-198-18-0-5.compute-1.amazonaws.com", of=here)) == "NXDOMAIN"
    assert told(asked("5.0.18.198.in-addr.arpa", "PTR", of=here)) == "NXDOMAIN"


def test_the_public_name_of_another_vpcs_address_is_that_address() -> None:
    here = zone(PUBLIC, enable_dns_hostnames=True)
    assert told(asked("ec2-198-19-7-7.compute-1.amazonaws.com", of=here)) == ["198.19.7.7"]
    expected = ["ec2-198-19-7-7.compute-1.amazonaws.com."]
    assert told(asked("7.7.19.198.in-addr.arpa", "PTR", of=here)) == expected


def test_public_names_that_are_really_amazons_are_asked_of_others() -> None:
    for name in (
        "ec2-54-1-2-3.compute-1.amazonaws.com",
        "compute-1.amazonaws.com",
        "ec2-198-18-0-5.eu-west-1.compute.amazonaws.com",
        "s3.amazonaws.com",
    ):
        assert told(asked(name, of=zone(PUBLIC, enable_dns_hostnames=True))) == "FORWARDED"


# Private zones --------------------------------------------------------------------------------


def test_a_service_is_found_with_the_ttl_that_it_was_given() -> None:
    here = zone(private_zones=[WEB], enable_dns_hostnames=True)
    message = asked("web.prod.local", of=here)
    assert message is not None
    assert told(message) == ["10.0.0.5", "10.0.0.6"]
    assert message.answer[0].ttl == 10
    assert told(asked("web.prod.local", "SRV", of=here)) == ["1 1 8080 a.web.prod.local."]
    assert told(asked("six.deep.prod.local", "AAAA", of=here)) == ["2001:db8::6"]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("web.prod.local", "AAAA", "NODATA"),
        ("gone.prod.local", "A", "NXDOMAIN"),
        ("x.web.prod.local", "A", "NXDOMAIN"),
        ("deep.prod.local", "A", "NODATA"),
        ("prod.local", "A", "NODATA"),
        ("idle.prod.local", "A", "NODATA"),
    ],
)
def test_a_private_zone_says_no_by_itself(name: str, kind: str, expected: str) -> None:
    message = asked(name, kind, of=zone(private_zones=[WEB], enable_dns_hostnames=True))
    assert told(message) == expected
    assert zone_that_says_no(message) == "prod.local."


def test_eight_addresses_at_most_and_others_the_next_time() -> None:
    here = zone(private_zones=[WEB], enable_dns_hostnames=True)
    seen = {
        value
        for query_id in range(0, 20, 5)
        for value in told(asked("many.prod.local", of=here, query_id=query_id))
    }
    assert len(told(asked("many.prod.local", of=here))) == 8
    assert len(seen) == 20


def test_the_longest_private_zone_decides_and_hides_the_public_one() -> None:
    outer = private_zone("example.com", {"www.example.com": [RecordSet("A", ("10.0.0.1",))]})
    inner = private_zone("in.example.com", {"a.in.example.com": [RecordSet("A", ("10.0.0.2",))]})
    here = zone(private_zones=[outer, inner], enable_dns_hostnames=True)
    assert told(asked("www.example.com", of=here)) == ["10.0.0.1"]
    assert told(asked("a.in.example.com", of=here)) == ["10.0.0.2"]
    assert told(asked("b.in.example.com", of=here)) == "NXDOMAIN"
    assert told(asked("other.example.com", of=here)) == "NXDOMAIN"
    assert told(asked("example.org", of=here)) == "FORWARDED"


def test_a_vpc_without_dns_hostnames_sees_no_private_zones() -> None:
    assert told(asked("web.prod.local", of=zone(private_zones=[WEB]))) == "FORWARDED"


def test_a_private_zone_may_be_a_single_label() -> None:
    local = private_zone("local", {"db.local": [RecordSet("A", ("10.0.0.9",))]})
    assert told(asked("db.local", of=zone(private_zones=[local], enable_dns_hostnames=True))) == [
        "10.0.0.9"
    ]


def test_a_name_outside_its_private_zone_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"web\.other is not in prod\.local"):
        private_zone("prod.local", {"web.other": []})


# Everybody else -------------------------------------------------------------------------------


def test_names_of_others_are_for_others() -> None:
    for name in ("example.com", "a.b.c.example.com", "internal.example", "."):
        assert told(asked(name)) == "FORWARDED"


def test_single_labels_are_never_asked_elsewhere() -> None:
    for name in ("redis", "internal", "com"):
        assert told(asked(name)) == "NXDOMAIN"


def test_localhost_is_this_machine() -> None:
    for name in ("localhost", "app.localhost"):
        assert told(asked(name)) == ["127.0.0.1"]
        assert told(asked(name, "AAAA")) == ["::1"]
        assert told(asked(name, "MX")) == "NODATA"


def test_any_is_answered_with_the_least_and_asked_of_nobody() -> None:
    assert told(asked("ip-10-0-0-5.ec2.internal", "ANY")) == ['"RFC8482" ""']
    assert told(asked("example.com", "ANY")) == ['"RFC8482" ""']
    assert told(asked("nobody.ec2.internal", "ANY")) == "NXDOMAIN"


def test_zone_transfers_and_other_meta_types_are_refused() -> None:
    for kind in ("AXFR", "IXFR", "MAILB", "TYPE200", "OPT"):
        assert told(asked("ec2.internal", kind)) == "REFUSED"


def test_who_is_not_of_the_vpc_is_refused_and_told_why() -> None:
    query = dns.message.make_query("ip-10-0-0-5.ec2.internal", "A", use_edns=0)
    message = answer(query, zone(), "10.0.0.77")
    assert told(message) == "REFUSED"
    assert message is not None
    [reason] = message.options
    assert isinstance(reason, dns.edns.EDEOption)
    assert reason.text == "not a resolver of this address"


def test_the_ipv6_address_of_an_interface_may_ask() -> None:
    dual = interface("10.0.0.5", None, "2600:1f18:1:200::5")
    here = zone_of(
        Network(vpc=vpc(), interfaces={"eni": dual}), region="us-east-1", public_pool=POOL
    )
    name = "ip-10-0-0-5.ec2.internal"
    assert told(asked(name, of=here, caller="2600:1f18:1:200::5")) == ["10.0.0.5"]


def test_without_dns_support_everybody_is_refused() -> None:
    here = zone(enable_dns_support=False)
    assert told(asked("ip-10-0-0-5.ec2.internal", of=here)) == "REFUSED"


def test_only_the_internet_has_names_here() -> None:
    query = dns.message.make_query("version.bind", "TXT", rdclass="CH")
    assert told(answer(query, zone(), "10.0.0.5")) == "REFUSED"


def test_without_recursion_desired_nobody_else_is_asked() -> None:
    query = dns.message.make_query("example.com", "A", flags=0)
    assert told(answer(query, zone(), "10.0.0.5")) == "REFUSED"
    query = dns.message.make_query("ip-10-0-0-5.ec2.internal", "A", flags=0)
    assert told(answer(query, zone(), "10.0.0.5")) == ["10.0.0.5"]


def test_another_version_of_edns_is_told_ours() -> None:
    query = dns.message.make_query("example.com", "A", use_edns=1)
    message = answer(query, zone(), "10.0.0.5")
    assert message is not None
    assert (message.rcode(), message.edns) == (dns.rcode.BADVERS, 0)


def test_an_answer_says_that_recursion_is_available_and_repeats_the_question() -> None:
    query = dns.message.make_query("ip-10-0-0-5.ec2.internal", "A")
    message = answer(query, zone(), "10.0.0.5")
    assert message is not None
    assert query.is_response(message)
    assert message.flags & dns.flags.RA
