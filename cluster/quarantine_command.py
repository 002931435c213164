"""`lakebus quarantine`: what was set aside, sending it again, or forgetting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cluster.api_calls import Api
from cluster.client_commands import (
    api_options,
    counted,
    json_option,
    say_json,
    say_members,
    say_table,
)
from cluster.ingest_chunks import Chunk, chunks_of, require_form
from cluster.ingest_sources import Source, form_of, opened

_PATH = "/v1/admin/quarantine"


@click.group()
def quarantine() -> None:
    """Rows that did not fit, and batches that could not be published."""


@quarantine.command("list")
@api_options()
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--before", type=click.IntRange(0), help="Only those older than this id.")
@json_option
def quarantine_list(api: Api, limit: int, before: int | None, as_json: bool) -> int:
    """List what was set aside, newest first."""
    query = {"limit": str(limit), "before": None if before is None else str(before)}
    found = api.get(_PATH, query)
    if as_json:
        say_json(found)
        return 0
    names = ("id", "kind", "batch", "target", "rows", "created", "replayed as", "reason")
    members = ("quarantine_id", "kind", "batch_id", "target", "rows", "created_at")
    rows = [
        [*(item[name] for name in members), item["successor_batch_id"], item["reason"]]
        for item in found["items"]
    ]
    say_table(names, rows)
    return 0


@quarantine.command("show")
@api_options()
@click.argument("quarantine_id", type=click.IntRange(1))
@json_option
def quarantine_show(api: Api, quarantine_id: int, as_json: bool) -> int:
    """Show one of them, with its rows."""
    found = api.get(f"{_PATH}/{quarantine_id}")
    if as_json:
        say_json(found)
        return 0
    say_members(found, without=("rows_json",))
    click.echo()
    click.echo(json.dumps(found["rows_json"], indent=1, ensure_ascii=False))
    return 0


@quarantine.command("replay")
@api_options()
@click.argument("quarantine_id", type=click.IntRange(1))
@click.option(
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send the rows of this file instead: those that were set aside, mended.",
)
@json_option
def quarantine_replay(api: Api, quarantine_id: int, path: Path | None, as_json: bool) -> int:
    """Send it again: as it is, or mended. Doing so twice is one batch."""
    chunk = None if path is None else _only_chunk(path)
    found = api.send(
        "POST",
        f"{_PATH}/{quarantine_id}/replay",
        body=b"" if chunk is None else chunk.body,
        headers={} if chunk is None else {"content-type": chunk.media_type},
        timed=True,
    )
    if as_json:
        say_json(found)
        return 0
    receipt: dict[str, Any] = found["receipt"]
    before = ", as before" if found["replayed"] else ""
    click.echo(
        f"{counted(receipt['rows'], 'row')} durable as batch {receipt['batch_id']}{before}",
        err=True,
    )
    click.echo(receipt["visibility_token"])
    return 0


@quarantine.command("drop")
@api_options()
@click.argument("quarantine_id", type=click.IntRange(1))
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def quarantine_drop(api: Api, quarantine_id: int, yes: bool, as_json: bool) -> int:
    """Forget its rows, for good."""
    if not yes:
        item = api.get(f"{_PATH}/{quarantine_id}")
        rows = counted(item["rows"], "row") if item["rows"] is not None else "its rows"
        click.confirm(f"Forget {rows} for {item['target']}, for good?", abort=True, err=True)
    found = api.send("DELETE", f"{_PATH}/{quarantine_id}")
    if as_json:
        say_json(found)
    else:
        click.echo(f"{quarantine_id} is dropped")
    return 0


def _only_chunk(path: Path) -> Chunk:
    form = require_form(form_of(path), str(path))
    with opened(Source(path, form), form) as content:
        chunks = list(chunks_of(content))
    if len(chunks) != 1:
        raise click.UsageError(f"{path} has no rows, or more than one request takes.")
    return chunks[0]
