"""One output of a rewrite: row groups go in as they come, a file with true statistics comes out.

`storage.files.parquet` says which columns of a data file may have bounds in its footer, and decides
with the whole file in memory. Here the writer must decide when it opens the file: it trusts what
the caller says about the inputs, looks at each row group as it passes, and when one contradicts,
the finished file is written once more, group by group, without bounds for that column.

Bloom filters go to the columns of nearly unique integers, texts and uuids whose row groups bounds
do not keep apart; but not to texts of several words. Never to floats, whose zeros are equal but
hash apart, nor to decimals and times, which a filter may compare in another unit than the file's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lakebus.schemas import HIDDEN_COLUMNS, TableSchema
from lakebus.snapshots import ColumnStatistics
from storage.files.parquet import (
    HIDDEN_FIELD_IDS,
    HIDDEN_TYPES,
    file_field,
    group_may_have_bounds,
    in_file_type,
)
from storage.files.statistics import (
    UNBOUNDED,
    column_statistics,
    merged_statistics,
    storage_of,
)
from storage.maintenance.encodings import (
    DELTAS,
    ColumnForm,
    choose_forms,
    distinct_values,
    writer_options,
)
from storage.maintenance.rewriting import RewrittenFile
from storage.rows.nested_arrays import relaid_column
from storage.rows.types import ColumnType, Family, parse_type

#: Fits a power of two of bytes for a full row group: 128 KiB.
BLOOM_FALSE_POSITIVES: Final = 0.02
#: Below this a row group is read faster than a filter is asked.
BLOOM_ROWS_MIN: Final = 8192
_BLOOM_FAMILIES = frozenset({Family.INTEGER, Family.VARCHAR, Family.UUID})
_BLOOM_BITS_MIN = 32
_BLOOM_DISTINCT_SHARE_MIN = 0.5
_BLOOM_OVERLAP_MIN = 0.5
_OVERLAP_SAMPLE_ROWS = 256
_PROSE_SAMPLE_ROWS = 256
_PROSE_BYTES_MIN = 24
_PROSE_BLANKS_MIN = 2
_PROSE_SHARE_MIN = 0.5
#: Places are runs and counters, of which deltas leave almost nothing; zstd halves the rest.
_HIDDEN_FORMS = {name: ColumnForm(DELTAS) for name in HIDDEN_COLUMNS}


@dataclass(frozen=True, slots=True)
class FileColumns:
    """The columns of all outputs of one rewrite: the schema's, then the hidden ones."""

    kinds: tuple[tuple[str, int, ColumnType], ...]
    arrow: pa.Schema
    leaves: tuple[str, ...]

    @classmethod
    def of(cls, schema: TableSchema) -> FileColumns:
        kinds = tuple((c.name, c.column_id, parse_type(c.type)) for c in schema.columns)
        fields = [file_field(name, column_id, _file_type(kind)) for name, column_id, kind in kinds]
        fields += [
            file_field(name, HIDDEN_FIELD_IDS[name], HIDDEN_TYPES[name][1])
            for name in HIDDEN_COLUMNS
        ]
        arrow = pa.schema(fields)
        return cls(kinds, arrow, _leaves(arrow))

    def table(self, rows: pa.Table) -> pa.Table:
        """`rows` with the types of files. What DuckDB exports differs for uuid (bytes), json
        (plain text) and the name of the time zone; anything else is a bug and raises."""

        arrays = [_typed(kind, rows.column(name)) for name, _, kind in self.kinds]
        arrays += [rows.column(name) for name in HIDDEN_COLUMNS]
        return pa.Table.from_arrays(arrays, schema=self.arrow)


def _leaves(arrow: pa.Schema) -> tuple[str, ...]:
    """Paths of the columns in the file; a nested one has one for each of its scalars."""

    if not any(pa.types.is_nested(field.type) for field in arrow):
        return tuple(arrow.names)
    sink = pa.BufferOutputStream()
    pq.write_metadata(arrow, sink)
    schema = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return tuple(schema.column(place).path for place in range(len(schema)))


