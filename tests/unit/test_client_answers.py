"""Answers in Python: no digit is lost, and one that broke off is never taken for a whole one."""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from lakebus.client import connect
from lakebus.client_errors import AnswerTruncated, PackageMissing
from lakebus.client_results import Result, tokens_of
from lakebus.client_rows import encode_rows
from lakebus.client_types import SqlType, parse_type
from lakebus.client_values import load_rows, python_rows
from lakebus.errors import FixRequest, MalformedRequest
from tests.unit.client_rig import answer_of, answering, body_of, scripted


def answer(columns: dict[str, str], rows: list[list[Any]]) -> bytes:
    document = {
        "columns": [{"name": name, "type": kind} for name, kind in columns.items()],
        "rows": rows,
        "row_count": len(rows),
        "snapshot_id": 3,
        "snapshot_time": "2026-01-01T00:00:00.000000Z",
        "visibility_token": "lb1.y",
        "statistics": {"wait_ms": 0.5, "files_scanned": 1},
    }
    return json.dumps(document).encode()


def pairs(*items: tuple[Any, Any]) -> list[dict[str, Any]]:
    """A map whose keys are not text, in JSON."""

    return [{"key": key, "value": value} for key, value in items]


def result(columns: dict[str, str], rows: list[list[Any]]) -> Result:
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return Result(tuple(columns.items()), rows, 3, moment, "lb1.y", {})


# --- types -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("bigint", SqlType("bigint")),
        ("decimal(18,3)", SqlType("decimal", precision=18, scale=3)),
        ("integer[]", SqlType("list", (SqlType("integer"),))),
        ("integer[3]", SqlType("list", (SqlType("integer"),), size=3)),
        ("enum('a', 'b'', (c')[]", SqlType("list", (SqlType("enum"),))),
        (
            'struct(a map(varchar, decimal(3,1)), "B ""c" tuple(date, blob))',
            SqlType(
                "struct",
                (
                    SqlType("map", (SqlType("varchar"), SqlType("decimal", precision=3, scale=1))),
                    SqlType("tuple", (SqlType("date"), SqlType("blob"))),
                ),
                ("a", 'B "c'),
            ),
        ),
        (
            "union(n integer, s varchar)[]",
            SqlType(
                "list", (SqlType("union", (SqlType("integer"), SqlType("varchar")), ("n", "s")),)
            ),
        ),
        ("struct()", SqlType("struct")),
        ("struct(a integer", SqlType("struct(a integer")),
        ("something new(1)", SqlType("something new(1)")),
        ("decimal(x)", SqlType("decimal(x)")),
    ],
)
def test_types_are_taken_apart(text: str, kind: SqlType) -> None:
    assert parse_type(text) == kind


# --- values ----------------------------------------------------------------------------------


def test_A10_D8_decimals_keep_every_digit() -> None:
    digits = "12345678901234567890.123456789012345678"
    body = (
        b'{"columns":[{"name":"d","type":"decimal(38,18)"},{"name":"f","type":"double"},'
        b'{"name":"l","type":"struct(a decimal(38,18)[], b float)"},'
        b'{"name":"w","type":"decimal(5,0)"},'
        b'{"name":"m","type":"map(decimal(38,18), map(varchar, float))"}],'
        b'"rows":[[' + digits.encode() + b',1.5,{"a":[' + digits.encode() + b',null],"b":0.25},7,'
        b'[{"key":' + digits.encode() + b',"value":{"x":0.5}}]],'
        b'[null,"NaN",null,null,null]],"statistics":{"wait_ms":0.5,"snapshots":[3]}}'
    )
    document = load_rows(body)
    assert document["rows"][0] == [digits, 1.5, {"a": [digits, None], "b": 0.25}, "7",
                                    pairs((digits, {"x": 0.5}))]  # fmt: skip
    assert document["rows"][1] == [None, "NaN", None, None, None]
    assert document["statistics"] == {"wait_ms": 0.5, "snapshots": [3]}
    columns = [(c["name"], c["type"]) for c in document["columns"]]
    first, second = python_rows(columns, document["rows"])
    assert first == (
        Decimal(digits), 1.5, {"a": [Decimal(digits), None], "b": 0.25}, Decimal(7),
        {Decimal(digits): {"x": 0.5}},
    )  # fmt: skip
    assert math.isnan(second[1])


