"""What a delete's predicate may be, judged in the real cage (E7, D10)."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from lakebus.errors import LakebusError, SqlError, StatementNotAllowed
from lakebus.schemas import Column, TableSchema
from storage.engine.child_functions import read_rules
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.reading.predicates import (
    VOLATILE_FUNCTIONS,
    PredicateChecker,
    PredicateRequest,
    read_predicate,
)

SCHEMA = TableSchema(
    1,
    "shop.orders",
    1,
    (Column(1, "id", "bigint"), Column(2, "note", "varchar"), Column(3, "paid", "boolean")),
)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

#: Each tries to leave its place, to read something else, or to be another thing each time.
HOSTILE = (
    "",
    " ",
    "-- nothing",
    "/* nothing",
    "true /* unended",
    "id = 1) OR (true",
    "id = 1) OR (id = 2) OR (true",
    "true) -- ",
    "true) /*",
    "true)) OR ((true",
    "id = 1); DROP TABLE orders; SELECT (1",
    "id = 1; SELECT 1",
    "id = 1) UNION SELECT 1 WHERE (true",
    "id = 1) UNION ALL SELECT id FROM shop.orders WHERE (true",
    "id = 1) EXCEPT SELECT 1 WHERE (true",
    "id = 1) GROUP BY (id",
    "id = 1) ORDER BY (id",
    "id = 1) LIMIT (1",
    "id = 1) HAVING (true",
    "id = 1) QUALIFY (true",
    "id = 1) WINDOW w AS (ORDER BY id",
    "id = 1) USING SAMPLE (10",
    "true, false) OR (true",
    "id, true",
    "coalesce(id = 1, false) = true) AND (true",
    "id IN (SELECT id FROM shop.orders)",
    "EXISTS (SELECT 1)",
    "id = (SELECT max(id) FROM shop.orders)",
    "id = (FROM other SELECT id)",
    "id = ANY (SELECT 1)",
    "(WITH x AS (SELECT 1) SELECT true FROM x)",
    "id = (VALUES (1))",
    "row_number() OVER () = 1",
    "count(*) > 1",
    "max(id) = id",
    "COLUMNS(*) IS NULL",
    "* IS NULL",
    "#1 = 1",
    "id = random()",
    "note = uuid()::varchar",
    "note = CAST(gen_random_uuid() AS varchar)",
    "note = uuidv7()::varchar",
    "random() < 0.5 AND paid",
    "note = getenv('PATH')",
    "note = current_setting('memory_limit')",
    "note = read_text('/etc/passwd')",
    "note = current_user",
    "id = nextval('s')",
    "unnest([true, false])",
    '"$position" < 3',
    '"$shard" = 0',
    'orders."$row" = 0',
    "other.id = 1",
    "missing = 1",
    "id",
    "note",
    "1",
    "NULL",
    "'true'",
    "id = $1",
    "id = ?",
    "id =",
    "id = 1\0",
    "pg_catalog.now() > now()",
    "system.main.random() > 0",
    "sum(id) FILTER (WHERE paid) > 1",
    "id = 1 AND " * 3 + "id = 1 LIMIT 1",
    "(" * 500 + "true" + ")" * 500 + " OR " + "NOT " * 2000 + "true",
)

SOUND: tuple[tuple[str, Any], ...] = (
    ("true", None),
    ("id = 1", None),
    ("orders.id = 1 AND shop.orders.note IS NULL", None),
    ('"id" = 1 -- a comment', None),
    ("id = 1 /* one */ OR note LIKE '%)%'", None),
    ("(id = 1) OR (id = 2)", None),
    ("ID IN (1, 2, 3)", None),
    ("id = ? AND note = ?", [1, "a"]),
    ("id = $id", {"id": 3}),
    ("paid", None),
    ("NOT coalesce(paid, false)", None),
    ("coalesce(paid, false)", None),
    ("CASE WHEN paid THEN id > 3 ELSE note = 'x' END", None),
    ("now() > TIMESTAMPTZ '2020-01-01' AND id % 2 = 0", None),
    ("note = ';' OR note = '--' OR note = '/*'", None),
    ("list_contains([1, 2], id)", None),
    ("len(list_filter([1, 2], lambda x: x = id)) > 0", None),
    ("id BETWEEN 1 AND 2", None),
)  # fmt: skip


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[QueryEngine]:
    (tmp_path / "objects").mkdir()
    made = QueryEngine(
        EngineSettings(
            allowed_directory=str(tmp_path / "objects"),
            temp_directory=str(tmp_path / "temporary"),
            spare=False,
            threads=1,
        )
    )
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def _refusal(engine: QueryEngine, where: str) -> LakebusError | None:
    try:
        await PredicateChecker(engine).check(PredicateRequest(SCHEMA, where, None, NOW, 10_000))
    except LakebusError as error:
        return error
    return None


async def test_E7_a_predicate_that_is_no_plain_condition_is_refused(engine: QueryEngine) -> None:
    for where in HOSTILE:
        error = await _refusal(engine, where)
        assert isinstance(error, SqlError | StatementNotAllowed), (where[:80], error)
        assert error.detail.strip(), where[:80]
        position = error.members.get("position")
        assert position is None or 0 <= position <= len(where), where[:80]


async def test_E7_a_predicate_is_taken_as_it_stands(engine: QueryEngine) -> None:
    for where, parameters in SOUND:
        await PredicateChecker(engine).check(
            PredicateRequest(SCHEMA, where, parameters, NOW, 10_000)
        )
    read = await read_predicate(engine, SCHEMA, "ID = 1 AND orders.note = 'Paid'")
    assert read.names == {"id", "orders", "note"}


async def test_E7_an_error_says_where_in_the_predicate_it_is(engine: QueryEngine) -> None:
    for where in ("id = 1 AND AND paid", "id = 1 AND missing = 2"):
        error = await _refusal(engine, where)
        assert isinstance(error, SqlError)
        assert where[error.members["position"] :].startswith(("AND paid", "missing"))


def test_E7_every_function_that_answers_differently_each_time_is_known() -> None:
    connection = duckdb.connect()
    allowed = read_rules(connection).allowed
    found = connection.execute(
        "SELECT DISTINCT lower(function_name) FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    ).fetchall()
    connection.close()
    assert {name for (name,) in found} & allowed <= VOLATILE_FUNCTIONS | {"error"}
