"""The whole way of a row in one process: HTTP, bus, roles, files, DuckDB's child, HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.backend import Backend
from actors.hints import MemoryHintDirectory
from actors.role_host import RoleHost
from lakebus.clock import SystemClock
from lakebus.telemetry import MemoryMetrics
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.memory import MemoryCatalog
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.memory_lake import MemoryLake
from tests.unit.actors_rig import ROLE_SETTINGS, Deaths
from tests.unit.http_rig import ARROW, RawExchange, Server, problem, server

ROWS: list[dict[str, Any]] = [
    {"id": 2**62, "note": 'quote " and \\ and é', "amount": "1.50", "at": "2026-01-31T12:00:00Z"},
    {"id": 2, "note": None},
]


@pytest.fixture
async def lake(tmp_path: Path) -> AsyncIterator[Server]:
    (tmp_path / "objects").mkdir()
    store = LocalObjectStore(tmp_path / "objects")
    engine = QueryEngine(
        EngineSettings(
            allowed_directory=str(tmp_path / "objects"),
            temp_directory=str(tmp_path / "spill"),
            spare=False,
        )
    )
    await engine.start()
    clock = SystemClock()
    deaths = Deaths()
    memory = MemoryLake(settings=BusSettings(shards=2), clock=clock)
    roles = RoleHost(
        backend=Backend(
            bus=MemoryBus(memory),
            catalog=MemoryCatalog(memory),
            store=store,
            hints=MemoryHintDirectory(),
            stack="test",
            settings=ROLE_SETTINGS,
        ),
        on_fatal=deaths,
        clock=clock,
        metrics=MemoryMetrics(),
    )
    await roles.start()
    try:
        async with server(lake=memory, engine=engine, store=store) as made:
            await made.create()
            yield made
    finally:
        await roles.stop()
        await engine.stop()
    assert deaths.seen == []


async def test_A1_D3_a_visible_row_is_read_as_it_was_written(lake: Server) -> None:
    sent = await lake.send(ROWS, query="?wait=visible&timeout_ms=20000")
    assert (sent.status_code, sent.json()["visible"]) == (200, True), sent.text
    answer = await lake.http.post(
        "/v1/query",
        json={
            "sql": 'SELECT id, note, amount, "at" FROM events WHERE id > $least ORDER BY 1 DESC',
            "parameters": {"least": 1},
            "min_visibility_token": sent.json()["receipt"]["visibility_token"],
        },
        headers=lake.headers(),
    )
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert [row[0] for row in document["rows"]] == [str(2**62), "2"]
    assert document["rows"][0][1:3] == [ROWS[0]["note"], "1.50"]
    assert document["rows"][1][1:] == [None, None, None]
    assert document["row_count"] == 2
    assert document["snapshot_id"] >= sent.json()["snapshot_id"]

    empty = await lake.get("/v1/query?sql=SELECT+id+FROM+events+WHERE+id+%3C+0")
    assert (empty.json()["rows"], empty.json()["row_count"]) == ([], 0)
    numbers = await lake.get(
        "/v1/query?sql=SELECT+max(id)+FROM+events", accept="application/json; integers=number"
    )
    assert numbers.json()["rows"] == [[2**62]]
    arrow = await lake.get("/v1/query?sql=SELECT+id+FROM+events+ORDER+BY+id", accept=ARROW)
    with pa.ipc.open_stream(arrow.content) as reader:
        assert reader.read_all()["id"].to_pylist() == [2, 2**62]


async def test_errors_of_statements_are_problems(lake: Server) -> None:
    problem(await lake.get("/v1/query?sql=SELEC+1"), 400, "sql_error")
    problem(await lake.get("/v1/query?sql=DROP+TABLE+events"), 403, "statement_not_allowed")
    problem(await lake.get("/v1/query?sql=SELECT+1+FROM+event"), 404, "table_not_found")
    copied = await lake.get("/v1/query?sql=SELECT+*+FROM+read_csv('/etc/passwd')")
    problem(copied, 403, "statement_not_allowed")
    many = await lake.get("/v1/query?sql=SELECT+*+FROM+range(10)+r(n)&max_rows=2")
    problem(many, many.status_code, many.json()["code"])
    assert many.status_code in (403, 413)


async def test_D9_a_long_answer_streams_and_stops_with_its_reader(lake: Server) -> None:
    await lake.send([{"id": n} for n in range(3000)], query="?wait=visible&timeout_ms=20000")
    sql = "SELECT a.id, b.id FROM events a, events b"
    exchange = RawExchange()
    running = asyncio.create_task(
        exchange.run(
            lake.app,
            "POST",
            "/v1/query",
            headers=[("authorization", f"Bearer {lake.key}"), ("content-type", "application/json")],
            parts=[json.dumps({"sql": sql}).encode()],
        )
    )
    await asyncio.wait_for(exchange.started.wait(), 20)
    exchange.left.set()
    await asyncio.wait_for(running, 5)
    assert exchange.sent[-1].get("more_body") is True
    again = await lake.get("/v1/query?sql=SELECT+count(*)+FROM+events")
    assert again.json()["rows"] == [["3000"]]
