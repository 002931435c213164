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
from storage.engine.child_rows import Piece, bare, encode_rows, glue, join, pieces_of
from storage.engine.child_texts import EMPTY, special
from storage.engine.child_types import Form

Write = Callable[[Any], None]

_ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
#: One row group of a Parquet answer: as much as is held in memory for it.
_ROW_GROUP_ROWS, _ROW_GROUP_BYTES = 122_880, 16 << 20
#: Forms whose text may need quotes in CSV; those of the others never do.
_FREE = frozenset({"text", "blob", "list", "struct", "tuple", "object", "pairs"})
#: All bytes that are no reason for quotes, wherever they stand.
_ORDINARY = bytes(code for code in range(256) if code not in b'",\r\n')


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
        if not batch.num_rows:
            return
        pieces: list[Piece] = []
        for index, (label, form) in enumerate(zip(self._labels, self._forms, strict=True)):
            pieces.append(("," if index else "{") + label)
            pieces.extend(pieces_of(batch.column(index), form))
        self._write(glue(join([*pieces, "}"], batch.num_rows), "\n"))
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
        pieces: list[Piece] = []
        for index, form in enumerate(self._forms):
            pieces += ["," if index else "", *_csv_column(batch.column(index), form)]
        self._write(glue(join(pieces, batch.num_rows), "\n"))
        self._write(b"\n")

    def end(self, rows: int) -> None:
        return


def _csv_column(values: pa.Array, form: Form) -> list[Piece]:
    """The fields of a column; null is nothing at all."""

    if form.kind == "null" or values.null_count == len(values):
        return []
    fields = bare(values, form)
    if form.kind not in _FREE:
        return [pc.fill_null(fields, EMPTY) if values.null_count else fields]
    return _csv_quoted(fields)


def _csv_quoted(texts: pa.StringArray) -> list[Piece]:
    """Fields in quotes where they need them. What makes them needed is first looked for in all of
    them at once, which costs a tenth of looking at each."""

    harmful = special(texts, _ORDINARY)
    trimmed = pc.ascii_trim_whitespace(texts)
    # Spaces inside need no quotes; an empty text does, for nothing is null.
    needs = pc.or_(pc.not_equal(trimmed, texts), pc.equal(texts, EMPTY))
    for mark in '",\r\n':
        if mark.encode() in harmful:
            needs = pc.or_(needs, pc.match_substring(texts, mark))
    doubled = pc.replace_substring(texts, '"', '""') if b'"' in harmful else texts
    if texts.null_count == 0 and pc.all(needs).as_py():
        return ['"', doubled, '"']
    if pc.any(needs).as_py():
        texts = pc.if_else(needs, join(['"', doubled, '"'], len(texts)), texts)
    return [pc.fill_null(texts, EMPTY) if texts.null_count else texts]


def _csv_text(name: str) -> str:
    return str(join(_csv_quoted(pa.array([name])), 1)[0].as_py())


class ArrowWriter:
    """An Arrow IPC stream."""

    def __init__(self, write: Write, schema: pa.Schema) -> None:
        self._write = write
        write(schema.serialize())

    def batch(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            self._write(batch.serialize())

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
        self._schema = schema
        self._sink = _Sink(write)
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._held: list[pa.RecordBatch] = []
        self._held_rows = self._held_bytes = 0

    def batch(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        self._held.append(batch)
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
