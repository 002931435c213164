"""A lake on a bucket: rows in over HTTP, files in a store by URL, answers from local copies."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actors.backend import Backend
from actors.hints import MemoryHintDirectory
from actors.role_host import RoleHost
from lakebus.clock import SystemClock
from lakebus.telemetry import MemoryMetrics
from storage.bus.memory import MemoryBus
from storage.bus.settings import BusSettings
from storage.catalog.memory import MemoryCatalog
from storage.catalog.memory_erasures import MemoryErasing
from storage.catalog.memory_upkeep import MemoryUpkeep
from storage.engine.engine import QueryEngine
from storage.engine.settings import EngineSettings
from storage.files.cache import FileCache
from storage.files.cloud import CloudObjectStore
from storage.maintenance.deletion import delete
from storage.maintenance.erasure import erase
from storage.maintenance.jobs import JobClaim, JobKind
from storage.maintenance.memory_jobs import MemoryJobs
from storage.memory_lake import MemoryLake
from tests.bucket_server import Bucket
from tests.faults.buckets import BucketFault, BucketProxy
from tests.unit.actors_rig import ROLE_SETTINGS, Deaths
from tests.unit.compaction_rig import Lake, job_of
from tests.unit.http_rig import Server, problem, server

_CACHE_BYTES = 1 << 20
_SECRET = "secret-7f3a"


@dataclass(frozen=True, slots=True)
class CloudLake:
    """`proxy` lies between all of it and the S3 server."""

    http: Server
    jobs: Lake
    store: CloudObjectStore
    cache: FileCache
    proxy: BucketProxy

    async def write(self, ids: range) -> int:
        sent = await self.http.send(
            [{"id": n, "note": "x" * (n % 7)} for n in ids],
            query="?wait=visible&timeout_ms=60000",
        )
        assert (sent.status_code, sent.json()["visible"]) == (200, True), sent.text
        return int(sent.json()["snapshot_id"])

    async def ask(self, sql: str, **more: Any) -> list[list[Any]]:
        answer = await self.http.http.post(
            "/v1/query", json={"sql": sql, **more}, headers=self.http.headers()
        )
        assert answer.status_code == 200, answer.text
        rows: list[list[Any]] = answer.json()["rows"]
        return rows

    async def objects(self) -> set[str]:
        return {key async for key, _ in self.store.list("tables/")}


@pytest.fixture
async def lake(bucket: Bucket, tmp_path: Path) -> AsyncIterator[CloudLake]:
    async with BucketProxy(bucket.port) as proxy:
        store = bucket.behind(proxy.port).store()
        clock, deaths = SystemClock(), Deaths()
        memory = MemoryLake(settings=BusSettings(shards=2), clock=clock)
        bus, catalog, upkeep = MemoryBus(memory), MemoryCatalog(memory), MemoryUpkeep(memory)
        cache = FileCache.open(store, tmp_path / "cache", bytes_max=_CACHE_BYTES)
        engine = QueryEngine(
            EngineSettings(
                allowed_directory=str(cache.folder),
                temp_directory=str(tmp_path / "spill"),
                spare=False,
                threads=1,
            )
        )
        await engine.start()
        roles = RoleHost(
            backend=Backend(
                bus=bus,
                catalog=catalog,
                store=store,
                hints=MemoryHintDirectory(),
                stack="test",
                settings=ROLE_SETTINGS,
                upkeep=upkeep,
            ),
            on_fatal=deaths,
            clock=clock,
            metrics=MemoryMetrics(),
        )
        await roles.start()
        jobs = Lake(bus=bus, catalog=catalog, upkeep=upkeep, folder=tmp_path, store=store)
        try:
            async with server(lake=memory, engine=engine, store=store, cache=cache) as made:
                await made.create()
                yield CloudLake(made, jobs, store, cache, proxy)
        finally:
            await roles.stop()
            await engine.stop()
            await cache.close()
    assert deaths.seen == []


_SUM = "SELECT count(*), sum(id)::BIGINT FROM events"


async def test_C6_D8_E1_rows_are_written_read_merged_and_deleted_on_a_bucket(
    lake: CloudLake,
) -> None:
    for start in range(0, 60, 10):
        first = await lake.write(range(start, start + 10))
    before = await lake.ask(_SUM)
    assert before == [["60", str(sum(range(60)))]]
    assert len(await lake.objects()) >= 6
    feed = await lake.http.get("/v1/tables/events/changes?after=0&limit=100")
    assert feed.json()["row_count"] == 60, feed.text

    report = await lake.jobs.compact(full=True)
    assert report["files_in"] >= 6
    assert report["skipped"] == []
    assert await lake.ask(_SUM) == before
    assert await lake.ask(_SUM, snapshot={"id": first}) == before

    (state,) = await lake.jobs.catalog.tables()
    given = {
        "table": "events",
        "where": "id % 3 = 0",
        "now": "2026-01-31T12:00:00Z",
        "columns": {column.name: column.column_id for column in state.schema.columns},
    }
    job = replace(job_of(JobKind.DELETE, given), table_id=state.schema.table_id)
    deleted = await delete(lake.jobs.context(), job)
    assert deleted["deleted_rows"] == 20
    left = [n for n in range(60) if n % 3]
    assert await lake.ask(_SUM) == [["40", str(sum(left))]]
    assert await lake.ask(_SUM, snapshot={"id": first}) == before
    assert lake.cache.counts.bytes_leased == 0


async def test_D9_a_query_ends_in_time_while_its_files_do_not_come(lake: CloudLake) -> None:
    await lake.write(range(5))
    lake.proxy.slow_s, lake.proxy.always = 30.0, BucketFault.SLOW
    answer = await lake.http.http.post(
        "/v1/query", json={"sql": _SUM, "timeout_ms": 2000}, headers=lake.http.headers()
    )
    assert problem(answer, 504, "query_timeout")["phase"] == "fetch"
    assert lake.cache.counts.bytes_leased == 0
    lake.proxy.always = None
    assert await lake.ask(_SUM) == [["5", "10"]]


async def test_a_bad_day_of_the_store_gives_no_wrong_answer(lake: CloudLake) -> None:
    faults = [
        BucketFault.ERROR, BucketFault.THROTTLED, BucketFault.RESET, BucketFault.LOST_ANSWER, None,
        BucketFault.LATE_EFFECT, BucketFault.SLOW, BucketFault.RESET, BucketFault.ERROR,
    ]  # fmt: skip
    reads = [fault for fault in faults if fault is not BucketFault.LATE_EFFECT]
    for number in range(5):
        lake.proxy.on("PUT", *faults[number:], *faults)
        lake.proxy.on("GET", *reads[number:], BucketFault.DAMAGED)
        await lake.write(range(number * 10, number * 10 + 10))
        rows = number * 10 + 10
        expected = [[str(rows), str(sum(range(rows)))]]
        async with asyncio.timeout(60):
            while (found := await _answered(lake)) is None:
                pass
        assert found == expected
    assert (await lake.jobs.compact(full=True))["files_in"] >= 5
    assert await lake.ask(_SUM) == expected
    await lake.proxy.settle()
    assert await lake.ask(_SUM) == expected


async def _answered(lake: CloudLake) -> list[list[Any]] | None:
    """None when the answer is that the same request may succeed later."""

    answer = await lake.http.get("/v1/query?sql=" + _SUM.replace(" ", "+"))
    if answer.status_code == 200:
        rows: list[list[Any]] = answer.json()["rows"]
        return rows
    assert answer.json()["retryable"] is True, answer.text
    return None


async def test_E6_a_lost_object_is_told_as_unavailable(lake: CloudLake) -> None:
    await lake.write(range(5))
    for key in await lake.objects():
        await lake.store.delete(key)
    problem(await lake.http.get("/v1/query?sql=SELECT+id+FROM+events"), 503, "unavailable")
    assert lake.cache.counts.bytes_leased == 0


async def test_E7_erased_rows_leave_the_copies_on_disk(lake: CloudLake) -> None:
    sent = await lake.http.send(
        [{"id": 1, "note": _SECRET}, {"id": 2, "note": "stays"}],
        query="?wait=visible&timeout_ms=60000",
    )
    before = int(sent.json()["snapshot_id"])
    assert await lake.ask("SELECT note FROM events ORDER BY id") == [[_SECRET], ["stays"]]
    assert _with_secret(lake.cache.folder)

    asking = asyncio.create_task(
        lake.http.http.post(
            "/v1/tables/events/erase",
            json={"where": "id = 1", "timeout_ms": 60000},
            headers=lake.http.headers() | {"idempotency-key": "erase-1"},
        )
    )
    jobs = MemoryJobs(lake.http.lake)
    async with asyncio.timeout(60):
        while (claim := await _claimed(jobs)) is None:
            assert not asking.done(), (await asking).text
            await asyncio.sleep(0.01)
    context = lake.jobs.context(erasing=MemoryErasing(lake.http.lake))
    await jobs.finish(claim, await erase(context, claim.job))
    assert (await asking).status_code == 200

    assert await lake.ask("SELECT note FROM events", snapshot={"id": before}) == [["stays"]]
    async with asyncio.timeout(60):
        while _with_secret(lake.cache.folder):  # until this replica has heard of it
            await asyncio.sleep(0.01)
    for key in await lake.objects():
        assert _SECRET.encode() not in await lake.store.get(key)


async def _claimed(jobs: MemoryJobs) -> JobClaim | None:
    return await jobs.claim(uuid.uuid4(), kinds=[JobKind.ERASE], ttl_s=60)


def _with_secret(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if _SECRET.encode() in path.read_bytes()]
