"""Data files: rows of one table as one Parquet object, and the SQL that reads such objects back.

A file names columns by field id, which is the column id; names inside are only for people. So a
rename, a drop and a late column need no rewrite: `scan_expression` asks DuckDB for field ids, a
missing one reads as NULL, and a narrower type in an old file is widened. What is inside of a nested
column never changes, so fields of structs have no ids and are found by name.

What makes the footer's statistics safe (contract D11), found by `tests/unit/test_pruning_D11.py`:

* Arrow's bounds leave NaN out while DuckDB orders NaN above everything, so DuckDB would skip rows:
  a float column that holds a NaN gets no statistics in the file at all.
* DuckDB 2.0 takes every row for a null when it looks for `IS NULL` in a chunk of text or blobs that
  is not dictionary-encoded and whose bounds are equal: such a column gets none either. JSON, whose
  bounds help nobody, never has any, nor have lists, structs and maps.
* Arrow writes a zero minimum as -0.0 and a zero maximum as 0.0, and leaves out bounds of text
  longer than 4 KiB instead of cutting them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lakebus.errors import Corrupt, SchemaInvalid
from lakebus.schemas import (
    HIDDEN_COLUMNS,
    POSITION_COLUMN,
    ROW_COLUMN,
    SHARD_COLUMN,
    TableSchema,
)
from lakebus.snapshots import ColumnStatistics
from storage.files.statistics import UNBOUNDED, storage_of, table_statistics
from storage.rows.nested_arrays import relaid_column
from storage.rows.types import ColumnType, Family, parse_type

#: Field ids of the hidden columns: far above any column id, and below the ids from 2147483539 up
#: that DuckDB and Iceberg keep for themselves.
SHARD_FIELD_ID: Final = 2_000_000_001
POSITION_FIELD_ID: Final = 2_000_000_002
ROW_FIELD_ID: Final = 2_000_000_003
HIDDEN_FIELD_IDS: Final[Mapping[str, int]] = {
    SHARD_COLUMN: SHARD_FIELD_ID,
    POSITION_COLUMN: POSITION_FIELD_ID,
    ROW_COLUMN: ROW_FIELD_ID,
}
HIDDEN_TYPES: Final[Mapping[str, tuple[str, pa.DataType]]] = {
    SHARD_COLUMN: ("smallint", pa.int16()),
    POSITION_COLUMN: ("bigint", pa.int64()),
    ROW_COLUMN: ("integer", pa.int32()),
}

#: DuckDB's own vector-friendly group: one thread's unit of work.
ROW_GROUP_ROWS: Final = 122_880

_PATTERN_CHARACTERS = frozenset("*?[")
_FIELD_ID_KEY = b"PARQUET:field_id"
#: Below this, looking for what repeats costs more time than zstd leaves a dictionary bytes to save
#: (a fiftieth), and the file is soon compacted anyway.
_DICTIONARY_ROWS_MIN = 16_384
_SAMPLE_ROWS = 1024
_DISTINCT_SHARE_MAX = 0.5
#: Positions and rows are runs and counters; deltas shrink them to almost nothing.
HIDDEN_ENCODING = dict.fromkeys(HIDDEN_COLUMNS, "DELTA_BINARY_PACKED")


@dataclass(frozen=True, slots=True)
class EncodedFile:
    """A finished Parquet object and what the catalog records about it."""

    data: bytes
    rows: int
    size_bytes: int
    sha256: str
    statistics: dict[int, ColumnStatistics]


@dataclass(frozen=True, slots=True)
class FileFooter:
    """`columns`: name in the file and Arrow type by field id, hidden columns among them."""

    rows: int
    row_groups: int
    columns: Mapping[int, tuple[str, pa.DataType]]


def encode_data_file(
    schema: TableSchema,
    rows: pa.Table | pa.RecordBatch,
    *,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> EncodedFile:
    """Encodes rows as one Parquet file.

    Columns of `rows` are named `str(column_id)`, plus the three hidden ones. Columns of the schema
    that `rows` lacks are left out of the file and read as NULL. Raises ValueError for columns that
    the schema lacks, for missing hidden columns, and for types that are not the schema's: those
    are bugs of the caller.
    """

    given = dict(zip(rows.schema.names, rows.columns, strict=True))
    fields: list[pa.Field] = []
    arrays: list[pa.Array | pa.ChunkedArray] = []
    by_id: dict[int, pa.Array | pa.ChunkedArray] = {}
    for column in schema.columns:
        array = given.pop(str(column.column_id), None)
        if array is None:
            continue
        array = in_file_type(parse_type(column.type), array)
        by_id[column.column_id] = array
        fields.append(file_field(column.name, column.column_id, array.type))
        arrays.append(array)
    for name, (_, arrow) in HIDDEN_TYPES.items():
        array = given.pop(name, None)
        if array is None or array.type != arrow:
            raise ValueError(f"data files need the hidden column {name} as {arrow}")
        fields.append(file_field(name, HIDDEN_FIELD_IDS[name], arrow))
        arrays.append(array)
    if given:
        raise ValueError(f"columns {sorted(given)} are not columns of table {schema.name}")
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields))
    statistics = table_statistics(schema, by_id)
    bounded = [*HIDDEN_COLUMNS]
    for column in schema.columns:
        found = statistics.get(column.column_id)
        kind = parse_type(column.type)
        if found and _footer_may_bound(kind, found, by_id[column.column_id], row_group_rows):
            bounded.append(column.name)
    data = _write(table, bounded, row_group_rows=row_group_rows)
    digest = hashlib.sha256(data).hexdigest()
    return EncodedFile(data, table.num_rows, len(data), digest, statistics)


@functools.lru_cache(maxsize=4096)
def file_field(name: str, field_id: int, arrow: pa.DataType) -> pa.Field:
    """A column as data files have it: known by its field id."""

    return pa.field(name, arrow, metadata={_FIELD_ID_KEY: str(field_id).encode()})


def in_file_type(kind: ColumnType, array: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """`array`, of the column's Arrow type, as data files hold it. Raises ValueError otherwise."""

    if array.type != kind.arrow:
        raise ValueError(f"a column of type {kind.sql} came as {array.type}, not {kind.arrow}")
    if kind.family is Family.JSON:
        # Marked as JSON in the file, DuckDB takes the text as it is; unmarked, it would parse
        # every value again to cast it.
        return _as_extension(_JSON, array)
    if kind.is_nested and _holds_json(kind):
        return relaid_column(kind, array, _leaf_in_file)
    return array


