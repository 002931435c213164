"""Arrow streams: checked whole, cast to the table's types only where nothing is lost (A10).

Senders choose their own widths, units and dictionaries. Each column is decoded to plain values,
its pair of types is looked up in the rules of `arrow_casts.py`, and the cast runs as one checked
kernel. Where it fails, halving finds the rows that do not fit, so that they can be named.

A stream must end with its end mark: without it, a body cut between two batches would look whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from lakebus.errors import MalformedBody
from lakebus.schemas import Column, TableSchema
from storage.rows.arrow_casts import cast_column, row_json, show_value
from storage.rows.arrow_stream_size import check_decompressed_size, check_expanded_size
from storage.rows.decoded import (
    DecodedRows,
    ErrorReport,
    OnInvalid,
    RejectedRow,
    RowError,
    shorten_name,
)
from storage.rows.names import fold
from storage.rows.refusals import Refusals
from storage.rows.shapes import shape_of
from storage.rows.slow_pass import check_row_count

END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: Most bytes that the compressed, dictionary or run-end encoded values of one stream may stand for.
DECOMPRESSED_BYTES_MAX = 256 << 20
#: A body is small; its own thread decodes it sooner than a pool would.
_READ = pa.ipc.IpcReadOptions(use_threads=False)


def decode_arrow_stream(
    schema: TableSchema, body: bytes | memoryview, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The rows of an Arrow IPC stream. Raises as `decode.decode_rows` says."""

    return decode_batch(schema, read_stream(body), on_invalid=on_invalid, rows_max=rows_max)


def decode_batch(
    schema: TableSchema, received: pa.RecordBatch, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The rows of a batch that was validated. Raises as `decode.decode_rows` says."""

    shape = shape_of(schema)
    check_row_count(received.num_rows, rows_max=rows_max)
    errors = _Errors()
    sources = _match_fields(schema, received, errors)
    arrays = []
    for column, kind, source in zip(schema.columns, shape.kinds, sources, strict=True):
        array = None
        if source is not None:
            found = Refusals()
            array = cast_column(source, kind, found)
            for one in found.found:
                shown = show_value(source, one.place) if one.shown is None else one.shown
                errors.add(one.place, column.name + one.path, one.reason, shown)
        if array is None:
            array = pa.nulls(received.num_rows, kind.arrow)
        _check_nulls(column, source, errors, received.num_rows)
        arrays.append(array)
    batch = pa.RecordBatch.from_arrays(arrays, schema=shape.arrow)
    if not errors.by_row:
        return DecodedRows(batch)
    return _without_bad_rows(schema, received, batch, errors, on_invalid)


class _Errors:
    """Errors by row; errors of a whole column count for each row."""

    def __init__(self) -> None:
        self.by_row: dict[int, list[RowError]] = {}

    def add(self, row: int, column: str, reason: str, value: str | None) -> None:
        self.by_row.setdefault(row, []).append(RowError(row, column, reason, value))

    def add_to_all(self, rows: int, column: str, reason: str) -> None:
        for row in range(rows):
            self.add(row, column, reason, None)


def read_stream(body: bytes | memoryview) -> pa.RecordBatch:
    """The stream's rows as one batch, every buffer validated. Uncompressed buffers stay where they
    are in `body`, which may be memory that is shared with its sender (and is sealed then)."""

    if bytes(body[-len(END_MARK) :]) != END_MARK:
        raise MalformedBody("the Arrow stream has no end mark: it is cut short or was not closed")
    # The end mark is left out of what is parsed: should these bytes be data, that data is now cut
    # short and the reader says so.
    content = memoryview(body)[: -len(END_MARK)]
    try:
        check_decompressed_size(content, limit_bytes=DECOMPRESSED_BYTES_MAX)
        source = pa.BufferReader(pa.py_buffer(content))
        with pa.ipc.open_stream(source, options=_READ) as reader:
            table = reader.read_all()
        if source.tell() != len(content):
            raise MalformedBody("there are more bytes after the end of the Arrow stream")
        table.validate(full=True)
        batch = one_batch(table)
        check_expanded_size(batch, limit_bytes=DECOMPRESSED_BYTES_MAX)
        return batch
    except (pa.ArrowException, OSError, ValueError, OverflowError) as fault:
        raise MalformedBody(f"the body is not a whole Arrow stream: {str(fault)[:200]}") from None


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table's rows as one batch, also of none."""

    batches = table.to_batches()
    if len(batches) == 1:
        return batches[0]
    if not batches:
        return pa.RecordBatch.from_arrays(
            [pa.nulls(0, field.type) for field in table.schema], schema=table.schema
        )
    return pa.concat_batches(batches)


def _match_fields(
    schema: TableSchema, received: pa.RecordBatch, errors: _Errors
) -> list[pa.Array | None]:
    """The received array of each column of the table, None where there is none."""

    index = {column.name: i for i, column in enumerate(schema.columns)}
    sources: list[pa.Array | None] = [None] * len(schema.columns)
    for position, field in enumerate(received.schema):
        place = index.get(fold(field.name))
        name = shorten_name(field.name)
        if place is None:
            errors.add_to_all(received.num_rows, name, f"table {schema.name} has no such column")
        elif sources[place] is not None:
            errors.add_to_all(
                received.num_rows, name, "the column comes twice (names fold to lower case)"
            )
        else:
            sources[place] = received.column(position)
    return sources


def _check_nulls(column: Column, source: pa.Array | None, errors: _Errors, rows: int) -> None:
    if column.nullable:
        return
    if source is None:
        errors.add_to_all(rows, column.name, "missing, and the column takes no null")
        return
    if source.null_count or pa.types.is_dictionary(source.type):
        for row, is_null in enumerate(source.is_null().to_pylist()):
            if is_null:
                errors.add(row, column.name, "null, and the column takes no null", None)


def _without_bad_rows(
    schema: TableSchema,
    received: pa.RecordBatch,
    batch: pa.RecordBatch,
    errors: _Errors,
    on_invalid: OnInvalid,
) -> DecodedRows:
    bad = sorted(errors.by_row)
    if on_invalid == "reject":
        report = ErrorReport(schema.name)
        for row in bad:
            report.add_row(errors.by_row[row])
        raise report.as_exception()
    good = _others(bad, batch.num_rows)
    rejected = tuple(
        RejectedRow(row, tuple(errors.by_row[row]), row_json(received, row)) for row in bad
    )
    return DecodedRows(batch.take(pa.array(good, pa.int64())), rejected)


def _others(bad: Sequence[int], rows: int) -> list[int]:
    known = set(bad)
    return [row for row in range(rows) if row not in known]
