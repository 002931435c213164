"""docs/results.md says what the writers do, value by value; and every type, wherever it is inside
lists, structs and maps, is written in every form as it is alone (contract D9, http-api.md)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.results_page import VALUES, Writers, results_page, writers
from storage.engine.child_faults import Refusal
from storage.engine.child_types import KNOWN
from storage.engine.plans import ResultFormat

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
FORMATS: tuple[ResultFormat, ...] = ("json", "ndjson", "csv", "arrow", "parquet")
#: Scalars of every type, each an SQL expression.
SCALARS = [
    value
    for title, values in VALUES.items()
    if not title.startswith("Lists")
    for value in values
    if value not in ("NULL", "sum(1) EXPORT_STATE") and not value.startswith("NULL::")
]


@pytest.fixture(scope="module")
def made() -> Iterator[Writers]:
    with writers() as opened:
        yield opened


def test_the_page_of_results_is_what_the_writers_do() -> None:
    assert PAGE.read_text(encoding="utf-8") == results_page(), "run `make docs`"


def test_the_page_of_results_shows_every_type(made: Writers) -> None:
    shown = {
        line.split(" | ")[1].strip("`").partition("(")[0]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    }
    lists = {"list": "integer[]", "array": "integer[3]"}
    words = {lists.get(name, name) for name in KNOWN - {"type"}}  # `type` is of no expression
    assert words <= shown


#: How a value is put inside another, and what its JSON then is.
NESTED = {
    "[{}]": "[{}]",
    "[NULL, {}]": "[null,{}]",
    "array_value({})": "[{}]",
    "[[], NULL, [{}]]": "[[],null,[{}]]",
    "{{'a': {}, 'b\"c': NULL}}": r'{{"a":{},"b\"c":null}}',
    "row({}, true)": "[{},true]",
    "MAP {{'k': {}, 'n': NULL}}": '{{"k":{},"n":null}}',
    "MAP {{1::UTINYINT: {}}}": '[{{"key":1,"value":{}}}]',
    "[MAP {{true: {{'a': [{}]}}}}]": '[[{{"key":true,"value":{{"a":[{}]}}}}]]',
}


@pytest.mark.parametrize("nested", NESTED)
def test_a_value_inside_another_is_written_as_it_is_alone(made: Writers, nested: str) -> None:
    """In one answer with nulls around it, in a column for each type."""

    alone = [_json_of(made, value) for value in SCALARS]
    inside = ", ".join(
        f"CASE WHEN n = 1 THEN {nested.format(value)} END AS c{place}"
        for place, value in enumerate(SCALARS)
        if "sum(" not in value
    )
    sql = f"SELECT {inside} FROM unnest([0, 1, 2]) t(n) ORDER BY n"
    wanted = [
        NESTED[nested].format(text)
        for text, value in zip(alone, SCALARS, strict=True)
        if "sum(" not in value
    ]
    nulls = "[" + ",".join(["null"] * len(wanted)) + "]"
    assert made.body(sql, "json")[1].decode() == f"[{nulls},[{','.join(wanted)}],{nulls}]"
    lines = made.body(sql, "ndjson")[1].decode().splitlines()
    assert list(json.loads(lines[1]).values()) == [json.loads(text) for text in wanted]
    table = list(csv.reader(io.StringIO(made.body(sql, "csv")[1].decode()), strict=True))
    assert table[2] == wanted
    assert set(table[1]) == {""}


def _json_of(made: Writers, value: str) -> str:
    return made.body(f"SELECT {value} AS c", "json")[1].decode()[2:-2]


@pytest.mark.parametrize("nested", NESTED)
def test_arrow_and_parquet_carry_every_type_inside_others(made: Writers, nested: str) -> None:
    inside = ", ".join(
        f"{value} AS a{place}, CASE WHEN n = 1 THEN {nested.format(value)} END AS b{place}"
        for place, value in enumerate(SCALARS)
        if "sum(" not in value
    )
    sql = f"SELECT {inside} FROM unnest([0, 1, 2]) t(n) ORDER BY n"
    for form in ("arrow", "parquet"):
        body = made.body(sql, form)[1]
        if form == "arrow":
            table = pa.ipc.open_stream(body).read_all()
        else:
            table = pq.read_table(pa.BufferReader(body))
        table.validate()
        for place in range(0, table.num_columns, 2):
            scalar, column = table.column(place), table.column(place + 1)
            assert [value.is_valid for value in column] == [False, True, False]
            assert _leaf(column.type) == scalar.type, table.column_names[place]


def _leaf(kind: pa.DataType) -> pa.DataType:
    """The type in the middle, where every other member is a boolean, a small key or null."""

    while True:
        if pa.types.is_map(kind):
            kind = kind.item_type
        elif pa.types.is_struct(kind):
            kind = kind.field(0).type
        elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        else:
            return kind


@pytest.mark.parametrize("result_format", FORMATS)
def test_what_no_form_carries_is_refused_by_name(
    made: Writers, result_format: ResultFormat
) -> None:
    for value in ("sum(1) EXPORT_STATE", "[{'a': sum(1) EXPORT_STATE}]"):
        with pytest.raises(Refusal, match=r"column state is .*aggregate_state.* CAST") as refused:
            made.body(f"SELECT 1 AS n, {value} AS state", result_format)
        assert refused.value.failure.code == "sql_error"
    if result_format == "parquet":
        with pytest.raises(Refusal, match=r"column x is struct\(a struct\(\)\) with struct\(\)"):
            made.body("SELECT {'a': struct_pack()} AS x", result_format)
