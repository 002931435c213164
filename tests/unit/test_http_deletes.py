"""Deletes over HTTP, by the client and by the command; the worker is played here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from lakebus import errors
from lakebus.client import connect
from lakebus.clock import new_uuid
from storage.ingesting.grants import Grant
from storage.maintenance.jobs import JobKind
from storage.maintenance.memory_jobs import MemoryJobs
from storage.reading.predicates import PredicateRequest
from tests.unit.command_rig import Lake
from tests.unit.command_rig import lake as commands
from tests.unit.http_rig import Server, problem
from tests.unit.test_http_engine import lake

__all__ = ["commands", "lake"]  # the fixtures
_PATH = "/v1/tables/events/delete"


async def _post(server: Server, document: Any, *, api_key: str | None = None) -> httpx.Response:
    headers = server.headers(api_key, content_type="application/json")
    if isinstance(document, dict) and "key" in document:
        headers["idempotency-key"] = document.pop("key")
    return await server.http.post(_PATH, content=json.dumps(document).encode(), headers=headers)


async def _finish(server: Server, rows: int, *, error: dict[str, Any] | None = None) -> None:
    """Plays the worker: takes the next delete and says what it did."""

    jobs = MemoryJobs(server.lake)
    while (claim := await jobs.claim(new_uuid(), kinds=(JobKind.DELETE,), ttl_s=60)) is None:
        await asyncio.sleep(0.005)
    head = server.lake.state.head_id
    report = {
        "snapshot_id": head,
        "evaluated_at_snapshot_id": head,
        "deleted_rows": rows,
        "history": str(server.lake.history),
    }
    await jobs.finish(claim, {} if error else report, error=error)


async def test_E7_a_delete_is_answered_when_it_is_done(lake: Server) -> None:
    await lake.send([{"id": 1}, {"id": 2}], query="?wait=visible&timeout_ms=20000")
    document = {"where": "id = ?", "parameters": [1], "key": "k"}
    answer, _ = await asyncio.gather(_post(lake, dict(document)), _finish(lake, 1))
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["state"], said["deleted_rows"], said["replayed"]) == ("done", 1, False)
    assert said["evaluated_at_snapshot_id"] == said["snapshot_id"]
    again = await _post(lake, dict(document))
    assert again.json() == said | {"replayed": True}
    assert again.headers["idempotent-replayed"] == "true"
    other = await _post(lake, {**document, "where": "id = 1 OR id = ?"})
    problem(other, 422, "idempotency_conflict")
    found = await lake.get(f"{_PATH}s/{said['job_id']}")
    assert (found.status_code, found.json()) == (200, said | {"replayed": True})
    waited = await lake.http.post(
        "/v1/query",
        json={"sql": "SELECT 1 FROM events", "min_visibility_token": said["visibility_token"]},
        headers=lake.headers(),
    )
    assert waited.status_code == 200, waited.text


async def test_E7_a_delete_that_is_not_over_in_time_goes_on(lake: Server) -> None:
    answer = await _post(lake, {"where": "id = 1", "timeout_ms": 400})
    assert answer.status_code == 202, answer.text
    said = answer.json()
    assert (said["state"], said["deleted_rows"], said["visibility_token"]) == ("queued", None, None)
    path = f"{_PATH}s/{said['job_id']}"
    failure = {"code": "sql_error", "detail": "bad text"}
    looked, _ = await asyncio.gather(
        lake.get(f"{path}?timeout_ms=10000"), _finish(lake, 0, error=failure)
    )
    assert (looked.status_code, looked.json()["error"]) == (200, failure)


async def test_E7_what_is_wrong_with_a_predicate_is_said_at_once(lake: Server) -> None:
    for where, status, code in (
        ("missing = 1", 400, "sql_error"),
        ("id = 1) OR (true", 400, "sql_error"),
        ("id IN (SELECT 1)", 403, "statement_not_allowed"),
        ("random() < 1", 403, "statement_not_allowed"),
        ("id", 400, "sql_error"),
        ("id = ?", 400, "sql_error"),
    ):
        found = problem(await _post(lake, {"where": where}), status, code)
        assert "other" not in found["detail"]
    documents: tuple[Any, ...] = (
        {},
        {"where": 1},
        {"where": "true", "more": 1},
        [],
        {"where": "true", "timeout_ms": 0},
    )
    for document in documents:
        assert (await _post(lake, document)).status_code == 400
    assert not lake.lake.state.jobs


async def test_D10_a_delete_needs_ingest_and_query_on_its_table(lake: Server) -> None:
    for grants, status, code in (
        ((Grant("ingest"),), 403, "forbidden"),
        ((Grant("query"), Grant("create")), 403, "forbidden"),
        ((Grant("ingest"), Grant("query", ("other",))), 403, "forbidden"),
        ((Grant("ingest", ("other",)), Grant("query", ("other",))), 404, "table_not_found"),
    ):
        key = await lake.new_key(*grants, principal=f"p{status}{len(grants)}")
        problem(await _post(lake, {"where": "true"}, api_key=key), status, code)
    answer = await _post(lake, {"where": "true", "timeout_ms": 400})
    job_id = answer.json()["job_id"]
    stranger = await lake.new_key(Grant("ingest"), Grant("query"), principal="stranger")
    hidden = await lake.get(f"{_PATH}s/{job_id}", api_key=stranger)
    absent = await lake.get(f"{_PATH}s/{new_uuid()}", api_key=stranger)
    assert problem(hidden, 404, "job_not_found")["title"] == absent.json()["title"]


class _Agreeing:
    """Every predicate is sound: the engine of these tests is scripted."""

    async def check(self, request: PredicateRequest) -> None:
        assert request.where


async def test_E7_the_client_and_the_command_delete_rows(commands: Lake) -> None:
    dependencies = commands.server.app.dependencies
    assert dependencies is not None
    object.__setattr__(dependencies, "predicates", _Agreeing())
    with connect(commands.url, commands.server.key) as client:
        found, _ = await asyncio.gather(
            asyncio.to_thread(client.delete, "events", "id = ?", [1], key="k"),
            _finish(commands.server, 1),
        )
        assert (found.done, found.rows, found.replayed) == (True, 1, False)
        again = await asyncio.to_thread(
            client.delete, "events", "id = ?", [1], key="k", timeout_s=5.0
        )
        assert (again.rows, again.replayed, again.token) == (1, True, found.token)
        late = await asyncio.to_thread(client.delete, "events", "true", timeout_s=0.2)
        assert not late.done
        with pytest.raises(ValueError, match="not done"):
            await asyncio.to_thread(client.query, "SELECT 1", after=late)
        await _finish(commands.server, 0, error={"code": "sql_error", "detail": "no"})
        with pytest.raises(errors.SqlError):
            await asyncio.to_thread(client.deletion, "events", late.job_id, wait_s=5.0)
    done, _ = await asyncio.gather(
        commands.run("delete", "--table", "events", "--where", "id = ?", "-p", "1"),
        _finish(commands.server, 3),
    )
    assert (done.return_value, done.output.splitlines()[0]) == (
        0,
        f"deleted 3 rows with snapshot {commands.server.lake.state.head_id}",
    )
    counted, _ = await asyncio.gather(
        commands.run("delete", "--table", "events", "--where", "true", "--dry-run", "--json"),
        _finish(commands.server, 2),
    )
    assert json.loads(counted.output)["deleted_rows"] == 2
    late_run = await commands.run(
        "delete", "--table", "events", "--where", "true", "--timeout-s", "1.5"
    )
    assert late_run.return_value == 3
    assert "goes on" in late_run.output
