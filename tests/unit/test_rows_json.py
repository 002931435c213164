"""JSON bodies: the rules of contract A10 and of the API's "JSON values", one by one."""

from __future__ import annotations

import json
import time

import pytest

from lakebus.errors import (
    BodyTooLarge,
    MalformedBody,
    MalformedRequest,
    RowsInvalid,
    UnsupportedMediaType,
)
from lakebus.schemas import Column, TableSchema
from storage.rows.decode import (
    DecodedRows,
    OnInvalid,
    decode_rows,
    decode_rows_value,
    split_tables,
)
from storage.rows.decode_json import PlanCache, fast_json, plan_of

JSON, NDJSON = "application/json", "application/x-ndjson"


def table(*columns: tuple[str, str] | tuple[str, str, bool], version: int = 1) -> TableSchema:
    return TableSchema(
        7,
        "events",
        version,
        tuple(Column(10 + i, *column) for i, column in enumerate(columns)),
    )


def decode(
    schema: TableSchema, body: str | bytes, *, on_invalid: OnInvalid = "reject"
) -> DecodedRows:
    data = body.encode("utf-8") if isinstance(body, str) else body
    return decode_rows(schema, JSON, data, on_invalid=on_invalid, rows_max=1000)


def test_A10_errors_name_row_column_value_and_reason() -> None:
    schema = table(("a", "integer"), ("b", "varchar", False))
    body = '[{"a":1,"b":"x"},{"a":1.5,"b":null},{"c":[1,2],"b":"y"},7]'
    with pytest.raises(RowsInvalid) as caught:
        decode(schema, body)
    assert caught.value.members["error_count"] == 4
    assert [(e["row"], e["column"], e["value"]) for e in caught.value.members["errors"]] == [
        (1, "a", "1.5"),
        (1, "b", "null"),
        (2, "c", "[1,2]"),
        (3, None, "7"),
    ]


def test_A10_first_hundred_errors_and_the_count_of_all() -> None:
    rows = [{"a": "x" * 500} for _ in range(250)]
    with pytest.raises(RowsInvalid) as caught:
        decode(table(("a", "integer")), json.dumps(rows))
    errors = caught.value.members["errors"]
    assert (len(errors), caught.value.members["error_count"]) == (100, 250)
    assert all(len(error["value"]) < 100 for error in errors)
    assert [error["row"] for error in errors] == list(range(100))


def test_A10_quarantine_sets_bad_rows_apart() -> None:
    schema = table(("a", "integer"))
    decoded = decode(schema, '[{"a":1},{"a":"é"},{"a":3}]', on_invalid="quarantine")
    assert decoded.batch.to_pydict() == {"10": [1, 3]}
    (rejected,) = decoded.rejected
    assert (rejected.row, rejected.value) == (1, '{"a":"é"}'.encode())
    assert rejected.errors[0].column == "a"


def test_A10_quarantine_of_all_rows_leaves_an_empty_batch() -> None:
    decoded = decode(table(("a", "uuid")), '[{"a":1},{"b":1}]', on_invalid="quarantine")
    assert (decoded.batch.num_rows, len(decoded.rejected)) == (0, 2)
    assert decoded.batch.schema == plan_of(table(("a", "uuid"))).arrow


@pytest.mark.parametrize(
    "row",
    [
        '{"a":1,"a":1}',
        '{"a":1,"A":2}',
        '{"a" : 1, "a" :1}',
        '{"a":1,"\\u0061":1}',
        '{"a":1,"b":":","a":2}',
        '{"a":null,"a":2,"b":"x"}',
    ],
)
def test_A10_a_key_twice_is_a_row_error(row: str) -> None:
    schema = table(("a", "integer"), ("b", "varchar"))
    # The other row lacks as many keys as this one has too many.
    for body in (f"[{row}]", f'[{row},{{"b":"x"}}]', f"[{row},{{}}]"):
        with pytest.raises(RowsInvalid) as caught:
            decode(schema, body)
        assert "twice" in caught.value.members["errors"][0]["reason"]


