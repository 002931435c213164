"""The files that a rewrite writes: their bounds, filters and shape."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from lakebus.schemas import HIDDEN_COLUMNS
from lakebus.snapshots import ColumnStatistics
from storage.files.parquet import HIDDEN_FIELD_IDS, read_footer
from storage.files.statistics import BOUND_READERS, merged_statistics
from storage.rows.types import Family, parse_type
from tests.unit.rewrite_rig import (
    PLAIN,
    check_records,
    plain_files,
    rows_in,
    run,
    schema_of,
    write_input,
)


def test_D11_statistics_of_outputs_are_true_bounds(tmp_path: Path) -> None:
    inputs = plain_files(tmp_path, 5, 300)
    found = run(tmp_path, PLAIN, inputs, group_rows_max=64, target_file_bytes=9_000)
    assert len(found.files) > 2
    for file in found.files:
        rows = rows_in(PLAIN, [file.path], "id, name, x")
        for place, column in enumerate(PLAIN.columns):
            values = [row[place] for row in rows if row[place] is not None]
            claim = file.statistics[column.column_id]
            assert claim.null_count == len(rows) - len(values)
            read = BOUND_READERS[parse_type(column.type).family]
            exact = [v.encode() if isinstance(v, str) else v for v in values]
            assert claim.minimum is not None
            assert claim.maximum is not None
            assert read(claim.minimum) <= min(exact)
            assert read(claim.maximum) >= max(exact)
            if parse_type(column.type).family is not Family.VARCHAR:
                assert (read(claim.minimum), read(claim.maximum)) == (min(exact), max(exact))


def bounded_columns(path: Path) -> set[str]:
    metadata = pq.read_metadata(path)
    return {
        metadata.row_group(group).column(place).path_in_schema
        for group in range(metadata.num_row_groups)
        for place in range(metadata.num_columns)
        if metadata.row_group(group).column(place).is_stats_set
    }


def test_D11_a_late_nan_takes_the_bounds_from_its_file_only(tmp_path: Path) -> None:
    """Sorted by the column, NaNs come after many groups were written with bounds."""

    schema = schema_of((1, "x", "double"), (2, "y", "float"), sort_by=("x",))
    values: dict[int, list[Any]] = {
        1: [float("nan"), *(float(n) for n in range(40)), None],
        2: [1.0] * 42,
    }
    inputs = [write_input(tmp_path, schema, values)]
    whole = run(tmp_path, schema, inputs, group_rows_max=10)
    assert bounded_columns(whole.files[0].path) == {"y", *HIDDEN_COLUMNS}
    assert whole.files[0].statistics[1].minimum is None
    cut = run(tmp_path, schema, inputs, group_rows_max=10, target_file_bytes=1)
    assert "x" in bounded_columns(cut.files[0].path)
    assert "x" not in bounded_columns(cut.files[-1].path)
    assert not list(tmp_path.rglob("*.draft"))
    check_records(schema, whole)


def test_D11_an_unsorted_nan_takes_all_bounds_at_once(tmp_path: Path) -> None:
    schema = schema_of((1, "x", "double"))
    inputs = [
        write_input(tmp_path, schema, {1: [1.0, 2.0]}),
        write_input(tmp_path, schema, {1: [float("nan")]}, number=1),
    ]
    found = run(tmp_path, schema, inputs, group_rows_max=1)
    assert bounded_columns(found.files[0].path) == set(HIDDEN_COLUMNS)


@pytest.mark.parametrize("sort_by", [(), ("s",)])
def test_D11_a_constant_group_with_nulls_takes_the_bounds(
    tmp_path: Path, sort_by: tuple[str, ...]
) -> None:
    schema = schema_of((1, "s", "varchar"), (2, "b", "blob"), (3, "n", "integer"), sort_by=sort_by)
    texts = ["a", "b", "c", "d", "e", "e", None]
    values: dict[int, list[Any]] = {
        1: texts,
        2: [text and text.encode() for text in texts],
        3: list(range(7)),
    }
    inputs = [write_input(tmp_path, schema, values)]
    for group_rows in (2, 3):
        found = run(tmp_path, schema, inputs, group_rows_max=group_rows)
        assert bounded_columns(found.files[0].path) == {"s", "b", "n", *HIDDEN_COLUMNS}
    narrow = run(tmp_path, schema, inputs, group_rows_max=5)
    assert bounded_columns(narrow.files[0].path) == {"n", *HIDDEN_COLUMNS}
    assert narrow.files[0].statistics[1].maximum == "e"
    with duckdb.connect() as database:
        nulls = f"select count(*) from '{narrow.files[0].path}' where s is null and b is null"
        assert database.execute(nulls).fetchall() == [(1,)]


def test_outputs_have_the_shape_of_data_files(tmp_path: Path) -> None:
    kinds = ("boolean", "utinyint", "bigint", "float", "decimal(38,5)", "varchar", "blob", "date",
             "time", "timestamp", "timestamptz", "uuid", "json")  # fmt: skip
    schema = schema_of(*((i, f"c{i}", kind) for i, kind in enumerate(kinds, 1)))
    inputs = [write_input(tmp_path, schema, {i: [None] for i in range(1, len(kinds) + 1)})]
    (file,) = run(tmp_path, schema, inputs).files
    assert read_footer(file.path) == read_footer(inputs[0].path)
    assert set(HIDDEN_FIELD_IDS.values()) < set(read_footer(file.path).columns)
    metadata = pq.read_metadata(file.path)
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    assert column.compression == "ZSTD"
    assert "DELTA_BINARY_PACKED" in column.encodings


def test_filters_go_to_unique_columns_that_bounds_do_not_separate(tmp_path: Path) -> None:
    schema = schema_of(
        (1, "sequence", "bigint"), (2, "key", "varchar"), (3, "kind", "varchar"), (4, "x", "double")
    )
    chance = random.Random(2)
    rows = 20_000
    keys = [f"{chance.getrandbits(60):x}" for _ in range(rows)]
    values: dict[int, list[Any]] = {
        1: list(range(rows)),
        2: keys,
        3: [chance.choice("abc") for _ in range(rows)],
        4: [chance.random() for _ in range(rows)],
    }
    inputs = [write_input(tmp_path, schema, values)]
    (file,) = run(tmp_path, schema, inputs, group_rows_max=10_000).files
    with duckdb.connect() as database:
        found = database.execute(
            "select path_in_schema, count(bloom_filter_length) from parquet_metadata(?) "
            "group by all having count(bloom_filter_length) > 0",
            [str(file.path)],
        ).fetchall()
        assert found == [("key", 2)]
        for key in chance.sample(keys, 50):
            hits = database.execute(f"select count(*) from '{file.path}' where key = '{key}'")
            assert hits.fetchall() == [(1,)]


def test_D11_merged_bounds_claim_what_every_group_allows() -> None:
    kind = parse_type("varchar")
    nulls, low = ColumnStatistics(3), ColumnStatistics(1, "B", "é")
    high, open_above = ColumnStatistics(0, "a", "z"), ColumnStatistics(0, "b", None)
    assert merged_statistics(kind, [(3, nulls), (5, low), (2, high)]) == ColumnStatistics(
        4, "B", "é"
    )
    assert merged_statistics(kind, [(5, low), (2, open_above)]) == ColumnStatistics(1, "B", None)
    assert merged_statistics(kind, [(3, nulls)]) == nulls
    assert merged_statistics(parse_type("integer"), [
        (1, ColumnStatistics(0, "9", "9")), (1, ColumnStatistics(0, "10", "10")),
    ]) == ColumnStatistics(0, "9", "10")  # fmt: skip
