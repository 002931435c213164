"""Files that are read by the names of their columns: only where names say what ids say (D1)."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.files.parquet import encode_data_file, scan_expression
from storage.reading.shapes import by_names
from tests.unit.test_files_parquet import rows_of
from tests.unit.test_nested_files import COLUMNS as NESTED
from tests.unit.test_nested_files import row
from tests.unit.test_nested_files import rows_of as nested_rows

#: One value of each scalar type.
SCALARS: Mapping[str, Any] = {
    "boolean": True, "tinyint": -128, "smallint": 32767, "integer": -7, "bigint": 2**63 - 1,
    "utinyint": 255, "usmallint": 65535, "uinteger": 2**32 - 1, "ubigint": 2**64 - 1,
    "float": 0.5, "double": -0.0, "decimal(5,2)": None, "decimal(12,3)": None,
    "decimal(38,5)": None, "varchar": "\U0010ffff\0é", "blob": b"\xff\0", "date": 2**31 - 1,
    "time": 86_400_000_000, "timestamp": 1, "timestamptz": -1, "uuid": b"\xff" * 16,
    "json": '{"a":  1}',
}  # fmt: skip


def schema_of(version: int, *columns: tuple[int, str, str], **more: Any) -> TableSchema:
    return TableSchema(1, "t", version, tuple(Column(*column) for column in columns), **more)


def file_of(version: int, *ids: int) -> DataFile:
    """`ids`: the columns that it has."""

    known = {column_id: ColumnStatistics(0) for column_id in ids}
    return DataFile(uuid.UUID(int=version), 1, version, "tables/1/x.parquet", 1, 1, "", known)


def versions(*schemas: TableSchema) -> Callable[[int], TableSchema | None]:
    return {schema.version: schema for schema in schemas}.get


FIRST = schema_of(1, (1, "a", "integer"), (2, "b", "varchar"))


@pytest.mark.parametrize(
    ("now", "by_name"),
    [
        (schema_of(2, (1, "a", "integer"), (2, "b", "varchar"), sort_by=("a",)), True),
        (schema_of(2, (2, "b", "varchar"), (1, "a", "integer")), True),
        (schema_of(2, (1, "c", "integer"), (2, "b", "varchar")), False),
        (schema_of(2, (1, "b", "integer"), (2, "a", "varchar")), False),
        (schema_of(2, (3, "a", "integer"), (2, "b", "varchar")), False),
        (schema_of(2, (1, "a", "bigint"), (2, "b", "varchar")), False),
        (schema_of(2, (1, "a", "integer")), False),
        (schema_of(2, (1, "a", "integer"), (2, "b", "varchar"), (3, "c", "date")), False),
    ],
    ids=[
        "same", "moved", "renamed", "swapped_names", "made_again", "widened", "dropped", "added",
    ],
)  # fmt: skip
def test_D1_files_of_another_version_are_read_by_name_only_if_it_has_the_same_columns(
    now: TableSchema, by_name: bool
) -> None:
    known = versions(FIRST, now)
    ids = [column.column_id for column in now.columns]
    old, new = file_of(1, 1, 2, 3), file_of(2, *ids)
    assert by_names(now, [new, new], known)
    assert by_names(now, [new, old], known) is by_name
    assert by_names(now, [old], known) is by_name
    assert by_names(FIRST, [file_of(1, 1, 2)], known)


def test_D1_a_version_that_nobody_knows_is_read_by_ids() -> None:
    assert not by_names(FIRST, [file_of(1, 1, 2), file_of(7, 1, 2)], versions(FIRST))


def test_D1_a_file_that_lacks_a_column_is_read_by_ids() -> None:
    """Rows that came before the column was added, in a file of the version that has it."""

    assert not by_names(FIRST, [file_of(1, 1, 2), file_of(1, 1)], versions(FIRST))


def test_columns_that_differ_in_what_readers_do_not_see_are_the_same() -> None:
    columns = tuple(dataclasses.replace(column, nullable=False) for column in FIRST.columns)
    now = dataclasses.replace(FIRST, version=2, columns=columns)
    assert by_names(now, [file_of(1, 1, 2)], versions(FIRST, now))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_D1_names_and_ids_read_the_same_of_every_type(
    tmp_path: Path, hidden: bool, ordered: bool
) -> None:
    scalars = schema_of(1, *((n, f"c{n}", kind) for n, kind in enumerate(SCALARS, start=1)))
    values = {n: [value, None] for n, value in enumerate(SCALARS.values(), start=1)}
    nested = TableSchema(1, "t", 1, NESTED)
    written = (
        (scalars, rows_of(scalars, values)),
        (nested, nested_rows(nested, [row(n) for n in range(12)])),
    )
    with duckdb.connect(config={"threads": 1}) as database:
        database.execute("SET TimeZone = 'UTC'")
        for number, (schema, rows) in enumerate(written):
            encoded = encode_data_file(schema, rows)
            path = tmp_path / f"{number}.parquet"
            path.write_bytes(encoded.data)
            file = dataclasses.replace(file_of(1), statistics=encoded.statistics)
            assert by_names(schema, [file, file], versions(schema))
            found = []
            for by_name in (False, True):
                relation = scan_expression(
                    schema, [str(path)] * 2, hidden=hidden, ordered=ordered, by_name=by_name
                )
                assert ("schema=MAP" in relation) is not by_name
                described = database.execute(f"DESCRIBE FROM {relation} t").fetchall()
                texts = database.execute(f"SELECT COLUMNS(*)::varchar FROM {relation} t")
                found.append((described, texts.fetchall()))
            assert found[0] == found[1]


def test_D10_virtual_columns_cannot_be_named_in_files_read_by_name(tmp_path: Path) -> None:
    schema = schema_of(1, (1, "a", "integer"))
    path = tmp_path / "x.parquet"
    path.write_bytes(encode_data_file(schema, rows_of(schema, {1: [5]})).data)
    relation = scan_expression(schema, [str(path)], by_name=True)
    with duckdb.connect() as database:
        assert database.execute(f"SELECT * FROM {relation} t").fetchall() == [(5,)]
        for name in ("filename", "file_row_number", "file_index", '"$row"', "b"):
            with pytest.raises(duckdb.BinderException):
                database.execute(f"SELECT {name} FROM {relation} t")