def _file_type(kind: ColumnType) -> pa.DataType:
    return in_file_type(kind, pa.nulls(0, kind.arrow)).type


def _typed(kind: ColumnType, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if kind.is_nested:
        return in_file_type(kind, relaid_column(kind, column, _typed_leaf))
    if isinstance(column.type, pa.BaseExtensionType):
        column = storage_of(column)
    if column.type != kind.storage:
        column = column.cast(kind.storage)
    if isinstance(kind.arrow, pa.BaseExtensionType):
        chunks = [pa.ExtensionArray.from_storage(kind.arrow, chunk) for chunk in column.chunks]
        column = pa.chunked_array(chunks, type=kind.arrow)
    return in_file_type(kind, column)


def _typed_leaf(kind: ColumnType, array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if array.type != kind.storage:
        array = array.cast(kind.storage)
    if isinstance(kind.arrow, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind.arrow, array)
    return array


@dataclass(frozen=True, slots=True)
class Choices:
    """How one file is written."""

    bounded: frozenset[str]
    forms: Mapping[str, ColumnForm]
    bloom: tuple[str, ...]


def choose(
    columns: FileColumns, groups: Sequence[pa.Table], *, unbounded: frozenset[str]
) -> Choices:
    """From the first row group, or the first two, which tell whether bounds keep groups apart."""

    first = groups[0]
    kinds = {name: kind for name, _, kind in columns.kinds}
    distinct = distinct_values(first, kinds)
    forms = choose_forms(kinds, first, distinct, whole=len(groups) > 1)
    bloom = [
        name
        for name, kind in kinds.items()
        if first.num_rows >= BLOOM_ROWS_MIN
        and len(groups) > 1
        and _filterable(kind)
        and distinct.get(name, 0) >= first.num_rows * _BLOOM_DISTINCT_SHARE_MIN
        and _overlap(first.column(name), groups[1].column(name)) >= _BLOOM_OVERLAP_MIN
        and not _is_prose(kind, first.column(name))
    ]
    names = frozenset(name for name, _, kind in columns.kinds if kind.family not in UNBOUNDED)
    return Choices(names - unbounded, forms | _HIDDEN_FORMS, tuple(bloom))


def _filterable(kind: ColumnType) -> bool:
    return kind.family in _BLOOM_FAMILIES and not 0 < kind.bits < _BLOOM_BITS_MIN


def _is_prose(kind: ColumnType, column: pa.ChunkedArray) -> bool:
    """Several words in a row: a message, a note, an address of a street. People look for a part of
    it and not for the whole, which is all that a filter knows of; and it would be the largest part
    of what a narrow row takes. Names of two words are shorter, and keys have no blanks."""

    if kind.family is not Family.VARCHAR:
        return False
    sample = column.slice(0, _PROSE_SAMPLE_ROWS).drop_null()
    if not len(sample):
        return False
    several = pc.and_(
        pc.greater_equal(pc.binary_length(sample), _PROSE_BYTES_MIN),
        pc.greater_equal(pc.count_substring(sample, " "), _PROSE_BLANKS_MIN),
    )
    return float(pc.mean(several.cast(pa.int8())).as_py()) >= _PROSE_SHARE_MIN


def _overlap(first: pa.ChunkedArray, second: pa.ChunkedArray) -> float:
    """The share of the second group's values that lie within the first one's bounds."""

    if isinstance(first.type, pa.BaseExtensionType):
        first, second = storage_of(first), storage_of(second)
    bounds = pc.min_max(first)
    step = max(1, len(second) // _OVERLAP_SAMPLE_ROWS)
    sample = second.take(pa.array(range(0, len(second), step)))
    if not bounds["min"].is_valid or sample.null_count == len(sample):
        return 0.0
    inside = pc.and_(pc.greater_equal(sample, bounds["min"]), pc.less_equal(sample, bounds["max"]))
    return float(pc.mean(inside.cast(pa.int8())).as_py())


class OutputFile:
    """A file being written. Nothing but its path exists until `close`, which may write it anew."""

    def __init__(self, path: Path, columns: FileColumns, choices: Choices) -> None:
        self._path = path
        self._columns = columns
        self._choices = choices
        self._contradicted: set[str] = set()
        self._groups: list[tuple[int, dict[int, ColumnStatistics]]] = []
        self._bloom_bytes = 0
        self._sink = pa.OSFile(str(path), "wb")
        self._writer: pq.ParquetWriter | None = None

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self._groups)

    @property
    def written_bytes(self) -> int:
        """Without the footer; filters count, though they are written at the end."""

        written: int = self._sink.tell()
        return written + self._bloom_bytes

    def put(self, group: pa.Table) -> None:
        """Appends one row group."""

        found: dict[int, ColumnStatistics] = {}
        for name, column_id, kind in self._columns.kinds:
            column = group.column(name)
            found[column_id] = column_statistics(kind, column)
            if name in self._choices.bounded and not group_may_have_bounds(
                kind, found[column_id], column
            ):
                self._contradicted.add(name)
        if self._writer is None:
            # Still free to choose: nothing has been written.
            self._choices = _without(self._choices, self._contradicted)
            self._contradicted.clear()
            self._writer = _writer(self._sink, self._columns, self._choices, group.num_rows)
        self._groups.append((group.num_rows, found))
        self._bloom_bytes += len(self._choices.bloom) * _bloom_bytes(group.num_rows)
        self._writer.write_table(group, row_group_size=max(1, group.num_rows))

    def close(self, partition: str | None) -> RewrittenFile:
        assert self._writer is not None, "an output without a row is never opened"
        self._writer.close()
        self._sink.close()
        if self._contradicted:
            self._write_again(_without(self._choices, self._contradicted))
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        statistics = {
            column_id: merged_statistics(
                kind, [(rows, found[column_id]) for rows, found in self._groups]
            )
            for _, column_id, kind in self._columns.kinds
        }
        return RewrittenFile(
            path=self._path,
            rows=self.rows,
            size_bytes=self._path.stat().st_size,
            sha256=sha256,
            statistics=statistics,
            partition=partition,
        )

    def abandon(self) -> None:
        """Lets the file descriptor go; what lies in the folder is the folder owner's to remove."""

        self._sink.close()

    def _write_again(self, choices: Choices) -> None:
        draft = self._path.with_suffix(".draft")
        self._path.rename(draft)
        source = pq.ParquetFile(draft)
        with pa.OSFile(str(self._path), "wb") as sink:
            writer = _writer(sink, self._columns, choices, self._groups[0][0])
            for number in range(source.num_row_groups):
                group = self._columns.table(source.read_row_group(number))
                writer.write_table(group, row_group_size=max(1, group.num_rows))
            writer.close()
        source.close()
        draft.unlink()


def _without(choices: Choices, contradicted: set[str]) -> Choices:
    return Choices(choices.bounded - contradicted, choices.forms, choices.bloom)


def _writer(
    sink: pa.NativeFile, columns: FileColumns, choices: Choices, group_rows: int
) -> pq.ParquetWriter:
    filters: dict[str, Any] = {
        name: {"ndv": group_rows, "fpp": BLOOM_FALSE_POSITIVES} for name in choices.bloom
    }
    return pq.ParquetWriter(
        sink,
        columns.arrow,
        **writer_options(choices.forms, columns.leaves),
        # The streams of split bytes lie behind each other in a page, and are kept apart by zstd if
        # they are long.
        max_rows_per_page=max(1, group_rows),
        write_statistics=[*HIDDEN_COLUMNS, *sorted(choices.bounded)],
        bloom_filter_options=filters or None,
        store_schema=False,
    )


def _bloom_bytes(rows: int) -> int:
    bits = int(8.5 * rows)
    return 1 << max(0, (bits - 1).bit_length() - 3)
