"""Ids, ARNs, and the names that kernel objects get from them.

A name of a kernel object is a function of ids, so undoing a step needs no memory of what was done,
and a sweep can tell what is ours: everything carries the instance id, which keeps several agents on
one host apart. Two limits of the kernel decide the forms: a link name has at most 15 bytes
(IFNAMSIZ less its NUL), an ipset name 31.

Randomness comes in as bytes; nothing here reads a clock, a file or the kernel.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from sandbox.errors import InvalidParameterException, NotFound

TASK_NOT_FOUND = "The referenced task was not found."
"""ECS's text."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")
_TASK_ID = re.compile(r"[0-9a-f]{32}")
_ARN = re.compile(r"arn:([^:]+):([^:]+):([^:]*):([^:]*):(.+)", re.DOTALL)

# What has the grammar of a container name and is taken where the container's entry goes. A trailing
# dot is outside that grammar, so the changed name is nobody else's.
_CGROUP_V1_FILES = frozenset({"tasks", "notify_on_release", "release_agent"})
_TASK_DIRECTORY_ENTRIES = frozenset({"volumes"})
_PAUSE = "pause."


def is_name(text: str) -> bool:
    """The grammar of containers, volumes, families and clusters."""
    return _NAME.fullmatch(text) is not None


# Ids ---------------------------------------------------------------------------------------


def task_id(random: bytes) -> str:
    """A task's id from 16 random bytes."""
    if len(random) != 16:
        raise ValueError(f"a task id is made of 16 bytes, not {len(random)}")
    return random.hex()


def is_task_id(text: str) -> bool:
    return _TASK_ID.fullmatch(text) is not None


def instance_id(random: bytes) -> str:
    """An agent's id from 2 random bytes."""
    if len(random) != 2:
        raise ValueError(f"an instance id is made of 2 bytes, not {len(random)}")
    return random.hex()


def runtime_id(task: str, container: str) -> str:
    """What Fargate shows as a container's runtimeId and DockerId: the task's id and ten digits.

    It stays when the restart policy starts the container again.
    """
    digest = hashlib.sha256(f"{task}/{container}".encode()).digest()
    return f"{task}-{int.from_bytes(digest[:8], 'big') % 10**10:010}"


def ec2_id(kind: str, random: bytes) -> str:
    """An EC2 id such as `subnet-` and 17 hexadecimal digits, from 9 random bytes."""
    if len(random) != 9:
        raise ValueError(f"an id of EC2 is made of 9 bytes, not {len(random)}")
    return f"{kind}-{random.hex()[:17]}"


# ARNs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arn:
    partition: str
    service: str
    region: str
    account: str
    resource: str

    @classmethod
    def parse(cls, text: str) -> Arn:
        """Raises ValueError for what has not the six parts of an ARN."""
        parts = _ARN.fullmatch(text)
        if parts is None:
            raise ValueError(f"not an ARN: {text!r}")
        return cls(*parts.groups())

    def __str__(self) -> str:
        return f"arn:{self.partition}:{self.service}:{self.region}:{self.account}:{self.resource}"


@dataclass(frozen=True)
class Place:
    """The one account and region that an agent is."""

    account_id: str
    region: str
    partition: str = "aws"

    def ecs(self, resource: str) -> str:
        return str(Arn(self.partition, "ecs", self.region, self.account_id, resource))

    def cluster_arn(self, cluster: str) -> str:
        return self.ecs(f"cluster/{cluster}")

    def task_arn(self, cluster: str, task: str) -> str:
        return self.ecs(f"task/{cluster}/{task}")

    def task_definition_arn(self, family: str, revision: int) -> str:
        return self.ecs(f"task-definition/{family}:{revision}")

    def container_arn(self, cluster: str, task: str, container: str) -> str:
        own = uuid.uuid5(uuid.UUID(task), container)
        return self.ecs(f"container/{cluster}/{task}/{own}")


