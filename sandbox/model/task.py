"""Tasks and their definitions, as ECS describes them and as the store keeps them.

`TaskDefinition` and what it contains carry ECS's member names (camel case on the wire, snake case
here) and ECS's defaults. They hold what was asked for, also what Fargate has not: what a type does
not have, nobody can refuse. `model.fargate` says what Fargate makes of it. The running side is
split by writer, so that two writers never share a key:

    task/<id>/desired   TaskDesired   written by control only: what shall be
    task/<id>/known     TaskKnown     written by the task's supervisor only: what is

    PROVISIONING -> PENDING -> ACTIVATING -> RUNNING
        -> DEACTIVATING -> STOPPING -> DEPROVISIONING -> STOPPED        (it only moves right)

Sizes: cpu in units (1024 = 1 vCPU), memory in MiB, times of definitions in whole seconds, time
stamps in seconds since the epoch.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Literal

import msgspec


class Status(enum.IntEnum):
    """A task's lastStatus; ordered, and it never goes back."""

    PROVISIONING = 1
    PENDING = 2
    ACTIVATING = 3
    RUNNING = 4
    DEACTIVATING = 5
    STOPPING = 6
    DEPROVISIONING = 7
    STOPPED = 8


class StopCode(enum.StrEnum):
    TASK_FAILED_TO_START = "TaskFailedToStart"
    ESSENTIAL_CONTAINER_EXITED = "EssentialContainerExited"
    USER_INITIATED = "UserInitiated"
    SERVICE_SCHEDULER_INITIATED = "ServiceSchedulerInitiated"
    SPOT_INTERRUPTION = "SpotInterruption"
    TERMINATION_NOTICE = "TerminationNotice"
    INFRASTRUCTURE_HEALTH = "InfrastructureHealth"


class Health(enum.StrEnum):
    UNKNOWN = "UNKNOWN"
    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"


