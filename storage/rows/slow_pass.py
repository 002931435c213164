"""The exact pass over JSON rows: decides what the fast path could not, and names every bad value.

Row by row and column by column, from the exact reader's members (`json_text.py`) through the cell
rules (`cells.py`). It runs only after the fast path gave up: for faults, and for bodies that are
right but unusual (keys in upper case, an exponent in a decimal).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from lakebus.errors import BodyTooLarge, MalformedRequest
from lakebus.schemas import Column, TableSchema
from storage.rows.cells import CellRefused, cell_of
from storage.rows.decoded import (
    ERRORS_REPORTED_MAX,
    DecodedRows,
    ErrorReport,
    OnInvalid,
    RejectedRow,
    RowError,
    shorten,
    shorten_name,
)
from storage.rows.json_text import JsonRow, Member
from storage.rows.names import fold
from storage.rows.nested_cells import nested_cell
from storage.rows.nested_columns import array_of_cells
from storage.rows.types import ColumnType


def check_row_count(rows: int, *, rows_max: int) -> None:
    """Raises MalformedRequest for no rows, BodyTooLarge for more than allowed."""

    if rows == 0:
        raise MalformedRequest("the request has no rows; send at least one")
    if rows > rows_max:
        raise BodyTooLarge(
            f"the request has more than {rows_max} rows; send it in several", limit_rows=rows_max
        )


def decode_exactly(
    schema: TableSchema,
    kinds: Sequence[ColumnType],
    arrow: pa.Schema,
    rows: Iterable[JsonRow],
    *,
    on_invalid: OnInvalid,
    rows_max: int,
) -> DecodedRows:
    """Good rows as a batch; bad ones as RowsInvalid, or set apart with `quarantine`.

    The body is read to its end before any row is judged, so a body cut short is MalformedBody
    whatever its rows are.
    """

    read = []
    for row in rows:
        read.append(row)
        if len(read) > rows_max:
            break
    check_row_count(len(read), rows_max=rows_max)
    judge = _RowJudge(schema, kinds)
    report = ErrorReport(schema.name)
    rejected: list[RejectedRow] = []
    kept: list[list[Any]] = []
    for number, row in enumerate(read):
        values, errors = judge.judge(number, row)
        if not errors:
            kept.append(values)
            continue
        report.add_row(errors)
        if on_invalid == "quarantine":
            rejected.append(RejectedRow(number, tuple(errors), row.text.encode("utf-8")))
    if report.bad_rows and on_invalid == "reject":
        raise report.as_exception()
    arrays = [
        array_of_cells(kind, [values[index] for values in kept]) for index, kind in enumerate(kinds)
    ]
    return DecodedRows(pa.RecordBatch.from_arrays(arrays, schema=arrow), tuple(rejected))


class _RowJudge:
    """Turns one row at a time into values in schema order, or into its errors."""

    def __init__(self, schema: TableSchema, kinds: Sequence[ColumnType]) -> None:
        self._columns = schema.columns
        self._kinds = kinds
        self._index = {column.name: i for i, column in enumerate(schema.columns)}
        self._table = schema.name

    def judge(self, number: int, row: JsonRow) -> tuple[list[Any], list[RowError]]:
        if row.members is None:
            reason = "a row must be a JSON object"
            return [], [RowError(number, None, reason, shorten(row.text))]
        values: list[Any] = [None] * len(self._columns)
        errors: list[RowError] = []
        seen: set[str] = set()
        for member in row.members:
            if len(errors) >= ERRORS_REPORTED_MAX:
                return values, errors
            self._take(number, member, seen, values, errors)
        errors += [
            RowError(number, column.name, "missing, and the column takes no null", None)
            for column in self._columns
            if not column.nullable and column.name not in seen
        ]
        return values, errors

    def _take(
        self,
        number: int,
        member: Member,
        seen: set[str],
        values: list[Any],
        errors: list[RowError],
    ) -> None:
        name = fold(member.key)
        index = self._index.get(name)
        if index is None:
            reason = f"table {self._table} has no such column"
            errors.append(RowError(number, shorten_name(member.key), reason, shorten(member.text)))
            return
        column = self._columns[index]
        if name in seen:
            reason = "the column is named twice in the row (names fold to lower case)"
            errors.append(RowError(number, name, reason, shorten(member.text)))
            return
        seen.add(name)
        try:
            values[index] = self._value(column, self._kinds[index], member)
        except CellRefused as refusal:
            shown = member.text if refusal.shown is None else refusal.shown
            errors.append(RowError(number, name + refusal.path, str(refusal), shorten(shown)))

    @staticmethod
    def _value(column: Column, kind: ColumnType, member: Member) -> Any:
        if kind.is_nested:
            value = nested_cell(kind, member.value, member.text)
        else:
            value = cell_of(kind, member.value, member.text)
        if value is None and not column.nullable:
            raise CellRefused("null, and the column takes no null")
        return value
