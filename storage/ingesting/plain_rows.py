"""Stored rows as JSON values in the form in which ingest takes them, for people to look at."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import math
import uuid

import pyarrow as pa

from lakebus.schemas import TableSchema


def rows_as_json(
    schema: TableSchema, batch: pa.RecordBatch, *, rows_max: int
) -> list[dict[str, object]]:
    """The first rows by column name; columns that the schema does not have are left out."""

    names = {str(column.column_id): column.name for column in schema.columns}
    return [
        {names[key]: _plain(value) for key, value in row.items() if key in names}
        for row in batch.slice(0, rows_max).to_pylist()
    ]


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return value.isoformat()
    return value
