"""`lakebus completion`, the script that makes a shell complete our commands and options, and
`lakebus version`."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from lakebus import __version__

SHELLS = ("bash", "zsh", "fish")
_NAME, _VARIABLE = "lakebus", "_LAKEBUS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print the completion script of SHELL.

    \b
    bash   eval "$(lakebus completion bash)"             in ~/.bashrc
    zsh    eval "$(lakebus completion zsh)"              in ~/.zshrc
    fish   lakebus completion fish | source              in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    made = kind(context.find_root().command, {}, _NAME, _VARIABLE)
    click.echo(made.source_template % made.source_vars())
    return 0


@click.command()
def version() -> int:
    """Print the version."""
    click.echo(f"lakebus {__version__} (Python {sys.version.split()[0]})")
    return 0
