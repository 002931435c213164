"""The application as such: routing, health, the description, quarantine, faults of servers."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve_app.app import API_ROUTES, QUERY_ROUTES, create_api_app, create_app, create_query_app
from serve_app.dependencies import Dependencies
from serve_app.problems import STATUS, render
from storage.ingesting.grants import Grant
from tests.unit.http_rig import EVENTS, RawExchange, Server, problem, server


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


# --- routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v2/tables",
        "/v1/tables/",
        "/v1/tables/a/b",
        "/v1/tables/events/change",
        "/v1/admin/jobs/a/b",
        "/v1/admin/backups",
        "/v1/query/",
        "//v1/tables",
        "/v1/tables/%2e%2e/rows/x",
    ],
)
async def test_unknown_paths_are_not_found(lake: Server, path: str) -> None:
    problem(await lake.get(path), 404, "not_found")


async def test_other_methods_are_refused_with_what_is_supported(lake: Server) -> None:
    for method, path in (("PUT", "/v1/tables"), ("POST", "/v1/snapshots"), ("X" * 99, "/v1/rows")):
        answer = await lake.http.request(method, path, headers=lake.headers())
        document = problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == ", ".join(document["supported"])


async def test_head_is_get_without_a_body(lake: Server) -> None:
    answer = await lake.http.head("/v1/tables/events", headers=lake.headers())
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


async def test_request_ids_are_taken_or_made(lake: Server) -> None:
    given = await lake.get("/v1/tables", x_request_id="mine-1")
    assert given.headers["x-request-id"] == "mine-1"
    made = [(await lake.get("/v1/tables")).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    for bad in ("a b", "x" * 129):
        answer = await lake.get("/v1/tables", x_request_id=bad)
        assert answer.headers["x-request-id"] != bad


async def test_an_id_is_answered_once_where_the_server_in_front_echoes_it(lake: Server) -> None:
    lake.app.ids_echoed = True
    given = await lake.get("/v1/nothing", x_request_id="mine-1")
    assert "x-request-id" not in given.headers
    assert given.json()["request_id"] == "mine-1"
    made = await lake.get("/v1/nothing", x_request_id="a b")
    assert made.headers["x-request-id"] == made.json()["request_id"] != "a b"


async def test_websockets_are_closed(lake: Server) -> None:
    exchange = RawExchange()

    async def send(message: Any) -> None:
        exchange.sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    await lake.app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert exchange.sent == [{"type": "websocket.close", "code": 1002}]


# --- health --------------------------------------------------------------------------------------


async def test_readyz_names_what_does_not_answer(lake: Server) -> None:
    ready = await lake.http.get("/readyz")
    assert ready.json() == {"status": "ready", "checks": ["catalog", "bus"]}
    lake.lake.faults.unreachable = True
    document = problem(await lake.http.get("/readyz"), 503, "unavailable")
    assert document["failing"] == ["catalog", "bus"]
    assert (await lake.http.get("/healthz")).json() == {"status": "ok"}


async def test_status_tells_the_lag_of_each_shard(lake: Server) -> None:
    await lake.send([{"id": 1}])
    document = (await lake.get("/v1/admin/status")).json()
    assert sum(shard["lag_entries"] for shard in document["shards"]) == 1
    assert document["snapshot"]["snapshot_id"] == 2
    await lake.publish()
    document = (await lake.get("/v1/admin/status")).json()
    assert sum(shard["lag_entries"] for shard in document["shards"]) == 0
    assert [s["end"] for s in document["shards"]] == [s["watermark"] for s in document["shards"]]


# --- the description -----------------------------------------------------------------------------


async def test_the_description_is_true_to_the_routes(lake: Server) -> None:
    document = (await lake.get("/openapi.json")).json()
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    served = {(route.method, route.path) for route in lake.app.router.routes}
    assert described == served
    for route in lake.app.router.routes:
        operation = document["paths"][route.path][route.method.lower()]
        named = [p["name"] for p in operation["parameters"] if p["in"] == "query"]
        assert named == list(route.parameters)
        assert ("security" in operation) == (not route.open)
    problems = document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]
    assert set(problems) == {*STATUS, "internal_error"}


async def test_every_described_parameter_is_taken(lake: Server) -> None:
    """A name that the description has is never answered as unknown."""

    for route in (*API_ROUTES, *QUERY_ROUTES):
        for name in route.parameters:
            answer = await lake.http.request(
                route.method,
                re.sub(r"\{\w+\}", "1", route.path),
                params={name: "\u0001"},
                headers=lake.headers(),
            )
            assert "unknown parameter" not in answer.text


async def test_the_page_for_people_needs_nothing_from_elsewhere(lake: Server) -> None:
    page = (await lake.get("/docs")).text
    assert not re.search(r"(src|href)=\"(?!/openapi\.json)", page)
    for code in STATUS:
        assert f'id="{code}"' in page


async def test_two_applications_are_the_one(lake: Server) -> None:
    whole = {(r.method, r.path) for r in create_app(dependencies(lake)).router.routes}
    api = {(r.method, r.path) for r in create_api_app(dependencies(lake)).router.routes}
    sql = {(r.method, r.path) for r in create_query_app(dependencies(lake)).router.routes}
    assert api | sql == whole
    assert {path for _, path in sql} == {"/v1/query", "/healthz", "/readyz"}


def dependencies(lake: Server) -> Dependencies:
    assert lake.app.dependencies is not None
    return lake.app.dependencies


# --- life ----------------------------------------------------------------------------------------


async def test_components_are_opened_and_closed_with_the_lifespan(lake: Server) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[Dependencies]:
        seen.append("open")
        yield dependencies(lake)
        seen.append("closed")

    app = create_app(opened)
    incoming = ["lifespan.startup", "lifespan.shutdown"]

    async def receive() -> dict[str, Any]:
        return {"type": incoming.pop(0)}

    async def send(message: Any) -> None:
        seen.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert seen == ["open", "lifespan.startup.complete", "closed", "lifespan.shutdown.complete"]


def test_unknown_errors_say_nothing() -> None:
    status, _, body = render(ValueError("/etc/secret"), request_id="r")
    assert status == 500
    assert b"secret" not in body
    assert json.loads(body)["request_id"] == "r"


# --- quarantine ----------------------------------------------------------------------------------


async def quarantined(lake: Server, rows: Any, table: str = "events") -> int:
    await lake.send(rows, table=table)
    await lake.publish(quarantine=True)
    items = (await lake.get("/v1/admin/quarantine")).json()["items"]
    return int(items[0]["quarantine_id"])


async def replay(lake: Server, number: int, rows: Any = None, **headers: str) -> Any:
    path = f"/v1/admin/quarantine/{number}/replay"
    if rows is None:
        return await lake.http.post(path, headers=lake.headers(**headers))
    return await lake.http.post(path, json=rows, headers=lake.headers(**headers))


async def test_B9_a_replay_is_one_entry_however_often_it_is_asked_for(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1, "amount": "1.50"}])
    shown = (await lake.get(f"/v1/admin/quarantine/{number}")).json()
    assert shown["reason"] == "poison"
    assert shown["rows_json"] == {"events": [{"id": 1, "note": None, "amount": "1.50", "at": None}]}
    first = await replay(lake, number)
    assert first.status_code == 202, first.text
    again = await replay(lake, number)
    assert again.json() == {"receipt": first.json()["receipt"], "replayed": True}
    assert lake.entries == 2
    batch = (await lake.get(f"/v1/batches/{shown['batch_id']}")).json()
    assert batch["successor_batch_id"] == first.json()["receipt"]["batch_id"]
    other = await replay(lake, number, [{"id": 2}])
    problem(other, 422, "idempotency_conflict")
    (published,) = await lake.publish()
    assert published.snapshot_id is not None


async def test_B9_fixed_rows_are_sent_instead(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1}])
    problem(await replay(lake, number, [{"id": "x"}]), 422, "rows_invalid")
    problem(await replay(lake, number, []), 400, "malformed_request")
    fixed = await replay(lake, number, [{"id": 7}, {"id": 8}])
    assert fixed.json()["receipt"]["rows"] == 2
    problem(await replay(lake, number), 422, "idempotency_conflict")


async def test_B9_a_replay_follows_the_schema_of_today(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1, "note": "x"}])
    await lake.http.patch(
        "/v1/tables/events",
        json={"drop_columns": ["note"], "add_columns": [{"name": "late", "type": "date"}]},
        headers=lake.headers(),
    )
    assert (await replay(lake, number)).status_code == 202
    await lake.http.delete("/v1/tables/events?timeout_ms=1", headers=lake.headers())
    problem(await replay(lake, number), 404, "table_not_found")


async def test_B9_rejected_rows_are_fixed_and_sent(lake: Server) -> None:
    await lake.send([{"id": 1}, {"id": "x"}], query="?on_invalid=quarantine")
    (item,) = (await lake.get("/v1/admin/quarantine")).json()["items"]
    number = item["quarantine_id"]
    problem(await replay(lake, number), 422, "rows_invalid")
    fixed = await replay(lake, number, [{"id": 2}])
    assert fixed.json()["receipt"]["rows"] == 1
    assert (await lake.get("/v1/admin/quarantine")).json()["items"][0][
        "successor_batch_id"
    ] == fixed.json()["receipt"]["batch_id"]


async def test_B9_rows_whose_bytes_are_gone_are_sent_by_who_has_them(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1}])
    await lake.bus.erase_quarantined(number, reason="lost")
    assert (await lake.get(f"/v1/admin/quarantine/{number}")).json()["rows_json"] is None
    found = problem(await replay(lake, number), 400, "malformed_request")
    assert "send the rows in the body" in found["detail"]
    answer = await replay(lake, number, [{"id": 1}])
    assert answer.json()["receipt"]["rows"] == 1
    assert lake.entries == 2


async def test_B9_several_tables_are_replayed_together(lake: Server) -> None:
    await lake.create(EVENTS | {"name": "others"})
    number = await quarantined(lake, {"events": [{"id": 1}], "others": [{"id": 2}]}, table="*")
    problem(await replay(lake, number, {"nope": [{"id": 1}]}), 400, "malformed_request")
    answer = await replay(lake, number)
    assert (answer.json()["receipt"]["rows"], answer.json()["receipt"]["target"]) == (2, "*")


async def test_quarantined_rows_can_be_dropped(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1}])
    path = f"/v1/admin/quarantine/{number}"
    assert (await lake.http.delete(path, headers=lake.headers())).json()["dropped"] is True
    problem(await replay(lake, number), 404, "not_found")
    for bad in ("x", "-1", "9" * 40, "99"):
        problem(await lake.get(f"/v1/admin/quarantine/{bad}"), 404, "not_found")
    actions = [r["action"] for r in (await lake.get("/v1/admin/audit")).json()["records"]]
    assert actions[0] == "quarantine.drop"


async def test_D10_quarantine_of_other_tables_is_not_there(lake: Server) -> None:
    number = await quarantined(lake, [{"id": 1}])
    part = await lake.new_key(Grant("admin", ("sales.*",)), principal="part")
    listed = await lake.get("/v1/admin/quarantine", api_key=part)
    assert listed.json() == {"items": []}
    problem(await lake.get(f"/v1/admin/quarantine/{number}", api_key=part), 404, "not_found")
