"""Transactions that meet in PostgreSQL, made to meet by a third one that stands in their way.

The obstacle is a foreign session that holds one lock. The calls under test run into it and stop
there, each in the middle of its transaction; then the obstacle goes. So an order that would need
luck under load is the only one possible. What is proved here is what locks are for: nobody acts on
what another transaction is just changing. Each test is the killer of a mutant (tests/mutation).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from lakebus.clock import new_uuid
from lakebus.errors import Unavailable
from lakebus.schemas import Column, TableSchema
from storage.bus.interface import Accepted, Claim, KeyTaken
from storage.bus.sharding import ordering_of
from storage.catalog.interface import Commit, CommitOutcome, Published
from storage.files.objects import MemoryObjectStore
from storage.postgres import PostgresLake
from storage.postgres.group_commit import key_hash
from tests.conformance.fixtures import *  # noqa: F403
from tests.conformance.fixtures import OpenLake
from tests.conformance.harness import Backend, LakeHarness, entry_of, total
from tests.conformance.postgres import PostgresHarness, postgres_backend

#: Sessions of ours are ended after 2.5 s in a transaction, so nobody may stand in the way longer.
_SOON_S = 2.0
_HANG_S = 10.0

_WAITING = """
SELECT count(DISTINCT l.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE NOT l.granted AND a.datname = current_database()"""


@pytest.fixture(scope="module")
def backend(postgres_dsn: str) -> Iterator[Backend]:
    with postgres_backend(postgres_dsn) as backend:
        yield backend


class Obstacle:
    """A foreign transaction, open from the first statement until `go`."""

    def __init__(self, holder: Any, watcher: Any) -> None:
        self._holder = holder
        self._watcher = watcher

    async def hold(self, statement: str, *arguments: object) -> None:
        await self._holder.execute("BEGIN")
        await self._holder.execute(statement, *arguments)

    async def go(self, *, how: str = "ROLLBACK") -> None:
        await self._holder.execute(how)

    async def stops(self, count: int, *, unless: asyncio.Future[Any] | None = None) -> None:
        """Returns once so many sessions wait for a lock, or `unless` is done."""

        deadline_s = time.monotonic() + _SOON_S
        while await self._watcher.fetchval(_WAITING) < count:
            if unless is not None and unless.done():
                return
            assert time.monotonic() < deadline_s, f"there are not {count} sessions that wait"
            await asyncio.sleep(0.005)  # nothing tells when a session begins to wait


@asynccontextmanager
async def obstacle_in(lake: LakeHarness) -> AsyncIterator[Obstacle]:
    assert isinstance(lake, PostgresHarness)
    holder, watcher = await asyncpg.connect(lake.dsn), await asyncpg.connect(lake.dsn)
    try:
        yield Obstacle(holder, watcher)
    finally:
        holder.terminate()
        watcher.terminate()


async def execute(lake: LakeHarness, statement: str, *arguments: object) -> None:
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(statement, *arguments)
        await obstacle.go(how="COMMIT")


_HOLD_KEY = "INSERT INTO lakebus.idem_0 VALUES ($1, ''::bytea, 0, 0, '')"
_HOLD_COUNTER = "SELECT 1 FROM lakebus.bus_shard WHERE shard = {} FOR UPDATE"
_HOLD_HEAD = "SELECT 1 FROM lakebus.lake FOR UPDATE"


def with_a_column(table: TableSchema) -> TableSchema:
    return dataclasses.replace(table, columns=(*table.columns, Column(0, "more", "bigint")))


def ordering_on(lake: LakeHarness, table: TableSchema, wanted: Callable[[int], bool]) -> str:
    """An ordering key whose shard is wanted."""

    for n in range(1_000):
        if wanted(lake.bus.shard_of(1, ordering_of(entry_of(table, ordering_key=str(n))))):
            return str(n)
    raise AssertionError("no ordering key lies on a shard that is wanted")


# --- append ---------------------------------------------------------------------------------------


async def test_A5_groups_that_wait_for_each_others_keys_never_deadlock(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()

    def group(bus: Any, keys: str) -> asyncio.Future[Any]:
        return asyncio.gather(*(bus.append(entry_of(table, [1], key=key)) for key in keys))

    async with obstacle_in(lake) as obstacle:
        # Each group, in the order in which its requests came, would take its first key, stop at the
        # one in the middle, and then want the other group's first.
        await obstacle.hold(_HOLD_KEY, key_hash(1, "t", "x"))
        groups = [group(lake.bus, "axb"), group(view.bus, "bxa")]
        await obstacle.stops(2)
        await obstacle.go()
        outcomes = [o for g in groups for o in await asyncio.wait_for(g, _HANG_S)]
    kinds = [type(outcome) for outcome in outcomes]
    assert (kinds.count(Accepted), kinds.count(KeyTaken)) == (3, 3)
    assert total(await lake.bus.ends()) == 3


async def test_B11_a_group_that_waits_for_a_key_does_not_stop_its_shard(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_KEY, key_hash(1, "t", "k"))
        waiting = asyncio.ensure_future(
            view.bus.append(entry_of(table, [1], key="k", ordering_key="one"))
        )
        await obstacle.stops(1)
        passing = lake.accept(entry_of(table, [2], ordering_key="one"))
        accepted = await asyncio.wait_for(passing, _SOON_S)
        await obstacle.go()
        late = await asyncio.wait_for(waiting, _HANG_S)
    assert isinstance(late, Accepted)
    assert (accepted.shard, accepted.position, late.position) == (late.shard, 0, 1)


async def test_A5_a_rotation_of_keys_does_not_overtake_an_append(open_lake: OpenLake) -> None:
    lake = await open_lake(idempotency_window_s=0.1)
    table = await lake.create()
    view = await lake.second()
    first = entry_of(table, [1], key="k", ordering_key="one")
    shard = lake.bus.shard_of(1, ordering_of(first))
    elsewhere = ordering_on(lake, table, lambda other: other != shard)
    await lake.advance_s(0.15)  # the generation of keys is due to be left
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_COUNTER.format(shard))
        under_way = asyncio.ensure_future(lake.bus.append(first))
        await obstacle.stops(1)  # its key is written, and not committed
        await view.bus.purge()
        again = asyncio.ensure_future(
            view.bus.append(entry_of(table, [1], key="k", ordering_key=elsewhere))
        )
        await obstacle.stops(2, unless=again)
        await obstacle.go()
        outcomes = await asyncio.wait_for(asyncio.gather(under_way, again), _HANG_S)
    assert [type(outcome) for outcome in outcomes] == [Accepted, KeyTaken]


async def test_B10_a_rotation_of_segments_does_not_overtake_an_append(open_lake: OpenLake) -> None:
    lake = await open_lake(segment_ring_rotate_bytes=1, segment_ring_rotate_age_s=0.01)
    table = await lake.create()
    view = await lake.second()
    ids = [n * 7_919 % 1_000_003 for n in range(30_000)]
    shard = (await lake.accept(entry_of(table, ids, ordering_key="one"))).shard
    await lake.drain()
    await lake.advance_s(0.02)  # the ring of segments is due to be left, and all in it is terminal
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_COUNTER.format(shard))
        under_way = asyncio.ensure_future(
            lake.bus.append(entry_of(table, [1, 2, 3], ordering_key="one"))
        )
        await obstacle.stops(1)  # its segment is written, and not committed
        await view.bus.purge()
        await obstacle.go()
        assert isinstance(await asyncio.wait_for(under_way, _HANG_S), Accepted)
    for _ in range(2):
        await view.bus.purge()
    worker = lake.worker()
    (entry,) = await worker.read(await worker.claim())
    assert entry.ids == [1, 2, 3]


async def test_A12_a_schema_change_waits_for_an_append_under_way(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_KEY, key_hash(1, "t", "k"))
        appending = asyncio.ensure_future(lake.bus.append(entry_of(table, [1], key="k")))
        await obstacle.stops(1)  # it has found its schema version to be current
        changing = asyncio.ensure_future(
            view.catalog.alter_table(schema=with_a_column(table), expected_version=table.version)
        )
        await obstacle.stops(2, unless=changing)
        await obstacle.go()
        outcome = await asyncio.wait_for(appending, _HANG_S)
        change = await asyncio.wait_for(changing, _HANG_S)
    assert isinstance(outcome, Accepted)
    changed_at = (await lake.catalog.snapshot(change.snapshot_id)).published_at
    assert outcome.receipt.accepted_at < changed_at


async def test_A12_a_drop_waits_for_an_append_under_way(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_KEY, key_hash(1, "t", "k"))
        appending = asyncio.ensure_future(lake.bus.append(entry_of(table, [1], key="k")))
        await obstacle.stops(1)
        dropping = asyncio.ensure_future(view.catalog.begin_drop(name="t"))
        await obstacle.stops(2, unless=dropping)
        await obstacle.go()
        outcome = await asyncio.wait_for(appending, _HANG_S)
        ticket = await asyncio.wait_for(dropping, _HANG_S)
    assert isinstance(outcome, Accepted)
    assert ticket.positions[outcome.shard] == outcome.position + 1


async def test_C7_a_schema_change_that_waits_does_not_stop_appends(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(_HOLD_HEAD)  # as a publication does
        changing = asyncio.ensure_future(
            view.catalog.alter_table(schema=with_a_column(table), expected_version=table.version)
        )
        await obstacle.stops(1)
        await asyncio.wait_for(lake.accept(entry_of(table, [1])), _SOON_S)
        await obstacle.go()
        await asyncio.wait_for(changing, _HANG_S)


async def test_C6_a_payload_that_was_collected_is_not_appended(
    lake: LakeHarness, table: TableSchema
) -> None:
    class CollectedStore(MemoryObjectStore):
        """Collection comes by between the put of a payload and the append that names it."""

        async def put_new(self, key: str, data: bytes) -> None:
            await super().put_new(key, data)
            folder, _, name = key.partition("/")
            if folder == "bus":
                intent = uuid.UUID(name.removesuffix(".segment"))
                await execute(lake, "DELETE FROM lakebus.write_intent WHERE file_id = $1", intent)
                await self.delete(key)

    assert isinstance(lake, PostgresHarness)
    before = await lake.bus.ends()
    spilling = await PostgresLake.open(
        lake.dsn,
        bus_settings=dataclasses.replace(lake.settings, claim_check_bytes=1),
        object_store=CollectedStore(),
    )
    try:
        with pytest.raises(Unavailable):
            await spilling.bus.append(entry_of(table, [1], key="k"))
    finally:
        await spilling.close()
    assert await lake.bus.find_key(1, "t", "k") is None
    assert await lake.bus.ends() == before


# --- claims ---------------------------------------------------------------------------------------


async def test_B2_two_claimers_at_one_place_get_two_ranges(open_lake: OpenLake) -> None:
    lake = await open_lake(claim_entries_max=1, lease_ttl_ms=20_000)
    table = await lake.create()
    await lake.accept_many(table, 2)
    view = await lake.second()
    async with obstacle_in(lake) as obstacle:
        # Claims get as far as writing their lease, after they have read where to go on.
        await obstacle.hold("LOCK TABLE lakebus.bus_lease IN SHARE MODE")
        first = asyncio.ensure_future(lake.bus.claim(new_uuid()))
        await obstacle.stops(1)
        second = asyncio.ensure_future(view.bus.claim(new_uuid()))
        await obstacle.stops(2, unless=second)
        await obstacle.go()
        claims = list(await asyncio.wait_for(asyncio.gather(first, second), _HANG_S))
    claims += [await lake.bus.claim(new_uuid()) for _ in range(2)]
    given = [claim.lease.lo for claim in claims if isinstance(claim, Claim)]
    assert sorted(given) == [0, 1]


# --- publication ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "outcome"),
    [("COMMIT", CommitOutcome.INTENT_LOST), ("ROLLBACK", CommitOutcome.PUBLISHED)],
)
async def test_C6_a_collection_under_way_is_waited_for(
    lake: LakeHarness, table: TableSchema, end: str, outcome: CommitOutcome
) -> None:
    await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(
            "DELETE FROM lakebus.write_intent WHERE file_id = $1", commit.files[0].file_id
        )
        publishing = asyncio.ensure_future(worker.publish(commit))
        await obstacle.stops(1)
        await obstacle.go(how=end)
        published = await asyncio.wait_for(publishing, _HANG_S)
    assert published.outcomes == {commit.commit_id: outcome}


@dataclasses.dataclass(frozen=True, slots=True)
class UnderWay:
    """A publication that has begun and waits for the lease row, which a stranger holds."""

    publication_id: uuid.UUID
    commit: Commit
    publishing: asyncio.Future[Published]
    obstacle: Obstacle


@asynccontextmanager
async def publication_under_way(lake: LakeHarness, table: TableSchema) -> AsyncIterator[UnderWay]:
    await lake.accept_many(table, 1)
    worker = lake.worker()
    commit = await worker.stage(await worker.claim())
    publication_id = new_uuid()
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(
            "SELECT 1 FROM lakebus.bus_lease WHERE lease_id = $1 FOR UPDATE", commit.lease.lease_id
        )
        publishing = asyncio.ensure_future(lake.catalog.publish(publication_id, [commit]))
        await obstacle.stops(1)
        yield UnderWay(publication_id, commit, publishing, obstacle)


async def test_C5_reading_back_waits_for_a_publication_under_way(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with publication_under_way(lake, table) as first:
        asking = asyncio.ensure_future(view.catalog.publish_outcome(first.publication_id))
        await first.obstacle.stops(2, unless=asking)
        await first.obstacle.go()
        published, told = await asyncio.wait_for(asyncio.gather(first.publishing, asking), _HANG_S)
    assert published.outcomes == {first.commit.commit_id: CommitOutcome.PUBLISHED}
    assert told == published


async def test_C5_a_repeat_waits_for_the_publication_under_way(
    lake: LakeHarness, table: TableSchema
) -> None:
    view = await lake.second()
    async with publication_under_way(lake, table) as first:
        again = asyncio.ensure_future(view.catalog.publish(first.publication_id, [first.commit]))
        await first.obstacle.stops(2)
        await first.obstacle.go()
        published, repeated = await asyncio.wait_for(
            asyncio.gather(first.publishing, again), _HANG_S
        )
    assert published.outcomes == {first.commit.commit_id: CommitOutcome.PUBLISHED}
    assert repeated == published


async def test_C4_a_clock_that_stepped_back_gives_later_times_all_the_same(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 1)
    # As it looks after the clock stepped back by an hour.
    await execute(lake, "UPDATE lakebus.lake SET published_at = published_at + interval '1 hour'")
    times = [(await lake.catalog.head()).published_at]
    await lake.worker().publish_one()
    times.append((await lake.catalog.head()).published_at)
    await lake.create("u")
    times.append((await lake.catalog.head()).published_at)
    assert times == sorted(set(times))


async def test_C4_a_clock_that_stepped_back_does_not_open_closed_times(
    lake: LakeHarness, table: TableSchema
) -> None:
    await lake.accept_many(table, 1)
    await lake.advance_s(0.002)
    answered = (await lake.catalog.head()).now
    await lake.catalog.snapshot_at(answered)
    assert (await lake.catalog.head()).closed_until >= answered
    push = "UPDATE lakebus.lake SET closed_until = closed_until + interval '1 hour'"
    for change in (lambda: lake.worker().publish_one(), lambda: lake.create("u")):
        await execute(lake, push)
        closed_until = (await lake.catalog.head()).closed_until
        await change()
        assert (await lake.catalog.head()).published_at > closed_until


async def test_B4_a_renewal_and_a_publication_of_the_same_leases_never_deadlock(
    open_lake: OpenLake,
) -> None:
    lake = await open_lake(claim_entries_max=1, lease_ttl_ms=20_000)
    table = await lake.create()
    await lake.accept_many(table, 2)
    view = await lake.second()
    worker = lake.worker()
    first, second = [await worker.stage(await worker.claim()) for _ in range(2)]
    leases = [second.lease, first.lease]
    await lake.bus.renew([first.lease])  # its row lies behind the other one from here on
    async with obstacle_in(lake) as obstacle:
        await obstacle.hold(
            "SELECT 1 FROM lakebus.bus_lease WHERE lease_id = $1 FOR UPDATE", first.lease.lease_id
        )
        publishing = asyncio.ensure_future(worker.publish(first, second))
        await obstacle.stops(1)
        renewing = asyncio.ensure_future(view.bus.renew(leases))
        await obstacle.stops(2)
        await obstacle.go()
        published = await asyncio.wait_for(publishing, _HANG_S)
        renewed = await asyncio.wait_for(renewing, _HANG_S)
    assert set(published.outcomes.values()) == {CommitOutcome.PUBLISHED}
    assert renewed == []
