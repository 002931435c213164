"""The columns of a table out of its first rows (contract A10: nothing is guessed that loses)."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import (
    BodyTooLarge,
    MalformedBody,
    MalformedRequest,
    RowsInvalid,
    UnsupportedMediaType,
)
from storage.rows.decode import ARROW_STREAM, CSV, JSON, NDJSON, PARQUET
from storage.rows.inferring import Inferred, infer_columns, null_columns


def infer(media_type: str, body: bytes, *, rows_max: int = 100) -> Inferred:
    return infer_columns("t", media_type, body, rows_max=rows_max)


def spelled(inferred: Inferred) -> dict[str, str]:
    return {name: kind.sql for name, kind in inferred.types.items()}


def of_values(*values: Any) -> str | None:
    """The type of a JSON column with these values, None when it is left out."""

    rows = [{"c": value, "id": 1} for value in values]
    found = spelled(infer(JSON, json.dumps(rows).encode()))
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    assert spelled(infer(NDJSON, lines)) == found
    assert found["id"] == "bigint"
    return found.get("c")


def arrow_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("values", "sql"),
    [
        ([1, None, -7], "bigint"),
        ([9223372036854775807], "bigint"),
        ([1, 0.5], "double"),
        ([1.0], "double"),
        ([1, "NaN"], "double"),
        (["-Infinity", 2.5], "double"),
        ([True, None], "boolean"),
        (["2026-01-31T12:00:00Z", "2026-01-31t13:00:00.5+05:30"], "timestamptz"),
        (["2026-01-31T12:00:00", "2026-01-31 13:00:00.123456"], "timestamp"),
        (["2026-01-31"], "varchar"),
        (["12:00:00"], "varchar"),
        (["2026-01-31T12:00:00Z", "soon"], "varchar"),
        (["2026-01-31T12:00:00Z", "2026-01-31T12:00:00", "soon"], "varchar"),
        (["2026-01-31T12:00:00+0530"], "varchar"),
        (["NaN"], "varchar"),
        (["NaN", "x"], "varchar"),
        (["1", "2.5"], "varchar"),
        ([""], "varchar"),
        (["caf\u00e9 \ud83d\ude00"], "varchar"),
        ([{"a": 1}, [1, 2], None], "json"),
        ([None, None], None),
    ],
)
def test_A10_json_values_name_their_type(values: list[Any], sql: str | None) -> None:
    assert of_values(*values) == sql


def test_A10_an_exponent_is_a_fraction_and_the_text_of_a_number_decides() -> None:
    body = b'[{"a": 1e3, "b": 1E0, "c": -0, "d": 123456789012345678901234567890}]'
    assert spelled(infer(JSON, body)) == {
        "a": "double",
        "b": "double",
        "c": "bigint",
        "d": "bigint",
    }


def test_columns_fold_and_stand_in_the_order_of_their_first_appearance() -> None:
    body = b'[{"B": 1, "gone": null}, {"a": "x", "b": 2}]'
    inferred = infer(JSON, body)
    assert list(inferred.types) == ["b", "a"]
    assert inferred.skipped == ("gone",)
    # Through the exact reader too: a byte order mark is refused, an odd row has no columns.
    inferred = infer(JSON, b'[{"B": 1, "gone": null}, 7, {"a": "\\u0078", "b": 2}]')
    assert list(inferred.types) == ["b", "a"]
    assert inferred.skipped == ("gone",)


@pytest.mark.parametrize(
    ("values", "row", "words"),
    [
        ([1, "x"], 1, ["text", "row 0 has a whole number"]),
        ([None, True, 0], 2, ["a whole number", "row 1 has true or false"]),
        (["NaN", 1, "x"], 2, ["text", "row 1 has a whole number"]),
        ([1, {"a": 1}], 1, ["an array or object"]),
        (["2026-01-31T12:00:00", "2026-01-31T12:00:00Z"], 1, ["a time with a zone"]),
        (["2026-01-31T12:00:00Z", 5, "2026-01-31T12:00:00"], 1, ["a whole number"]),
    ],
)
def test_A10_mixed_values_are_refused_by_row_and_kind(
    values: list[Any], row: int, words: list[str]
) -> None:
    body = json.dumps([{"c": value, "d": [value] * 50} for value in values]).encode()
    with pytest.raises(RowsInvalid) as caught:
        infer(JSON, body)
    (error,) = caught.value.members["errors"]
    assert caught.value.members["error_count"] == 1
    assert (error["row"], error["column"]) == (row, "c")
    for word in words:
        assert word in error["reason"]
    assert "column c" in caught.value.detail
    assert error["value"] is not None


def test_A10_csv_fields_name_their_type_and_mixtures_are_text() -> None:
    body = (
        b"whole,part,flag,zoned,local,word,zip,mixed,nothing,empty\n"
        b'1,1,true,2026-01-31T12:00:00Z,2026-01-31 12:00:00,NaN,01234,1,,""\n'
        b"-7,2.5e3,false,,2026-01-31T12:00:00,,10115,x,,\n"
    )
    inferred = infer(CSV, body)
    assert spelled(inferred) == {
        "whole": "bigint",
        "part": "double",
        "flag": "boolean",
        "zoned": "timestamptz",
        "local": "timestamp",
        "word": "varchar",
        "zip": "varchar",
        "mixed": "varchar",
        "empty": "varchar",
    }
    assert inferred.skipped == ("nothing",)
    with pytest.raises(RowsInvalid, match="a time without a zone"):
        infer(CSV, b"a,b\n2026-01-31T12:00:00Z,1\n2026-01-31T12:00:00,1\n")


@pytest.mark.parametrize("media_type", [ARROW_STREAM, PARQUET])
def test_A10_arrow_and_parquet_keep_their_own_types(media_type: str) -> None:
    day, noon = dt.date(2026, 1, 31), 1_769_860_800_000_000
    table = pa.table(
        {
            "Flag": pa.array([True]),
            "tiny": pa.array([1], pa.int8()),
            "wide": pa.array([1], pa.uint64()),
            "single": pa.array([1.5], pa.float32()),
            "text": pa.array(["x"], pa.large_string()),
            "coded": pa.array(["x"], pa.string()).dictionary_encode(),
            "bytes": pa.array([b"x"], pa.binary()),
            "four": pa.array([b"abcd"], pa.binary(4)),
            "amount": pa.array([decimal.Decimal("1.50")], pa.decimal128(10, 2)),
            "day": pa.array([day], pa.date32()),
            "clock": pa.array([dt.time(12)], pa.time64("us")),
            "local": pa.array([noon // 1000], pa.timestamp("ms")),
            "zoned": pa.array([noon], pa.timestamp("us", "Europe/Berlin")),
            "name": pa.array([uuid.UUID(int=7).bytes], pa.uuid()),
            "document": pa.array(['{"a":1}'], pa.json_()),
            "gone": pa.array([None], pa.int32()),
            "never": pa.nulls(1),
        }
    )
    body = arrow_stream(table) if media_type == ARROW_STREAM else parquet(table)
    inferred = infer(media_type, body)
    assert spelled(inferred) == {
        "flag": "boolean",
        "tiny": "tinyint",
        "wide": "ubigint",
        "single": "float",
        "text": "varchar",
        "coded": "varchar",
        "bytes": "blob",
        "four": "blob",
        "amount": "decimal(10,2)",
        "day": "date",
        "clock": "time",
        "local": "timestamp",
        "zoned": "timestamptz",
        "name": "uuid",
        "document": "json",
    }
    assert inferred.skipped == ("gone", "never")


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[None]], pa.list_(pa.null())),
        pa.array([{"a": 1, "A": 2}], pa.struct([("a", pa.int64()), ("A", pa.int64())])),
        pa.array([{"a b": 1}], pa.struct([("a b", pa.int64())])),
        pa.array([{}], pa.struct([])),
        pa.array([1], pa.duration("s")),
        pa.array([decimal.Decimal(1)], pa.decimal256(60, 0)),
    ],
)
def test_A10_an_arrow_type_that_no_column_has_is_refused_by_name(array: pa.Array) -> None:
    with pytest.raises(RowsInvalid, match="column odd") as caught:
        infer(ARROW_STREAM, arrow_stream(pa.table({"ok": pa.array([1]), "odd": array})))
    assert caught.value.members["errors"][0]["column"] == "odd"


def test_columns_without_a_value_are_found_in_every_format() -> None:
    rows = [{"A": 1, "b": None}, {"a": None, "C": None}]
    table = pa.table(
        {
            "A": pa.array([1, None]),
            "b": pa.nulls(2),
            "C": pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array([None], pa.string())),
        }
    )
    bodies = {
        JSON: json.dumps(rows).encode(),
        NDJSON: b"\n".join(json.dumps(row).encode() for row in rows),
        CSV: b"A,b,C\n1,,\n,,\n",
        ARROW_STREAM: arrow_stream(table),
        PARQUET: parquet(table.set_column(2, "C", pa.nulls(2, pa.string()))),
    }
    for media_type, body in bodies.items():
        assert null_columns("t", media_type, body, rows_max=9) == ("b", "c"), media_type


def test_bodies_that_cannot_be_read_are_refused_as_always() -> None:
    for media_type, body, error in (
        (JSON, b"[{", MalformedBody),
        (JSON, b"\xff", MalformedBody),
        (NDJSON, b'{"a":1}\n{', MalformedBody),
        (ARROW_STREAM, b"", MalformedBody),
        (PARQUET, b"PAR1", MalformedBody),
        (CSV, b"", MalformedBody),
        (JSON, b"[]", MalformedRequest),
        (JSON, b'[{"a":1},{"a":2}]', BodyTooLarge),
        ("text/plain", b"x", UnsupportedMediaType),
    ):
        with pytest.raises(error):
            infer(media_type, body, rows_max=1)
