"""One statement and its answer: as a table for people, or in a form that the server gives, passed
on as it comes and never held whole."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import click

from cluster.api_calls import Api, Streamed
from cluster.client_commands import counted
from cluster.text_table import text_table
from lakebus.client_types import parse_type
from lakebus.clock import format_time
from lakebus.errors import Unavailable

_SERVER_MS_MAX = 100_000
ACCEPTED = {
    # Strings, so that no digit of a decimal is lost on the way into the table.
    "table": "application/json",
    "json": "application/json; integers=number",
    "ndjson": "application/x-ndjson; integers=number",
    "csv": "text/csv",
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}
BINARY = frozenset({"arrow", "parquet"})
_NUMERIC = frozenset(
    {"tinyint", "smallint", "integer", "bigint", "hugeint", "bignum", "utinyint", "usmallint",
     "uinteger", "ubigint", "uhugeint", "float", "double", "decimal"}
)  # fmt: skip
_SUFFIXES = {
    **{".json": "json", ".ndjson": "ndjson", ".jsonl": "ndjson", ".csv": "csv", ".txt": "table"},
    **{".arrow": "arrow", ".arrows": "arrow", ".parquet": "parquet", ".pq": "parquet"},
}


@dataclass(frozen=True, slots=True)
class Question:
    """A statement with what is asked beside it."""

    sql: str
    parameters: Sequence[Any] | Mapping[str, Any] | None = None
    after: tuple[str, ...] = ()
    snapshot: int | dt.datetime | None = None
    max_rows: int | None = None
    deterministic: bool = False

    def of(self, sql: str) -> Question:
        return replace(self, sql=sql)

    def document(self, timeout_s: float) -> dict[str, Any]:
        document: dict[str, Any] = {
            "sql": self.sql,
            "timeout_ms": min(_SERVER_MS_MAX, max(1, round(timeout_s * 1000))),
            "deterministic": self.deterministic,
        }
        if self.parameters:
            document["parameters"] = self.parameters
        if self.after:
            document["min_visibility_token"] = list(self.after)
        if isinstance(self.snapshot, dt.datetime):
            document["snapshot"] = {"timestamp": format_time(self.snapshot)}
        elif self.snapshot is not None:
            document["snapshot"] = {"id": self.snapshot}
        if self.max_rows is not None:
            document["max_rows"] = self.max_rows
        return document


@dataclass(frozen=True, slots=True)
class Answered:
    """What was read: `rows` is None where only the server counted them."""

    snapshot_id: int
    token: str
    rows: int | None = None


def form_of_output(path: Path | None, form: str | None) -> str:
    """Raises click.UsageError for binary forms on a terminal, and names that tell nothing."""

    if form is None and path is not None:
        form = _SUFFIXES.get(path.suffix.lower())
        if form is None:
            raise click.UsageError(
                f"Say in which form {path} is to be written: --format {', '.join(ACCEPTED)}."
            )
    form = form or "table"
    if form in BINARY and path is None and sys.stdout.isatty():
        raise click.UsageError(f"{form} is not for a terminal: name a file with -o, or pipe it.")
    return form


def answer(api: Api, question: Question, *, form: str, out: IO[bytes]) -> Answered:
    """Raises the typed error of the answer; Unavailable when it breaks off."""

    document = question.document(api.timeout_s)
    with api.stream("/v1/query", document, accept=ACCEPTED[form]) as streamed:
        if form == "table":
            return _write_table(streamed, out)
        rows = None
        if form == "ndjson":
            rows = _write_ndjson(streamed, out)
        else:
            for part in streamed.parts:
                out.write(part)
            if form == "json":
                out.write(b"\n")
        out.flush()
        headers = streamed.headers
        return Answered(
            int(headers["lakebus-snapshot-id"]), headers["lakebus-visibility-token"], rows
        )


def _write_table(streamed: Streamed, out: IO[bytes]) -> Answered:
    document = json.loads(b"".join(streamed.parts))
    columns, rows = document["columns"], document["rows"]
    numeric = [parse_type(column["type"]).name in _NUMERIC for column in columns]
    for line in text_table([column["name"] for column in columns], rows, numeric=numeric):
        out.write(line.encode() + b"\n")
    out.flush()
    return Answered(document["snapshot_id"], document["visibility_token"], len(rows))


def _write_ndjson(streamed: Streamed, out: IO[bytes]) -> int:
    """Without the last line, which says that the answer is whole; it is looked at here."""

    tail = b""
    for part in streamed.parts:
        tail += part
        end = tail.rfind(b"\n", 0, len(tail) - 1) + 1
        out.write(tail[:end])
        tail = tail[end:]
    try:
        last = json.loads(tail)
        assert last["complete"] is True
        return int(last["row_count"])
    except (ValueError, KeyError, TypeError, AssertionError):
        raise Unavailable("the answer broke off before its end, so it is not whole") from None


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[IO[bytes]]:
    """Standard output, or a file that is there only once it is whole."""

    if path is None:
        yield sys.stdout.buffer
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        if error.filename is None:
            raise
        raise click.UsageError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        partial.unlink(missing_ok=True)


def words_of(found: Answered) -> str:
    rows = "" if found.rows is None else f"{counted(found.rows, 'row')}, "
    return f"({rows}snapshot {found.snapshot_id})"
