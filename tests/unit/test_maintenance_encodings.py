"""Encodings of compacted files: what is chosen, and that every choice is read as it was written."""

from __future__ import annotations

import decimal
import random
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lakebus.schemas import TableSchema
from storage.files.statistics import storage_of
from storage.maintenance.encodings import (
    DELTAS,
    DICTIONARY,
    LENGTHS,
    PLAIN,
    SPLIT,
    TRIAL_ROWS_MIN,
    ColumnForm,
    choose_forms,
    distinct_values,
    natural_encoding,
    writer_options,
)
from storage.maintenance.parquet_writing import FileColumns, choose
from storage.rows.types import ColumnType, Family, parse_type
from tests.unit.pruning_worlds import KINDS, array
from tests.unit.pruning_worlds import _value as any_value
from tests.unit.rewrite_rig import bits_in, check_records, run, schema_of, write_input

GROUP = 12_000
SCALARS = tuple(dict.fromkeys((*KINDS, "decimal(19,3)")))


def allowed(kind: ColumnType) -> list[str]:
    """Every encoding that some file may have for a type."""

    natural = natural_encoding(kind)
    more = [SPLIT] if natural == DELTAS else []
    more += [] if kind.family is Family.BOOLEAN else [DICTIONARY]
    return list(dict.fromkeys([natural, PLAIN, *more]))


