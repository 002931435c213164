"""One data file, read whole: its bytes, its shape, its statistics and the places of its rows.

Blocking, for a thread. A file is read by row groups, and only its rows' places (8 bytes for each
position) are kept meanwhile. A file whose bytes are not those that were published is not judged any
further: what it seems to say would be noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lakebus.errors import Corrupt
from lakebus.schemas import HIDDEN_COLUMNS, POSITION_COLUMN, SHARD_COLUMN, Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.files.parquet import HIDDEN_FIELD_IDS, HIDDEN_TYPES, FileFooter, read_footer
from storage.files.statistics import BOUND_READERS, column_statistics, has_nan, storage_of
from storage.rows.types import ColumnType, Family, parse_type

_CHUNK_BYTES = 1024 * 1024
_FIELD_ID_KEY = b"PARQUET:field_id"
_TEXT = (Family.VARCHAR, Family.BLOB)

#: Takes the hidden columns of each row group.
TakePlaces = Callable[[pa.Table], None]


@dataclass(slots=True)
class Contents:
    """What reading told. `positions`: the distinct positions of each shard, sorted. `whole`: its
    rows were read to the end."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    positions: dict[int, pa.Array] = field(default_factory=dict)
    whole: bool = False


def read_contents(
    file: DataFile, schema: TableSchema, path: Path, *, take_places: TakePlaces | None = None
) -> Contents:
    """Judges the file of the catalog's row by the bytes at `path`. Raises OSError."""

    contents = Contents()
    digest = sha256_of(path)
    if digest != file.sha256:
        contents.findings.append(
            ("checksum_differs", f"its SHA-256 is {digest}, and {file.sha256} was published")
        )
    try:
        footer = read_footer(path)
    except Corrupt as error:
        contents.findings.append(("unreadable_footer", str(error)))
        return contents
    if contents.findings:
        return contents
    if footer.rows != file.rows:
        contents.findings.append(
            ("footer_rows_differ", f"it holds {footer.rows} rows, and the catalog says {file.rows}")
        )
    shape = shape_differences(schema, footer)
    if shape:
        contents.findings.append(("schema_differs", "; ".join(shape)))
        return contents
    try:
        _read_rows(file, schema, path, contents, take_places)
    except (pa.ArrowException, OSError) as error:
        contents.findings.append(("unreadable_rows", f"reading its rows fails: {error}"))
    return contents


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- shape ---------------------------------------------------------------------------------


def shape_differences(schema: TableSchema, footer: FileFooter) -> list[str]:
    """In words, by field id. Columns that the file lacks read as null and are no difference."""

    wanted = {c.column_id: parse_type(c.type).arrow for c in schema.columns}
    wanted |= {HIDDEN_FIELD_IDS[name]: arrow for name, (_, arrow) in HIDDEN_TYPES.items()}
    words = [
        f"it lacks the hidden column {name}"
        for name, field_id in HIDDEN_FIELD_IDS.items()
        if field_id not in footer.columns
    ]
    for field_id, (name, arrow) in footer.columns.items():
        if field_id not in wanted:
            words.append(f"its column {name} has the id {field_id}, which the schema lacks")
        elif _plain(arrow) != _plain(wanted[field_id]):
            words.append(f"its column {name} is {arrow}, not {wanted[field_id]}")
    return words


def _plain(arrow: pa.DataType) -> pa.DataType:
    """Without extensions, also inside; lists and maps are named alike whoever wrote them."""

    if isinstance(arrow, pa.BaseExtensionType):
        return arrow.storage_type
    if pa.types.is_struct(arrow):
        return pa.struct([(field.name, _plain(field.type)) for field in arrow])
    if pa.types.is_map(arrow):
        return pa.map_(_plain(arrow.key_type), _plain(arrow.item_type))
    return pa.list_(_plain(arrow.value_type)) if pa.types.is_list(arrow) else arrow


# --- rows ----------------------------------------------------------------------------------


def _read_rows(
    file: DataFile,
    schema: TableSchema,
    path: Path,
    contents: Contents,
    take_places: TakePlaces | None,
) -> None:
    by_id = {column.column_id: column for column in schema.columns}
    judges: dict[str, _Judge] = {}
    with pq.ParquetFile(path) as parquet:
        names = {int(f.metadata[_FIELD_ID_KEY]): f.name for f in parquet.schema_arrow}
        for column_id, claim in file.statistics.items():
            if column_id in names and column_id in by_id:
                judges[names[column_id]] = _Judge(by_id[column_id], claim)
            else:
                contents.findings.append(
                    ("statistics_false", f"they tell of column {column_id}, which the file lacks")
                )
        places = _Places()
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=[*judges, *HIDDEN_COLUMNS])
            for name, judge in judges.items():
                judge.look_at(rows.column(name))
            places.look_at(rows)
            if take_places is not None:
                take_places(rows.select(HIDDEN_COLUMNS))
    false = [words for judge in judges.values() if (words := judge.verdict())]
    if false:
        contents.findings.append(("statistics_false", "; ".join(false)))
    contents.positions = places.positions
    contents.whole = True


