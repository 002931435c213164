"""The five forms of a result: each turns Arrow batches into the bytes of its format.

A reader must be able to tell a whole answer from one that broke off (contract D9): JSON by its
brackets, NDJSON by its last line, Arrow by its end mark, Parquet by its footer. CSV has nothing of
the kind; there it is the broken connection alone that tells.

Values look alike in all of them: CSV and NDJSON hold the texts of the JSON form, and CSV is written
so that ingest reads it back as it was: null is nothing, an empty string is two quotes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.engine.child_faults import refuse_sql
from storage.engine.child_rows import encode, encode_rows, glue
from storage.engine.child_types import Form

Write = Callable[[Any], None]

_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: One row group of a Parquet answer: as much as is held in memory for it.
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 122_880, 16 << 20
_EMPTY = pa.scalar("")
#: Forms whose JSON text never needs quotes in CSV.
_BARE = frozenset({"plain", "float", "quoted", "date", "time", "timestamp", "timestamptz", "blob"})
_NEEDS_QUOTES = r'^$|[",\r\n]|^\s|\s$'


class ResultWriter(Protocol):
    """Takes batches in order. `end` is called once, with the number of rows, if nothing failed."""

    def batch(self, batch: pa.RecordBatch) -> None: ...

    def end(self, rows: int) -> None: ...


class JsonWriter:
    """`[[…],[…]]`: the rows of the JSON answer, without what stands around them."""

    def __init__(self, write: Write, forms: tuple[Form, ...]) -> None:
        self._write = write
        self._forms = forms
        self._begun = False

    def batch(self, batch: pa.RecordBatch) -> None:
        text = encode_rows(batch, self._forms)
        if text:
            self._write(b"," if self._begun else b"[")
            self._write(text)
            self._begun = True

    def end(self, rows: int) -> None:
        self._write(b"]" if self._begun else b"[]")


class NdjsonWriter:
    """One object a line, by column name, and a last line that says that it is complete."""

    def __init__(self, write: Write, forms: tuple[Form, ...], names: Sequence[str]) -> None:
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise refuse_sql(
                f"two columns are named {double[:80]}, and a JSON object can hold one of them: "
                "give them names of their own with AS"
            )
        self._write = write
        self._forms = forms
        self._labels = [json.dumps(name, ensure_ascii=False) + ":" for name in names]

    def batch(self, batch: pa.RecordBatch) -> None:
        pieces: list[Any] = []
        for index, (label, form) in enumerate(zip(self._labels, self._forms, strict=True)):
            pieces += [("," if index else "{") + label, encode(batch.column(index), form)]
        if batch.num_rows:
            rows = pc.binary_join_element_wise(*pieces, "}", _EMPTY)
            self._write(glue(rows, "\n"))
            self._write(b"\n")

    def end(self, rows: int) -> None:
        self._write(b'{"complete":true,"row_count":%d}\n' % rows)


class CsvWriter:
    """RFC 4180 with a header line, and line feeds."""

    def __init__(self, write: Write, forms: tuple[Form, ...], names: Sequence[str]) -> None:
        self._write = write
        self._forms = forms
        write(",".join(_csv_text(name) for name in names).encode("utf-8") + b"\n")

    def batch(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        columns = [_csv_column(batch.column(index), form) for index, form in enumerate(self._forms)]
        rows = pc.binary_join_element_wise(*columns, ",")
        self._write(glue(rows, "\n"))
        self._write(b"\n")

    def end(self, rows: int) -> None:
        return


def _csv_column(values: pa.Array, form: Form) -> pa.StringArray:
    """The fields of a column; null is nothing at all."""

    if form.kind == "null" or values.null_count == len(values):
        return pa.repeat(_EMPTY, len(values))
    if form.kind == "text":
        fields = _csv_quoted(pc.cast(values, pa.string()))
    elif form.kind in _BARE:
        texts = encode(values, form)
        fields = pc.replace_substring(texts, '"', "")
    else:
        fields = _csv_quoted(encode(values, form))
    if values.null_count:
        fields = pc.if_else(values.is_null(), _EMPTY, fields)
    return fields


def _csv_quoted(texts: pa.StringArray) -> pa.StringArray:
    quoted = pc.binary_join_element_wise('"', pc.replace_substring(texts, '"', '""'), '"', _EMPTY)
    return pc.if_else(pc.match_substring_regex(texts, _NEEDS_QUOTES), quoted, texts)


def _csv_text(name: str) -> str:
    return _csv_quoted(pa.array([name]))[0].as_py()  # type: ignore[no-any-return]


class ArrowWriter:
    """An Arrow IPC stream."""

    def __init__(self, write: Write, schema: pa.Schema) -> None:
        self._write = write
        self._schema = in_utc(schema)
        write(self._schema.serialize())

    def batch(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._write(_as(self._schema, batch).serialize())

    def end(self, rows: int) -> None:
        self._write(_ARROW_END)


class ParquetWriter:
    """A Parquet file, row group by row group; at most one of them is held in memory."""

    def __init__(self, write: Write, schema: pa.Schema) -> None:
        double = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if double is not None:
            raise refuse_sql(
                f"two columns are named {double[:80]}, and Parquet finds columns by name: give "
                "them names of their own with AS"
            )
        self._schema = in_utc(schema)
        self._sink = _Sink(write)
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = 0

    def batch(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        self._held.append(_as(self._schema, batch))
        self._held_rows += batch.num_rows
        self._held_bytes += batch.nbytes
        if self._held_rows >= _ROW_GROUP_ROWS or self._held_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def end(self, rows: int) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._held:
            table = pa.Table.from_batches(self._held, self._schema)
            self._writer.write_table(table, row_group_size=max(1, self._held_rows))
            self._held, self._held_rows, self._held_bytes = [], 0, 0


class _Sink:
    """A file that can only be written to, for pyarrow."""

    closed = False

    def __init__(self, write: Write) -> None:
        self._write = write
        self._place = 0

    def write(self, data: Any) -> int:
        size = len(data)
        self._write(bytes(data))
        self._place += size
        return size

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        return

    def close(self) -> None:
        self.closed = True


def in_utc(schema: pa.Schema) -> pa.Schema:
    """DuckDB names the zone of `timestamptz` Etc/UTC; everything else here says UTC."""

    if not any(pa.types.is_timestamp(field.type) and field.type.tz for field in schema):
        return schema
    fields = [
        field.with_type(pa.timestamp(field.type.unit, "UTC"))
        if pa.types.is_timestamp(field.type) and field.type.tz
        else field
        for field in schema
    ]
    return pa.schema(fields)


def _as(schema: pa.Schema, batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch if batch.schema is schema or batch.schema.equals(schema) else batch.cast(schema)
