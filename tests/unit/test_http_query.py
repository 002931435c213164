"""Queries over HTTP: forms, streaming, disconnects, limits (contract D)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lakebus.errors import QueryTimeout, ResultTooLarge, SqlError, StatementNotAllowed
from serve_app.accept import accepted
from serve_app.query import WHOLE_BYTES_MAX
from storage.ingesting.grants import Grant
from storage.reading.resolve import SnapshotChoice
from tests.unit.http_rig import ARROW, RawExchange, Server, problem, server


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


async def post(lake: Server, document: Any, **headers: str) -> Any:
    return await lake.http.post("/v1/query", json=document, headers=lake.headers(**headers))


async def test_an_answer_has_its_columns_rows_and_snapshot(lake: Server) -> None:
    lake.engine.parts = [b"[[1],", b"[2]]"]
    answer = await post(lake, {"sql": "select n from events"})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert list(document) == [
        "columns",
        "rows",
        "row_count",
        "snapshot_id",
        "snapshot_time",
        "visibility_token",
        "statistics",
    ]
    assert document["rows"] == [[1], [2]]
    assert document["columns"] == [{"name": "n", "type": "integer"}]
    assert set(document["statistics"]) == {
        "wait_ms",
        "plan_ms",
        "execute_ms",
        "files_scanned",
        "files_pruned",
        "bytes_scanned",
        "snapshots",
    }
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["lakebus-snapshot-id"] == str(document["snapshot_id"])
    assert answer.headers["lakebus-visibility-token"] == document["visibility_token"]
    assert answer.headers["lakebus-query-id"]
    assert lake.engine.results[0].closed.is_set()


async def test_D6_reads_chain_by_the_token_of_the_answer(lake: Server) -> None:
    token = (await lake.send([{"id": 1}])).json()["receipt"]["visibility_token"]
    waiting = asyncio.create_task(
        post(lake, {"sql": "from events", "min_visibility_token": [token]})
    )
    (published,) = await lake.publish()
    document = (await waiting).json()
    assert document["snapshot_id"] == published.snapshot_id
    again = await post(
        lake,
        {
            "sql": "from events",
            "min_visibility_token": document["visibility_token"],
            "snapshot": {"id": document["snapshot_id"] - 1},
        },
    )
    problem(again, 409, "token_not_covered")


async def test_everything_asked_for_reaches_the_engine(lake: Server) -> None:
    document = {
        "sql": "select $a from events",
        "parameters": {"a": "x", "b": 2, "c": 1.5, "d": None, "e": True},
        "snapshot": {"id": 2},
        "max_rows": 7,
        "timeout_ms": 1000,
        "deterministic": True,
        "max_staleness_ms": 10,
    }
    assert (await post(lake, document)).status_code == 200
    plan = lake.engine.plans[0]
    assert plan.parameters == document["parameters"]
    assert (plan.rows_max, plan.deterministic) == (7, True)
    assert (plan.result_format, plan.integers) == ("json", "string")
    query = {
        "sql": "select ? from events",
        "parameters": '["x", 2]',
        "snapshot": '{"id": 2}',
        "max_rows": "7",
        "deterministic": "true",
    }
    answer = await lake.http.get("/v1/query", params=query, headers=lake.headers())
    assert answer.status_code == 200, answer.text
    assert lake.engine.plans[1].parameters == ["x", 2]
    assert lake.engine.plans[1].rows_max == 7


async def test_arrow_is_passed_on_as_it_is(lake: Server) -> None:
    lake.engine.parts = [b"arrow ", b"bytes"]
    answer = await post(lake, {"sql": "select 1"}, accept=ARROW)
    assert (answer.content, answer.headers["content-type"]) == (b"arrow bytes", ARROW)
    assert answer.headers["lakebus-snapshot-id"]
    assert lake.engine.plans[0].result_format == "arrow"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, ("json", "string")),
        ("*/*", ("json", "string")),
        ("application/*;q=0.5, text/html", ("json", "string")),
        ("application/json; integers=number", ("json", "number")),
        (f"text/html, {ARROW}", ("arrow", "string")),
        ("text/csv; integers=number", ("csv", "number")),
        ("text/*", ("csv", "string")),
        ("application/x-ndjson", ("ndjson", "string")),
        ("application/vnd.apache.parquet, */*;q=0.1", ("parquet", "string")),
        (f"application/json;q=0.1, {ARROW};q=0.9", ("arrow", "string")),
        (f"application/json;q=0, {ARROW}", ("arrow", "string")),
    ],
)
def test_accept_chooses_the_form(header: str | None, expected: tuple[str, str]) -> None:
    form = accepted(header)
    assert (form.result_format, form.integers) == expected


@pytest.mark.parametrize(
    "header", ["text/html", "application/pdf", "application/json;q=0", "application/vnd.x"]
)
async def test_forms_that_are_not_given_are_refused(lake: Server, header: str) -> None:
    answer = await post(lake, {"sql": "select 1"}, accept=header)
    assert problem(answer, 415, "unsupported_media_type")["supported"]


@pytest.mark.parametrize("header", ["application/json;q=x", "application/json;integers=roman"])
async def test_a_bad_accept_header_is_refused(lake: Server, header: str) -> None:
    problem(await post(lake, {"sql": "select 1"}, accept=header), 400, "malformed_request")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"sql": 7},
        {"sql": None},
        {"sql": "select 1", "more": 1},
        {"sql": "select 1", "timeout_ms": 0},
        {"sql": "select 1", "timeout_ms": 100_001},
        {"sql": "select 1", "timeout_ms": 10**400},
        {"sql": "select 1", "timeout_ms": 1.5},
        {"sql": "select 1", "timeout_ms": "5"},
        {"sql": "select 1", "max_rows": 0},
        {"sql": "select 1", "max_rows": -1},
        {"sql": "select 1", "max_staleness_ms": -1},
        {"sql": "select 1", "deterministic": 1},
        {"sql": "select 1", "snapshot": "newest"},
        {"sql": "select 1", "snapshot": {"id": "1"}},
        {"sql": "select 1", "snapshot": {"id": 1, "timestamp": "x"}},
        {"sql": "select 1", "snapshot": {"timestamp": "yesterday"}},
        {"sql": "select 1", "snapshot": {"timestamp": "2026-01-01T00:00:00.0000001Z"}},
        {"sql": "select 1", "snapshot": [1]},
        {"sql": "select 1", "parameters": "x"},
        {"sql": "select 1", "parameters": [[1]]},
        {"sql": "select 1", "parameters": {"a": {}}},
        {"sql": "select 1", "min_visibility_token": 7},
        {"sql": "select 1", "min_visibility_token": [7]},
    ],
)
async def test_bad_queries_are_refused(lake: Server, document: Any) -> None:
    problem(await post(lake, document), 400, "malformed_request")
    assert not lake.engine.plans


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?sql=select+1&sql=select+2",
        "?sql=select+1&parameters=x",
        "?sql=select+1&parameters=7",
        "?sql=select+1&snapshot=x",
        "?sql=select+1&snapshot={",
        "?sql=select+1&timeout_ms=x",
        "?sql=select+1&wait=durable",
        "?sql=%ff",
        "?sql=select+1&deterministic=1",
    ],
)
async def test_bad_query_strings_are_refused(lake: Server, query: str) -> None:
    problem(await lake.get("/v1/query" + query), 400, "malformed_request")


async def test_D2_a_snapshot_id_may_stand_bare_in_a_query_string(lake: Server) -> None:
    problem(await lake.get("/v1/query?sql=select+1&snapshot=999999"), 404, "snapshot_not_found")
    problem(await lake.get('/v1/query?sql=select+1&snapshot={"id":9}'), 404, "snapshot_not_found")


async def test_D2_times_and_ids_that_cannot_be_read_say_why(lake: Server) -> None:
    def at(time_text: str) -> Any:
        return post(lake, {"sql": "from events", "snapshot": {"timestamp": time_text}})

    problem(await at("2999-01-01T00:00:00Z"), 422, "time_in_future")
    problem(await at("1999-01-01T00:00:00Z"), 404, "snapshot_not_found")
    lost = await post(lake, {"sql": "from events", "snapshot": {"id": 10**18}})
    problem(lost, 404, "snapshot_not_found")
    assert SnapshotChoice(snapshot_id=1).fixed


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SqlError("no such thing", position=7), 400, "sql_error"),
        (StatementNotAllowed("no", kind="COPY"), 403, "statement_not_allowed"),
    ],
)
async def test_errors_of_the_statement_keep_their_members(
    lake: Server, error: Exception, status: int, code: str
) -> None:
    lake.engine.fail = error
    document = problem(await post(lake, {"sql": "x"}), status, code)
    assert document.get("position", 7) == 7
    assert document.get("kind", "COPY") == "COPY"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ResultTooLarge("more", limit_rows=1), 413, "result_too_large"),
        (QueryTimeout("late", waited_ms=3, phase="execute"), 504, "query_timeout"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
async def test_D9_an_error_within_the_first_part_still_has_a_status(
    lake: Server, error: Exception, status: int, code: str
) -> None:
    lake.engine.parts = [b"[[1],", error]
    document = problem(await post(lake, {"sql": "x"}), status, code)
    assert "secret" not in str(document)
    assert lake.engine.results[0].closed.is_set()


async def test_D9_a_failure_after_the_first_byte_breaks_the_connection(lake: Server) -> None:
    lake.engine.parts = [b"x" * (WHOLE_BYTES_MAX + 1), b"y", ResultTooLarge("more")]
    exchange = RawExchange()
    with pytest.raises(ResultTooLarge):
        await run_query(exchange, lake)
    assert exchange.status == 200
    assert all(message["more_body"] for message in exchange.sent[1:])
    assert lake.engine.results[0].closed.is_set()


async def test_a_long_answer_is_streamed(lake: Server) -> None:
    big = b"[[1]" + b",[1]" * WHOLE_BYTES_MAX
    lake.engine.parts = [big, b",[2]]"]
    exchange = RawExchange()
    await run_query(exchange, lake)
    assert b"content-length" not in dict(exchange.sent[0]["headers"])
    assert exchange.sent[-1]["more_body"] is False
    assert json.loads(exchange.body)["rows"][-1] == [2]


async def run_query(exchange: RawExchange, lake: Server, sql: str = "from events") -> None:
    await exchange.run(
        lake.app,
        "POST",
        "/v1/query",
        headers=[("authorization", f"Bearer {lake.key}"), ("content-type", "application/json")],
        parts=[json.dumps({"sql": sql}).encode()],
    )


async def test_D9_the_work_stops_when_the_client_goes_away(lake: Server) -> None:
    lake.engine.gate = asyncio.Event()
    exchange = RawExchange()
    running = asyncio.create_task(run_query(exchange, lake))
    await asyncio.wait_for(lake.engine.executing.wait(), 5)
    began_s = time.monotonic()
    exchange.left.set()
    await asyncio.wait_for(lake.engine.results[0].closed.wait(), 5)
    await running
    assert time.monotonic() - began_s < 0.25
    assert exchange.sent == []
    assert (await lake.get("/v1/queries")).json() == {"queries": []}


async def test_D9_a_server_that_cancels_the_request_stops_the_work(lake: Server) -> None:
    lake.engine.gate = asyncio.Event()
    running = asyncio.create_task(run_query(RawExchange(), lake))
    await asyncio.wait_for(lake.engine.executing.wait(), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert lake.engine.results[0].closed.is_set()


async def test_running_queries_are_ones_own_and_can_be_cancelled(lake: Server) -> None:
    lake.engine.gate = asyncio.Event()
    other = await lake.new_key(Grant("query"), principal="other")
    running = asyncio.create_task(post(lake, {"sql": "select 1"}))
    await asyncio.wait_for(lake.engine.executing.wait(), 5)
    (listed,) = (await lake.get("/v1/queries")).json()["queries"]
    assert listed["sql"] == "select 1"
    path = f"/v1/queries/{listed['query_id']}"
    assert (await lake.get("/v1/queries", api_key=other)).json() == {"queries": []}
    hidden = await lake.http.delete(path, headers=lake.headers(other))
    problem(hidden, 404, "query_not_found")
    cancelled = await lake.http.delete(path, headers=lake.headers())
    assert cancelled.json()["cancelled"] is True
    problem(await running, 499, "cancelled")
    problem(await lake.http.delete(path, headers=lake.headers()), 404, "query_not_found")


async def test_D10_tables_without_a_grant_do_not_exist_in_sql(lake: Server) -> None:
    key = await lake.new_key(Grant("query", ("sales.*",)), principal="p")
    answer = await lake.http.post(
        "/v1/query", json={"sql": "from events"}, headers=lake.headers(key)
    )
    document = problem(answer, 404, "table_not_found")
    assert document["did_you_mean"] == []


async def test_a_catalog_that_does_not_answer_is_unavailable(lake: Server) -> None:
    lake.lake.faults.unreachable = True
    answer = await post(lake, {"sql": "from events"})
    assert problem(answer, 503, "unavailable")["retryable"] is True
    assert "retry-after" in answer.headers
