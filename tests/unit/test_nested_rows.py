"""Lists, structs and maps through every decoder (contract A10): the fast way never accepts what the
exact one refuses, all formats mean the same, and what does not fit is named by its path."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import BodyTooLarge, LakebusError, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.ingesting.plain_rows import rows_as_json
from storage.rows.columns import REFUSALS
from storage.rows.decode import ARROW_STREAM, CSV, JSON, NDJSON, PARQUET, decode_rows
from storage.rows.decode_arrow import DECOMPRESSED_BYTES_MAX
from storage.rows.decode_csv import exact_csv, fast_csv
from storage.rows.decode_json import exact_json, fast_json, fast_ndjson, plan_of
from storage.rows.fingerprint import fingerprint
from storage.rows.inferring import infer_columns
from storage.rows.segment import EntryPart, decode_single_entry, single_entry_segment
from storage.rows.types import ColumnType, parse_type
from tests.unit.nested_values import nested_types, plain, texts_of

UUID = "0f2b4c1e-0000-4000-8000-000000000000"


def schema_of(*types: str, nullable: bool = True) -> TableSchema:
    columns = (
        Column(n, f"c{n}", parse_type(sql).sql, nullable) for n, sql in enumerate(types, start=1)
    )
    return TableSchema(1, "t", 1, tuple(columns))


def values_of(batch: pa.RecordBatch, kind: ColumnType) -> list[Any]:
    batch.validate(full=True)
    return [plain(kind, value) for value in batch.column(0).to_pylist()]


def stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def file_of(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def csv_of(texts: list[str]) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerow(["c1"])
    for text in texts:
        writer.writerow([text])
    return sink.getvalue().encode("utf-8", "surrogatepass")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_A10_the_fast_way_equals_the_exact_one_for_nested_values(data: st.DataObject) -> None:
    kind = data.draw(nested_types())
    schema = schema_of(kind.sql)
    texts = data.draw(st.lists(texts_of(kind, wrong=True), min_size=1, max_size=4))
    rows = [f'{{"c1":{text}}}' for text in texts]
    body = ("[" + ",".join(rows) + "]").encode("utf-8", "surrogatepass")
    lines = "\n".join(rows).encode("utf-8", "surrogatepass")
    fields = csv_of(texts)
    ways: tuple[tuple[Callable[[], pa.RecordBatch], bytes | None], ...] = (
        (lambda: fast_json(plan_of(schema), body, rows_max=9), body),
        (lambda: fast_ndjson(plan_of(schema), lines, rows_max=9), body),
        (lambda: fast_csv(schema, fields, rows_max=9), None),
    )
    for fast, exact in ways:
        try:
            batch = fast()
        except (*REFUSALS, LakebusError):
            continue
        if exact is None:
            wanted = exact_csv(schema, fields, on_invalid="reject", rows_max=9).batch
        else:
            wanted = exact_json(schema, exact, on_invalid="reject", rows_max=9).batch
        assert batch.schema == wanted.schema
        assert values_of(batch, kind) == values_of(wanted, kind)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_A4_A10_all_formats_mean_the_same_nested_values(data: st.DataObject) -> None:
    kind = data.draw(nested_types())
    schema = schema_of(kind.sql)
    texts = data.draw(st.lists(texts_of(kind), min_size=1, max_size=5))
    body = ("[" + ",".join(f'{{"c1":{text}}}' for text in texts) + "]").encode(
        "utf-8", "surrogatepass"
    )
    try:
        first = decode_rows(schema, JSON, body, rows_max=9).batch
    except LakebusError:
        return  # a text that only nearly fits
    wanted, digest = values_of(first, kind), fingerprint([EntryPart(1, 1, first)])
    table = pa.table({"c1": first.column(0)})
    bodies = {
        CSV: csv_of(texts),
        NDJSON: b"\n".join(b'{"c1":%b}' % t.encode("utf-8", "surrogatepass") for t in texts),
        ARROW_STREAM: stream_of(table),
        PARQUET: file_of(table),
    }
    for media_type, sent in bodies.items():
        batch = decode_rows(schema, media_type, sent, rows_max=9).batch
        assert batch.schema == first.schema
        assert values_of(batch, kind) == wanted, media_type
        assert fingerprint([EntryPart(1, 1, batch)]) == digest, media_type
    parts = [EntryPart(1, 1, first.slice(0, 2)), EntryPart(1, 1, first.slice(2))]
    assert fingerprint(parts) == digest
    stored = decode_single_entry(single_entry_segment([EntryPart(1, 1, first)]))
    assert fingerprint(stored) == digest
    if "json" in kind.sql:
        return  # a document is shown as its text
    # As people see them in quarantine, they can be sent again.
    shown = json.dumps(rows_as_json(schema, first, rows_max=9)).encode()
    assert values_of(decode_rows(schema, JSON, shown, rows_max=9).batch, kind) == wanted


# --- refusals -------------------------------------------------------------------------------------


NESTED = "struct(a integer, b decimal(5,2)[], m map(integer, struct(x uuid)))"


@pytest.mark.parametrize(
    ("sql", "text", "path", "reason"),
    [
        ("integer[]", "[1, 2.5]", "c1[1]", "has a fraction"),
        ("integer[]", '{"a": 1}', "c1", "expected a JSON array"),
        ("json[]", '["\\ud800"]', "c1[0]", "surrogate"),
        (NESTED, "[]", "c1", "expected a JSON object"),
        (NESTED, '{"B": [1, "1.005"]}', "c1.b[1]", "more than 2 digits"),
        (NESTED, '{"c": 1}', "c1.c", "no such field"),
        (NESTED, '{"a": 1, "A": null}', "c1.a", "named twice"),
        (NESTED, '{"m": {"1": {"x": "no"}}}', "c1.m['1'].x", "not a uuid"),
        (NESTED, '{"m": {"1.5": null}}', "c1.m['1.5']", "has a fraction"),
        (NESTED, '{"m": {"1": null, "1.0": null}}', "c1.m['1.0']", "the key comes twice"),
        (NESTED, '{"m": [{"key": 1}, {"key": 1}]}', "c1.m[1]", "the key comes twice"),
        (NESTED, '{"m": [{"value": null}]}', "c1.m[0]", "never null"),
        (NESTED, '{"m": [{"key": "x"}]}', "c1.m[0].key", "expected a number"),
        (NESTED, '{"m": [[1, 2]]}', "c1.m[0]", 'expected {"key"'),
        (NESTED, '{"m": 1}', "c1.m", "or a list of"),
        ("map(double, integer)", '{"-0.0": 1, "0": 1}', "c1['0']", "the key comes twice"),
        ("map(double, integer)", '{"NaN": 1, "NaN": 1}', "c1['NaN']", "the key comes twice"),
        ("map(varchar, integer)", '{"k": 1, "\\u006b": 2}', "c1['k']", "the key comes twice"),
    ],
)
def test_A10_nested_json_that_does_not_fit_is_named_by_its_path(
    sql: str, text: str, path: str, reason: str
) -> None:
    body = f'[{{"c1": null}}, {{"c1": {text}}}]'.encode()
    for media_type, sent in ((JSON, body), (CSV, csv_of(["null", text]))):
        with pytest.raises(RowsInvalid) as caught:
            decode_rows(schema_of(sql), media_type, sent, rows_max=9)
        (error,) = caught.value.members["errors"]
        assert (error["row"], error["column"]) == (1, path)
        assert reason in error["reason"]


def test_A10_a_csv_field_that_is_no_json_is_refused() -> None:
    with pytest.raises(RowsInvalid) as caught:
        decode_rows(schema_of("integer[]"), CSV, csv_of(["[1", "2]", "[3]"]), rows_max=9)
    assert [error["row"] for error in caught.value.members["errors"]] == [0, 1]


_PAIRS = pa.list_(pa.struct([("value", pa.int64()), ("KEY", pa.int64())]))


@pytest.mark.parametrize(
    ("sql", "array", "path", "reason"),
    [
        ("integer[]", pa.array([[1, 2**40, 2**41]], pa.large_list(pa.int64())), "c1[1]", "int64"),
        ("integer[]", pa.array([["x"]]), "c1[0]", "Arrow type string cannot become integer"),
        ("integer[]", pa.array([{"a": 1}]), "c1", "cannot become integer[]"),
        ("struct(a integer)", pa.array([{"a": 1, "b": None}]), "c1.b", "no such field"),
        (
            "struct(a integer)",
            pa.array([{"a": 1, "A": 1}], pa.struct([("a", pa.int8()), ("A", pa.int8())])),
            "c1.a",
            "twice",
        ),
        ("struct(a integer[])", pa.array([{"a": [1, 0.5]}]), "c1.a[1]", "double"),
        (
            "map(integer, tinyint)",
            pa.array([[(1, 1), (2, 200)]], pa.map_(pa.int64(), pa.int64())),
            "c1[1].value",
            "int64",
        ),
        (
            "map(double, tinyint)",
            pa.array([[(0.0, 1), (-0.0, 1)]], pa.map_(pa.float64(), pa.int64())),
            "c1",
            "a key comes twice",
        ),
        ("map(integer, tinyint)", pa.array([[{"KEY": None, "value": 1}]], _PAIRS), "c1[0]", "null"),
        ("timestamptz[]", pa.array([[0]], pa.list_(pa.timestamp("us"))), "c1[0]", "no zone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "array",
)
def test_A10_nested_arrow_that_does_not_fit_is_named_by_its_path(
    sql: str, array: pa.Array, path: str, reason: str
) -> None:
    table = pa.table({"C1": pa.concat_arrays([pa.nulls(1, array.type), array])})
    with pytest.raises(RowsInvalid) as caught:
        decode_rows(schema_of(sql), ARROW_STREAM, stream_of(table), rows_max=9)
    (error,) = caught.value.members["errors"]
    assert (error["row"], error["column"]) == (1, path)
    assert reason in error["reason"]


def test_A10_bad_nested_rows_are_set_aside_and_the_others_kept() -> None:
    schema = schema_of("map(integer, integer[])")
    kind = pa.map_(pa.int64(), pa.list_(pa.int64()))
    array = pa.array([[(1, [1])], [(1, []), (1, None)], None, [(2, [2**40])], [(3, None)]], kind)
    for media_type, body in (
        (ARROW_STREAM, stream_of(pa.table({"c1": array}))),
        (PARQUET, file_of(pa.table({"c1": array}))),
    ):
        found = decode_rows(schema, media_type, body, on_invalid="quarantine", rows_max=9)
        assert found.batch.column(0).to_pylist() == [[(1, [1])], None, [(3, None)]]
        assert [row.row for row in found.rejected] == [1, 3]
        sent = [{"key": 1, "value": []}, {"key": 1, "value": None}]
        assert json.loads(found.rejected[0].value) == {"c1": sent}


def test_A10_null_where_none_may_be_is_refused_at_the_top_and_taken_inside() -> None:
    schema = schema_of("integer[]", nullable=False)
    taken = decode_rows(schema, JSON, b'[{"c1": [null]}]', rows_max=9)
    assert taken.batch.column(0).to_pylist() == [[None]]
    for body in (b'[{"c1": null}]', b"[{}]"):
        with pytest.raises(RowsInvalid):
            decode_rows(schema, JSON, body, rows_max=9)


def test_A10_layouts_of_lists_and_hidden_values_mean_the_same() -> None:
    wanted = [[1, 2], None, [], [3, None]]
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 2, 3, 3, 5], pa.int32()),
        pa.array([1, 2, 9, 3, None]),
        mask=pa.array([False, True, False, False]),
    )
    plain_list = pa.array(wanted, pa.list_(pa.int64()))
    layouts = [hidden, plain_list, plain_list.cast(pa.large_list(pa.int16()))]
    layouts.append(pa.concat_arrays([plain_list.slice(0, 1), plain_list]).slice(1))
    schema = schema_of("integer[]")
    digests = set()
    for array in layouts:
        found = decode_rows(schema, ARROW_STREAM, stream_of(pa.table({"c1": array})), rows_max=9)
        assert found.batch.column(0).to_pylist() == wanted
        digests.add(fingerprint([EntryPart(1, 1, found.batch)]))
    assert len(digests) == 1
    encoded = pa.ListArray.from_arrays(
        pa.array([0, 2], pa.int32()), pa.array(["a", "a"]).dictionary_encode()
    )
    fixed = pa.array([["a", "a"]], pa.list_(pa.string(), 2))
    for array in (encoded, fixed):
        body = stream_of(pa.table({"c1": array}))
        found = decode_rows(schema_of("varchar[]"), ARROW_STREAM, body, rows_max=9)
        assert found.batch.column(0).to_pylist() == [["a", "a"]]


def test_A11_lists_that_stand_for_more_than_they_hold_are_refused() -> None:
    rows = pa.ListArray.from_arrays(pa.array([0, 100_000_000], pa.int32()), pa.nulls(100_000_000))
    body = stream_of(pa.table({"c1": rows}))
    with pytest.raises(BodyTooLarge):
        decode_rows(schema_of("integer[]"), ARROW_STREAM, body, rows_max=9)
    count = DECOMPRESSED_BYTES_MAX // 16 + 1
    packed = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.int8()))
    body = file_of(pa.table({"c1": packed}))
    assert len(body) < 100_000
    with pytest.raises(BodyTooLarge):
        decode_rows(schema_of("tinyint[]"), PARQUET, body, rows_max=9)


def test_A10_many_bad_values_of_one_row_are_told_once() -> None:
    array = pa.array([[2**40] * 5_000, [1], [1] * 3_000 + [2**40] * 3_000], pa.list_(pa.int64()))
    with pytest.raises(RowsInvalid) as caught:
        decode_rows(
            schema_of("integer[]"), ARROW_STREAM, stream_of(pa.table({"c1": array})), rows_max=9
        )
    found = [(error["row"], error["column"]) for error in caught.value.members["errors"]]
    assert found == [(0, "c1[0]"), (2, "c1[3000]")]


# --- tables made from their rows ------------------------------------------------------------------


def test_nested_arrow_and_parquet_make_nested_columns_and_json_makes_json() -> None:
    array = pa.array(
        [{"B": [1], "a": None}], pa.struct([("B", pa.list_(pa.int8())), ("a", pa.date32())])
    )
    pairs = pa.array([[("k", 1.5)]], pa.map_(pa.string(), pa.float32()))
    table = pa.table({"S": array, "m": pairs, "none": pa.nulls(1, array.type)})
    for media_type, body in ((ARROW_STREAM, stream_of(table)), (PARQUET, file_of(table))):
        found = infer_columns("t", media_type, body, rows_max=9)
        types = {name: kind.sql for name, kind in found.types.items()}
        assert types == {"s": "struct(b tinyint[], a date)", "m": "map(varchar, float)"}
        assert found.skipped == ("none",)
    found = infer_columns("t", JSON, b'[{"l": [1], "o": {"a": 1}}]', rows_max=9)
    assert {kind.sql for kind in found.types.values()} == {"json"}


# --- decimals, whose digits Arrow loses when it scales up -----------------------------------------


@pytest.mark.parametrize("text", ["34028270720364566710904171647.3485", "9" * 29, "-" + "9" * 33])
def test_A10_digits_beyond_a_wide_decimal_are_refused_and_never_wrapped(text: str) -> None:
    schema = schema_of("decimal(38,10)")
    for media_type, body in (
        (JSON, f'[{{"c1": {text}}}]'.encode()),
        (CSV, csv_of([text])),
        (ARROW_STREAM, stream_of(pa.table({"c1": _decimals(text, pa.decimal128(38, 4))}))),
        (ARROW_STREAM, stream_of(pa.table({"c1": _decimals(text, pa.decimal256(76, 4))}))),
    ):
        with pytest.raises(RowsInvalid):
            decode_rows(schema, media_type, body, rows_max=9)
    fits = decode_rows(schema, JSON, f'[{{"c1": -{"9" * 28}.5}}]'.encode(), rows_max=9).batch
    assert str(fits.column(0)[0]) == f"-{'9' * 28}.5000000000"


def _decimals(text: str, kind: pa.DataType) -> pa.Array:
    return pa.array([text]).cast(pa.decimal256(76, 4)).cast(kind)
