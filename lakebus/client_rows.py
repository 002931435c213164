"""Rows on their way in: whatever holds rows here becomes a body and its media type.

JSON goes out in the forms that the API takes: decimals as text, blobs as base64, NaN as "NaN".
Columns (pyarrow, pandas, polars, anything with the Arrow PyCapsule interface) go as an Arrow
stream. Nothing is rounded or cut on the way; what cannot be said is refused here.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import io
import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lakebus.client_errors import package_missing
from lakebus.client_files import ARROW, CSV, JSON, MEDIA_TYPES, NDJSON, PARQUET, read_file
from lakebus.errors import MalformedBody

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ARROW", "CSV", "JSON", "MEDIA_TYPES", "NDJSON", "PARQUET", "Body", "Rows"]

#: Objects (of a list or any other iterable), one object, a pyarrow Table, RecordBatch, list of them
#: or reader, a pandas or polars DataFrame, the path of a file, or (bytes, media type).
Rows = Any


@dataclass(frozen=True, slots=True)
class Body:
    """What is sent. `coding`: the Content-Encoding of bytes that are compressed already."""

    content: bytes = field(repr=False)
    media_type: str
    coding: str | None = None

    def headers(self) -> dict[str, str]:
        named = {"content-type": self.media_type}
        if self.coding is not None:
            named["content-encoding"] = self.coding
        return named


def body_of(rows: Rows) -> Body:
    """Raises MalformedBody, PackageMissing."""

    if isinstance(rows, (str, os.PathLike)):
        content, media_type, coding = read_file(rows)
        return Body(content, media_type, coding)
    content, media_type = encode_rows(rows)
    return Body(content, media_type)


def encode_rows(rows: Rows) -> tuple[bytes, str]:
    """(body, media type) of rows that are no file. Raises MalformedBody, PackageMissing."""

    if isinstance(rows, tuple) and len(rows) == 2 and isinstance(rows[0], (bytes, bytearray)):
        return bytes(rows[0]), str(rows[1])
    if isinstance(rows, Mapping):
        return _json_body(rows), JSON
    if is_polars(rows):
        return _polars_stream(rows), ARROW
    if is_columns(rows):
        schema, batches = arrow_batches(rows)
        return arrow_stream(schema, batches), ARROW
    return _json_body(_objects(rows)), JSON


# --- objects -------------------------------------------------------------------------------


def _objects(rows: Rows) -> list[Any]:
    if isinstance(rows, (bytes, bytearray, memoryview)):
        raise MalformedBody("bytes alone do not say what they are: give (bytes, media type)")
    try:
        return list(rows)
    except TypeError:
        raise _not_rows(rows) from None


def _json_body(rows: object) -> bytes:
    try:
        return json_text(rows)
    except (TypeError, RecursionError) as error:
        raise MalformedBody(str(error)) from error


def json_line(row: object) -> bytes:
    """One row as a line of NDJSON. Raises MalformedBody."""

    if not isinstance(row, dict):
        if not isinstance(row, Mapping):
            raise _not_rows(row)
        row = dict(row)
    return _json_body(row) + b"\n"


def json_text(value: object) -> bytes:
    """JSON as the API takes it. Raises TypeError for what has no form there."""

    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError):  # NaN, or keys that JSON's objects do not take
        text = _ENCODER.encode(_spelled(value))
    return text.encode("utf-8")


def _plain(value: Any) -> object:
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(value)).decode("ascii")
    if isinstance(value, (dt.datetime, dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "numpy" and value.ndim == 0 and value.dtype.kind not in "mM":
        return _spelled(value.item())  # a datetime64 would become a bare number
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON")


_ENCODER = json.JSONEncoder(default=_plain, allow_nan=False, ensure_ascii=False)


def _spelled(value: Any) -> Any:
    """With NaN and infinities as the strings that the API takes, and maps whose keys are not text
    as lists of key and value."""

    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        if all(isinstance(name, str) for name in value):
            return {name: _spelled(inner) for name, inner in value.items()}
        return [{"key": _spelled(k), "value": _spelled(v)} for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_spelled(inner) for inner in value]
    return value


def _not_rows(rows: Any) -> MalformedBody:
    more = ""
    if type(rows).__name__ == "LazyFrame":
        more = ": collect() it first"
    return MalformedBody(
        f"a {type(rows).__name__} holds no rows that can be sent{more}; give objects (dicts), a"
        " pyarrow, pandas or polars table, a file's path, or (bytes, media type)"
    )


# --- columns -------------------------------------------------------------------------------


def _package_of(rows: Any) -> str:
    return type(rows).__module__.partition(".")[0]


def is_polars(rows: Any) -> bool:
    return _package_of(rows) == "polars" and hasattr(rows, "write_ipc_stream")


def is_columns(rows: Any) -> bool:
    """True for what becomes an Arrow stream."""

    if hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        return True
    if _package_of(rows) == "pandas" and hasattr(rows, "columns"):
        return True
    return isinstance(rows, list) and bool(rows) and hasattr(rows[0], "__arrow_c_array__")


def arrow_batches(rows: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The batches of columns. Raises PackageMissing, MalformedBody."""

    try:
        import pyarrow as pa  # here, because the client works without it
    except ImportError:
        raise package_missing("pyarrow", "sending columns") from None
    try:
        if isinstance(rows, pa.RecordBatch):
            return rows.schema, iter((rows,))
        if _package_of(rows) == "pandas":
            # The index is no column; its metadata would be bytes for nothing.
            table = pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata()
            return table.schema, iter(table.to_batches())
        if isinstance(rows, list):
            table = pa.Table.from_batches([pa.record_batch(one) for one in rows])
            return table.schema, iter(table.to_batches())
        if hasattr(rows, "__arrow_c_stream__"):
            reader = pa.RecordBatchReader.from_stream(rows)
            return reader.schema, iter(reader)
        batch = pa.record_batch(rows)
        return batch.schema, iter((batch,))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise MalformedBody(f"these columns have no form in Arrow: {str(error)[:300]}") from error


def arrow_stream(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> bytes:
    """An Arrow IPC stream with its end mark."""

    import pyarrow as pa  # here, because the client works without it

    sink = pa.BufferOutputStream()
    try:
        with pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
    except pa.ArrowException as error:
        raise MalformedBody(f"these columns cannot be sent: {str(error)[:300]}") from error
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _polars_stream(rows: Any) -> bytes:
    """Polars writes the stream itself; pyarrow is not needed."""

    polars = sys.modules["polars"]  # loaded: only its own frames come to this line
    sink = io.BytesIO()
    rows.write_ipc_stream(sink, compat_level=polars.CompatLevel.oldest())
    return sink.getvalue()


def polars_slices(rows: Any, rows_max: int) -> Iterator[tuple[bytes, int]]:
    """(Arrow stream, rows) of parts of a frame."""

    for start in range(0, rows.height, rows_max):
        part = rows.slice(start, rows_max)
        yield _polars_stream(part), part.height
