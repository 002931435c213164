"""Inputs of a rewrite, byte for byte as the catalog recorded them, in pieces that are read at once.

To open a small file costs more than its rows. So a small one is read once, as a whole: its bytes
are checked against the recorded SHA-256, and the rows decoded from these very bytes are both what
is summed and what is written. A larger one is checked here and read where its rows are wanted.

A small file may hold much: a dictionary writes a long text once for thousands of rows. What would
take too much memory, or has other types than the table has now, is left to a reader that streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from lakebus.errors import Corrupt
from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from storage.files.parquet import HIDDEN_TYPES
from storage.maintenance.parquet_writing import FileColumns
from storage.maintenance.rewriting import RewriteInput

#: Files up to this size are read as a whole.
SMALL_BYTES: Final = 4 * 1024 * 1024
_FIELD_ID_KEY = b"PARQUET:field_id"
_VALUE_BYTES = 16  # of one value that the file may have packed into a bit: the widest type


@dataclass(frozen=True, slots=True)
class Piece:
    """Inputs that follow each other. `rows`: all of theirs, as output files have them, in order;
    None: to be read from the files."""

    inputs: tuple[RewriteInput, ...]
    rows: pa.Table | None

    @property
    def recorded_rows(self) -> int:
        return sum(one.file.rows for one in self.inputs)


def pieces(
    inputs: Sequence[RewriteInput], columns: FileColumns, *, bytes_max: int
) -> Iterator[Piece]:
    """The inputs in their order, so many at a time that held rows take at most `bytes_max` of
    memory. Raises Corrupt for one that is not what was recorded."""

    decoder = _Decoder(columns, bytes_max)
    taken: list[RewriteInput] = []
    held: list[pa.Table] = []
    held_bytes = 0
    for one in inputs:
        found = _verified(one, decoder)
        size = 0 if found is None else found.bytes_at_most
        if taken and ((found is None) is bool(held) or held_bytes + size > bytes_max):
            yield _piece(taken, held)
            taken, held, held_bytes = [], [], 0
        taken.append(one)
        if found is not None:
            held.append(found.rows)
            held_bytes += size
    if taken:
        yield _piece(taken, held)


def one_piece(
    inputs: Sequence[RewriteInput], columns: FileColumns, *, bytes_max: int
) -> Iterator[Piece]:
    """The same, all of them together: held only if all can be. Nothing for no input."""

    values = sum(one.file.rows for one in inputs) * len(columns.arrow)
    fits = values * _VALUE_BYTES <= bytes_max  # else none is decoded in vain
    decoder = _Decoder(columns, bytes_max) if fits else None
    held: list[pa.Table] = []
    held_bytes = 0
    for one in inputs:
        found = _verified(one, decoder)
        if decoder is None:
            continue
        held_bytes += 0 if found is None else found.bytes_at_most
        if found is None or held_bytes > bytes_max:
            decoder, held = None, []
        else:
            held.append(found.rows)
    if inputs:
        yield _piece(inputs, held)


def held_relation(schema: TableSchema, name: str) -> str:
    """SQL of the relation that `scan_expression` gives with hidden columns, over held rows that
    DuckDB knows by a name."""

    columns = [f'"{hidden}"::{HIDDEN_TYPES[hidden][0]} AS "{hidden}"' for hidden in HIDDEN_COLUMNS]
    columns += [f'"{column.name}"::{column.type} AS "{column.name}"' for column in schema.columns]
    return f"(SELECT {', '.join(columns)} FROM {name})"


def _piece(taken: Sequence[RewriteInput], held: Sequence[pa.Table]) -> Piece:
    return Piece(tuple(taken), pa.concat_tables(held).combine_chunks() if held else None)


@dataclass(frozen=True, slots=True)
class _Held:
    rows: pa.Table
    bytes_at_most: int


def _verified(one: RewriteInput, decoder: _Decoder | None) -> _Held | None:
    """The rows, if the file is small and they can be held."""

    file, file_id = one.file, str(one.file.file_id)
    try:
        size, source = one.path.stat().st_size, None
        if size <= SMALL_BYTES:
            data = one.path.read_bytes()
            sha256, source = hashlib.sha256(data).hexdigest(), pa.BufferReader(data)
        else:
            with one.path.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if size != file.size_bytes or sha256 != file.sha256:
            raise Corrupt(
                f"the data file {file.object_key} is not the one that the catalog recorded",
                file_id=file_id,
            )
        with pq.ParquetFile(source or one.path, pre_buffer=False) as parquet:
            found = parquet.metadata.num_rows
            if found == file.rows:
                return decoder.rows(parquet) if source and decoder else None
    except (pa.ArrowException, OSError) as error:
        raise Corrupt(f"the data file {file.object_key} cannot be read", file_id=file_id) from error
    raise Corrupt(
        f"the data file {file.object_key} holds {found} rows where the catalog records {file.rows}",
        file_id=file_id,
    )


class _Decoder:
    """Brings rows of a file into the shape of outputs, by field ids. Files of one table mostly have
    one schema, which is looked at once."""

    def __init__(self, columns: FileColumns, bytes_max: int) -> None:
        self._target: pa.Schema = columns.arrow
        self._bytes_max = bytes_max
        self._known: pa.Schema | None = None
        self._same = False
        self._places: list[int | None] | None = None
        self._wide: set[str] = set()
        self._nested: set[str] = set()

    def rows(self, file: pq.ParquetFile) -> _Held | None:
        """None when a type differs, or the rows might take more memory than they may."""

        schema = file.schema_arrow
        if self._known is None or not schema.equals(self._known, check_metadata=True):
            self._look_at(schema)
        if self._places is None:
            return None
        size = self._bytes_at_most(file.metadata)
        if size > self._bytes_max:
            return None
        found = file.read(use_threads=False)
        if not self._same:
            arrays = [
                _nulls(field.type, found.num_rows) if place is None else found.column(place)
                for field, place in zip(self._target, self._places, strict=True)
            ]
            found = pa.Table.from_arrays(arrays, schema=self._target)
        return _Held(found, size)

    def _look_at(self, schema: pa.Schema) -> None:
        ids = {(field.metadata or {}).get(_FIELD_ID_KEY): n for n, field in enumerate(schema)}
        places = [ids.get(field.metadata[_FIELD_ID_KEY]) for field in self._target]
        fits = all(
            place is None or schema.field(place).type == field.type
            for field, place in zip(self._target, places, strict=True)
        )
        self._known, self._places = schema, places if fits else None
        self._same = schema.equals(self._target, check_metadata=True)
        self._wide = {field.name for field in schema if _is_wide(field.type)}
        self._nested = {field.name for field in schema if pa.types.is_nested(field.type)}

    def _bytes_at_most(self, metadata: pq.FileMetaData) -> int:
        """Plain values take what they take in the file, before compression. Of a dictionary's,
        each row may have the longest. A row of a nested column may have any number of values."""

        total: int = metadata.num_rows * len(self._target) * _VALUE_BYTES
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            total += group.total_byte_size
            for place in range(group.num_columns if self._wide or self._nested else 0):
                column = group.column(place)
                root = column.path_in_schema.partition(".")[0]
                if root in self._nested:
                    total += column.num_values * _VALUE_BYTES
                elif root not in self._wide:
                    continue
                if column.has_dictionary_page:
                    total += column.num_values * column.total_uncompressed_size
        return total


def _is_wide(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _nulls(kind: pa.DataType, count: int) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.nulls(count, kind.storage_type))
    return pa.nulls(count, kind)