class _Places:
    """Distinct positions by shard."""

    def __init__(self) -> None:
        self.positions: dict[int, pa.Array] = {}

    def look_at(self, rows: pa.Table) -> None:
        shards = rows.column(SHARD_COLUMN)
        for shard in pc.unique(shards).to_pylist():
            mine = pc.unique(rows.column(POSITION_COLUMN).filter(pc.equal(shards, shard)))
            known = self.positions.get(shard)
            if known is not None:
                mine = pc.unique(pa.concat_arrays([known, mine]))
            self.positions[shard] = mine


class _Judge:
    """One column against what the catalog claims of it."""

    def __init__(self, column: Column, claim: ColumnStatistics) -> None:
        self._column = column
        self._claim = claim
        self._kind = parse_type(column.type)
        self._nulls = 0
        self._words: str | None = None
        read = BOUND_READERS.get(self._kind.family)
        self._low = _bound(read, claim.minimum)
        self._high = _bound(read, claim.maximum)

    def look_at(self, values: pa.ChunkedArray) -> None:
        self._nulls += values.null_count
        if self._words is not None or values.null_count == len(values):
            return
        if self._claim.minimum is None and self._claim.maximum is None:
            return
        if self._kind.family is Family.FLOAT and has_nan(values):
            self._words = "a bound is claimed, and there is a NaN"
            return
        low, high = _bounds(self._kind, values)
        if self._low is not None and low is not None and low < self._low:
            self._words = f"there is a value below the minimum {self._claim.minimum!r}"
        elif self._high is not None and high is not None and high > self._high:
            self._words = f"there is a value above the maximum {self._claim.maximum!r}"

    def verdict(self) -> str | None:
        words = self._words
        if self._nulls != self._claim.null_count:
            words = f"there are {self._nulls} nulls, and {self._claim.null_count} are claimed"
        return None if words is None else f"column {self._column.name}: {words}"


def _bound(read: Callable[[str], Any] | None, text: str | None) -> Any:
    return None if read is None or text is None else read(text)


def _bounds(kind: ColumnType, values: pa.ChunkedArray) -> tuple[Any, Any]:
    """The least and the greatest value, as `BOUND_READERS` orders them."""

    if kind.family in _TEXT:
        # Not by their statistics, which cut them.
        found = pc.min_max(values)
        least, greatest = found["min"].as_py(), found["max"].as_py()
        if kind.family is Family.VARCHAR:
            return least.encode(), greatest.encode()
        return least, greatest
    told = column_statistics(kind, values)
    read = BOUND_READERS.get(kind.family)
    return _bound(read, told.minimum), _bound(read, told.maximum)


# --- statistics that the file itself shows ---------------------------------------------------


def true_statistics(schema: TableSchema, path: Path) -> dict[int, ColumnStatistics]:
    """What the catalog may claim of the file: recomputed by row groups, and joined. A bound that
    one group cannot claim, none does. Raises OSError, Corrupt, pa.ArrowException."""

    by_id = {column.column_id: parse_type(column.type) for column in schema.columns}
    told: dict[int, list[tuple[int, ColumnStatistics]]] = {}
    with pq.ParquetFile(path) as parquet:
        names = {int(f.metadata[_FIELD_ID_KEY]): f.name for f in parquet.schema_arrow}
        for group in range(parquet.num_row_groups):
            for column_id, kind in by_id.items():
                if column_id in names:
                    rows = parquet.read_row_group(group, columns=[names[column_id]])
                    values = rows.column(0)
                    one = column_statistics(kind, _typed(values))
                    told.setdefault(column_id, []).append((len(values), one))
    return {column_id: _joined(by_id[column_id], groups) for column_id, groups in told.items()}


def _typed(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return storage_of(values) if isinstance(values.type, pa.BaseExtensionType) else values


def _joined(kind: ColumnType, groups: list[tuple[int, ColumnStatistics]]) -> ColumnStatistics:
    nulls = sum(one.null_count for _, one in groups)
    filled = [one for rows, one in groups if one.null_count < rows]
    read = BOUND_READERS.get(kind.family)
    if read is None or not filled:
        return ColumnStatistics(nulls)
    lows = [one.minimum for one in filled]
    highs = [one.maximum for one in filled]
    return ColumnStatistics(
        nulls,
        None if None in lows else min((low for low in lows if low is not None), key=read),
        None if None in highs else max((high for high in highs if high is not None), key=read),
    )


def positions_outside(
    positions: Mapping[int, pa.Array], shard: int, intervals: list[tuple[int, int]]
) -> int:
    """How many distinct positions of the shard lie in the intervals [lo, hi)."""

    mine = positions[shard]
    count = 0
    for lo, hi in intervals:
        inside = pc.and_(pc.greater_equal(mine, lo), pc.less(mine, hi))
        count += pc.sum(inside).as_py() or 0
    return count
