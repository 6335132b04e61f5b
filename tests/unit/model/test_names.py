"""Ids, ARNs and kernel names: they are what they were made of, and never somebody else's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import InvalidParameterException, NotFound
from sandbox.model import names
from sandbox.model.names import Arn, Place

PLACE = Place("123456789012", "us-east-1")
TASK_IDS = st.binary(min_size=16, max_size=16).map(names.task_id)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,255}", fullmatch=True)
INSTANCES = st.from_regex(r"[0-9a-f]{4}", fullmatch=True)
PARTS = st.text(st.characters(exclude_characters=":"), min_size=1)


@given(st.builds(Arn, PARTS, PARTS, PARTS | st.just(""), PARTS | st.just(""), st.text(min_size=1)))
def test_an_arn_survives_being_written_and_read(arn: Arn) -> None:
    assert Arn.parse(str(arn)) == arn


@pytest.mark.parametrize("text", ["", "arn", "arn:aws:ecs:us-east-1:123456789012", "a:b:c:d:e:f"])
def test_what_has_not_six_parts_is_no_arn(text: str) -> None:
    with pytest.raises(ValueError, match="not an ARN"):
        Arn.parse(text)


def test_arns_have_the_forms_that_ecs_gives_them() -> None:
    task = "0123456789abcdef0123456789abcdef"
    prefix = "arn:aws:ecs:us-east-1:123456789012:"
    assert PLACE.cluster_arn("default") == f"{prefix}cluster/default"
    assert PLACE.task_arn("default", task) == f"{prefix}task/default/{task}"
    assert PLACE.task_definition_arn("web", 3) == f"{prefix}task-definition/web:3"
    container = Arn.parse(PLACE.container_arn("default", task, "app")).resource.split("/")
    assert container[:3] == ["container", "default", task]
    assert [len(part) for part in container[3].split("-")] == [8, 4, 4, 4, 12]
    assert PLACE.container_arn("default", task, "app") == PLACE.container_arn(
        "default", task, "app"
    )
    assert PLACE.container_arn("default", task, "app") != PLACE.container_arn("default", task, "db")


@given(TASK_IDS, NAMES)
def test_a_runtime_id_is_the_tasks_id_and_ten_digits(task: str, container: str) -> None:
    made = names.runtime_id(task, container)
    assert made == names.runtime_id(task, container)
    head, _, digits = made.partition("-")
    assert head == task
    assert len(digits) == 10
    assert digits.isascii() and digits.isdigit()


def test_the_containers_of_a_task_have_runtime_ids_of_their_own() -> None:
    assert len({names.runtime_id("0" * 32, f"c{n}") for n in range(10)}) == 10


@given(st.binary().filter(lambda random: len(random) not in (2, 16)))
def test_ids_need_all_their_bytes(random: bytes) -> None:
    with pytest.raises(ValueError):
        names.task_id(random)
    with pytest.raises(ValueError):
        names.instance_id(random)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("app", True),
        ("My_App-1", True),
        ("-", True),
        ("a" * 255, True),
        ("a" * 256, False),
        ("", False),
        ("a.b", False),
        ("a/b", False),
        ("ä", False),
        ("app\n", False),
    ],
)
def test_a_name_has_letters_digits_hyphens_and_underscores(text: str, valid: bool) -> None:
    assert names.is_name(text) is valid


# References


@given(st.sets(TASK_IDS, min_size=1, max_size=20), st.data())
def test_a_task_is_found_by_its_id_its_arns_and_any_unique_beginning(
    ids: set[str], data: st.DataObject
) -> None:
    task = data.draw(st.sampled_from(sorted(ids)))
    unique = next(
        task[:length]
        for length in range(1, 33)
        if sum(other.startswith(task[:length]) for other in ids) == 1
    )
    dashed = "-".join((task[:8], task[8:12], task[12:16], task[16:20], task[20:]))
    for reference in (task, unique, PLACE.task_arn("default", task), PLACE.ecs(f"task/{dashed}")):
        assert names.match(reference, ids, place=PLACE) == task


@pytest.mark.parametrize("reference", ["", "b", "A", "arn:aws:ecs:r:a:task/default/a"])
def test_an_unknown_task_is_refused_in_the_words_of_ecs(reference: str) -> None:
    with pytest.raises(NotFound, match=r"^The referenced task was not found\.$"):
        names.match(reference, {"a" * 32})


def test_an_ambiguous_beginning_shows_what_it_could_mean() -> None:
    ids = {"ab" + "0" * 30, "ab" + "1" * 30}
    with pytest.raises(
        InvalidParameterException,
        match=r"^ab is the beginning of 2 ids: ab00000000, ab11111111$",
    ):
        names.match("ab", ids)


def test_a_name_is_preferred_to_the_beginning_of_an_id_and_an_id_to_a_name() -> None:
    one, two = "ab" + "0" * 30, "cd" + "0" * 30
    assert names.match("ab", {one, two}, named=[two]) == two
    assert names.match(one, {one, two}, named=[two]) == one
    assert names.match("ab", {one}, named=[]) == one


def test_a_name_of_several_tasks_shows_which() -> None:
    one, two = "ab" + "0" * 30, "cd" + "0" * 30
    text = r"^2 tasks are called web: ab0000000000, cd0000000000$"
    with pytest.raises(InvalidParameterException, match=text):
        names.match("web", {one, two}, named=[two, one])


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("arn:aws:ecs:us-east-1:999:task/c/" + "a" * 32, "is of account 999, this is account 1234"),
        ("arn:aws:ecs:mars:123456789012:task/c/" + "a" * 32, "is of region mars, this is region u"),
        ("arn:aws:ecs:us-east-1:123456789012:cluster/c", "not the ARN of a task"),
        ("arn:aws:ecs", "not an ARN: arn:aws:ecs"),
    ],
)
def test_an_arn_of_something_else_is_refused(reference: str, text: str) -> None:
    with pytest.raises(InvalidParameterException, match=text):
        names.match(reference, {"a" * 32}, place=PLACE)


# Kernel objects


@given(INSTANCES, st.from_regex(r"eni-[0-9a-f]{17}", fullmatch=True), st.integers(0, 99_999))
def test_links_fit_the_kernel_and_are_known_again(instance: str, eni: str, number: int) -> None:
    for name in (names.link(instance, eni), names.uplink(instance, number)):
        assert len(name) <= 15
        assert names.is_link(instance, name)
        other = "0000" if instance != "0000" else "1111"
        assert not names.is_link(other, name)
    assert names.link(instance, eni) != names.uplink(instance, number)


@pytest.mark.parametrize("name", ["sb12ab", "sb12ab0123456", "sb12ab01234567x", "eth0", "sb12abu"])
def test_a_sweep_leaves_other_links_alone(name: str) -> None:
    assert not names.is_link("12ab", name)


def test_what_is_no_eni_gets_no_link() -> None:
    with pytest.raises(ValueError, match="not the id of an ENI"):
        names.link("12ab", "eni-xyz")


@given(TASK_IDS, NAMES)
def test_a_containers_cgroup_is_below_its_tasks(task: str, container: str) -> None:
    parent, _, own = names.container_cgroup(task, container).partition("/")
    assert parent == names.task_cgroup(task) == f"task-{task}"
    assert own.rstrip(".") == container


@given(TASK_IDS, NAMES)
def test_a_task_is_known_by_its_cgroup_and_by_no_other(task: str, container: str) -> None:
    assert names.task_of_cgroup(names.task_cgroup(task)) == task
    for other in (names.container_cgroup(task, container), task, f"task-{task[1:]}", "theirs"):
        assert names.task_of_cgroup(other) is None


@pytest.mark.parametrize("container", ["tasks", "notify_on_release"])
def test_a_container_is_not_called_what_cgroup_v1_calls_its_files(container: str) -> None:
    assert names.container_cgroup("0" * 32, container).rpartition("/")[2] != container


def test_a_container_called_volumes_does_not_live_among_the_volumes() -> None:
    assert names.container_directory("volumes") != "volumes"
    assert names.container_directory("app") == "app"


@given(st.binary(min_size=9, max_size=9))
def test_an_id_of_ec2_has_its_kind_and_seventeen_digits(random: bytes) -> None:
    made = names.ec2_id("subnet", random)
    assert re.fullmatch("subnet-[0-9a-f]{17}", made)
    assert made[7:] == random.hex()[:17]


def test_an_id_of_ec2_is_made_of_nine_bytes() -> None:
    with pytest.raises(ValueError, match="9 bytes, not 8"):
        names.ec2_id("vpc", bytes(8))


@given(st.binary(min_size=9, max_size=9))
def test_a_mac_address_is_local_unicast_and_as_unique_as_the_name_of_the_link(
    random: bytes,
) -> None:
    eni = names.ec2_id("eni", random)
    mac = names.mac_address(eni)
    first, *rest = (int(part, 16) for part in mac.split(":"))
    assert first & 0b11 == 0b10
    assert len(rest) == 5
    assert mac.replace(":", "")[2:10] == names.link("0000", eni)[-8:]


@pytest.mark.parametrize("eni", ["", "eni-", "eni-0123456", "eni-0123456X", "eni-01234567\n9"])
def test_what_is_no_interface_has_no_mac_address(eni: str) -> None:
    with pytest.raises(ValueError, match="not the id of an ENI"):
        names.mac_address(eni)


def test_a_private_name_has_its_region_in_it_but_for_the_first_one() -> None:
    assert names.private_dns_name("10.0.0.5", "us-east-1") == "ip-10-0-0-5.ec2.internal"
    assert (
        names.private_dns_name("10.0.0.5", "eu-west-1") == "ip-10-0-0-5.eu-west-1.compute.internal"
    )