def test_A10_a_key_twice_is_found_beside_json_values() -> None:
    schema = table(("a", "integer"), ("j", "json"))
    good = '[{"a":1,"j":{"x":1,"y":{"z":":\\":"}}}]'
    assert decode(schema, good).batch.num_rows == 1
    with pytest.raises(RowsInvalid):
        decode(schema, '[{"a":1,"j":{"x":1},"a":2}]')
    with pytest.raises(RowsInvalid):
        decode(schema, '[{"a":1,"j":{"x":1},"j":2}]')


def test_A10_text_that_looks_like_keys_stays_on_the_fast_path() -> None:
    schema = table(("a", "integer"), ("b", "varchar"))
    rows = [{"a": 1, "b": '{"k": "v", "n":1}'}, {"a": 2, "b": "note : this"}]
    body = json.dumps(rows).encode()
    assert fast_json(plan_of(schema), body, rows_max=10).to_pylist()[0]["11"] == rows[0]["b"]
    spaced = json.dumps(rows, separators=(" ,", " : ")).encode()
    assert fast_json(plan_of(schema), spaced, rows_max=10).num_rows == 2


def test_keys_fold_to_lower_case_and_order_does_not_matter() -> None:
    schema = table(("event_id", "bigint"), ("b", "varchar"))
    decoded = decode(schema, '[{"B":"x","Event_ID":1},{"event_id":2}]')
    assert decoded.batch.to_pydict() == {"10": [1, 2], "11": ["x", None]}


def test_A10_missing_and_null_where_none_may_be() -> None:
    for sql in ("integer", "decimal(5,2)", "json", "varchar"):
        schema = table(("v", sql, False))
        for body in ('[{"v":null}]', "[{}]"):
            with pytest.raises(RowsInvalid, match="no null"):
                decode(schema, body)


def test_A10_duplicate_beats_missing_in_the_key_count() -> None:
    schema = table(("a", "integer"), ("b", "integer"))
    assert decode(schema, '[{"a":1},{"b":2},{}]').batch.to_pydict() == {
        "10": [1, None, None],
        "11": [None, 2, None],
    }


@pytest.mark.parametrize("body", ["[]", " [ ] "])
def test_zero_rows_is_malformed_request(body: str) -> None:
    with pytest.raises(MalformedRequest):
        decode(table(("a", "integer")), body)


def test_zero_lines_is_malformed_request() -> None:
    for body in (b"", b"\n\n"):
        with pytest.raises(MalformedRequest):
            decode_rows(table(("a", "integer")), NDJSON, body, rows_max=10)


@pytest.mark.parametrize(
    ("body", "position"),
    [
        (b'[{"a":1}', 8),
        (b'[{"a":1},]', 9),
        (b'[{"a":1}] x', 10),
        (b'[{"a":01}]', 7),
        (b"", 0),
        (b"5", 0),
        (b'"x"', 0),
        (b'\xef\xbb\xbf[{"a":1}]', 0),
        (b'[{"a":"\xff"}]', 7),
        (b'[{"\xc3\xa9":1}', 9),
        (b'[{"a":NaN}]', 6),
        (b'[{"a" 1}]', 6),
        (b"[{a:1}]", 2),
    ],
)
def test_malformed_body_says_where(body: bytes, position: int) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode(table(("a", "varchar")), body)
    assert caught.value.members["position"] == position


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":['])
def test_deep_nesting_is_refused_quickly(opening: bytes) -> None:
    started = time.monotonic()
    for sql in ("varchar", "json", "decimal(9,2)"):
        with pytest.raises((MalformedBody, RowsInvalid)):
            decode(table(("a", sql)), opening * 100_000)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("sql", ["bigint", "decimal(38,10)", "double", "varchar", "float"])
def test_huge_numbers_are_refused_quickly(sql: str) -> None:
    started = time.monotonic()
    for number in ("9" * 1_000_000, "1e" + "9" * 100_000, "0." + "1" * 1_000_000 + "e400"):
        with pytest.raises(RowsInvalid):
            decode(table(("a", sql)), f'[{{"a":{number}}}]')
    assert time.monotonic() - started < 2


def test_rows_max_is_a_limit() -> None:
    schema = table(("a", "integer"))
    assert decode_rows(schema, JSON, b'[{"a":1},{"a":2}]', rows_max=2).batch.num_rows == 2
    for body in (b'[{"a":1},{"a":2},{"a":3}]', b'[{"A":1},{"A":2},{"A":3}]'):
        with pytest.raises(BodyTooLarge) as caught:
            decode_rows(schema, JSON, body, rows_max=2)
        assert caught.value.members["limit_rows"] == 2


