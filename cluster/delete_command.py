"""`lakebus delete`: deletes rows of a table, or counts them first."""

from __future__ import annotations

import json

import click

from cluster.client_commands import client_options, parameter_value
from lakebus.client import Client
from lakebus.client_results import Deleted


@click.command()
@client_options
@click.option("--table", required=True, help="Whose rows.")
@click.option("--where", required=True, help="What stands after WHERE in SQL; all: true.")
@click.option("-p", "--parameter", "parameters", multiple=True, help="Value of the next `?`.")
@click.option("--after", multiple=True, metavar="TOKEN", help="See the rows of this token.")
@click.option("--key", help="Idempotency key; the same delete again is done once.")
@click.option("--dry-run", is_flag=True, help="Count the rows and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def delete(
    client: Client,
    table: str,
    where: str,
    parameters: tuple[str, ...],
    after: tuple[str, ...],
    key: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete the rows for which a condition is true.

    The condition is looked at in one snapshot; rows that arrive later stay. Earlier snapshots keep
    the rows until they expire. A parameter that is JSON (12, true, null, "text") is that value;
    anything else is text. Exit code 3: not ended when the time was up; it goes on.
    """
    found = client.delete(
        table,
        where,
        [parameter_value(text) for text in parameters] or None,
        after=list(after) or None,
        key=key,
        dry_run=dry_run,
    )
    click.echo(_as_json(found) if as_json else _as_text(found))
    return 0 if found.done else 3


def _as_json(found: Deleted) -> str:
    return json.dumps(
        {
            "job_id": found.job_id,
            "done": found.done,
            "dry_run": found.dry_run,
            "replayed": found.replayed,
            "deleted_rows": found.rows,
            "snapshot_id": found.snapshot_id,
            "evaluated_at_snapshot_id": found.evaluated_at_snapshot_id,
            "visibility_token": found.token,
        }
    )


def _as_text(found: Deleted) -> str:
    if not found.done:
        return f"not ended yet; the delete {found.job_id} goes on"
    rows = f"{found.rows} row{'' if found.rows == 1 else 's'}"
    if found.dry_run:
        return f"would delete {rows} of snapshot {found.evaluated_at_snapshot_id}"
    if not found.rows:
        return f"no row matched in snapshot {found.snapshot_id}"
    return f"deleted {rows} with snapshot {found.snapshot_id}\ntoken {found.token}"
