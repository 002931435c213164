"""The whole way of a row in one process: HTTP, bus, roles, files, DuckDB's child, HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakebus.clock import SystemClock
from lakebus.errors import Unavailable
from serve_app.query import WHOLE_BYTES_MAX
from storage.bus.settings import BusSettings
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.objects import LocalObjectStore
from storage.memory_lake import MemoryLake
from tests.unit.actors_rig import publishing
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
    memory = MemoryLake(settings=BusSettings(shards=2), clock=SystemClock())
    try:
        async with (
            publishing(memory, store),
            server(lake=memory, engine=engine, store=store) as made,
        ):
            await made.create()
            yield made
    finally:
        await engine.stop()


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


async def test_D9_a_child_that_dies_under_an_answer_breaks_it(lake: Server) -> None:
    """The reader sees a connection that broke: no last part ever came. Even of CSV, which has no
    end of its own. (Errors in late rows, in all forms: test_client_whole.)"""

    sql = "SELECT range AS n, md5(range::VARCHAR) AS digest FROM range(1000000000)"
    for accept in ("text/csv", "application/x-ndjson"):
        exchange = RawExchange()
        running = asyncio.create_task(
            exchange.run(
                lake.app,
                "POST",
                "/v1/query",
                headers=[
                    ("authorization", f"Bearer {lake.key}"),
                    ("content-type", "application/json"),
                    ("accept", accept),
                ],
                parts=[json.dumps({"sql": sql}).encode()],
            )
        )
        await asyncio.wait_for(exchange.started.wait(), 30)
        os.kill(lake.engine.status()["child_pid"], signal.SIGKILL)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(running, 30)
        assert exchange.status == 200
        assert all(message["more_body"] for message in exchange.sent[1:])
        assert len(exchange.body) > WHOLE_BYTES_MAX
        assert b'"complete"' not in exchange.body
    again = await lake.get("/v1/query?sql=SELECT+42")
    assert again.json()["rows"] == [[42]]


# --- partitions --------------------------------------------------------------------------------


async def visible(lake: Server, table: str, rows: list[dict[str, Any]]) -> int:
    sent = await lake.send(rows, table=table, query="?wait=visible&timeout_ms=20000")
    assert sent.status_code == 200, sent.text
    return int(sent.json()["snapshot_id"])


async def asked(lake: Server, sql: str, **more: Any) -> tuple[list[list[Any]], dict[str, Any]]:
    document = {"sql": sql, **more}
    answer = await lake.http.post("/v1/query", json=document, headers=lake.headers())
    assert answer.status_code == 200, answer.text
    return answer.json()["rows"], answer.json()["statistics"]


async def test_D11_A8_a_partitioned_table_is_written_pruned_changed_and_read(lake: Server) -> None:
    made = await lake.create(
        {
            "name": "orders",
            "columns": [
                {"name": "id", "type": "integer", "nullable": False},
                {"name": "at", "type": "timestamptz"},
                {"name": "note", "type": "varchar"},
            ],
            "partition_by": ["day(at)", "bucket(4,ID)"],
            "sort_by": ["zorder(id, at)"],
            "retention": {"rows": {"column": "at", "for": "90 days"}},
        }
    )
    assert made["partition_by"] == ["day(at)", "bucket(4, id)"]
    rows = [{"id": n, "at": f"2026-01-{1 + n % 2:02}T12:00:00Z", "note": "x"} for n in range(40)]
    first = await visible(lake, "orders", rows)

    files = (await lake.get("/v1/tables/orders/files")).json()["files"]
    assert len(files) == 8
    assert {file["first_snapshot_id"] for file in files} == {first}
    assert {file["partition"]["day(at)"] for file in files} == {"2026-01-01", "2026-01-02"}
    assert {file["partition"]["bucket(4, id)"] for file in files} == {"0", "1", "2", "3"}

    found, told = await asked(lake, "SELECT id FROM orders WHERE id = 7")
    assert (found, told["files_scanned"], told["files_pruned"]) == ([[7]], 1, 7)
    found, told = await asked(lake, "SELECT count(*) FROM orders WHERE id IN (7, 8)")
    assert (found, told["files_pruned"] >= 6) == ([["2"]], True)

    changed = await lake.http.patch(
        "/v1/tables/orders",
        json={
            "rename_columns": {"id": "number", "note": "id"},
            "widen_columns": {"number": "bigint"},
            "relax_columns": ["number"],
            "partition_by": ["id"],
            "sort_by": None,
        },
        headers=lake.headers(if_match="1"),
    )
    assert changed.status_code == 200, changed.text
    document = (await lake.get("/v1/tables/orders")).json()
    assert (document["partition_by"], document["sort_by"]) == (["id"], [])
    assert document["retention"] == {"rows": {"column": "at", "for_s": 7_776_000}}
    assert document["columns"][0]["type"] == "bigint"
    assert document["columns"][0]["nullable"] is True

    await visible(lake, "orders", [{"number": None, "id": "y"}, {"number": 2**40, "id": "x"}])
    files = (await lake.get("/v1/tables/orders/files")).json()["files"]
    assert sorted(file["partition"]["id"] for file in files[8:]) == ["x", "y"]
    # The old files' `bucket(4, id)` is about what is called `number` now, and not about `id`.
    found, told = await asked(lake, "SELECT number FROM orders WHERE number = 7")
    assert (found, told["files_scanned"]) == ([["7"]], 1)
    found, _ = await asked(lake, "SELECT count(*) FROM orders WHERE id = 'x'")
    assert found == [["41"]]
    sql = "SELECT id FROM orders WHERE id = 7"
    found, told = await asked(lake, sql, snapshot={"id": first})
    assert (found, told["files_scanned"]) == ([[7]], 1)

    await lake.http.patch("/v1/tables/orders", json={"retention": None}, headers=lake.headers())
    assert (await lake.get("/v1/tables/orders")).json()["retention"] is None


async def test_a_range_with_too_many_partitions_is_one_mixed_file(lake: Server) -> None:
    columns = [{"name": "id", "type": "bigint"}]
    await lake.create({"name": "wide", "columns": columns, "partition_by": ["id"]})
    await visible(lake, "wide", [{"id": n} for n in range(40)])
    (file,) = (await lake.get("/v1/tables/wide/files")).json()["files"]
    assert file["partition"] is None
    found, _ = await asked(lake, "SELECT id FROM wide WHERE id = 7")
    assert found == [["7"]]