def match(
    reference: str,
    ids: Collection[str],
    *,
    place: Place | None = None,
    named: Collection[str] = (),
) -> str:
    """The one of `ids` that `reference` means: an id, an ARN, a name, or the beginning of one id.

    `named` are those whose name it is; a name wins over the beginning of an id. An ARN must be of
    `place` when that is given; the form without a cluster and with a dashed id (2017's) is accepted
    too.
    """
    wanted = _id_in_arn(reference, place) if reference.startswith("arn:") else reference
    if wanted in ids:
        return wanted
    if len(named) == 1:
        return next(iter(named))
    if named:
        shown = ", ".join(known[:12] for known in sorted(named)[:3])
        raise InvalidParameterException(f"{len(named)} tasks are called {reference}: {shown}")
    found = sorted(known for known in ids if wanted and known.startswith(wanted))
    if not found or wanted != reference:
        raise NotFound(TASK_NOT_FOUND)
    if len(found) > 1:
        shown = ", ".join(known[: len(wanted) + 8] for known in found[:3])
        raise InvalidParameterException(
            f"{reference} is the beginning of {len(found)} ids: {shown}"
        )
    return found[0]


def _id_in_arn(text: str, place: Place | None) -> str:
    try:
        arn = Arn.parse(text)
    except ValueError:
        raise InvalidParameterException(f"not an ARN: {text}") from None
    kind, _, rest = arn.resource.partition("/")
    if arn.service != "ecs" or kind != "task":
        raise InvalidParameterException(f"not the ARN of a task: {text}")
    if place is not None:
        if arn.account != place.account_id:
            raise InvalidParameterException(
                f"{text} is of account {arn.account}, this is account {place.account_id}"
            )
        if arn.region != place.region:
            raise InvalidParameterException(
                f"{text} is of region {arn.region}, this is region {place.region}"
            )
    return rest.rpartition("/")[2].replace("-", "")


# Interfaces --------------------------------------------------------------------------------


def mac_address(eni: str) -> str:
    """Of the task's end: locally administered, unicast, and the first ten digits of the ENI's id.

    They contain the eight that name the link, so two live interfaces do not share it either.
    """
    digits = _eni_digits(eni, 10)
    return ":".join(["0a", *(digits[at : at + 2] for at in range(0, 10, 2))])


def private_dns_name(address: str, region: str) -> str:
    """What EC2 calls a private address: `ip-10-0-0-5.ec2.internal`, or with its region in it.

    Amazon VPC User Guide, "DNS attributes for your VPC".
    """
    return f"ip-{address.replace('.', '-')}.{internal_domain(region)}"


def internal_domain(region: str) -> str:
    """The domain of private names, and the search domain where no DHCP options say another."""
    return "ec2.internal" if region == "us-east-1" else f"{region}.compute.internal"


# Kernel objects ------------------------------------------------------------------------------


def task_cgroup(task: str) -> str:
    return f"task-{task}"


def task_of_cgroup(name: str) -> str | None:
    """The task whose cgroup it is; None for a container's, and for a name that none of ours has."""
    task = name.removeprefix("task-")
    return task if task != name and is_task_id(task) else None


def container_cgroup(task: str, container: str) -> str:
    """Below the agent's place: `task-<id>/<container>`."""
    return f"{task_cgroup(task)}/{_apart(container, _CGROUP_V1_FILES)}"


def container_directory(container: str) -> str:
    """A container's directory below that of its task."""
    return _apart(container, _TASK_DIRECTORY_ENTRIES)


def pause_cgroup(task: str) -> str:
    """Of the init that holds the pid namespace of a task with pidMode task."""
    return f"{task_cgroup(task)}/{_PAUSE}"


def pause_directory() -> str:
    """Its status directory, below that of its task."""
    return _PAUSE


def link(instance: str, eni: str) -> str:
    """The host's end of an interface, from the hexadecimal digits of the ENI's id."""
    return f"sb{instance}{_eni_digits(eni, 8)}"


def uplink(instance: str, number: int) -> str:
    return f"sb{instance}u{number}"


def is_link(instance: str, name: str) -> bool:
    """Whether a sweep may take this link for its own."""
    return re.fullmatch(rf"sb{re.escape(instance)}([0-9a-f]{{8}}|u[0-9]+)", name) is not None


def chain(instance: str, hook: str) -> str:
    """A root chain; `hook` is FWD, IN or POST."""
    return f"SB-{instance}-{hook}"


def _eni_digits(eni: str, count: int) -> str:
    digits = eni.removeprefix("eni-")[:count]
    if re.fullmatch(rf"[0-9a-f]{{{count}}}", digits) is None:
        raise ValueError(f"not the id of an ENI: {eni!r}")
    return digits


def _apart(container: str, taken: frozenset[str]) -> str:
    return f"{container}." if container in taken else container
