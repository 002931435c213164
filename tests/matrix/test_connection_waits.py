"""M22 and M23: connections of whoever waits die or go silent; entries of a token are set aside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from lakebus.errors import Quarantined, Unavailable, VisibilityTimeout
from storage.bus.interface import Accepted
from storage.postgres.pool import PoolSettings
from storage.reading.barrier import Barrier, Covered
from storage.reading.postgres_listener import PostgresHeadListener
from storage.reading.watcher import HeadWatcher
from tests.conformance.harness import entry_of
from tests.faults.proxy import Act, Rule
from tests.matrix.connection_rig import (  # noqa: F401 (fixtures)
    FaultyLake,
    Wired,
    lake,
    template,
)

_HANG_S = 20.0
_READ_S = 0.4


@dataclass(frozen=True, slots=True)
class Reader:
    """A process that reads: watcher, listener and barrier behind a proxy."""

    wired: Wired
    watcher: HeadWatcher
    barrier: Barrier

    def waiting(self, accepted: Accepted, *, within_s: float = _HANG_S) -> asyncio.Task[Covered]:
        token = accepted.receipt.visibility_token
        return asyncio.create_task(
            self.barrier.wait_for([token], deadline_s=time.monotonic() + within_s)
        )

    async def entered(self, count: int = 1) -> None:
        async with asyncio.timeout(_HANG_S):
            while self.watcher.waiting < count:
                await asyncio.sleep(0.001)  # a waiting room has no bell


@asynccontextmanager
async def reader(
    lake: FaultyLake,  # noqa: F811
    *,
    poll_s: float = 0.05,
    check_s: float = 0.2,
) -> AsyncIterator[Reader]:
    wired = await lake.wired(pools=PoolSettings(connect_ms=400, statement_ms=400))
    listener = PostgresHeadListener(
        wired.proxy.dsn(lake.database_dsn),
        connect_s=0.4,
        check_s=check_s,
        pause_min_s=0.01,
        pause_max_s=0.1,
    )
    catalog, bus = wired.lake.catalog, wired.lake.bus
    watcher = HeadWatcher(catalog, listen=listener.wake_ups, poll_s=poll_s, read_s=_READ_S)
    barrier = Barrier(catalog=catalog, bus=bus, watcher=watcher, codec=wired.lake.codec)
    watcher.start()
    try:
        yield Reader(wired, watcher, barrier)
    finally:
        await watcher.stop()
        await barrier.close()


# --- M22: the watcher's connections ---------------------------------------------------------------


@pytest.mark.parametrize("poll_s", [0.05, 1.0])
async def test_M22_waiters_are_armed_again_when_every_connection_is_ended(
    lake: FaultyLake,  # noqa: F811
    poll_s: float,
) -> None:
    table = await lake.create()
    stranger = await lake.connect()
    async with reader(lake, poll_s=poll_s) as process:
        await process.watcher.fresh_head()
        for _ in range(3):
            accepted = await lake.accept(entry_of(table, ordering_key="one"))
            waits = [process.waiting(accepted) for _ in range(20)]
            await process.entered(20)
            ended = await stranger.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = ANY ($1) AND datname = current_database()"
                " AND client_port = ANY ($2)",
                ["lakebus general", "lakebus listener"],
                process.wired.proxy.upstream_ports(),
            )
            assert len(ended) >= 2
            published = await lake.worker().publish_one()
            found = await asyncio.wait_for(asyncio.gather(*waits), _HANG_S)
            assert {covered.head.snapshot_id for covered in found} == {published.snapshot_id}
            assert max(covered.waited_ms for covered in found) < 5_000
    await lake.audited()


async def test_M22_a_partition_that_heals_wakes_who_waits(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    async with reader(lake, poll_s=0.25) as process:
        accepted = await lake.accept(entry_of(table))
        wait = process.waiting(accepted)
        await process.entered()
        partition = process.wired.proxy.arm(Rule(act=Act.HOLD, times=None))
        published = await lake.worker().publish_one()
        with pytest.raises((Unavailable, VisibilityTimeout)):  # and no head of before
            await process.barrier.wait_for(deadline_s=time.monotonic() + 2 * _READ_S)
        assert not wait.done()
        partition.lift()
        assert (await asyncio.wait_for(wait, _HANG_S)).head.snapshot_id == published.snapshot_id
        assert (await process.watcher.fresh_head()).snapshot_id == published.snapshot_id
    await lake.audited()


async def test_M22_connections_that_fell_silent_are_replaced(
    lake: FaultyLake,  # noqa: F811
) -> None:
    # Nothing ever comes from the old connections, not even an end; new ones work.
    table = await lake.create()
    async with reader(lake) as process:
        accepted = await lake.accept(entry_of(table))
        wait = process.waiting(accepted)
        await process.entered()
        hole = process.wired.proxy.arm(Rule(act=Act.DROP, times=None))
        hole.lift()
        published = await lake.worker().publish_one()
        assert (await asyncio.wait_for(wait, _HANG_S)).head.snapshot_id == published.snapshot_id
    await lake.audited()


async def test_M22_a_deadline_is_honoured_in_the_dark(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    async with reader(lake) as process:
        accepted = await lake.accept(entry_of(table))
        in_the_room = process.waiting(accepted, within_s=0.6)
        await process.entered()
        hole = process.wired.proxy.arm(Rule(act=Act.DROP, times=None))
        began_s = time.monotonic()
        at_the_door = process.waiting(accepted, within_s=0.3)  # asks for a head that never comes
        await lake.worker().publish_one()
        for wait, within_s in ((at_the_door, 0.3), (in_the_room, 0.6)):
            with pytest.raises(VisibilityTimeout):
                await asyncio.wait_for(wait, _HANG_S)
            assert time.monotonic() - began_s < within_s + 0.5
        hole.lift()
        found = await asyncio.wait_for(process.waiting(accepted), _HANG_S)
        assert found.head.snapshot_id == (await lake.catalog.head()).snapshot_id
    await lake.audited()


async def test_M22_a_wait_that_could_not_ask_for_the_ends_still_ends_in_coverage(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    async with reader(lake) as process:
        accepted = await lake.accept(entry_of(table))
        lost = process.wired.proxy.arm(Rule(act=Act.CUT, sql="FROM bus_shard"))
        wait = process.waiting(accepted)
        await process.entered()
        assert lost.fired
        published = await lake.worker().publish_one()
        assert (await asyncio.wait_for(wait, _HANG_S)).head.snapshot_id == published.snapshot_id
    await lake.audited()


# --- M23: entries that were set aside -------------------------------------------------------------


async def test_M23_only_ones_own_quarantined_entry_is_an_error(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    accepted = [await lake.accept(entry_of(table, [n], ordering_key="one")) for n in range(4)]
    async with reader(lake) as process:
        waits = [process.waiting(one) for one in accepted]
        await process.entered(4)
        worker = lake.worker()
        commit = await worker.stage(await worker.claim(), quarantine=[1])
        published = await worker.publish(commit)
        found = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), _HANG_S)
        assert [isinstance(one, Quarantined) for one in found] == [False, True, False, False]
        for neighbour in (found[0], found[2], found[3]):
            assert isinstance(neighbour, Covered)
            assert neighbour.head.snapshot_id == published.snapshot_id
        # Merged, the token has both as its own.
        both = [one.receipt.visibility_token for one in accepted[1:3]]
        with pytest.raises(Quarantined) as error:
            await process.barrier.wait_for(both, deadline_s=time.monotonic() + _HANG_S)
        assert error.value.members["batch_id"] == accepted[1].receipt.batch_id
        # Replayed, it is an entry like others: its successor carries the rows.
        (item,) = await lake.bus.quarantine_items()
        successor = await lake.accept(entry_of(table, [1], key="again", ordering_key="one"))
        await lake.bus.mark_replayed(item.quarantine_id, successor.receipt.batch_id)
        await asyncio.wait_for(process.waiting(accepted[1]), _HANG_S)
    await lake.audited()


async def test_M23_a_verdict_whose_reply_is_lost_is_never_taken_for_clean(
    lake: FaultyLake,  # noqa: F811
) -> None:
    table = await lake.create()
    accepted = [await lake.accept(entry_of(table, [n], ordering_key="one")) for n in range(2)]
    worker = lake.worker()
    await worker.publish(await worker.stage(await worker.claim(), quarantine=[0]))
    async with reader(lake) as process:
        lost = process.wired.proxy.arm(Rule(act=Act.CUT, sql="JOIN bus_quarantine q ON", times=2))
        for one in accepted:
            with pytest.raises(Unavailable):
                await process.waiting(one)
        assert len(lost.fired) == 2
        with pytest.raises(Quarantined):
            await process.waiting(accepted[0])
        await process.waiting(accepted[1])
    await lake.audited()
