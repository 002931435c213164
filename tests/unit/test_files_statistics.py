"""Catalog statistics: bounds are true in DuckDB's order, and are claimed only where certain."""

from __future__ import annotations

import json
import math
import random
import uuid
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from lakebus.snapshots import ColumnStatistics
from storage.files.statistics import (
    BOUND_BYTES_MAX,
    BOUND_READERS,
    column_statistics,
    statistics_from_json,
    statistics_to_json,
)
from storage.rows.types import Family, parse_type
from tests.unit.pruning_worlds import KINDS, _value, array


def of(sql_type: str, values: list[Any]) -> ColumnStatistics:
    kind = parse_type(sql_type)
    found = column_statistics(kind, array(kind, values))
    chunked = pa.chunked_array([array(kind, values[:1]), array(kind, values[1:])])
    assert column_statistics(kind, chunked) == found
    return found


@pytest.mark.parametrize(
    ("sql_type", "values", "minimum", "maximum"),
    [
        ("bigint", [5, None, -3], "-3", "5"),
        ("ubigint", [2**64 - 1, 0], "0", "18446744073709551615"),
        ("boolean", [True, False], "false", "true"),
        ("double", [0.1, -0.0, 1e300], "0.0", "1e+300"),
        ("double", [math.inf, -math.inf], "-inf", "inf"),
        ("float", [0.1], "0.10000000149011612", "0.10000000149011612"),
        ("decimal(18,4)", [Decimal("0.0001"), Decimal("-2")], "-2.0000", "0.0001"),
        ("decimal(38,10)", [Decimal(0)], "0.0000000000", "0.0000000000"),
        ("date", [0, 18262], "1970-01-01", "2020-01-01"),
        ("date", [0, 2**31 - 1], "1970-01-01", None),
        ("time", [86_400_000_000, 1], "1", "86400000000"),
        ("timestamp", [-1, 2**63 - 1], "-1", "9223372036854775807"),
        ("timestamptz", [10, 20], "10", "20"),
        ("blob", [b"\xff", b"\0"], "00", "ff"),
        ("blob", [b"\xff" * 65], "ff" * 64, None),
        ("blob", [b"a" * 63 + b"\xff\xff"], (b"a" * 63 + b"\xff").hex(), "61" * 62 + "62"),
        ("varchar", ["b", "a", None], "a", "b"),
        ("varchar", ["x" * 64], "x" * 64, "x" * 64),
        ("varchar", ["x" * 65], "x" * 64, "x" * 63 + "y"),
        ("varchar", ["é" * 33], "é" * 32, "é" * 31 + "ê"),
        ("varchar", ["x" + "é" * 32], "x" + "é" * 31, "x" + "é" * 30 + "ê"),
        ("varchar", ["\ud7ff" * 22], "\ud7ff" * 21, "\ud7ff" * 20 + "\ue000"),
        ("varchar", ["\U0010ffff" * 17], "\U0010ffff" * 16, None),
        ("varchar", ["a" + "\U0010ffff" * 17], "a" + "\U0010ffff" * 15, "b"),
        ("varchar", ["a\0b"], "a", "b"),
        ("varchar", ["\0"], "", None),
        ("json", ['{"a": 1}'], None, None),
    ],
)
def test_D11_bounds_are_canonical_text(
    sql_type: str, values: list[Any], minimum: str | None, maximum: str | None
) -> None:
    nulls = values.count(None)
    assert of(sql_type, values) == ColumnStatistics(nulls, minimum, maximum)


def test_D11_uuids_are_ordered_without_sign() -> None:
    low, high = uuid.UUID(int=1), uuid.UUID(int=2**128 - 1)
    assert of("uuid", [high.bytes, low.bytes]) == ColumnStatistics(0, str(low), str(high))


@pytest.mark.parametrize("sql_type", ["float", "double"])
def test_D11_a_nan_leaves_no_bounds(sql_type: str) -> None:
    assert of(sql_type, [1.0, math.nan, None]) == ColumnStatistics(1)


@pytest.mark.parametrize("sql_type", sorted(set(KINDS)))
def test_D11_nothing_but_nulls_leaves_no_bounds(sql_type: str) -> None:
    assert of(sql_type, [None, None]) == ColumnStatistics(2)
    assert column_statistics(parse_type(sql_type), array(parse_type(sql_type), [])) == (
        ColumnStatistics(0)
    )


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_D11_timestamps_of_any_unit_are_bounded_in_microseconds(unit: str) -> None:
    values = pa.array([-1, 1], pa.timestamp(unit))
    expected = {"s": 10**6, "ms": 1000, "us": 1, "ns": 1}[unit]
    found = column_statistics(parse_type("timestamp"), values)
    assert found == ColumnStatistics(0, str(-expected), str(expected))


@pytest.mark.parametrize("sql_type", sorted(set(KINDS) - {"json"}))
def test_D11_bounds_hold_in_the_order_of_duckdb(sql_type: str) -> None:
    """DuckDB sorts the values; our bounds, read back, must enclose its first and last."""

    chance = random.Random(11)
    kind = parse_type(sql_type)
    read = BOUND_READERS[kind.family]
    database = duckdb.connect()
    for _ in range(30):
        values = [_value(chance, kind) for _ in range(chance.randint(1, 6))]
        found = of(sql_type, values)
        database.register("given", pa.table({"x": array(kind, values)}))
        ordered = database.sql("select x from given order by x").to_arrow_table()["x"]
        uuids = kind.family is Family.UUID
        first, last = (of(sql_type, _storage(ordered, index, uuids=uuids)) for index in (0, -1))
        # An exact bound of a single value is the value itself.
        if found.minimum is not None and first.minimum is not None:
            assert read(found.minimum) <= read(first.minimum)
        if found.maximum is not None and last.minimum is not None:
            assert read(found.maximum) >= read(last.minimum)
        if kind.family in (Family.INTEGER, Family.DECIMAL, Family.UUID, Family.BOOLEAN):
            assert (found.minimum, found.maximum) == (first.minimum, last.maximum)
    database.close()


def _storage(column: pa.ChunkedArray, index: int, *, uuids: bool) -> list[Any]:
    scalar = column[index]
    if isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar.value
    if pa.types.is_temporal(scalar.type):
        return [scalar.value]
    value = scalar.as_py()
    if isinstance(value, str) and uuids:  # DuckDB hands uuids to Arrow as text
        return [uuid.UUID(value).bytes]
    return [value]


def test_D11_cut_text_encloses_the_value_bytewise() -> None:
    chance = random.Random(5)
    letters = ["a", "z", "\x7f", "é", "ÿ", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff"]
    letters += ["\U00010000", "\U0010ffff"]
    for _ in range(3000):
        text = "".join(chance.choices(letters, k=chance.randint(0, 40)))
        found = of("varchar", [text])
        assert found.minimum is not None
        assert found.minimum.encode() <= text.encode()
        assert len(found.minimum.encode()) <= BOUND_BYTES_MAX
        if found.maximum is not None:
            assert found.maximum.encode() >= text.encode()
            assert len(found.maximum.encode()) <= BOUND_BYTES_MAX + 1
        else:
            assert set(text[:16]) == {"\U0010ffff"}


def test_statistics_survive_json() -> None:
    statistics = {
        1: ColumnStatistics(0, "-3", "5"),
        2: ColumnStatistics(7),
        90: ColumnStatistics(0, "é\U0010ffff\"'\\", None),
    }
    text = statistics_to_json(statistics)
    assert statistics_from_json(text) == statistics
    assert statistics_from_json(text.encode()) == statistics
    assert json.loads(text)["2"] == [7]
    assert " " not in text
