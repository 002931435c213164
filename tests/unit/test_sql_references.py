"""References that are rewritten: AT, lists of tables, and the columns that are only described."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import uuid
from collections.abc import Iterator

import duckdb
import msgspec
import pytest

from lakebus.clock import SystemClock
from lakebus.errors import (
    SnapshotExpired,
    SnapshotNotFound,
    SqlError,
    TableNotFound,
    Unavailable,
)
from lakebus.schemas import Column, TableSchema
from storage.engine.child_faults import Refusal
from storage.engine.child_functions import read_rules
from storage.engine.child_guard import Guard
from storage.engine.child_sandbox import open_database
from storage.engine.plans import At
from storage.engine.settings import EngineSettings
from storage.reading.holds import Grant, Hold, Proposal
from storage.reading.listings import Listings, listing_source, shape_source
from storage.reading.resolve import SnapshotChoice
from storage.reading.travel import choice_of, hold_all


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    folder = tmp_path_factory.mktemp("references")
    settings = EngineSettings(
        allowed_directory=str(folder), temp_directory=str(folder / "spill"), sql_bytes_max=65536
    )
    connection = open_database(settings, threads=1)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def guard(database: duckdb.DuckDBPyConnection) -> Guard:
    return Guard(database.cursor(), read_rules(database), sql_bytes_max=65536, cache_entries=8)


REWRITTEN = [
    ("FROM t AT (VERSION => 12)", 'FROM "$s7r0"."main"."t" '),
    ("FROM T as x AT(VERSION=>12) WHERE x.a", 'FROM "$s7r0"."main"."t" as x  WHERE x.a'),
    (
        "SELECT 'ü AT (VERSION => 1)' FROM ns . \"T\" /* AT ( */ AT -- (\n ( VERSION => $v ) , u",
        'SELECT \'ü AT (VERSION => 1)\' FROM "$s7r0"."ns"."t" /* AT ( */   , u',
    ),
    (
        "FROM t x(a, b) AT (TIMESTAMP => TIMESTAMPTZ '2026-01-31T12:00:00Z') TABLESAMPLE 10%",
        'FROM "$s7r0"."main"."t" x(a, b)   TABLESAMPLE 10%',
    ),
    (
        "EXPLAIN SELECT * FROM t AT (VERSION => (1)), u x AT (VERSION => '1')",
        'EXPLAIN SELECT * FROM "$s7r0"."main"."t" , "$s7r0"."main"."u" x ',
    ),
    (
        "SELECT information_schema.tables.table_name FROM Information_Schema.\"TABLES\" WHERE 'é'",
        'SELECT "$lists".tables.table_name FROM "$s7i"."$lists"."tables" WHERE \'é\'',
    ),
    ("SHOW TABLES", 'FROM "$s7i"."$lists"."show_tables"'),
    ("show tables from NS;", 'FROM "$s7i"."$lists"."show_tables.ns"'),
    ("SHOW ns.t", 'DESCRIBE "$s7"."ns"."t"'),
    ("DESCRIBE information_schema.columns", 'DESCRIBE "$s7i"."$lists"."columns"'),
    ("SUMMARIZE information_schema.tables", 'SUMMARIZE "$s7i"."$lists"."tables"'),
]


@pytest.mark.parametrize(("sql", "expected"), REWRITTEN)
def test_D1_only_the_reference_is_rewritten(guard: Guard, sql: str, expected: str) -> None:
    rewriting = guard.check(sql).rewriting
    assert rewriting is not None
    assert rewriting.text("$s7").split() == expected.split()


def test_a_statement_without_such_references_is_run_as_it_is(guard: Guard) -> None:
    for sql in ("FROM t", "DESCRIBE t", "SELECT 'AT (VERSION => 1)'", "SELECT a.b.c FROM a.b"):
        assert guard.check(sql).rewriting is None


def test_D1_sides_are_told_apart_and_parameters_keep_their_values(guard: Guard) -> None:
    sql = (
        "SELECT ?, ? FROM t AT (VERSION => ?), t u AT (VERSION => 3), t v AT (VERSION => ?) LIMIT ?"
    )
    statement = guard.check(sql)
    assert statement.tables == ()
    assert statement.parameters == ("1", "2", "3", "4", "5")
    assert [at for at, _, _ in statement.travels] == [
        At("version", None, "3"),
        At("version", "3", None),
        At("version", None, "4"),
    ]
    assert statement.rewriting is not None
    assert statement.rewriting.sides == ("r0", "r1", "r2")
    assert statement.rewriting.parameters == {"1": "1", "2": "2", "3": "5"}
    named = guard.check("SELECT $a FROM t AT (VERSION => $b) WHERE $b > 1").rewriting
    assert named is not None
    assert named.parameters == {"a": "a", "b": "b"}


def test_D11_each_side_has_a_tree_that_is_about_itself(guard: Guard) -> None:
    statement = guard.check("FROM t, t o AT (VERSION => 1) WHERE t.a = 1 AND o.a = 2")
    trees = [statement.tree, statement.travels[0][2]]
    for tree, names in zip(trees, (["t", "$elsewhere"], ["$elsewhere", "t"]), strict=True):
        join = msgspec.json.decode(tree)["statements"][0]["node"]["from_table"]
        sides = [join["left"], join["right"]]
        assert [side["qualified_name"]["path"] for side in sides] == [[name] for name in names]
        assert [side["at_clause"] for side in sides if side["table_name"] == "t"] == [None]
    assert statement.references() == [("t", "t"), ("r0:t", "t")]


def test_at_most_sixteen_snapshots_in_a_statement(guard: Guard) -> None:
    def reads(count: int) -> str:
        return "FROM " + ", ".join(f"t t{n} AT (VERSION => {n})" for n in range(count))

    assert len(guard.check(reads(16)).travels) == 16
    with pytest.raises(Refusal, match="at most 16"):
        guard.check(reads(17))


def test_a_table_is_described_or_read(guard: Guard) -> None:
    assert guard.check("DESCRIBE t").described == ("t",)
    assert guard.check("FROM (DESCRIBE t) JOIN u ON true").described == ("t",)
    with pytest.raises(Refusal, match="ask information_schema"):
        guard.check("FROM (DESCRIBE t) JOIN t ON true")


def test_a_large_statement_is_judged_once(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    sql = "SELECT 1 WHERE 1 IN (" + ",".join("1" * 16_000) + ")"
    whole = guard.check(sql)
    assert len(whole.tree) > 2 << 20
    monkeypatch.setattr(guard, "_check", None)
    assert guard.judge(sql).tree == b"{}"
    assert guard.judge(sql).kind == whole.kind


# --- which snapshot ---------------------------------------------------------------------------


def test_D2_an_at_names_a_snapshot_or_is_refused() -> None:
    assert choice_of(At("version", "12", None), None) == SnapshotChoice(snapshot_id=12)
    assert choice_of(At("version", None, "1"), [7]) == SnapshotChoice(snapshot_id=7)
    assert choice_of(At("version", None, "v"), {"v": "7"}) == SnapshotChoice(snapshot_id=7)
    time = choice_of(At("timestamp", "2026-01-31T13:00:00+01:00", None), None).time
    assert time is not None
    assert time.isoformat() == "2026-01-31T12:00:00+00:00"
    for at, parameters in (
        (At("version", "-1", None), None),
        (At("version", None, "1"), None),
        (At("version", None, "2"), [1]),
        (At("version", None, "0"), [1]),
        (At("version", None, "v"), {"w": 1}),
        (At("version", None, "1"), [1.0]),
        (At("version", None, "1"), [True]),
        (At("timestamp", None, "1"), [1]),
        (At("timestamp", "2026-01-31", None), None),
        (At("timestamp", "2026-01-31T12:00:00.1234567Z", None), None),
    ):
        with pytest.raises(SqlError):
            choice_of(at, parameters)
    with pytest.raises(SnapshotNotFound):
        choice_of(At("version", "9" * 30, None), None)


# --- lists ------------------------------------------------------------------------------------

_TYPES = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger",
    "ubigint", "float", "double", "decimal(9,2)", "decimal(38,0)", "varchar", "blob", "date",
    "time", "timestamp", "timestamptz", "uuid", "json",
)  # fmt: skip
_SCHEMAS = (
    TableSchema(1, "ns.x", 1, (Column(1, "a", "bigint", nullable=False), Column(2, "b", "json"))),
    TableSchema(2, "y", 1, tuple(Column(n, f"c{n}", kind) for n, kind in enumerate(_TYPES))),
)
#: What is ours to say differently: names of the lake, and that SQL writes nothing.
_OURS = {"table_catalog", "catalog_name", "schema_owner", "is_insertable_into", "database"}


def _shows_another(listing: str, row: tuple[object, ...]) -> bool:
    return listing == "show_all_tables" and row[0] != f"own_{listing}"


@pytest.mark.parametrize("listing", ["tables", "columns", "schemata", "show_all_tables"])
def test_D10_lists_are_what_duckdb_says_of_the_same_tables(
    database: duckdb.DuckDBPyConnection, listing: str
) -> None:
    cursor = database.cursor()
    cursor.execute(f"ATTACH ':memory:' AS \"own_{listing}\"")
    cursor.execute(f"USE own_{listing}")
    cursor.execute("CREATE SCHEMA ns")
    for schema in _SCHEMAS:
        cursor.execute(f"CREATE TABLE {schema.name} ({shape_source(schema).relation_sql})")
    ours = cursor.sql(f"FROM {listing_source(listing, _SCHEMAS).relation_sql}")
    if listing == "show_all_tables":
        theirs = cursor.sql("SHOW ALL TABLES")
    else:
        key = "catalog_name" if listing == "schemata" else "table_catalog"
        where = f"{key} = 'own_{listing}' AND table_schema IN ('main', 'ns')"
        if listing == "schemata":
            where = f"{key} = 'own_{listing}' AND schema_name IN ('main', 'ns')"
        theirs = cursor.sql(f"FROM information_schema.{listing} WHERE {where}")
    assert (ours.columns, [str(t) for t in ours.types]) == (
        theirs.columns,
        [str(t) for t in theirs.types],
    )
    kept = [n for n, name in enumerate(ours.columns) if name not in _OURS]

    def rows(found: list[tuple[object, ...]]) -> list[str]:
        return sorted(repr([row[n] for n in kept]) for row in found)

    mine = [row for row in theirs.fetchall() if not _shows_another(listing, row)]
    assert rows(ours.fetchall()) == rows(mine)


def test_a_list_of_nothing_is_empty_and_quotes_are_kept(
    database: duckdb.DuckDBPyConnection,
) -> None:
    cursor = database.cursor()
    for listing in ("tables", "columns", "show_tables", "show_all_tables", "show_tables.main"):
        assert cursor.sql(f"FROM {listing_source(listing, ()).relation_sql}").fetchall() == []
    schemata = listing_source("schemata", ()).relation_sql
    assert [row[1] for row in cursor.sql(f"FROM {schemata}").fetchall()] == ["main"]
    with pytest.raises(TableNotFound):
        listing_source("show_tables.ns", _SCHEMAS[1:])
    many = tuple(TableSchema(n, f"t{n}", 1, (Column(1, "a", "bigint"),)) for n in range(3_000))
    found = cursor.sql(f"FROM {listing_source('columns', many).relation_sql}").fetchall()
    assert len(found) == 3_000


def test_D10_a_list_is_kept_for_those_who_see_the_same_tables_only() -> None:
    listings = Listings()
    both = listings.source("tables", _SCHEMAS)
    assert listings.source("tables", _SCHEMAS) is both
    assert listings.source("tables", _SCHEMAS[1:]) == listing_source("tables", _SCHEMAS[1:])
    assert listings.source("columns", _SCHEMAS) == listing_source("columns", _SCHEMAS)
    changed = (_SCHEMAS[0], dataclasses.replace(_SCHEMAS[1], version=2, columns=()))
    assert listings.source("columns", changed) == listing_source("columns", changed)


# --- holds ------------------------------------------------------------------------------------


class _Pins:
    """A row of its own for each hold. `refused`: the snapshots that are gone."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.given: dict[int, tuple[Grant, Hold]] = {}

    async def hold(self, snapshot_id: int, *, onward: bool = False) -> Hold:
        await asyncio.sleep(0)
        if snapshot_id in self.refused:
            raise SnapshotExpired(f"snapshot {snapshot_id} has expired")
        grant = Grant(uuid.UUID(int=snapshot_id), Proposal(snapshot_id), math.inf)
        hold = Hold((snapshot_id, onward), grant, SystemClock())
        self.given[snapshot_id] = (grant, hold)
        return hold


