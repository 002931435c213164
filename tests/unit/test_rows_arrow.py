"""Arrow streams: whole or refused, and cast only where nothing is lost (contract A10)."""

# ruff: noqa: DTZ001 - values of columns without a zone are times without a zone

from __future__ import annotations

import datetime as dt
import json
import struct
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from lakebus.errors import BodyTooLarge, MalformedBody, MalformedRequest, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.rows.arrow_stream_size import check_decompressed_size, check_expanded_size
from storage.rows.decode import DecodedRows, OnInvalid, decode_rows
from storage.rows.types import parse_type

ARROW = "application/vnd.apache.arrow.stream"


def table(*columns: tuple[str, str] | tuple[str, str, bool]) -> TableSchema:
    return TableSchema(
        7, "events", 1, tuple(Column(10 + i, *column) for i, column in enumerate(columns))
    )


def stream(data: pa.Table | pa.RecordBatch, *, codec: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, data.schema, options=options) as writer:
        writer.write(data)
    return bytes(sink.getvalue())


def decode(schema: TableSchema, body: bytes, *, on_invalid: OnInvalid = "reject") -> DecodedRows:
    return decode_rows(schema, ARROW, body, on_invalid=on_invalid, rows_max=10_000)


def cast(sql: str, array: pa.Array) -> list[Any]:
    batch = decode(table(("v", sql)), stream(pa.table({"V": array}))).batch
    assert batch.schema.field(0).type == parse_type(sql).arrow
    return list(batch.column(0).to_pylist())


NOON = dt.datetime(2026, 1, 31, 12, 0, 0, 5)
SOME = uuid.UUID(int=77)


