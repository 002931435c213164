"""Partition transforms: Arrow, DuckDB and single values give one text, now and for ever."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lakebus.errors import SchemaInvalid
from lakebus.schemas import Column
from storage.files.partition_values import BEYOND
from storage.files.partitions import (
    PartitionSpec,
    parse_partition_by,
    partition_spec,
    renamed_transform,
    transform_column,
)
from storage.rows.types import ColumnType, Family, parse_type
from tests.unit.pruning_worlds import array

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "partitions_v1.json").read_text())[
    "vectors"
]

KINDS = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger",
    "ubigint", "decimal(9,2)", "decimal(3,3)", "decimal(38,0)", "decimal(38,38)", "varchar", "blob",
    "date", "time", "timestamp", "timestamptz", "uuid",
)  # fmt: skip
_DAYS_MAX = 2**31 - 1
_INSTANT_MAX = 2**63 - 1


def transforms_of(kind: ColumnType) -> list[str]:
    found = ["bucket(2, c)", "bucket(16, c)", "bucket(1000, c)"]
    if kind.family is not Family.BLOB:
        found.append("c")
    if kind.family in (Family.DATE, Family.TIMESTAMP, Family.TIMESTAMPTZ):
        found += ["year(c)", "month(c)", "day(c)"]
    if kind.family in (Family.TIMESTAMP, Family.TIMESTAMPTZ):
        found.append("hour(c)")
    if kind.family is Family.INTEGER:
        found += ["truncate(2, c)", "truncate(10, c)", "truncate(1000000000000000000, c)"]
    if kind.family is Family.VARCHAR:
        found += ["truncate(1, c)", "truncate(4, c)", "truncate(256, c)"]
    return found


def values_of(kind: ColumnType) -> st.SearchStrategy[Any]:
    match kind.family:
        case Family.BOOLEAN:
            return st.booleans()
        case Family.INTEGER:
            return st.integers(kind.low, kind.high)
        case Family.DECIMAL:
            most = 10**kind.precision - 1
            edges = [n for n in (0, 1, -1, 10, -50, 100, most, -most) if abs(n) <= most]
            unscaled = st.integers(-most, most) | st.sampled_from(edges)
            return unscaled.map(lambda n: _decimal(n, kind.scale))
        case Family.VARCHAR:
            return st.text(max_size=300) | st.sampled_from(["", "\0", "a\0b", "é" * 300, "e\u0301"])
        case Family.BLOB:
            return st.binary(max_size=40)
        case Family.DATE:
            edges = [0, -1, -719162, -719163, 2932896, 2932897, _DAYS_MAX, -_DAYS_MAX]
            return st.integers(-5_000_000, 5_000_000) | st.sampled_from(edges)
        case Family.TIME:
            return st.integers(0, 86_400_000_000)
        case Family.UUID:
            return st.integers(0, 2**128 - 1).map(lambda n: uuid.UUID(int=n).bytes)
        case _:
            edges = [
                0, -1, -62135596800000000, -62135596800000001, 253402300799999999,
                253402300800000000, _INSTANT_MAX, -_INSTANT_MAX, -3_600_000_001,
            ]  # fmt: skip
            return st.integers(-(2**62), 2**62) | st.sampled_from(edges)


def _decimal(unscaled: int, scale: int) -> Decimal:
    digits = tuple(map(int, str(abs(unscaled))))
    return Decimal((int(unscaled < 0), digits, -scale))


def spec_of(sql_type: str, *texts: str) -> PartitionSpec:
    return parse_partition_by(texts, (Column(7, "c", parse_type(sql_type).sql),))


def texts_of(partition: str) -> list[str | None]:
    return list(json.loads(partition).values())


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    made = duckdb.connect(config={"threads": 1})
    made.execute("set timezone = 'UTC'")
    yield made
    made.close()


def in_sql(
    database: duckdb.DuckDBPyConnection,
    kind: ColumnType,
    specs: Sequence[PartitionSpec],
    column: pa.Array,
) -> list[list[str | None]]:
    """For each spec of one transform the text of each row."""

    given_rows = pa.table({"c": column})
    database.execute(f'create or replace temp table "held" (n bigint, c {kind.sql})')
    database.register("given_rows", given_rows)
    database.execute('insert into "held" select row_number() over (), c from given_rows')
    database.unregister("given_rows")
    shown = ", ".join(spec.sql()[0] for spec in specs)
    rows = database.execute(f'select {shown} from "held" order by n').fetchall()
    return [list(texts) for texts in zip(*rows, strict=True)]


def bound_value(kind: ColumnType, value: Any) -> Any:
    """A value of the test in the form of BOUND_READERS."""

    match kind.family:
        case Family.VARCHAR:
            return value.encode()
        case Family.UUID:
            return int.from_bytes(value)
        case _:
            return value


@pytest.mark.parametrize("sql_type", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arrow_sql_and_single_values_agree(
    database: duckdb.DuckDBPyConnection, sql_type: str, data: st.DataObject
) -> None:
    kind = parse_type(sql_type)
    values = data.draw(st.lists(st.none() | values_of(kind), min_size=1, max_size=8))
    rows = pa.table({"7": array(kind, values), "at": pa.array(range(len(values)))})
    specs = [spec_of(sql_type, text) for text in transforms_of(kind)]
    in_duckdb = in_sql(database, kind, specs, array(kind, values))
    for spec, expected in zip(specs, in_duckdb, strict=True):
        split = spec.split(rows)
        assert split is not None
        found: dict[int, str | None] = {}
        for partition, part in split:
            places = part.column("at").to_pylist()
            assert places == sorted(places)
            found |= dict.fromkeys(places, texts_of(partition)[0])
        assert [found[place] for place in range(len(values))] == expected, spec.texts
        alone = [
            None if value is None else spec.transforms[0].value_text(bound_value(kind, value))
            for value in values
        ]
        assert alone == expected, spec.texts
        assert len({partition for partition, _ in split}) == len(split)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['type']} {v['transform']}")
def test_the_texts_never_change(
    database: duckdb.DuckDBPyConnection, vector: dict[str, Any]
) -> None:
    kind = parse_type(vector["type"])
    spec = spec_of(vector["type"], vector["transform"])
    for sql, expected in vector["values"]:
        held = database.sql(f"select ({sql})::{kind.sql} as c").to_arrow_table()
        column = held.column("c")
        if kind.family is Family.UUID:
            column = array(kind, [uuid.UUID(text).bytes for text in column.to_pylist()])
        assert column.type == kind.arrow
        split = spec.split(pa.table({"7": column}))
        assert split is not None
        assert texts_of(split[0][0]) == [expected], sql
        shown = database.execute(f"select {spec.sql()[0]} from (select ({sql})::{kind.sql} as c)")
        assert shown.fetchall() == [(expected,)], sql


@pytest.mark.parametrize(
    ("narrow", "wide", "value"),
    [
        ("tinyint", "bigint", -7),
        ("uinteger", "bigint", 2**32 - 1),
        ("decimal(9,2)", "decimal(18,4)", Decimal("1.50")),
        ("decimal(3,3)", "decimal(18,6)", Decimal("-0.050")),
        ("decimal(9,2)", "decimal(38,2)", Decimal("0.00")),
    ],
)
def test_a_widened_column_keeps_its_partitions(narrow: str, wide: str, value: Any) -> None:
    for text in ("c", "bucket(16, c)"):
        found = [
            spec_of(sql_type, text).split(pa.table({"7": array(parse_type(sql_type), [value])}))
            for sql_type in (narrow, wide)
        ]
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][0][0] == found[1][0][0]


def test_several_transforms_nulls_and_a_missing_column() -> None:
    columns = (
        Column(1, "id", "bigint"),
        Column(2, "ts", "timestamp"),
        Column(3, "country", "varchar"),
        Column(9, "late", "integer"),
    )
    spec = parse_partition_by(["DAY( Ts )", " bucket(2,id)", "Country", "late"], columns)
    assert spec.texts == ("day(ts)", "bucket(2, id)", "country", "late")
    rows = pa.table(
        {
            "1": pa.array([1, 1, None, 1, 1], pa.int64()),
            "2": pa.array([0, 5, 0, 86_400_000_000, 7], pa.timestamp("us")),
            "3": pa.array(["ch", "ch", None, "ch", "ch"]),
        }
    )
    split = spec.split(rows)
    assert split is not None
    found = [(json.loads(partition), part.column("1").to_pylist()) for partition, part in split]
    first = found[0][0]
    assert list(first) == list(spec.texts)
    assert (first["day(ts)"], first["country"], first["late"]) == ("1970-01-01", "ch", None)
    assert found[1][0] == {**first, "bucket(2, id)": None, "country": None}
    assert [rows for _, rows in found] == [[1, 1, 1], [None], [1]]
    assert spec.values(split[0][0]) == tuple(first.values())
    assert spec.split(rows, most=3) is not None
    assert spec.split(rows, most=2) is None
    assert spec.split(rows.slice(0, 0)) == []
    whole = spec.split(rows.slice(0, 2))
    assert whole is not None
    assert [part.num_rows for _, part in whole] == [2]


def test_a_spec_reads_only_partitions_of_its_own_spelling() -> None:
    spec = spec_of("bigint", "bucket(16, c)")
    assert spec.values('{"bucket(16, c)":"3"}') == ("3",)
    assert spec.values('{"bucket(8, c)":"3"}') is None
    assert spec.values(None) is None
    assert not parse_partition_by([], ())
    columns = (Column(7, "c", "bigint"),)
    assert partition_spec(("c",), columns) is partition_spec(("c",), columns)


def test_times_outside_the_calendar_are_beyond() -> None:
    spec = spec_of("timestamp", "day(c)")
    found = spec.split(pa.table({"7": pa.array([2**62], pa.timestamp("us"))}))
    assert found is not None
    assert texts_of(found[0][0]) == [BEYOND]


def test_renames_reach_into_transforms() -> None:
    assert renamed_transform("bucket(16, id)", {"id": "key"}) == "bucket(16, key)"
    assert renamed_transform("day(ts)", {"id": "key"}) == "day(ts)"
    assert renamed_transform("id", {"id": "key"}) == "key"
    assert transform_column("truncate(4, name)") == "name"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "no column"),
        ("day(nothing)", "no column"),
        ("week(ts)", "not a transform"),
        ("identity(id)", "not a transform"),
        ("day(id)", "takes only"),
        ("hour(d)", "takes only"),
        ("truncate(4, ts)", "takes only"),
        ("x", "takes only"),
        ("j", "takes only"),
        ("raw", "takes only"),
        ("bucket(16, x)", "takes only"),
        ("bucket(id)", "takes a number and a column"),
        ("bucket(id, 16)", "takes a number and a column"),
        ("bucket(1, id)", "between 2 and 1024"),
        ("bucket(1025, id)", "between 2 and 1024"),
        ("truncate(0, name)", "between 1 and 256"),
        ("truncate(257, name)", "between 1 and 256"),
        ("truncate(1, id)", "between 2 and"),
        ("day(ts, ts)", "one column"),
        ("day(ts", "not a name"),
        ("", "not a name"),
    ],
)
def test_what_is_no_transform_is_refused(text: str, said: str) -> None:
    columns = tuple(
        Column(i, name, sql_type)
        for i, (name, sql_type) in enumerate(
            {
                "id": "bigint", "ts": "timestamp", "d": "date", "name": "varchar", "x": "double",
                "j": "json", "raw": "blob",
            }.items()
        )
    )  # fmt: skip
    with pytest.raises(SchemaInvalid, match=said):
        parse_partition_by([text], columns)


def test_at_most_four_and_no_repetition() -> None:
    columns = (Column(1, "id", "bigint"),)
    with pytest.raises(SchemaInvalid, match="at most 4"):
        parse_partition_by([f"bucket({n}, id)" for n in range(2, 7)], columns)
    with pytest.raises(SchemaInvalid, match="twice"):
        parse_partition_by(["bucket(4,id)", "BUCKET(4, ID)"], columns)
