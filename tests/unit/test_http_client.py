"""The Python client against a real socket: round trips, typed errors, and retries that are safe."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import json
import math
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator

import pyarrow as pa
import pytest

import lakebus
from lakebus import client as clients
from lakebus.client_forms import encode_rows, json_text
from lakebus.client_http import Connections
from lakebus.errors import (
    Backpressure,
    BodyTooLarge,
    IdempotencyConflict,
    MalformedRequest,
    OutcomeUnknown,
    RowsInvalid,
    SchemaVersionMismatch,
    SqlError,
    TableNotFound,
    Unauthenticated,
    Unavailable,
)
from tests.unit.client_rig import accepted, answer_of, header_of, listening, scripted
from tests.unit.http_rig import Server, server


@pytest.fixture
async def lake() -> AsyncIterator[tuple[Server, str]]:
    async with server() as made, listening(made) as url:
        yield made, url


def test_importing_the_client_is_light() -> None:
    code = (
        "import sys, lakebus;"
        "client = {'http.client', 'ssl', 'email', 'lakebus.client'} & set(sys.modules);"
        "import lakebus.client, lakebus.dbapi, lakebus.writer;"
        "heavy = {'pyarrow', 'pandas', 'polars', 'numpy', 'ray', 'duckdb', 'pydantic', 'httpx'};"
        "sys.exit(', '.join(client | heavy & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_A3_rows_go_in_once_however_often_they_are_sent(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        await client.create_table("events", {"id": "bigint", "price": "decimal(10,2)"})
        rows = [{"id": 1, "price": decimal.Decimal("1.50")}, {"id": 2}]
        first = await client.ingest("events", rows, key="k")
        again = await client.ingest("events", pa.Table.from_pylist(rows), key="k")
        assert (first.replayed, again.replayed) == (False, True)
        assert first.receipt == again.receipt
        assert first.receipt.accepted_at.tzinfo is not None
        with pytest.raises(IdempotencyConflict) as conflict:
            await client.ingest("events", [{"id": 3}], key="k")
        assert conflict.value.members["batch_id"] == first.receipt.batch_id
        assert made.entries == 1


async def test_a_table_is_laid_out_and_changed(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        table = await client.create_table(
            "events",
            {"id": "integer", "at": "date"},
            partition_by=["month(at)"],
            sort_by=["hilbert(id, at)"],
            keep_rows=("at", "4 weeks"),
        )
        assert table["partition_by"] == ["month(at)"]
        assert table["retention"] == {"rows": {"column": "at", "for_s": 2_419_200}}
        changed = await client.alter_table(
            "events",
            rename_columns={"at": "day"},
            widen_columns={"id": "bigint"},
            add_columns={"note": "varchar"},
            partition_by=[],
            schema_version=1,
        )
        assert [c["name"] for c in changed["columns"]] == ["id", "day", "note"]
        assert changed["columns"][0]["type"] == "bigint"
        assert (changed["partition_by"], changed["sort_by"]) == ([], ["hilbert(id, day)"])
        assert changed["retention"]["rows"]["column"] == "day"
        changed = await client.alter_table("events", sort_by=["note"], keep_rows="forever")
        assert (changed["sort_by"], changed["retention"]) == (["note"], None)
        with pytest.raises(SchemaVersionMismatch):
            await client.alter_table("events", sort_by=[], schema_version=1)


async def test_D6_an_answer_sees_what_was_sent_before(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        await client.create_table("events", [{"name": "id", "type": "bigint"}])
        sent = await client.ingest("events", ({"id": n} for n in range(3)))
        asking = asyncio.create_task(client.query("from events", after=sent))
        (published,) = await made.publish()
        answer = await asking
        assert answer.snapshot_id == published.snapshot_id
        assert answer.as_dicts() == [{"n": 1}]
        assert answer.value() == 1
        assert made.engine.plans[0].integers == "number"
        await client.wait_visible([answer, sent, sent.token])
        state = await client.batch(sent.receipt.batch_id, wait_s=1)
        assert state["state"] == "published"
        assert [t["rows"] for t in await client.tables()] == [3]
        assert (await client.drop_table("events"))["state"] == "dropped"
        with pytest.raises(TableNotFound):
            await client.table("events")


async def test_arrow_answers_become_tables(lake: tuple[Server, str]) -> None:
    made, url = lake
    table = pa.table({"n": [1, 2]})
    made.engine.parts = [encode_rows(table)[0]]
    async with clients.connect_async(url, made.key) as client:
        assert (await client.query_arrow("select 1")).equals(table)


async def test_errors_are_typed_and_keep_their_members(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        await client.create_table("events", {"id": "bigint"})
        with pytest.raises(RowsInvalid) as invalid:
            await client.ingest("events", [{"id": "x"}])
        assert invalid.value.members["errors"][0]["column"] == "id"
        made.engine.fail = SqlError("bad", position=3)
        with pytest.raises(SqlError) as wrong:
            await client.query("x")
        assert wrong.value.members["position"] == 3
    async with clients.connect_async(url, "lbk_nobody") as client:
        with pytest.raises(Unauthenticated):
            await client.tables()


async def test_A6_the_client_resolves_an_unknown_outcome(lake: tuple[Server, str]) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        await client.create_table("events", {"id": "bigint"})
        made.lake.faults.lose_replies.add("append")
        sent = await client.ingest("events", [{"id": 1}])
        assert sent.replayed is True
        assert made.entries == 1


async def test_a_client_that_leaves_stops_its_query(lake: tuple[Server, str]) -> None:
    """D9 over a real socket."""

    made, url = lake
    made.engine.gate = asyncio.Event()
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"sql": "select 1"})
    head = (
        f"POST /v1/query HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {made.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    )
    writer.write(head.encode())
    await asyncio.wait_for(made.engine.executing.wait(), 5)
    writer.transport.abort()
    await asyncio.wait_for(made.engine.results[0].closed.wait(), 5)


# --- servers that misbehave ----------------------------------------------------------------------


def test_A6_every_retry_carries_the_same_key_and_first_attempt() -> None:
    unknown = {"code": "outcome_unknown", "detail": "?", "retryable": True}
    script = [None, answer_of(500, b"Internal Server Error"), answer_of(503, unknown)]
    with (
        scripted([*script, answer_of(202, accepted())]) as (url, requests),
        clients.connect(url, "k") as client,
    ):
        assert client.ingest("t", [{"id": 1}]).receipt.batch_id == "b1-0-0"
    assert len(requests) == 4
    for name in (b"idempotency-key", b"idempotency-not-before"):
        assert len({header_of(request, name) for request in requests}) == 1
    assert len({request.partition(b"\r\n\r\n")[2] for request in requests}) == 1


def test_what_is_asked_for_is_sent() -> None:
    answer = answer_of(200, {**accepted(), "visible": True, "columns_skipped": ["x"]})
    with scripted([answer]) as (url, requests), clients.connect(url, "k") as client:
        sent = client.ingest(
            "a b", {"id": 1}, create=True, wait_visible=True, ordering_key="o", timeout_s=5
        )
    assert (sent.visible, sent.columns_skipped, sent.token) == (True, ("x",), "lb1.x")
    line, _, _ = requests[0].partition(b"\r\n")
    assert line.startswith(b"POST /v1/tables/a%20b/rows?timeout_ms=")
    for asked in (b"wait=visible", b"create=true", b"on_invalid=reject"):
        assert asked in line
    assert header_of(requests[0], b"lakebus-ordering-key").endswith(b" o")


def test_an_application_that_is_not_there_yet_is_waited_for() -> None:
    """The balancer in front of a stack that starts answers 404 in a form of its own."""

    away = answer_of(404, b"Path '/v1/tables/t/rows' not found. Ping http://.../-/routes for paths")
    with (
        scripted([away, away, answer_of(202, accepted())]) as (url, requests),
        clients.connect(url, "k") as client,
    ):
        assert client.ingest("t", [{"id": 1}]).receipt.batch_id == "b1-0-0"
    assert len(requests) == 3


def test_the_pause_that_the_server_asks_for_is_kept_or_the_call_ends() -> None:
    busy = {"code": "backpressure", "detail": "full", "retryable": True}
    with (
        scripted([answer_of(429, busy, "retry-after: 60")]) as (url, requests),
        clients.connect(url, "k", timeout_s=5) as client,
        pytest.raises(Backpressure),
    ):
        client.ingest("t", [{"id": 1}])
    assert len(requests) == 1


def test_A11_an_answer_before_the_body_was_read_is_heard() -> None:
    large = answer_of(413, {"code": "body_too_large", "detail": "less", "retryable": False})
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)  # and not the rest, which is more than lies on the way
                connection.sendall(large)

        thread = threading.Thread(target=refuse)
        thread.start()
        with (
            clients.connect(f"http://127.0.0.1:{listener.getsockname()[1]}", "k") as client,
            pytest.raises(BodyTooLarge),
        ):
            client.ingest("t", (bytes(48 << 20), "text/csv"))
        thread.join()


def test_nothing_gets_into_the_head_of_a_request() -> None:
    with scripted([]) as (url, requests), clients.connect(url, "k") as client:
        with pytest.raises(MalformedRequest, match="visible ASCII"):
            client.ingest("t", (b"", "text/csv\r\nx: y"))
        with pytest.raises(MalformedRequest, match="visible ASCII"):
            client.ingest("t", (b"", "text/é"))
    assert requests == []


async def test_a_connection_is_used_again_and_replaced_when_it_has_gone(
    lake: tuple[Server, str],
) -> None:
    made, url = lake
    async with clients.connect_async(url, made.key) as client:
        seen = {id(one) for _ in range(4) if await client.tables() == [] for one in idle(client)}
        assert len(seen) == 1
        (kept,) = idle(client)
        kept.shutdown(socket.SHUT_RDWR)
        assert await client.tables() == []
        assert idle(client) != [kept]


def idle(client: clients.AsyncClient) -> list[socket.socket]:
    connections = client._client._connections
    assert isinstance(connections, Connections)
    return connections._idle


def test_what_must_not_be_retried_is_not() -> None:
    final = {"code": "outcome_unknown", "detail": "?", "retryable": False}
    with (
        scripted([answer_of(503, final)]) as (url, requests),
        clients.connect(url, "k") as client,
        pytest.raises(OutcomeUnknown),
    ):
        client.ingest("t", [{"id": 1}])
    assert len(requests) == 1


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        clients.connect(f"http://127.0.0.1:{port}", "k", timeout_s=0.2) as client,
        pytest.raises(Unavailable),
    ):
        client.query("select 1")


@pytest.mark.parametrize(
    "url", ["", "localhost:1", "ftp://x", "http://", "http://x:y", "http://[x", "http://x\n", "ray"]
)
def test_bad_addresses_are_refused(url: str) -> None:
    with pytest.raises(MalformedRequest):
        clients.connect(url, "k")


def test_the_package_itself_offers_the_client() -> None:
    assert lakebus.connect is clients.connect
    assert lakebus.Client is clients.Client
    assert all(hasattr(lakebus, name) for name in lakebus.__all__)
    assert set(lakebus.__all__) <= set(dir(lakebus))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lakebus.nothing


def test_values_are_spelled_as_the_api_takes_them() -> None:
    value = {
        "d": decimal.Decimal("1.10"),
        "b": b"\x00\x01",
        "t": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "u": uuid.UUID(int=1),
        "f": [math.nan, math.inf, -math.inf, 1.5],
    }
    assert json.loads(json_text(value)) == {
        "d": "1.10",
        "b": "AAE=",
        "t": "2026-01-01T00:00:00+00:00",
        "u": "00000000-0000-0000-0000-000000000001",
        "f": ["NaN", "Infinity", "-Infinity", 1.5],
    }
    with pytest.raises(TypeError):
        json_text(object())


async def test_D12_a_page_of_changes_is_asked_for_and_read(lake: tuple[Server, str]) -> None:
    made, url = lake
    await made.create()
    made.engine.parts = [b'[["3","0","0","0",7]]']
    async with clients.connect_async(url, made.key) as client:
        await client.ingest("events", [{"id": 7}])
        (published,) = await made.publish()
        pages = [page async for page in client.changes("events", after=2, rows_max=2)]
        assert [(page.after, page.until, page.cursor) for page in pages] == [
            (2, published.snapshot_id, None)
        ]
        assert pages[0].rows == [["3", "0", "0", "0", 7]]
        assert made.engine.plans[0].sql.endswith("LIMIT 2")
        with pytest.raises(TableNotFound):
            await client.changes_page("nothing", after=0)