_JSON = pa.json_(pa.string())


def _holds_json(kind: ColumnType) -> bool:
    return kind.family is Family.JSON or any(map(_holds_json, kind.children))


def _leaf_in_file(kind: ColumnType, array: pa.Array) -> pa.Array:
    return _as_extension(_JSON, array) if kind.family is Family.JSON else array


def _as_extension(
    extension: pa.DataType, array: pa.Array | pa.ChunkedArray
) -> pa.Array | pa.ChunkedArray:
    if isinstance(array, pa.ChunkedArray):
        chunks = [pa.ExtensionArray.from_storage(extension, chunk) for chunk in array.chunks]
        return pa.chunked_array(chunks, type=extension)
    return pa.ExtensionArray.from_storage(extension, array)


def _footer_may_bound(
    kind: ColumnType,
    statistics: ColumnStatistics,
    values: pa.Array | pa.ChunkedArray,
    row_group_rows: int,
) -> bool:
    """False for the columns whose bounds DuckDB would misread; the module's head says which."""

    if len(values) <= row_group_rows or statistics.null_count == 0:
        return group_may_have_bounds(kind, statistics, values)
    if kind.family not in (Family.VARCHAR, Family.BLOB):
        return group_may_have_bounds(kind, statistics, values)
    groups = (
        values.slice(start, row_group_rows) for start in range(0, len(values), row_group_rows)
    )
    return not any(group.null_count and _is_constant(group) for group in groups)


def group_may_have_bounds(
    kind: ColumnType, statistics: ColumnStatistics, group: pa.Array | pa.ChunkedArray
) -> bool:
    """Whether one row group lets its column have bounds in the footer; a file gives a column
    bounds only if every group does. `statistics` are the group's."""

    if kind.family in UNBOUNDED:
        return False
    if kind.family is Family.FLOAT:
        # No bound beside a value: a NaN.
        return statistics.minimum is not None or statistics.null_count == len(group)
    if kind.family not in (Family.VARCHAR, Family.BLOB) or statistics.null_count == 0:
        return True
    return not _is_constant(group)


def _is_constant(group: pa.Array | pa.ChunkedArray) -> bool:
    bounds = pc.min_max(group)
    return bool(bounds["min"].is_valid and bounds["min"] == bounds["max"])


