"""`lakebus trace`: the life of one request, step by step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import click

from cluster.api_calls import Api
from cluster.client_commands import SET_ASIDE, api_options, counted, json_option, say_json

_BATCH_ID = re.compile(r"b\d{1,6}-\d{1,5}-\d{1,19}")


@click.command()
@api_options()
@click.argument("batch_or_key")
@click.option("--table", help="Of the request, when an idempotency key is given; several: '*'.")
@json_option
def trace(api: Api, batch_or_key: str, table: str | None, as_json: bool) -> int:
    """Tell the life of one request: accepted, claimed, published, in which files, visible.

    It is named by its batch id, or with --table by the Idempotency-Key that it was sent with (of
    the same API key's owner). Needs the scope admin. Exit codes: 4 it is not known, or older than
    the idempotency window; 6 it was set aside.
    """
    if table is None and not _BATCH_ID.fullmatch(batch_or_key):
        raise click.UsageError("That is no batch id, like b1-0-17; for a key, give --table too.")
    if table is None:
        found = api.get(f"/v1/admin/trace/{quote(batch_or_key, safe='')}")
    else:
        found = api.get("/v1/admin/trace", {"key": batch_or_key, "target": table})
    if as_json:
        say_json(found)
    else:
        for name, text in _steps(found):
            click.echo(f"{name:10}  {text}")
    return SET_ASIDE if found["state"] == "quarantined" else 0


def _steps(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    entry = found["entry"]
    rejected = entry["rows_rejected"]
    aside = f", {counted(rejected, 'row')} set aside" if rejected else ""
    rows = counted(entry["rows"], "row")
    yield "batch", f"{found['batch_id']}: {rows} for {entry['target']}{aside}"
    together = entry["hi"] - entry["lo"]
    beside = "alone" if together == 1 else f"with {counted(together - 1, 'other')} in one commit"
    place = f"shard {found['shard']}, position {found['position']}"
    size = f"{entry['size_bytes']:,} bytes"
    yield "accepted", f"{entry['accepted_at']} on {place}, {size}, {beside}"
    yield "key", f"known until {entry['idempotency_expires_at']} at least"
    yield from _lease_steps(found["lease"])
    yield from _publication_steps(found)
    for item in found["quarantine"]:
        what = "set aside" if item["kind"] == "entry" else f"{counted(item['rows'], 'row')} aside"
        after = item["successor_batch_id"]
        replayed = f"; replayed as {after}" if after else ""
        about = f"quarantine {item['quarantine_id']}, {item['created_at']}"
        yield what, f"{about}: {item['reason']}{replayed}"


def _lease_steps(lease: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if lease is None:
        return
    span = f"positions {lease['lo']} to {lease['hi'] - 1}"
    if lease["state"] == "leased":
        until = f"epoch {lease['epoch']}, until {lease['expires_at']}"
        yield "claimed", f"{lease['claimed_at'] or ''} by {lease['owner']}, {span}, {until}".strip()
    else:
        yield "given back", f"{span}, to be claimed again"
    if lease["attempt"]:
        yield "failed", f"{counted(lease['attempt'], 'time')}, last: {lease['last_error']}"


def _publication_steps(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    publication = found["publication"]
    if publication is None:
        mark = f"every position of its shard below {found['watermark']} is done"
        yield "waiting", f"not published yet; {mark}"
        return
    span = f"positions {publication['lo']} to {publication['hi'] - 1}"
    who = ""
    if publication["commit_id"] is not None:
        who = f" as commit {publication['commit_id']} of {publication['owner']}"
    yield "published", f"{publication['published_at']}{who}, {span}"
    for file in found["files"]:
        gone = file["last_snapshot_id"]
        now = "" if gone is None else f", until snapshot {gone}"
        size = f"{counted(file['rows'], 'row')}, {file['size_bytes']:,} bytes"
        yield "file", f"{file['file_id']} of {file['table']}, {size}{now}"
    kept = "" if publication["readable"] else " (the snapshot has expired; later ones show it)"
    if found["state"] != "quarantined":
        newest = f"the newest is {found['head_snapshot_id']}"
        yield "visible", f"from snapshot {publication['snapshot_id']} on; {newest}{kept}"
