"""The door for rows: a body of a declared media type into one Arrow batch that fits the table.

Content encodings (gzip, zstd, lz4) are undone before; this module sees plain bytes. Whatever comes
out fits the schema version exactly (contract A10), so nothing behind it checks values again.
"""

from __future__ import annotations

from collections.abc import Callable

from lakebus.errors import UnsupportedMediaType
from lakebus.schemas import TableSchema
from storage.rows.decode_arrow import decode_arrow_stream
from storage.rows.decode_csv import decode_csv
from storage.rows.decode_json import decode_json, decode_ndjson, split_tables
from storage.rows.decode_parquet import decode_parquet
from storage.rows.decoded import DecodedRows, OnInvalid, RejectedRow, RowError

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
ARROW_STREAM = "application/vnd.apache.arrow.stream"
PARQUET = "application/vnd.apache.parquet"

_DECODERS: dict[str, Callable[..., DecodedRows]] = {
    JSON: decode_json,
    NDJSON: decode_ndjson,
    CSV: decode_csv,
    ARROW_STREAM: decode_arrow_stream,
    PARQUET: decode_parquet,
}
SUPPORTED_MEDIA_TYPES = tuple(_DECODERS)


def decode_rows(
    schema: TableSchema,
    media_type: str,
    body: bytes,
    *,
    on_invalid: OnInvalid = "reject",
    rows_max: int,
) -> DecodedRows:
    """The rows of `body` as one batch in schema order, fields named by column id.

    `media_type` may carry parameters; of these only `charset=utf-8` can be honoured, and bodies
    are UTF-8 anyway. Raises UnsupportedMediaType, MalformedBody (the body cannot be read),
    MalformedRequest (no rows), BodyTooLarge (more than `rows_max` rows), and RowsInvalid (rows do
    not fit and `on_invalid` is "reject"). With "quarantine" such rows are in `rejected`.
    """

    decoder = _DECODERS.get(media_type)
    if decoder is None:
        decoder = _DECODERS.get(media_type.split(";", 1)[0].strip().lower())
    if decoder is None:
        raise unsupported(media_type)
    return decoder(schema, body, on_invalid=on_invalid, rows_max=rows_max)


def unsupported(media_type: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(
        f"bodies of type {media_type[:80]!r} are not read here; send one of "
        + ", ".join(SUPPORTED_MEDIA_TYPES),
        supported=list(SUPPORTED_MEDIA_TYPES),
    )


def decode_rows_value(
    schema: TableSchema, raw: bytes, *, on_invalid: OnInvalid = "reject", rows_max: int
) -> DecodedRows:
    """The rows of one table of a body `{table: [rows]}`, as `split_tables` cut it out."""

    return decode_json(schema, raw, on_invalid=on_invalid, rows_max=rows_max)


__all__ = [
    "SUPPORTED_MEDIA_TYPES",
    "DecodedRows",
    "OnInvalid",
    "RejectedRow",
    "RowError",
    "decode_rows",
    "decode_rows_value",
    "split_tables",
]