@pytest.mark.parametrize(
    ("sql", "array", "stored"),
    [
        ("integer", pa.array([1, None], pa.int64()), [1, None]),
        ("ubigint", pa.array([5], pa.int8()), [5]),
        ("integer", pa.array([1.0, 2.0]), [1, 2]),
        ("integer", pa.array([Decimal("3.00")]), [3]),
        ("double", pa.array([2**53 + 1]), [float(2**53)]),
        ("double", pa.array([0.5], pa.float16()), [0.5]),
        ("float", pa.array([0.1, float("inf"), None]), [0.10000000149011612, float("inf"), None]),
        ("decimal(18,4)", pa.array([Decimal("1.5")]), [Decimal("1.5000")]),
        ("decimal(18,4)", pa.array([7], pa.int64()), [Decimal("7.0000")]),
        ("decimal(38,0)", pa.array([2**64 - 1], pa.uint64()), [Decimal(2**64 - 1)]),
        ("decimal(5,2)", pa.array([Decimal("1.5")], pa.decimal256(40, 10)), [Decimal("1.50")]),
        ("varchar", pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        ("varchar", pa.array(["é"], pa.large_string()), ["é"]),
        ("varchar", pa.array(["é", None], pa.string_view()), ["é", None]),
        ("blob", pa.array([b"ab"], pa.binary(2)), [b"ab"]),
        ("blob", pa.array([b"ab"], pa.large_binary()), [b"ab"]),
        ("date", pa.array([dt.date(2026, 1, 31)], pa.date64()), [dt.date(2026, 1, 31)]),
        ("time", pa.array([dt.time(1, 2, 3)], pa.time32("s")), [dt.time(1, 2, 3)]),
        ("timestamp", pa.array([NOON.replace(microsecond=0)], pa.timestamp("s")), None),
        ("timestamp", pa.array([NOON], pa.timestamp("ns")), [NOON]),
        ("timestamptz", pa.array([NOON], pa.timestamp("us", "+05:30")), None),
        ("uuid", pa.array([SOME.bytes, None], pa.binary(16)), [SOME, None]),
        ("uuid", pa.array([SOME.bytes], pa.uuid()), [SOME]),
        ("uuid", pa.array([str(SOME), None]), [SOME, None]),
        ("json", pa.array(['{"a": 1}', None, "null"]), ['{"a":1}', None, None]),
        ("boolean", pa.array([True, None]), [True, None]),
        ("bigint", pa.nulls(2), [None, None]),
    ],
)
def test_A10_lossless_casts(sql: str, array: pa.Array, stored: list[Any] | None) -> None:
    got = cast(sql, array)
    if stored is None:
        base = array.cast(pa.timestamp("us", array.type.tz)).to_pylist()
        stored = [v.astimezone(dt.UTC) if v.tzinfo else v for v in base]
    assert got == stored


@pytest.mark.parametrize(
    ("sql", "array"),
    [
        ("integer", pa.array([1, 2**31])),
        ("integer", pa.array([1, 1.5])),
        ("integer", pa.array([1, float("nan")])),
        ("bigint", pa.array([1, 2**63], pa.uint64())),
        ("integer", pa.array([Decimal("1.0"), Decimal("3.5")])),
        ("float", pa.array([1, 1e39])),
        ("float", pa.array([Decimal("1"), Decimal("9" * 60)], pa.decimal256(60, 0))),
        ("decimal(4,2)", pa.array([Decimal("1.500"), Decimal("1.555")])),
        ("decimal(4,2)", pa.array([1, 100])),
        ("uuid", pa.array([str(SOME), "x"])),
        ("json", pa.array(["1", "{"])),
        ("date", pa.array([0, 10**7], pa.int32()).view(pa.date32())),
        ("time", pa.array([0, 86_400_000_000]).view(pa.time64("us"))),
        ("timestamp", pa.array([0, 1], pa.timestamp("ns"))),
        ("timestamp", pa.array([0, 2**62], pa.timestamp("us"))),
        ("timestamp", pa.array([0, 2**62], pa.timestamp("s"))),
    ],
)
def test_A10_lossy_casts_name_the_row(sql: str, array: pa.Array) -> None:
    schema = table(("v", sql))
    body = stream(pa.table({"v": array}))
    try:
        decode(schema, body)
    except RowsInvalid as refusal:
        errors = refusal.members["errors"]
        assert [(e["row"], e["column"]) for e in errors] == [(1, "v")]
        assert errors[0]["value"]
    except MalformedBody:
        # Arrow's own validation refuses a time of day beyond 24 h before any cast.
        assert sql == "time"
        return
    else:
        pytest.fail("a lossy value was kept")
    decoded = decode(schema, body, on_invalid="quarantine")
    assert (decoded.batch.num_rows, [r.row for r in decoded.rejected]) == (1, [1])
    assert list(json.loads(decoded.rejected[0].value)) == ["v"]


@pytest.mark.parametrize(
    ("sql", "array"),
    [
        ("varchar", pa.array([1, 2])),
        ("bigint", pa.array(["1", "2"])),
        ("decimal(9,2)", pa.array([1.0, 2.0])),
        ("timestamp", pa.array([0, 1], pa.timestamp("us", "UTC"))),
        ("timestamptz", pa.array([0, 1], pa.timestamp("us"))),
        ("integer", pa.array([True, False])),
        ("blob", pa.array(["a", "b"])),
        ("varchar", pa.array([b"a", b"b"])),
        ("timestamp", pa.array([1, 2])),
        ("json", pa.array([[1], [2]])),
    ],
)
def test_A10_types_that_never_fit(sql: str, array: pa.Array) -> None:
    with pytest.raises(RowsInvalid) as caught:
        cast(sql, array)
    assert caught.value.members["error_count"] == 2


def test_A10_columns_are_matched_by_folded_name() -> None:
    schema = table(("a", "integer"), ("b", "varchar"))
    decoded = decode(schema, stream(pa.table({"B": ["x"], "A": [1]})))
    assert decoded.batch.to_pydict() == {"10": [1], "11": ["x"]}
    for data in (pa.table({"a": [1], "zz": [1]}), pa.table([[1], [2]], names=["a", "A"])):
        with pytest.raises(RowsInvalid):
            decode(schema, stream(data))


def test_A10_missing_and_null_where_none_may_be() -> None:
    schema = table(("a", "integer", False), ("b", "varchar"))
    with pytest.raises(RowsInvalid, match="missing"):
        decode(schema, stream(pa.table({"b": ["x"]})))
    for array in (pa.array([1, None]), pa.array([1, None]).dictionary_encode()):
        with pytest.raises(RowsInvalid) as caught:
            decode(schema, stream(pa.table({"a": array})))
        assert [e["row"] for e in caught.value.members["errors"]] == [1]
    assert decode(schema, stream(pa.table({"a": [1]}))).batch.column(1).null_count == 1


def test_several_batches_become_one() -> None:
    batch = pa.record_batch({"a": pa.array([1, 2])})
    sliced = pa.Table.from_batches([batch, batch.slice(1)])
    decoded = decode(table(("a", "bigint")), stream(sliced))
    assert decoded.batch.to_pydict() == {"10": [1, 2, 2]}


def test_an_end_mark_is_required_even_where_data_looks_like_one() -> None:
    schema = table(("a", "integer"))
    whole = stream(pa.table({"a": pa.array([7, 8, -1], pa.int32())}))
    assert decode(schema, whole).batch.num_rows == 3
    for cut in (
        whole[:-8],
        whole[:-4],
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole + b"\0" * 8,
    ):
        with pytest.raises(MalformedBody):
            decode(schema, cut)
    # The last buffer's bytes are those of an end mark: -1 and padding.
    lookalike = stream(pa.table({"a": pa.array([-1], pa.int32())}))[:-8]
    unpadded = lookalike.rstrip(b"\0")
    assert unpadded.endswith(b"\xff\xff\xff\xff")
    with pytest.raises(MalformedBody):
        decode(schema, unpadded + b"\0" * 4)
    with pytest.raises(MalformedBody):
        decode(schema, whole + whole)


def test_damaged_streams_never_pass_unseen_or_crash() -> None:
    schema = table(("a", "varchar"), ("b", "integer"))
    data = pa.table({"a": ["x", "yy", None], "b": [1, None, 3]})
    for codec in (None, "lz4"):
        whole = stream(data, codec=codec)
        for at in range(0, len(whole) - 8):
            damaged = bytearray(whole)
            damaged[at] ^= 0xFF
            try:
                batch = decode(schema, bytes(damaged)).batch
            except (MalformedBody, MalformedRequest, RowsInvalid, BodyTooLarge):
                continue
            batch.validate(full=True)


def test_invalid_utf8_is_refused() -> None:
    text = pa.array([b"\xff"]).view(pa.string())
    with pytest.raises(MalformedBody):
        decode(table(("a", "varchar")), stream(pa.table({"a": text})))


def test_no_rows_and_too_many() -> None:
    schema = table(("a", "integer"))
    with pytest.raises(MalformedRequest):
        decode(schema, stream(pa.table({"a": pa.array([], pa.int32())})))
    with pytest.raises(BodyTooLarge):
        decode_rows(schema, ARROW, stream(pa.table({"a": [1, 2]})), rows_max=1)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_A11_decompressed_size_is_known_before_inflating(codec: str) -> None:
    data = pa.table(
        {"a": pa.array([0] * 100_000), "b": pa.array(["x" * 1000] * 1000 + [None] * 99_000)}
    )
    body = memoryview(stream(data, codec=codec))
    actual = sum(b.size for c in data.columns for b in c.chunk(0).buffers() if b is not None)
    check_decompressed_size(body, limit_bytes=actual + 4096)
    with pytest.raises(BodyTooLarge):
        check_decompressed_size(body, limit_bytes=actual - 4096)


@pytest.mark.parametrize("encoding", ["dictionary", "runs", "views", "dictionary of views"])
def test_A11_repeated_values_count_as_often_as_they_stand(encoding: str) -> None:
    rows, size = 500, 10_000
    text = pa.array(["x" * size])
    views = text.cast(pa.string_view())
    indices = pa.array([0] * rows, pa.int32())
    array = {
        "dictionary": lambda: pa.DictionaryArray.from_arrays(indices, text),
        "dictionary of views": lambda: pa.DictionaryArray.from_arrays(indices, views),
        "runs": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), text),
        "views": lambda: pa.array(["x" * size] * rows, pa.string_view()),
    }[encoding]()
    batch = pa.record_batch({"a": array}).slice(100)
    check_expanded_size(batch, limit_bytes=(rows - 100) * size)
    with pytest.raises(BodyTooLarge):
        check_expanded_size(batch, limit_bytes=(rows - 100) * size - 1)
    got = decode(table(("a", "varchar")), stream(pa.table({"a": array}))).batch
    assert got.column(0).to_pylist() == text.to_pylist() * rows


