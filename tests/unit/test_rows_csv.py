"""CSV bodies: fields cut strictly, values by the rules of JSON, null told from an empty string."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.errors import BodyTooLarge, LakebusError, MalformedBody, MalformedRequest, RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.rows.columns import REFUSALS
from storage.rows.decode import DecodedRows, OnInvalid, decode_rows
from storage.rows.decode_csv import exact_csv, fast_csv
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from tests.json_reader.judge import storage_of
from tests.unit.test_rows_agreement import FITTING

CSV = "text/csv"


def table(*columns: tuple[str, str] | tuple[str, str, bool]) -> TableSchema:
    return TableSchema(
        7, "events", 1, tuple(Column(10 + i, *column) for i, column in enumerate(columns))
    )


def decode(
    schema: TableSchema, body: str | bytes, *, on_invalid: OnInvalid = "reject"
) -> DecodedRows:
    data = body.encode() if isinstance(body, str) else body
    return decode_rows(schema, CSV, data, on_invalid=on_invalid, rows_max=1_000)


def values(schema: TableSchema, body: str) -> list[list[Any]]:
    batch = decode(schema, body).batch
    return [list(row) for row in zip(*(c.to_pylist() for c in batch.columns), strict=True)]


TWO = table(("id", "bigint"), ("note", "varchar"))


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ("id,note\n1,x\n2,y\n", [[1, "x"], [2, "y"]]),
        ("note,ID\nx,1", [[1, "x"]]),
        ("id,note\r\n1,x\r\n", [[1, "x"]]),
        ('id,note\n1,""\n2,\n', [[1, ""], [2, None]]),
        ('"id","note"\n1,"a ""b"", c\nd"\n', [[1, 'a "b", c\nd']]),
        ("note\nx\n", [[None, "x"]]),
        ("id\n1\n\n3\n", [[1, None], [None, None], [3, None]]),
        ("id,note\n1,x\n\n2,y\n", [[1, "x"], [2, "y"]]),
        ("\ufeffid,note\n1,é\n", [[1, "é"]]),
        ("id,note\n1,NULL\n", [[1, "NULL"]]),
        ("id,note\n1, x \n", [[1, " x "]]),
    ],
)
def test_bodies_are_read_as_they_are(body: str, rows: list[list[Any]]) -> None:
    assert values(TWO, body) == rows


@pytest.mark.parametrize(
    ("kind", "text", "stored"),
    [
        ("boolean", "true", True),
        ("tinyint", "-128", -128),
        ("ubigint", "18446744073709551615", 2**64 - 1),
        ("bigint", "1e3", 1000),
        ("double", "-Infinity", float("-inf")),
        ("double", "1e-3", 0.001),
        ("decimal(38,10)", "1234567890123456789012345678.0123456789", None),
        ("decimal(9,2)", "1.5", None),
        ("blob", "AP8=", b"\x00\xff"),
        ("json", '{"a": [1, 2]}', '{"a":[1,2]}'),
        ("json", "null", None),
        ("uuid", "0f2b4c1e-0000-4000-8000-000000000000", None),
    ],
)
def test_A10_text_becomes_a_value_by_the_type_of_its_column(
    kind: str, text: str, stored: Any
) -> None:
    field = io.StringIO()
    csv.writer(field, lineterminator="\n").writerows([["v"], [text]])
    ((value,),) = values(table(("v", kind)), field.getvalue())
    if kind.startswith(("decimal", "uuid")):
        assert str(value).startswith(text)
    else:
        assert value == stored


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("boolean", "yes"),
        ("boolean", "1"),
        ("tinyint", "128"),
        ("integer", "1.5"),
        ("integer", " 1"),
        ("integer", "+1"),
        ("integer", "0x10"),
        ("integer", "1_000"),
        ("integer", "null"),
        ("double", "nan"),
        ("double", "1e999"),
        ("double", "1,5"),
        ("decimal(4,2)", "1.234"),
        ("decimal(4,2)", "null"),
        ("date", "31.01.2026"),
        ("timestamp", "2026-01-31T12:00:00Z"),
        ("timestamptz", "2026-01-31T12:00:00"),
        ("json", "hello"),
        ("json", "{"),
        ("blob", "not base64"),
    ],
)
def test_A10_text_that_does_not_fit_is_named(kind: str, text: str) -> None:
    body = io.StringIO()
    csv.writer(body, lineterminator="\n").writerows([["v"], [text]])
    with pytest.raises(RowsInvalid) as caught:
        decode(table(("v", kind)), body.getvalue())
    (error,) = caught.value.members["errors"]
    assert (error["row"], error["column"]) == (0, "v")
    assert error["reason"]


def test_A10_bad_rows_are_set_aside_as_json_that_can_be_sent_again() -> None:
    schema = table(("id", "integer"), ("note", "varchar", False), ("doc", "json"))
    body = "id,note,doc\n1,x,{}\nten,y,[1]\n3,,\n4,z,oops\n"
    decoded = decode(schema, body, on_invalid="quarantine")
    assert decoded.batch.num_rows == 1
    assert [json.loads(row.value) for row in decoded.rejected] == [
        {"id": "ten", "note": "y", "doc": [1]},
        {"id": 3, "note": None, "doc": None},
        {"id": 4, "note": "z", "doc": "oops"},
    ]
    assert [error.column for row in decoded.rejected for error in row.errors] == [
        "id", "note", "doc",
    ]  # fmt: skip


def test_A10_unknown_and_missing_columns_are_row_errors() -> None:
    with pytest.raises(RowsInvalid, match="no such column"):
        decode(TWO, "id,other\n1,2\n")
    with pytest.raises(RowsInvalid, match="takes no null"):
        decode(table(("id", "bigint"), ("note", "varchar", False)), "id\n1\n")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        ",,\n1,2,3\n",
        'id,note\n1,"x\n',
        'id,note\n1,"x"y\n',
        "id,note\n1\n",
        "id,note\n1,2,3\n",
        "id,ID\n1,2\n",
        '"id\n1\n',
        b"id,note\n1,\xff\n",
    ],
)
def test_broken_bodies_are_refused_whole(body: str | bytes) -> None:
    with pytest.raises(MalformedBody):
        decode(TWO, body)


@pytest.mark.parametrize("body", ["id,note\n", "id,note", "id\n", "id,note\n\n\n"])
def test_a_body_without_rows_is_a_malformed_request(body: str) -> None:
    with pytest.raises(MalformedRequest):
        decode(TWO, body)


def test_A11_rows_beyond_the_limit_are_refused() -> None:
    with pytest.raises(BodyTooLarge):
        decode(TWO, "id,note\n" + "1,x\n" * 1_001)


def test_A4_a_csv_body_has_the_identity_of_the_same_rows_in_json() -> None:
    schema = table(("id", "bigint"), ("amount", "decimal(10,2)"), ("note", "varchar"))
    rows = [{"id": 1, "amount": "1.5", "note": "a,\nb"}, {"id": 2, "amount": None, "note": ""}]
    as_json = decode_rows(
        schema, "application/json", json.dumps(rows).encode(), on_invalid="reject", rows_max=9
    ).batch
    as_csv = decode(schema, 'note,amount,id\n"a,\nb",1.50,1\n"",,2\n').batch
    assert fingerprint([EntryPart(7, 1, as_csv)]) == fingerprint([EntryPart(7, 1, as_json)])


_ANY = st.one_of(st.text(max_size=6), st.from_regex(r"[-+0-9.eE,n\"]{0,6}", fullmatch=True))


def _texts(kind: str) -> st.SearchStrategy[str | None]:
    fitting = FITTING[kind].map(lambda text: text.strip('"') if kind != "json" else text)
    return st.one_of(fitting, fitting, fitting, _ANY, st.none())


@pytest.mark.parametrize("kind", sorted(FITTING))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_A10_the_fast_path_equals_the_exact_pass(kind: str, data: st.DataObject) -> None:
    schema = TableSchema(1, "t", 1, (Column(1, "v", kind), Column(2, "w", "varchar")))
    rows = data.draw(st.lists(st.tuples(_texts(kind), _ANY), min_size=1, max_size=3))
    lines = ["v,w"]
    for text, other in rows:
        fields = ["" if text is None else _quoted(text), _quoted(other)]
        lines.append(",".join(fields))
    body = "\n".join(lines).encode("utf-8", "surrogatepass")
    try:
        batch = fast_csv(schema, body, rows_max=50)
    except (*REFUSALS, LakebusError):
        return
    expected = exact_csv(schema, body, on_invalid="reject", rows_max=50).batch
    assert batch.schema == expected.schema
    for got, wanted in zip(batch.columns, expected.columns, strict=True):
        assert storage_of(got).equals(storage_of(wanted)), body
    assert batch.column(1).to_pylist() == [other for _, other in rows]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
