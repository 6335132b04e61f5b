"""Manifests, indexes and configurations: bytes in, checked records out. Pure.

Everything here came from strangers. A document is a manifest or an index, never both, and its own
mediaType, the registry's Content-Type and the descriptor that led to it must agree where they are
given: a document read in two ways is how one digest comes to mean two images. Sizes of lists and
texts are bounded; nesting is bounded by the parser. Unknown members are ignored, unknown layer
types are not. `urls` of a descriptor are never looked at.

Of the configuration only what a task uses is kept, in the form in which it is used: Env as pairs,
StopSignal as the kernel's number.
"""

from __future__ import annotations

import os
import re
import signal
from typing import Annotated, Any, TypeVar

import msgspec

from sandbox.errors import ImageError
from sandbox.images.reference import DIGEST
from sandbox.model.image import Image as Image
from sandbox.model.image import ImageConfig as ImageConfig

MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
)
TAR_LAYER, GZIP_LAYER, ZSTD_LAYER = LAYER_TYPES[:3]

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 8 << 20
MAX_INDEX_DEPTH = 4
_MAX_LAYERS = 500
"""overlayfs stacks at most 500 layers (OVL_MAX_STACK)."""
_MAX_ENTRIES = 10_000
_MAX_SIZE = 1 << 42

_DEFAULT_STOP_SIGNAL = int(signal.SIGTERM)
_SIGRTMIN, _SIGRTMAX = 34, 64
_VARIANTS = {"arm64": ("v8", ""), "amd64": ("", "v1")}
_ARM_VARIANTS = ("v8", "v7", "v6", "v5", "")

Digest = Annotated[str, msgspec.Meta(pattern=f"^{DIGEST.pattern}$", max_length=71)]
Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]
T = TypeVar("T")


class NoSuchPlatform(ImageError):
    """An index has nothing for the wanted platform; the text is ECS's."""


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """What a program was built for, in Go's words: linux, amd64, and for arm a variant."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A pointer to content: what it is, how it hashes, how long it is."""

    media_type: str = ""
    digest: Digest
    size: Size
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def short(self) -> str:
        """Twelve digits, as Docker shows a digest to people."""
        return self.digest.removeprefix("sha256:")[:12]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One image for one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """One name, several platforms."""

    manifests: tuple[Descriptor, ...]


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """An image's configuration file, checked against its manifest."""

    config: ImageConfig
    diff_ids: tuple[str, ...]
    platform: Platform
    created: str | None


