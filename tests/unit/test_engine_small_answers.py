"""The short way of small answers writes what the long way writes, or says that it cannot."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from storage.engine.child_query import execute_small
from storage.engine.child_rows import encode_rows
from storage.engine.child_sandbox import open_database
from storage.engine.child_scopes import _ALIKE_MAX, ScopeCache
from storage.engine.child_small import QUICK_S, SMALL_ROWS, SmallAnswers, encode_small, shape_of
from storage.engine.child_types import json_form
from storage.engine.settings import EngineSettings
from storage.engine.wire import RunRequest, WireSource
from tests.unit.test_engine_json_rows import FORMS, text_of


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    folder: Path = tmp_path_factory.mktemp("engine")
    settings = EngineSettings(allowed_directory=str(folder), temp_directory=str(folder / "spill"))
    connection = open_database(settings, threads=1)
    yield connection
    connection.close()


def _small(cursor: duckdb.DuckDBPyConnection, sql: str, *, integers: str = "string") -> str | None:
    request = RunRequest(1, sql, "", (), "json", integers, 10**9, 10**9, False, "")
    bound = execute_small(cursor, request, None)
    if bound is None:
        return None
    return encode_small(bound.rows, bound.types, integers=integers).decode()


def test_values_are_written_as_the_long_way_writes_them(
    database: duckdb.DuckDBPyConnection,
) -> None:
    cursor = database.cursor()
    short = set()
    for expression, kind, _ in FORMS:
        sql = (
            f"SELECT CASE WHEN range = 1 THEN NULL ELSE {expression} END, {expression} "
            "FROM range(3) ORDER BY range"
        )
        for integers in ("string", "number"):
            found = _small(cursor, sql, integers=integers)
            if found is not None:
                assert found == text_of(cursor, sql, integers=integers)
                short.add((kind, expression))
    taken = {kind for kind, _ in short}
    assert {"bigint", "decimal(4,2)", "double", "varchar", "timestamp", "uuid"} <= taken
    # What Python's values do not tell.
    assert not taken & {"timestamptz", "hugeint", "blob", "integer[]", "interval"}
    for far in ("'infinity'::timestamp", "date '10000-01-01'", "time '24:00:00'"):
        assert far in {expression for expression, _, _ in FORMS}
        assert far not in {expression for _, expression in short}
    assert _small(cursor, "SELECT 1 WHERE false") == "[]"


def test_floating_point_numbers_have_the_digits_of_the_long_way() -> None:
    cursor = duckdb.connect()
    rng = random.Random(5)
    edges = [1e-4, 1e10, math.nextafter(1e-4, 0), math.nextafter(1e10, 0), 0.0, -0.0, 5e-324]
    values = [sign * edge for edge in edges for sign in (1, -1)] + [math.nan, math.inf, -math.inf]
    values += [rng.uniform(-1, 1) * 10.0 ** rng.randint(-12, 14) for _ in range(400)]
    values += [rng.randint(-(10**9), 10**9) / 10 ** rng.randint(0, 9) for _ in range(200)]
    for name, arrow in (("double", pa.float64()), ("float", pa.float32())):
        kind = cursor.sql(f"SELECT 0::{name}").types[0]
        form = json_form(kind, integers="string")
        given = [math.copysign(1, v) if name == "float" and abs(v) > 1e38 else v for v in values]
        batch = pa.record_batch([pa.array(given, arrow)], names=["0"])
        long_way = encode_rows(batch, (form,)).split(b",")
        for value, text in zip(batch.column(0).to_pylist(), long_way, strict=True):
            assert encode_small([(value,)], [kind], integers="string") == b"[" + text + b"]"
    cursor.close()


def test_an_answer_that_is_not_small_goes_the_long_way(
    database: duckdb.DuckDBPyConnection,
) -> None:
    cursor = database.cursor()
    assert _small(cursor, f"SELECT range::integer FROM range({SMALL_ROWS})") is not None
    assert _small(cursor, f"SELECT range::integer FROM range({SMALL_ROWS + 1})") is None
    assert _small(cursor, "SELECT 1") == "[[1]]"


def test_statements_that_differ_in_literals_are_alike() -> None:
    tables = (WireSource("t", ("a",), "one file"),)
    later = (WireSource("t", ("a",), "two files"),)
    first = shape_of("SELECT a FROM t WHERE a > 17.5e3 AND b = 'it''s' AND c1 = 2", tables)
    assert first == shape_of("SELECT a FROM t WHERE a > 4 AND b = '' AND c1 = 0", later)
    assert first != shape_of("SELECT a FROM t WHERE a > 4 AND b = '' AND c2 = 0", later)
    assert first != shape_of("SELECT a FROM t WHERE a > 4 AND b = '' AND c1 = 0", ())
    assert shape_of("SELECT '" + "x" * 10_000 + "'", ()) is None
    assert shape_of("SELECT '''" + "''" * 4_000, ()) is not None  # in no time


def test_who_has_disappointed_is_not_tried_again() -> None:
    kinds = tuple(duckdb.sqltype(name) for name in ("bigint", "timestamp"))
    wide = (duckdb.sqltype("hugeint"),)
    known = SmallAnswers(entries_max=2)
    one, two, three = (shape_of(f"SELECT {name}", ()) for name in ("a", "b", "c"))
    for rows, types, took_s in (
        (SMALL_ROWS + 1, kinds, 0.0),
        (1, wide, 0.0),
        (1, kinds, QUICK_S * 2),
    ):
        slow = SmallAnswers(entries_max=2)
        slow.learn(one, types, rows, took_s)
        assert not slow.expects(one)
    known.learn(one, kinds, SMALL_ROWS, 0.0)
    assert known.expects(one)
    known.disappointed(one)
    known.learn(one, kinds, 1, 0.0)
    assert not known.expects(one)
    known.learn(two, kinds, 1, 0.0)
    known.learn(three, kinds, 1, 0.0)
    known.learn(one, kinds, 1, 0.0)  # forgotten meanwhile
    assert [known.expects(shape) for shape in (one, two, three)] == [True, False, True]
    known.learn(None, kinds, 1, 0.0)
    assert not known.expects(None)


def test_D1_a_scope_that_is_taken_over_shows_its_new_tables_only(
    database: duckdb.DuckDBPyConnection,
) -> None:
    scopes = ScopeCache(database, entries_max=64)
    lane = database.cursor()

    def sources(number: int) -> tuple[WireSource, ...]:
        return (
            WireSource("n.t", ("a",), f"(SELECT {number} AS a, 0 AS b)"),
            WireSource("t", ("a",), f"(SELECT {-number} AS a, 0 AS b)"),
        )

    def read(number: int) -> str:
        with scopes.use(sources(number)) as opened:
            lane.execute(f"SET search_path = '{opened.path}'")
            found = lane.execute("SELECT x.a, y.a FROM n.t AS x, t AS y").fetchall()
            assert found == [(number, -number)]
            return opened.catalog

    rounds = [[read(number) for number in range(3 * _ALIKE_MAX)] for _ in range(2)]
    assert len({catalog for catalogs in rounds for catalog in catalogs}) == _ALIKE_MAX
    with scopes.use(sources(1)) as busy:
        others = {read(number) for number in range(3 * _ALIKE_MAX)}
        assert read(1) == busy.catalog
        assert others - {busy.catalog} < set(rounds[0])
    other = (WireSource("u", ("a",), "(SELECT 7 AS a)"),)
    with scopes.use(other) as opened:
        lane.execute(f"SET search_path = '{opened.path}'")
        with pytest.raises(duckdb.CatalogException):
            lane.execute("SELECT * FROM t")