def test_runs_and_their_slices_are_written_out() -> None:
    runs = pc.run_end_encode(pa.array(["a", "a", None, None, "b"]))
    for start in range(5):
        batch = pa.record_batch({"a": runs}).slice(start)
        got = decode(table(("a", "varchar")), stream(batch)).batch
        assert got.column(0).to_pylist() == ["a", "a", None, None, "b"][start:]


def test_encodings_of_nested_values_are_refused() -> None:
    nested = pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array([[1, 2]]))
    with pytest.raises(MalformedBody, match="not supported"):
        decode(table(("a", "varchar")), stream(pa.table({"a": nested})))


def test_A11_a_claim_of_a_terabyte_is_refused() -> None:
    data = pa.table({"a": pa.array([0] * 5000)})
    body = bytearray(stream(data, codec="zstd"))
    at = body.index(struct.pack("<q", 5000 * 8))
    body[at : at + 8] = struct.pack("<q", 1 << 40)
    with pytest.raises(BodyTooLarge):
        decode(table(("a", "bigint")), bytes(body))


def test_A10_quarantined_arrow_rows_are_json_that_ingest_takes() -> None:
    schema = table(
        ("a", "integer"), ("t", "timestamptz"), ("x", "blob"), ("f", "double"), ("w", "bigint")
    )
    data = pa.table(
        {
            "a": pa.array([1, 2**40]),
            "t": pa.array([NOON, NOON], pa.timestamp("us", "UTC")),
            "x": pa.array([b"a", b"\xff"]),
            "f": pa.array([0.5, float("nan")]),
            "w": pa.array([1, 2**60]),
        }
    )
    decoded = decode(schema, stream(data), on_invalid="quarantine")
    (rejected,) = decoded.rejected
    row = json.loads(rejected.value)
    assert row["a"] == 2**40
    row["a"] = 2
    fixed = decode_rows(schema, "application/json", json.dumps([row]).encode(), rows_max=1).batch
    wanted = decode(schema, stream(data.set_column(0, "a", pa.array([1, 2])))).batch.slice(1)
    assert str(fixed.to_pylist()) == str(wanted.to_pylist())
