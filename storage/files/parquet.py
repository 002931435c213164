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
from storage.files.statistics import UNBOUNDED, column_statistics, storage_of, table_statistics
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
_DELTAS = "DELTA_BINARY_PACKED"
#: Rows of fewer bytes in memory become a file that is soon merged (three times
#: `maintenance.small_file_bytes`: what lz4 does not bring below a third of its size, zstd hardly
#: makes much smaller), so lz4 has to do: it takes a third of the time, and a fifth more bytes.
_SOON_MERGED_BYTES = 24 * 1024 * 1024
#: Decimals of more digits are bytes in a file, not integers.
_INTEGER_DIGITS_MAX = 18
_FOOTER_ROWS_MIN = 4096
#: Of longer texts Arrow writes no bounds.
_FOOTER_TEXT_MAX = 1024


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
    # The writer compares whole texts too; twice would be a tenth of all that is done here.
    texts = {
        column.column_id: column.name
        for column in schema.columns
        if column.column_id in by_id
        and _bounds_come_with_the_file(column.type, by_id[column.column_id])
    }
    statistics = table_statistics(schema, {n: a for n, a in by_id.items() if n not in texts})
    bounded = [*HIDDEN_COLUMNS, *texts.values()]
    for column in schema.columns:
        found = statistics.get(column.column_id)
        kind = parse_type(column.type)
        if found and _footer_may_bound(kind, found, by_id[column.column_id], row_group_rows):
            bounded.append(column.name)
    data, footer = _write(table, bounded, row_group_rows=row_group_rows)
    for column_id, name in texts.items():
        values = table.column(name)
        bounds = _text_bounds(footer, name)
        statistics[column_id] = column_statistics(
            parse_type("varchar"), values if bounds is None else pa.array(bounds, pa.string())
        )
    digest = hashlib.sha256(data).hexdigest()
    return EncodedFile(data, table.num_rows, len(data), digest, dict(sorted(statistics.items())))


def _bounds_come_with_the_file(sql_type: str, values: pa.Array | pa.ChunkedArray) -> bool:
    """Texts without a null always have bounds in the footer, unless they are too long. Looking for
    them there takes as long as comparing the texts of some thousand rows."""

    return (
        len(values) >= _FOOTER_ROWS_MIN
        and parse_type(sql_type).family is Family.VARCHAR
        and not values.null_count
    )


def _text_bounds(footer: pq.FileMetaData, name: str) -> list[str] | None:
    """The least and the greatest text of each row group, None when one does not have them."""

    found: list[str] = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = map(group.column, range(group.num_columns))
        bounds = next(c.statistics for c in columns if c.path_in_schema == name)
        if bounds is None or not bounds.has_min_max:
            return None
        found += (bounds.min, bounds.max)
    return None if not found or max(map(len, found)) > _FOOTER_TEXT_MAX else found


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


def _write(
    table: pa.Table, bounded: list[str], *, row_group_rows: int
) -> tuple[bytes, pq.FileMetaData]:
    """The file and its footer."""

    repeating = _repeating_columns(table)
    packed = [f.name for f in table.schema if _packs(f.type) and f.name not in repeating]
    packed += HIDDEN_COLUMNS
    codec = "lz4" if table.nbytes < _SOON_MERGED_BYTES else "zstd"
    codecs: str | dict[str, str] = codec
    if not any(pa.types.is_nested(f.type) for f in table.schema):  # their leaves have other names
        codecs = {name: "none" if name in packed else codec for name in table.schema.names}
    sink = pa.BufferOutputStream()
    footers: list[pq.FileMetaData] = []
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression=codecs,
        use_dictionary=repeating or False,
        column_encoding=dict.fromkeys(packed, _DELTAS),
        store_decimal_as_integer=True,
        write_statistics=bounded,
        store_schema=False,
        metadata_collector=footers,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data, footers[0]


#: By Arrow type: integers of any width, times and dates.
_PACKED = frozenset(
    kind.id
    for kind in (
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
        *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.timestamp("us"), pa.time64("us"), pa.date32()),
    )
)
_DECIMAL = pa.decimal128(1).id


def _packs(kind: pa.DataType) -> bool:
    """Whether values are integers in a file. Their differences in as many bits as they need are
    smaller than what zstd makes of them as they are, sooner written, and sooner read."""

    return kind.id in _PACKED or (kind.id == _DECIMAL and kind.precision <= _INTEGER_DIGITS_MAX)


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
