"""The door without HTTP: caches, identities, definitions, quarantine of mixed payloads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from lakebus.errors import IdempotencyConflict, OutcomeUnknown, RowsInvalid, Unavailable
from storage.bus.interface import AppendOutcome, NewEntry, SchemaStale
from storage.bus.memory import MemoryBus
from storage.catalog.interface import TableState
from storage.catalog.memory import MemoryCatalog
from storage.ingesting.grants import Grant, Principal
from storage.ingesting.reject_identity import with_rejected
from storage.ingesting.requests import IngestRequest, IngestSettings
from storage.ingesting.service import IngestService
from storage.ingesting.table_cache import TableCache
from storage.memory_clock import ManualClock
from storage.memory_lake import MemoryLake
from storage.reading.barrier import Barrier
from storage.reading.watcher import HeadWatcher
from storage.rows.decoded import RejectedRow
from tests.unit.http_rig import Server, server

PERSON = Principal(1, "p", (Grant("ingest"),))


@pytest.fixture
async def lake() -> AsyncIterator[Server]:
    async with server() as made:
        await made.create()
        yield made


def request(body: bytes, **more: Any) -> IngestRequest:
    plain = IngestRequest(
        principal=PERSON,
        table="events",
        media_type="application/json",
        body=body,
        deadline_s=time.monotonic() + 5,
    )
    return replace(plain, **more)


class ScriptedBus(MemoryBus):
    """Asks `script` before each append; None lets it through."""

    def __init__(self, lake: MemoryLake, script: list[Callable[[], Any] | None]) -> None:
        super().__init__(lake)
        self.script = script
        self.seen: list[NewEntry] = []

    async def append(self, entry: NewEntry) -> AppendOutcome:
        self.seen.append(entry)
        step = self.script.pop(0) if self.script else None
        if step is None:
            return await super().append(entry)
        made = step()
        if asyncio.iscoroutine(made):
            made = await made
        if isinstance(made, Exception):
            raise made
        assert isinstance(made, SchemaStale)
        return made


def service(lake: Server, bus: MemoryBus, settings: IngestSettings | None = None) -> IngestService:
    watcher = HeadWatcher(lake.catalog)
    barrier = Barrier(catalog=lake.catalog, bus=bus, watcher=watcher, codec=lake.lake.codec)
    return IngestService(
        bus=bus,
        catalog=lake.catalog,
        barrier=barrier,
        tables=TableCache(lake.catalog),
        settings=settings,
    )


async def test_A12_a_stale_schema_is_looked_at_again_and_again_but_not_for_ever(
    lake: Server,
) -> None:
    def stale() -> SchemaStale:
        return SchemaStale((1,))

    bus = ScriptedBus(lake.lake, [stale, stale])
    answer = await service(lake, bus).ingest(request(b'[{"id": 1}]'))
    assert (answer.replayed, len(bus.seen)) == (False, 3)
    bus = ScriptedBus(lake.lake, [stale] * 9)
    with pytest.raises(Unavailable):
        await service(lake, bus, IngestSettings(schema_tries=3)).ingest(request(b'[{"id": 1}]'))
    assert len(bus.seen) == 3


async def test_A6_a_bus_that_does_not_answer_in_time_is_an_unknown_outcome(lake: Server) -> None:
    waiting = asyncio.Event()
    bus = ScriptedBus(lake.lake, [waiting.wait])
    ingest = service(lake, bus)
    await service(lake, lake.bus).ingest(request(b'[{"id": 0}]'))  # the first decoding takes longer
    asked = request(b'[{"id": 1}]', deadline_s=time.monotonic() + 0.5)
    sending = asyncio.create_task(ingest.ingest(asked))
    while not bus.seen and not sending.done():
        await asyncio.sleep(0)
    assert 0 < ingest.oldest_append_s < 5
    with pytest.raises(OutcomeUnknown):
        await sending
    assert ingest.oldest_append_s == 0


async def test_A6_an_unknown_outcome_is_never_turned_into_something_else(lake: Server) -> None:
    """Even when the key is known: the bus said that it does not know."""

    body = b'[{"id": 1}]'
    await service(lake, lake.bus).ingest(request(body, idempotency_key="k"))
    bus = ScriptedBus(lake.lake, [lambda: OutcomeUnknown("?")])
    with pytest.raises(OutcomeUnknown):
        await service(lake, bus).ingest(request(body, idempotency_key="k"))


async def test_A3_mixed_payloads_are_compared_with_their_bad_rows(lake: Server) -> None:
    ingest = service(lake, lake.bus)
    body = b'[{"id": 1}, {"id": "x", "note": 7}]'
    first = await ingest.ingest(request(body, idempotency_key="k", on_invalid="quarantine"))
    for same in (b'[{"id":1},{"note":7,"id":"x"}]', body):
        for on_invalid in ("reject", "quarantine"):
            again = await ingest.ingest(request(same, idempotency_key="k", on_invalid=on_invalid))
            assert again.receipt == first.receipt
    for other in (
        b'[{"id": 1}]',
        b'[{"id": "x", "note": 7}, {"id": 1}]',
        b'[{"id": 1}, {"id": "x", "note": 8}]',
        b'[{"id": 1}, {"id": "x", "note": "7"}]',
        b'[{"id": 1}, {"id": "x", "note": 7}, {"id": "x", "note": 7}]',
    ):
        with pytest.raises(IdempotencyConflict):
            await ingest.ingest(request(other, idempotency_key="k", on_invalid="quarantine"))
    with pytest.raises(RowsInvalid):
        await ingest.ingest(request(body, idempotency_key="other"))
    assert lake.entries == 1


def test_A4_the_identity_of_bad_rows_does_not_depend_on_spelling() -> None:
    def identity(text: bytes, row: int = 0, table: int = 1) -> bytes:
        return with_rejected(b"x", {table: [RejectedRow(row, (), text)]})

    same = [b'{"a":1,"b":[null,{"c":"\\u0041"}]}', b'{ "b" : [null, {"c":"A"}], "a":1}']
    assert len({identity(text) for text in same}) == 1
    different = [
        same[0],
        b'{"a":"1","b":[null,{"c":"A"}]}',
        b'{"a":"#1","b":[null,{"c":"A"}]}',
        b'{"a":1.0,"b":[null,{"c":"A"}]}',
        b'{"a":1,"b":[{"c":"A"},null]}',
        b'{"a":1,"a":1}',
        b'{"a":1}',
        b"[1]",
        b"not json",
        b'"\\ud800"',
        b"[" * 100_000,
    ]
    assert len({identity(text) for text in different}) == len(different)
    assert len({identity(b"1"), identity(b"1", row=1), identity(b"1", table=2)}) == 3


class CountingCatalog(MemoryCatalog):
    asked = 0

    async def table(self, name: str) -> TableState | None:
        self.asked += 1
        return await super().table(name)


async def test_the_cache_asks_once_for_many_and_again_when_it_is_old(lake: Server) -> None:
    clock = ManualClock()
    catalog = CountingCatalog(lake.lake)
    cache = TableCache(catalog, clock=clock, age_s=1.0)
    states = await asyncio.gather(*(cache.state("events") for _ in range(50)))
    assert catalog.asked == 1
    assert len({state.schema.version for state in states if state}) == 1
    clock.advance_s(1.0)
    await cache.state("events")
    assert catalog.asked == 2
    await cache.fresh_state("events")
    assert catalog.asked == 3
    assert await cache.state("nothing") is None
    assert await cache.state("nothing") is None
    assert catalog.asked == 5
    cache.forget("events")
    await cache.state("events")
    assert catalog.asked == 6


async def test_whoever_publishes_is_woken_after_each_accepted_entry(lake: Server) -> None:
    woken: list[int] = []
    watcher = HeadWatcher(lake.catalog)
    ingest = IngestService(
        bus=lake.bus,
        catalog=lake.catalog,
        barrier=Barrier(catalog=lake.catalog, bus=lake.bus, watcher=watcher, codec=lake.lake.codec),
        tables=TableCache(lake.catalog),
        on_accepted=lambda: woken.append(lake.entries),
    )
    await ingest.ingest(request(b'[{"id": 1}]', idempotency_key="k"))
    await ingest.ingest(request(b'[{"id": 1}]', idempotency_key="k"))
    assert woken == [1]
