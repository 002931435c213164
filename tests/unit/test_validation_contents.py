"""Reading a data file for the validator: true of every type, and of several row groups."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from lakebus.clock import new_uuid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.catalog.interface import PublishedRange
from storage.files.parquet import HIDDEN_TYPES, encode_data_file
from storage.maintenance.checks.contents import read_contents, true_statistics
from storage.maintenance.checks.places import PlaceTable, unpublished_intervals
from storage.maintenance.findings import FINDINGS
from storage.rows.types import parse_type

_DAY = dt.date(2024, 2, 29)
_TIME = dt.datetime.fromisoformat("2024-02-29T12:00:00.123456")
VALUES: dict[str, list[object]] = {
    "boolean": [True, False],
    "tinyint": [-128, 127],
    "smallint": [-5, 5],
    "integer": [-(2**31), 7],
    "bigint": [2**62, -1],
    "utinyint": [0, 255],
    "usmallint": [1, 65535],
    "uinteger": [1, 2**32 - 1],
    "ubigint": [0, 2**64 - 1],
    "float": [-0.0, 1.5],
    "double": [float("inf"), float("nan")],
    "decimal(18,3)": [Decimal("-1.250"), Decimal("3.000")],
    "varchar": ["é" * 80, "", "a\x00b", "\U0010ffff" * 20],
    "blob": [b"\xff" * 70, b"", b"\x00"],
    "date": [_DAY, dt.date(1, 1, 1)],
    "time": [dt.time(1, 2, 3, 4), dt.time(23, 59, 59)],
    "timestamp": [_TIME, dt.datetime.fromisoformat("1969-01-01")],
    "timestamptz": [_TIME.replace(tzinfo=dt.UTC)],
    "uuid": [uuid.UUID(int=5).bytes, uuid.UUID(int=2**127).bytes],
    "json": ['{"a":1}', "null"],
}
SCHEMA = TableSchema(
    7, "t", 1, tuple(Column(n, f"c{n}", sql) for n, sql in enumerate(VALUES, start=1))
)


def rows() -> pa.Table:
    """Values and nulls of every type, longer than two small row groups."""
    columns: dict[str, pa.Array] = {}
    for number, (sql, given) in enumerate(VALUES.items(), start=1):
        kind = parse_type(sql)
        values = pa.array([None, *(given[n % len(given)] for n in range(8))], kind.storage)
        if isinstance(kind.arrow, pa.BaseExtensionType):
            values = pa.ExtensionArray.from_storage(kind.arrow, values)
        columns[str(number)] = values
    for place, (name, (_, arrow)) in enumerate(HIDDEN_TYPES.items()):
        columns[name] = pa.array([place * n for n in range(9)], arrow)
    return pa.table(columns)


def written(tmp_path: Path) -> tuple[DataFile, Path]:
    encoded = encode_data_file(SCHEMA, rows(), row_group_rows=4)
    path = tmp_path / "file.parquet"
    path.write_bytes(encoded.data)
    file = DataFile(
        file_id=new_uuid(),
        table_id=7,
        schema_version=1,
        object_key="tables/7/file.parquet",
        rows=encoded.rows,
        size_bytes=encoded.size_bytes,
        sha256=encoded.sha256,
        statistics=encoded.statistics,
    )
    return file, path


def test_E6_a_true_file_of_every_type_has_no_findings(tmp_path: Path) -> None:
    file, path = written(tmp_path)
    contents = read_contents(file, SCHEMA, path)
    assert contents.findings == []
    assert contents.whole
    assert sorted(contents.positions[0].to_pylist()) == list(range(9))


def test_statistics_are_joined_over_row_groups_as_they_were_made(tmp_path: Path) -> None:
    file, path = written(tmp_path)
    joined = true_statistics(SCHEMA, path)
    assert joined.keys() == file.statistics.keys()
    for column_id, made in file.statistics.items():
        assert joined[column_id] == made, SCHEMA.columns[column_id - 1].type


@pytest.mark.parametrize("column", SCHEMA.columns, ids=lambda column: column.type)
def test_E6_a_wrong_null_count_is_false_of_every_type(tmp_path: Path, column: Column) -> None:
    file, path = written(tmp_path)
    claims = dict(file.statistics)
    claim = claims[column.column_id]
    claims[column.column_id] = ColumnStatistics(0, claim.minimum, claim.maximum)
    forged = DataFile(
        **{
            name: getattr(file, name)
            for name in ("file_id", "table_id", "schema_version", "object_key")
        },
        rows=file.rows,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        statistics=claims,
    )
    (found,) = read_contents(forged, SCHEMA, path).findings
    assert found[0] == "statistics_false"
    assert f"column {column.name}:" in found[1]


def test_what_was_not_published_in_time_is_cut_out_of_the_ranges() -> None:
    ranges = [PublishedRange(0, 0, 5, 2), PublishedRange(0, 5, 8, 9), PublishedRange(0, 10, 12, 3)]
    assert unpublished_intervals(ranges, lo=0, hi=12, snapshot_id=9) == [(8, 10)]
    assert unpublished_intervals(ranges, lo=2, hi=14, snapshot_id=3) == [(5, 10), (12, 14)]
    assert unpublished_intervals(ranges, lo=0, hi=5, snapshot_id=2) == []
    assert unpublished_intervals([], lo=3, hi=4, snapshot_id=1) == [(3, 4)]


def test_places_that_are_there_twice_name_their_files(tmp_path: Path) -> None:
    table = PlaceTable(tmp_path, memory_bytes=64 * 1024 * 1024, threads=1)
    one, _ = written(tmp_path)
    two, _ = written(tmp_path)
    hidden = rows().select([*HIDDEN_TYPES])
    table.add(one, hidden.slice(0, 5))
    table.add(two, hidden.slice(4, 3))
    table.add(two, hidden.slice(6, 3))
    found = {(twice.files, twice.rows, twice.position) for twice in table.twice()}
    table.close()
    assert found == {((one.file_id, two.file_id), 1, 4), ((two.file_id, two.file_id), 1, 6)}


def test_docs_and_code_list_the_same_findings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()
    written = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| `") and line.count("|") == 6
    ]
    assert written == [
        [
            f"`{kind.code}`",
            kind.severity.value,
            kind.meaning,
            kind.hint,
            "yes" if kind.repairable else "no",
        ]
        for kind in FINDINGS
    ]
    assert len({kind.code for kind in FINDINGS}) == len(FINDINGS)
