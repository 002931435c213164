"""Tables, snapshots and tokens over HTTP (contract A12, D1, D2, D6, D10)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lakebus.tokens import VisibilityToken
from storage.ingesting.grants import Grant
from tests.unit.http_rig import EVENTS, RawExchange, Server, problem, server


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        yield made


async def create(lake: Server, document: Any, **headers: str) -> Any:
    return await lake.http.post("/v1/tables", json=document, headers=lake.headers(**headers))


async def patch(lake: Server, document: Any, **headers: str) -> Any:
    return await lake.http.patch(
        "/v1/tables/events", json=document, headers=lake.headers(**headers)
    )


# --- create --------------------------------------------------------------------------------------


async def test_a_table_is_made_with_ids_version_and_token(lake: Server) -> None:
    answer = await create(lake, EVENTS | {"name": "Sales.Events", "sort_by": ["ID"]})
    document = answer.json()
    assert answer.status_code == 201
    assert (document["name"], document["schema_version"]) == ("sales.events", 1)
    assert [c["column_id"] for c in document["columns"]] == [1, 2, 3, 4]
    assert document["columns"][2]["type"] == "decimal(10,2)"
    assert document["sort_by"] == ["id"]
    token = lake.lake.codec.decode(document["visibility_token"])
    assert token.floor == document["snapshot_id"] == lake.lake.state.head_id
    problem(await create(lake, EVENTS | {"name": "SALES.EVENTS"}), 409, "table_exists")


async def test_creating_again_is_safe_when_said_so(lake: Server) -> None:
    assert (await create(lake, EVENTS, idempotency_key="k")).status_code == 201
    found = await create(lake, EVENTS | {"if_not_exists": True})
    assert (found.status_code, found.json()["created"]) == (200, False)
    again = await create(lake, EVENTS, idempotency_key="k")
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    other = EVENTS | {"columns": [{"name": "id", "type": "integer"}]}
    problem(await create(lake, other, idempotency_key="k"), 409, "table_exists")
    assert lake.lake.state.head_id == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "a b"}, "schema_invalid"),
        ({"name": "a.b.c"}, "schema_invalid"),
        ({"name": ""}, "schema_invalid"),
        ({"name": "x" * 64}, "schema_invalid"),
        ({"columns": []}, "schema_invalid"),
        ({"columns": [{"name": "$row", "type": "bigint"}]}, "schema_invalid"),
        ({"columns": [{"name": "a", "type": "nonsense"}]}, "schema_invalid"),
        ({"columns": [{"name": "a", "type": "integer[3]"}]}, "schema_invalid"),
        ({"columns": [{"name": "a", "type": "decimal(39,0)"}]}, "schema_invalid"),
        ({"columns": [{"name": "a", "type": "date"}] * 2}, "schema_invalid"),
        (
            {"columns": [{"name": "a", "type": "date"}, {"name": "A", "type": "date"}]},
            "schema_invalid",
        ),
        ({"columns": [{"name": f"c{n}", "type": "date"} for n in range(1001)]}, "schema_invalid"),
        ({"partition_by": ["nothing"]}, "schema_invalid"),
        ({"sort_by": ["id", "ID"]}, "schema_invalid"),
        ({"retention": {"rows": "1 day"}}, "schema_invalid"),
        ({"columns": [{"name": "a"}]}, "malformed_request"),
        ({"columns": "a"}, "malformed_request"),
        ({"columns": [{"name": "a", "type": 7}]}, "malformed_request"),
        ({"name": None}, "malformed_request"),
        ({"more": 1}, "malformed_request"),
        ({"if_not_exists": "yes"}, "malformed_request"),
    ],
)
async def test_bad_definitions_are_refused(lake: Server, change: dict[str, Any], code: str) -> None:
    answer = await create(lake, EVENTS | change)
    problem(answer, 400 if code == "malformed_request" else 422, code)
    assert not lake.lake.state.tables


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed_body"),
        (b"[]", "application/json", 400, "malformed_request"),
        (b'{"name": "\xff"}', "application/json", 400, "malformed_body"),
        (b'{"name":' * 100_000, "application/json", 400, None),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b" " * 1_100_000 + b"{}", "application/json", 413, "body_too_large"),
    ],
)
async def test_bad_documents_are_refused(
    lake: Server, body: bytes, content_type: str, status: int, code: str | None
) -> None:
    answer = await lake.http.post(
        "/v1/tables", content=body, headers=lake.headers(content_type=content_type)
    )
    problem(answer, status, code or answer.json()["code"])


# --- change --------------------------------------------------------------------------------------


async def test_columns_are_added_renamed_and_dropped(lake: Server) -> None:
    await lake.create()
    answer = await patch(
        lake,
        {
            "drop_columns": ["note"],
            "rename_columns": {"amount": "Price"},
            "add_columns": [{"name": "note", "type": "text"}],
        },
        if_match='"1"',
    )
    document = answer.json()
    assert answer.status_code == 200
    assert document["schema_version"] == 2
    assert [(c["column_id"], c["name"]) for c in document["columns"]] == [
        (1, "id"),
        (3, "price"),
        (4, "at"),
        (5, "note"),
    ]
    token = lake.lake.codec.decode(document["visibility_token"])
    assert token.floor == document["snapshot_id"]
    assert (await lake.send([{"id": 1, "price": "1.25", "note": "x"}])).status_code == 202


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({}, 422, "schema_change_invalid"),
        ({"drop_columns": ["nothing"]}, 422, "schema_change_invalid"),
        ({"drop_columns": ["id", "id"]}, 422, "schema_change_invalid"),
        ({"drop_columns": ["id", "note", "amount", "at"]}, 422, "schema_change_invalid"),
        ({"rename_columns": {"id": "note"}}, 422, "schema_change_invalid"),
        ({"rename_columns": {"nothing": "x"}}, 422, "schema_change_invalid"),
        ({"add_columns": [{"name": "id", "type": "date"}]}, 422, "schema_change_invalid"),
        (
            {"add_columns": [{"name": "x", "type": "date", "nullable": False}]},
            422,
            "schema_change_invalid",
        ),
        ({"add_columns": [{"name": "x", "type": "y"}]}, 422, "schema_invalid"),
        ({"widen": {"id": "hugeint"}}, 400, "malformed_request"),
    ],
)
async def test_bad_changes_are_refused(
    lake: Server, change: dict[str, Any], status: int, code: str
) -> None:
    await lake.create()
    problem(await patch(lake, change), status, code)
    assert lake.lake.state.tables[1].current.version == 1


async def test_a_change_of_another_version_is_refused(lake: Server) -> None:
    await lake.create()
    change = {"drop_columns": ["note"]}
    document = problem(await patch(lake, change, if_match="7"), 409, "schema_version_mismatch")
    assert document["schema_version"] == 1
    problem(await patch(lake, change, if_match='"x"'), 400, "malformed_request")
    assert (await patch(lake, change, if_match="1")).status_code == 200


# --- drop ----------------------------------------------------------------------------------------


async def test_A12_a_drop_waits_for_what_was_accepted_before(lake: Server) -> None:
    await lake.create()
    batch_id = (await lake.send([{"id": 1}])).json()["receipt"]["batch_id"]
    dropping = asyncio.create_task(
        lake.http.delete("/v1/tables/events?timeout_ms=5000", headers=lake.headers())
    )
    async with asyncio.timeout(5):
        while lake.lake.state.tables[1].ticket is None:
            await asyncio.sleep(0)
    closed = await lake.send([{"id": 2}])
    assert "being dropped" in problem(closed, 404, "table_not_found")["detail"]
    (published,) = await lake.publish()
    answer = await dropping
    assert (answer.status_code, answer.json()["state"]) == (200, "dropped")
    assert published.snapshot_id is not None
    assert answer.json()["snapshot_id"] > published.snapshot_id
    assert (await lake.get(f"/v1/batches/{batch_id}")).json()["state"] == "published"
    problem(await lake.get("/v1/tables/events"), 404, "table_not_found")
    assert lake.entries == 1


async def test_A12_a_drop_that_takes_long_is_begun(lake: Server) -> None:
    await lake.create()
    await lake.send([{"id": 1}])
    answer = await lake.http.delete("/v1/tables/events?timeout_ms=30", headers=lake.headers())
    assert (answer.status_code, answer.json()["state"]) == (202, "closing")
    await lake.publish()
    again = await lake.http.delete("/v1/tables/events", headers=lake.headers())
    assert again.json()["state"] == "dropped"


# --- look ----------------------------------------------------------------------------------------


async def test_tables_tell_rows_bytes_and_files(lake: Server) -> None:
    await lake.create()
    await lake.create(EVENTS | {"name": "empty"})
    token = (await lake.send([{"id": 1}, {"id": 2}])).json()["receipt"]["visibility_token"]
    (published,) = await lake.publish()
    answer = (await lake.get(f"/v1/tables?min_visibility_token={token}")).json()
    assert [(t["name"], t["rows"], t["files"]) for t in answer["tables"]] == [
        ("empty", 0, 0),
        ("events", 2, 1),
    ]
    one = (await lake.get("/v1/tables/Events")).json()
    assert one["last_snapshot_id"] == published.snapshot_id == answer["snapshot_id"]
    files = (await lake.get("/v1/tables/events/files")).json()["files"]
    assert [(f["rows"], f["first_snapshot_id"]) for f in files] == [(2, published.snapshot_id)]
    before = await lake.get(f"/v1/tables/events/files?snapshot={one['last_snapshot_id'] - 1}")
    assert before.json()["files"] == []


async def test_D10_tables_that_one_may_not_see_do_not_exist(lake: Server) -> None:
    await lake.create()
    await lake.create(EVENTS | {"name": "sales.one"})
    await lake.send([{"id": 1}])
    await lake.publish()
    key = await lake.new_key(
        Grant("query", ("sales.*",)), Grant("ingest", ("sales.*",)), principal="p"
    )
    seen = (await lake.get("/v1/tables", api_key=key)).json()["tables"]
    assert [table["name"] for table in seen] == ["sales.one"]
    for path in ("/v1/tables/{}", "/v1/tables/{}/files"):
        hidden = problem(await lake.get(path.format("events"), api_key=key), 404, "table_not_found")
        absent = problem(await lake.get(path.format("evontz"), api_key=key), 404, "table_not_found")
        for document in (hidden, absent):
            del document["request_id"]
        assert str(hidden).replace("events", "?") == str(absent).replace("evontz", "?")
    snapshots = (await lake.get("/v1/snapshots", api_key=key)).json()["snapshots"]
    assert {t["table"] for s in snapshots for t in s["tables"]} == {"sales.one"}
    assert sum(s["rows_added"] for s in snapshots) == 0
    hidden_rows = await lake.send([{"id": 1}], api_key=key)
    problem(hidden_rows, 404, "table_not_found")


# --- snapshots and tokens ------------------------------------------------------------------------


async def test_snapshots_are_listed_newest_first(lake: Server) -> None:
    await lake.create()
    await lake.send([{"id": 1}])
    (published,) = await lake.publish()
    listed = (await lake.get("/v1/snapshots")).json()["snapshots"]
    assert [s["snapshot_id"] for s in listed] == [3, 2, 1]
    assert [s["operation"] for s in listed] == ["append", "create", "genesis"]
    assert (listed[0]["rows_added"], listed[0]["files_added"]) == (1, 1)
    assert listed[0]["tables"][0]["table"] == "events"
    assert listed[0]["parent_id"] == 2
    page = (await lake.get("/v1/snapshots?limit=1&before=3")).json()["snapshots"]
    assert [s["snapshot_id"] for s in page] == [2]
    newest = (await lake.get("/v1/snapshots/latest")).json()
    assert newest["snapshot_id"] == published.snapshot_id
    assert lake.lake.codec.decode(newest["visibility_token"]).floor == 3


async def test_D2_snapshots_that_cannot_be_read_say_why(lake: Server) -> None:
    await lake.create()
    await lake.create(EVENTS | {"name": "others"})
    lake.lake.expire_snapshots(before=3)
    document = problem(await lake.get("/v1/snapshots/2"), 410, "snapshot_expired")
    assert document["oldest_snapshot_id"] == 3
    for bad in ("99", "x", "-1", "9" * 30, "1.0"):
        problem(await lake.get(f"/v1/snapshots/{bad}"), 404, "snapshot_not_found")
    problem(await lake.get("/v1/snapshots?limit=0"), 400, "malformed_request")
    problem(await lake.get("/v1/snapshots?before=-1"), 400, "malformed_request")
    problem(await lake.get("/v1/tables/events/files?snapshot=x"), 400, "malformed_request")
    problem(await lake.get("/v1/tables/events/files?snapshot=99"), 404, "snapshot_not_found")


async def test_D4_visibility_is_waited_for_without_a_query(lake: Server) -> None:
    await lake.create()
    token = (await lake.send([{"id": 1}])).json()["receipt"]["visibility_token"]
    early = problem(
        await lake.get(f"/v1/visibility?token={token}&timeout_ms=20"), 504, "visibility_timeout"
    )
    assert early["retryable"] is True
    assert early["waited_ms"] >= 0
    waiting = asyncio.create_task(
        lake.http.post("/v1/visibility", json={"token": [token]}, headers=lake.headers())
    )
    await asyncio.sleep(0)
    (published,) = await lake.publish()
    document = (await waiting).json()
    assert (document["visible"], document["snapshot_id"]) == (True, published.snapshot_id)
    floor = lake.lake.codec.decode(document["visibility_token"]).floor
    assert floor == published.snapshot_id


async def test_D5_tokens_that_were_not_issued_here_are_refused(lake: Server) -> None:
    history = lake.lake.history
    ahead = lake.lake.codec.encode(VisibilityToken(history, 0, {0: 10}))
    problem(await lake.get(f"/v1/visibility?token={ahead}"), 422, "token_unknown")
    beyond = lake.lake.codec.encode(VisibilityToken(history, 99))
    problem(await lake.get(f"/v1/visibility?token={beyond}"), 422, "token_unknown")
    for bad in ("x", ahead[:-2], "lb1." + "A" * 9000, "%C3%A9"):
        problem(await lake.get(f"/v1/visibility?token={bad}"), 400, "malformed_token")
    problem(await lake.get("/v1/visibility"), 400, "malformed_request")
    post = lake.http.post
    bad_documents: list[dict[str, Any]] = [
        {},
        {"token": 7},
        {"token": []},
        {"token": "x", "timeout_ms": 10**9},
    ]
    for document in bad_documents:
        answer = await post("/v1/visibility", json=document, headers=lake.headers())
        problem(answer, 400, "malformed_request")


async def test_D6_tokens_of_a_lost_line_are_gone(lake: Server) -> None:
    await lake.create()
    backup = lake.lake.backup()
    token = (await lake.send([{"id": 1}])).json()["receipt"]["visibility_token"]
    lake.lake.restore(backup)
    problem(await lake.get(f"/v1/visibility?token={token}"), 410, "token_history_lost")


async def test_a_document_is_read_while_it_comes(lake: Server) -> None:
    exchange = RawExchange()
    await exchange.run(
        lake.app,
        "POST",
        "/v1/tables",
        headers=[("authorization", f"Bearer {lake.key}"), ("content-type", "application/json")],
        parts=[b'{"name": "t", "col', b'umns": [{"name": "a", "type": "date"}]}'],
    )
    assert exchange.status == 201