class Record(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of everything here that is stored or sent."""


# What is asked for -------------------------------------------------------------------------


class KeyValuePair(Record, frozen=True, kw_only=True):
    name: str
    value: str


class PortMapping(Record, frozen=True, kw_only=True):
    """One port or a range of them ("8000-8010"); `name` and `app_protocol` are declarations."""

    container_port: int | None = None
    protocol: Literal["tcp", "udp"] = "tcp"
    host_port: int | None = None
    container_port_range: str | None = None
    name: str | None = None
    app_protocol: Literal["http", "http2", "grpc"] | None = None


class MountPoint(Record, frozen=True, kw_only=True):
    source_volume: str
    container_path: str
    read_only: bool = False


class VolumeFrom(Record, frozen=True, kw_only=True):
    source_container: str
    read_only: bool = False


class ContainerDependency(Record, frozen=True, kw_only=True):
    container_name: str
    condition: Literal["START", "COMPLETE", "SUCCESS", "HEALTHY"]


class HealthCheck(Record, frozen=True, kw_only=True):
    """`command` is ["CMD", ...], ["CMD-SHELL", line] or ["NONE"]."""

    command: tuple[str, ...]
    interval: int = 30
    timeout: int = 5
    retries: int = 3
    start_period: int = 0


class Ulimit(Record, frozen=True, kw_only=True):
    name: str
    soft_limit: int
    hard_limit: int


class SystemControl(Record, frozen=True, kw_only=True):
    namespace: str
    value: str


class RestartPolicy(Record, frozen=True, kw_only=True):
    enabled: bool
    ignored_exit_codes: tuple[int, ...] = ()
    restart_attempt_period: int = 300


class KernelCapabilities(Record, frozen=True, kw_only=True):
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


class Device(Record, frozen=True, kw_only=True):
    host_path: str
    container_path: str | None = None
    permissions: tuple[str, ...] = ()


class Tmpfs(Record, frozen=True, kw_only=True):
    container_path: str
    size: int
    mount_options: tuple[str, ...] = ()


class LinuxParameters(Record, frozen=True, kw_only=True):
    capabilities: KernelCapabilities = KernelCapabilities()
    init_process_enabled: bool = False
    devices: tuple[Device, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    shared_memory_size: int | None = None
    max_swap: int | None = None
    swappiness: int | None = None


class HostEntry(Record, frozen=True, kw_only=True):
    hostname: str
    ip_address: str


class ResourceRequirement(Record, frozen=True, kw_only=True):
    type: Literal["GPU", "InferenceAccelerator"]
    value: str


class Secret(Record, frozen=True, kw_only=True):
    name: str
    value_from: str


class EnvironmentFile(Record, frozen=True, kw_only=True):
    value: str
    type: Literal["s3"]


class LogConfiguration(Record, frozen=True, kw_only=True):
    log_driver: str
    options: dict[str, str] = {}
    secret_options: tuple[Secret, ...] = ()


class RepositoryCredentials(Record, frozen=True, kw_only=True):
    credentials_parameter: str


class FirelensConfiguration(Record, frozen=True, kw_only=True):
    type: Literal["fluentd", "fluentbit"]
    options: dict[str, str] = {}


class ContainerDefinition(Record, frozen=True, kw_only=True):
    """`docker_labels` and `version_consistency` are declarations."""

    name: str
    image: str
    cpu: int = 0
    memory: int | None = None
    memory_reservation: int | None = None
    essential: bool = True
    entry_point: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    environment: tuple[KeyValuePair, ...] = ()
    working_directory: str | None = None
    user: str | None = None
    depends_on: tuple[ContainerDependency, ...] = ()
    start_timeout: int | None = None
    stop_timeout: int | None = None
    health_check: HealthCheck | None = None
    restart_policy: RestartPolicy | None = None
    readonly_root_filesystem: bool = False
    linux_parameters: LinuxParameters = LinuxParameters()
    ulimits: tuple[Ulimit, ...] = ()
    system_controls: tuple[SystemControl, ...] = ()
    mount_points: tuple[MountPoint, ...] = ()
    volumes_from: tuple[VolumeFrom, ...] = ()
    port_mappings: tuple[PortMapping, ...] = ()
    interactive: bool = False
    pseudo_terminal: bool = False
    docker_labels: dict[str, str] = {}
    version_consistency: Literal["enabled", "disabled"] | None = None

    # Fargate has none of these.
    privileged: bool = False
    hostname: str | None = None
    links: tuple[str, ...] = ()
    extra_hosts: tuple[HostEntry, ...] = ()
    dns_servers: tuple[str, ...] = ()
    dns_search_domains: tuple[str, ...] = ()
    disable_networking: bool = False
    docker_security_options: tuple[str, ...] = ()
    resource_requirements: tuple[ResourceRequirement, ...] = ()

    # Not built yet.
    secrets: tuple[Secret, ...] = ()
    environment_files: tuple[EnvironmentFile, ...] = ()
    log_configuration: LogConfiguration | None = None
    repository_credentials: RepositoryCredentials | None = None
    firelens_configuration: FirelensConfiguration | None = None
    credential_specs: tuple[str, ...] = ()


class HostVolume(Record, frozen=True, kw_only=True):
    source_path: str | None = None


class DockerVolume(Record, frozen=True, kw_only=True):
    scope: Literal["task", "shared"] | None = None
    autoprovision: bool | None = None
    driver: str | None = None
    driver_opts: dict[str, str] = {}
    labels: dict[str, str] = {}


class EfsAuthorization(Record, frozen=True, kw_only=True):
    access_point_id: str | None = None
    iam: Literal["ENABLED", "DISABLED"] | None = None


class EfsVolume(Record, frozen=True, kw_only=True):
    file_system_id: str
    root_directory: str | None = None
    transit_encryption: Literal["ENABLED", "DISABLED"] | None = None
    transit_encryption_port: int | None = None
    authorization_config: EfsAuthorization | None = None


class Volume(Record, frozen=True, kw_only=True):
    """An empty volume of the task; it dies with the task. Other kinds are refused."""

    name: str
    host: HostVolume | None = None
    docker_volume_configuration: DockerVolume | None = None
    efs_volume_configuration: EfsVolume | None = None
    configured_at_launch: bool = False


class EphemeralStorage(Record, frozen=True, kw_only=True):
    """More than the 20 GiB that a task has by default."""

    size_in_gib: int = msgspec.field(name="sizeInGiB")


class TaskDefinition(Record, frozen=True, kw_only=True):
    """`cpu` and `memory` are the normalised integer strings that ECS returns, e.g. "256"."""

    family: str
    cpu: str
    memory: str
    container_definitions: tuple[ContainerDefinition, ...]
    revision: int = 0
    volumes: tuple[Volume, ...] = ()
    pid_mode: Literal["task", "host"] | None = None
    ephemeral_storage: EphemeralStorage | None = None


# What is kept ------------------------------------------------------------------------------


class TaskStorage(Record, frozen=True, kw_only=True):
    """The sizes of a task's ephemeral storage in GiB, as its platform version has them."""

    size_gib: int = 20
    """For images, writable layers and, unless they have their own, volumes."""
    volumes_gib: int | None = None
    """Of the pool that the volumes share, where they have one of their own."""

    @property
    def total_gib(self) -> int:
        return self.size_gib + (self.volumes_gib or 0)


class TaskDesired(Record, frozen=True, kw_only=True):
    """Written by control. The row is the intent of every step whose names derive from the id."""

    id: str
    """32 lower-case hex digits."""
    cluster: str
    group: str
    definition: TaskDefinition
    desired_status: Literal["RUNNING", "STOPPED"] = "RUNNING"
    created_at: float
    id_base: int
    """First host id of the task's own range of 65536 user and group ids."""
    platform_version: str = "1.4.0"
    storage: TaskStorage = TaskStorage()
    pull: Literal["missing", "always", "never"] = "missing"
    platform: str | None = None
    """The image's os/arch[/variant]; None is the host's."""
    stop_code: StopCode | None = None
    stopped_reason: str | None = None
    """Set with desired_status STOPPED."""
    stop_requested_at: float | None = None
    owner: str | None = None
    """Set while the task must not outlive its client: who that is (a boot id and a pid)."""
    remove: bool = False
    """Forget the record as soon as the task is STOPPED (`run --rm`)."""
    started_by: str | None = None


class KeeperIdentity(Record, frozen=True, kw_only=True):
    """How a keeper is found again: a pid alone may have been reused."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat, in clock ticks since boot."""
    init_pid: int
    init_start_time: int


class ContainerKnown(Record, frozen=True, kw_only=True):
    name: str
    image_digest: str | None = None
    runtime_id: str | None = None
    last_status: Literal["PENDING", "RUNNING", "STOPPED"] = "PENDING"
    keeper: KeeperIdentity | None = None
    attempt: int = 0
    """0 for the first start, then one more each time the restart policy starts it again."""
    started_at: float | None = None
    finished_at: float | None = None
    exit_code: int | None = None
    """Absent: the container never started."""
    reason: str | None = None
    health: Health = Health.UNKNOWN
    health_since: float | None = None
    health_output: str | None = None
    lowered: tuple[str, ...] = ()
    """Defaults that this host could not give in full, one sentence each."""
    lost_output: tuple[str, ...] = ()
    """What a client's own descriptors did not take, one sentence each: a full disk."""


class TaskKnown(Record, frozen=True, kw_only=True):
    """Written by the task's supervisor."""

    id: str
    last_status: Status = Status.PROVISIONING
    version: int = 1
    """Counts the changes that raise an event."""
    raised_event: bool = False
    """This is such a change: `version` counted when the row was written."""
    containers: tuple[ContainerKnown, ...] = ()
    connectivity_at: float | None = None
    pull_started_at: float | None = None
    pull_stopped_at: float | None = None
    started_at: float | None = None
    stopping_at: float | None = None
    execution_stopped_at: float | None = None
    stopped_at: float | None = None
    stop_code: StopCode | None = None
    stopped_reason: str | None = None
    health: Health = Health.UNKNOWN


class TaskView(Record, frozen=True, kw_only=True):
    """What describe, ps, inspect and the Python API show: both rows of a task, read together."""

    desired: TaskDesired
    known: TaskKnown
    arn: str

    @property
    def id(self) -> str:
        return self.desired.id


class Size(Record, frozen=True, kw_only=True):
    """What an accepted task may use of its host."""

    cpu: int
    """Units of 1/1024 vCPU."""
    memory_mib: int
    storage_gib: int


def size_of(definition: TaskDefinition, storage: TaskStorage) -> Size:
    return Size(
        cpu=int(definition.cpu),
        memory_mib=int(definition.memory),
        storage_gib=storage.total_gib,
    )


def promised(sizes: Iterable[Size]) -> Size:
    """What tasks may use together."""
    each = list(sizes)
    return Size(
        cpu=sum(size.cpu for size in each),
        memory_mib=sum(size.memory_mib for size in each),
        storage_gib=sum(size.storage_gib for size in each),
    )


def effective_desire(view: TaskView) -> Literal["RUNNING", "STOPPED"]:
    """What ECS shows as desiredStatus: STOPPED also once a task is going down by itself."""
    return "STOPPED" if view.known.stop_code is not None else view.desired.desired_status
