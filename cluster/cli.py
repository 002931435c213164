"""The program `lakebus`: which command is where, and how it ends.

A command's module is imported when the command is asked for: a query need not wait for what starts
a stack, nor does the completion of a shell.
"""

from __future__ import annotations

import importlib
import os
import sys

import click
from click.shell_completion import CompletionItem

from lakebus.errors import LakebusError

#: As shells say for SIGINT and SIGPIPE.
INTERRUPTED, READER_GONE = 130, 141

_LOOK, _STACK = "cluster.look_commands", "cluster.stack_commands"
#: Where each command is, and what it does in a few words, for lists.
_COMMANDS = {
    "up": (_STACK, "Start a stack; its data stays when it stops."),
    "down": (_STACK, "Stop the stack, and clear away what a killed one left."),
    "status": (_STACK, "Say what runs and what is wrong."),
    "logs": (_STACK, "Show the logs of the stack, or of one component."),
    "doctor": (_STACK, "Look whether this machine is fit, with hints."),
    "migrate": (_STACK, "Bring the database to the schema of this version."),
    "config": (_STACK, "Settings, their values, and where these came from."),
    "keys": (_STACK, "API keys: make, list, revoke."),
    "history": (_STACK, "Whether the database went back in time."),
    "ray-env": ("cluster.ray_env_command", "Print what lets a Ray driver join the stack."),
    "demo": (_STACK, "The whole system on real data."),
    "ingest": ("cluster.ingest_command", "Send rows of files, folders or a pipe, once."),
    "query": ("cluster.query_command", "Run SQL, or ask at a prompt."),
    "tables": (_LOOK, "Tables: list, show, create."),
    "snapshots": (_LOOK, "Snapshots: list, show."),
    "token": (_LOOK, "Wait until the rows of tokens can be read."),
    "batch": (_LOOK, "Say what became of a request."),
    "trace": ("cluster.trace_command", "Tell the life of a request, step by step."),
    "quarantine": ("cluster.quarantine_command", "Rows set aside: list, show, replay, drop."),
    "delete": ("cluster.delete_command", "Delete rows by a condition."),
    "erase": ("cluster.erase_command", "Erase rows for good, from every snapshot."),
    "maintain": ("cluster.maintain_command", "Run a job of maintenance now."),
    "jobs": ("cluster.maintain_command", "Jobs of maintenance: list, or show one."),
    "tags": ("cluster.maintain_command", "Names that keep snapshots for ever."),
    "repair": (_STACK, "Repair findings of the validator, after asking."),
    "completion": ("cluster.completion_command", "Print the completion script of a shell."),
    "version": ("cluster.completion_command", "Print the version."),
}


class ReaderGone(Exception):
    """Whoever read the output has gone (`| head`). click would make the exit code 1 of it."""


class Commands(click.Group):
    """All commands by name; each is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        found = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(found, click.Command), cmd_name
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in _COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=words)
            for name, (_, words) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> object:
        try:
            found: object = super().invoke(ctx)
            sys.stdout.flush()  # here, where a reader that has gone is no surprise
        except BrokenPipeError:
            raise ReaderGone from None
        return found


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """lakebus: rows in over HTTP, one consistent answer out in SQL."""


def main() -> int:
    """Run the command of `sys.argv`; an error of ours is one line, never a stack trace."""
    try:
        code = cli.main(standalone_mode=False, prog_name="lakebus")
    except click.exceptions.Abort as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):
            click.echo("lakebus: aborted, nothing was done", err=True)
        return INTERRUPTED
    except ReaderGone:
        # What is still buffered has nowhere to go, and Python would complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LakebusError as error:
        click.echo(f"lakebus: {error}", err=True)
        return 1
    return code if isinstance(code, int) else 0
