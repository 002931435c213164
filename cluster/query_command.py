"""`lakebus query`: SQL, from the command line, a pipe, or at a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cluster.api_calls import Api
from cluster.client_commands import api_options, parameter_value, snapshot_choice
from cluster.query_output import (
    ACCEPTED,
    BINARY,
    Question,
    answer,
    form_of_output,
    output,
    words_of,
)
from cluster.query_shell import Session, is_terminal, run_prompt, run_script, statements_of


@click.command()
@api_options()
@click.argument("sql", required=False)
@click.option("-p", "--parameter", "parameters", multiple=True, help="Value of the next `?`.")
@click.option("--set", "named", multiple=True, metavar="NAME=VALUE", help="Value of `$NAME`.")
@click.option("--after", multiple=True, metavar="TOKEN", help="See the rows of this token.")
@click.option("--at", metavar="ID|TIME", help="Read a past snapshot.")
@click.option("--max-rows", type=click.IntRange(1), help="More rows than this are an error.")
@click.option("--deterministic", is_flag=True, help="Floating aggregates always add up equally.")
@click.option("--format", "form", type=click.Choice(list(ACCEPTED)), help="[table]")
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file, which is there only once it is whole; its name tells the format.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def query(
    api: Api,
    sql: str | None,
    parameters: tuple[str, ...],
    named: tuple[str, ...],
    after: tuple[str, ...],
    at: str | None,
    max_rows: int | None,
    deterministic: bool,
    form: str | None,
    path: Path | None,
    as_json: bool,
) -> int:
    """Run SQL and print its answer.

    Without SQL: a prompt on a terminal, else the statements of standard input (so does -), parted
    by semicolons. A parameter that is JSON (12, true, null, "text") is that value; anything else
    is text. Exit codes: 0 done; 1 refused; 2 wrong usage; 3 not now; 4 there is no such table or
    snapshot; 5 it has expired; 6 the token's rows were set aside.
    """
    chosen = form_of_output(path, "json" if as_json and form is None else form)
    template = Question(
        sql="",
        parameters=_parameters(parameters, named),
        after=after,
        snapshot=snapshot_choice(at),
        max_rows=max_rows,
        deterministic=deterministic,
    )
    talking = chosen == "table" or path is not None

    def say(text: str) -> None:
        if talking:
            click.echo(text, err=True)

    with output(path) as out:
        if sql is not None and sql != "-":
            say(words_of(answer(api, template.of(sql), form=chosen, out=out)))
            return 0
        session = Session(api, template, form=chosen, out=out, say=say)
        if sql is None and is_terminal():
            return run_prompt(session, api)
        statements = statements_of(sys.stdin.read())
        if chosen in BINARY and len(statements) > 1:
            raise click.UsageError(f"{chosen} is for one statement, and {len(statements)} came.")
        return run_script(session, statements)


def _parameters(listed: Sequence[str], named: Sequence[str]) -> list[Any] | dict[str, Any] | None:
    if listed and named:
        raise click.UsageError("Give values with -p or with --set, not both.")
    if not named:
        return [parameter_value(text) for text in listed] or None
    values: dict[str, Any] = {}
    for text in named:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise click.UsageError(f"--set takes NAME=VALUE, not {text!r}.")
        values[name] = parameter_value(value)
    return values
