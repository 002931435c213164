"""The coordinator over the in-memory lake: what becomes of a claimed range."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from actors.coordinator import RangeEnd
from lakebus.clock import SystemClock
from lakebus.errors import LeaseLost, Unavailable
from lakebus.schemas import Column
from storage.bus.interface import Claim, ClaimedSegment, LeaseRef
from storage.catalog.interface import Commit, CommitOutcome
from storage.files.parquet import EncodedFile
from storage.memory_clock import ManualClock
from tests.unit.actors_rig import ROLE_SETTINGS, Overlay, Rig, with_settings

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
async def rig() -> Rig:
    return Rig(shards=1)


async def run(rig: Rig, **parts: Any) -> Any:
    """One range by a coordinator and a publisher of its own."""
    publisher = rig.publisher(parts.pop("catalog", None))
    publisher.start()
    coordinator = rig.coordinator(publisher=publisher, **parts)
    try:
        return await coordinator.run_once()
    finally:
        await coordinator.stop()
        await publisher.stop()


async def test_C1_a_range_becomes_one_file_a_table_and_its_ack(rig: Rig) -> None:
    events, notes = await rig.create("events"), await rig.create("notes")
    first = await rig.append((events, [1, 2]), (notes, [3]), ordering="a")
    second = await rig.append((events, [4]), ordering="a")

    report = await run(rig)

    assert report.end is RangeEnd.PUBLISHED
    assert (report.entries, report.rows, report.files) == (2, 4, 2)
    files = await rig.files()
    assert sorted(f.table_id for f in files) == [events.table_id, notes.table_id]
    assert {f.object_key for f in files} == {
        f"tables/{f.table_id}/{f.file_id}.parquet" for f in files
    }
    assert await rig.drained()
    head = await rig.catalog.head()
    assert head.snapshot_id == report.snapshot_id
    assert head.watermark[0] == second.position + 1 == first.position + 2
    assert rig.metrics.value("lakebus_published_rows_total") == 4


async def test_D12_rows_carry_shard_position_and_row_of_the_entry(rig: Rig) -> None:
    events, notes = await rig.create("events"), await rig.create("notes")
    first = await rig.append((events, [10, 11]), (notes, [12]), ordering="a")
    second = await rig.append((events, [13, 14, 15]), ordering="a")
    await run(rig)
    e, n = events.table_id, notes.table_id
    assert await rig.rows() == [
        (e, 10, 0, first.position, 0),
        (e, 11, 0, first.position, 1),
        (n, 12, 0, first.position, 2),
        (e, 13, 0, second.position, 0),
        (e, 14, 0, second.position, 1),
        (e, 15, 0, second.position, 2),
    ]


async def test_nothing_to_claim_is_no_report(rig: Rig) -> None:
    assert await run(rig) is None


async def test_rows_of_an_older_schema_version_come_in_the_newest_of_the_range(rig: Rig) -> None:
    old = await rig.create()
    await rig.append((old, [1]), ordering="a")
    wider = dataclasses.replace(old, columns=(*old.columns, Column(0, "late", "double")))
    new = (await rig.catalog.alter_table(schema=wider, expected_version=1)).schema
    await rig.append((new, [2]), ordering="a")

    report = await run(rig)

    assert report.end is RangeEnd.PUBLISHED
    (file,) = await rig.files()
    assert file.schema_version == new.version == 2
    assert sorted(await rig.ids()) == [1, 2]
    late = new.column("late")
    assert late is not None
    assert file.statistics[late.column_id].null_count == 2


async def test_what_a_claim_brings_and_tells_is_not_asked_for() -> None:
    roles = with_settings(ROLE_SETTINGS, claim_poll_ms=60_000)
    rig = Rig(clock=SystemClock(), roles=roles, shards=1)
    table = await rig.create()
    under, asked, read = rig.lease_manager(), 0, rig.bus.read

    async def acquire(owner: uuid.UUID) -> Claim | None:
        nonlocal asked
        asked += 1
        claim = await under.acquire(owner)
        if claim is None:
            return None
        (segment,) = await read(claim)
        return dataclasses.replace(claim, brought=segment)

    async def refuse(_claim: Claim) -> Sequence[ClaimedSegment]:
        raise AssertionError("the claim brought it")

    rig.bus = Overlay(rig.bus, read=refuse)  # type: ignore[assignment]
    publisher = rig.publisher()
    coordinator = rig.coordinator(publisher=publisher, leases=Overlay(under, acquire=acquire))
    publisher.start()
    await rig.append((table, [1]), ordering="a")
    await coordinator.start()
    for number in (2, 3):
        async with asyncio.timeout(20):
            while len(await rig.files()) < number - 1 or coordinator._tasks:
                await asyncio.sleep(0.001)
        assert asked == number - 1
        await rig.append((table, [number]), ordering="a")
        coordinator.wake()
    async with asyncio.timeout(20):
        while not await rig.drained():
            await asyncio.sleep(0.001)
    assert asked == 3
    await coordinator.stop()
    await publisher.stop()


async def test_B7_a_store_that_is_away_releases_the_range_uncounted(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        raise Unavailable("the object store failed")

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))

    assert report.end is RangeEnd.RELEASED
    assert await rig.ids() == {}
    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 0


async def test_B7_a_catalog_that_is_away_releases_the_range_uncounted(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def publish(publication_id: object, commits: object) -> None:
        raise Unavailable("no connection")

    rig.settings = with_settings(rig.settings, publish_attempts=1)
    report = await run(rig, catalog=Overlay(rig.catalog, publish=publish))

    assert report.end is RangeEnd.RELEASED
    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 0
    assert (await run(rig)) is None  # held by the claim above
    await rig.bus.release(again.lease)
    assert (await run(rig)).end is RangeEnd.PUBLISHED


async def test_B7_stopping_a_coordinator_gives_its_range_back(rig: Rig) -> None:
    rig.settings = with_settings(rig.settings, stop_s_max=0.01)
    rig.clock = ManualClock()
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    reached, never = asyncio.Event(), asyncio.Event()

    async def put_new(key: str, data: bytes) -> None:
        reached.set()
        await never.wait()

    coordinator = rig.coordinator(
        publisher=rig.publisher(), store=Overlay(rig.store, put_new=put_new)
    )
    await coordinator.start()
    await reached.wait()
    await coordinator.stop()

    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 0


async def test_B7_a_stop_during_a_claim_gives_its_range_back(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    claimed, answered = asyncio.Event(), asyncio.Event()

    async def acquire(owner: uuid.UUID) -> Claim | None:
        claim = await rig.bus.claim(owner)
        claimed.set()
        await answered.wait()  # the lease is given, its answer still on the way
        return claim

    coordinator = rig.coordinator(
        publisher=rig.publisher(), leases=Overlay(rig.lease_manager(), acquire=acquire)
    )
    await coordinator.start()
    await claimed.wait()
    stopping = asyncio.ensure_future(coordinator.stop())
    for _ in range(5):
        await asyncio.sleep(0)
    answered.set()
    await stopping

    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 0


async def test_B6_a_range_reclaimed_meanwhile_is_dropped(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    other: list[Claim | None] = []

    async def put_new(key: str, data: bytes) -> None:
        rig.clock.advance_s(60)  # type: ignore[attr-defined]
        other.append(await rig.bus.claim(rig.lake.new_uuid()))
        await rig.store.put_new(key, data)

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))

    assert report.end is RangeEnd.LEASE_LOST
    assert await rig.ids() == {}
    assert other[0] is not None
    await rig.bus.release(other[0].lease)  # its own lease is untouched
    assert (await run(rig)).end is RangeEnd.PUBLISHED
    assert await rig.ids() == {1: 1}


async def test_B6_expired_but_not_reclaimed_is_published(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        rig.clock.advance_s(60)  # type: ignore[attr-defined]
        await rig.store.put_new(key, data)

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))
    assert report.end is RangeEnd.PUBLISHED
    assert await rig.ids() == {1: 1}


async def test_B6_a_commit_that_the_catalog_finds_fenced_is_dropped(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def publish(publication_id: Any, commits: list[Commit]) -> Any:
        rig.clock.advance_s(60)  # type: ignore[attr-defined]
        claim = await rig.bus.claim(rig.lake.new_uuid())
        assert claim is not None
        return await rig.catalog.publish(publication_id, commits)

    report = await run(rig, catalog=Overlay(rig.catalog, publish=publish))
    assert report.end is RangeEnd.LEASE_LOST
    assert await rig.ids() == {}


async def test_C6_a_lost_write_intent_gives_the_range_back(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        await rig.store.put_new(key, data)
        rig.lake.state.intents.clear()  # collection came first

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))
    assert report.end is RangeEnd.INTENT_LOST
    assert (await run(rig)).end is RangeEnd.PUBLISHED
    assert await rig.ids() == {1: 1}


async def test_B1_an_unexpected_failure_is_counted_and_halves_the_range(rig: Rig) -> None:
    events = await rig.create()
    for i in range(4):
        await rig.append((events, [i]), ordering="a")

    def encode(schema: Any, rows: pa.Table) -> EncodedFile:
        raise KeyError("a bug of ours")

    report = await run(rig, encode=encode)
    assert report.end is RangeEnd.FAILED
    rig.clock.advance_s(10)  # type: ignore[attr-defined]
    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 1
    assert again.lease.hi - again.lease.lo == 2
    assert again.last_error == "KeyError: 'a bug of ours'"


async def test_B8_a_worker_that_is_stuck_stops_renewing_and_ends(rig: Rig) -> None:
    rig.settings = with_settings(rig.settings, hold_ttls_max=0.02, hold_s_min=0.0)
    rig.lake.settings = dataclasses.replace(rig.lake.settings, lease_ttl_ms=1_000)
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    never = asyncio.Event()

    async def put_new(key: str, data: bytes) -> None:
        await never.wait()

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))
    assert report.end is RangeEnd.STUCK
    assert [role for role, _ in rig.deaths.seen] == ["coordinator"]
    assert await rig.bus.claim(rig.lake.new_uuid()) is None  # not released: it has to expire
    rig.clock.advance_s(1.1)  # type: ignore[attr-defined]
    again = await rig.bus.claim(rig.lake.new_uuid())
    assert again is not None
    assert again.attempt == 1


async def test_B4_a_lease_in_doubt_is_confirmed_before_publishing(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    manager = rig.lease_manager()
    renewed: list[LeaseRef] = []

    async def renew(leases: list[LeaseRef]) -> Any:
        renewed.extend(leases)
        return []

    async def put_new(key: str, data: bytes) -> None:
        rig.clock.advance_s(14)  # type: ignore[attr-defined]
        await rig.store.put_new(key, data)

    report = await run(
        rig, leases=Overlay(manager, renew=renew), store=Overlay(rig.store, put_new=put_new)
    )
    assert report.end is RangeEnd.LEASE_LOST
    assert len(renewed) == 1
    assert await rig.ids() == {}


async def test_C6_nothing_is_proposed_before_its_files_are_stored(rig: Rig) -> None:
    events, notes = await rig.create("events"), await rig.create("notes")
    await rig.append((events, [1, 2]), (notes, [3]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        for _ in range(20):  # the store takes its time
            await asyncio.sleep(0)
        await rig.store.put_new(key, data)

    async def publish(publication_id: Any, commits: Sequence[Commit]) -> Any:
        for file in (file for commit in commits for file in commit.files):
            assert await rig.store.size(file.object_key) == file.size_bytes
        return await rig.catalog.publish(publication_id, commits)

    report = await run(
        rig,
        store=Overlay(rig.store, put_new=put_new),
        catalog=Overlay(rig.catalog, publish=publish),
    )
    assert (report.end, report.files) == (RangeEnd.PUBLISHED, 2)


async def test_pipelining_the_next_range_is_staged_while_one_is_published() -> None:
    rig = Rig(shards=1, claim_entries_max=1)
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")
    await rig.append((events, [2]), ordering="a")
    publishing, second_staged = asyncio.Event(), asyncio.Event()

    async def publish(publication_id: Any, commits: Any) -> Any:
        publishing.set()
        await second_staged.wait()
        return await rig.catalog.publish(publication_id, commits)

    async def put_new(key: str, data: bytes) -> None:
        await rig.store.put_new(key, data)
        if publishing.is_set():
            second_staged.set()

    publisher = rig.publisher(Overlay(rig.catalog, publish=publish))
    coordinator = rig.coordinator(publisher=publisher, store=Overlay(rig.store, put_new=put_new))
    publisher.start()
    first = asyncio.create_task(coordinator.run_once())
    await publishing.wait()
    second = asyncio.create_task(coordinator.run_once())
    reports = await asyncio.wait_for(asyncio.gather(first, second), 10)
    assert [r.end for r in reports if r] == [RangeEnd.PUBLISHED, RangeEnd.PUBLISHED]
    await coordinator.stop()
    await publisher.stop()


async def test_C6_a_name_that_is_taken_gives_the_range_back(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        await rig.store.put_new(key, data)
        await rig.store.put_new(key, data)

    report = await run(rig, store=Overlay(rig.store, put_new=put_new))
    assert report.end is RangeEnd.RELEASED
    assert (await run(rig)).end is RangeEnd.PUBLISHED


async def test_a_release_that_finds_no_lease_is_a_lost_one(rig: Rig) -> None:
    events = await rig.create()
    await rig.append((events, [1]), ordering="a")

    async def put_new(key: str, data: bytes) -> None:
        raise Unavailable("away")

    async def release(lease: LeaseRef) -> None:
        raise LeaseLost("gone")

    report = await run(
        rig,
        store=Overlay(rig.store, put_new=put_new),
        leases=Overlay(rig.lease_manager(), release=release),
    )
    assert report.end is RangeEnd.LEASE_LOST


def test_outcomes_of_the_catalog_are_all_known_here() -> None:
    assert set(CommitOutcome) == {
        CommitOutcome.PUBLISHED,
        CommitOutcome.LEASE_LOST,
        CommitOutcome.INTENT_LOST,
        CommitOutcome.QUARANTINE_STOPPED,
    }
