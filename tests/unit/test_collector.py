"""The collector may look rarely, because requests leave nothing for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from serve_app.collector import calm_collector
from tests.unit.http_rig import ARROW, RawExchange, Server, server

PADDING = b" " * 50_000
JSON, CSV = "application/json", "text/csv"


@pytest.fixture
def as_it_was() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("as_it_was")
def test_what_is_kept_is_not_looked_at_and_the_collector_stays_on() -> None:
    calm_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    assert gc.get_threshold()[0] > 700


CASES = [
    (b'[{"id":1}]', JSON, 202),
    (b'[{"id":1}]' + PADDING * 2, JSON, 202),
    (b"[{]", JSON, 400),
    (b'[{"id":"x"}]', JSON, 422),
    (b"id\nx\n", CSV, 422),
    (b"no stream", ARROW, 400),
]


async def test_requests_leave_no_cycle_that_holds_a_body() -> None:
    async with server() as lake:
        await lake.create()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for body, content_type, status in CASES:
                assert await _send(lake, body + PADDING, content_type) == status
            gc.collect()
            held = [
                type(found)
                for found in gc.garbage
                for part in gc.get_referents(found)
                if isinstance(part, bytes | str) and len(part) >= len(PADDING)
            ]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert held == []


async def _send(lake: Server, body: bytes, content_type: str) -> int | None:
    exchange = RawExchange()
    headers = lake.headers(content_type=content_type).items()
    await exchange.run(lake.app, "POST", "/v1/tables/events/rows", headers=headers, parts=[body])
    return exchange.status
