"""One JSON value in one column: kept exactly, or refused with a reason (contract A10)."""

# ruff: noqa: DTZ001, DTZ901 - values of columns without a zone are times without a zone

from __future__ import annotations

import datetime as dt
import json
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import MalformedBody, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.rows.decode import decode_rows


def one(sql: str, value: str) -> Any:
    """The stored value (storage form) of one JSON value in a nullable column."""

    schema = TableSchema(7, "events", 1, (Column(10, "v", sql),))
    body = f'[{{"v":{value}}}]'.encode()
    column = decode_rows(schema, "application/json", body, rows_max=1).batch.column(0)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column[0].as_py()


def reason(sql: str, value: str) -> str:
    """Why a value is refused."""

    with pytest.raises(RowsInvalid) as caught:
        one(sql, value)
    (error,) = caught.value.members["errors"]
    assert (error["row"], error["column"]) == (0, "v")
    assert caught.value.members["error_count"] == 1
    return str(error["reason"])


def utc(*parts: int) -> dt.datetime:
    return dt.datetime(*parts, tzinfo=dt.UTC)  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("sql", "value", "stored"),
    [
        ("boolean", "true", True),
        ("integer", "1.0", 1),
        ("integer", "1e3", 1000),
        ("integer", "-0", 0),
        ("integer", "2147483647", 2**31 - 1),
        ("utinyint", "255", 255),
        ("bigint", "9223372036854775807", 2**63 - 1),
        ("bigint", '"-9223372036854775808"', -(2**63)),
        ("bigint", '"1.0"', 1),
        ("ubigint", '"18446744073709551615"', 2**64 - 1),
        ("double", "0.1", 0.1),
        ("double", "9007199254740993", 9007199254740992.0),
        ("double", '"Infinity"', float("inf")),
        ("double", '"-Infinity"', float("-inf")),
        ("double", "1e-400", 0.0),
        ("float", "0.1", 0.10000000149011612),
        ("float", '"Infinity"', float("inf")),
        ("decimal(18,4)", "0.1", Decimal("0.1000")),
        ("decimal(18,4)", '"12345678901234.5678"', Decimal("12345678901234.5678")),
        ("decimal(18,4)", "1.50000000", Decimal("1.5000")),
        ("decimal(18,4)", "15e-1", Decimal("1.5000")),
        ("decimal(18,4)", "-0.0", Decimal("0.0000")),
        ("decimal(38,0)", "9" * 38, Decimal("9" * 38)),
        ("decimal(38,38)", "-0." + "9" * 38, Decimal("-0." + "9" * 38)),
        ("varchar", '"\\ud83d\\ude00"', "😀"),
        ("varchar", '""', ""),
        ("varchar", '"a\\u0000b"', "a\0b"),
        ("blob", '"AAE="', b"\0\1"),
        ("blob", '""', b""),
        ("date", '"0001-01-01"', dt.date(1, 1, 1)),
        ("time", '"23:59:59.999999"', dt.time(23, 59, 59, 999999)),
        ("timestamp", '"2026-01-31T12:00:00.5"', dt.datetime(2026, 1, 31, 12, 0, 0, 500000)),
        ("timestamp", '"2026-01-31 12:00:00"', dt.datetime(2026, 1, 31, 12)),
        ("timestamp", '"9999-12-31T23:59:59.999999"', dt.datetime.max),
        (
            "timestamp",
            '"2026-01-31T12:00:00.123456000"',
            dt.datetime(2026, 1, 31, 12, 0, 0, 123456),
        ),
        ("timestamptz", '"2026-01-31T12:00:00Z"', utc(2026, 1, 31, 12)),
        ("timestamptz", '"2026-01-31t12:00:00z"', utc(2026, 1, 31, 12)),
        ("timestamptz", '"2026-01-31T12:00:00.5+05:30"', utc(2026, 1, 31, 6, 30, 0, 500000)),
        ("uuid", '"0F2B4C1E-0000-4000-8000-00000000000a"', None),
        ("json", '{ "a" : [1, 2.50] , "b" : null }', '{"a":[1,2.50],"b":null}'),
        ("json", '"text  here"', '"text  here"'),
        ("json", "1.00000000000000000000001", "1.00000000000000000000001"),
        *[(sql, "null", None) for sql in ("bigint", "decimal(5,1)", "json", "uuid", "timestamp")],
    ],
)
def test_A10_values_kept_exactly(sql: str, value: str, stored: Any) -> None:
    if sql == "uuid" and value != "null":
        stored = uuid.UUID(json.loads(value)).bytes
    assert one(sql, value) == stored


