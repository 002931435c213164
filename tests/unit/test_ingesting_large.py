"""Large bodies are decoded in threads, and give what they would give by themselves (A4, A10)."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lakebus.errors import RowsInvalid
from lakebus.schemas import Column, TableSchema
from storage.bus.memory import MemoryBus
from storage.ingesting import large
from storage.ingesting.large import LargeBodies
from storage.rows.decode import ARROW_STREAM, CSV, JSON, NDJSON, PARQUET, decode_rows
from storage.rows.fingerprint import fingerprint
from storage.rows.segment import EntryPart
from tests.unit.compiled_rig import plan_with, plan_without
from tests.unit.http_rig import Server, server
from tests.unit.test_ingesting_service import request, service

ROWS_MAX = 100
EVENTS = TableSchema(
    7, "events", 1, (Column(1, "id", "bigint", False), Column(2, "note", "varchar"))
)
ROWS: list[dict[str, Any]] = [{"id": n, "note": f"ü {n}" if n % 3 else None} for n in range(40)]


def body_of(media_type: str, rows: list[dict[str, Any]]) -> bytes:
    if media_type == JSON:
        return json.dumps(rows).encode()
    if media_type == NDJSON:
        return "\n".join(map(json.dumps, rows)).encode()
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    if media_type == PARQUET:
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Those that have taken an identity: each good body's, where it was decoded."""

    found: list[threading.Thread] = []

    def noted(parts: Any) -> bytes:
        found.append(threading.current_thread())
        return fingerprint(parts)

    monkeypatch.setattr(large, "fingerprint", noted)
    return found


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW_STREAM, PARQUET])
async def test_A4_a_body_from_a_thread_is_the_body_it_would_be(
    media_type: str, monkeypatch: pytest.MonkeyPatch, threads: list[threading.Thread]
) -> None:
    monkeypatch.setattr(large, "plan_of", plan_with)
    body = body_of(media_type, ROWS)
    found = await LargeBodies(rows_max=ROWS_MAX).decode(EVENTS, media_type, body)
    alone = decode_rows(EVENTS, media_type, body, rows_max=ROWS_MAX).batch
    assert found is not None
    assert found.batch.equals(alone)
    assert found.batch.schema == alone.schema
    assert found.fingerprint == fingerprint([EntryPart(EVENTS.table_id, 1, alone)])
    assert found.size_bytes == alone.nbytes
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.parametrize("media_type", [JSON, NDJSON, ARROW_STREAM, PARQUET])
@pytest.mark.parametrize("wrong", [{"id": "x"}, {"id": None}, {"id": 1, "other": 1}])
async def test_A10_what_does_not_fit_is_left_to_the_ordinary_way(
    media_type: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "plan_of", plan_with)
    bodies = LargeBodies(rows_max=ROWS_MAX)
    assert await bodies.decode(EVENTS, media_type, body_of(media_type, [wrong])) is None
    many = body_of(media_type, ROWS * 3)
    assert await bodies.decode(EVENTS, media_type, many) is None
    assert await bodies.decode(EVENTS, media_type, many[:-3]) is None


async def test_json_is_not_handed_over_without_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large, "plan_of", plan_without)
    bodies = LargeBodies(rows_max=ROWS_MAX)
    assert await bodies.decode(EVENTS, NDJSON, body_of(NDJSON, ROWS)) is None


def test_only_large_bodies_are_handed_over() -> None:
    bodies = LargeBodies(rows_max=ROWS_MAX)
    long = b"x" * large.BODY_BYTES_MIN
    assert all(bodies.takes(form, long) for form in (JSON, NDJSON, ARROW_STREAM, PARQUET))
    assert not bodies.takes(CSV, long)
    assert not bodies.takes(NDJSON, long[1:])


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


async def test_A4_a_large_body_is_a_replay_of_the_same_rows_in_a_small_one(
    lake: Server, monkeypatch: pytest.MonkeyPatch, threads: list[threading.Thread]
) -> None:
    made = service(lake, MemoryBus(lake.lake))
    small = body_of(JSON, [{"note": "a", "id": 1}])
    first = await made.ingest(request(small, idempotency_key="k"))
    monkeypatch.setattr(large, "BODY_BYTES_MIN", 1)
    stream = body_of(ARROW_STREAM, [{"id": 1, "note": "a"}])
    again = await made.ingest(request(stream, media_type=ARROW_STREAM, idempotency_key="k"))
    assert again.replayed
    assert again.receipt == first.receipt
    assert len(threads) == 1
    bad = body_of(ARROW_STREAM, [{"id": 1}, {"id": None}])
    with pytest.raises(RowsInvalid) as refused:
        await made.ingest(request(bad, media_type=ARROW_STREAM))
    assert refused.value.members["errors"][0]["row"] == 1
