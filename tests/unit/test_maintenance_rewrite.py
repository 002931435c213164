"""Rewrites of data files: the same rows bit for bit, in their order, and never of damaged bytes."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from lakebus.errors import Corrupt, Fault, SchemaInvalid
from lakebus.schemas import HIDDEN_COLUMNS, Column, TableSchema
from storage.maintenance import rewrite as rewrite_module
from storage.maintenance import verified_inputs
from storage.maintenance.rewriting import RewriteInput, RowSum
from storage.maintenance.row_sums import Sums, sums_of
from tests.unit.pruning_worlds import make_world
from tests.unit.rewrite_rig import (
    MIB,
    PLAIN,
    as_data_file,
    bits_in,
    check_records,
    plain_files,
    rows_in,
    run,
    schema_of,
    write_input,
)
from tests.unit.test_pruning_D11 import Checker

WORLDS = 12


def places_file(folder: Path, places: list[tuple[int, int, int]]) -> Path:
    path = folder / "places.arrow"
    types = (pa.int16(), pa.int64(), pa.int32())
    table = pa.table(
        {
            name: pa.array([place[i] for place in places], types[i])
            for i, name in enumerate(HIDDEN_COLUMNS)
        }
    )
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def test_D8_any_world_keeps_its_rows_bit_for_bit_and_D11_its_answers(tmp_path: Path) -> None:
    """Adversarial values, evolved schemas, partitions, tiny row groups; and every query of the
    pruning tests over the outputs, with pruning on and off."""

    checker = Checker(tmp_path)
    for seed in range(WORLDS):
        world = make_world(seed, tmp_path)
        chance = random.Random(seed)
        schema = _arranged(chance, world.schemas["t"])
        inputs = [
            RewriteInput(file, Path(world.path_of[file.file_id])) for file in world.files["t"]
        ]
        before = bits_in(schema, [one.path for one in inputs])
        found = run(
            tmp_path,
            schema,
            inputs,
            group_rows_max=chance.choice((1, 2, 3, 100)),
            target_file_bytes=chance.choice((1, 2_000, MIB)),
        )
        after = bits_in(schema, [file.path for file in found.files])
        assert Counter(after) == Counter(before), f"seed {seed}"
        check_records(schema, found)
        assert found.before == found.after
        assert found.removed == RowSum(0, 0)
        world.files["t"] = [as_data_file(schema, f, i) for i, f in enumerate(found.files)]
        for file, made in zip(world.files["t"], found.files, strict=True):
            world.path_of[file.file_id] = str(made.path)
        for name, columns in world.schemas.items():
            typed = ", ".join(f'"{c.name}" {c.type}' for c in columns.columns)
            checker.database.execute(f'create or replace table "reference_{name}" ({typed})')
            checker.database.register("given", world.rows[name])
            checker.database.execute(f'insert into "reference_{name}" from given')
            checker.database.unregister("given")
        for number in range(8):
            checker.check(world, f"seed {seed}, query {number}")
    assert checker.answered > WORLDS * 3
    assert checker.pruned > 0


def _arranged(chance: random.Random, schema: TableSchema) -> TableSchema:
    """The schema with some order and some partitions, which its columns allow."""

    names = [column.name for column in schema.columns]
    pair = ",".join(chance.sample(names, 2))
    triple = ",".join(chance.sample(names, 3))
    sort_by = chance.choice(
        ((), (names[1],), (names[-1], names[0]), (f"zorder({pair})",), (f"zorder({triple})",),
         (f"hilbert({pair})",), (names[0], f"hilbert({pair})"))
    )  # fmt: skip
    partition_by = chance.choice(((), (), ("id",), ("bucket(3, id)", "truncate(10, id)")))
    return TableSchema(
        schema.table_id,
        schema.name,
        schema.version,
        schema.columns,
        sort_by=sort_by,
        partition_by=partition_by,
    )


def test_E1_what_is_left_out_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    inputs = plain_files(tmp_path, 4, 50)
    dropped = [(0, 0, 0), (0, 0, 0), (1, 1, 49), (0, 2, 7), (1, 9, 9)]
    before = bits_in(PLAIN, [one.path for one in inputs])
    found = run(
        tmp_path,
        PLAIN,
        inputs,
        drop_places=places_file(tmp_path, dropped),
        keep_sql="id >= 500000000",
    )
    after = bits_in(PLAIN, [file.path for file in found.files])
    expected = [
        row
        for row in before
        if tuple(int(part) for part in row[:3]) not in dropped and int(row[3]) >= 500_000_000
    ]
    assert Counter(after) == Counter(expected)
    assert found.removed.rows == len(before) - len(expected) > 0
    assert found.before - found.removed == found.after
    assert found.before.rows == 200


def test_E1_a_condition_that_is_null_leaves_the_row_out(tmp_path: Path) -> None:
    inputs = [write_input(tmp_path, PLAIN, {1: [1, None, 3]})]
    found = run(tmp_path, PLAIN, inputs, keep_sql="id > 0")
    assert found.removed.rows == 1
    assert [row[3] for row in rows_in(PLAIN, [found.files[0].path])] == ["1", "3"]


def test_E1_nothing_kept_gives_no_file(tmp_path: Path) -> None:
    inputs = plain_files(tmp_path, 2, 5)
    found = run(tmp_path, PLAIN, inputs, keep_sql="false")
    assert found.files == ()
    assert found.removed == found.before
    assert found.after == RowSum(0, 0)
    nothing = run(tmp_path, PLAIN, [])
    assert nothing.files == ()


def _changed(column: str, change: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], Any]:
    def apply(rows: pa.Table) -> pa.Table:
        place = rows.schema.get_field_index(column)
        return rows.set_column(place, rows.field(place), change(rows.column(place)))

    return apply


@pytest.mark.parametrize("route", ["held", "streamed", "sorted"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.filter(pc.field("id") != 5), "rows instead of"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), "rows instead of"),
        (lambda rows: pa.concat_tables([rows.slice(0, 1)] * 2), "other places"),
        (_changed("$row", lambda row: pc.add(row, pa.scalar(1, pa.int32()))), "other places"),
        (_changed("x", pc.negate), "other values"),
        (_changed("name", lambda name: pc.binary_join_element_wise(name, "", " ")), "other values"),
    ],
)
def test_E1_a_rewrite_that_changes_a_row_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str, route: str
) -> None:
    """Something between the sums that loses, doubles or changes a row; `negate` turns only a zero's
    sign."""

    inputs = [write_input(tmp_path, PLAIN, {1: [4, 5], 2: ["a", None], 3: [0.0, None]})]
    rows_of = rewrite_module._Rewrite._rows_of

    def faulty(self: Any, *given: Any) -> Any:
        yield from change(pa.Table.from_batches(rows_of(self, *given))).to_batches()

    monkeypatch.setattr(rewrite_module._Rewrite, "_rows_of", faulty)
    if route == "streamed":
        monkeypatch.setattr(verified_inputs, "SMALL_BYTES", 0)
    schema = dataclasses.replace(PLAIN, sort_by=("id",) if route == "sorted" else ())
    with pytest.raises(Fault, match=said):
        run(tmp_path, schema, inputs)


def test_E1_sums_tell_rows_apart_and_not_their_order() -> None:
    schema = schema_of(
        (1, "f", "double"), (2, "u", "uuid"), (3, "d", "decimal(38,2)"), (4, "s", "varchar"),
        (5, "b", "blob"), (6, "j", "json"), (7, "g", "float"),
    )  # fmt: skip
    rows = [
        "0.0::double, NULL, NULL, 'a', NULL, NULL, 1::float",
        "'-0.0'::double, NULL, NULL, 'a', NULL, NULL, 1::float",
        "'nan'::double, NULL, NULL, 'a', NULL, NULL, 1::float",
        "'-nan'::double, NULL, NULL, 'a', NULL, NULL, 1::float",
        "0.0::double, '00000000-0000-0001-0000-000000000002', NULL, 'a', NULL, NULL, 1::float",
        "0.0::double, '00000000-0000-0002-0000-000000000001', NULL, 'a', NULL, NULL, 1::float",
        "0.0::double, NULL, NULL, NULL, NULL, NULL, 1::float",
        "0.0::double, NULL, NULL, '', NULL, NULL, 1::float",
        "0.0::double, NULL, NULL, chr(0), NULL, NULL, 1::float",
        "0.0::double, NULL, NULL, 'a', 'a', NULL, 1::float",
        "0.0::double, NULL, NULL, NULL, 'a', NULL, 1::float",
        "0.0::double, NULL, NULL, NULL, NULL, '\"a\"', 1::float",
        "0.0::double, NULL, 0.00, 'a', NULL, NULL, 1::float",
        "0.0::double, NULL, 0.01, 'a', NULL, NULL, '-0'::float",
        "0.0::double, NULL, 0.01, 'a', NULL, NULL, 0::float",
    ]
    with duckdb.connect() as database:
        found = [_sums(database, schema, [row]) for row in rows]
        assert len({one.rows.hash_sum for one in found}) == len(rows)
        assert len({one.places for one in found}) == 1
        forwards, backwards = _sums(database, schema, rows), _sums(database, schema, rows[::-1])
        assert forwards == backwards
        total = RowSum(0, 0)
        for one in found:
            total = total + one.rows
        assert forwards.rows == total
        twice = _sums(database, schema, [*rows, rows[0]])
        assert twice.rows - found[0].rows == forwards.rows


def _sums(database: duckdb.DuckDBPyConnection, schema: TableSchema, rows: list[str]) -> Sums:
    names = ", ".join(f'"{c.name}"' for c in schema.columns)
    typed = ", ".join(f'"{c.name}"::{c.type} AS "{c.name}"' for c in schema.columns)
    values = ", ".join(f"({row})" for row in rows)
    relation = (
        '(SELECT 1::SMALLINT AS "$shard", 2::BIGINT AS "$position", 3::INTEGER AS "$row", '
        f"{typed} FROM (VALUES {values}) AS v({names}))"
    )
    return sums_of(database, schema, relation)[0]


@pytest.mark.parametrize("route", ["held", "one by one", "streamed", "in turns"])
@pytest.mark.parametrize("threads", [1, 2])
def test_D12_places_survive_and_rows_keep_the_order_of_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, threads: int
) -> None:
    inputs = plain_files(tmp_path, 6, 40)
    if route == "one by one":
        monkeypatch.setattr(rewrite_module, "_HELD_BYTES_MAX", 20_000)
    elif route == "streamed":
        monkeypatch.setattr(verified_inputs, "SMALL_BYTES", 0)
    elif route == "in turns":
        sizes = sorted(one.file.size_bytes for one in inputs)
        monkeypatch.setattr(verified_inputs, "SMALL_BYTES", sizes[3])
    found = run(tmp_path, PLAIN, inputs, group_rows_max=64, threads=threads)
    places = rows_in(PLAIN, [file.path for file in found.files], '"$shard", "$position", "$row"')
    order = reversed(range(6))
    assert places == [(number % 2, number, row) for number in order for row in range(40)]


def test_rows_come_sorted_nulls_last_texts_bytewise(tmp_path: Path) -> None:
    schema = schema_of((1, "s", "varchar"), (2, "x", "double"), sort_by=("s", "x"))
    values: dict[int, list[Any]] = {
        1: ["b", None, "B", "é", "", "b", "z", "b", "b"],
        2: [1.0, 1.0, 2.0, 3.0, 4.0, float("nan"), 5.0, None, float("-inf")],
    }
    found = run(tmp_path, schema, [write_input(tmp_path, schema, values)])
    rows = rows_in(schema, [file.path for file in found.files], "s, x::varchar")
    assert rows == [
        ("", "4.0"), ("B", "2.0"), ("b", "-inf"), ("b", "1.0"), ("b", "nan"), ("b", None),
        ("z", "5.0"), ("é", "3.0"), (None, "1.0"),
    ]  # fmt: skip


@pytest.mark.parametrize("curve", ["zorder(a, b)", "hilbert(a,b)"])
def test_a_curve_keeps_row_groups_narrow_in_both_columns(tmp_path: Path, curve: str) -> None:
    schema = schema_of((1, "a", "integer"), (2, "b", "varchar"), sort_by=(curve,))
    chance = random.Random(3)
    points: list[tuple[int | None, str | None]] = [
        (chance.randrange(64), f"{chance.randrange(64):02d}") for _ in range(4096)
    ]
    points += [(None, "00"), (0, None)]
    inputs = [write_input(tmp_path, schema, {1: [a for a, _ in points], 2: [b for _, b in points]})]
    found = run(tmp_path, schema, inputs, group_rows_max=256)
    metadata = pq.read_metadata(found.files[0].path)
    widths = []
    for group in range(metadata.num_row_groups - 1):
        a = metadata.row_group(group).column(0).statistics
        b = metadata.row_group(group).column(1).statistics
        widths.append((a.max - a.min + 1) * (int(b.max) - int(b.min) + 1))
    # A random group covers all 4,096 cells, a perfect one 256.
    assert sorted(widths)[len(widths) // 2] <= 512


def test_outputs_are_cut_near_the_target(tmp_path: Path) -> None:
    schema = schema_of((1, "id", "bigint"), (2, "noise", "double"))
    chance = random.Random(5)
    rows = 60_000
    inputs = [
        write_input(
            tmp_path,
            schema,
            {
                1: [chance.getrandbits(60) for _ in range(rows)],
                2: [chance.random() for _ in range(rows)],
            },
            number=number,
        )
        for number in range(3)
    ]
    target = 400_000
    found = run(tmp_path, schema, inputs, target_file_bytes=target)
    assert len(found.files) > 4
    for file in found.files[:-1]:
        assert 0.5 * target <= file.size_bytes <= 1.3 * target
    check_records(schema, found)


def test_a_file_never_mixes_partitions(tmp_path: Path) -> None:
    schema = schema_of(
        (1, "id", "bigint"), (2, "country", "varchar"),
        partition_by=("country", "bucket(2, id)"), sort_by=("id",),
    )  # fmt: skip
    chance = random.Random(1)
    countries = ("de", None, "fr", "ü'\"")
    inputs = [
        write_input(
            tmp_path,
            schema,
            {
                1: [chance.randrange(1000) for _ in range(200)],
                2: [chance.choice(countries) for _ in range(200)],
            },
            number=number,
        )
        for number in range(2)
    ]
    found = run(tmp_path, schema, inputs, group_rows_max=7)
    assert len(found.files) == 8
    assert len({file.partition for file in found.files}) == 8
    for file in found.files:
        assert file.partition is not None
        assert list(json.loads(file.partition)) == ["country", "bucket(2, id)"]
        rows = rows_in(schema, [file.path], "id, country")
        assert {row[1] for row in rows} == {json.loads(file.partition)["country"]}
        assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_inputs_of_one_partition_keep_it_unless_another_schema_wrote_them(tmp_path: Path) -> None:
    schema = schema_of((1, "id", "bigint"), partition_by=("truncate(10, id)",))
    recorded = '{"truncate(10, id)":"10"}'
    inputs = [
        write_input(tmp_path, schema, {1: [11, 12]}, number=number, partition=recorded)
        for number in range(2)
    ]
    assert [file.partition for file in run(tmp_path, schema, inputs).files] == [recorded]
    newer = TableSchema(1, "t", 2, (Column(2, "id", "bigint"),), partition_by=schema.partition_by)
    found = run(tmp_path, newer, inputs)
    assert [file.partition for file in found.files] == ['{"truncate(10, id)":null}']


def test_E6_damaged_inputs_are_named_and_not_rewritten(tmp_path: Path) -> None:
    good, bad = plain_files(tmp_path, 2, 10)
    data = bytearray(bad.path.read_bytes())
    data[20] ^= 1
    bad.path.write_bytes(data)
    with pytest.raises(Corrupt, match=bad.file.object_key):
        run(tmp_path, PLAIN, [good, bad])
    bad.path.unlink()
    with pytest.raises(Corrupt, match=bad.file.object_key):
        run(tmp_path, PLAIN, [good, bad])


def test_E6_a_wrong_row_count_in_the_catalog_is_named(tmp_path: Path) -> None:
    (one,) = plain_files(tmp_path, 1, 10)
    wrong = RewriteInput(dataclasses.replace(one.file, rows=11), one.path)
    with pytest.raises(Corrupt, match="10 rows where the catalog records 11"):
        run(tmp_path, PLAIN, [wrong])


def test_bad_orders_are_refused(tmp_path: Path) -> None:
    (one,) = plain_files(tmp_path, 1, 10)
    for sort_by in (("nope",), ("zorder(id)",), ("hilbert(id, name, x)",), ("zorder(id, id)",)):
        schema = schema_of((1, "id", "bigint"), (2, "name", "varchar"), (3, "x", "double"),
                           sort_by=sort_by)  # fmt: skip
        with pytest.raises(SchemaInvalid):
            run(tmp_path, schema, [one])


def test_everything_written_lies_in_the_jobs_folder(tmp_path: Path) -> None:
    source, temp = tmp_path / "in", tmp_path / "temp"
    source.mkdir()
    temp.mkdir()
    inputs = plain_files(source, 3, 20)
    before = sorted(source.iterdir())
    found = run(temp, PLAIN, inputs)
    assert sorted(source.iterdir()) == before
    assert all(temp in file.path.parents for file in found.files)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*before, *(file.path for file in found.files)}


def test_more_than_memory_spills_and_is_still_right(tmp_path: Path) -> None:
    schema = schema_of((1, "id", "bigint"), (2, "text", "varchar"), sort_by=("id",))
    chance = random.Random(11)
    inputs = [
        write_input(
            tmp_path,
            schema,
            {
                1: [chance.getrandbits(60) for _ in range(60_000)],
                2: [chance.randbytes(40).hex() for _ in range(60_000)],
            },
            number=number,
        )
        for number in range(8)
    ]
    found = run(tmp_path, schema, inputs, memory_bytes=48 * MIB)
    assert found.spilled_bytes > 0
    assert found.before == found.after
    ids = [row[0] for row in rows_in(schema, [f.path for f in found.files], "id")]
    assert ids == sorted(ids)


def test_a_long_rewrite_draws_nothing_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads the output, and the log of the jobs, would get a bar in it."""

    found: list[Any] = []

    def asked(connection: duckdb.DuckDBPyConnection, *args: Any, **more: Any) -> Any:
        found.extend(connection.execute("SELECT current_setting('enable_progress_bar')").fetchall())
        return sums_of(connection, *args, **more)

    monkeypatch.setattr(rewrite_module, "sums_of", asked)
    run(tmp_path, PLAIN, plain_files(tmp_path, 1, 10))
    assert set(found) == {(False,)}
