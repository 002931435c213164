"""What a stranger's statement may be: the guard on the parse tree (contract D10)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.engine.caches import BoundedCache
from storage.engine.child_faults import Refusal
from storage.engine.child_functions import read_rules
from storage.engine.child_guard import Guard
from storage.engine.child_sandbox import open_database
from storage.engine.settings import EngineSettings

#: Count and digest of the allowed function names of DuckDB 2.0.0, looked through by a person.
REVIEWED = (632, "84df60da87dd0ab1")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    folder = tmp_path_factory.mktemp("engine")
    settings = EngineSettings(
        allowed_directory=str(folder), temp_directory=str(folder / "spill"), sql_bytes_max=65536
    )
    connection = open_database(settings, threads=1)
    yield Guard(connection.cursor(), read_rules(connection), sql_bytes_max=65536, cache_entries=8)
    connection.close()


ESCAPES = [
    # files
    "SELECT * FROM '/etc/passwd'",
    "FROM 'data.parquet'",
    'SELECT * FROM "data.csv"',
    "SELECT * FROM 'file:///etc/passwd'",
    "SELECT * FROM 's3://bucket/key.parquet'",
    "SELECT * FROM 'https://example.com/x.csv'",
    "SELECT * FROM read_parquet('/data/*.parquet')",
    "SELECT * FROM parquet_scan(['a.parquet'])",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_csv_auto('/etc/passwd')",
    "SELECT * FROM read_json('/etc/passwd')",
    "SELECT * FROM read_json_objects('/etc/passwd')",
    "SELECT * FROM read_ndjson('x')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT content FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_duckdb('x.db')",
    "SELECT * FROM glob('/**')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM parquet_metadata('x.parquet')",
    "SELECT * FROM parquet_kv_metadata('x.parquet')",
    "SELECT * FROM parquet_schema('x.parquet')",
    "SELECT * FROM t, LATERAL (SELECT * FROM read_text(t.path))",
    "SELECT (SELECT count(*) FROM read_text('/etc/passwd'))",
    "SELECT * FROM t WHERE a IN (SELECT content FROM read_text('/etc/passwd'))",
    "WITH x AS (SELECT * FROM read_text('/etc/passwd')) SELECT * FROM x",
    "WITH RECURSIVE x AS (SELECT 1 UNION ALL SELECT 1 FROM read_text('y')) SELECT * FROM x",
    "SELECT 1 UNION ALL SELECT content FROM read_text('/etc/passwd')",
    "SELECT list_transform([1], x -> (SELECT count(*) FROM read_text('/etc/passwd')))",
    "SELECT 1 ORDER BY (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT 1 LIMIT (SELECT count(*) FROM read_text('/etc/passwd'))",
    "SELECT sum(a) FILTER (WHERE EXISTS (FROM read_text('x'))) FROM t",
    "SELECT sum(a) OVER (ORDER BY (SELECT content FROM read_text('x'))) FROM t",
    "SELECT * FROM t JOIN u ON (SELECT true FROM read_text('x'))",
    "SELECT CASE WHEN true THEN (SELECT content FROM read_text('x')) END",
    "SELECT * FROM range((SELECT count(*) FROM read_text('x')))",
    "VALUES ((SELECT content FROM read_text('x')))",
    "DESCRIBE SELECT * FROM read_text('/etc/passwd')",
    "SUMMARIZE FROM read_csv('/etc/passwd')",
    "EXPLAIN SELECT * FROM read_text('/etc/passwd')",
    "EXPLAIN ANALYZE SELECT 1",
    "EXPLAIN (ANALYZE) SELECT 1",
    "EXPLAIN (FORMAT json) SELECT 1",
    # settings, catalog, session
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_external_file_cache()",
    "SELECT * FROM pragma_database_list()",
    "SELECT * FROM pg_catalog.pg_class",
    "SELECT * FROM main.t",
    "SELECT * FROM system.main.duckdb_views",
    'SELECT * FROM "$s1".main.t',
    'SELECT * FROM "$s1".t',
    'SELECT "$fixed".main.now()',
    "SELECT current_setting('allowed_directories')",
    "SELECT getvariable('$now')",
    "SELECT current_database()",
    "SELECT current_schemas(true)",
    "SELECT current_query()",
    "SELECT txid_current()",
    "SELECT nextval('s')",
    "SELECT setseed(0.5)",
    "SELECT system.main.now()",
    "SELECT pg_catalog.now()",
    "SELECT main.now()",
    "SELECT pg_sleep(10)",
    "SELECT sleep_ms(1000)",
    "SELECT has_table_privilege('t', 'select')",
    "SELECT write_log('x')",
    # statements and names as values
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('t')",
    "SELECT * FROM json_execute_serialized_sql('{}')",
    "SELECT json_serialize_sql('select 1')",
    "SELECT json_serialize_plan('select 1')",
    "SELECT json_deserialize_sql('{}')",
    "SELECT * FROM histogram('t', 'a')",
    "SELECT * FROM enable_logging(storage='file')",
    "SELECT * FROM which_secret('x', 'y')",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM seq_scan('t')",
    "SELECT * FROM checkpoint()",
    # other statements
    "COPY (SELECT 1) TO '/tmp/x.csv'",
    "COPY t FROM '/etc/passwd'",
    "ATTACH '/tmp/x.db'",
    "ATTACH ':memory:' AS other",
    "DETACH memory",
    "USE memory",
    "CREATE TABLE t (a int)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE VIEW v AS SELECT 1",
    "CREATE MACRO f(a) AS a",
    "CREATE FUNCTION now() AS 1",
    "CREATE SECRET s (TYPE s3)",
    "CREATE SEQUENCE s",
    "DROP VIEW t",
    "ALTER TABLE t ADD COLUMN a int",
    "INSERT INTO t VALUES (1)",
    "UPDATE t SET a = 1",
    "DELETE FROM t",
    "TRUNCATE t",
    "MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE",
    "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
    "SET threads = 1",
    "SET VARIABLE a = 1",
    "RESET threads",
    "PRAGMA database_list",
    "PRAGMA version",
    "CALL pragma_version()",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '/tmp/x.so'",
    "EXPORT DATABASE '/tmp/x'",
    "IMPORT DATABASE '/tmp/x'",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "BEGIN",
    "COMMIT",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DEALLOCATE p",
    "SELECT * FROM (SHOW TABLES)",
    "SHOW DATABASES",
    "EXPLAIN CREATE TABLE t (a int)",
    "EXPLAIN COPY (SELECT 1) TO '/tmp/x'",
    "PIVOT t ON a USING sum(b)",
    # several, hidden, empty
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE t",
    "SELECT 1;;COPY (SELECT 1) TO 'x'",
    "/* SELECT */ COPY (SELECT 1) TO 'x' -- ok",
    "EXPLAIN SELECT 1; COPY (SELECT 1) TO 'x'",
    "",
    " ; ",
    "-- nothing",
    "SELECT 1\0",
    "SELECT * FROM t AT (TIMESTAMP => now())",
    "WITH duckdb_views AS (SELECT 1) SELECT * FROM duckdb_views",
    "SELECT nosuchfunction(1)",
    "SELECT * FROM a.b.c",
    "SELECT * FROM a.b.c.d",
    'SELECT * FROM ""',
    'SELECT * FROM "t;x"',
    'SELECT * FROM "tä"',
]


@pytest.mark.parametrize("sql", ESCAPES)
def test_D10_escape_is_refused(guard: Guard, sql: str) -> None:
    with pytest.raises(Refusal) as caught:
        guard.check(sql)
    assert caught.value.failure.code in ("sql_error", "statement_not_allowed")


ALLOWED = [
    ("SELECT 1", ()),
    ("FROM t", ("t",)),
    ("VALUES (1), (2)", ()),
    ("SELECT * FROM T, Ns.U, t AS again", ("t", "ns.u")),
    ("SELECT ns.u.a FROM ns.u", ("ns.u",)),
    ('SELECT * FROM "t"', ("t",)),
    ("SELECT 1;", ()),
    ("/* c */ SELECT 1 -- c", ()),
    ("SELECT a FROM t WHERE a IN (SELECT b FROM u) AND EXISTS (FROM v)", ("t", "u", "v")),
    ("SELECT (SELECT max(a) FROM u) FROM t UNION ALL SELECT 1 FROM v", ("u", "t", "v")),
    ("WITH c AS (SELECT * FROM t) SELECT * FROM c", ("t",)),
    ("WITH c AS (SELECT 1), d AS (FROM c, t) SELECT * FROM d JOIN c ON true", ("t",)),
    ("WITH t AS (SELECT * FROM t) SELECT * FROM t", ("t",)),
    ("WITH c AS (SELECT 1) SELECT * FROM C, ns.c", ("ns.c",)),
    ("SELECT * FROM (WITH c AS (SELECT 1) FROM c) x, c", ("c",)),
    ("WITH RECURSIVE c AS (SELECT 1 a UNION ALL SELECT a FROM c, t) FROM c", ("t",)),
    ('WITH "\u212a" AS (SELECT 1) SELECT * FROM k', ("k",)),
    ("DESCRIBE t", ()),
    ("SUMMARIZE ns.t", ("ns.t",)),
    ("EXPLAIN SELECT * FROM t", ("t",)),
    ("SELECT * FROM range(3), generate_series(1, 2), unnest([1])", ()),
    ("SELECT * FROM t PIVOT (sum(b) FOR a IN (1, 2))", ("t",)),
    ("SELECT list_transform([1], x -> x + 1), [y FOR y IN [1]], name.upper() FROM t", ("t",)),
    ("SELECT sum(a) OVER (PARTITION BY b ORDER BY c) FROM t QUALIFY row_number() OVER () = 1",
     ("t",)),
    ("SELECT * FROM t ASOF JOIN u ON t.a >= u.a", ("t", "u")),
    ("SELECT COLUMNS('a.*') FROM t TABLESAMPLE 10%", ("t",)),
    ("SELECT a FROM t ORDER BY ALL LIMIT 3 OFFSET 1", ("t",)),
    ("SELECT count(*) FILTER (a > 1), grouping(b) FROM t GROUP BY ROLLUP (b)", ("t",)),
    ("SELECT now(), current_timestamp, age(a), pg_typeof(a) FROM t", ("t",)),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "tables"), ALLOWED)
def test_D10_allowed_statement_names_exactly_its_base_tables(
    guard: Guard, sql: str, tables: tuple[str, ...]
) -> None:
    assert sorted(guard.check(sql).tables) == sorted(tables)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT 1", "select"),
        ("DESCRIBE t", "describe"),
        ("SUMMARIZE t", "summarize"),
        ("explain  SELECT 1", "explain"),
        ("SELECT * FROM (DESCRIBE t) JOIN u ON true", "select"),
    ],
)
def test_kind_of_statement(guard: Guard, sql: str, kind: str) -> None:
    assert guard.check(sql).kind == kind


def test_parameters_are_listed_in_the_order_of_their_numbers(guard: Guard) -> None:
    assert guard.check("SELECT $2, $1, $2").parameters == ("1", "2")
    assert guard.check("SELECT ?, ?").positional
    named = guard.check("SELECT $b, $a FROM t LIMIT $n")
    assert set(named.parameters) == {"a", "b", "n"}
    assert not named.positional


@pytest.mark.parametrize(
    ("sql", "reads"),
    [
        ("SELECT now()", True),
        ("SELECT CURRENT_DATE", True),
        ("SELECT localtime FROM t", True),
        ("SELECT a + 1 FROM t", False),
    ],
)
def test_D8_reading_the_clock_is_noticed(guard: Guard, sql: str, reads: bool) -> None:
    assert guard.check(sql).reads_clock is reads


@pytest.mark.parametrize(
    ("sql", "position"),
    [
        ("SELECT 1 +", 9),
        ("SELECT 'ü', nosuch(1)", 12),
        ("EXPLAIN SELECT nosuch(1)", 15),
        ("SELEC 1", 0),
    ],
)
def test_positions_count_characters(guard: Guard, sql: str, position: int) -> None:
    with pytest.raises(Refusal) as caught:
        guard.check(sql)
    assert caught.value.failure.members["position"] == position


def test_long_statement_is_refused_before_parsing(guard: Guard) -> None:
    with pytest.raises(Refusal, match="longer than 65536 bytes"):
        guard.check("SELECT '" + "x" * 70_000 + "'")


def test_deep_statement_is_guarded_but_its_tree_is_not_handed_on(guard: Guard) -> None:
    deep = guard.check("SELECT " + "+".join(["a"] * 300) + " FROM t")
    assert deep.tables == ("t",)
    assert deep.tree == b"{}"
    inside = "SELECT " + "+".join(["1"] * 300) + " + (SELECT count(*) FROM read_text('x'))"
    with pytest.raises(Refusal, match="cannot be read as a table"):
        guard.check(inside)


def test_cache_gives_the_same_answer_and_stays_bounded(guard: Guard) -> None:
    first = guard.check("SELECT a FROM t")
    assert guard.check("SELECT a FROM t") is first
    for n in range(20):
        guard.check(f"SELECT {n}")
    assert guard.check("SELECT a FROM t") is not first


def test_D10_allowed_functions_are_the_reviewed_list(tmp_path: Path) -> None:
    """A new DuckDB may bring functions; someone must look at them before they are allowed."""

    settings = EngineSettings(
        allowed_directory=str(tmp_path), temp_directory=str(tmp_path / "spill")
    )
    rules = read_rules(open_database(settings, threads=1))
    refused = sorted(rules.known - rules.allowed)
    digest = hashlib.sha256("\n".join(sorted(rules.allowed)).encode()).hexdigest()
    assert (len(rules.allowed), digest[:16]) == REVIEWED, (
        f"review the difference; refused: {refused}"
    )


def test_cache_is_bounded_in_bytes_too() -> None:
    cache: BoundedCache[int] = BoundedCache(entries_max=100, bytes_max=80)
    for n in range(20):
        cache.put(f"k{n}", n, 10)
    assert len(cache) == 8
    assert cache.get("k11") is None
    assert cache.get("k12") == 12
    cache.put("k19", 0, 5)
    cache.put("large", 1, 11)
    assert cache.get("large") is None
    assert cache.get("k19") == 0
