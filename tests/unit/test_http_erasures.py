"""Erasures over HTTP, by the client and by the command; the worker is played here."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from lakebus import errors
from lakebus.client import connect
from lakebus.clock import new_uuid
from storage.ingesting.grants import Grant
from storage.maintenance.jobs import JobKind
from storage.maintenance.memory_jobs import MemoryJobs
from storage.memory_state import ErasedRow
from storage.reading.predicates import PredicateRequest
from tests.unit.command_rig import Lake
from tests.unit.command_rig import lake as commands
from tests.unit.http_rig import Server, problem
from tests.unit.test_http_engine import lake

__all__ = ["commands", "lake"]  # the fixtures
_PATH = "/v1/tables/events/erase"


async def _post(server: Server, document: Any, *, api_key: str | None = None, key: str = "") -> Any:
    headers = server.headers(api_key, content_type="application/json")
    if key:
        headers["idempotency-key"] = key
    return await server.http.post(_PATH, content=json.dumps(document).encode(), headers=headers)


async def _finish(server: Server, *, error: dict[str, Any] | None = None) -> None:
    """Plays the worker: takes the next erasure and says what it did."""

    jobs = MemoryJobs(server.lake)
    while (claim := await jobs.claim(new_uuid(), kinds=(JobKind.ERASE,), ttl_s=60)) is None:
        await asyncio.sleep(0.005)
    head = server.lake.state.head_id
    assert claim.job.parameters["ends"] == [shard.end for shard in server.lake.state.shards]
    report = {
        "erasure_id": str(claim.job.job_id),
        "snapshot_id": head,
        "evaluated_at_snapshot_id": head,
        "deleted_rows": 1,
        "snapshots": [{"first_snapshot_id": 3, "last_snapshot_id": 3, "rows": 1, "files": 1}],
        "bus_bytes_left": 0,
        "history": str(server.lake.history),
    }
    await jobs.finish(claim, {} if error else report, error=error)


async def test_E7_an_erasure_is_answered_when_it_is_done(lake: Server) -> None:
    await lake.send([{"id": 1}, {"id": 2}], query="?wait=visible&timeout_ms=20000")
    document = {"where": "id = ?", "parameters": [1]}
    answer, _ = await asyncio.gather(_post(lake, document, key="k"), _finish(lake))
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["state"], said["erased_rows"], said["replayed"]) == ("done", 1, False)
    assert said["report"]["snapshots"][0]["rows"] == 1
    assert "parameters" not in said
    again = await _post(lake, document, key="k")
    assert again.json() == said | {"replayed": True}
    found = await lake.get(f"/v1/tables/events/erasures/{said['job_id']}")
    assert (found.status_code, found.json()) == (200, said | {"replayed": True})
    waiting = await _post(lake, {"where": "id = 2", "timeout_ms": 300})
    assert (waiting.status_code, waiting.json()["erased_rows"]) == (202, None)


async def test_E7_an_erasure_needs_admin_and_query(lake: Server) -> None:
    for grants in ([Grant("query"), Grant("ingest")], [Grant("admin")]):
        key = await lake.new_key(*grants, principal="p")
        problem(await _post(lake, {"where": "true"}, api_key=key), 403, "forbidden")
    problem(await _post(lake, {"where": "id = (SELECT 1)"}), 403, "statement_not_allowed")
    problem(
        await _post(lake, {"where": "true", "min_visibility_token": "x"}), 400, "malformed_request"
    )


async def test_E7_answers_of_changed_snapshots_carry_the_mark(lake: Server) -> None:
    await lake.send([{"id": 1}], query="?wait=visible&timeout_ms=20000")
    state = lake.lake.state
    head, erasure_id = state.head_id, uuid.uuid4()
    (table_id,) = state.tables
    state.erased[uuid.uuid4()] = ErasedRow(erasure_id, table_id, head, head + 1, 3, 1, 10)
    state.erasure_count += 1
    for sql, marks in (("SELECT * FROM events", str(erasure_id)), ("SELECT 1", None)):
        answer = await lake.http.post("/v1/query", json={"sql": sql}, headers=lake.headers())
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("lakebus-erased") == marks
        assert answer.json()["statistics"].get("erasures") == ([marks] if marks else None)
    snapshot = (await lake.get(f"/v1/snapshots/{head}")).json()
    assert snapshot["erasures"] == [{"erasure_id": str(erasure_id), "table": "events", "rows": 3}]
    assert (await lake.get(f"/v1/snapshots/{head - 1}")).json()["erasures"] == []


class _Agreeing:
    async def check(self, request: PredicateRequest) -> None:
        assert request.where


async def test_E7_the_client_and_the_command_erase_rows(commands: Lake) -> None:
    dependencies = commands.server.app.dependencies
    assert dependencies is not None
    object.__setattr__(dependencies, "predicates", _Agreeing())
    with connect(commands.url, commands.server.key) as client:
        found, _ = await asyncio.gather(
            asyncio.to_thread(client.erase, "events", "id = ?", [1], key="k"),
            _finish(commands.server),
        )
        assert (found.done, found.rows, found.report["bus_bytes_left"]) == (True, 1, 0)
        again = await asyncio.to_thread(client.erasure, "events", found.job_id)
        assert again.report == found.report
        failing = asyncio.to_thread(client.erase, "events", "id = 2")
        said = {"code": "sql_error", "detail": "no"}
        results = await asyncio.gather(
            failing, _finish(commands.server, error=said), return_exceptions=True
        )
        assert isinstance(results[0], errors.SqlError)
    asked = ("erase", "--table", "events", "--where", "id = ?", "-p", "1", "--yes")
    done, _ = await asyncio.gather(commands.run(*asked), _finish(commands.server))
    assert done.return_value == 0
    assert done.output.splitlines()[0] == "snapshots 3 to 3 lost 1 row"
    late = await commands.run(*asked, "--timeout-s", "1.5")
    assert (late.return_value, "goes on" in late.output) == (3, True)
