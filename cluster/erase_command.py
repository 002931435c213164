"""`lakebus erase`: erases rows of a table for good, or counts them first."""

from __future__ import annotations

import dataclasses
import json

import click

from cluster.client_commands import client_options, parameter_value
from lakebus.client import Client
from lakebus.client_results import Erased


@click.command()
@client_options
@click.option("--table", required=True, help="Whose rows.")
@click.option("--where", required=True, help="What stands after WHERE in SQL.")
@click.option("-p", "--parameter", "parameters", multiple=True, help="Value of the next `?`.")
@click.option("--key", help="Idempotency key; the same erasure again is done once.")
@click.option("--dry-run", is_flag=True, help="Count the rows and erase nothing.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def erase(
    client: Client,
    table: str,
    where: str,
    parameters: tuple[str, ...],
    key: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    """Erase the rows for which a condition is true, for good.

    They leave every snapshot, tagged ones too, the bus and quarantine, and nothing brings them
    back. Rows that are accepted later stay. A parameter that is JSON (12, true, null, "text") is
    that value; anything else is text. Exit code 3: not ended when the time was up; it goes on.
    """
    if not (dry_run or yes):
        click.confirm(f"Erase rows of {table} from all snapshots, for good?", abort=True, err=True)
    found = client.erase(
        table,
        where,
        [parameter_value(text) for text in parameters] or None,
        key=key,
        dry_run=dry_run,
    )
    click.echo(json.dumps(dataclasses.asdict(found)) if as_json else _as_text(found))
    return 0 if found.done else 3


def _as_text(found: Erased) -> str:
    if not found.done:
        return f"not ended yet; the erasure {found.job_id} goes on"
    lines = []
    for run in found.report.get("snapshots", ()):
        what = "would lose" if found.dry_run else "lost"
        lines.append(
            f"snapshots {run['first_snapshot_id']} to {run['last_snapshot_id']} {what}"
            f" {run['rows']} row{'' if run['rows'] == 1 else 's'}"
        )
    lines = lines or ["no row matched in any snapshot"]
    counts = {
        name: value
        for name, value in found.report.items()
        if isinstance(value, int | float) and value
    }
    lines += [f"{name} {value}" for name, value in counts.items()]
    return "\n".join(lines if found.dry_run else [*lines, f"token {found.token}"])
