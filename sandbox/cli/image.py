"""`sandbox image`: pull, ls, inspect, rm, import, prune."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

import click

from sandbox.cli.attach import Bar
from sandbox.cli.connection import connect, is_untouched
from sandbox.cli.output import print_json, print_table, size
from sandbox.cli.request import environment
from sandbox.cli.root import Group, json_option, place
from sandbox.cli.tasks import for_each, void
from sandbox.client.link import Link
from sandbox.client.place import anchored
from sandbox.errors import AgentUnavailable
from sandbox.model.image import Image, ImageSummary
from sandbox.varlink import calls

SHORT_DIGEST = len("sha256:") + 12


@click.group("image", cls=Group)
def image() -> None:
    """Pull, list and remove images."""


def arrived(link: Link, call: calls.PullImage | calls.ImportImage) -> Image:
    """The image of a pull or an import, with its progress on a terminal."""
    bar = Bar()
    try:
        for reply in link.stream(call):
            if reply.progress is not None:
                bar.show(reply.progress.what, reply.progress.done, reply.progress.total)
            if reply.image is not None:
                return reply.image
    finally:
        bar.clear()
    raise AgentUnavailable("the agent did not tell what became of the image")


@image.command("pull")
@click.argument("name", metavar="IMAGE")
@click.option("--platform", metavar="OS/ARCH", help="Another platform than the host's.")
@json_option
@click.pass_context
def pull(context: click.Context, /, name: str, platform: str | None, as_json: bool) -> None:
    """Get IMAGE from its registry, as its name stands now."""
    link, _ = connect(place(context), create=True)
    with link:
        found = arrived(link, calls.PullImage(reference=anchored(name), platform=platform))
    if as_json:
        print_json(found)
    else:
        print(f"{found.reference} {found.digest}")


@image.command("ls")
@json_option
@click.pass_context
def ls(context: click.Context, /, as_json: bool) -> None:
    """List images by name."""
    where, images = place(context), list[ImageSummary]()
    if not is_untouched(where):
        with connect(where)[0] as link:
            images = [each for reply in link.stream(calls.ListImages()) for each in reply.images]
    if as_json:
        print_json(images)
        return
    print_table(
        ("IMAGE", "DIGEST", "PLATFORM", "SIZE", "CREATED", "IN USE"),
        [
            (
                each.name or "-",
                each.digest[:SHORT_DIGEST],
                each.platform,
                size(each.size_bytes),
                (each.created or "-")[:10],
                "yes" if each.in_use else "",
            )
            for each in images
        ],
    )


@image.command("inspect")
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@json_option
@click.pass_context
def inspect(context: click.Context, /, names: Sequence[str], as_json: bool) -> None:
    """Show all that is known of images, as a JSON array."""
    link, _ = connect(place(context))
    with link:
        print_json([link.call(calls.InspectImage(image=anchored(name))).image for name in names])


@image.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="IMAGE...")
@click.pass_context
def rm(context: click.Context, /, names: Sequence[str]) -> None:
    """Forget names, and images with their last name."""
    link, _ = connect(place(context))
    with link:
        removed = for_each(
            names, lambda name: void(link.call(calls.RemoveImage(image=anchored(name))))
        )
    context.exit(0 if len(removed) == len(names) else 1)


@image.command("import")
@click.argument("source", metavar="DIR-or-TAR", type=click.Path(exists=True))
@click.option("--tag", required=True, metavar="NAME", help="What to call the image.")
@click.option("--cmd", default="", metavar="WORDS", help="Its default command, as in a shell.")
@click.option("--entrypoint", default="", metavar="WORDS", help="Its entry point.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Its environment.")
@click.option("-u", "--user", default="", metavar="USER", help="Who its program runs as.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Its working directory.")
@click.option("--stop-signal", default="", metavar="SIGNAL", help="What stops it [SIGTERM].")
@click.option("--platform", metavar="OS/ARCH", help="What it runs on [this host].")
@json_option
@click.pass_context
def import_(
    context: click.Context,
    /,
    source: str,
    tag: str,
    cmd: str,
    entrypoint: str,
    env: Sequence[str],
    user: str,
    workdir: str,
    stop_signal: str,
    platform: str | None,
    as_json: bool,
) -> None:
    """Make an image of a root file system: a directory or a tar (plain, gzip, zstd)."""
    link, _ = connect(place(context), create=True)
    call = calls.ImportImage(
        source=os.path.abspath(source),
        tag=tag,
        cmd=words("--cmd", cmd),
        entrypoint=words("--entrypoint", entrypoint),
        env=environment(env, (), os.environ),
        user=user,
        working_dir=workdir,
        stop_signal=stop_signal,
        platform=platform,
    )
    with link:
        found = arrived(link, call)
    if as_json:
        print_json(found)
    else:
        print(f"{found.reference} {found.digest}")


def words(option: str, line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line))
    except ValueError as error:
        raise click.UsageError(f"{option} {line!r}: {error}") from None


@image.command("prune")
@click.option("-a", "--all", "unused", is_flag=True, help="All that no task uses.")
@json_option
@click.pass_context
def prune(context: click.Context, /, unused: bool, as_json: bool) -> None:
    """Remove images whose name moved on, and leftovers."""
    link, _ = connect(place(context))
    with link:
        pruned = link.call(calls.PruneImages(unused=unused)).pruned
    if as_json:
        print_json(pruned)
    else:
        print(f"{len(pruned.images)} images removed, {size(pruned.size_bytes)}")