def test_values_become_those_of_python() -> None:
    columns = {
        "b": "blob", "u": "uuid", "d": "date", "t": "time", "n": "timestamp", "z": "timestamptz",
        "ns": "timestamp_ns", "f": "float", "l": "date[]", "s": 'struct(a uuid, "x y" integer)',
        "m": "map(integer, date)", "p": "tuple(integer, blob)", "h": "hugeint", "j": "json",
        "mb": "map(boolean, double)", "same": "map(varchar, integer)",
        "ml": "map(integer[], uuid)", "un": "union(a integer, b date)",
    }  # fmt: skip
    unique = uuid.UUID(int=7)
    row = [
        "AAE=", str(unique), "2026-01-31", "12:00:00.000001", "2026-01-31T12:00:00.000001",
        "2026-01-31T12:00:00.000001Z", "2026-01-31T12:00:00.000000001", "-Infinity",
        ["2026-01-31", None], {"a": str(unique), "x y": 1}, pairs((7, "2026-01-31"), (8, None)),
        [1, "AAE="], 2**100, '{"a": 1}', pairs((True, "NaN")), {"a": 1},
        pairs(([1], str(unique))), '{"b":"2026-01-31"}',
    ]  # fmt: skip
    (found,) = result(columns, [row]).fetchall()
    by_name = dict(zip(columns, found, strict=True))
    day, at = dt.date(2026, 1, 31), dt.datetime(2026, 1, 31, 12, 0, 0, 1)  # noqa: DTZ001
    assert by_name["mb"].keys() == {True}
    assert math.isnan(by_name.pop("mb")[True])
    assert by_name == {
        "b": b"\x00\x01", "u": unique, "d": day, "t": dt.time(12, 0, 0, 1), "n": at,
        "z": at.replace(tzinfo=dt.UTC), "ns": "2026-01-31T12:00:00.000000001", "f": -math.inf,
        "l": [day, None], "s": {"a": unique, "x y": 1}, "m": {7: day, 8: None},
        "p": [1, b"\x00\x01"], "h": 2**100, "j": '{"a": 1}', "same": {"a": 1},
        "ml": [([1], unique)], "un": '{"b":"2026-01-31"}',
    }  # fmt: skip


def test_what_python_cannot_hold_stays_text() -> None:
    columns = {"d": "date", "n": "timestamp", "t": "time"}
    row = ["+10000-01-01", "infinity", "24:00:00.000000"]
    many = result(columns, [row, ["2026-01-01", None, None]])
    assert many.fetchall()[0] == tuple(row)
    with pytest.raises(FixRequest, match="query_arrow"):
        many.to_arrow()


