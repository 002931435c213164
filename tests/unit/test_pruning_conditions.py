"""Which files pruning drops for given SQL: the positive cases, and each reason to keep a file.

The random worlds of `test_pruning_D11.py` prove that nothing is lost; these prove that something
is won, and pin the cases that a random query hits rarely.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterator
from decimal import Decimal

import duckdb
import pytest

from lakebus.schemas import Column, TableSchema
from lakebus.snapshots import ColumnStatistics, DataFile
from storage.files.pruning import prune, table_predicates

T = TableSchema(
    1,
    "t",
    1,
    (
        Column(1, "i", "bigint"),
        Column(2, "f", "double"),
        Column(3, "v", "varchar"),
        Column(4, "ts", "timestamp"),
        Column(5, "d", "date"),
        Column(6, "n", "decimal(18,3)"),
        Column(7, "b", "boolean"),
        Column(8, "u", "uuid"),
        Column(9, "tz", "timestamptz"),
        Column(10, "j", "json"),
    ),
)
S = TableSchema(2, "s", 1, (Column(1, "i", "bigint"), Column(2, "y", "bigint")))
NAMESPACED = TableSchema(3, "space.t", 1, (Column(1, "i", "bigint"),))
DAY = 86_400_000_000


def _file(number: int) -> DataFile:
    """File 0, 1 and 2 hold the tens, twenties and thirties; file 2 has nulls, file 1 none."""

    low, high = number * 10 + 10, number * 10 + 19
    nulls = 3 if number == 2 else 0
    bounds = {
        1: (str(low), str(high)),
        2: (repr(float(low)), repr(float(high))),
        3: (f"k{low}", f"k{high}"),
        4: (str(low * DAY), str(high * DAY)),
        5: (f"1970-01-{low}" if low < 30 else "1970-01-31", f"1970-02-{low}"),
        6: (f"{low}.000", f"{high}.000"),
        7: ("false", "false") if number else ("true", "true"),
        8: (str(uuid.UUID(int=low)), str(uuid.UUID(int=high))),
        9: (str(low * DAY), str(high * DAY)),
    }
    statistics = {key: ColumnStatistics(nulls, *pair) for key, pair in bounds.items()}
    statistics[10] = ColumnStatistics(nulls)
    return DataFile(uuid.UUID(int=number), 1, 1, f"{number}", 10, 1, "", statistics)


FILES = [_file(number) for number in range(3)]
_parser = duckdb.connect()


def kept(sql: str, parameters: object = None, table: str = "t") -> list[int]:
    found = _parser.execute("select json_serialize_sql(?::varchar)", [sql]).fetchone()
    assert found is not None
    tree = json.loads(found[0])
    assert not tree["error"], tree
    schemas = {"t": T, "s": S}
    predicates = table_predicates(tree, parameters, schemas)  # type: ignore[arg-type]
    return [int(file.object_key) for file in prune(FILES, predicates[table])]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("i = 25", [1]),
        ("25 = i", [1]),
        ("i < 20", [0]),
        ("i <= 20", [0, 1]),
        ("i > 29", [2]),
        ("i >= 29", [1, 2]),
        ("29 < i", [2]),
        ("i = 19.5", []),
        ("i < 19.5", [0]),
        ("i between 15 and 22", [0, 1]),
        ("i in (11, 35)", [0, 2]),
        ("i in (1, 2, 3)", []),
        ("i in (20, 99)", [1]),
        ("i is null", [2]),
        ("not (i is not null)", [2]),
        ("i is not null", [0, 1, 2]),
        ("i is not distinct from 15", [0]),
        ("i > 15 and i < 18", [0]),
        ("i = 15 or i = 35", [0, 2]),
        ("i = 15 and length(v) > 2", [0]),
        ("f < 20", [0]),
        ("f = 25.5e0", [1]),
        ("n = 25.5", [1]),
        ("n >= 30", [2]),
        ("v = 'k25'", [1]),
        ("v like 'k2%'", [1]),
        ("v ^@ 'k3'", [2]),
        ("starts_with(v, 'k1')", [0]),
        ("b", [0]),
        ("not b", [1, 2]),
        ("b = true", [0]),
        ("ts >= '1970-01-31'", [2]),
        ("ts < timestamp '1970-01-21 00:00:00'", [0]),
        ("ts < date '1970-01-21'", [0]),
        ("tz < '1970-01-21T00:00:00Z'", [0]),
        ("tz < '1970-01-21 02:00:00+02:00'", [0]),
        ("tz < '1970-01-21 02:00:00+02'", [0]),
        ("u = '00000000-0000-0000-0000-000000000019'", [1]),
        ("u = uuid '00000000-0000-0000-0000-000000000019'", [1]),
        ("j is null", [2]),
    ],
)
def test_D11_conditions_that_are_understood_prune(condition: str, expected: list[int]) -> None:
    assert kept(f"select * from t where {condition}") == expected


@pytest.mark.parametrize(
    "condition",
    [
        "i + 0 = 15",
        "abs(i) = 15",
        "i = 15 or length(v) > 2",
        "not (i = 15)",
        "i <> 15",
        "i = null",
        "i in (15, null)",
        "i in (15, 1e1)",
        "i between 15 and 1.6e1",
        "i = '15'",
        "i = true",
        "i = 15::double",
        "i not in (15)",
        "v = 'k15' collate nocase",
        "v collate nocase = 'K15'",
        "v ilike 'k1%'",
        "v like 'k1!%' escape '!'",
        "v not like 'k1%'",
        "ts = '1970-01-15 00:00:00Z'",
        "ts = timestamptz '1970-01-15 00:00:00Z'",
        "ts = '1970-01-15 00:00'",
        "ts = '1970-02-31'",
        "ts = 'epoch'",
        "d = timestamp '1970-01-15 10:00:00'",
        "d::varchar = '1970-01-15'",
        "j = '15'",
        "u = '19'",
        "n = 0.000000000000000000000000000000000001",
        "i = (select 15)",
        "(i, f) = (15, 15)",
        "case when i = 15 then true else false end",
        "coalesce(i, 15) = 15",
        "missing = 15",
        "other.i = 15",
    ],
)
def test_D11_conditions_not_fully_understood_keep_every_file(condition: str) -> None:
    assert kept(f"select * from t where {condition}") == [0, 1, 2]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("from t where i = 15", [0]),
        ("select * from t as q where q.i = 15", [0]),
        ("select * from T where T.I = 15", [0]),
        ("select * from t join s on t.i = s.i where t.i = 15", [0]),
        ("select * from t join s on t.i = s.i and t.i = 15", [0]),
        ("select * from t, s where t.f = 15 and s.y = 3", [0]),
        ("select * from t left join s on t.i = s.i where t.i = 15", [0]),
        ("select * from s left join t on t.i = s.i and t.i = 15", [0]),
        ("select * from s left join t on t.i = s.i where f is null", [0, 1, 2]),
        ("select * from t left join s on t.i = s.i and t.i = 15", [0, 1, 2]),
        ("select * from t full join s on t.i = 15 where t.i = 15", [0, 1, 2]),
        ("select * from t right join s on t.i = s.i where f = 15", [0, 1, 2]),
        ("select * from t semi join s on t.i = s.i where t.i = 15", [0]),
        ("select * from t anti join s on t.i = 15", [0, 1, 2]),
        ("select * from t join s using (i) where i = 15", [0, 1, 2]),
        ("select * from t join s using (i) where t.i = 15", [0]),
        ("select * from t natural join s where f = 15", [0, 1, 2]),
        ("select * from t positional join s where f = 15", [0, 1, 2]),
        ("select * from s asof join t on s.i >= t.i where f = 15", [0, 1, 2]),
        ("select * from (select * from t where i = 15) q", [0]),
        ("select * from (select * from t) q where q.i = 15", [0, 1, 2]),
        ("with q as (select * from t where i = 15) select * from q", [0]),
        ("with t as (select * from t where i = 15) select * from t", [0, 1, 2]),
        ("select * from s where y in (select i from t where i = 15)", [0]),
        ("select (select max(i) from t where i = 15) from s", [0]),
        ("select * from t where i = 15 union all select * from t where i = 35", [0, 2]),
        ("select * from t where i = 15 union all select * from t", [0, 1, 2]),
        ("select * from t a, t b where a.i = 15 and b.i = 25", [0, 1]),
        ("select * from t a, t b where a.i = 15", [0, 1, 2]),
        ("select * from t a, t where a.i = 15 and t.i = 15", [0]),
        ("select f as i from t where i = 15", [0, 1, 2]),
        ("select f as i from t where t.i = 15", [0]),
        ("select * from t q(a, b) where q.i = 15", [0, 1, 2]),
        ("select * from t tablesample 50% where i = 15", [0, 1, 2]),
        ("select * from t at (version => 3) where i = 15", [0, 1, 2]),
        ("select * from main.t where i = 15", [0]),
        ("select * from main.t where main.t.i = 15", [0]),
        ("describe select * from t where i = 15", [0]),
        ("select count(*) from t where i = 15 group by v having count(*) > 1", [0]),
        ("select * from (t join s on t.i = s.i) where f = 15", [0]),
        ("select 1", [0, 1, 2]),
    ],
)
def test_D11_conditions_count_only_where_they_certainly_apply(
    sql: str, expected: list[int]
) -> None:
    assert kept(sql) == expected


@pytest.mark.parametrize(
    ("condition", "parameters", "expected"),
    [
        ("i = ?", [15], [0]),
        ("i > ? and i < ?", [12, 14], [0]),
        ("i = $1", [15], [0]),
        ("i = $wanted", {"wanted": 15}, [0]),
        ("i = $Wanted", {"wanted": 15}, [0]),
        ("i = ?", [15.0], [0]),
        ("i = ?", [Decimal("15.0")], [0]),
        ("i = ?", [True], [0, 1, 2]),
        ("i = ?", ["15"], [0, 1, 2]),
        ("i = ?", [float("nan")], [0, 1, 2]),
        ("i = ?", [None], [0, 1, 2]),
        ("i = ?", [], [0, 1, 2]),
        ("i in (?, ?)", [15, 35], [0, 2]),
        ("v = ?", ["k25"], [1]),
        ("v = ?", ["\ud800"], [0, 1, 2]),
        ("ts = ?", [dt.datetime(1970, 1, 15)], [0]),  # noqa: DTZ001
        ("ts = ?", [dt.datetime(1970, 1, 15, tzinfo=dt.UTC)], [0, 1, 2]),
        ("tz = ?", [dt.datetime(1970, 1, 15, tzinfo=dt.UTC)], [0]),
        ("ts = ?", [dt.date(1970, 1, 15)], [0]),
        ("ts = ?", [dt.datetime(9999, 12, 31)], [0, 1, 2]),  # noqa: DTZ001
        ("ts = ?::timestamp", ["1970-01-15"], [0]),
        ("ts = ?", ["1970-01-15"], [0]),
        ("u = ?", [uuid.UUID(int=25)], [1]),
        ("i = ?", [object()], [0, 1, 2]),
    ],
)
def test_D11_parameters_are_constants_when_their_meaning_is_certain(
    condition: str, parameters: object, expected: list[int]
) -> None:
    assert kept(f"select * from t where {condition}", parameters) == expected


def test_D11_a_column_without_statistics_keeps_the_file() -> None:
    file = DataFile(uuid.UUID(int=9), 1, 1, "9", 10, 1, "", {})
    tree = json.loads(
        _parser.execute("select json_serialize_sql('from t where i = 15')").fetchall()[0][0]
    )
    predicate = table_predicates(tree, None, {"t": T})["t"]
    assert predicate is not None
    assert prune([file], predicate) == [file]
    assert predicate.keeps({1: ColumnStatistics(0, "15", None)}, 10)
    assert not predicate.keeps({1: ColumnStatistics(10)}, 10)
    assert predicate.keeps({1: ColumnStatistics(0)}, 10)
    assert predicate.keeps({1: ColumnStatistics(0, "unreadable", "text")}, 10)


@pytest.mark.parametrize(
    "condition",
    ["i = 15", "i IN (15, 16)", "i IS NULL", "i IS NOT NULL", "i < 3", "v LIKE 'k%'", "NOT b"],
)
def test_D11_a_column_added_later_keeps_the_files_from_before(condition: str) -> None:
    file = DataFile(uuid.UUID(int=9), 1, 1, "9", 10, 1, "", {})
    found = _parser.execute(
        "select json_serialize_sql(?::varchar)", [f"from t where {condition}"]
    ).fetchall()
    predicate = table_predicates(json.loads(found[0][0]), None, {"t": T})["t"]
    assert predicate is not None
    assert prune([file], predicate) == [file]


def test_D11_a_name_that_may_mean_two_tables_restricts_neither_wrongly() -> None:
    schemas = {"t": T, "space.t": NAMESPACED}
    sql = "select * from space.t where i = 15"
    tree = json.loads(_parser.execute(f"select json_serialize_sql('{sql}')").fetchall()[0][0])
    predicates = table_predicates(tree, None, schemas)
    assert predicates["space.t"] is not None
    assert predicates["t"] is None


def test_D11_a_very_deep_condition_keeps_every_file() -> None:
    tree: object = {"class": "CONJUNCTION", "type": "CONJUNCTION_OR", "children": []}
    for _ in range(400):
        tree = {"class": "CONJUNCTION", "type": "CONJUNCTION_AND", "children": [tree]}
    node = {
        "type": "SELECT_NODE",
        "from_table": {"type": "BASE_TABLE", "table_name": "t", "alias": ""},
        "where_clause": tree,
    }
    assert table_predicates(node, None, {"t": T}) == {"t": None}


@pytest.fixture(scope="module", autouse=True)
def _close_parser() -> Iterator[None]:
    yield
    _parser.close()