def test_one_object_is_one_row() -> None:
    assert decode(table(("a", "integer")), ' {"a":1} ').batch.to_pydict() == {"10": [1]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1}\n{"a":2}\n',
        b'{"a":1}\n{"a":2}',
        b'{"a":1}\r\n{"a":2}\r\n',
        b'\n{"a":1}\n\n {"a":2}\n\n',
        b'{"A":1}\n{"A":2}\n',
    ],
)
def test_ndjson(body: bytes) -> None:
    batch = decode_rows(table(("a", "integer")), NDJSON, body, rows_max=10).batch
    assert batch.to_pydict() == {"10": [1, 2]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1}{"a":2}\n',
        b'{"a":1}{"a":2}\n\n',
        b'{"a":1} {"a":2}',
        b'{"a":\n1}\n{"a":2}',
        b'{"a":1}\n{"a":',
        b'{"a":1},\n{"a":2}',
    ],
)
def test_ndjson_is_one_value_a_line(body: bytes) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode_rows(table(("a", "integer")), NDJSON, body, rows_max=10)
    assert caught.value.members["line"] in (1, 2)


def test_unsupported_media_type_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        decode_rows(table(("a", "integer")), "text/plain", b"", rows_max=1)
    assert JSON in caught.value.members["supported"]
    assert decode_rows(
        table(("a", "integer")), "Application/JSON; charset=utf-8", b'{"a":1}', rows_max=1
    ).batch.num_rows


def test_bodies_of_several_tables() -> None:
    parts = split_tables(b'{"Flights":[{"a":1}],"ns.other": [ {"a":2} ] }')
    assert list(parts) == ["flights", "ns.other"]
    batch = decode_rows_value(table(("a", "integer")), parts["ns.other"], rows_max=1).batch
    assert batch.to_pydict() == {"10": [2]}


@pytest.mark.parametrize(
    "body", [b"{}", b'{"t":[],"t":[]}', b'{"t":[1],"T":[2]}', b'{"t":[1],"\\u0074":[2]}']
)
def test_bodies_of_several_tables_name_each_once(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        split_tables(body)


@pytest.mark.parametrize("body", [b"[]", b'{"t":[1]', b"", b'{"t":[\xff]} x', b'{"t":' * 100_000])
def test_malformed_bodies_of_several_tables(body: bytes) -> None:
    with pytest.raises(MalformedBody):
        split_tables(body)


def test_plans_are_cached_with_a_bound_and_never_cross_schemas() -> None:
    cache = PlanCache(plans_max=2)
    first = table(("a", "integer"))
    plan = cache.plan(first)
    assert cache.plan(table(("a", "integer"))) is plan
    assert cache.plan(table(("b", "integer"))) is not plan
    for version in range(5):
        cache.plan(table(("a", "integer"), version=version))
    assert len(cache) == 2


def test_a_hundred_row_body_takes_the_fast_path() -> None:
    schema = table(
        ("event_id", "bigint"),
        ("device", "integer", False),
        ("ts", "timestamptz"),
        ("value", "double"),
        ("amount", "decimal(18,4)"),
        ("note", "varchar"),
        ("key", "uuid"),
        ("raw", "blob"),
        ("day", "date"),
        ("at", "time"),
        ("extra", "json"),
        ("ok", "boolean"),
        ("narrow", "float"),
    )
    row = (
        '{"event_id":"%d","device":1,"ts":"2026-01-31T12:00:00+02:00","value":"NaN","amount":"1.5",'
        '"note":null,"key":"0f2b4c1e-0000-4000-8000-000000000000","raw":"AA==","day":"2026-01-31",'
        '"at":"12:00:00","extra":{"a": [":"]},"ok":true,"narrow":0.5}'
    )
    body = "[" + ",".join(row % i for i in range(100)) + "]"
    batch = fast_json(plan_of(schema), body.encode(), rows_max=100)
    assert batch.num_rows == 100
    assert batch.schema.names == [str(column.column_id) for column in schema.columns]
    assert batch.validate(full=True) is None
