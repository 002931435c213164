"""The short way for small answers in JSON that have been asked before.

Streaming by Arrow binds a statement twice (0.5 ms over one Parquet file). When the same statement
over the same sources gave few rows of plain types the last time, it is executed directly and its
Python rows are put into one Arrow batch, so that the same encoder writes the same bytes. If it
gives many rows this time, they still all come, only slower, and the next run goes the long way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa

from storage.engine.child_scopes import Sources
from storage.engine.child_types import is_fraction, type_id

SMALL_ROWS = 200
_SQL_LENGTH_MAX = 8192
_ROWS_PER_FETCH = 2048
_ARROW = {
    "boolean": pa.bool_(),
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "utinyint": pa.uint8(),
    "usmallint": pa.uint16(),
    "uinteger": pa.uint32(),
    "ubigint": pa.uint64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "varchar": pa.string(),
    "json": pa.string(),
    # As the text of it: child_types says why.
    "decimal": pa.string(),
}


class SmallAnswers:
    """Which (statement, sources) gave a small plain answer last. Any thread may ask."""

    def __init__(self, *, entries_max: int) -> None:
        self._entries_max = entries_max
        self._known: OrderedDict[tuple[str, Sources], bool] = OrderedDict()

    def expects(self, sql: str, sources: Sources) -> bool:
        return (sql, sources) in self._known

    def learn(self, sql: str, sources: Sources, types: tuple[Any, ...], rows: int) -> None:
        if (
            rows > SMALL_ROWS
            or len(sql) > _SQL_LENGTH_MAX
            or any(arrow_type(kind) is None for kind in types)
        ):
            self._known.pop((sql, sources), None)
            return
        self._known[sql, sources] = True
        while len(self._known) > self._entries_max:
            try:
                self._known.popitem(last=False)
            except KeyError:  # another lane emptied it
                return


def arrow_type(kind: Any) -> pa.DataType | None:
    """The Arrow type of a plain SQL type, or None when values must not pass through Python."""

    return None if is_fraction(kind) else _ARROW.get(type_id(kind))


def read_batches(
    cursor: duckdb.DuckDBPyConnection, types: tuple[Any, ...]
) -> Iterator[pa.RecordBatch]:
    """The rows of the statement that `cursor` has executed; all `types` are plain."""

    kinds = [(type_id(kind) == "decimal", arrow_type(kind)) for kind in types]
    names = [str(n) for n in range(len(kinds))]
    while rows := cursor.fetchmany(_ROWS_PER_FETCH):
        columns = zip(*rows, strict=True)
        arrays = [
            pa.array(_digits(values) if decimal else values, kind)
            for values, (decimal, kind) in zip(columns, kinds, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(arrays, names)
        if len(rows) < _ROWS_PER_FETCH:
            return


def _digits(values: Iterable[Decimal | None]) -> list[str | None]:
    return [None if value is None else format(value, "f") for value in values]
