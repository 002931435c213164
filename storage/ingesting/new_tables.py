"""Tables made from their first rows (`create=true`), and rows that may have columns without values.

A column that has no value in any row of a request says nothing: absent equals null (contract A4).
So with `create=true` such a column is left out where the table does not have it, whether the table
is made by this request, was made by an earlier try of it, or by somebody who was faster: all three
get the same answer. Everything else is held to the table as always.

The rows of a new table are decoded under the schema that was found in them, by the same rules as
under any other, so nothing is stored that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lakebus.errors import RowsInvalid, SchemaInvalid
from lakebus.schemas import NAME_PATTERN, Column, TableSchema, fold_name
from storage.ingesting.definitions import COLUMNS_MAX, ColumnDefinition, TableDefinition
from storage.rows.decode import decode_rows
from storage.rows.decoded import DecodedRows, OnInvalid
from storage.rows.inferring import infer_columns, null_columns

#: Ids of columns that are read and left out: beyond all that a table can have.
_SKIPPED_ID = 1 << 40


@dataclass(frozen=True, slots=True)
class TableBody:
    """The rows of one table as they were sent."""

    media_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TableRows:
    """The rows of one table. `is_new`: the table does not exist, and `schema` has no id yet.
    `skipped`: columns without a value that the schema does not have."""

    schema: TableSchema
    rows: DecodedRows
    is_new: bool = False
    skipped: tuple[str, ...] = ()


def decode_for_new(
    name: str, body: TableBody, *, on_invalid: OnInvalid, rows_max: int
) -> TableRows:
    """The rows under the columns that they show. Raises what `decode_rows` raises, and
    SchemaInvalid when no table can be made of them."""

    inferred = infer_columns(name, body.media_type, body.body, rows_max=rows_max)
    skipped = tuple(fold_name(column) for column in inferred.skipped)
    if not inferred.types:
        raise SchemaInvalid(
            f"the table {name} cannot be made from these rows: no column has a value in any of them"
        )
    definitions = [ColumnDefinition(column, kind.sql) for column, kind in inferred.types.items()]
    checked = TableDefinition(name, tuple(definitions)).checked()
    columns = [replace(column, column_id=n) for n, column in enumerate(checked.columns, start=1)]
    schema = TableSchema(table_id=0, name=checked.name, version=1, columns=tuple(columns))
    rows = _without(schema, skipped, body, on_invalid=on_invalid, rows_max=rows_max)
    if not rows.batch.num_rows:
        # A table is made with rows or not at all; this says what is wrong with them.
        rows = _without(schema, skipped, body, on_invalid="reject", rows_max=rows_max)
    return TableRows(schema, rows, is_new=True, skipped=skipped)


def decode_leniently(
    schema: TableSchema, body: TableBody, *, on_invalid: OnInvalid, rows_max: int
) -> TableRows:
    """The rows under the schema of a table that exists, without columns that are null in all rows
    and that it does not have. Raises what `decode_rows` raises."""

    try:
        rows = _without(schema, (), body, on_invalid=on_invalid, rows_max=rows_max)
    except RowsInvalid:
        skipped = _skippable(schema, body, rows_max)
        if not skipped:
            raise
    else:
        skipped = _skippable(schema, body, rows_max) if rows.rejected else ()
        if not skipped:
            return TableRows(schema, rows)
    rows = _without(schema, skipped, body, on_invalid=on_invalid, rows_max=rows_max)
    return TableRows(schema, rows, skipped=skipped)


def _skippable(schema: TableSchema, body: TableBody, rows_max: int) -> tuple[str, ...]:
    """Columns that a table could have and this one has not, and that are null in all rows."""

    known = {column.name for column in schema.columns}
    nulls = null_columns(schema.name, body.media_type, body.body, rows_max=rows_max)
    skipped = tuple(n for n in nulls if n not in known and NAME_PATTERN.fullmatch(n))
    return skipped if len(skipped) <= COLUMNS_MAX else ()


def _without(
    schema: TableSchema,
    skipped: Sequence[str],
    body: TableBody,
    *,
    on_invalid: OnInvalid,
    rows_max: int,
) -> DecodedRows:
    """The rows decoded as if the table had these columns too, which are then left out."""

    wide = schema
    if skipped:
        if len(skipped) > COLUMNS_MAX:
            raise SchemaInvalid(f"a table has at most {COLUMNS_MAX} columns")
        nothing = [Column(_SKIPPED_ID + n, name, "varchar") for n, name in enumerate(skipped)]
        # No version of a table is 0, so what is prepared for it is not mistaken for one's.
        wide = replace(schema, version=0, columns=(*schema.columns, *nothing))
    rows = decode_rows(wide, body.media_type, body.body, on_invalid=on_invalid, rows_max=rows_max)
    if not skipped:
        return rows
    return replace(rows, batch=rows.batch.select(list(range(len(schema.columns)))))
