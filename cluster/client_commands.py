"""`lakebus ingest` and `lakebus query`: the Python client as commands.

Exit codes: 0 done; 1 refused, change the call; 2 wrong usage; 3 not reachable or not now, the same
command may succeed later (rows already sent are not doubled).
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from cluster.stack_files import StackFiles
from cluster.text_table import text_table
from lakebus.client import TIMEOUT_S, Client, connect
from lakebus.client_forms import ARROW, JSON
from lakebus.client_results import Result, Sent
from lakebus.clock import format_time, parse_time
from lakebus.errors import LakebusError, RowsInvalid

NDJSON = "application/x-ndjson"
CSV, PARQUET = "text/csv", "application/vnd.apache.parquet"
MEDIA_TYPES = {"json": JSON, "ndjson": NDJSON, "csv": CSV, "arrow": ARROW, "parquet": PARQUET}
_SUFFIXES = {
    **{".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson"},
    **{".csv": "csv", ".parquet": "parquet", ".pq": "parquet"},
    **{".arrow": "arrow", ".arrows": "arrow", ".ipc": "arrow", ".feather": "arrow"},
}
#: NDJSON goes in parts of about this size; their keys depend on it.
PART_BYTES = 8 * 1024 * 1024
_ARROW_FILE_MAGIC = b"ARROW1"
_ERRORS_SHOWN = 10
_REFUSED, _LATER = 1, 3


def client_options(command: Callable[..., int]) -> Callable[..., int]:
    """Which server, and errors as exit codes. The command gets a `Client` as `client`."""

    @functools.wraps(command)
    def run(
        url: str | None, api_key: str | None, data_dir: Path, timeout_s: float, **given: Any
    ) -> int:
        try:
            with _connected(url, api_key, data_dir, timeout_s) as client:
                return command(client=client, **given)
        except LakebusError as error:
            _say_error(error)
            return _code_of(error)

    for option in (
        click.option("--timeout-s", type=click.FloatRange(0.001), default=TIMEOUT_S,
                     show_default=True, help="Budget of one request, retries included."),
        click.option("--data-dir", type=click.Path(path_type=Path), envvar="LAKEBUS_DATA_DIR",
                     default=Path(".lakebus"), show_default=True,
                     help="Folder of a local stack, which says URL and key."),
        click.option("--api-key", envvar="LAKEBUS_API_KEY", help="Key [LAKEBUS_API_KEY]."),
        click.option("--url", envvar="LAKEBUS_URL", help="Server [LAKEBUS_URL]."),
    ):  # fmt: skip
        run = option(run)
    return run


@click.command()
@client_options
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--table", required=True, help="Where the rows go; the table must exist.")
@click.option(
    "--format", "form", type=click.Choice(list(MEDIA_TYPES)), help="Default: by the file's name."
)
@click.option("--key", help="Idempotency key; default: made from table and content.")
@click.option("--wait", is_flag=True, help="Return when the rows can be read.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def ingest(
    client: Client,
    file: BinaryIO,
    table: str,
    form: str | None,
    key: str | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Send the rows of FILE (JSON, NDJSON, CSV, Arrow or Parquet; default: standard input).

    The same content sent again for the same table, within the idempotency window, is stored once;
    give a --key of your own to store it twice. NDJSON above 8 MiB goes in several requests, each of
    which is all or nothing. Prints the token of each, for `lakebus query --after`.
    """
    chosen = form or _SUFFIXES.get(Path(str(getattr(file, "name", ""))).suffix.lower())
    if chosen is None:
        forms = ", ".join(MEDIA_TYPES)
        raise click.UsageError(f"Say what the rows are written in: --format {forms}.")
    content = file.read()
    parts = list(_parts(content, chosen))
    sent: list[Sent] = []
    try:
        for n, part in enumerate(parts):
            name = _key_of(table, n, part) if key is None else key if n == 0 else f"{key}-{n}"
            sent.append(client.ingest(table, (part, MEDIA_TYPES[chosen]), key=name))
    except LakebusError as error:
        _say_error(error)
        if isinstance(error, RowsInvalid):
            _say_rows(error, before=sum(one.receipt.rows for one in sent))
        if len(parts) > 1:
            click.echo(f"  {len(sent)} of {len(parts)} requests are stored", err=True)
        return _code_of(error)
    visible = bool(wait and client.wait_visible(sent))
    _say_sent(sent, visible=visible, as_json=as_json)
    return 0


@click.command()
@client_options
@click.argument("sql")
@click.option("-p", "--parameter", "parameters", multiple=True, help="Value of the next `?`.")
@click.option("--after", multiple=True, metavar="TOKEN", help="See the rows of this token.")
@click.option("--at", metavar="ID|TIME", help="Read a past snapshot.")
@click.option("--max-rows", type=click.IntRange(1), help="More rows than this are an error.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def query(
    client: Client,
    sql: str,
    parameters: tuple[str, ...],
    after: tuple[str, ...],
    at: str | None,
    max_rows: int | None,
    as_json: bool,
) -> int:
    """Run one SQL statement (- reads it from standard input) and print its answer.

    A parameter that is JSON (12, true, null, "text") is that value; anything else is text.
    """
    if sql == "-":
        sql = sys.stdin.read()
    found = client.query(
        sql,
        [parameter_value(text) for text in parameters] or None,
        after=list(after) or None,
        snapshot=_snapshot(at),
        max_rows=max_rows,
    )
    if as_json:
        click.echo(json.dumps(_result_json(found), ensure_ascii=False))
        return 0
    for line in text_table([name for name, _ in found.columns], found.rows):
        click.echo(line)
    count = len(found.rows)
    click.echo(f"({count} row{'' if count == 1 else 's'}, snapshot {found.snapshot_id})", err=True)
    return 0