@pytest.mark.parametrize(
    ("sql", "value", "word"),
    [
        ("boolean", "1", "true or false"),
        ("boolean", '"true"', "true or false"),
        ("integer", "1.5", "fraction"),
        ("integer", '"1"', "not a string"),
        ("integer", "true", "whole number"),
        ("integer", "2147483648", "out of range"),
        ("integer", "[1]", "whole number"),
        ("utinyint", "-1", "out of range"),
        ("bigint", "9223372036854775808", "out of range"),
        ("bigint", '"1.5"', "fraction"),
        ("bigint", '"007"', "not a number"),
        ("bigint", '" 1"', "not a number"),
        ("bigint", '"1,2"', "not a number"),
        ("bigint", '"null"', "not a number"),
        ("bigint", '""', "not a number"),
        ("bigint", '"\\u0661"', "not a number"),
        ("bigint", "1e1000000000", "range"),
        ("bigint", "1e99999999999999999999", "exponent"),
        ("bigint", "1e-1000000000", "fraction"),
        ("double", '"nan"', "expected a number"),
        ("double", '"1.5"', "expected a number"),
        ("double", "1e400", "too large"),
        ("float", "1e39", "too large"),
        ("float", "-3.5e38", "too large"),
        ("decimal(18,4)", "0.00001", "more than 4 digits"),
        ("decimal(18,4)", "100000000000000", "out of range"),
        ("decimal(18,4)", "1e1000000000", "out of range"),
        ("decimal(18,4)", "1e-1000000000", "more than 4 digits"),
        ("decimal(18,4)", '"NaN"', "not a number"),
        ("decimal(18,4)", '"1_0"', "not a number"),
        ("decimal(18,4)", '".5"', "not a number"),
        ("decimal(18,4)", '"1."', "not a number"),
        ("decimal(18,4)", '"+1"', "not a number"),
        ("decimal(18,4)", '"null"', "not a number"),
        ("decimal(18,4)", '""', "not a number"),
        ("decimal(18,4)", "true", "expected a number"),
        ("decimal(2,2)", "1", "out of range"),
        ("varchar", "5", "expected a string"),
        ("varchar", "null1", None),
        ("varchar", '"\\ud800"', "surrogate"),
        ("blob", '"AAE"', "base64"),
        ("blob", '"AAF="', "base64"),
        ("blob", '"_-=="', "base64"),
        ("blob", '"AA E="', "base64"),
        ("date", '"2026-02-29"', "does not exist"),
        ("date", '"0000-01-01"', "does not exist"),
        ("date", '"2026-1-1"', "not a date"),
        ("date", '"2026-01-01T00:00:00"', "not a date"),
        ("date", "20260101", "a date in a string"),
        ("time", '"24:00:00"', "24:00"),
        ("time", '"23:59:60"', "leap"),
        ("time", '"12:00"', "not a time"),
        ("time", '"12:00:00Z"', "has a zone"),
        ("time", '"12:00:00.1234567"', "finer"),
        ("timestamp", '"2026-01-31T12:00:00Z"', "has a zone"),
        ("timestamp", '"2026-01-31T12:00:00+00:00"', "has a zone"),
        ("timestamp", '"2026-01-31T12:00:00.1234567"', "finer"),
        ("timestamp", '"2026-01-31T24:00:00"', "24:00"),
        ("timestamp", '"2026-06-30T23:59:60"', "leap"),
        ("timestamp", '"2026-01-31"', "RFC 3339"),
        ("timestamp", '"2026-01-31T12"', "RFC 3339"),
        ("timestamp", '"2026-01-31T12:00"', "RFC 3339"),
        ("timestamp", '"0000-01-01T00:00:00"', "does not exist"),
        ("timestamp", "1769860800", "a time in a string"),
        ("timestamp", '""', "RFC 3339"),
        ("timestamptz", '"2026-01-31T12:00:00"', "no zone"),
        ("timestamptz", '"2026-01-31T12:00:00+0530"', "offset like"),
        ("timestamptz", '"2026-01-31T12:00:00+05"', "offset like"),
        ("timestamptz", '"2026-01-31T12+05:30"', "RFC 3339"),
        ("timestamptz", '"2026-01-31T12:00+05:30"', "RFC 3339"),
        ("timestamptz", '"2026-01-31T12:00:00+24:00"', "does not exist"),
        ("timestamptz", '"0001-01-01T00:00:00+01:00"', "years"),
        ("timestamptz", '"9999-12-31T23:59:59-01:00"', "years"),
        ("uuid", '"0f2b4c1e000040008000000000000000"', "not a uuid"),
        ("uuid", '"0f2b4c1e-0000-4000-8000-00000000000g"', "not a uuid"),
        ("uuid", '"0f2b4c1e 0000-4000-8000-000000000000"', "not a uuid"),
        ("json", '"\\udc00"', "surrogate"),
        ("json", "[" * 201 + "]" * 201, "200 levels"),
    ],
)
def test_A10_values_refused(sql: str, value: str, word: str | None) -> None:
    if word is None:
        with pytest.raises(MalformedBody):
            one(sql, value)
        return
    assert word in reason(sql, value)


def test_A10_nan_is_kept() -> None:
    value = one("double", '"NaN"')
    assert value != value
