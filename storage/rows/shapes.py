"""What columns a table's batches have: their types, and the schema of the batch.

Any thread may ask; the plans of `decode_json.py`, made of these, belong to the event loop.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pyarrow as pa

from lakebus.schemas import Column, TableSchema
from storage.rows.types import ColumnType, parse_type


@dataclass(frozen=True, slots=True)
class TableShape:
    """`arrow`: fields in schema order, named by column id."""

    kinds: tuple[ColumnType, ...]
    arrow: pa.Schema


def shape_of(schema: TableSchema) -> TableShape:
    return _shape(schema.columns)


@functools.lru_cache(maxsize=512)
def _shape(columns: tuple[Column, ...]) -> TableShape:
    kinds = tuple(parse_type(column.type) for column in columns)
    pairs = zip(columns, kinds, strict=True)
    return TableShape(kinds, pa.schema([(str(c.column_id), k.arrow) for c, k in pairs]))
