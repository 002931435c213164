"""`lakebus tables`, `snapshots`, `token`, `batch`: looking at what is there, over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import click

from cluster.api_calls import Api
from cluster.client_commands import (
    LATER,
    SET_ASIDE,
    api_options,
    counted,
    json_option,
    say_json,
    say_members,
    say_table,
)
from cluster.query_shell import columns_of

#: One look at a batch waits so long on the server, at most.
_LOOK_S = 20.0
_COLUMN = re.compile(r"(\S+)\s+(.+?)(\s+not\s+null)?", re.IGNORECASE | re.DOTALL)
_COUNTS = ("rows_added", "rows_removed", "files_added", "files_removed")


@click.group()
def tables() -> None:
    """Tables: what is there, and making one."""


@tables.command("list")
@api_options()
@json_option
def tables_list(api: Api, as_json: bool) -> int:
    """List the tables that the key may see."""
    found = api.get("/v1/tables")
    if as_json:
        say_json(found)
        return 0
    names = ("name", "rows", "bytes", "files", "columns", "last snapshot")
    say_table(
        names,
        [
            [*(one[name] for name in names[:4]), len(one["columns"]), one["last_snapshot_id"]]
            for one in found["tables"]
        ],
    )
    return 0


@tables.command("show")
@api_options()
@click.argument("table")
@json_option
def tables_show(api: Api, table: str, as_json: bool) -> int:
    """Show the columns and the size of TABLE. Exit code 4: there is none."""
    found = api.get(f"/v1/tables/{quote(table, safe='')}")
    if as_json:
        say_json(found)
        return 0
    say_table(("column", "type", "null"), columns_of(found))
    click.echo()
    say_members(found, without=("columns", "visibility_token", "snapshot_id"))
    return 0


@tables.command("create")
@api_options()
@click.argument("table")
@click.argument("columns", nargs=-1, required=True, metavar="'NAME TYPE [NOT NULL]'...")
@click.option("--partition-by", multiple=True, help="Like day(ts); repeat it.")
@click.option("--sort-by", multiple=True, help="A column; repeat it.")
@click.option("--if-not-exists", is_flag=True, help="A table of this name is no error.")
@json_option
def tables_create(
    api: Api,
    table: str,
    columns: tuple[str, ...],
    partition_by: tuple[str, ...],
    sort_by: tuple[str, ...],
    if_not_exists: bool,
    as_json: bool,
) -> int:
    """Create TABLE.

    For example: lakebus tables create readings 'sensor varchar not null' 'celsius double'
    """
    made = api.client.create_table(
        table,
        [_column(text) for text in columns],
        partition_by=partition_by,
        sort_by=sort_by,
        if_not_exists=if_not_exists,
    )
    if as_json:
        say_json(made)
        return 0
    was = "made" if made["created"] else "was there already"
    click.echo(f"the table {made['name']} {was}, {counted(len(made['columns']), 'column')}")
    return 0


def _column(text: str) -> dict[str, object]:
    found = _COLUMN.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"A column is a name and a type, like 'id bigint', not {text!r}.")
    return {"name": found[1], "type": found[2], "nullable": found[3] is None}


# --- snapshots -----------------------------------------------------------------------------


@click.group()
def snapshots() -> None:
    """Snapshots: the states of all tables that can be read."""


@snapshots.command("list")
@api_options()
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--before", type=click.IntRange(0), help="Only those older than this one.")
@json_option
def snapshots_list(api: Api, limit: int, before: int | None, as_json: bool) -> int:
    """List snapshots, newest first."""
    query = {"limit": str(limit), "before": None if before is None else str(before)}
    found = api.get("/v1/snapshots", query)
    if as_json:
        say_json(found)
        return 0
    names = ("snapshot", "published", "operation", "tables", "rows", "files", "tags")
    say_table(names, [_snapshot_row(one) for one in found["snapshots"]])
    return 0


@snapshots.command("show")
@api_options()
@click.argument("snapshot", default="latest")
@json_option
def snapshots_show(api: Api, snapshot: str, as_json: bool) -> int:
    """Show one SNAPSHOT (an id, or latest): what it changed. Exit codes: 4 there is none, 5 it has
    expired."""
    found = api.send("GET", f"/v1/snapshots/{quote(snapshot, safe='')}", timed=True)
    if as_json:
        say_json(found)
        return 0
    say_members(found, without=("tables", "erasures"))
    if found["tables"]:
        click.echo()
        rows = [
            [one["table"], *(one.get(name, 0) for name in _COUNTS), _notes(one)]
            for one in found["tables"]
        ]
        say_table(("table", *(name.replace("_", " ") for name in _COUNTS), "what"), rows)
    for mark in found["erasures"]:
        rows_lost = counted(mark["rows"], "row")
        click.echo(f"lost {rows_lost} of {mark['table']} to the erasure {mark['erasure_id']}")
    return 0


def _snapshot_row(one: Mapping[str, Any]) -> list[Any]:
    names = ", ".join(table["table"] for table in one["tables"])
    rows = _change(one["rows_added"], one["rows_removed"])
    files = _change(one["files_added"], one["files_removed"])
    tags = ", ".join(one["tags"])
    return [one["snapshot_id"], one["published_at"], one["operation"], names, rows, files, tags]


def _change(added: int, removed: int) -> str:
    return " ".join([f"+{added:,}"] * bool(added) + [f"-{removed:,}"] * bool(removed))


def _notes(table: Mapping[str, Any]) -> str:
    names = ("created", "dropped", "version", "reason")
    return ", ".join(f"{name} {table[name]}" for name in names if name in table)


# --- tokens and batches --------------------------------------------------------------------


@click.group()
def token() -> None:
    """Visibility tokens, which stand for rows."""


@token.command("wait")
@api_options()
@click.argument("tokens", nargs=-1, required=True, metavar="TOKEN...")
@json_option
def token_wait(api: Api, tokens: tuple[str, ...], as_json: bool) -> int:
    """Wait until the rows of every TOKEN can be read, for --timeout-s at most; print the token of
    the snapshot that shows them. Exit codes: 3 the time was up, 5 lost, 6 the rows were set
    aside."""
    timeout_ms = min(100_000, max(1, round(api.timeout_s * 1000)))
    found = api.send(
        "POST", "/v1/visibility", document={"token": list(tokens), "timeout_ms": timeout_ms}
    )
    if as_json:
        say_json(found)
    else:
        click.echo(f"visible in snapshot {found['snapshot_id']}", err=True)
        click.echo(found["visibility_token"])
    return 0


@click.command()
@api_options()
@click.argument("batch_id")
@click.option("--wait", is_flag=True, help="Until it has ended, for --timeout-s at most.")
@json_option
def batch(api: Api, batch_id: str, wait: bool, as_json: bool) -> int:
    """Say what became of a batch of one's own. Exit codes: 0 it is durable (with --wait: can be
    read), 3 --wait and the time was up, 4 there is none, 6 it was set aside."""
    until_s = time.monotonic() + (api.timeout_s if wait else 0.0)
    found = _batch(api, batch_id, 0.0)
    while found["state"] == "accepted" and (left_s := until_s - time.monotonic()) > 0:
        found = _batch(api, batch_id, min(left_s, _LOOK_S))
    if as_json:
        say_json(found)
    else:
        click.echo(_words(found))
    if found["state"] == "quarantined":
        return SET_ASIDE
    return LATER if wait and found["state"] == "accepted" else 0


def _batch(api: Api, batch_id: str, wait_s: float) -> dict[str, Any]:
    query = {"timeout_ms": str(round(wait_s * 1000))}
    return api.get(f"/v1/batches/{quote(batch_id, safe='')}", query)


def _words(found: Mapping[str, Any]) -> str:
    said = f"{found['batch_id']} is {found['state']}"
    if found["state"] == "published":
        return f"{said} in snapshot {found['snapshot_id']}"
    if found["state"] == "quarantined":
        after = found["successor_batch_id"]
        replayed = f"; replayed as {after}" if after else "; lakebus quarantine list shows it"
        return f"{said}: {found['reason']}{replayed}"
    return f"{said}: durable, and not published yet"
