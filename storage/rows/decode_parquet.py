"""Parquet bodies: read whole and checked, then the same rules as for Arrow streams (A10).

A file of a few kilobytes can claim to hold gigabytes. So the footer is believed only to refuse:
rows and uncompressed bytes are checked before anything is read, text and binary columns are read
as dictionaries, so that a value that is repeated a million times is there once, and what they would
expand to is checked before they are expanded.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from lakebus.errors import BodyTooLarge, MalformedBody, RowsInvalid
from lakebus.schemas import TableSchema
from storage.rows.arrow_stream_size import check_expanded_size
from storage.rows.decode_arrow import DECOMPRESSED_BYTES_MAX, decode_batch, one_batch
from storage.rows.decoded import DecodedRows, OnInvalid, RowError, shorten_name
from storage.rows.slow_pass import check_row_count

_MAGIC = b"PAR1"
_BYTE_ARRAYS = frozenset({"BYTE_ARRAY"})
_VALUE_BYTES = 16


def decode_parquet(
    schema: TableSchema, body: bytes, *, on_invalid: OnInvalid, rows_max: int
) -> DecodedRows:
    """The rows of a Parquet file. Raises as `decode.decode_rows` says."""

    received = read_parquet(body, table=schema.name, rows_max=rows_max)
    return decode_batch(schema, received, on_invalid=on_invalid, rows_max=rows_max)


def read_parquet(body: bytes, *, table: str, rows_max: int) -> pa.RecordBatch:
    """What the file holds, validated; `table` is for errors."""

    if not (body.startswith(_MAGIC) and body.endswith(_MAGIC) and len(body) > 2 * len(_MAGIC)):
        raise MalformedBody("the body is not a whole Parquet file: it is cut short, or another")
    try:
        with pq.ParquetFile(pa.BufferReader(body)) as file:
            metadata = file.metadata
            check_row_count(metadata.num_rows, rows_max=rows_max)
            _check_size(metadata)
            _refuse_int96(table, metadata)
            repeated = _byte_array_columns(metadata)
        with pq.ParquetFile(
            pa.BufferReader(body), read_dictionary=repeated, page_checksum_verification=True
        ) as file:
            read = file.read(use_threads=False)
        read.validate(full=True)
        if read.num_rows != metadata.num_rows:
            raise MalformedBody("the Parquet file holds other rows than its footer says")
        batch = one_batch(read.unify_dictionaries())
        check_expanded_size(batch, limit_bytes=DECOMPRESSED_BYTES_MAX)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as fault:
        text = str(fault)[:200]
        raise MalformedBody(f"the body is not a Parquet file that can be read: {text}") from None
    return batch


def _check_size(metadata: pq.FileMetaData) -> None:
    size_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            size_bytes += max(0, column.total_uncompressed_size)
            # A dictionary of one value fills a column of fixed width with next to no bytes.
            size_bytes += row_group.num_rows * max(0, metadata.schema.column(index).length or 0)
            if metadata.schema.column(index).max_repetition_level:
                # Of a list, a few bytes can stand for any number of values.
                size_bytes += max(0, column.num_values) * _VALUE_BYTES
    if size_bytes > DECOMPRESSED_BYTES_MAX:
        raise BodyTooLarge(
            f"the Parquet file holds more than {DECOMPRESSED_BYTES_MAX} bytes uncompressed; send "
            "it in several",
            limit_bytes=DECOMPRESSED_BYTES_MAX,
        )


def _refuse_int96(table: str, metadata: pq.FileMetaData) -> None:
    """INT96 times are nanoseconds that readers cut or wrap: what was meant cannot be known."""

    for index in range(len(metadata.schema)):
        column = metadata.schema.column(index)
        if column.physical_type == "INT96":
            name = shorten_name(column.name)
            reason = "INT96 is not taken; write the times as INT64 (timestamp_us)"
            raise RowsInvalid(
                f"the column {name} for table {table} does not fit, nothing was stored: {reason}",
                errors=[RowError(0, name, reason, None).as_json()],
                error_count=metadata.num_rows,
            )


def _byte_array_columns(metadata: pq.FileMetaData) -> list[str]:
    columns = (metadata.schema.column(index) for index in range(len(metadata.schema)))
    return [column.path for column in columns if column.physical_type in _BYTE_ARRAYS]
