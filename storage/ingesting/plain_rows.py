"""Stored rows as JSON values in the form in which ingest takes them, for people to look at."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import math
import uuid
from typing import Any

import pyarrow as pa

from lakebus.schemas import TableSchema
from storage.rows.types import ColumnType, Family, parse_type


def rows_as_json(
    schema: TableSchema, batch: pa.RecordBatch, *, rows_max: int
) -> list[dict[str, object]]:
    """The first rows by column name; columns that the schema does not have are left out."""

    columns = {
        str(column.column_id): (column.name, parse_type(column.type)) for column in schema.columns
    }
    return [
        {
            columns[key][0]: _value(columns[key][1], value)
            for key, value in row.items()
            if key in columns
        }
        for row in batch.slice(0, rows_max).to_pylist()
    ]


def _value(kind: ColumnType, value: Any) -> object:
    """Maps with text keys are objects, others lists of pairs."""

    if value is None:
        return None
    match kind.family:
        case Family.LIST:
            return [_value(kind.children[0], one) for one in value]
        case Family.STRUCT:
            fields = zip(kind.names, kind.children, strict=True)
            return {name: _value(child, value[name]) for name, child in fields}
        case Family.MAP:
            key, held = kind.children
            pairs = [(_value(key, k), _value(held, v)) for k, v in value]
            if key.family is Family.VARCHAR:
                return {str(k): v for k, v in pairs}
            return [{"key": k, "value": v} for k, v in pairs]
        case _:
            return _plain(value)


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
