"""Data files: what is written is read back, by field id, under every later schema."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import Corrupt, SchemaInvalid
from lakebus.schemas import Column, TableSchema
from storage.files import parquet
from storage.files.parquet import (
    HIDDEN_FIELD_IDS,
    ROW_FIELD_ID,
    encode_data_file,
    read_footer,
    scan_expression,
)
from storage.files.statistics import column_statistics
from storage.rows.types import parse_type
from tests.unit.pruning_worlds import array

Rows = list[tuple[Any, ...]]


@pytest.fixture
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect(config={"threads": 1})
    connection.execute("set timezone = 'UTC'")
    yield connection
    connection.close()


def schema_of(*columns: tuple[int, str, str]) -> TableSchema:
    return TableSchema(1, "t", 1, tuple(Column(*column) for column in columns))


def rows_of(schema: TableSchema, values: dict[int, list[Any]], *, position: int = 7) -> pa.Table:
    count = len(next(iter(values.values())))
    kinds = {c.column_id: parse_type(c.type) for c in schema.columns}
    given = {str(i): array(kinds[i], column) for i, column in values.items()}
    given["$shard"] = pa.array([3] * count, pa.int16())
    given["$position"] = pa.array([position] * count, pa.int64())
    given["$row"] = pa.array(range(count), pa.int32())
    return pa.table(given)


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(schema: TableSchema, values: dict[int, list[Any]], **options: Any) -> str:
        position = options.pop("position", 7)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        rows = rows_of(schema, values, position=position)
        path.write_bytes(encode_data_file(schema, rows, **options).data)
        return str(path)

    return call


def read(database: duckdb.DuckDBPyConnection, relation: str) -> Rows:
    return database.execute(f"select columns(*)::varchar from {relation} t").fetchall()


def test_every_type_comes_back_exactly(database: duckdb.DuckDBPyConnection, write: Write) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("boolean", True, "true"),
        ("tinyint", -128, "-128"),
        ("smallint", 32767, "32767"),
        ("integer", -(2**31), "-2147483648"),
        ("bigint", 2**63 - 1, "9223372036854775807"),
        ("utinyint", 255, "255"),
        ("usmallint", 65535, "65535"),
        ("uinteger", 2**32 - 1, "4294967295"),
        ("ubigint", 2**64 - 1, "18446744073709551615"),
        ("float", 0.5, "0.5"),
        ("double", -0.0, "-0.0"),
        ("decimal(38,5)", None, "NULL"),
        ("varchar", "\U0010ffff\0é", "\U0010ffff\0é"),
        ("blob", b"\xff\0", "\\xFF\\x00"),
        ("date", 2**31 - 1, "infinity"),
        ("time", 86_400_000_000, "24:00:00"),
        ("timestamp", 1, "1970-01-01 00:00:00.000001"),
        ("timestamptz", -1, "1969-12-31 23:59:59.999999+00"),
        ("uuid", b"\xff" * 16, "ffffffff-ffff-ffff-ffff-ffffffffffff"),
        ("json", '{"a":  1}', '{"a":  1}'),
    ]
    schema = schema_of(*((i, f"c{i}", kind) for i, (kind, _, _) in enumerate(cases, 1)))
    path = write(schema, {i: [value, None] for i, (_, value, _) in enumerate(cases, 1)})
    for paths in ([path], [path, path], []):
        relation = scan_expression(schema, paths)
        types = [row[1] for row in database.execute(f"describe from {relation} t").fetchall()]
        assert [parse_type(kind).sql for kind in types] == [kind for kind, _, _ in cases]
        expected = tuple(None if text == "NULL" else text for _, _, text in cases)
        nothing = tuple(None for _ in cases)
        assert read(database, relation) == [expected, nothing] * len(paths)


def test_renamed_dropped_late_and_widened_columns(
    database: duckdb.DuckDBPyConnection, write: Write
) -> None:
    old = schema_of((1, "a", "integer"), (2, "b", "varchar"), (3, "c", "float"))
    new = schema_of((4, "b", "date"), (3, "c", "double"), (1, "was_a", "bigint"))
    first = write(old, {1: [1, 2], 2: ["x", "y"], 3: [0.5, None]})
    second = write(new, {4: [0], 3: [2.5], 1: [2**40]})
    assert read(database, scan_expression(new, [first, second])) == [
        (None, "0.5", "1"),
        (None, None, "2"),
        ("1970-01-01", "2.5", str(2**40)),
    ]
    assert read(database, scan_expression(old, [first])) == [("1", "x", "0.5"), ("2", "y", None)]
    other = schema_of((90, "z", "uuid"))
    assert read(database, scan_expression(other, [first])) == [(None,), (None,)]
    relation = scan_expression(new, [second, first])
    assert database.execute(f"select count(*) from {relation} t").fetchall() == [(3,)]
    assert database.execute(f"select was_a from {relation} t where b is null").fetchall() == [
        (1,),
        (2,),
    ]


def test_filters_reach_the_row_groups(database: duckdb.DuckDBPyConnection, write: Write) -> None:
    schema = schema_of((1, "a", "integer"))
    path = write(schema, {1: list(range(5000))}, row_group_rows=1000)
    relation = scan_expression(schema_of((1, "b", "bigint")), [path])
    plan = database.execute(
        f"explain analyze select count(*) from {relation} t where b >= 4990"
    ).fetchall()[0][1]
    assert "Row Groups Scanned: 1 / 5" in plan


def test_D12_hidden_columns_are_kept_and_order_the_rows(
    database: duckdb.DuckDBPyConnection, write: Write
) -> None:
    schema = schema_of((1, "a", "integer"))
    late = write(schema, {1: [3, 4]}, position=9)
    early = write(schema, {1: [1, 2]}, position=8)
    found = read(database, scan_expression(schema, [late, early], hidden=True, ordered=True))
    assert found == [
        ("3", "8", "0", "1"), ("3", "8", "1", "2"), ("3", "9", "0", "3"), ("3", "9", "1", "4"),
    ]  # fmt: skip
    ordered = scan_expression(schema, [late, early], ordered=True)
    assert database.execute(f"select list(a) from {ordered} t").fetchall() == [([1, 2, 3, 4],)]
    empty = scan_expression(schema, [], hidden=True, ordered=True)
    assert read(database, empty) == []
    described = database.execute(f"describe from {empty} t").fetchall()
    assert [row[0] for row in described] == ["$shard", "$position", "$row", "a"]


@pytest.mark.parametrize("name", ["filename", "file_row_number", "file_index", "rowid"])
def test_D10_virtual_columns_of_the_reader_cannot_be_named(
    database: duckdb.DuckDBPyConnection, write: Write, name: str
) -> None:
    plain = schema_of((1, "a", "integer"))
    path = write(plain, {1: [1]})
    with pytest.raises(duckdb.BinderException):
        database.execute(f"select {name} from {scan_expression(plain, [path])} t")
    own = schema_of((1, name, "integer"))
    assert read(database, scan_expression(own, [write(own, {1: [5]})])) == [("5",)]


def test_paths_are_text_not_patterns(database: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    schema = schema_of((1, "a", "integer"))
    data = encode_data_file(schema, rows_of(schema, {1: [1]})).data
    for folder in ("it's", "a=b", "sp ace"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.parquet"
        path.write_bytes(data)
        assert read(database, scan_expression(schema, [str(path)])) == [("1",)]
    for pattern in ("*", "a?b", "a[b]"):
        with pytest.raises(ValueError, match="must not contain"):
            scan_expression(schema, [pattern])


@pytest.mark.parametrize("sql_type", ["varchar", "blob", "json", "bigint", "uuid", "date"])
@pytest.mark.parametrize("count", [2, 6000])
def test_D11_equal_bounds_beside_nulls_do_not_confuse_the_reader(
    database: duckdb.DuckDBPyConnection, write: Write, sql_type: str, count: int
) -> None:
    """DuckDB 2.0 answers `IS NULL` with every row of such a chunk of text (no dictionary)."""

    value = {"varchar": "abc", "blob": b"abc", "json": "1", "uuid": b"\1" * 16}.get(sql_type, 5)
    schema = schema_of((1, "a", sql_type), (2, "b", "integer"))
    values = [value, None] * (count // 2) + [None] * 3
    path = write(schema, {1: values, 2: list(range(len(values)))}, row_group_rows=1500)
    for found in (
        f"select count(*) from {scan_expression(schema, [path])} t where a is null",
        f"select count(*) from {scan_expression(schema, [path])} t where a is null and b >= 0",
    ):
        assert database.execute(found).fetchall() == [(count // 2 + 3,)]


def test_D11_columns_with_a_nan_have_no_bounds_in_the_footer(
    database: duckdb.DuckDBPyConnection, write: Write
) -> None:
    schema = schema_of((1, "a", "double"), (2, "b", "float"), (3, "c", "double"))
    path = write(schema, {1: [1.0, math.nan], 2: [math.nan, 1.0], 3: [1.0, 2.0]})
    group = pq.ParquetFile(path).metadata.row_group(0)
    bounded = [
        group.column(i).statistics is not None and group.column(i).statistics.has_min_max
        for i in range(3)
    ]
    assert bounded == [False, False, True]
    relation = scan_expression(schema, [path])
    for column in ("a", "b"):
        found = database.execute(f"select count(*) from {relation} t where {column} > 5").fetchall()
        assert found == [(1,)]


def test_the_file_is_described_by_what_was_encoded() -> None:
    schema = schema_of((1, "a", "integer"), (2, "late", "varchar"))
    rows = rows_of(schema, {1: [1, None, 3]})
    encoded = encode_data_file(schema, rows)
    assert encoded == encode_data_file(schema, rows.combine_chunks().to_batches()[0])
    assert encoded.rows == 3
    assert encoded.size_bytes == len(encoded.data)
    assert encoded.sha256 == hashlib.sha256(encoded.data).hexdigest()
    assert sorted(encoded.statistics) == [1]
    footer = read_footer(encoded.data)
    assert footer.rows == 3
    assert footer.row_groups == 1
    assert footer.columns[1] == ("a", pa.int32())
    assert footer.columns[ROW_FIELD_ID] == ("$row", pa.int32())
    assert set(footer.columns) == {1, *HIDDEN_FIELD_IDS.values()}


def test_many_chunks_and_no_rows(database: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    schema = schema_of((1, "a", "integer"), (2, "j", "json"), (3, "u", "uuid"))
    part = rows_of(schema, {1: [1, 2], 2: ["1", None], 3: [None, b"\0" * 16]})
    path = tmp_path / "x.parquet"
    path.write_bytes(encode_data_file(schema, pa.concat_tables([part] * 50)).data)
    assert len(read(database, scan_expression(schema, [str(path)]))) == 100
    assert read_footer(path).row_groups == 1
    empty = encode_data_file(schema, part.slice(0, 0))
    assert empty.rows == 0
    path.write_bytes(empty.data)
    assert read(database, scan_expression(schema, [str(path)])) == []


def test_repeating_columns_get_a_dictionary_and_others_do_not(write: Write) -> None:
    schema = schema_of((1, "few", "varchar"), (2, "many", "varchar"), (3, "n", "bigint"))
    count = 17_000
    path = write(
        schema,
        {1: [f"x{i % 7}" for i in range(count)], 2: [f"x{i}" for i in range(count)],
         3: list(range(count))},
    )  # fmt: skip
    group = pq.ParquetFile(path).metadata.row_group(0)
    found = {group.column(i).path_in_schema: group.column(i).has_dictionary_page for i in range(6)}
    assert found == {
        "few": True, "many": False, "n": False, "$shard": False, "$position": False, "$row": False,
    }  # fmt: skip


_INTEGERS: dict[str, tuple[int, int]] = {
    "tinyint": (-128, 127),
    "smallint": (-(2**15), 2**15 - 1),
    "integer": (-(2**31), 2**31 - 1),
    "bigint": (-(2**63), 2**63 - 1),
    "utinyint": (0, 255),
    "usmallint": (0, 2**16 - 1),
    "uinteger": (0, 2**32 - 1),
    "ubigint": (0, 2**64 - 1),
    "date": (-(2**31) + 2, 2**31 - 1),
    "time": (0, 86_400_000_000),
    "timestamp": (-(2**63) + 2, 2**63 - 1),
    "timestamptz": (-(2**63) + 2, 2**63 - 1),
    "decimal(9,4)": (-(10**9) + 1, 10**9 - 1),
    "decimal(18,4)": (-(10**18) + 1, 10**18 - 1),
}


@pytest.mark.parametrize("kind", _INTEGERS)
def test_integers_far_apart_survive_their_packing(
    database: duckdb.DuckDBPyConnection, tmp_path: Path, kind: str
) -> None:
    """Differences of neighbours overflow here, which the writer and every reader must do alike."""

    low, high = _INTEGERS[kind]
    chance = random.Random(kind)
    values: list[int | None] = [low, high, low, None, high, high, low, low + 1, high - 1]
    values += [chance.choice((None, low, high, chance.randint(low, high))) for _ in range(3000)]
    values += range(max(low, 100), min(high, 100 + 2000))
    schema, arrow = schema_of((1, "c", kind)), parse_type(kind).arrow
    if pa.types.is_decimal(arrow):
        exact: list[Any] = [None if n is None else Decimal(n).scaleb(-4) for n in values]
        column = pa.array(exact, arrow)
    else:
        column = pa.array(values, f"{'u' * (low == 0 and high > 2**63)}int64").cast(
            arrow if pa.types.is_integer(arrow) else pa.int64(), safe=True
        )
        if not pa.types.is_integer(arrow):
            column = column.cast(pa.int32() if pa.types.is_date(arrow) else pa.int64()).view(arrow)
    rows = rows_of(schema, {1: [None] * len(values)}).set_column(0, "1", column)
    encoded = encode_data_file(schema, rows, row_group_rows=1000)
    path = tmp_path / "packed.parquet"
    path.write_bytes(encoded.data)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert (chunk.encodings, chunk.compression) == (("RLE", "DELTA_BINARY_PACKED"), "UNCOMPRESSED")
    assert pq.read_table(path, columns=["c"]).column(0).combine_chunks().cast(arrow).equals(column)
    relation = scan_expression(schema, [str(path)], ordered=True)
    found = database.sql(f"select c from {relation} t").to_arrow_table().column(0)
    assert found.cast(arrow).combine_chunks().equals(column)
    for place in (0, 1):  # what lies at a bound is found by it
        extreme = f"(select c from {relation} t limit 1 offset {place})"
        database.execute(f"create or replace table extreme as {extreme}")
        query = f"select count(*) from {relation} t where c = (from extreme)"
        assert database.execute(query).fetchone() == (values.count(values[place]),)


def test_the_rows_of_a_file_that_stays_are_pressed_harder(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = schema_of((1, "text", "varchar"), (2, "number", "double"), (3, "id", "integer"))
    rows = rows_of(schema, {1: [f"text {n}" for n in range(500)], 2: [0.5] * 500, 3: [*range(500)]})

    def codecs() -> list[str]:
        footer = pq.read_metadata(pa.BufferReader(encode_data_file(schema, rows).data))
        return [footer.row_group(0).column(n).compression for n in range(footer.num_columns)]

    assert codecs() == ["LZ4", "LZ4", *["UNCOMPRESSED"] * 4]
    monkeypatch.setattr(parquet, "_SOON_MERGED_BYTES", rows.nbytes)
    assert codecs() == ["ZSTD", "ZSTD", *["UNCOMPRESSED"] * 4]


def test_nested_columns_are_compressed_whatever_their_leaves_are_called() -> None:
    schema = schema_of((1, "list", "integer[]"), (2, "id", "integer"))
    rows = rows_of(schema, {1: [[n, n] for n in range(50)], 2: [*range(50)]})
    footer = pq.read_metadata(pa.BufferReader(encode_data_file(schema, rows).data))
    chunks = [footer.row_group(0).column(n) for n in range(footer.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"LZ4"}
    assert chunks[1].encodings == ("RLE", "DELTA_BINARY_PACKED")


@pytest.mark.parametrize(
    "texts",
    [
        ["b", "a", "c"],
        ["", "z", "y"],
        ["a\0b", "a\0a", "a"],
        ["x" * 70, "y" * 70, "\U0010ffff" * 30],
        ["\ud7ff" * 40, "a", "é"],
        ["a", "b" * 5000, "c"],
        ["a", "b", "c" * 2000],
        ["d" * 5000, "d" * 5000, "d" * 5000],
        [],
    ],
)
def test_D11_bounds_of_texts_are_those_of_the_values(
    texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_FOOTER_ROWS_MIN", 0)
    schema = schema_of((1, "first", "varchar"), (2, "list", "integer[]"), (3, "text", "varchar"))
    first = [None, *texts[1:]] if texts else []
    rows = rows_of(schema, {1: first, 2: [[1]] * len(texts), 3: texts})
    for group_rows in (1, 2, 100):
        found = encode_data_file(schema, rows, row_group_rows=group_rows).statistics
        for column_id in (1, 3):
            values = rows.column(str(column_id))
            assert found[column_id] == column_statistics(parse_type("varchar"), values)
        assert list(found) == [1, 2, 3]


def test_bugs_of_the_caller_are_refused() -> None:
    schema = schema_of((1, "a", "integer"))
    rows = rows_of(schema, {1: [1]})
    with pytest.raises(ValueError, match=r"\['9'\]"):
        encode_data_file(schema, rows.append_column("9", pa.array([1])))
    with pytest.raises(ValueError, match=r"\$row"):
        encode_data_file(schema, rows.drop_columns(["$row"]))
    with pytest.raises(ValueError, match="bigint came as int32"):
        encode_data_file(schema_of((1, "a", "bigint")), rows)
    with pytest.raises(SchemaInvalid):
        scan_expression(schema_of(), ["x.parquet"])
    assert scan_expression(schema_of(), ["x.parquet"], hidden=True)


def test_damaged_and_foreign_files_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Corrupt):
        read_footer(b"not parquet at all")
    with pytest.raises(Corrupt):
        read_footer(tmp_path / "missing")
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    with pytest.raises(Corrupt, match="field id"):
        read_footer(foreign)
