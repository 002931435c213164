"""The type model: spellings, ranges, and what Parquet and DuckDB read back."""

# ruff: noqa: DTZ001 - values of columns without a zone are times without a zone

from __future__ import annotations

import datetime as dt
import uuid
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import SchemaInvalid
from storage.rows.types import Family, parse_type

SIMPLE = [
    "boolean",
    "tinyint",
    "smallint",
    "integer",
    "bigint",
    "utinyint",
    "usmallint",
    "uinteger",
    "ubigint",
    "float",
    "double",
    "varchar",
    "blob",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "uuid",
    "json",
]


@pytest.mark.parametrize("name", [*SIMPLE, "decimal(38,0)", "decimal(18,4)", "decimal(1,1)"])
def test_canonical_spelling_is_a_fixed_point(name: str) -> None:
    assert parse_type(name).sql == name
    assert parse_type(f"  {name.upper()} ") == parse_type(name)


@pytest.mark.parametrize(
    ("alias", "canonical"),
    [
        ("int", "integer"),
        ("INT8", "bigint"),
        ("text", "varchar"),
        ("string", "varchar"),
        ("bool", "boolean"),
        ("real", "float"),
        ("double precision", "double"),
        ("numeric", "decimal(18,3)"),
        ("Numeric ( 10 , 2 )", "decimal(10,2)"),
        ("decimal(7)", "decimal(7,0)"),
        ("timestamp  with time zone", "timestamptz"),
        ("timestamp without time zone", "timestamp"),
        ("bytea", "blob"),
    ],
)
def test_aliases(alias: str, canonical: str) -> None:
    assert parse_type(alias).sql == canonical


@pytest.mark.parametrize("alias", ["int", "int8", "int1", "short", "uint16", "real", "guid"])
def test_aliases_mean_what_duckdb_means(alias: str) -> None:
    column = duckdb.execute(f"SELECT typeof(NULL::{alias})").fetchone()
    assert column is not None
    assert column[0].lower() == parse_type(alias).sql


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("union(a integer)", "not supported"),
        ("varchar(10)", "length"),
        ("decimal(39,0)", "38"),
        ("decimal(0,0)", "38"),
        ("decimal(4,5)", "scale"),
        ("hugeint", "not a column type"),
        ("", "not a column type"),
        ("x" * 50_000, "too long"),
    ],
)
def test_refused_types_say_what_to_write(name: str, word: str) -> None:
    with pytest.raises(SchemaInvalid, match=word):
        parse_type(name)


def test_integer_ranges() -> None:
    assert (parse_type("tinyint").low, parse_type("tinyint").high) == (-128, 127)
    assert parse_type("ubigint").high == 2**64 - 1
    assert [n for n in SIMPLE if parse_type(n).integer_text_allowed] == ["bigint", "ubigint"]


def test_parquet_and_duckdb_read_the_types_back(tmp_path: Path) -> None:
    values = {
        "uuid": uuid.UUID(int=7).bytes,
        "timestamptz": dt.datetime(2026, 1, 31, tzinfo=dt.UTC),
        "date": dt.date(2026, 1, 31),
        "time": dt.time(1, 2, 3, 4),
        "timestamp": dt.datetime(2026, 1, 31),
        "blob": b"\x00",
        "varchar": "x",
        "boolean": True,
    }
    columns = {}
    for name in [n for n in SIMPLE if n != "json"] + ["decimal(18,4)"]:
        kind = parse_type(name)
        array = pa.array([values.get(name, 1), None], kind.storage)
        if kind.family is Family.UUID:
            array = pa.ExtensionArray.from_storage(kind.arrow, array)
        columns[name] = array
    path = tmp_path / "types.parquet"
    pq.write_table(pa.table(columns), path)
    described = duckdb.execute(f"DESCRIBE SELECT * FROM '{path}'").fetchall()
    for name, sql, *_ in described:
        assert parse_type(sql).sql == name