def test_a_result_is_iterated_and_made_to_columns() -> None:
    found = result({"id": "bigint", "at": "timestamptz"}, [[1, "2026-01-01T00:00:00.000000Z"]])
    assert len(found) == 1
    assert list(found) == [(1, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))]
    table = found.to_arrow()
    assert table.schema == pa.schema([("id", pa.int64()), ("at", pa.timestamp("us", "UTC"))])
    assert table.to_pylist() == [{"id": 1, "at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}]
    empty = result({"id": "bigint", "x": "null"}, [])
    assert empty.to_arrow().schema == pa.schema([("id", pa.int64()), ("x", pa.null())])
    twice = result({"id": "bigint"}, [[1]])
    both = Result((*twice.columns, *twice.columns), [[1, 2]], 3, twice.snapshot_time, "t", {})
    assert [column.to_pylist() for column in both.to_arrow().columns] == [[1], [2]]


@pytest.mark.parametrize("package", ["pyarrow", "pandas", "polars"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = result({"id": "bigint"}, [[1]])
    ask = {"pyarrow": found.to_arrow, "pandas": found.to_pandas, "polars": found.to_polars}
    with pytest.raises(PackageMissing, match=f"pip install {package}"):
        ask[package]()


def test_what_carries_tokens_is_taken_together() -> None:
    found = result({"id": "bigint"}, [])
    assert tokens_of(None) == []
    assert tokens_of("a") == ["a"]
    assert tokens_of([found, "a"]) == ["lb1.y", "a"]
    with pytest.raises(ValueError, match="carries no token"):
        tokens_of([7])  # type: ignore[list-item]


# --- answers that break off --------------------------------------------------------------------

SQL = "select 1"
HEAD = ("content-type: application/vnd.apache.arrow.stream", "lakebus-snapshot-id: 3",
        "lakebus-visibility-token: lb1.y", "lakebus-query-id: q")  # fmt: skip
TABLE = pa.table({"n": list(range(1000))})
STREAM = encode_rows(TABLE.to_batches(max_chunksize=300))[0]
#: Behind two whole batches: readers of Arrow take this for the end of the stream.
BETWEEN = len(encode_rows(TABLE.slice(0, 600).to_batches(max_chunksize=300))[0]) - 8


def test_batches_come_one_by_one_with_what_the_head_says() -> None:
    with (
        scripted([answer_of(200, STREAM, *HEAD)]) as (url, requests),
        connect(url, "k") as client,
        client.query_batches(SQL, [1], after=["t", "u"], at=7, max_staleness_s=1) as batches,
    ):
        assert (batches.snapshot_id, batches.token, batches.query_id) == (3, "lb1.y", "q")
        assert batches.schema == TABLE.schema
        assert [batch.num_rows for batch in batches] == [300, 300, 300, 100]
        assert batches.next() is None
    asked = json.loads(body_of(requests[0]))
    assert asked["min_visibility_token"] == ["t", "u"]
    assert (asked["snapshot"], asked["max_staleness_ms"]) == ({"id": 7}, 1000)


@pytest.mark.parametrize(
    "kept", [0, 4, 100, BETWEEN, BETWEEN + 50, len(STREAM) - 8, len(STREAM) - 1]
)
@pytest.mark.parametrize("honest", [True, False], ids=["short", "cut"])
def test_D9_an_arrow_stream_that_breaks_off_raises(kept: int, honest: bool) -> None:
    """`honest`: the head says the length that is sent, as a broken proxy would."""

    cut = answer_of(200, STREAM[:kept], *HEAD, length=kept if honest else len(STREAM))
    with scripted([cut]) as (url, _), connect(url, "k") as client:  # noqa: SIM117
        with pytest.raises(AnswerTruncated) as broken:
            client.query_arrow(SQL)
    assert broken.value.retryable


def test_D9_bytes_behind_the_end_mark_are_no_answer() -> None:
    with (
        scripted([answer_of(200, STREAM + b"x", *HEAD)]) as (url, _),
        connect(url, "k") as client,
        pytest.raises(AnswerTruncated, match="follow"),
    ):
        client.query_arrow(SQL)


def test_D9_json_that_breaks_off_is_asked_for_once_more_and_then_raises() -> None:
    whole = answer({"id": "bigint"}, [[1]])
    cut = answer_of(200, whole[:-40], length=len(whole))
    with scripted([cut, answer_of(200, whole)]) as (url, requests), connect(url, "k") as client:
        assert client.query(SQL).rows == [[1]]
    assert len(requests) == 2
    with (
        scripted([cut, cut, cut]) as (url, requests),
        connect(url, "k") as client,
        pytest.raises(AnswerTruncated),
    ):
        client.query(SQL)
    assert len(requests) == 2
    with (
        scripted([answer_of(200, whole[:-40])]) as (url, _),
        connect(url, "k") as client,
        pytest.raises(AnswerTruncated),
    ):
        client.query(SQL)


def chunked(*parts: bytes, whole: bool) -> bytes:
    head = b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n" + "\r\n".join(HEAD).encode()
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + b"\r\n\r\n" + body + (b"0\r\n\r\n" if whole else b"")


def test_D9_the_last_chunk_must_have_come() -> None:
    parts = STREAM[:1000], STREAM[1000:]
    with (
        scripted([chunked(*parts, whole=True)]) as (url, _),
        connect(url, "k") as client,
    ):
        assert client.query_arrow(SQL).equals(TABLE)
    with (
        scripted([chunked(*parts, whole=False)]) as (url, _),
        connect(url, "k") as client,
        pytest.raises(AnswerTruncated),
    ):
        client.query_arrow(SQL)


def test_errors_of_streams_are_typed_and_retried_before_the_first_byte() -> None:
    busy = answer_of(503, {"code": "unavailable", "detail": "not now", "retryable": True})
    wrong = answer_of(400, {"code": "sql_error", "detail": "bad", "retryable": False})
    with (
        scripted([busy, answer_of(200, STREAM, *HEAD), wrong]) as (url, _),
        connect(url, "k") as client,
    ):
        assert client.query_arrow(SQL).num_rows == 1000
        with pytest.raises(FixRequest, match="bad"):
            client.query_batches(SQL)


def test_questions_that_make_no_sense_are_refused_here() -> None:
    def refuse(_: bytes) -> bytes:
        raise AssertionError("nothing was to be asked")

    with answering(refuse) as (url, requests), connect(url, "k") as client:
        for wrong in (
            {"at": 1, "snapshot": 2},
            {"at": dt.datetime(2026, 1, 1)},  # noqa: DTZ001
            {"parameters": "text"},
        ):
            with pytest.raises(MalformedRequest):
                client.query(SQL, **wrong)
        with pytest.raises(MalformedRequest):
            client.ingest("t", [{"id": 1}], ordering_key="a\r\nb")
        for key in ("", "a\nb", "é", "x" * 256):
            with pytest.raises(FixRequest):
                client.ingest("t", [{"id": 1}], key=key)
    assert requests == []
    for api_key in ("", "a\nb", "é"):
        with pytest.raises(MalformedRequest):
            connect("http://x", api_key)
