"""M25: purging the bus, killed at each of its steps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from pathlib import Path

import asyncpg
import pytest

from lakebus.errors import Unavailable
from lakebus.schemas import TableSchema
from storage.bus.interface import Accepted, PurgeReport
from storage.bus.settings import BusSettings
from storage.files.objects import MemoryObjectStore, ObjectStore
from storage.postgres import PostgresLake, purging
from tests.conformance.harness import LakeView, entry_of
from tests.conformance.worker import Worker
from tests.failpoints.actions import Raise
from tests.failpoints.markers import markers_of
from tests.failpoints.points import Failpoints
from tests.failpoints.sql import SqlPause, SqlTerminate
from tests.matrix.collecting import collect_now, deleted_keys
from tests.matrix.conftest import OpenMatrixLake
from tests.matrix.rig import MatrixLake, keyed_entries, locks_waited_for, named

pytestmark = pytest.mark.usefixtures("patient_sessions")

WINDOW_S = 0.05
#: Rings turn as soon as they hold 64 KiB (the product's least), keys as soon as a window is over.
PURGING = {
    "idempotency_window_s": WINDOW_S,
    "segment_ring_rotate_bytes": 1,
    "segment_ring_rotate_age_s": 0.01,
}
#: Passes after which every step must have had something to do: rings of four and of three.
PASSES_MAX = 12
CALLS = {
    "rotate_segments": ["rotate_segments(1, '10ms')"],
    "switch_segments": ["rotate_segments(1, '10ms')"],
    "truncate_segments": [f"truncate_segments({ring})" for ring in range(4)],
    "rotate_keys": [f"rotate_keys('{WINDOW_S} s')"],
    "truncate_keys": [f"truncate_keys({ring}, '{WINDOW_S} s')" for ring in range(3)],
}
PLACES = [
    *markers_of("rotate_segments"),
    *markers_of("switch_segments"),
    *markers_of("truncate_segments"),
    *markers_of("rotate_keys"),
    *markers_of("truncate_keys"),
]


def wide_ids() -> list[int]:
    """Enough of what cannot be compressed to fill a ring."""
    chance = random.Random(5)
    return [chance.randrange(2**60) for _ in range(9_000)]


class Passes:
    """Gives purging work: before each pass there is something terminal in the ring and in the keys
    that are in use, something live, and a window has gone by."""

    def __init__(self, lake: MatrixLake, table: TableSchema) -> None:
        self.lake = lake
        self._table = table
        self._next = 0
        self._wide = wide_ids()

    async def prepare(self) -> None:
        lake = self.lake
        await lake.drain()
        await lake.accept(entry_of(self._table, self._wide, ordering_key="one"))
        await self._keyed("two")
        await lake.drain()
        await self._keyed("one")
        await self._keyed("two")
        await lake.advance_s(WINDOW_S)

    async def _keyed(self, ordering_key: str) -> None:
        self._next += 1
        (entry,) = keyed_entries(self._table, [self._next], ordering_key=ordering_key)
        await self.lake.accept(entry)


async def purge(lake: MatrixLake) -> PurgeReport:
    report = await lake.bus.purge()
    await lake.audit(drained=False, purged=True, keys=False)
    return report


async def test_M25_purging_killed_at_any_step_loses_nothing_and_is_safe_to_repeat(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    """Every step is killed when it first has something to do, and then done by the next pass: the
    places after it are reached only so."""
    lake = await open_matrix_lake(**PURGING)
    passes, left = Passes(lake, await lake.create()), set(PLACES)
    for place in PLACES:
        await lake.sql.arm(place, SqlTerminate(), times=2)
    for _ in range(PASSES_MAX):
        await passes.prepare()
        while (killed_at := await killed_pass(lake, left)) is not None:
            with named(killed_at):
                left.remove(killed_at)
                await killed_step_changes_nothing(lake, killed_at)
        if not left:
            break
    assert not left, f"never reached: {left}"
    await passes.prepare()
    await purge(lake)
    await lake.drain()
    await lake.audit(purged=True)


async def killed_pass(lake: MatrixLake, places: set[str]) -> str | None:
    """Purges; where it was killed, or None when it came to its end."""
    try:
        await purge(lake)
    except Unavailable:
        await lake.audit(drained=False, purged=True, keys=False)
        (place,) = [place for place in places if await lake.sql.hits(place)]
        return place
    return None


async def killed_step_changes_nothing(lake: MatrixLake, place: str) -> None:
    """The step alone, killed again at the same place."""
    for call in CALLS[place.partition(".")[0]]:
        before = await lake.everything()
        connection = await asyncpg.connect(lake.dsn, server_settings={"search_path": "lakebus"})
        try:
            await connection.execute(f"SELECT {call}")
        except asyncpg.PostgresConnectionError:
            await lake.unchanged_since(before)
            assert await lake.sql.hits(place) == 2
            return
        finally:
            connection.terminate()
    raise AssertionError(f"{place} was not reached again")


async def test_M25_killed_between_truncate_and_bookkeeping_the_ring_is_whole(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    """What TRUNCATE took away is there again: its bytes and its bookkeeping go together."""
    lake = await open_matrix_lake(**PURGING)
    passes = Passes(lake, await lake.create())
    await passes.prepare()
    await purge(lake)
    await passes.prepare()
    segments = "SELECT count(*) FROM lakebus.bus_segment_0"
    held = await lake.value(segments)
    assert held
    await lake.sql.arm("truncate_segments.after_truncate", SqlTerminate())
    with pytest.raises(Unavailable):
        await lake.bus.purge()
    left = "SELECT left_positions IS NOT NULL FROM lakebus.bus_ring WHERE kind = 'segment'"
    assert await lake.value(segments) == held
    assert await lake.value(f"{left} AND ring = 0")
    report = await purge(lake)
    assert report.segments_truncated == 1
    assert await lake.value(segments) == 0
    assert not await lake.value(f"{left} AND ring = 0")
    await lake.drain()
    await lake.audit(purged=True)


async def test_M25_keys_of_entries_that_are_not_terminal_outlive_every_purge(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake(**PURGING)
    table = await lake.create()
    live = await lake.offer(keyed_entries(table, range(4), ordering_key="one"))
    assert {type(one) for one in live} == {Accepted}
    await lake.sql.arm("rotate_keys.after_fence", SqlTerminate())
    await lake.advance_s(WINDOW_S)
    with pytest.raises(Unavailable):
        await lake.bus.purge()
    for turn in range(5):
        await lake.replays()
        await lake.advance_s(WINDOW_S)
        await lake.accept(entry_of(table, [turn], ordering_key="two"))
        report = await purge(lake)
        assert report.key_generations_truncated == 0
    await lake.replays()
    # Terminal at last, they keep their keys for one window more (A13).
    await lake.drain()
    await lake.replays()
    for _ in range(PASSES_MAX):
        await lake.advance_s(WINDOW_S)
        if (await purge(lake)).key_generations_truncated:
            break
    assert await lake.bus.find_key(1, "t", "key-0") is None
    await lake.audit(purged=True)


async def test_M25_ingest_goes_on_when_a_rotation_dies_with_the_fence_in_its_hand(
    open_matrix_lake: OpenMatrixLake,
) -> None:
    lake = await open_matrix_lake(**PURGING)
    table = await lake.create()
    passes = Passes(lake, table)
    await passes.prepare()
    await lake.sql.arm("switch_segments.after_state", SqlPause())
    purging = asyncio.create_task(lake.bus.purge())
    await lake.sql.reached("switch_segments.after_state")
    behind = asyncio.create_task(lake.offer(keyed_entries(table, [100])))
    while not await locks_waited_for(lake.dsn):
        await asyncio.sleep(0.005)  # a lock that is waited for gives no signal
    assert not behind.done()
    await lake.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    with pytest.raises(Unavailable):
        await purging
    (outcome,) = await behind
    assert isinstance(outcome, Accepted)
    assert await lake.value("SELECT segment_ring FROM lakebus.bus_state") == 0
    await lake.audit(drained=False, purged=True)
    await lake.sql.disarm("switch_segments.after_state")
    await purge(lake)
    assert await lake.value("SELECT segment_ring FROM lakebus.bus_state") == 1
    await lake.drain()
    await lake.audit(purged=True)


async def test_M25_killed_between_the_log_and_its_objects_no_name_is_without_its_object(
    open_matrix_lake: OpenMatrixLake, failpoints: Failpoints, tmp_path: Path
) -> None:
    lake = await open_matrix_lake(**PURGING)
    table = await lake.create()
    store = MemoryObjectStore()
    settings = dataclasses.replace(lake.settings, claim_check_bytes=1)
    spilling = await PostgresLake.open(lake.dsn, bus_settings=settings, object_store=store)
    view = LakeView(spilling.bus, spilling.catalog, spilling.jobs, spilling.upkeep)
    try:
        await lake.offer(keyed_entries(table, range(4)), view)
        worker = Worker(bus=view.bus, catalog=view.catalog, files=lake.files)
        await worker.publish_one()
        failpoints.arm("purging.after_trim", Raise(Crashed()), times=None)
        await lake.advance_s(WINDOW_S)
        await crash_while_trimming(spilling, settings, store)
        await lake.offer(keyed_entries(table, range(4, 8)), view)  # live, in the next generation
        for _ in range(PASSES_MAX):
            await lake.advance_s(WINDOW_S)
            await crash_while_trimming(spilling, settings, store)
            named_now, kept = await objects(lake, store)
            assert named_now <= kept, "a log row names an object that is gone"
            if kept - named_now:
                break
        assert len(kept - named_now) == len(named_now) == 1
        failpoints.disarm("purging.after_trim")
        await trim(spilling, settings, store)
        assert await objects(lake, store) == (named_now, kept)
        # Its record went with the log row, so the next collection finds it (E3).
        report = await collect_now(spilling, store, tmp_path)
        assert deleted_keys(report) == kept - named_now
        assert await objects(lake, store) == (named_now, named_now)
        await worker.publish_one()
        await lake.audit(purged=True)
    finally:
        await spilling.close()


async def test_M25_a_payload_that_was_purged_is_recorded_as_deleted(
    open_matrix_lake: OpenMatrixLake, failpoints: Failpoints, tmp_path: Path
) -> None:
    """And one whose purger died after the delete is deleted again, which does no harm."""
    lake = await open_matrix_lake(**PURGING)
    table = await lake.create()
    store = MemoryObjectStore()
    settings = dataclasses.replace(lake.settings, claim_check_bytes=1)
    spilling = await PostgresLake.open(lake.dsn, bus_settings=settings, object_store=store)
    view = LakeView(spilling.bus, spilling.catalog, spilling.jobs, spilling.upkeep)
    worker = Worker(bus=view.bus, catalog=view.catalog, files=lake.files)
    try:
        for turn in range(PASSES_MAX):
            await lake.offer(keyed_entries(table, range(4 * turn, 4 * turn + 4)), view)
            await worker.publish_one()
            if turn == PASSES_MAX - 4:
                failpoints.arm("purging.after_objects", Raise(Crashed()), times=None)
            await lake.advance_s(WINDOW_S)
            with contextlib.suppress(Crashed):
                await trim(spilling, settings, store)
        named_now, kept = await objects(lake, store)
        assert kept == named_now
        states = {one.state for one in await spilling.upkeep.condemned()}
        assert states == {"deleted", "deleting"}
        await collect_now(spilling, store, tmp_path)
        records = await spilling.upkeep.condemned()
        assert {(one.state, one.reason) for one in records} == {("deleted", "payload")}
        assert named_now.isdisjoint(one.object_key for one in records)
        assert await objects(lake, store) == (named_now, named_now)
        await lake.audit(purged=True)
    finally:
        await spilling.close()


class Crashed(Exception):
    """Stands for the end of the process: nothing of the product catches it."""


async def trim(lake: PostgresLake, settings: BusSettings, store: ObjectStore) -> PurgeReport:
    """A purge that has not looked for what became terminal: objects go with their log rows."""

    return await purging.purge(lake.pools[0], settings=settings, object_store=store)


async def crash_while_trimming(
    lake: PostgresLake, settings: BusSettings, store: ObjectStore
) -> None:
    with pytest.raises(Crashed):
        await trim(lake, settings, store)


async def objects(lake: MatrixLake, store: MemoryObjectStore) -> tuple[set[str], set[str]]:
    """What the log names, and what the store keeps."""
    names = await lake.value(
        "SELECT coalesce(array_agg(payload_key), '{}') FROM lakebus.bus_log"
        " WHERE payload_key IS NOT NULL"
    )
    return set(names), {key async for key, _ in store.list("bus/")}
