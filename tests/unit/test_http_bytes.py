"""Bytes at the door: limits, decompression, backpressure, clients that leave (contract A11)."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator

import pyarrow as pa
import pytest

from serve_app.dependencies import HttpLimits
from storage.bus.settings import BusSettings
from storage.ingesting.requests import IngestSettings
from tests.unit.http_rig import RawExchange, Server, problem, server

LIMIT = 100_000


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    limits = HttpLimits(body_bytes_max=LIMIT, inflight_bytes_max=4 * LIMIT)
    async with server(limits=limits, ingest_settings=IngestSettings(rows_max=1000)) as made:
        await made.create()
        yield made
        assert made.budget.held_bytes == 0


def headers_of(lake: Server, **more: str) -> list[tuple[str, str]]:
    plain = {"authorization": f"Bearer {lake.key}", "content-type": "application/json"}
    return list((plain | {n.replace("_", "-"): v for n, v in more.items()}).items())


async def test_A11_a_declared_oversize_is_refused_unread(lake: Server) -> None:
    exchange = RawExchange()
    await exchange.run(
        lake.app,
        "POST",
        "/v1/tables/events/rows",
        headers=headers_of(lake, content_length=str(LIMIT + 1), idempotency_key="k"),
        parts=[b"[" + b" " * LIMIT],
    )
    document = json.loads(exchange.body)
    assert (exchange.status, document["code"]) == (413, "body_too_large")
    assert document["limit_bytes"] == LIMIT
    assert exchange.received == 0
    assert lake.untouched


async def test_A11_a_streamed_oversize_is_refused_at_the_first_byte_too_many(lake: Server) -> None:
    exchange = RawExchange()
    await exchange.run(
        lake.app,
        "POST",
        "/v1/tables/events/rows",
        headers=headers_of(lake),
        parts=[b" " * 60_000] * 10,
    )
    assert (exchange.status, json.loads(exchange.body)["code"]) == (413, "body_too_large")
    assert exchange.received == 2
    assert lake.untouched


@pytest.mark.parametrize("coding", ["gzip", "zstd", "lz4"])
async def test_A11_a_decompression_bomb_is_refused(lake: Server, coding: str) -> None:
    plain = b'[{"id": 1, "note": "' + b"a" * 50_000_000 + b'"}]'
    body = gzip.compress(plain, 9)
    if coding != "gzip":
        body = bytes(pa.Codec(coding).compress(plain).to_pybytes())
    if coding == "lz4":
        body = body[:LIMIT]
    document = problem(await lake.send(body, content_encoding=coding), 413, "body_too_large")
    assert document["limit_bytes"] == LIMIT
    assert lake.untouched


async def test_A11_decompressed_bytes_count_and_those_at_the_limit_fit(lake: Server) -> None:
    for size, status in ((LIMIT, 202), (LIMIT + 1, 413)):
        frame = len(b'[{"id":1,"note":""}]')
        plain = b'[{"id":1,"note":"' + b"a" * (size - frame) + b'"}]'
        answer = await lake.send(gzip.compress(plain), content_encoding="gzip")
        assert answer.status_code == status, answer.text
    assert lake.entries == 1


async def test_A11_gzip_of_many_members_is_one_body(lake: Server) -> None:
    pieces = [b'[{"id":1}', b',{"id":2}', b"]"]
    body = b"".join(map(gzip.compress, pieces))
    assert (await lake.send(body, content_encoding="gzip")).json()["receipt"]["rows"] == 2
    for broken in (body[:-5], body + b"x", zlib.compress(b"[]"), body[:10]):
        answer = await lake.send(broken, content_encoding="gzip")
        problem(answer, 400, "malformed_body")
    assert lake.entries == 1


async def test_A11_too_many_rows_are_refused(lake: Server) -> None:
    document = problem(await lake.send([{"id": 1}] * 1001), 413, "body_too_large")
    assert document["limit_rows"] == 1000
    assert lake.untouched


async def test_A11_held_bytes_are_bounded_and_given_back(lake: Server) -> None:
    holders = [RawExchange() for _ in range(4)]
    reading = [
        asyncio.create_task(
            holder.run(
                lake.app,
                "POST",
                "/v1/tables/events/rows",
                headers=headers_of(lake, content_length=str(LIMIT)),
                parts=[],
            )
        )
        for holder in holders
    ]
    async with asyncio.timeout(5):
        while lake.budget.held_bytes < 4 * LIMIT:
            await asyncio.sleep(0)
    answer = await lake.send([{"id": 1}], key="k")
    document = problem(answer, 429, "backpressure")
    assert document["retryable"] is True
    assert int(answer.headers["retry-after"]) >= 1
    for holder in holders:
        holder.left.set()
    await asyncio.gather(*reading)
    assert lake.untouched
    assert (await lake.send([{"id": 1}], key="k")).status_code == 202


async def test_A11_a_full_bus_refuses_but_not_a_replay(lake: Server) -> None:
    async with server(bus_settings=BusSettings(shards=1, backlog_bytes_hard=1)) as full:
        await full.create()
        first = await full.send([{"id": 1}], key="k1")
        answer = await full.send([{"id": 2}], key="k2")
        document = problem(answer, 429, "backpressure")
        assert document["retryable"] is True
        assert int(answer.headers["retry-after"]) >= 1
        again = await full.send([{"id": 1}], key="k1")
        assert again.json()["receipt"] == first.json()["receipt"]
        problem(await full.send([{"id": 9}], key="k1"), 422, "idempotency_conflict")
        assert (full.entries, len(full.lake.state.keys)) == (1, 1)


async def test_A1_a_client_that_leaves_in_the_body_leaves_nothing_behind(lake: Server) -> None:
    exchange = RawExchange()
    await exchange.run(
        lake.app,
        "POST",
        "/v1/tables/events/rows",
        headers=headers_of(lake, idempotency_key="k"),
        parts=[b'[{"id": 1},', b'{"id": 2}]', None],
    )
    assert exchange.sent == []
    assert lake.untouched


async def test_A1_a_body_that_does_not_come_is_given_up(lake: Server) -> None:
    exchange = RawExchange()
    await exchange.run(
        lake.app,
        "POST",
        "/v1/tables/events/rows",
        headers=headers_of(lake),
        parts=[],
        query=b"timeout_ms=20",
    )
    document = json.loads(exchange.body)
    assert (exchange.status, document["code"], document["phase"]) == (503, "unavailable", "body")
    assert lake.untouched