class _Document(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Any top-level document, before it is known which."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None
    fs_layers: Any = None


class _Settings(msgspec.Struct, frozen=True, rename="pascal"):
    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[Digest]
    type: str = "layers"


class _Configuration(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    rootfs: _RootFs
    config: _Settings | None = None
    variant: str = ""
    created: str | None = None


# Documents ---------------------------------------------------------------------------------


def parse_document(body: bytes, *, content_type: str = "", expected: str = "") -> Manifest | Index:
    """The manifest or index in `body`.

    `content_type` is what the registry said, `expected` what the descriptor said; both may be
    empty. ImageError when the document is neither, both, too large, or not what was announced.
    """
    if len(body) > MAX_MANIFEST_BYTES:
        raise ImageError(f"manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    document = _decode(body, _Document, "manifest")
    if document.schema_version == 1 or document.fs_layers is not None:
        raise ImageError("manifest has Docker's schema 1, which is too old: push the image again")
    parts = (document.config, document.layers)
    if document.manifests is not None and parts != (None, None):
        raise ImageError("document is a manifest and an index at the same time")
    types = INDEX_TYPES if document.manifests is not None else MANIFEST_TYPES
    for source, said in (
        ("its own mediaType", document.media_type),
        ("Content-Type", _document_type(content_type)),
        ("the descriptor", expected),
    ):
        if said and said not in types:
            what = "an index" if types is INDEX_TYPES else "a manifest"
            raise ImageError(f"document is {what}, but {source} says {_shown(said)}")
    claims = {document.media_type, _document_type(content_type), expected} - {""}
    if len(claims) > 1:
        raise ImageError(f"document is announced as {' and as '.join(sorted(claims))}")
    if document.manifests is not None:
        return Index(manifests=_bounded(document.manifests, _MAX_ENTRIES, "manifests"))
    if document.config is None or document.layers is None:
        raise ImageError("document is neither a manifest nor an index")
    return _manifest(document.config, document.layers)


def _manifest(config: Descriptor, layers: tuple[Descriptor, ...]) -> Manifest:
    if config.media_type not in CONFIG_TYPES:
        raise ImageError(f"not a container image: its configuration is {_shown(config.media_type)}")
    if config.size > MAX_CONFIG_BYTES:
        raise ImageError(f"configuration is larger than {MAX_CONFIG_BYTES} bytes")
    for layer in _bounded(layers, _MAX_LAYERS, "layers"):
        if layer.media_type not in LAYER_TYPES:
            raise ImageError(f"layer {layer.short} has unknown type {_shown(layer.media_type)}")
    return Manifest(config=config, layers=layers)


def _document_type(content_type: str) -> str:
    """A Content-Type that names a document; what generic servers say (text/plain) is no claim."""
    name = content_type.partition(";")[0].strip().lower()
    return name if name.startswith("application/vnd.") else ""


# Platforms ---------------------------------------------------------------------------------


def host_platform() -> Platform:
    """This machine, in the words of images."""
    machine = os.uname().machine
    architecture, variant = {
        "x86_64": ("amd64", ""),
        "aarch64": ("arm64", "v8"),
        "armv7l": ("arm", "v7"),
        "armv6l": ("arm", "v6"),
        "i686": ("386", ""),
    }.get(machine, (machine, ""))
    return Platform(os="linux", architecture=architecture, variant=variant)


def parse_platform(text: str) -> Platform:
    """`os/arch[/variant]` as `--platform` takes it."""
    if not re.fullmatch(r"[a-z0-9_.-]{1,32}/[a-z0-9_.-]{1,32}(/[a-z0-9_.-]{1,32})?", text):
        raise ImageError(f"invalid platform {_shown(text)}: expected os/arch[/variant]")
    system, architecture, *variant = text.split("/")
    return Platform(os=system, architecture=architecture, variant="".join(variant))


def choose(index: Index, wanted: Platform) -> Descriptor:
    """The entry of `index` to run on `wanted`: the best variant, then the order of the index.

    An entry without a platform (a layout's, mostly) is taken when nothing says it better; its
    configuration is held against the platform later.
    """
    ranked = []
    for entry in index.manifests:
        if entry.media_type and entry.media_type not in MANIFEST_TYPES + INDEX_TYPES:
            continue
        rank = _rank(entry.platform, wanted)
        if rank is not None:
            ranked.append((rank, entry))
    if not ranked:
        raise NoSuchPlatform(
            f"image Manifest does not contain descriptor matching platform '{wanted}'"
        )
    return min(ranked, key=lambda pair: pair[0])[1]


def matches(platform: Platform, wanted: Platform) -> bool:
    """Whether a program for `platform` is what `wanted` asks for."""
    return (platform.os, platform.architecture) == (wanted.os, wanted.architecture) and (
        platform.variant in _variants(wanted)
    )


def _rank(platform: Platform | None, wanted: Platform) -> int | None:
    variants = _variants(wanted)
    if platform is None or not (platform.os or platform.architecture):
        return len(variants)
    return variants.index(platform.variant) if matches(platform, wanted) else None


def _variants(wanted: Platform) -> tuple[str, ...]:
    """Variants that will do, best first; an arm runs what older arms ran."""
    if wanted.architecture == "arm":
        newest = wanted.variant or "v7"
        if newest not in _ARM_VARIANTS:
            return (newest,)
        return _ARM_VARIANTS[_ARM_VARIANTS.index(newest) :]
    usual = _VARIANTS.get(wanted.architecture, ("",))
    if wanted.variant and wanted.variant not in usual:
        return (wanted.variant,)
    return usual


# Configurations ----------------------------------------------------------------------------


def parse_config(body: bytes, manifest: Manifest, wanted: Platform) -> Configuration:
    """The configuration that belongs to `manifest`.

    ImageError when it does not fit the manifest or the platform, or says what cannot be run.
    """
    document = _decode(body, _Configuration, "image configuration")
    platform = Platform(
        os=document.os, architecture=document.architecture, variant=document.variant
    )
    if not matches(platform, wanted):
        raise ImageError(f"image is for platform {_shown(str(platform))}, not {wanted}")
    if document.rootfs.type != "layers":
        raise ImageError(f"image configuration has a rootfs of type {_shown(document.rootfs.type)}")
    if len(document.rootfs.diff_ids) != len(manifest.layers):
        raise ImageError(
            f"image has {len(manifest.layers)} layers, but its configuration "
            f"{len(document.rootfs.diff_ids)} diff_ids"
        )
    return Configuration(
        config=_settings(document.config or _Settings()),
        diff_ids=tuple(document.rootfs.diff_ids),
        platform=platform,
        created=document.created,
    )


def _settings(settings: _Settings) -> ImageConfig:
    config = ImageConfig(
        entrypoint=_texts(settings.entrypoint, "Entrypoint"),
        cmd=_texts(settings.cmd, "Cmd"),
        env=_environment(settings.env or []),
        user=_text(settings.user or "", "User"),
        working_dir=_working_dir(settings.working_dir or ""),
        stop_signal=parse_signal(settings.stop_signal or ""),
        volumes=_texts(sorted(settings.volumes or ()), "Volumes"),
        exposed_ports=_texts(sorted(settings.exposed_ports or ()), "ExposedPorts"),
        labels=settings.labels or {},
    )
    for volume in config.volumes:
        if not volume.startswith("/"):
            raise ImageError(f"Volumes of the image: {_shown(volume)} is not an absolute path")
    return config


def _environment(entries: list[str]) -> tuple[tuple[str, str], ...]:
    """Pairs, a later one of the same name replacing the earlier; without "=" it says nothing."""
    pairs: dict[str, str] = {}
    for entry in _texts(entries, "Env"):
        name, equals, value = entry.partition("=")
        if equals and name:
            pairs[name] = value
    return tuple(pairs.items())


def _working_dir(path: str) -> str:
    if path and not path.startswith("/"):
        raise ImageError(f"WorkingDir of the image: {_shown(path)} is not an absolute path")
    return _text(path, "WorkingDir")


def parse_signal(text: str) -> int:
    """The number of a signal given as `SIGTERM`, `TERM`, `15` or `SIGRTMIN+3`; empty is SIGTERM."""
    if not text:
        return _DEFAULT_STOP_SIGNAL
    name = text.upper().removeprefix("SIG")
    if re.fullmatch("[0-9]{1,2}", name, re.ASCII) and 1 <= int(name) <= _SIGRTMAX:
        return int(name)
    if realtime := re.fullmatch(r"RTM(IN|AX)(?:([+-])([0-9]{1,2}))?", name, re.ASCII):
        base = _SIGRTMIN if realtime[1] == "IN" else _SIGRTMAX
        number = base + int((realtime[2] or "+") + (realtime[3] or "0"))
        if _SIGRTMIN <= number <= _SIGRTMAX:
            return number
    elif f"SIG{name}" in signal.Signals.__members__:
        return int(signal.Signals[f"SIG{name}"])
    raise ImageError(f"StopSignal of the image: {_shown(text)} is not a signal")


def _texts(values: list[str] | None, member: str) -> tuple[str, ...]:
    return tuple(_text(value, member) for value in _bounded(values or [], _MAX_ENTRIES, member))


def _text(value: str, member: str) -> str:
    if "\0" in value:
        raise ImageError(f"{member} of the image contains a NUL byte")
    return value


def _bounded(values: T, limit: int, what: str) -> T:
    count = len(values)  # type: ignore[arg-type]
    if count > limit:
        raise ImageError(f"image has {count} {what}, more than {limit}")
    return values


def _decode(body: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{what} is not acceptable: {str(error).splitlines()[0][:200]}") from error


def _shown(text: str) -> str:
    """Foreign text for a message of one line."""
    return repr(text if len(text) <= 80 else text[:80] + "...")