async def test_E3_every_snapshot_of_a_statement_is_held_or_none() -> None:
    pins = _Pins()
    held = await hold_all(pins, (7, 3, 5, 3))
    assert sorted(pins.given) == [3, 5, 7]
    assert all(grant.holds for grant, _ in pins.given.values())
    held.release()
    assert not any(grant.holds for grant, _ in pins.given.values())
    refusing = _Pins(5)
    with pytest.raises(SnapshotExpired):
        await hold_all(refusing, (7, 5, 3))
    assert not any(grant.holds for grant, _ in refusing.given.values())


@pytest.mark.parametrize("broken", [(3,), (7,), (3, 7)])
async def test_E3_a_query_stops_when_one_of_its_holds_breaks(broken: tuple[int, ...]) -> None:
    pins = _Pins()
    held = await hold_all(pins, (7, 3))
    inside, released = asyncio.Event(), []
    held.when_released(lambda: released.append(True))

    async def reads() -> None:
        async with held.guarded():
            inside.set()
            await asyncio.Event().wait()

    reading = asyncio.create_task(reads())
    await inside.wait()
    for snapshot_id in broken:
        pins.given[snapshot_id][1].break_now()
    with pytest.raises(Unavailable):
        await reading
    assert not reading.cancelled()
    with pytest.raises(Unavailable):
        held.check()
    held.release()
    assert released == [True]
