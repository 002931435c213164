"""Which files the first rows of a table are read from (D11), and in which order."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import random
import uuid
from collections.abc import Sequence
from typing import Any

import duckdb
import pytest

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.engine.plans import ParsedStatement
from storage.reading.leading import Leading, arrange, leading

T = TableSchema(
    table_id=1,
    name="t",
    version=1,
    columns=(
        Column(1, "i", "bigint"),
        Column(2, "ts", "timestamp"),
        Column(3, "d", "date"),
        Column(4, "v", "varchar"),
        Column(5, "s", "struct(i integer)"),
    ),
)
_parser = duckdb.connect()


def read(sql: str, **changes: Any) -> tuple[str, bool, int | None] | None:
    found = _parser.execute("select json_serialize_sql(?::varchar)", [sql]).fetchone()
    assert found is not None
    tree = json.loads(found[0])
    assert not tree["error"], tree
    given: dict[str, Any] = {"tables": ("t",), "described": (), **changes}
    parsed = ParsedStatement(
        sql, "select", given["tables"], (), False, False, tree, given["described"]
    )
    wanted = leading(parsed, T)
    return None if wanted is None else (wanted.column.name, wanted.descending, wanted.rows)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select * from t order by ts desc limit 10", ("ts", True, 10)),
        ("select v, 1 as one, s from T as q order by I limit 10 offset 5", ("i", False, 15)),
        ("from t order by d desc nulls last, v limit 1", ("d", True, 1)),
        ("select * exclude (v) from t order by i limit 0", ("i", False, 0)),
        # Which rows there are is not for the bounds to tell; where to look first is.
        ("select * from t where v = 'x' order by i limit 10", ("i", False, None)),
        ("select v, count(*) from t group by v, i order by i limit 10", ("i", False, None)),
        ("select max(i) from t order by i limit 1", ("i", False, None)),
        ("select v, row_number() over () from t order by i limit 10", ("i", False, None)),
        ("select v, (select 1) from t order by i limit 10", ("i", False, None)),
        ("select v, -i as i from t order by i limit 10", ("i", False, None)),
        ("select v as i from t order by i limit 10", ("i", False, None)),
        ("select s.i from t order by i limit 10", ("i", False, None)),
        ("select * rename (ts as i) from t order by i limit 10", ("i", False, None)),
        ("select * replace (-i as i) from t order by i limit 10", ("i", False, None)),
        ("select columns('i') from t order by i limit 10", ("i", False, None)),
        ("select * from t order by i, row_number() over () limit 9", ("i", False, None)),
        ("select * from t qualify row_number() over () = 1 order by i limit 9", ("i", False, None)),
        ("select * from t order by i limit 10%", ("i", False, None)),
        ("select * from t order by i limit 5 + 5", ("i", False, None)),
        ("select * from t order by i limit $1", ("i", False, None)),
        ("select * from t order by i limit 10 offset $1", ("i", False, None)),
        ("select * from t order by i limit 1e1", ("i", False, None)),
    ],
)
def test_D11_orders_that_are_understood(sql: str, expected: tuple[str, bool, int | None]) -> None:
    assert read(sql) == expected


@pytest.mark.parametrize(
    "sql",
    [
        "select * from t",
        "select * from t limit 10",
        "select * from t order by i",
        "select * from t order by i offset 10",
        "select * from t order by v limit 10",
        "select * from t order by 1 limit 10",
        "select * from t order by i + 1 limit 10",
        "select * from t order by s.i limit 10",
        "select * from t order by all limit 10",
        "select * from t order by missing limit 10",
        "select * from t order by i nulls first limit 10",
        "select distinct v from t order by i limit 10",
        "select * from t using sample 10 rows order by i limit 10",
        "select * from t tablesample 10% order by i limit 10",
        "select * from t as q(a, i) order by i limit 10",
        "select * from t, t as u order by i limit 10",
        "select * from (from t) order by i limit 10",
        "select * from t at (version => 1) order by i limit 10",
        "with u as (from t) select * from t order by i limit 10",
        "select * from t union all select * from t order by i limit 10",
    ],
)
def test_D11_other_statements_have_no_order(sql: str) -> None:
    assert read(sql) is None


def test_D11_statements_about_more_than_one_table_have_no_order() -> None:
    sql = "select * from t order by i limit 10"
    assert read(sql) == ("i", False, 10)
    assert read(sql, tables=("t", "u")) is None
    assert read(sql, described=("u",)) is None


def _file(number: int, statistics: dict[int, ColumnStatistics], rows: int) -> DataFile:
    return DataFile(uuid.UUID(int=number), 1, 1, str(number), rows, 1, "", statistics)


def _world(rng: random.Random) -> list[tuple[DataFile, list[int | None]]]:
    """Files and their values of `i`: with ties, nulls, wide bounds, and bounds that say nothing."""

    world = []
    for number in range(rng.randint(0, 8)):
        low = rng.randint(-30, 30)
        values: list[int | None] = [
            None if rng.random() < 0.2 else low + rng.randint(0, rng.choice([0, 3, 20]))
            for _ in range(rng.randint(1, 6))
        ]
        held = [value for value in values if value is not None]
        nulls = len(values) - len(held)
        least = greatest = None
        if held and rng.random() < 0.85:
            least, greatest = str(min(held) - rng.choice([0, 0, 5])), str(max(held))
            if rng.random() < 0.1:
                least = "an older type"
        statistics = {1: ColumnStatistics(nulls, least, greatest)}
        world.append((_file(number, {} if rng.random() < 0.1 else statistics, len(values)), values))
    return world


def test_D11_no_row_among_the_first_is_left_out() -> None:
    rng = random.Random(7)
    cut = 0
    for _ in range(2_000):
        world = _world(rng)
        descending, rows = rng.random() < 0.5, rng.randint(0, 12)
        files = [file for file, _ in world]
        wanted = Leading(T.columns[0], descending, rows)
        kept = {file.file_id for file in arrange(files, wanted, pruning=True)}

        def keys(shown: Sequence[list[int | None]], back: bool = descending) -> list[int]:
            held = [v for values in shown for v in values if v is not None]
            return sorted(held, reverse=back)

        everything = keys([values for _, values in world])
        found = keys([values for file, values in world if file.file_id in kept])
        assert found[:rows] == everything[:rows]
        if 0 < rows <= len(everything):  # and every row that is equal to the last of them
            last = everything[rows - 1]
            assert found.count(last) == everything.count(last)
        elif rows:
            assert len(kept) == len(files)
        cut += len(files) - len(kept)
        every = arrange(files, wanted, pruning=False)
        assert sorted(every, key=lambda file: file.object_key) == files
        assert len(arrange(files, Leading(T.columns[0], descending, None), pruning=True)) == len(
            files
        )
    assert cut > 1_000


def test_files_are_read_in_the_order_of_their_bounds() -> None:
    days = [dt.date(2026, 1, 1) + dt.timedelta(days=30 * n) for n in range(3)]
    files = [
        _file(n, {3: ColumnStatistics(0, day.isoformat(), (day + dt.timedelta(5)).isoformat())}, 10)
        for n, day in enumerate(days)
    ]
    files.append(_file(3, {}, 10))  # says nothing, so it may hold any day
    for number, given in enumerate(itertools.permutations(files)):
        rows = 25 if number % 2 else None
        for descending, order in ((False, ["3", "0", "1", "2"]), (True, ["3", "2", "1", "0"])):
            arranged = arrange(given, Leading(T.columns[2], descending, rows), pruning=True)
            assert [file.object_key for file in arranged] == order
    few = arrange(files, Leading(T.columns[2], True, 20), pruning=True)
    assert [file.object_key for file in few] == ["3", "2", "1"]
