"""The rows that the scenarios write: a pure function of the request's number.

So what the lake must hold at the end is known without keeping anything, whatever was sent twice,
dropped or answered late.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pyarrow as pa

COLUMNS = [
    {"name": "request_no", "type": "bigint", "nullable": False},
    {"name": "row_no", "type": "integer", "nullable": False},
    {"name": "writer", "type": "integer"},
    {"name": "amount", "type": "decimal(18,2)"},
    {"name": "ratio", "type": "double"},
    {"name": "label", "type": "varchar"},
    {"name": "happened_at", "type": "timestamptz"},
]

#: What a table of these rows is reduced to: enough to notice a lost, doubled or changed row.
CHECK_SQL = (
    "SELECT count(*) AS rows, count(DISTINCT request_no * 1000 + row_no) AS distinct_rows,"
    " coalesce(sum(request_no * 31 + row_no), 0)::varchar AS number_sum,"
    " coalesce(sum(amount), 0)::varchar AS amount_sum,"
    " coalesce(sum(length(label)), 0)::varchar AS label_length,"
    " count(ratio) AS ratios FROM {table}"
)


def rows_of(request_no: int, *, writer: int = 0, rows: int = 10) -> list[dict[str, Any]]:
    return [
        {
            "request_no": request_no,
            "row_no": row_no,
            "writer": writer,
            "amount": f"{(request_no * 7919 + row_no * 13) % 1_000_000 / 100:.2f}",
            "ratio": None if (request_no + row_no) % 11 == 0 else (request_no % 97) / 7 + row_no,
            "label": f"ä-{request_no % 1000}-{'x' * (row_no % 5)}",
            "happened_at": f"2026-01-{1 + request_no % 28:02d}"
            f"T{request_no % 24:02d}:00:{row_no % 60:02d}Z",
        }
        for row_no in range(rows)
    ]


def expected_check(request_numbers: Iterable[int], *, rows: int = 10) -> list[Any]:
    """The row that CHECK_SQL must give for these requests, in the API's JSON form."""

    count = numbers = lengths = ratios = 0
    amount = Decimal(0)
    for request_no in request_numbers:
        for row in rows_of(request_no, rows=rows):
            count += 1
            numbers += row["request_no"] * 31 + row["row_no"]
            amount += Decimal(row["amount"])
            lengths += len(row["label"])
            ratios += row["ratio"] is not None
    return [
        str(count), str(count), str(numbers),
        str(amount.quantize(Decimal("0.01"))) if count else "0", str(lengths), str(ratios),
    ]  # fmt: skip


def as_json(rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    return "application/json", json.dumps(rows, ensure_ascii=False).encode()


def as_reordered_json(rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    """The same rows with other key order, spacing, escapes and number spellings."""

    turned = [dict(reversed(list(row.items()))) for row in rows]
    for row in turned:
        row["amount"] = row["amount"] + "0"
        row["happened_at"] = row["happened_at"].replace("Z", "+00:00")
    return "application/json", json.dumps(turned, indent=1).encode()


def as_ndjson(rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)
    return "application/x-ndjson", "\n".join(lines).encode()


def as_arrow(rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    import datetime as dt

    table = pa.table(
        {
            "request_no": pa.array([row["request_no"] for row in rows], pa.int64()),
            "row_no": pa.array([row["row_no"] for row in rows], pa.int32()),
            "writer": pa.array([row["writer"] for row in rows], pa.int32()),
            "amount": pa.array([Decimal(row["amount"]) for row in rows], pa.decimal128(18, 2)),
            "ratio": pa.array([row["ratio"] for row in rows], pa.float64()),
            "label": pa.array([row["label"] for row in rows], pa.string()),
            "happened_at": pa.array(
                [dt.datetime.fromisoformat(row["happened_at"]) for row in rows],
                pa.timestamp("us", "UTC"),
            ),
        }
    )
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(rows) // 2))
    return "application/vnd.apache.arrow.stream", sink.getvalue()


ENCODINGS = (as_json, as_ndjson, as_arrow, as_reordered_json)