def group_of(schema: TableSchema, columns: dict[str, pa.Array]) -> pa.Table:
    count = len(next(iter(columns.values())))
    hidden = {
        "$shard": pa.array([0] * count, pa.int16()),
        "$position": pa.array(range(count), pa.int64()),
        "$row": pa.array([0] * count, pa.int32()),
    }
    return FileColumns.of(schema).table(pa.table(columns | hidden))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SCALARS), st.integers(0, 2**32), st.integers(1, 500),
    st.sampled_from((0.0, 0.1, 0.9, 1.0)), st.integers(1, 200), st.integers(1, 120),
)  # fmt: skip
def test_D8_every_encoding_of_every_type_is_read_back_and_filtered(
    sql: str, seed: int, rows: int, nulls: float, different: int, page_rows: int
) -> None:
    """Runs, nulls and extremes, in pages that begin and end anywhere."""

    chance, kind = random.Random(seed), parse_type(sql)
    pool = [any_value(chance, kind) for _ in range(different)]
    pool = [value for value in pool if value is not None]
    run_of = chance.choice((1, 1, 7, 90))
    values = [
        None if not pool or chance.random() < nulls else pool[(n // run_of) * 31 % len(pool)]
        for n in range(rows)
    ]
    schema = schema_of((1, "c", sql))
    group = group_of(schema, {"c": array(kind, values)})
    with duckdb.connect(config={"threads": 1}) as database:
        database.register("given", group)
        whole = 'SELECT list(c ORDER BY "$position")::VARCHAR, count(c), count(*) FROM {}'
        wanted = database.execute(whole.format("given")).fetchall()
        for encoding in allowed(kind):
            for compressed in (True, False):
                sink = pa.BufferOutputStream()
                forms = {"c": ColumnForm(encoding, compressed)}
                pq.write_table(
                    group, sink, row_group_size=max(1, rows // 2), max_rows_per_page=page_rows,
                    write_batch_size=min(page_rows, 64), store_schema=False,
                    write_statistics=False,
                    **writer_options(forms, FileColumns.of(schema).leaves),
                )  # fmt: skip
                data = sink.getvalue()
                said = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
                assert (encoding in said.encodings) or rows < 2 or not said.num_values
                assert said.compression == ("ZSTD" if compressed else "UNCOMPRESSED")
                back = pq.read_table(pa.BufferReader(data)).column("c")
                assert _exactly(kind, back).equals(_exactly(kind, group.column("c")))
                path = _written(data)
                assert database.execute(whole.format(f"'{path}'")).fetchall() == wanted
                for number in (0, rows // 2, rows - 1):
                    # One row of many is wanted: what lies between is skipped, not decoded.
                    same = (
                        f'c IS NOT DISTINCT FROM (SELECT c FROM given WHERE "$position"={number})'
                    )
                    for condition in (same, f'"$position" = {number}', "c IS NULL"):
                        sql_text = f'SELECT "$position", c::VARCHAR FROM {{}} WHERE {condition}'
                        found = database.execute(f"{sql_text.format(repr(path))} ORDER BY 1")
                        rows_found = found.fetchall()
                        found = database.execute(f"{sql_text.format('given')} ORDER BY 1")
                        assert rows_found == found.fetchall()


def _exactly(kind: ColumnType, column: pa.ChunkedArray) -> pa.Array:
    if isinstance(column.type, pa.BaseExtensionType):
        column = storage_of(column)
    values = column.combine_chunks()
    if kind.family is not Family.FLOAT:
        return values
    return values.view(pa.int32() if kind.bits == 32 else pa.int64())


_FOLDER: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    _FOLDER[:] = [tmp_path_factory.mktemp("encodings")]


def _written(data: pa.Buffer) -> str:
    path = _FOLDER[0] / "one.parquet"
    path.write_bytes(data)
    return str(path)


CHANCE = random.Random(11)
POOL = [CHANCE.getrandbits(62) for _ in range(3_500)]


@pytest.mark.parametrize(
    ("sql", "values", "encoding", "compressed"),
    [
        ("bigint", [n * 3 + CHANCE.randrange(900) for n in range(GROUP)], DELTAS, False),
        ("timestamp", [10**15 + n * 1000 for n in range(GROUP)], DELTAS, True),
        ("smallint", [n // 100 for n in range(GROUP)], DELTAS, None),
        ("integer", [CHANCE.choice((0, 10**9, -(10**9))) for _ in range(GROUP)], DICTIONARY, True),
        ("timestamp", [CHANCE.randrange(2**15) << 32 for _ in range(GROUP)], SPLIT, True),
        ("bigint", [CHANCE.choice(POOL) for _ in range(GROUP)], PLAIN, True),
        ("decimal(18,4)", [CHANCE.randrange(10**9) for _ in range(GROUP)], DELTAS, False),
        ("double", [CHANCE.gauss(20, 7) for _ in range(GROUP)], SPLIT, True),
        ("double", [CHANCE.randrange(100) / 10 for _ in range(GROUP)], DICTIONARY, True),
        ("varchar", [f"{CHANCE.getrandbits(128):x}" for _ in range(GROUP)], LENGTHS, True),
        ("varchar", [CHANCE.choice(("north", "south")) for _ in range(GROUP)], DICTIONARY, True),
        ("uuid", [CHANCE.randbytes(16) for _ in range(GROUP)], PLAIN, False),
        ("decimal(38,5)", [CHANCE.randrange(10**37) for _ in range(GROUP)], PLAIN, None),
    ],
)  # fmt: skip
def test_an_encoding_is_chosen_by_what_it_takes(
    sql: str, values: list[Any], encoding: str, compressed: bool | None
) -> None:
    kind = parse_type(sql)
    column = _decimals(kind, values) if kind.family is Family.DECIMAL else array(kind, values)
    group = group_of(schema_of((1, "c", sql)), {"c": column})
    kinds = {"c": kind}
    form = choose_forms(kinds, group, distinct_values(group, kinds), whole=True)["c"]
    assert form.encoding == encoding
    assert compressed is None or form.compressed is compressed
    assert form == choose_forms(kinds, group, distinct_values(group, kinds), whole=True)["c"]


def _decimals(kind: ColumnType, values: list[int]) -> pa.Array:
    context = decimal.Context(prec=40)
    return pa.array(
        [decimal.Decimal(value).scaleb(-kind.scale, context) for value in values], kind.arrow
    )


def test_what_goes_round_in_a_circle_is_not_taken_for_different() -> None:
    values = [f"device-{n % 9000}" for n in range(36_000)]
    group = pa.table({"c": pa.array(values), "d": pa.array(range(36_000))})
    assert distinct_values(group, ["c", "d"]) == {"c": 9000, "d": 36_000}
    assert distinct_values(group[:100], ["c", "d"]) == {"c": 100, "d": 100}


def test_few_rows_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*_: object) -> None:
        raise AssertionError("a trial")

    monkeypatch.setattr("storage.maintenance.encodings._tried", tried)
    kinds = {sql: parse_type(sql) for sql in ("bigint", "double", "varchar", "boolean", "uuid")}
    chance = random.Random(1)
    columns = {
        sql: array(kind, [any_value(chance, kind) for _ in range(50)])
        for sql, kind in kinds.items()
    }
    group = pa.table(columns)
    found = choose_forms(kinds, group, dict.fromkeys(kinds, 50), whole=True)
    assert {name: form.encoding for name, form in found.items()} == {
        "bigint": DELTAS, "double": SPLIT, "varchar": LENGTHS, "boolean": PLAIN, "uuid": PLAIN,
    }  # fmt: skip


def test_D8_a_rewrite_of_tried_groups_keeps_every_type_bit_for_bit(tmp_path: Path) -> None:
    """Large enough groups for a trial, of each type; lists and structs beside them."""

    chance = random.Random(5)
    kinds = {i: parse_type(sql) for i, sql in enumerate(SCALARS, 1)}
    schema = schema_of(*((i, f"c{i}", kind.sql) for i, kind in kinds.items()))
    rows = TRIAL_ROWS_MIN + 500
    inputs = []
    for number in range(2):
        values = {
            i: [None if chance.random() < 0.1 else any_value(chance, kind) for _ in range(rows)]
            for i, kind in kinds.items()
        }
        inputs.append(write_input(tmp_path, schema, values, number=number))
    found = run(tmp_path, schema, inputs, group_rows_max=TRIAL_ROWS_MIN + 100)
    paths = [file.path for file in found.files]
    assert bits_in(schema, paths) == bits_in(schema, [one.path for one in inputs])
    check_records(schema, found)
    again = pa.concat_tables([pq.read_table(path) for path in paths])
    assert again.num_rows == 2 * rows
    assert (
        again.column("$position")
        .combine_chunks()
        .equals(pa.array([n for n in range(2) for _ in range(rows)], pa.int64()))
    )


def test_leaves_of_nested_columns_are_compressed_and_plain(tmp_path: Path) -> None:
    schema = schema_of((1, "l", "varchar[]"), (2, "s", "struct(a integer, b double[])"))
    assert FileColumns.of(schema).leaves[:3] == ("l.list.element", "s.a", "s.b.list.element")
    kinds = {column.name: parse_type(column.type) for column in schema.columns}
    assert choose_forms(kinds, pa.table({"l": [["a"]], "s": [None]}), {}, whole=True) == {}
    inputs = [
        write_input(tmp_path, schema, {1: [["a", None], None], 2: [{"a": 1, "b": [0.5]}, None]})
    ]
    (file,) = run(tmp_path, schema, inputs).files
    metadata = pq.read_metadata(file.path).row_group(0)
    assert {metadata.column(place).compression for place in range(metadata.num_columns)} == {"ZSTD"}
    assert pq.read_table(file.path).column("l").to_pylist() == [["a", None], None]


def test_filters_go_to_keys_and_not_to_prose() -> None:
    """Both nearly unique, in no order; a filter of the second would be larger than most columns."""

    chance = random.Random(3)
    words = ("pump", "valve", "sensor", "restart", "threshold", "exceeded", "recalibrated")
    schema = schema_of((1, "key", "varchar"), (2, "note", "varchar"), (3, "name", "varchar"))
    groups = [
        group_of(schema, {
            "key": pa.array([f"{chance.getrandbits(120):030x}" for _ in range(GROUP)]),
            "note": pa.array([" ".join(chance.choices(words, k=6)) for _ in range(GROUP)]),
            "name": pa.array([f"Ann {chance.getrandbits(40):x}" for _ in range(GROUP)]),
        })
        for _ in range(2)
    ]  # fmt: skip
    found = choose(FileColumns.of(schema), groups, unbounded=frozenset())
    assert found.bloom == ("key", "name")
    assert pc.count_distinct(groups[0].column("note")).as_py() > GROUP // 2
