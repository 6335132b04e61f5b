"""`sandbox completion`: the shell code that completes commands and options, made by click."""

from __future__ import annotations

import click

from sandbox.cli.root import Command, root


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print completion code: `source <(sandbox completion bash)`."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(root, {}, "sandbox", "_SANDBOX_COMPLETE").source())
