"""Lists, structs and maps in data files (contract D8, D11, E1), and the schemas that have them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.range_files import bring_to
from lakebus.errors import SchemaChangeInvalid, SchemaInvalid
from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics
from storage.files.parquet import encode_data_file, read_footer, scan_expression
from storage.ingesting.definitions import (
    ColumnDefinition,
    TableChangeRequest,
    TableDefinition,
)
from storage.maintenance.checks.contents import read_contents, true_statistics
from storage.maintenance.row_sums import sums_of
from storage.rows.decode import JSON, decode_rows
from storage.rows.type_text import DEPTH_MAX
from storage.rows.types import (
    duckdb_spelling,
    leaves_of,
    parse_type,
    type_of_arrow,
)
from tests.unit.rewrite_rig import (
    MIB,
    as_data_file,
    check_records,
    input_of,
    rows_in,
    run,
)

TYPES = (
    "bigint",
    "integer[]",
    'struct(a bigint, b decimal(38,2)[], j json, "order" double)',
    "map(varchar, uuid)",
    "map(double, struct(x float, l blob[]))",
    "json[]",
    "timestamptz[][]",
)
COLUMNS = tuple(Column(n, f"c{n}", sql) for n, sql in enumerate(TYPES, start=1))
SCHEMA = TableSchema(1, "t", 1, COLUMNS)
_UUIDS = [f"0f2b4c1e-0000-4000-8000-{n:012d}" for n in range(5)]


def row(n: int) -> dict[str, Any]:
    """Each part is null, empty and full somewhere."""

    return {
        "c1": -n,
        "c2": [None, [], [n], [n, None, n]][n % 4],
        "c3": [None, {}, {"a": n, "b": [None, "1.25"]}, {"j": {"k": [n]}, "order": -0.0}][n % 4],
        "c4": [{}, None, {"x": _UUIDS[n % 5], "": None}][n % 3],
        "c5": [None, [], [{"key": "NaN", "value": {"x": "NaN", "l": ["AA==", None]}}]][n % 3],
        "c6": [[{"a": 1}, None, "x\0'\\"], None][n % 2],
        "c7": [["2026-01-31T12:00:00.5Z"], [], None] if n % 2 else None,
    }


def _fetched(sql: str) -> list[Any]:
    with duckdb.connect() as database:
        return database.execute(sql).fetchall()


def rows_of(schema: TableSchema, rows: list[dict[str, Any]]) -> pa.Table:
    """As they come from the bus, with their places."""

    batch = decode_rows(schema, JSON, json.dumps(rows).encode(), rows_max=10_000).batch
    table = pa.Table.from_batches([batch])
    count = len(rows)
    for name, values in (
        ("$shard", pa.array([0] * count, pa.int16())),
        ("$position", pa.array([0] * count, pa.int64())),
        ("$row", pa.array(range(count), pa.int32())),
    ):
        table = table.append_column(name, values)
    return table


@pytest.mark.parametrize("sort_by", [(), ("c1",)], ids=["arrival", "sorted"])
def test_E1_a_rewrite_keeps_nested_values_bit_for_bit(
    tmp_path: Path, sort_by: tuple[str, ...]
) -> None:
    schema = TableSchema(1, "t", 1, COLUMNS, sort_by=sort_by)
    inputs = [
        input_of(tmp_path, schema, rows_of(schema, [row(n) for n in range(count)]), number=number)
        for number, count in enumerate((12, 5, 1))
    ]
    before = rows_in(schema, [one.path for one in inputs])
    for target, group_rows in ((1, 5), (MIB, 100)):
        found = run(tmp_path, schema, inputs, group_rows_max=group_rows, target_file_bytes=target)
        paths = [file.path for file in found.files]
        assert Counter(rows_in(schema, paths)) == Counter(before)
        check_records(schema, found)
        for number, file in enumerate(found.files):
            recorded = as_data_file(schema, file, number)
            assert read_contents(recorded, schema, file.path).findings == []
            assert true_statistics(schema, file.path) == dict(file.statistics)
    # From the pieces that were held, and from those that were streamed.
    tight = run(tmp_path, schema, inputs, memory_bytes=32 * MIB, threads=2)
    assert tight.after == found.after


def test_E1_rows_are_left_out_by_what_is_inside_of_them(tmp_path: Path) -> None:
    late = TableSchema(1, "t", 2, (*COLUMNS, Column(8, "late", "struct(x date[])")))
    rows = [row(n) for n in range(8)]
    kept = [{"c1": 9, "late": {"x": ["2026-01-31"]}}, {"c1": 9, "late": {}}]
    inputs = [
        input_of(tmp_path, SCHEMA, rows_of(SCHEMA, rows), number=0),
        input_of(tmp_path, late, rows_of(late, kept), number=1),
    ]
    found = run(tmp_path, late, inputs, keep_sql="c3.a IS NULL AND late.x[1] IS NULL")
    assert (found.before.rows, found.removed.rows, found.after.rows) == (10, 3, 7)
    paths = [file.path for file in found.files]
    assert sorted(rows_in(late, paths, "c1"))[:1] == [(-7,)]
    shown = Counter(rows_in(late, paths, "late::varchar"))
    assert shown == Counter({(None,): 6, ("{'x': NULL}",): 1})


def test_D1_rows_of_an_older_version_have_nulls_for_what_came_later() -> None:
    old = TableSchema(1, "t", 1, COLUMNS[:1])
    batch = decode_rows(old, JSON, b'[{"c1": 1}]', rows_max=9).batch
    brought = bring_to(pa.Table.from_batches([batch]), SCHEMA)
    new = rows_of(SCHEMA, [row(3)]).select([str(n) for n in range(1, 8)])
    both = pa.concat_tables([brought, new]).combine_chunks()
    assert both.column("3").null_count == 1
    assert both.slice(0, 1).to_pylist() == [{"1": 1} | {str(n): None for n in range(2, 8)}]


def test_D11_nested_columns_claim_nulls_and_no_bound(tmp_path: Path) -> None:
    encoded = encode_data_file(SCHEMA, rows_of(SCHEMA, [row(n) for n in range(8)]))
    assert encoded.statistics[2] == ColumnStatistics(2)
    assert encoded.statistics[4] == ColumnStatistics(3)
    path = tmp_path / "f.parquet"
    path.write_bytes(encoded.data)
    group = pq.ParquetFile(path).metadata.row_group(0)
    for place in range(group.num_columns):
        column = group.column(place)
        root = column.path_in_schema.partition(".")[0]
        assert column.is_stats_set == (root in ("c1", "$shard", "$position", "$row"))
    columns = read_footer(path).columns
    assert {columns[n][0] for n in range(1, 8)} == {column.name for column in COLUMNS}
    described = _fetched(f"DESCRIBE {scan_expression(SCHEMA, [str(path)])[1:-1]}")
    assert [one[1] for one in described] == [duckdb_spelling(parse_type(sql)) for sql in TYPES]


def test_D1_a_nested_column_that_a_file_lacks_reads_as_null_part_by_part(tmp_path: Path) -> None:
    paths = []
    for number, columns in enumerate((COLUMNS[:1], COLUMNS)):
        schema = TableSchema(1, "t", number + 1, columns)
        values = [{c.name: row(n)[c.name] for c in columns} for n in (2, 3)]
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(encode_data_file(schema, rows_of(schema, values)).data)
        paths.append(str(path))
    source = scan_expression(SCHEMA, paths)
    sql = f"SELECT c3.a, c3.b[2], c2[1], c4['x'], c3 IS NULL FROM {source} WHERE c1 < 0"
    found = _fetched(sql)
    assert [one[0] for one in found] == [None, None, 2, None]
    assert [one[4] for one in found] == [True, True, False, False]
    for condition, count in (("c3.a IS NULL", 3), ("c3.a = 2", 1), ("c2 IS NULL", 2)):
        counted = _fetched(f"SELECT count(*) FROM {source} WHERE {condition}")
        assert counted == [(count,)], condition


#: Values of one column of which no two are the same.
_ZERO, _MINUS, _NAN = "0.0::DOUBLE", "'-0.0'::DOUBLE", "'nan'::DOUBLE"
_OTHER_NAN = f"'0{'1' * 12}{'0' * 50}1'::BIT::DOUBLE"
_DIFFERENT: dict[str, list[str]] = {
    "double[]": [
        "NULL", "[]", "[NULL]", f"[{_ZERO}]", f"[{_MINUS}]", f"[{_NAN}]", f"[-{_NAN}]",
        f"[{_ZERO}, NULL]", f"[{_OTHER_NAN}]",
    ],
    "varchar[]": [
        "['NULL']", "[NULL]", "['a, b']", "['a', 'b']", "['[a]']", "['\"a\"']", "['']", "[]",
    ],
    "varchar[][]": [
        "[['a'], ['b']]", "[['a', 'b'], []]", "[['a', 'b']]", "[[], ['a', 'b']]", "[NULL]",
    ],
    "struct(a varchar, b varchar)": [
        "NULL", "row(NULL, NULL)", "row('a', NULL)", "row(NULL, 'a')",
    ],
    "map(varchar, double)": [
        "NULL", "MAP {}", f"MAP {{'a': {_ZERO}}}", f"MAP {{'a': {_MINUS}}}", "MAP {'a': NULL}",
        f"MAP {{'b': {_ZERO}}}", "MAP {'a': 0.0, 'b': 1.0}", "MAP {'b': 1.0, 'a': 0.0}",
    ],
    "blob[]": ["['\\x00'::BLOB]", "['\\x5Cx00'::BLOB]", "[''::BLOB]"],
    "decimal(38,2)[]": ["[1.00]", "[1.01]", "[123456789012345678901234567890.00]"],
}  # fmt: skip


@pytest.mark.parametrize("sql", _DIFFERENT)
def test_E1_row_sums_tell_every_two_nested_values_apart(sql: str) -> None:
    schema = TableSchema(1, "t", 1, (Column(1, "c", sql),))
    with duckdb.connect() as connection:
        sums = [
            sums_of(
                connection,
                schema,
                f'(SELECT 0::SMALLINT AS "$shard", 0::BIGINT AS "$position", 0::INTEGER AS "$row", '
                f"{value}::{sql} AS c)",
            )[0].rows
            for value in _DIFFERENT[sql]
        ]
    for (first, one), (second, other) in itertools.combinations(enumerate(sums), 2):
        assert one != other, (_DIFFERENT[sql][first], _DIFFERENT[sql][second])


# --- types and schemas ----------------------------------------------------------------------------


@pytest.mark.parametrize("sql", [*TYPES[1:], "struct(s struct(t struct(u uuid[])))[]"])
def test_nested_types_are_spelled_as_duckdb_reads_and_writes_them(sql: str) -> None:
    kind = parse_type(sql)
    assert kind.sql == sql
    assert parse_type(sql.upper()) == parse_type(duckdb_spelling(kind)) == kind
    assert type_of_arrow(kind.arrow).arrow == kind.arrow
    (typed,) = _fetched(f"SELECT typeof(NULL::{sql})")
    assert typed[0] == duckdb_spelling(kind)


def test_words_that_sql_keeps_can_name_fields() -> None:
    listed = _fetched("SELECT DISTINCT keyword_name FROM duckdb_keywords() ORDER BY 1")
    words = [word for (word,) in listed]
    kind = parse_type("struct(" + ", ".join(f'"{word}" integer' for word in words[:250]) + ")")
    rest = parse_type("struct(" + ", ".join(f'"{word}" integer' for word in words[250:]) + ")")
    for one in (kind, rest):
        _fetched(f"SELECT NULL::{one.sql}, NULL::{duckdb_spelling(one)}")
        assert parse_type(one.sql) == one


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("integer[3]", "no fixed length"),
        ("list(integer)", "integer[]"),
        ("union(a integer)", "not supported"),
        ("struct()", "name of a field"),
        ("struct(a)", "a type is missing"),
        ("struct(a integer, A integer)", "two fields named a"),
        ('struct("a b" integer)', "not a name"),
        ("struct(a integer", "ends with"),
        ("map(integer)", "two types"),
        ("map(json, integer)", "key of a map"),
        ("map(integer[], integer)", "key of a map"),
        ("map(varchar, hugeint)", "not a column type"),
        ("integer[] x", "behind the end"),
        ("integer[", "no fixed length"),
        ("[]", "a type is missing"),
        ("varchar(10)[]", "length"),
        ("decimal(39,0)[]", "38"),
        ("decimal(9,2", "not a column type"),
        ("struct(a decimal(9,2)", "ends with"),
        ("integer" + "[]" * (DEPTH_MAX + 1), "deep"),
        ("struct(a " * (DEPTH_MAX + 1) + "integer" + ")" * (DEPTH_MAX + 1), "deep"),
        ("struct(a integer[][])" + "[]" * 6, "deep"),
        ("struct(" + ", ".join(f"f{n} integer" for n in range(257)) + ")", "256"),
        ("struct(a integer; b integer)", "cannot stand there"),
    ],
)
def test_nested_types_that_no_column_has_are_refused_with_what_to_write(
    sql: str, word: str
) -> None:
    with pytest.raises(SchemaInvalid) as caught:
        parse_type(sql)
    assert word in caught.value.detail


def test_types_as_deep_and_as_wide_as_allowed_are_taken() -> None:
    assert parse_type("integer" + "[]" * DEPTH_MAX).sql.count("[]") == DEPTH_MAX
    names = [f"{'x' * 60}{n:03d}" for n in range(256)]
    wide = parse_type("struct(" + ", ".join(f"{n} decimal(38,10)" for n in names) + ")")
    assert leaves_of(wide) == 256
    assert parse_type(wide.sql) == wide
    deep = pa.int8()
    for _ in range(DEPTH_MAX + 1):
        deep = pa.list_(deep)
    with pytest.raises(SchemaInvalid, match="deep"):
        type_of_arrow(deep)


@pytest.mark.parametrize(
    "layout",
    [
        {"partition_by": ("n",)},
        {"partition_by": ("bucket(4, n)",)},
        {"sort_by": ("n",)},
        {"sort_by": ("zorder(id, n)",)},
        {"retention": {"rows": {"column": "n", "for": "90 days"}}},
    ],
    ids=["partition", "bucket", "sort", "curve", "retention"],
)
@pytest.mark.parametrize("sql", ["date[]", "struct(a date)", "map(date, date)"])
def test_nested_columns_order_and_cut_nothing(sql: str, layout: dict[str, Any]) -> None:
    columns = (ColumnDefinition("id", "bigint"), ColumnDefinition("n", sql))
    with pytest.raises(SchemaInvalid):
        TableDefinition("t", columns, **layout).checked()


def test_what_is_inside_of_a_nested_column_does_not_change() -> None:
    table = TableSchema(1, "t", 1, (Column(1, "n", "integer[]"), Column(2, "id", "bigint")))
    for wider in ("bigint[]", "integer[][]", "struct(a integer)", "integer"):
        with pytest.raises(SchemaChangeInvalid, match="does not change"):
            TableChangeRequest(widen_columns={"n": wider}).applied_to(table)
    same = TableChangeRequest(widen_columns={"n": "INTEGER[]"}, rename_columns={"id": "k"})
    assert same.applied_to(table).columns[0] == table.columns[0]
    added = TableChangeRequest(
        drop_columns=("n",), add_columns=(ColumnDefinition("n", "MAP(DATE, INT[])"),)
    )
    assert added.applied_to(table).columns[-1].type == "map(date, integer[])"


def test_a_table_has_a_bounded_number_of_scalars() -> None:
    wide = "struct(" + ", ".join(f"f{n} integer" for n in range(250)) + ")"
    columns = tuple(ColumnDefinition(f"c{n}", wide) for n in range(16))
    checked = TableDefinition("t", columns).checked()
    with pytest.raises(SchemaInvalid, match="4000"):
        TableDefinition("t", (*columns, ColumnDefinition("id", "bigint"))).checked()
    table = TableSchema(1, "t", 1, checked.columns)
    with pytest.raises(SchemaChangeInvalid, match="4000"):
        TableChangeRequest(add_columns=(ColumnDefinition("id", "bigint"),)).applied_to(table)
