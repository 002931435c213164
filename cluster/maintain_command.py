"""`lakebus maintain`, `lakebus jobs`, `lakebus tags`: maintenance, asked for over HTTP.

Exit codes as of the other client commands, and 1 when the job failed or validation found errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from cluster.client_commands import client_options
from cluster.text_table import text_table
from lakebus.client import Client

#: Those of `storage.maintenance.service`, whose import takes a second.
KINDS = ("compact", "retain", "collect", "validate")
_REPORT_CELL_MAX = 60
#: A job may take long; whoever waits less interrupts the command, and the job goes on.
_WAIT_S = 24 * 3600.0


@click.command()
@client_options
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--table", help="Only this table.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--full", is_flag=True, help="validate: read every file, not a sample.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until the job has ended.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def maintain(
    client: Client,
    kind: str,
    table: str | None,
    dry_run: bool,
    full: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Run a job of maintenance now: merge small files, end old rows and snapshots, delete files
    that nobody needs, or check that all is true. Exit code 1: it failed, or found errors."""
    if full and kind != "validate":
        raise click.UsageError("--full is for validate.")
    job = client.maintain(
        kind,
        table=table,
        dry_run=dry_run,
        parameters={"full": True} if full else None,
        wait_s=_WAIT_S if wait else 0.0,
    )
    click.echo(json.dumps(job) if as_json else "\n".join(_job_lines(job)))
    return exit_code(job)


@click.command()
@client_options
@click.argument("job_id", required=False)
@click.option("--kind", help="Only jobs of this kind.")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def jobs(client: Client, job_id: str | None, kind: str | None, limit: int, as_json: bool) -> int:
    """List the jobs of maintenance, newest first, or show one with its report."""
    if job_id is not None:
        job = client.job(job_id)
        click.echo(json.dumps(job) if as_json else "\n".join(_job_lines(job)))
        return exit_code(job)
    found = client.jobs(kind=kind, limit=limit)
    if as_json:
        click.echo(json.dumps({"jobs": found}))
        return 0
    names = ("job", "kind", "table", "state", "tries", "created", "report")
    rows = [[*_cells(job), _brief(job)] for job in found]
    for line in text_table(names, rows, cell_max=_REPORT_CELL_MAX):
        click.echo(line)
    return 0


@click.group()
def tags() -> None:
    """Names that keep snapshots for ever."""


@tags.command("list")
@client_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def tags_list(client: Client, as_json: bool) -> int:
    """List the tags."""
    found = client.tags()
    if as_json:
        click.echo(json.dumps({"tags": found}))
        return 0
    names = ("name", "snapshot_id", "created_at", "created_by")
    for line in text_table(names, [[tag[name] for name in names] for tag in found]):
        click.echo(line)
    return 0


@tags.command("create")
@client_options
@click.argument("name")
@click.option("--snapshot", "snapshot_id", type=click.IntRange(0), help="Default: the newest.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def tags_create(client: Client, name: str, snapshot_id: int | None, as_json: bool) -> int:
    """Keep a snapshot under NAME."""
    tag = client.tag(name, snapshot_id)
    said = f"the tag {tag['name']} keeps snapshot {tag['snapshot_id']}"
    click.echo(json.dumps(tag) if as_json else said)
    return 0


@tags.command("drop")
@client_options
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def tags_drop(client: Client, name: str, as_json: bool) -> int:
    """Drop the tag NAME; its snapshot may expire then."""
    tag = client.drop_tag(name)
    said = f"the tag {tag['name']} kept snapshot {tag['snapshot_id']}"
    click.echo(json.dumps(tag) if as_json else said)
    return 0


def exit_code(job: Mapping[str, Any]) -> int:
    """1 for a job that failed, and for a validation that found errors."""

    return 1 if job["state"] == "failed" or job["report"].get("errors") else 0


def job_words(job: Mapping[str, Any]) -> str:
    """One line about a job."""

    about = job["table"] or ("every table" if job["table_id"] is None else "a dropped table")
    dry = ", dry run" if job["dry_run"] else ""
    said = f"{job['kind']} of {about}{dry}: {job['state']} {job['ended_at'] or job['created_at']}"
    return f"{said} ({job['error']['detail']})" if job["error"] else said


def _job_lines(job: Mapping[str, Any]) -> list[str]:
    lines = [f"job {job['job_id']}", job_words(job)]
    return lines + [f"  {name}: {_value(value)}" for name, value in job["report"].items()]


def _cells(job: Mapping[str, Any]) -> list[Any]:
    names = ("job_id", "kind", "table", "state", "attempt", "created_at")
    return [job[name] for name in names]


def _brief(job: Mapping[str, Any]) -> str:
    """The numbers of a report, or why there are none."""

    if job["error"]:
        return str(job["error"]["detail"])
    told = {name: value for name, value in job["report"].items() if isinstance(value, (int, float))}
    return ", ".join(f"{name} {value}" for name, value in told.items() if value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
