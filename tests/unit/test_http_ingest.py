"""Rows in over HTTP: receipts, replays, encodings (contract A)."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pytest

from storage.ingesting.grants import Grant
from tests.unit.http_rig import ARROW, EVENTS, NDJSON, Server, problem, server

ROWS: list[dict[str, Any]] = [
    {"id": 1, "note": "a", "amount": "1.50", "at": "2026-01-31T12:00:00Z"},
    {"id": 2, "note": None, "amount": 2, "at": "2026-01-31T13:00:00+01:00"},
    {"id": 3},
]


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


def as_ndjson(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, indent=None).encode() + b"\n" for row in rows)


def as_arrow(batches: int = 1, compression: str | None = None) -> bytes:
    """ROWS as an Arrow stream, fields in another order, cut into batches."""

    table = pa.table(
        {
            "at": pa.array([1769860800000000, 1769860800000000, None], pa.timestamp("us", "UTC")),
            "amount": pa.array(["1.50", "2.00", None]).cast(pa.decimal128(10, 2)),
            "id": pa.array([1, 2, 3], pa.int64()),
            "note": pa.array(["a", None, None], pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        for start in range(batches):
            step = -(-3 // batches)
            writer.write_table(table.slice(start * step, step))
    return bytes(sink.getvalue().to_pybytes())


async def test_A1_rows_are_accepted_with_a_receipt(lake: Server) -> None:
    answer = await lake.send(ROWS)
    assert answer.status_code == 202
    document = answer.json()
    assert list(document) == ["receipt", "replayed", "visible", "snapshot_id", "columns_skipped"]
    assert set(document["receipt"]) == {
        "batch_id",
        "target",
        "rows",
        "rows_rejected",
        "payload_fingerprint",
        "visibility_token",
        "accepted_at",
        "idempotency_expires_at",
    }
    assert document["receipt"]["rows"] == 3
    assert document["receipt"]["target"] == "events"
    assert (document["replayed"], document["visible"]) == (False, False)
    assert lake.entries == 1


async def test_A2_a_replay_carries_the_identical_receipt(lake: Server) -> None:
    first = await lake.send(ROWS, key="k1")
    await lake.publish()
    again = await lake.send(ROWS, key="k1", query="?wait=visible")
    assert first.json()["receipt"] == again.json()["receipt"]
    cut = slice(0, first.text.index('"replayed"'))
    assert first.text[cut] == again.text[cut]
    assert again.status_code == 200
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers


@pytest.mark.parametrize(
    ("body", "content_type", "coding"),
    [
        (json.dumps(ROWS, indent=3).encode(), "application/json", None),
        (json.dumps(ROWS).encode(), "application/json; charset=UTF-8", "gzip"),
        (as_ndjson(ROWS), NDJSON, None),
        (as_ndjson(ROWS), NDJSON, "gzip"),
        (as_arrow(), ARROW, None),
        (as_arrow(batches=3), ARROW, "gzip"),
        (as_arrow(compression="lz4"), ARROW, None),
        (as_arrow(), ARROW, "zstd"),
        (as_arrow(batches=2), ARROW, "lz4"),
    ],
)
async def test_A3_a_retry_in_any_encoding_is_a_replay(
    lake: Server, body: bytes, content_type: str, coding: str | None
) -> None:
    first = await lake.send(ROWS, key="k1")
    more = {} if coding is None else {"content_encoding": coding}
    again = await lake.send(encoded(body, coding), key="k1", content_type=content_type, **more)
    assert again.status_code == 202, again.text
    assert again.json()["replayed"] is True
    assert again.json()["receipt"] == first.json()["receipt"]
    assert lake.entries == 1


def encoded(body: bytes, coding: str | None) -> bytes:
    if coding is None:
        return body
    if coding == "gzip":
        return gzip.compress(body)
    return bytes(pa.Codec(coding).compress(body).to_pybytes())


@pytest.mark.parametrize(
    "other",
    [
        [*ROWS[:2], {"id": 4}],
        ROWS[:2],
        [ROWS[1], ROWS[0], ROWS[2]],
        [ROWS[0] | {"note": ""}, *ROWS[1:]],
        [ROWS[0], ROWS[1] | {"note": ""}, ROWS[2]],
    ],
)
async def test_A4_another_payload_is_a_conflict(lake: Server, other: object) -> None:
    first = await lake.send(ROWS, key="k1")
    document = problem(await lake.send(other, key="k1"), 422, "idempotency_conflict")
    assert document["batch_id"] == first.json()["receipt"]["batch_id"]
    assert document["retryable"] is False
    assert lake.entries == 1


async def test_A4_keys_belong_to_a_principal_and_a_target(lake: Server) -> None:
    await lake.create(EVENTS | {"name": "others"})
    somebody = await lake.new_key(Grant("ingest"), principal="somebody")
    answers = [
        await lake.send(ROWS, key="k1"),
        await lake.send(ROWS[:1], key="k1", table="others"),
        await lake.send(ROWS[:2], key="k1", api_key=somebody),
        await lake.send({"events": ROWS[:1]}, key="k1", table="*"),
    ]
    assert [answer.json()["replayed"] for answer in answers] == [False] * 4
    assert lake.entries == 4


async def test_A5_concurrent_requests_with_one_key_make_one_entry(lake: Server) -> None:
    bodies: list[Any] = [ROWS, as_arrow(), as_ndjson(ROWS)]
    kinds = ["application/json", ARROW, NDJSON]
    same = [lake.send(bodies[n % 3], key="k1", content_type=kinds[n % 3]) for n in range(24)]
    answers = await asyncio.gather(*same)
    assert {answer.status_code for answer in answers} == {202}
    assert len({json.dumps(answer.json()["receipt"]) for answer in answers}) == 1
    assert sum(not answer.json()["replayed"] for answer in answers) == 1
    assert lake.entries == 1


async def test_A5_concurrent_payloads_under_one_key_conflict(lake: Server) -> None:
    answers = await asyncio.gather(*(lake.send([{"id": n}], key="k") for n in range(8)))
    assert sorted(answer.status_code for answer in answers) == [202] + [422] * 7
    winner = next(a for a in answers if a.status_code == 202).json()["receipt"]["batch_id"]
    losers = [a.json() for a in answers if a.status_code == 422]
    assert {loser["batch_id"] for loser in losers} == {winner}
    assert lake.entries == 1


# --- A3: nothing that happened since changes the answer -------------------------------------------


async def test_A3_a_replay_survives_a_schema_change(lake: Server) -> None:
    first = await lake.send(ROWS, key="k1")
    changed = await lake.http.patch(
        "/v1/tables/events",
        json={
            "drop_columns": ["note"],
            "rename_columns": {"id": "number"},
            "add_columns": [{"name": "more", "type": "double"}],
        },
        headers=lake.headers(),
    )
    assert changed.status_code == 200, changed.text
    again = await lake.send(as_ndjson(ROWS), key="k1", content_type=NDJSON)
    assert again.status_code == 202, again.text
    assert again.json()["receipt"] == first.json()["receipt"]
    problem(await lake.send([{"number": 1}], key="k1"), 422, "idempotency_conflict")
    problem(await lake.send(ROWS), 422, "rows_invalid")
    assert lake.entries == 1


async def test_A3_a_replay_is_compared_under_the_schema_of_its_first_acceptance(
    lake: Server,
) -> None:
    """The body still fits, and today its names mean other columns."""

    first = await lake.send(ROWS, key="k1")
    for change in (
        {"drop_columns": ["note"]},
        {"add_columns": [{"name": "note", "type": "varchar"}]},
    ):
        changed = await lake.http.patch("/v1/tables/events", json=change, headers=lake.headers())
        assert changed.status_code == 200, changed.text
    again = await lake.send(ROWS, key="k1")
    assert again.status_code == 202, again.text
    assert again.json()["receipt"] == first.json()["receipt"]
    assert lake.entries == 1


async def test_A3_a_replay_survives_a_drop(lake: Server) -> None:
    first = await lake.send(ROWS, key="k1")
    await lake.publish()
    dropped = await lake.http.delete("/v1/tables/events", headers=lake.headers())
    assert (dropped.status_code, dropped.json()["state"]) == (200, "dropped")
    again = await lake.send(ROWS, key="k1")
    assert again.json()["receipt"] == first.json()["receipt"]
    assert again.json()["replayed"] is True
    problem(await lake.send(ROWS[:1], key="k1"), 422, "idempotency_conflict")
    problem(await lake.send(ROWS, key="k2"), 404, "table_not_found")


async def test_A3_the_key_is_looked_up_before_a_bad_body_is_judged(lake: Server) -> None:
    first = await lake.send(ROWS, key="k1")
    for body in (b"{", b"[]", b'[{"id": "x"}]', b"\xff"):
        document = problem(await lake.send(body, key="k1"), 422, "idempotency_conflict")
        assert document["batch_id"] == first.json()["receipt"]["batch_id"]
    assert lake.entries == 1


async def test_A3_several_tables_are_one_target(lake: Server) -> None:
    await lake.create(EVENTS | {"name": "others"})
    body = {"events": ROWS, "others": ROWS[:1]}
    first = await lake.send(body, table="*", key="k1")
    assert first.json()["receipt"]["target"] == "*"
    assert first.json()["receipt"]["rows"] == 4
    turned = {"others": ROWS[:1], "Events": ROWS}
    again = await lake.send(turned, table="*", key="k1")
    assert again.json()["receipt"] == first.json()["receipt"]
    other = {"others": ROWS, "events": ROWS[:1]}
    problem(await lake.send(other, table="*", key="k1"), 422, "idempotency_conflict")
    assert lake.entries == 1


# --- waiting -------------------------------------------------------------------------------------


async def test_A1_wait_visible_answers_with_the_snapshot(lake: Server) -> None:
    sending = asyncio.create_task(lake.send(ROWS, query="?wait=visible&timeout_ms=5000"))
    async with asyncio.timeout(5):
        while not lake.entries:
            await asyncio.sleep(0)
    (published,) = await lake.publish()
    answer = await sending
    assert answer.status_code == 200
    assert answer.json()["visible"] is True
    assert answer.json()["snapshot_id"] == published.snapshot_id


async def test_A1_a_wait_that_runs_out_is_no_failure(lake: Server) -> None:
    answer = await lake.send(ROWS, key="k1", query="?wait=visible&timeout_ms=30")
    assert answer.status_code == 202
    assert (answer.json()["visible"], answer.json()["snapshot_id"]) == (False, None)
    assert lake.entries == 1


async def test_D4_waiting_for_quarantined_rows_says_so(lake: Server) -> None:
    sending = asyncio.create_task(lake.send(ROWS, query="?wait=visible&timeout_ms=5000"))
    async with asyncio.timeout(5):
        while not lake.entries:
            await asyncio.sleep(0)
    await lake.publish(quarantine=True)
    document = problem(await sending, 409, "quarantined")
    assert document["reason"] == "poison"
    status = await lake.get(f"/v1/batches/{document['batch_id']}")
    assert status.json()["state"] == "quarantined"


# --- batches -------------------------------------------------------------------------------------


async def test_batches_tell_their_state_and_wait_for_the_end(lake: Server) -> None:
    batch_id = (await lake.send(ROWS)).json()["receipt"]["batch_id"]
    before = (await lake.get(f"/v1/batches/{batch_id}")).json()
    assert (before["state"], before["snapshot_id"]) == ("accepted", None)
    waiting = asyncio.create_task(lake.get(f"/v1/batches/{batch_id}?timeout_ms=5000"))
    (published,) = await lake.publish()
    after = (await waiting).json()
    assert (after["state"], after["snapshot_id"]) == ("published", published.snapshot_id)


async def test_D10_batches_of_others_are_not_there(lake: Server) -> None:
    batch_id = (await lake.send(ROWS)).json()["receipt"]["batch_id"]
    other = await lake.new_key(Grant("ingest"), Grant("admin"), principal="other")
    theirs = problem(
        await lake.get(f"/v1/batches/{batch_id}", api_key=other), 404, "batch_not_found"
    )
    unknown = problem(
        await lake.get("/v1/batches/b1-0-99999", api_key=other), 404, "batch_not_found"
    )
    assert theirs["detail"].replace(batch_id, "?") == unknown["detail"].replace("b1-0-99999", "?")
    for bad in ("x", "b1", "b1-1-99999999999999999999", "%00", "b1-9-1"):
        problem(await lake.get(f"/v1/batches/{bad}"), 404, "batch_not_found")