# --- which server --------------------------------------------------------------------------


def _connected(url: str | None, api_key: str | None, data_dir: Path, timeout_s: float) -> Client:
    if url is None or api_key is None:
        found = StackFiles(data_dir).connection()
        if found is None:
            raise click.UsageError(
                f"No stack has run in {data_dir}. Start one with `lakebus up`, name its folder with"
                " --data-dir, or give --url and --api-key."
            )
        if url is None:
            url, api_key = found["url"], api_key or found["api_key"]
        else:  # a key must never go to a server that it was not made for
            raise click.UsageError("With --url, give --api-key (or LAKEBUS_API_KEY) too.")
    return connect(url, api_key, timeout_s=timeout_s)


# --- rows ----------------------------------------------------------------------------------


def _parts(content: bytes, form: str) -> Iterator[bytes]:
    if form == "ndjson":
        yield from _lines(content)
    elif form == "arrow" and content.startswith(_ARROW_FILE_MAGIC):
        yield _stream_of_arrow_file(content)
    else:
        yield content


def _lines(content: bytes) -> Iterator[bytes]:
    """Cut behind line ends, each part as near below PART_BYTES as its lines allow."""

    start = 0
    while start < len(content) or not content:
        end = start + PART_BYTES
        if end < len(content):
            cut = content.rfind(b"\n", start, end)
            cut = cut if cut >= 0 else content.find(b"\n", end)
            end = len(content) if cut < 0 else cut + 1
        yield content[start:end]
        if not content:
            return
        start = end


def _key_of(table: str, place: int, part: bytes) -> str:
    """The key of a part is its content, so that a file sent again, corrected or longer, does not
    double the parts that are as they were; its place, because equal parts of a file both count."""

    return "sha256-" + hashlib.sha256(f"{table}\n{place}\n".encode() + part).hexdigest()


def _stream_of_arrow_file(content: bytes) -> bytes:
    """The API takes Arrow streams; a file has the same batches and an index behind them."""

    import pyarrow as pa  # here, because it takes a while and only these files need it

    sink = pa.BufferOutputStream()
    try:
        with pa.ipc.open_file(content) as reader, pa.ipc.new_stream(sink, reader.schema) as writer:
            for n in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(n))
    except (pa.ArrowInvalid, OSError) as error:
        raise click.UsageError(f"This is not a whole Arrow file: {error}") from None
    stream: bytes = sink.getvalue().to_pybytes()
    return stream


# --- words ---------------------------------------------------------------------------------


def parameter_value(text: str) -> Any:
    """The value that JSON says, or the text itself."""

    try:
        return json.loads(text)
    except ValueError:
        return text


def _snapshot(at: str | None) -> int | dt.datetime | None:
    if at is None:
        return None
    if re.fullmatch(r"[0-9]{1,18}", at):
        return int(at)
    try:
        return parse_time(at)
    except ValueError as error:
        raise click.UsageError(
            f"--at takes a snapshot's id, or a time like 2026-01-31T12:00:00Z ({error})"
        ) from None


def _result_json(found: Result) -> dict[str, Any]:
    return {
        "columns": [{"name": name, "type": kind} for name, kind in found.columns],
        "rows": found.rows,
        "snapshot_id": found.snapshot_id,
        "snapshot_time": format_time(found.snapshot_time),
        "visibility_token": found.token,
        "statistics": dict(found.statistics),
    }


def _say_sent(sent: list[Sent], *, visible: bool, as_json: bool) -> None:
    rows = sum(one.receipt.rows for one in sent)
    replayed = sum(one.replayed for one in sent)
    if as_json:
        document = {
            "rows": rows,
            "requests": len(sent),
            "replayed": replayed,
            "visible": visible,
            "receipts": [one.receipt.as_json() for one in sent],
        }
        click.echo(json.dumps(document))
        return
    requests = "1 request" if len(sent) == 1 else f"{len(sent)} requests"
    known = ""
    if replayed:
        which = "" if replayed == len(sent) else f"{replayed} of them "
        known = f"; {which}stored before, nothing is doubled"
    state = "visible" if visible else "durable"
    click.echo(f"{rows} row{'' if rows == 1 else 's'} {state} in {requests}{known}", err=True)
    for one in sent:
        click.echo(one.token)


def _code_of(error: LakebusError) -> int:
    return _LATER if error.retryable else _REFUSED


def _say_error(error: LakebusError) -> None:
    again = " (try again)" if error.retryable else ""
    click.echo(f"lakebus: {error.code}: {error}{again}", err=True)


def _say_rows(error: RowsInvalid, *, before: int) -> None:
    """Rows are counted from 0 within FILE, like those of the API within a request."""

    shown = error.members.get("errors", [])[:_ERRORS_SHOWN]
    for one in shown:
        value = "" if one.get("value") in (None, "null") else f" ({one['value']})"
        click.echo(
            f"  row {before + one['row']}, column {one['column']}: {one['reason']}{value}", err=True
        )
    more = int(error.members.get("error_count", len(shown))) - len(shown)
    if more > 0:
        click.echo(f"  and {more} more", err=True)
