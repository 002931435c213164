"""Statements that ask for too much: each has its typed end, and none ends a neighbour (D9)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from lakebus import errors
from storage.engine.engine import QueryEngine
from storage.engine.settings import MIB
from tests.integration.engine_rig import LONG, rows, settings, until, until_spare

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: Time that no statement of a person's size needs, and that these wait for their end in vain.
_SHORT_S, _LONG_S = 0.3, 60.0

TOO_LARGE, WRONG, LATE = errors.ResultTooLarge, errors.SqlError, errors.QueryTimeout
REFUSED = errors.StatementNotAllowed

#: Refused by the engine or by its memory, at once.
AT_ONCE = [
    ("SELECT len(range(10000000000))", WRONG),
    ("SELECT len(generate_series(1, 100000000000))", WRONG),
    ("SELECT count(*) FROM generate_series(DATE '2000-01-01', 'infinity', INTERVAL 1 DAY)", WRONG),
    ("SELECT length(repeat('x', 100000000000))", WRONG),
    ("SELECT len(list_resize([1], 10000000000))", TOO_LARGE),
    ("SELECT len(list_resize([1], 1000000000))", TOO_LARGE),
    ("SELECT list_sum(range(1000000000))", TOO_LARGE),
    ("SELECT len(to_json(range(100000000))::VARCHAR)", TOO_LARGE),
    ("SELECT length(printf('%2000000000d', 1))", TOO_LARGE),
    ("SELECT length(printf('%.2000000000f', 1.5))", WRONG),
    ("SELECT length(format('{:2000000000}', 1))", TOO_LARGE),
    ("SELECT length(format('{:>{}}', 'x', 2000000000))", TOO_LARGE),
    ("SELECT length(bar(1, 0, 1, 2000000000))", WRONG),
    ("SELECT factorial(1000000)", WRONG),
    ("SELECT 1e38::DECIMAL(38,0) * 1e38::DECIMAL(38,0)", WRONG),
    ("SELECT '1e-999999999'::DECIMAL(38,37)", WRONG),
    ("SELECT 9223372036854775807::HUGEINT * 9223372036854775807 * 9223372036854775807", WRONG),
    ("SELECT DATE '9999-01-01' + INTERVAL (9223372036854775807) YEAR", WRONG),
    ("SELECT regexp_matches('aaaa', '((((a{100}){100}){100}){100})')", WRONG),
    ("SELECT NULL::INT[1000000000]", WRONG),
    ("SELECT arg_max(range, range, 1000000000) FROM range(10)", WRONG),
    ("SELECT approx_top_k(range, 100000000) FROM range(10)", WRONG),
    ("SELECT reservoir_quantile(range, 0.5, 1000000000) FROM range(10)", REFUSED),
    ("SELECT json_structure(repeat('[', 100000) || repeat(']', 100000))", WRONG),
    ("SELECT (repeat('[', 10000) || repeat(']', 10000))::INT[][][]", WRONG),
    ("SELECT NULL::INT" + "[]" * 5000, WRONG),
    ("SELECT " + "(" * 3000 + "1" + ")" * 3000, WRONG),
    ("SELECT " + "NOT " * 5000 + "true", WRONG),
    ("SELECT " + "- " * 5000 + "1", WRONG),
    ("SELECT " + "[" * 2000 + "]" * 2000, WRONG),
    ("SELECT " + "(SELECT " * 1000 + "1" + ")" * 1000, WRONG),
    ("SELECT 1" + "::INT" * 5000, WRONG),
    ("SELECT " + "CASE WHEN true THEN " * 1000 + "1" + " END" * 1000, WRONG),
    ("SELECT 1 WHERE " + " AND ".join(["true"] * 20_000), WRONG),
    ("SELECT " + "9" * 200_000, WRONG),
    ("SELECT a FROM range(10) t(a) GROUP BY CUBE (" + ",".join(["a"] * 30) + ")", WRONG),
    ("SELECT * FROM range(1000000)", TOO_LARGE),
]
#: Work without end, or values of which one call makes too much: only the time ends them.
ENDLESS = [
    "SELECT count(*) FROM range(1000000000000) r WHERE hash(r.range) = 1",
    "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(9) c WHERE hash(a, b, c) = 1",
    "WITH RECURSIVE a(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM a) SELECT max(n) FROM a",
    "SELECT regexp_matches(repeat('ab', 5000000), '(a?b?){400}[^ab]')",
    "SELECT levenshtein(repeat('ab', 60000), repeat('ba', 60000))",
]
#: What they gather grows: memory ends them on a fast machine, time on a slow one.
GROWING = [
    "SELECT max(s) FROM (SELECT repeat('x', 1000) || hash(range) AS s FROM range(100000000)"
    " ORDER BY s OFFSET 1)",
    "SELECT count(DISTINCT repeat('x', 100) || range) FROM range(1000000000)",
    "SELECT max(c) FROM (SELECT list(range) OVER (ORDER BY range) AS c FROM range(1000000))",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[QueryEngine]:
    started = QueryEngine(
        settings(
            tmp_path_factory.mktemp("bombs"),
            memory_limit_bytes=192 * MIB,
            address_space_bytes=768 * MIB,
        )
    )
    await started.start()
    await until_spare(started)
    yield started
    await started.stop()


async def _end(engine: QueryEngine, sql: str, deadline_s: float) -> type[errors.LakebusError]:
    """The error in which the statement ends, as the service runs it: parsed, then executed."""

    async def run() -> None:
        await engine.parse(sql)
        await rows(engine, sql, deadline_s=deadline_s, rows_max=10_000)

    with pytest.raises(errors.LakebusError) as caught:
        await run()
    assert not any(ours in str(caught.value) for ours in ("/tmp", "$s", ".parquet")), sql[:80]
    return type(caught.value)


async def test_D9_what_asks_for_too_much_is_refused_and_the_process_lives(
    engine: QueryEngine,
) -> None:
    pid = engine.status()["child_pid"]
    for sql, expected in AT_ONCE:
        assert await _end(engine, sql, _LONG_S) is expected, sql[:120]
    assert engine.status()["child_pid"] == pid
    assert await rows(engine, "SELECT 1") == [[1]]


async def test_D9_what_has_no_end_is_ended_and_a_neighbour_has_its_answer(
    engine: QueryEngine,
) -> None:
    """Some of these obey their interrupt; those that do not cost the process, and the neighbour is
    run again in the next one."""

    sql = "SELECT count(*) FROM range(3000000) t(n) WHERE hash(n) % 3 = 5"
    ends = [(bomb, {LATE}) for bomb in ENDLESS] + [(bomb, {LATE, TOO_LARGE}) for bomb in GROWING]
    for bomb, expected in ends:
        await until_spare(engine)
        neighbour = asyncio.create_task(rows(engine, sql, deadline_s=_LONG_S))
        assert await _end(engine, bomb, _SHORT_S) in expected, bomb
        assert await neighbour == [["0"]], bomb
    assert engine.status()["kills"] > 0
    assert engine.status()["running"] == 0


def _replaced(engine: QueryEngine, pid: int) -> bool:
    return engine.status()["child_pid"] not in (pid, None)


async def test_D9_who_may_have_killed_the_process_runs_again_alone(engine: QueryEngine) -> None:
    """The child dies and nobody knows why; the next one dies of the one that did it, alone."""

    await until(lambda: bool(engine.status()["spare_ready"]), seconds=_LONG_S)
    suspects = [asyncio.create_task(rows(engine, LONG, deadline_s=_LONG_S)) for _ in range(3)]
    await until(lambda: engine.status()["running"] == 3, seconds=_LONG_S)
    for again in (False, True):
        if again:
            await until(engine.suspects.locked, seconds=_LONG_S)
        pid = engine.status()["child_pid"]
        os.kill(pid, signal.SIGKILL)
        await until(partial(_replaced, engine, pid), seconds=_LONG_S)
        await until(lambda: bool(engine.status()["spare_ready"]), seconds=_LONG_S)
    await until(lambda: any(task.done() for task in suspects), seconds=_LONG_S)
    ended = [task for task in suspects if task.done()]
    assert len(ended) == 1
    assert isinstance(ended[0].exception(), errors.Unavailable)
    for task in suspects:
        task.cancel()
    await asyncio.gather(*suspects, return_exceptions=True)
    assert not engine.suspects.locked()
    assert await rows(engine, "SELECT 1") == [[1]]


async def test_D10_explain_tells_nothing_of_the_engine(engine: QueryEngine) -> None:
    told = str(await rows(engine, "EXPLAIN SELECT current_catalog, now() FROM range(3)"))
    assert "RANGE" in told
    assert not any(ours in told for ours in ("$s", "$fixed", "$now", "/tmp", ".parquet"))
