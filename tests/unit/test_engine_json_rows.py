"""JSON forms of the HTTP API: the form depends on the type, never on the value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from storage.engine.child_query import Binding, bind
from storage.engine.child_rows import encode_rows
from storage.engine.child_sandbox import open_database
from storage.engine.child_types import json_form
from storage.engine.settings import EngineSettings
from storage.engine.wire import RunRequest


@pytest.fixture(scope="module")
def cursor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    folder: Path = tmp_path_factory.mktemp("engine")
    settings = EngineSettings(allowed_directory=str(folder), temp_directory=str(folder / "spill"))
    connection = open_database(settings, threads=1)
    yield connection.cursor()
    connection.close()


def _bind(cursor: duckdb.DuckDBPyConnection, sql: str, *, form: str = "json") -> Binding:
    request = RunRequest(1, sql, "", (), form, "string", 10**9, 10**9, False, "")
    return bind(cursor, request, None)


def text_of(cursor: duckdb.DuckDBPyConnection, sql: str, *, integers: str = "string") -> str:
    bound = _bind(cursor, sql)
    forms = tuple(json_form(kind, integers=integers) for kind in bound.types)
    assert bound.relation is not None
    parts = [encode_rows(batch, forms) for batch in bound.relation.to_arrow_reader(1000)]
    return "[" + b",".join(part for part in parts if part).decode() + "]"


FORMS = [
    # expression, type as the API spells it, JSON text
    ("true", "boolean", "true"),
    ("(-128)::tinyint", "tinyint", "-128"),
    ("32767::smallint", "smallint", "32767"),
    ("2147483647", "integer", "2147483647"),
    ("255::utinyint", "utinyint", "255"),
    ("65535::usmallint", "usmallint", "65535"),
    ("4294967295::uinteger", "uinteger", "4294967295"),
    ("1::bigint", "bigint", '"1"'),
    ("(-9223372036854775808)::bigint", "bigint", '"-9223372036854775808"'),
    ("18446744073709551615::ubigint", "ubigint", '"18446744073709551615"'),
    ("1::hugeint", "hugeint", '"1"'),
    ("170141183460469231731687303715884105727::hugeint", "hugeint",
     '"170141183460469231731687303715884105727"'),
    ("340282366920938463463374607431768211455::uhugeint", "uhugeint",
     '"340282366920938463463374607431768211455"'),
    ("1.50::decimal(5,2)", "decimal(5,2)", '"1.50"'),
    ("12345678901234567890123456789012345678::decimal(38,0)", "decimal(38,0)",
     '"12345678901234567890123456789012345678"'),
    ("0::decimal(4,2)", "decimal(4,2)", '"0.00"'),
    ("0::decimal(38,10)", "decimal(38,10)", '"0.0000000000"'),
    ("'-0.00000000000000000000000000000000000001'::decimal(38,38)", "decimal(38,38)",
     '"-0.00000000000000000000000000000000000001"'),
    ("['0.50', NULL, '0']::decimal(2,2)[]", "decimal(2,2)[]", '["0.50",null,"0.00"]'),
    ("(-0.01)::decimal(4,2)", "decimal(4,2)", '"-0.01"'),
    ("0.1::double", "double", "0.1"),
    ("0.1::float", "float", "0.1"),
    ("1e300::double", "double", "1e+300"),
    ("'-0.0'::double", "double", "-0.0"),
    ("'nan'::double", "double", '"NaN"'),
    ("'inf'::double", "double", '"Infinity"'),
    ("'-inf'::float", "float", '"-Infinity"'),
    ("'plain'", "varchar", '"plain"'),
    ("''", "varchar", '""'),
    (r"'q\"b\\s' || chr(10) || chr(1) || chr(9)", "varchar", r'"q\\\"b\\\\s\n\u0001\t"'),
    ("'ü€😀'", "varchar", '"ü€😀"'),
    ("chr(8232)", "varchar", '"\u2028"'),
    ("'\\xFF\\x00A'::blob", "blob", '"/wBB"'),
    ("''::blob", "blob", '""'),
    ("date '2024-02-29'", "date", '"2024-02-29"'),
    ("date '0001-01-01'", "date", '"0001-01-01"'),
    ("date '9999-12-31'", "date", '"9999-12-31"'),
    ("date '10000-01-01'", "date", '"+10000-01-01"'),
    ("date '0044-03-15 (BC)'", "date", '"-0043-03-15"'),
    ("'infinity'::date", "date", '"infinity"'),
    ("'-infinity'::date", "date", '"-infinity"'),
    ("time '01:02:03'", "time", '"01:02:03.000000"'),
    ("time '23:59:59.999999'", "time", '"23:59:59.999999"'),
    ("time '24:00:00'", "time", '"24:00:00.000000"'),
    ("timestamp '2024-01-02 03:04:05'", "timestamp", '"2024-01-02T03:04:05.000000"'),
    ("timestamp '1969-12-31 23:59:59.5'", "timestamp", '"1969-12-31T23:59:59.500000"'),
    ("timestamp '12024-01-02 03:04:05'", "timestamp", '"+12024-01-02T03:04:05.000000"'),
    ("'infinity'::timestamp", "timestamp", '"infinity"'),
    ("timestamptz '2024-01-02 03:04:05+02'", "timestamptz", '"2024-01-02T01:04:05.000000Z"'),
    ("'-infinity'::timestamptz", "timestamptz", '"-infinity"'),
    ("timestamp_s '2024-01-02 03:04:05'", "timestamp_s", '"2024-01-02T03:04:05.000000"'),
    ("timestamp_ms '2024-01-02 03:04:05.125'", "timestamp_ms", '"2024-01-02T03:04:05.125000"'),
    ("timestamp_ns '2024-01-02 03:04:05.123456789'", "timestamp_ns",
     '"2024-01-02T03:04:05.123456789"'),
    ("timetz '01:02:03+02'", "timetz", '"01:02:03+02"'),
    ("interval '1 month 2 days 3 hours'", "interval", '"1 month 2 days 03:00:00"'),
    ("uuid '2c9bf7a4-0000-4000-8000-0123456789ab'", "uuid",
     '"2c9bf7a4-0000-4000-8000-0123456789ab"'),
    ("""'{"a": [1, "x"]}'::json""", "json", r'"{\"a\": [1, \"x\"]}"'),
    ("'101'::bit", "bit", '"101"'),
    ("'B'::enum('a', 'B')", "enum('a', 'B')", '"B"'),
    ("[1, 2, NULL]", "integer[]", "[1,2,null]"),
    ("[1::bigint]", "bigint[]", '["1"]'),
    ("[]::integer[]", "integer[]", "[]"),
    ("[[1.5::decimal(3,1)], NULL, []]", "decimal(3,1)[][]", '[["1.5"],null,[]]'),
    ("[1, 2, 3]::integer[3]", "integer[3]", "[1,2,3]"),
    ("['a\"b', NULL]", "varchar[]", r'["a\"b",null]'),
    ("['nan'::double, 1]", "double[]", '["NaN",1]'),
    ("[170141183460469231731687303715884105727::hugeint]", "hugeint[]",
     '["170141183460469231731687303715884105727"]'),
    ("[timestamptz '2024-01-02 03:04:05Z']", "timestamptz[]", '["2024-01-02T03:04:05.000000Z"]'),
    ("{'a': 1, 'b c': NULL::varchar}", 'struct(a integer, "b c" varchar)', '{"a":1,"b c":null}'),
    ("{'d': {'e': interval 1 day}}", "struct(d struct(e interval))", '{"d":{"e":"1 day"}}'),
    ("row(1, 'x')", "tuple(integer, varchar)", '[1,"x"]'),
    ("MAP {'k': 1, 'l': NULL}", "map(varchar, integer)", '{"k":1,"l":null}'),
    ("MAP {}", "map(null, null)", "[]"),
    ("MAP {}::map(varchar, integer)", "map(varchar, integer)", "{}"),
    ("MAP {'q\"': 1::bigint}", "map(varchar, bigint)", r'{"q\"":"1"}'),
    ("MAP {'a'::enum('a'): 1}", "map(enum('a'), integer)", '{"a":1}'),
    ("MAP {1: 'x', 2: NULL}", "map(integer, varchar)",
     '[{"key":1,"value":"x"},{"key":2,"value":null}]'),
    ("MAP {'nan'::double: 'x'}", "map(double, varchar)", '[{"key":"NaN","value":"x"}]'),
    ("MAP {date '2024-01-01': [1]}", "map(date, integer[])",
     '[{"key":"2024-01-01","value":[1]}]'),
    ("MAP {[1]: MAP {'a': 2}}", "map(integer[], map(varchar, integer))",
     '[{"key":[1],"value":{"a":2}}]'),
    ("row(1::hugeint, [interval 1 day])", "tuple(hugeint, interval[])", '["1",["1 day"]]'),
    ("[row(1), NULL]", "tuple(integer)[]", "[[1],null]"),
    ("'x'::union(num integer, s varchar)", "union(num integer, s varchar)",
     r'"{\"s\":\"x\"}"'),
    ("[2::union(num integer, s varchar)]", "union(num integer, s varchar)[]",
     r'["{\"num\":2}"]'),
    ("{'v': [1, 2]::variant}", "struct(v variant)", '{"v":"[1,2]"}'),
    ("'POINT(1 2)'::geometry", "geometry", '"POINT (1 2)"'),
    ("time_ns '01:02:03.123456789'", "time_ns", '"01:02:03.123456789"'),
    ("timestamptz_ns '2024-01-01 00:00:00.000000001+00'", "timestamptz_ns",
     '"2024-01-01T00:00:00.000000001Z"'),
    ("['infinity'::timestamptz, '2024-01-01 00:00:00Z', NULL]", "timestamptz[]",
     '["infinity","2024-01-01T00:00:00.000000Z",null]'),
    ("[''::blob, 'a'::blob, 'ab'::blob, 'abc'::blob, NULL]", "blob[]",
     '["","YQ==","YWI=","YWJj",null]'),
    ("[[1, 2], NULL]::integer[2][]", "integer[2][]", "[[1,2],null]"),
    ("struct_pack()", "struct()", "{}"),
    ("NULL", "null", "null"),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "kind", "text"), FORMS)
def test_form_of_a_value_and_of_null(
    cursor: duckdb.DuckDBPyConnection, expression: str, kind: str, text: str
) -> None:
    """Each alone, beside a null, and after other values, so that slices and nulls are met too."""

    bound = _bind(cursor, f"SELECT {expression} AS c")
    assert bound.columns == (("c", kind),)
    assert text_of(cursor, f"SELECT {expression} AS c") == f"[[{text}]]"
    many = (
        f"SELECT CASE WHEN range % 3 = 1 THEN NULL ELSE {expression} END AS c, range::integer "
        "FROM range(5) ORDER BY range"
    )
    rows = [f"[{'null' if n % 3 == 1 else text},{n}]" for n in range(5)]
    assert text_of(cursor, many) == "[" + ",".join(rows) + "]"
    json.loads(text_of(cursor, many))


@pytest.mark.parametrize(("expression", "kind", "text"), FORMS)
def test_form_does_not_depend_on_a_slice(
    cursor: duckdb.DuckDBPyConnection, expression: str, kind: str, text: str
) -> None:
    bound = _bind(cursor, f"SELECT {expression} AS c FROM range(7)")
    forms = tuple(json_form(each, integers="string") for each in bound.types)
    assert bound.relation is not None
    batch: pa.RecordBatch = next(iter(bound.relation.to_arrow_reader(100)))
    assert encode_rows(batch.slice(3, 2), forms).decode() == f"[{text}],[{text}]"


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("1::bigint", "1"),
        ("18446744073709551615::ubigint", "18446744073709551615"),
        ("170141183460469231731687303715884105727::hugeint",
         "170141183460469231731687303715884105727"),
        ("1.50::decimal(5,2)", "1.50"),
        ("0.5::decimal(1,1)", "0.5"),
        ("[1::bigint]", "[1]"),
        ("MAP {1::bigint: 2::bigint}", '[{"key":1,"value":2}]'),
    ],
)  # fmt: skip
def test_integers_as_numbers(cursor: duckdb.DuckDBPyConnection, expression: str, text: str) -> None:
    assert text_of(cursor, f"SELECT {expression}", integers="number") == f"[[{text}]]"


def test_no_rows_and_no_text(cursor: duckdb.DuckDBPyConnection) -> None:
    assert text_of(cursor, "SELECT 1 WHERE false") == "[]"


def test_every_control_character_is_valid_json(cursor: duckdb.DuckDBPyConnection) -> None:
    text = text_of(cursor, "SELECT chr(range::integer) FROM range(1, 300)")
    assert [row[0] for row in json.loads(text)] == [chr(n) for n in range(1, 300)]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("340282366920938463463374607431768211455::uhugeint",
         "340282366920938463463374607431768211455"),
        ("'b'::enum('a', 'b')", "b"),
        ("'101'::bit", "101"),
        ("[1::uhugeint]", ["1"]),
    ],
)  # fmt: skip
def test_arrow_carries_as_text_what_it_has_no_type_for(
    cursor: duckdb.DuckDBPyConnection, expression: str, value: object
) -> None:
    bound = _bind(cursor, f"SELECT {expression} AS c", form="arrow")
    assert bound.relation is not None
    assert bound.relation.to_arrow_table().to_pylist() == [{"c": value}]
