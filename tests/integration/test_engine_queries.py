"""Queries through the engine's child process: sources, parameters, forms, limits, errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import pytest_asyncio

from lakebus import errors
from storage.engine.engine import QueryEngine
from storage.engine.plans import SourceTable
from tests.integration.engine_rig import STARTED_AT, plan, rows, settings, until, write_table

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[QueryEngine]:
    started = QueryEngine(settings(folder, spare=False, scope_cache_entries=4))
    await started.start()
    yield started
    await started.stop()


@pytest.fixture(scope="module")
def table(folder: Path, engine: QueryEngine) -> SourceTable:
    return write_table(folder, "table", 0, 50_000)


# --- sources ---------------------------------------------------------------------------------


async def test_D1_concurrent_queries_see_their_own_snapshot_under_one_name(
    engine: QueryEngine, folder: Path, table: SourceTable
) -> None:
    snapshots = [write_table(folder, f"snapshot{n}", n, 10 + n) for n in range(6)]

    async def ask(n: int) -> None:
        chosen = snapshots[n % 6]
        sql = "SELECT count(*), min(id) FROM t JOIN ns.t AS other USING (id)"
        answer = await rows(engine, sql, {"t": chosen, "ns.t": chosen})
        assert answer == [[str(10 + n % 6), str(n % 6)]]

    await asyncio.gather(*(ask(n) for n in range(48)))


async def test_namespaced_names_and_columns_qualified_by_them(
    engine: QueryEngine, table: SourceTable
) -> None:
    sql = 'SELECT ns.t.id, t.name, "T".half FROM NS.t WHERE ns.t.id = 7'
    assert await rows(engine, sql, {"ns.t": table}) == [["7", "n7", 3.5]]


async def test_D10_only_the_columns_of_the_source_are_visible(
    engine: QueryEngine, table: SourceTable
) -> None:
    described = await rows(engine, "DESCRIBE FROM t", {"t": table})
    assert [row[0] for row in described] == ["id", "half", "name"]
    with pytest.raises(errors.SqlError):
        await rows(engine, 'SELECT "$shard" FROM t', {"t": table})
    narrow = replace(table, columns=table.columns[:1])
    assert await rows(engine, "SELECT * FROM t LIMIT 1", {"t": narrow}) == [["0"]]


async def test_D10_table_of_an_earlier_query_is_not_there(
    engine: QueryEngine, table: SourceTable
) -> None:
    await rows(engine, "SELECT count(*) FROM secret", {"secret": table})
    for sql in ("SELECT * FROM secret", "SELECT * FROM t, secret"):
        with pytest.raises(errors.TableNotFound):
            await rows(engine, sql, {"t": table})
    with pytest.raises(errors.FixRequest) as caught:
        await rows(engine, "WITH a AS (SELECT 1) SELECT secret.id FROM a", {"t": table})
    assert "did you mean" not in str(caught.value).lower()


async def test_D10_execute_guards_even_what_was_never_parsed(engine: QueryEngine) -> None:
    for sql in ("SELECT * FROM read_text('/etc/passwd')", "COPY (SELECT 1) TO '/tmp/x'"):
        with pytest.raises(errors.StatementNotAllowed):
            await engine.execute(plan(sql))


async def test_missing_file_is_unavailable_and_names_no_path(
    engine: QueryEngine, folder: Path, table: SourceTable
) -> None:
    gone = replace(table, relation_sql=f"read_parquet(['{folder}/data/gone.parquet'])")
    outside = replace(table, relation_sql="read_parquet(['/etc/hostname'])")
    for source in (gone, outside):
        with pytest.raises(errors.Unavailable) as caught:
            await rows(engine, "SELECT * FROM t", {"t": source})
        assert "/" not in str(caught.value)


async def test_E6_a_file_that_is_gone_or_damaged_is_never_an_answer(
    engine: QueryEngine, folder: Path
) -> None:
    """Also after the same query was answered, from what the engine may have kept of it."""

    for name, count in (("gone", 0), ("empty", 0), ("cut", 400), ("beginning", 0), ("footer", 0)):
        source = write_table(folder, f"damaged_{name}", 0, 50_000)
        path = folder / "data" / f"damaged_{name}.parquet"
        whole = path.read_bytes()
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        assert (await rows(engine, "SELECT count(*) FROM t", {"t": source})) == [["50000"]]
        damaged = {
            "gone": None,
            "empty": b"",
            "cut": whole[:count],
            "beginning": b"x" * 20_000 + whole[20_000:],
            "footer": whole[:footer] + b"x" * 50 + whole[footer + 50 :],
        }[name]
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
            # A footer that the engine kept is used while the file's time, in seconds, is the same:
            # that would be a right answer, from a file whose rows are whole.
            os.utime(path, (0, 0))
        with pytest.raises(errors.Unavailable, match="lakebus maintain validate") as caught:
            await rows(engine, "SELECT sum(id), max(name) FROM t", {"t": source})
        assert "/" not in str(caught.value)


async def test_D10_explain_names_no_path(engine: QueryEngine, table: SourceTable) -> None:
    plan_text = (await rows(engine, "EXPLAIN SELECT * FROM t WHERE id > 3", {"t": table}))[0][1]
    assert "Filters" in plan_text
    assert "/" not in plan_text
    assert ".parquet" not in plan_text


async def test_summarize_and_describe_of_a_select(engine: QueryEngine, table: SourceTable) -> None:
    assert len(await rows(engine, "SUMMARIZE t", {"t": table})) == 3
    assert (await rows(engine, "DESCRIBE SELECT id AS x FROM t", {"t": table}))[0][:2] == [
        "x",
        "BIGINT",
    ]


# --- parsing ---------------------------------------------------------------------------------


async def test_parse_names_tables_parameters_and_tree(engine: QueryEngine) -> None:
    parsed = await engine.parse("SELECT a FROM Ns.T WHERE b = $x AND c < $y")
    assert parsed.tables == ("ns.t",)
    assert set(parsed.parameters) == {"x", "y"}
    assert parsed.tree["statements"][0]["node"]["type"] == "SELECT_NODE"
    assert await engine.parse("SELECT a FROM Ns.T WHERE b = $x AND c < $y") is parsed


async def test_parse_error_has_a_position(engine: QueryEngine) -> None:
    with pytest.raises(errors.SqlError) as caught:
        await engine.parse("SELECT 1 +")
    assert caught.value.members["position"] == 9


async def test_parse_survives_askers_that_leave(engine: QueryEngine) -> None:
    async def leave(n: int) -> None:
        task = asyncio.create_task(engine.parse(f"SELECT {n} FROM t{n}"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(leave(n) for n in range(20)))
    answers = await asyncio.gather(*(engine.parse(f"FROM u{n}") for n in range(20)))
    assert [a.tables for a in answers] == [(f"u{n}",) for n in range(20)]


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "parameters", "answer"),
    [
        ("SELECT ?::integer + ?::integer", [1, 2], [[3]]),
        ("SELECT $2 || $1", ["b", "a"], [["ab"]]),
        ("SELECT $a, $b", {"a": "'; DROP TABLE t; --", "b": None}, [["'; DROP TABLE t; --", None]]),
        ("SELECT $x", [True], None),
        ("SELECT ?", [True], [[True]]),
        ("SELECT ?", [1.5], [[1.5]]),
        ("SELECT ?", [1 << 40], [[str(1 << 40)]]),
        ("SELECT ?", [1 << 100], [[str(1 << 100)]]),
        ("SELECT count(*) FROM range(?)", [5], [["5"]]),
        ("SELECT timestamptz '2024-01-01' > ?::timestamptz", ["2023-01-01"], [[True]]),
        ("SELECT 1 LIMIT $n", {"n": 0}, []),
        ("SELECT ? = ?", ["x"], None),
        ("SELECT ?", ["x", "y"], None),
        ("SELECT $2", ["x", "y"], None),
        ("SELECT $a", {}, None),
        ("SELECT $a", {"a": 1, "b": 2}, None),
        ("SELECT $a", None, None),
        ("SELECT ?", {"a": 1}, None),
        ("SELECT 1", [1], None),
        ("SELECT 1", [], [[1]]),
    ],
)
async def test_parameters_are_bound_or_named(
    engine: QueryEngine, sql: str, parameters: Any, answer: Any
) -> None:
    if answer is None:
        with pytest.raises(errors.SqlError, match=r"parameter|uses"):
            await rows(engine, sql, parameters=parameters)
    else:
        assert await rows(engine, sql, parameters=parameters) == answer


async def test_parameters_are_scalars(engine: QueryEngine) -> None:
    for value in ([1], {"a": 1}, 1 << 130):
        with pytest.raises(errors.MalformedRequest):
            await engine.execute(plan("SELECT ?", parameters=[value]))


# --- clock, order, session -------------------------------------------------------------------


async def test_D8_every_spelling_of_now_is_the_start_of_the_query(engine: QueryEngine) -> None:
    zoned = "now(), current_timestamp, get_current_timestamp(), transaction_timestamp()"
    answer = await rows(engine, f"SELECT {zoned}")
    assert set(answer[0]) == {"2020-02-03T04:05:06.000007Z"}
    local = "localtimestamp, current_localtimestamp(), localtime, current_time, current_date"
    assert await rows(engine, f"SELECT {local}, today()") == [
        ["2020-02-03T04:05:06.000007"] * 2 + ["04:05:06.000007"] * 2 + ["2020-02-03"] * 2
    ]
    later = plan("SELECT now(), ago(INTERVAL 1 DAY), age(DATE '2020-02-01')")
    later = replace(later, started_at=STARTED_AT.replace(day=5))
    async with await engine.execute(later) as stream:
        text = (await stream.read_all()).decode()
    assert text == ('[["2020-02-05T04:05:06.000007Z","2020-02-04T04:05:06.000007Z","4 days"]]')


async def test_D8_session_is_pinned(engine: QueryEngine) -> None:
    answer = await rows(
        engine,
        "SELECT a, (timestamptz '2024-07-01 00:00:00+00')::varchar FROM "
        "(VALUES ('b'), (NULL), ('A'), ('a')) v(a) ORDER BY a",
    )
    assert [row[0] for row in answer] == ["A", "a", "b", None]
    assert answer[0][1] == "2024-07-01 00:00:00+00"


async def test_D8_deterministic_keeps_source_order_and_sums(
    engine: QueryEngine, table: SourceTable
) -> None:
    ordered = replace(table, relation_sql=f"(SELECT * FROM {table.relation_sql} ORDER BY id DESC)")
    sql = "SELECT list(id)[1:2], first(id), sum(half / 3) FROM t"
    answers = [await rows(engine, sql, {"t": ordered}, deterministic=True) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0][:2] == [["49999", "49998"], "49999"]


# --- formats and limits ----------------------------------------------------------------------


async def test_arrow_stream_is_complete_and_typed(engine: QueryEngine, table: SourceTable) -> None:
    sql = "SELECT *, timestamptz '2024-01-01 00:00:00Z' AS at, 'x'::enum('x') AS e FROM t"
    async with await engine.execute(plan(sql, {"t": table}, result_format="arrow")) as stream:
        assert [column["type"] for column in stream.columns] == [
            "bigint", "double", "varchar", "timestamptz", "enum('x')",
        ]  # fmt: skip
        body = await stream.read_all()
    read = pa.ipc.open_stream(body).read_all()
    assert read.num_rows == stream.row_count == 50_000
    assert read["id"].to_pylist() == list(range(50_000))
    assert read.schema.field("at").type == pa.timestamp("us", "UTC")
    assert body.endswith(b"\xff\xff\xff\xff\x00\x00\x00\x00")


async def test_arrow_of_no_rows_still_has_its_schema(engine: QueryEngine) -> None:
    async with await engine.execute(plan("SELECT 1 AS a WHERE false", result_format="arrow")) as s:
        read = pa.ipc.open_stream(await s.read_all()).read_all()
    assert (read.num_rows, read.schema.names) == (0, ["a"])


async def test_json_of_many_rows_is_streamed_in_chunks(
    engine: QueryEngine, table: SourceTable
) -> None:
    stream = await engine.execute(plan("SELECT * FROM t ORDER BY id", {"t": table}))
    chunks = [chunk async for chunk in stream]
    assert len(chunks) > 2
    assert stream.row_count == 50_000
    text = b"".join(chunks)
    assert text.startswith(b'[["0",0,"n0"],["1",0.5,"n1"],')
    assert text.endswith(b',["49999",24999.5,"n49999"]]')


async def test_small_answer_has_the_same_bytes_each_time(
    engine: QueryEngine, table: SourceTable
) -> None:
    """The second run of a small answer goes another way in the child (child_small)."""

    sql = (
        "SELECT id, half, name, 1e20::double, 0.1::float, 1.50::decimal(9,2), id > 3, NULL::int, "
        "0::decimal(38,10), -0.0000001::decimal(38,7), '-0.0'::double, NULL::decimal(9,2), "
        "'{}'::json, 'nan'::double FROM t WHERE id < $n ORDER BY id"
    )

    async def ask(n: int) -> bytes:
        request = plan(sql, {"t": table}, parameters={"n": n})
        async with await engine.execute(request) as stream:
            return await stream.read_all() + repr(stream.columns).encode()

    assert len({await ask(5) for _ in range(3)}) == 1
    many = await ask(10_000)
    assert many == await ask(10_000)
    assert await ask(0) == await ask(0)


async def test_small_answer_that_python_cannot_tell_goes_the_long_way(engine: QueryEngine) -> None:
    sql = "SELECT '{}'::timestamp, DATE '2020-01-01'"
    for text, told in (
        ("2020-01-01", "2020-01-01T00:00:00.000000"),
        ("2021-01-01 00:00:00.5", "2021-01-01T00:00:00.500000"),
        ("infinity", "infinity"),
        ("9999-12-31 23:59:59.999999", "9999-12-31T23:59:59.999999"),
        ("20000-01-01", "+20000-01-01T00:00:00.000000"),
        ("2020-01-01", "2020-01-01T00:00:00.000000"),
    ):
        assert await rows(engine, sql.format(text)) == [[told, "2020-01-01"]]


async def test_D9_limit_of_rows_is_not_a_limit_clause(
    engine: QueryEngine, table: SourceTable
) -> None:
    for _ in range(2):
        with pytest.raises(errors.ResultTooLarge) as caught:
            await engine.execute(plan("SELECT id FROM t", {"t": table}, rows_max=100))
        assert caught.value.members == {"limit_rows": 100}
    assert len(await rows(engine, "SELECT id FROM t LIMIT 100", {"t": table}, rows_max=100)) == 100
    for _ in range(2):
        assert await rows(engine, "SELECT 1", rows_max=1) == [[1]]
        with pytest.raises(errors.ResultTooLarge):
            await rows(engine, "SELECT 1", rows_max=0)


@pytest.mark.parametrize("result_format", ["json", "arrow"])
async def test_D9_limit_of_bytes_comes_before_the_first_byte_or_breaks_the_stream(
    engine: QueryEngine, table: SourceTable, result_format: str
) -> None:
    small = plan("FROM t", {"t": table}, result_format=result_format, bytes_max=100_000)
    with pytest.raises(errors.ResultTooLarge) as caught:
        await engine.execute(small)
    assert caught.value.members == {"limit_bytes": 100_000}
    stream = await engine.execute(replace(small, sql="FROM t, range(20)", bytes_max=5_000_000))
    received: list[int] = []

    async def read() -> None:
        async for chunk in stream:
            received.append(len(chunk))

    with pytest.raises(errors.ResultTooLarge):
        await read()
    assert 0 < sum(received) <= 5_000_000
    assert stream.row_count is None


async def test_D9_error_in_the_middle_is_raised_not_swallowed(
    engine: QueryEngine,
) -> None:
    sql = "SELECT CASE WHEN range = 5900000 THEN 'x' ELSE '1' END::integer FROM range(6000000)"
    stream = await engine.execute(plan(sql, rows_max=10**8))
    with pytest.raises(errors.SqlError, match="Could not convert"):
        async for _ in stream:
            pass
    assert await rows(engine, "SELECT 1") == [[1]]


async def test_D9_memory_is_bounded_by_a_typed_error_and_the_child_lives(
    engine: QueryEngine,
) -> None:
    pid = engine.status()["child_pid"]
    for sql in (
        "SELECT list_sum(range(1000000000))",
        "SELECT length(repeat('x', 4000000000))",
        "SELECT list(range) FROM range(300000000)",
    ):
        with pytest.raises(errors.ResultTooLarge, match="memory"):
            await rows(engine, sql)
    assert engine.status()["child_pid"] == pid
    assert await rows(engine, "SELECT 1") == [[1]]


async def test_sort_larger_than_memory_spills_below_its_folder(tmp_path: Path) -> None:
    other = QueryEngine(settings(tmp_path, spare=False, memory_limit_bytes=96 << 20))
    await other.start()
    try:
        sql = (
            "SELECT count(*) FROM (SELECT hash(range) AS h, repeat('x', 100) || range AS s "
            "FROM range(1500000) ORDER BY h OFFSET 1) WHERE s <> 'x'"
        )
        asking = asyncio.create_task(rows(other, sql))
        await until(lambda: asking.done() or any((tmp_path / "spill").glob("child-*/*/*")))
        assert not asking.done()
        assert await asking == [["1499999"]]
    finally:
        await other.stop()


async def test_errors_are_about_the_statement(engine: QueryEngine, table: SourceTable) -> None:
    cases = {
        "SELECT nope FROM t": 7,
        "SELECT sum(name) FROM t": 7,
        "SELECT name::integer FROM t": 11,
        "SELECT id FROM t GROUP BY half": 7,
    }
    for sql, position in cases.items():
        with pytest.raises(errors.SqlError) as caught:
            await rows(engine, sql, {"t": table})
        said = str(caught.value)
        assert not any(ours in said for ours in ("/", "$s", "read_parquet", "LINE")), said
        assert abs(caught.value.members["position"] - position) <= 4, (sql, caught.value.members)


async def test_many_sources_one_after_the_other(
    engine: QueryEngine, folder: Path, table: SourceTable
) -> None:
    """More sets of sources than scopes are kept: the oldest are detached and made again."""

    for n in range(20):
        source = write_table(folder, f"many{n % 7}", n % 7, 3)
        assert await rows(engine, "SELECT min(id) FROM t", {"t": source}) == [[str(n % 7)]]


# --- the process -----------------------------------------------------------------------------


async def test_D10_child_has_no_secrets_no_descriptors_and_a_session_of_its_own(
    engine: QueryEngine, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("LAKEBUS_TOKEN_SECRET", "do-not-inherit")
    other = QueryEngine(settings(folder, spare=False))
    await other.start()
    try:
        process = Path(f"/proc/{other.status()['child_pid']}")
        assert b"do-not-inherit" not in (process / "environ").read_bytes()
        kinds = [(process / "fd" / fd.name).readlink() for fd in (process / "fd").iterdir()]
        sockets = [str(k) for k in kinds if str(k).startswith("socket:")]
        assert len(sockets) == 2 + 4
        others = {str(k) for k in kinds} - set(sockets)
        assert all(k == "/dev/null" or "deleted" in k for k in others), others
        stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
        assert stat[3] == str(other.status()["child_pid"])
        limits = (process / "limits").read_text()
        assert "Max core file size        0" in limits
        assert "Max address space         unlimited" not in limits
    finally:
        await other.stop()
    assert list((folder / "spill").glob("child-*")) != []  # the module's own engine still runs


async def test_stopped_engine_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    engine = QueryEngine(settings(tmp_path, spare=False))
    await engine.start()
    pid = engine.status()["child_pid"]
    await engine.stop()
    await engine.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert list((tmp_path / "spill").iterdir()) == []
    with pytest.raises(errors.Unavailable):
        await engine.execute(plan("SELECT 1"))
    with pytest.raises(errors.Unavailable):
        await engine.parse("SELECT 1")
