"""The cage: SQL reaches the caller's tables and nothing else, whatever it tries (contract D10)."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pytest

from lakebus.errors import LakebusError
from storage.engine.child_faults import Refusal
from storage.engine.child_functions import read_rules
from storage.engine.child_guard import Guard, GuardedStatement
from storage.engine.child_sandbox import open_database
from storage.engine.settings import EngineSettings
from storage.reading.travel import choice_of
from tests.unit.cage_attempts import ABSENT, FILES, HARMLESS, REFUSED, STATEMENTS

#: The tables that the caller of this test has.
_MINE = {"t", "u"}
#: What reaches out of the process, or undoes a lock.
_REACHING_OUT = (
    "COPY", "EXPORT", "IMPORT", "INSTALL", "FORCE INSTALL", "LOAD '", "SET GLOBAL", "SET memory",
    "SET enable", "RESET memory", "PRAGMA threads", "ATTACH 'x", "ATTACH '/", "ATTACH 'h",
    "CREATE PERSISTENT",
)  # fmt: skip


@pytest.fixture(scope="module")
def cage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    folder = tmp_path_factory.mktemp("cage")
    (folder / "data").mkdir()
    settings = EngineSettings(
        allowed_directory=str(folder / "data"), temp_directory=str(folder / "spill")
    )
    connection = open_database(settings, threads=1)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def guard(cage: duckdb.DuckDBPyConnection) -> Guard:
    return Guard(cage.cursor(), read_rules(cage), sql_bytes_max=128 << 10, cache_entries=8)


def outcome(guard: Guard, sql: str) -> tuple[str, str]:
    """(code, sentence) of the answer that the statement gets, or ("passes", "")."""

    try:
        statement = guard.check(sql)
        for at, _, _ in statement.travels:
            choice_of(at, {"v": 1})
    except Refusal as refusal:
        return refusal.failure.code, refusal.failure.detail
    except LakebusError as error:
        return error.code, error.detail
    missing = sorted(_names(statement) - _MINE)
    return ("table_not_found", missing[0]) if missing else ("passes", "")


def _names(statement: GuardedStatement) -> set[str]:
    lists = set(statement.listings)
    return {name for _, name in statement.references() if name not in lists}


@pytest.mark.parametrize("group", REFUSED)
def test_D10_every_attempt_has_its_typed_end_and_tells_nothing(guard: Guard, group: str) -> None:
    code, statements = REFUSED[group]
    for sql in statements:
        got, sentence = outcome(guard, sql)
        assert got == code, f"{sql}: {got}"
        assert not any(ours in sentence for ours in ("allowed_dir", "spill", "/tmp", "$s7")), sql


def test_D10_tables_of_others_are_absent_in_every_spelling(guard: Guard) -> None:
    for sql in ABSENT:
        code, name = outcome(guard, sql)
        assert (code, name.rpartition(".")[2]) == ("table_not_found", "secret"), sql


def test_D10_what_only_looks_like_an_escape_is_answered(guard: Guard) -> None:
    for sql, tables in HARMLESS:
        assert outcome(guard, sql) == ("passes", ""), sql
        assert guard.check(sql).tables == tables, sql


def test_D10_attempts_are_many_and_no_two_are_the_same() -> None:
    every = [sql for _, statements in REFUSED.values() for sql in statements]
    every += [*ABSENT, *(sql for sql, _ in HARMLESS)]
    assert len(set(every)) == len(every) > 400


def test_D10_the_locked_database_refuses_files_also_without_the_guard(
    cage: duckdb.DuckDBPyConnection,
) -> None:
    """The third wall alone: what a guard that let everything through would still not give away."""

    cursor = cage.cursor()
    reading = [sql for sql in FILES if "WITH" not in sql and not sql.startswith("EXPLAIN")]
    changing = [sql for sql in STATEMENTS if sql.startswith(_REACHING_OUT)]
    assert len(reading) > 40
    assert len(changing) > 12
    for sql in reading + changing:
        with pytest.raises(duckdb.Error):
            cursor.execute(sql).fetchall()


def test_D8_what_the_session_says_of_itself_is_the_same_for_everybody(
    cage: duckdb.DuckDBPyConnection,
) -> None:
    cursor = cage.cursor()
    for number in (3, 4):
        cursor.execute(f"ATTACH ':memory:' AS \"$s{number}\"")
        cursor.execute(f'SET search_path = \'"$s{number}".main,"$fixed".main\'')
        said = cursor.execute(
            "SELECT current_catalog, current_schema, current_user, user"
        ).fetchall()
        assert said == [("lakebus", "main", "lakebus", "lakebus")]


def test_D10_catalogs_of_the_engine_cannot_be_guessed(guard: Guard) -> None:
    for sql in ('SELECT "$s1".main.t.a FROM t', 'SELECT "$S12r0".main.t.a FROM t'):
        assert outcome(guard, sql)[0] == "sql_error"
    assert outcome(guard, "SELECT t.a, main.t.a FROM t") == ("passes", "")
