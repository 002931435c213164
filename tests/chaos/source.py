"""The rows that clients send, in every encoding, and the SQL that finds a changed one.

On top of the columns of `tests.history.rows` there are some of other types, each a function of
request and row number, so that a wrong digit, a shifted time or a swapped column shows in the end.
"""

from __future__ import annotations

import datetime as dt
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from tests.history.rows import COLUMNS, rows_of

TABLES = ("orders", "payments", "visits")
PROBE_TABLE = "probe"

_EXTRA = (
    ("label", "varchar"),
    ("amount", "decimal(18,2)"),
    ("ratio", "double"),
    ("happened_at", "timestamptz"),
)
_EPOCH = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_LABEL_PADDING = "äx" * 200

Row = dict[str, Any]
Encoded = tuple[Mapping[str, str], bytes]


def columns() -> list[dict[str, str]]:
    """For `POST /v1/tables`."""
    return [{"name": name, "type": kind} for name, kind in (*COLUMNS, *_EXTRA)]


def full_rows(request: int, table: str, count: int, *, variant: int = 0) -> list[Row]:
    """Rows as JSON spells them."""
    return [
        base
        | {
            "label": _label(request, base["row_number"]),
            "amount": f"{_cents(request, base['row_number']) / 100:.2f}",
            "ratio": _ratio(request, base["row_number"]),
            "happened_at": _moment(request, base["row_number"])
            .isoformat(timespec="microseconds")
            .replace("+00:00", "Z"),
        }
        for base in rows_of(request, table, count, variant=variant)
    ]


def bad_row(request: int) -> Row:
    """A row that fits no table: its check is no number."""
    return {"request": request, "row_number": -1, "check_value": "not a number"}


def changed_rows_sql(table: str) -> str:
    """Counts the rows of which a column is not what was sent."""
    return (
        f"SELECT count(*) FROM {table} WHERE label IS DISTINCT FROM"
        " CAST(request AS varchar) || '-' || CAST(row_number AS varchar) ||"
        f" CASE WHEN row_number % 50 = 49 THEN '{_LABEL_PADDING}' ELSE 'ä' END"
        " OR amount * 100 IS DISTINCT FROM (request * 7919 + row_number * 13) % 1000000"
        " OR ratio IS DISTINCT FROM CASE WHEN (request + row_number) % 11 = 0 THEN NULL"
        " ELSE (request % 97) / 8.0 + row_number END"
        " OR happened_at IS DISTINCT FROM TIMESTAMPTZ '2026-01-01 00:00:00Z'"
        " + to_seconds(request % 86400) + to_microseconds(row_number)"
    )


def _label(request: int, row: int) -> str:
    return f"{request}-{row}" + (_LABEL_PADDING if row % 50 == 49 else "ä")


def _cents(request: int, row: int) -> int:
    return (request * 7919 + row * 13) % 1_000_000


def _ratio(request: int, row: int) -> float | None:
    return None if (request + row) % 11 == 0 else (request % 97) / 8.0 + row


def _moment(request: int, row: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(seconds=request % 86_400, microseconds=row)


# --- encodings -----------------------------------------------------------------------------------


def as_json(rows: Sequence[Row]) -> Encoded:
    return {"Content-Type": "application/json"}, json.dumps(rows, ensure_ascii=False).encode()


def as_spaced_json(rows: Sequence[Row]) -> Encoded:
    """The same rows in other words: key order, spacing, escapes, zeros, another zone's spelling."""
    turned = [dict(reversed(list(row.items()))) for row in rows]
    for row in turned:
        if "amount" in row:
            row["amount"] += "0"
            row["happened_at"] = row["happened_at"].replace("Z", "+00:00")
    return {"Content-Type": "application/json"}, json.dumps(turned, indent=1).encode()


def as_gzip_json(rows: Sequence[Row]) -> Encoded:
    headers, body = as_json(rows)
    return {**headers, "Content-Encoding": "gzip"}, gzip.compress(body, compresslevel=1, mtime=0)


def as_ndjson(rows: Sequence[Row]) -> Encoded:
    """Nulls are left out: absent equals null (A4)."""
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)
    return {"Content-Type": "application/x-ndjson"}, "\n".join(lines).encode()


def as_arrow(rows: Sequence[Row]) -> Encoded:
    table = pa.table(
        {
            "request": pa.array([row["request"] for row in rows], pa.int64()),
            "row_number": pa.array([row["row_number"] for row in rows], pa.int64()),
            "check_value": pa.array([row["check_value"] for row in rows], pa.int64()),
            "label": pa.array([row["label"] for row in rows], pa.string()),
            "amount": pa.array([Decimal(row["amount"]) for row in rows], pa.decimal128(18, 2)),
            "ratio": pa.array([row["ratio"] for row in rows], pa.float64()),
            "happened_at": pa.array(
                [dt.datetime.fromisoformat(row["happened_at"]) for row in rows],
                pa.timestamp("us", "UTC"),
            ),
        }
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(rows) // 2))
    return {"Content-Type": "application/vnd.apache.arrow.stream"}, sink.getvalue()


ENCODINGS: tuple[Callable[[Sequence[Row]], Encoded], ...] = (
    as_json, as_ndjson, as_arrow, as_spaced_json, as_gzip_json,
)  # fmt: skip
"""Of rows for one table. Those with bad rows go as JSON."""


def several_tables(rows: Mapping[str, Sequence[Row]]) -> Encoded:
    return {"Content-Type": "application/json"}, json.dumps(rows, ensure_ascii=False).encode()