def _write(table: pa.Table, bounded: list[str], *, row_group_rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        use_dictionary=_repeating_columns(table) or False,
        column_encoding=HIDDEN_ENCODING,
        write_statistics=bounded,
        store_schema=False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _repeating_columns(table: pa.Table) -> list[str]:
    """Columns whose values repeat, by a sample spread over the whole table."""

    if table.num_rows < _DICTIONARY_ROWS_MIN:
        return []
    step = max(1, table.num_rows // _SAMPLE_ROWS)
    sample = table.take(pa.array(range(0, table.num_rows, step)))
    most = sample.num_rows * _DISTINCT_SHARE_MAX
    return [name for name, distinct in distinct_counts(sample).items() if distinct <= most]


def distinct_counts(table: pa.Table) -> dict[str, int]:
    """How many values each column has that could take a dictionary.

    Arrow gives a dictionary up only when it has grown past a megabyte; a dictionary of values that
    hardly repeat costs time and bytes.
    """

    found: dict[str, int] = {}
    for name in table.schema.names:
        column = table.column(name)
        if name in HIDDEN_TYPES or pa.types.is_boolean(column.type):
            continue
        if pa.types.is_nested(column.type):
            continue  # no kernel counts them
        if isinstance(column.type, pa.BaseExtensionType):
            column = storage_of(column)
        found[name] = pc.count_distinct(column).as_py()
    return found


def read_footer(source: bytes | Path) -> FileFooter:
    """Row count and columns from the footer alone. Raises Corrupt when it is not a data file."""

    try:
        file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
        metadata, schema = file.metadata, file.schema_arrow
        file.close()
    except (pa.ArrowException, OSError) as error:
        raise Corrupt("a data file has no readable Parquet footer") from error
    columns: dict[int, tuple[str, pa.DataType]] = {}
    for field in schema:
        field_id = (field.metadata or {}).get(_FIELD_ID_KEY)
        if field_id is None:
            raise Corrupt(f"column {field.name} of a data file has no field id")
        columns[int(field_id)] = (field.name, field.type)
    return FileFooter(metadata.num_rows, metadata.num_row_groups, columns)


# --- reading -------------------------------------------------------------------------------


def scan_expression(
    schema: TableSchema,
    paths: Sequence[str],
    *,
    hidden: bool = False,
    ordered: bool = False,
    by_name: bool = False,
) -> str:
    """SQL of a relation with the schema's columns over these files, in parentheses.

    `hidden` puts the three hidden columns first. `ordered` gives the rows in (shard, position,
    row) order, for deterministic reads on one thread. `by_name`: each of the files has all columns
    of the schema, under these names and with these types (`storage.reading.shapes`), so that DuckDB
    need not map field ids. The relation is a subquery on purpose: a bare `read_parquet` would offer
    its virtual columns (`filename` …) to whoever names them.
    Raises SchemaInvalid for a table without columns, ValueError for a path that is a pattern.
    """

    columns = [(c.column_id, c.name, c.type) for c in schema.columns]
    if hidden:
        columns = [*((HIDDEN_FIELD_IDS[n], n, HIDDEN_TYPES[n][0]) for n in HIDDEN_TYPES), *columns]
    if not columns:
        raise SchemaInvalid(f"the table {schema.name} has no columns to read")
    structs = {column.name for column in schema.columns if _is_struct(column.type)}
    if not paths:
        nothing = ", ".join(f'NULL::{type_} AS "{name}"' for _, name, type_ in columns)
        return f"(SELECT {nothing} WHERE false)"
    names = ", ".join(_whole(name) if name in structs else f'"{name}"' for _, name, _ in columns)
    order = ""
    if ordered:
        order = " ORDER BY " + ", ".join(f'"{name}"' for name in HIDDEN_COLUMNS)
        if not hidden:
            columns += [(HIDDEN_FIELD_IDS[n], n, HIDDEN_TYPES[n][0]) for n in HIDDEN_TYPES]
    return f"(SELECT {names} FROM {_read_parquet(None if by_name else columns, paths)}{order})"


def _is_struct(sql_type: str) -> bool:
    return sql_type.startswith("struct(") and not sql_type.endswith("]")


def _whole(name: str) -> str:
    """A struct that is read as a whole. DuckDB 2.0 reads only the fields that a query names, and in
    a file without the column, where the whole struct is the default, that is an internal error
    which ends its database; it does not look through an expression."""

    return f'coalesce("{name}", NULL) AS "{name}"'


def _read_parquet(columns: Sequence[tuple[int, str, str]] | None, paths: Sequence[str]) -> str:
    """`columns`: by field id; None for those that the files have."""

    mapped = ""
    if columns is not None:
        fields = ", ".join(
            f"{field_id}: {{name: '{name}', type: '{type_}', default_value: NULL}}"
            for field_id, name, type_ in columns
        )
        mapped = f"schema=MAP {{{fields}}}, "
    files = ", ".join(_literal(path) for path in paths)
    if not _PATTERN_CHARACTERS.isdisjoint(files):
        # DuckDB would read such a path as a pattern, and other files with it.
        raise ValueError("paths of data files must not contain any of * ? [")
    # hive_partitioning: else a folder named like `a=b` would become a column.
    return f"read_parquet([{files}], {mapped}hive_partitioning=false)"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
