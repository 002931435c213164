"""What the door refuses: status, code, members, and that nothing is left behind (contract A)."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pytest

from lakebus.errors import Unavailable, all_errors
from lakebus.schemas import Column
from serve_app.dependencies import HttpLimits
from serve_app.problems import STATUS
from storage.ingesting.grants import Grant
from storage.ingesting.requests import IngestSettings
from tests.unit.http_rig import ARROW, EVENTS, NDJSON, RawExchange, Server, problem, server

LIMIT = 100_000


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    limits = HttpLimits(body_bytes_max=LIMIT, inflight_bytes_max=4 * LIMIT)
    async with server(limits=limits, ingest_settings=IngestSettings(rows_max=1000)) as made:
        await made.create()
        yield made
        assert made.budget.held_bytes == 0


def test_every_error_that_may_reach_a_caller_has_a_status() -> None:
    codes = {kind.code for kind in all_errors()}
    inside = {
        "internal_error",
        "lease_lost",
        "corrupt",
        "start_refused",
        "configuration_error",
    }
    assert codes - inside == set(STATUS)


# --- A10: rows that do not fit -----------------------------------------------------------------


async def test_A10_bad_rows_are_named_and_nothing_is_stored(lake: Server) -> None:
    rows = [
        {"id": 1, "amount": "1.005"},
        {"id": 2},
        {"id": 9223372036854775808},
        {"id": None},
        {"id": 1.5, "extra": True},
    ]
    document = problem(await lake.send(rows), 422, "rows_invalid")
    found = {(error["row"], error["column"]) for error in document["errors"]}
    assert found == {(0, "amount"), (2, "id"), (3, "id"), (4, "id"), (4, "extra")}
    assert document["error_count"] == 5
    assert all(set(e) == {"row", "column", "reason", "value"} for e in document["errors"])
    assert lake.untouched


async def test_A10_the_first_hundred_errors_are_shown_and_all_counted(lake: Server) -> None:
    document = problem(await lake.send([{"id": "x"}] * 250), 422, "rows_invalid")
    assert (len(document["errors"]), document["error_count"]) == (100, 250)
    assert lake.untouched


async def test_A10_bad_rows_can_be_set_aside_in_the_same_entry(lake: Server) -> None:
    rows = [{"id": 1}, {"id": "x", "note": "n"}, {"id": 3}]
    answer = await lake.send(rows, key="k", query="?on_invalid=quarantine")
    receipt = answer.json()["receipt"]
    assert (answer.status_code, receipt["rows"], receipt["rows_rejected"]) == (202, 2, 1)
    (item,) = (await lake.get("/v1/admin/quarantine")).json()["items"]
    assert (item["kind"], item["batch_id"], item["rows"]) == (
        "rejects",
        receipt["batch_id"],
        1,
    )
    shown = (await lake.get(f"/v1/admin/quarantine/{item['quarantine_id']}")).json()["rows_json"]
    assert shown["rows"][0]["value"] == rows[1]
    assert shown["rows"][0]["errors"][0]["column"] == "id"

    again = await lake.send(json.dumps(rows, indent=1).encode(), key="k")
    assert again.json()["receipt"] == receipt
    other = [rows[0], {"id": "y", "note": "n"}, rows[2]]
    problem(
        await lake.send(other, key="k", query="?on_invalid=quarantine"),
        422,
        "idempotency_conflict",
    )
    assert (lake.entries, len(lake.lake.state.quarantine)) == (1, 1)


async def test_A10_a_request_of_bad_rows_only_is_an_entry_too(lake: Server) -> None:
    answer = await lake.send([{"id": "x"}], key="k", query="?on_invalid=quarantine")
    receipt = answer.json()["receipt"]
    assert (receipt["rows"], receipt["rows_rejected"]) == (0, 1)
    again = await lake.send([{"id": "x"}], key="k", query="?on_invalid=quarantine")
    assert again.json()["receipt"] == receipt


async def test_A9_one_bad_table_of_several_stops_all_and_is_named(lake: Server) -> None:
    await lake.create(EVENTS | {"name": "others"})
    body = {"events": [{"id": 1}], "others": [{"id": 1}, {"id": None}]}
    document = problem(await lake.send(body, table="*"), 422, "rows_invalid")
    (error,) = document["errors"]
    assert (error["table"], error["row"], error["column"]) == ("others", 1, "id")
    assert lake.untouched


async def test_A12_a_column_added_elsewhere_is_known_at_once(lake: Server) -> None:
    assert (await lake.send([{"id": 1}])).status_code == 202
    state = await lake.catalog.table("events")
    assert state is not None
    schema = state.schema
    changed = type(schema)(
        schema.table_id, schema.name, 1, (*schema.columns, Column(0, "late", "integer"))
    )
    await lake.catalog.alter_table(schema=changed, expected_version=1)
    answer = await lake.send([{"id": 2, "late": 3}])
    assert answer.status_code == 202, answer.text
    stale = await lake.send([{"id": 2, "late": "x"}], query="?on_invalid=quarantine")
    assert stale.json()["receipt"]["rows_rejected"] == 1


# --- bodies that cannot be read ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        (b"", "application/json", "malformed_body"),
        (b"{", "application/json", "malformed_body"),
        (b"[]", "application/json", "malformed_request"),
        (b"[1]", "application/json", None),
        (b"7", "application/json", None),
        (b'[{"id": 1}', "application/json", "malformed_body"),
        (b'[{"id": 1}] x', "application/json", "malformed_body"),
        (b'[{"note": "\xff"}]', "application/json", "malformed_body"),
        (b'[{"id": 1, "note": "\\ud800"}]', "application/json", None),
        (b"[" * 100_000, "application/json", "malformed_body"),
        (b'[{"id": 1e999999999999}]', "application/json", None),
        (b'[{"id": 1, "id": 2}]', "application/json", None),
        (b"", NDJSON, "malformed_request"),
        (b'{"id": 1}\n{"id"', NDJSON, "malformed_body"),
        (b"", ARROW, "malformed_body"),
        (b"not arrow", ARROW, "malformed_body"),
        (b"\xff\xff\xff\xff" * 40, ARROW, "malformed_body"),
    ],
)
async def test_A10_bodies_that_cannot_be_read_are_refused(
    lake: Server, body: bytes, content_type: str, code: str | None
) -> None:
    answer = await lake.send(body, content_type=content_type)
    assert answer.status_code in (400, 422), answer.text
    problem(answer, answer.status_code, code or answer.json()["code"])
    assert lake.untouched


async def test_A1_an_arrow_stream_needs_its_end_mark(lake: Server) -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"id": pa.array([1], pa.int64())})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    whole = bytes(sink.getvalue().to_pybytes())
    problem(await lake.send(whole[:-8], content_type=ARROW), 400, "malformed_body")
    assert lake.untouched
    assert (await lake.send(whole, content_type=ARROW)).status_code == 202


@pytest.mark.parametrize(
    ("headers", "code", "status"),
    [
        ({"content_type": "text/html"}, "unsupported_media_type", 415),
        ({"content_type": "text/csv; header=absent"}, "unsupported_media_type", 415),
        ({"content_type": "application/vnd.apache.parquet"}, "malformed_body", 400),
        ({"content_type": "application/json; charset=latin-1"}, "unsupported_media_type", 415),
        ({"content_encoding": "br"}, "unsupported_media_type", 415),
        ({"content_encoding": "gzip, gzip"}, "unsupported_media_type", 415),
        ({"content_encoding": "gzip"}, "malformed_body", 400),
        ({"content_encoding": "zstd"}, "malformed_body", 400),
        ({"content_encoding": "lz4"}, "malformed_body", 400),
        ({"content_length": "-1"}, "malformed_request", 400),
        ({"content_length": "ten"}, "malformed_request", 400),
        ({"idempotency_key": "two words"}, "malformed_idempotency_key", 400),
        ({"idempotency_key": "k" * 256}, "malformed_idempotency_key", 400),
        ({"idempotency_key": ""}, "malformed_idempotency_key", 400),
        ({"idempotency_not_before": "yesterday"}, "malformed_request", 400),
        ({"idempotency_not_before": "2026-01-01T00:00:00"}, "malformed_request", 400),
        ({"idempotency_not_before": "2026-01-01T00:00:00.1234567Z"}, "malformed_request", 400),
        ({"idempotency_not_before": "0001-01-01T00:00:00+23:00"}, "malformed_request", 400),
        ({"lakebus_ordering_key": "o" * 256}, "malformed_request", 400),
    ],
)
async def test_bad_headers_are_refused(
    lake: Server, headers: dict[str, str], code: str, status: int
) -> None:
    answer = await lake.send([{"id": 1}], **headers)
    document = problem(answer, status, code)
    if status == 415:
        assert document["supported"]
    assert lake.untouched


@pytest.mark.parametrize(
    "name",
    ["idempotency-key", "content-type", "authorization", "content-length", "lakebus-ordering-key"],
)
async def test_a_header_that_counts_may_come_only_once(lake: Server, name: str) -> None:
    headers = [
        ("authorization", f"Bearer {lake.key}"),
        ("content-type", "application/json"),
        ("idempotency-key", "a"),
        ("lakebus-ordering-key", "a"),
        ("content-length", "10"),
    ]
    twice = next(header for header in headers if header[0] == name)
    exchange = RawExchange()
    await exchange.run(
        lake.app, "POST", "/v1/tables/events/rows", headers=[*headers, twice], parts=[b'[{"id":1}]']
    )
    assert exchange.status == 400
    assert name in json.loads(exchange.body)["detail"].lower()
    assert lake.untouched


@pytest.mark.parametrize(
    "query",
    [
        "?wait=forever",
        "?timeout_ms=0",
        "?timeout_ms=100001",
        "?timeout_ms=" + "9" * 400,
        "?timeout_ms=1.5",
        "?timeout_ms=",
        "?on_invalid=ignore",
        "?create=maybe",
        "?unknown=1",
        "?wait=durable&wait=durable",
        "?wait",
        "?wait=%ff",
        "?" + "&".join(f"wait{n}=1" for n in range(100)),
    ],
)
async def test_bad_parameters_are_refused_by_name(lake: Server, query: str) -> None:
    answer = await lake.send([{"id": 1}], query=query)
    problem(answer, 400, "malformed_request")
    assert lake.untouched


async def test_an_unknown_parameter_is_named(lake: Server) -> None:
    answer = await lake.send([{"id": 1}], query="?wiat=visible")
    document = problem(answer, 400, "malformed_request")
    assert "wiat" in document["detail"]
    assert "wait" in document["detail"].replace("wiat", "")


# --- A6, A13 and the rest ------------------------------------------------------------------------


async def test_A6_an_unknown_outcome_is_resolved_by_a_retry(lake: Server) -> None:
    lake.lake.faults.lose_replies.add("append")
    answer = await lake.send([{"id": 1}], key="k")
    document = problem(answer, 503, "outcome_unknown")
    assert document["retryable"] is True
    assert "retry-after" in answer.headers
    again = await lake.send([{"id": 1}], key="k")
    assert again.status_code == 202
    assert lake.entries == 1


async def test_A6_without_a_key_an_unknown_outcome_must_not_be_retried(lake: Server) -> None:
    lake.lake.faults.lose_replies.add("append")
    document = problem(await lake.send([{"id": 1}]), 503, "outcome_unknown")
    assert document["retryable"] is False


async def test_A1_an_unreachable_bus_is_unavailable_and_stores_nothing(lake: Server) -> None:
    lake.lake.faults.unreachable = True
    answer = await lake.send([{"id": 1}], key="k")
    assert problem(answer, 503, "unavailable")["retryable"] is True
    assert "retry-after" in answer.headers
    lake.lake.faults.unreachable = False
    assert lake.untouched


async def test_A3_a_refusal_is_not_uttered_while_the_key_cannot_be_looked_up(
    lake: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lake.send([{"id": 1}], key="k")

    async def away(*_: object) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(lake.bus, "find_key", away)
    problem(await lake.send([{"id": "x"}], key="k"), 503, "unavailable")


async def test_A13_a_first_attempt_older_than_the_window_is_expired(lake: Server) -> None:
    old = (dt.datetime.now(dt.UTC) - dt.timedelta(days=2)).isoformat()
    answer = await lake.send([{"id": 1}], key="k", idempotency_not_before=old)
    problem(answer, 410, "idempotency_expired")
    assert lake.untouched
    now = dt.datetime.now(dt.UTC).isoformat()
    first = await lake.send([{"id": 1}], key="k", idempotency_not_before=now)
    again = await lake.send([{"id": 1}], key="k", idempotency_not_before=old)
    assert again.json()["receipt"] == first.json()["receipt"]


async def test_A7_one_ordering_key_means_one_shard(lake: Server) -> None:
    for n in range(20):
        answer = await lake.send([{"id": n}], lakebus_ordering_key="mine")
        assert answer.status_code == 202
    assert sorted(lake.lake.ends().values()) == [0, 20]


@pytest.mark.parametrize(
    "table", ["nothing", "Bad-Name", "a.b.c", "%F0%9F%98%80", "a%00b", "x" * 99]
)
async def test_A12_rows_for_a_missing_table_are_refused(lake: Server, table: str) -> None:
    problem(await lake.send([{"id": 1}], table=table, key="k"), 404, "table_not_found")
    assert lake.untouched


async def test_suggestions_name_what_the_caller_may_see(lake: Server) -> None:
    document = problem(await lake.send([{"id": 1}], table="event"), 404, "table_not_found")
    assert document["did_you_mean"] == ["events"]
    blind = await lake.new_key(Grant("ingest", ("event",)), principal="blind")
    answer = await lake.send([{"id": 1}], table="event", api_key=blind)
    assert problem(answer, 404, "table_not_found")["did_you_mean"] == []


async def test_names_fold_at_the_door(lake: Server) -> None:
    answer = await lake.send([{"ID": 1, "Note": "x"}], table="EVENTS")
    assert answer.json()["receipt"]["target"] == "events"


async def test_several_tables_are_checked_one_by_one(lake: Server) -> None:
    problem(await lake.send({}, table="*"), 400, "malformed_request")
    problem(await lake.send([], table="*"), 400, "malformed_body")
    problem(await lake.send({"events": []}, table="*"), 400, "malformed_request")
    problem(
        await lake.send({"events": [{"id": 1}], "nope": [{"id": 1}]}, table="*"),
        404,
        "table_not_found",
    )
    problem(await lake.send({"a\u0000b": [{"id": 1}]}, table="*"), 404, "table_not_found")
    problem(
        await lake.send(b'{"events": [{"id": 1}], "EVENTS": [{"id": 2}]}', table="*"),
        400,
        "malformed_request",
    )
    problem(await lake.send([], table="*", content_type=NDJSON), 415, "unsupported_media_type")
    assert lake.untouched


async def test_a_fault_inside_tells_nothing_and_stores_nothing(
    lake: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> Any:
        raise RuntimeError("secret path /var/lib/lake")

    monkeypatch.setattr(lake.bus, "append", broken)
    answer = await lake.send([{"id": 1}])
    document = problem(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert document["retryable"] is False
    assert "secret path" in caplog.text
    assert lake.untouched
